"""`penstock ctl`: asks a running server to reload, drain, resume or rotate, and about its next hops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from penstock.cli.controlclient import ServerError, ask, server_options, socket_path
from penstock.cli.once import OnceCommand, OnceGroup
from penstock.control import ReloadState

_RELOAD_SECONDS = 300.0
"""Seconds for a reload: workers are replaced one after the other, and their sessions have a grace."""


def _ask(config_file: Path | None, data_dir: str | None, verb: str, **arguments: Any) -> Any:
    try:
        return ask(socket_path(config_file, data_dir), verb, **arguments)
    except ServerError as exc:
        raise click.ClickException(str(exc)) from exc


@click.group(cls=OnceGroup)
def ctl() -> None:
    """Control a running server: reload, drain, resume, rotate, hop.

    The server is found by --config and --data, as given to `penstock serve`. Exit code 1 if it does not run or
    refuses the command.
    """


@ctl.command(cls=OnceCommand)
@server_options
def reload(config_file: Path | None, data_dir: str | None) -> None:
    """Read the configuration and its files again, as SIGHUP does. Exit code 1 if they are wrong: nothing changes."""
    result = _ask(config_file, data_dir, "reload", seconds=_RELOAD_SECONDS)
    state = msgspec.convert(result, ReloadState)
    if state.result != "ok":
        raise click.ClickException(f"{state.result}: {state.reason}")
    click.echo("reloaded")


@ctl.command(cls=OnceCommand)
@click.option("--wait", is_flag=True, help="Return when the server is drained.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, 86_400),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Seconds for the relay to empty the spool.",
)
@click.option(
    "--delay",
    type=click.FloatRange(0, 3600),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="Seconds that mail is still accepted, for a load balancer to notice /readyz.",
)
@click.option("--stay", is_flag=True, help="Do not end the server when it is drained.")
@server_options
def drain(config_file: Path | None, data_dir: str | None, wait: bool, timeout: float, delay: float, stay: bool) -> None:
    """Accept no more mail, deliver what is in the spool, and end the server with code 0.

    /readyz answers 503 at once. MAIL is answered with 421 after the delay. What is left in the spool after the timeout
    stays there.
    """
    seconds = None if wait else 15.0
    arguments = {"wait": wait, "delay": delay, "most": timeout, "stay": stay}
    is_empty = _ask(config_file, data_dir, "drain", seconds=seconds, **arguments)
    left = "drained, but for mail that is left in the spool: the timeout is over"
    click.echo("draining" if not wait else "drained" if is_empty else left)


@ctl.command(cls=OnceCommand)
@server_options
def resume(config_file: Path | None, data_dir: str | None) -> None:
    """Accept mail again after `drain`."""
    _ask(config_file, data_dir, "resume", seconds=60.0)
    click.echo("resumed")


@ctl.command(cls=OnceCommand)
@server_options
def rotate(config_file: Path | None, data_dir: str | None) -> None:
    """Open the journal file again, as SIGUSR1 does: for log rotation."""
    _ask(config_file, data_dir, "rotate")
    click.echo("rotated")


@ctl.command(cls=OnceCommand)
@click.argument("hop")
@click.argument("action", type=click.Choice(("suspend", "resume", "retry")))
@server_options
def hop(config_file: Path | None, data_dir: str | None, hop: str, action: str) -> None:
    """Suspend or resume a next hop, or retry the mail that waits for it.

    HOP is the host of a next hop, or its full name as `penstock status` shows it.
    """
    number = _ask(config_file, data_dir, "hop", hop=hop, action=action, seconds=60.0)
    if action == "retry":
        click.echo(f"{number or 0} recipients will be tried now")
    else:
        click.echo(f"{hop}: {'suspended' if action == 'suspend' else 'resumed'}")
