"""The command line. Each command has its own module."""

from __future__ import annotations

import importlib
from typing import Final

import click

from penstock import __version__

_COMMANDS: Final = ("cluster", "config", "ctl", "judge", "load", "serve", "sink", "spool", "status", "top", "user")
"""Each is a command in the module of that name."""
EPILOG = """\b
Examples:
  penstock serve                              run a complete server on 127.0.0.1:2525, Maildir in ./penstock-data
  penstock serve --config penstock.toml       run a server with a configuration file
  penstock sink --messages 10000              receive and discard 10,000 messages, print counters
  penstock sink --web 127.0.0.1:8025          the same with a live web page; `penstock top` shows it in a terminal
  penstock load 127.0.0.1:2525                send 1,000 messages as fast as possible
  penstock config describe > penstock.toml    all configuration keys with descriptions and defaults
  penstock user add alice                     create a user for AUTH
"""


class _Commands(click.Group):
    """Imports the module of a command when it is asked for: all of them together take half a second."""

    def list_commands(self, _: click.Context) -> list[str]:
        """Return the names in the order of the help."""
        return [*_COMMANDS]

    def get_command(self, _: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; None if the name is unknown."""
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"penstock.cli.{cmd_name}"), cmd_name)
        return command


@click.group(
    cls=_Commands,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="penstock", message="%(prog)s %(version)s")
def main() -> None:
    """Penstock is an SMTP server for high volumes of mail.

    `serve` accepts mail, filters it and delivers it. `sink` accepts mail and discards it: a target for load tests.
    `load` generates mail.
    """
