"""`penstock user`: the users who may authenticate."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from penstock.auth.users import UsersFile, check_name
from penstock.cli.once import OnceGroup

_MAX_LINE = 4096
"""Octets read from standard input: more than the longest password, so that a longer one is refused, not cut."""

_FILE = click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("penstock-data/users"),
    show_default=True,
    help="Users file.",
)


@click.group(cls=OnceGroup)
def user() -> None:
    """Add, remove and list the users of a users file. A running server reads the file again when it changes."""


@contextmanager
def _reporting() -> Iterator[None]:
    """Turn errors of a users file into one line and exit code 1."""
    try:
        yield
    except (OSError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc


def _password(from_stdin: bool) -> str:
    if not from_stdin:
        password: str = click.prompt("Password", hide_input=True, confirmation_prompt=True)
        return password
    line = sys.stdin.buffer.readline(_MAX_LINE)
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as exc:
        raise click.ClickException("the password is not UTF-8 text") from exc


@user.command()
@click.argument("name")
@click.option("--password-stdin", is_flag=True, help="Read the password from the first line of standard input.")
@click.option("--replace", is_flag=True, help="Change the password of an existing user.")
@_FILE
def add(name: str, password_stdin: bool, replace: bool, file: Path) -> None:
    """Add a user; prompts for the password twice."""
    users = UsersFile(file)
    exists = click.ClickException(f"{name} already exists in {file}; use --replace to change the password")
    with _reporting():  # before the user types a password
        check_name(name)
        if not replace and name in users.names():
            raise exists
    password = _password(password_stdin)
    with _reporting():
        if not users.add(name, password, replace=replace):
            raise exists
    click.echo(f"added {name} to {file}")


@user.command()
@click.argument("name")
@_FILE
def remove(name: str, file: Path) -> None:
    """Remove a user."""
    with _reporting():
        if not UsersFile(file).remove(name):
            raise click.ClickException(f"{name} does not exist in {file}")
    click.echo(f"removed {name} from {file}")


@user.command(name="list")
@_FILE
def list_users(file: Path) -> None:
    """List the users in alphabetical order, one per line."""
    with _reporting():
        names = sorted(UsersFile(file).names())
    for name in names:
        click.echo(name)
