"""`penstock user`: who may authenticate."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from penstock.auth.users import UsersFile, UsersFileError, make_hasher, make_user

_FILE = click.option(
    "--file",
    type=click.Path(path_type=Path),
    default=Path("penstock-data/users"),
    show_default=True,
    help="The users file.",
)


@click.group()
def user() -> None:
    """Add, remove and list the users of a users file. A running server notices."""


def _read(file: Path) -> UsersFile:
    users = UsersFile(file)
    try:
        users.read()
    except (OSError, UsersFileError) as exc:
        raise click.ClickException(str(exc)) from exc
    return users


@user.command()
@click.argument("name")
@click.option("--password-stdin", is_flag=True, help="Read the password from the first line of standard input.")
@click.option("--replace", is_flag=True, help="Give a user who is there already a new password.")
@_FILE
def add(name: str, password_stdin: bool, replace: bool, file: Path) -> None:
    """Add a user; the password is asked for twice."""
    users = _read(file)
    known = users.read()
    if name in known and not replace:
        raise click.ClickException(f"{name} is there already; --replace gives a new password")
    if password_stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    else:
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    try:
        known[name] = make_user(name, password, make_hasher())
        users.write(known)
    except (OSError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(f"{name} may authenticate")


@user.command()
@click.argument("name")
@_FILE
def remove(name: str, file: Path) -> None:
    """Remove a user."""
    users = _read(file)
    known = users.read()
    if known.pop(name, None) is None:
        raise click.ClickException(f"there is no {name} in {file}")
    try:
        users.write(known)
    except OSError as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(f"{name} was removed")


@user.command(name="list")
@_FILE
def list_users(file: Path) -> None:
    """List the users, a line each."""
    for name in sorted(_read(file).read()):
        click.echo(name)
