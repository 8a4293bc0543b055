"""`penstock user`: who may authenticate."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from penstock.auth.users import UsersFile, check_name

_MAX_LINE = 4096
"""Octets read of standard input: more than a password has, so that one too long is refused and not cut."""

_FILE = click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("penstock-data/users"),
    show_default=True,
    help="The users file.",
)


@click.group()
def user() -> None:
    """Add, remove and list the users of a users file. A running server notices."""


@contextmanager
def _telling() -> Iterator[None]:
    """Turn what a users file raises into one line and exit code 1."""
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
        raise click.ClickException("a password is UTF-8 text") from exc


@user.command()
@click.argument("name")
@click.option("--password-stdin", is_flag=True, help="Read the password from the first line of standard input.")
@click.option("--replace", is_flag=True, help="Give a user who is there already a new password.")
@_FILE
def add(name: str, password_stdin: bool, replace: bool, file: Path) -> None:
    """Add a user; the password is asked for twice."""
    users = UsersFile(file)
    taken = click.ClickException(f"{name} is in {file} already; --replace gives a new password")
    with _telling():  # before anybody types a password for nothing
        check_name(name)
        if not replace and name in users.names():
            raise taken
    password = _password(password_stdin)
    with _telling():
        if not users.add(name, password, replace=replace):
            raise taken
    click.echo(f"{name} may authenticate")


@user.command()
@click.argument("name")
@_FILE
def remove(name: str, file: Path) -> None:
    """Remove a user."""
    with _telling():
        if not UsersFile(file).remove(name):
            raise click.ClickException(f"there is no {name} in {file}")
    click.echo(f"{name} was removed")


@user.command(name="list")
@_FILE
def list_users(file: Path) -> None:
    """List the users, a line each, in alphabetical order."""
    with _telling():
        names = sorted(UsersFile(file).names())
    for name in names:
        click.echo(name)
