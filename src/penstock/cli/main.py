"""The command line: parses, and hands over to the command's own file."""

from __future__ import annotations

import click

from penstock import __version__
from penstock.cli.config import config
from penstock.cli.load import load
from penstock.cli.serve import serve
from penstock.cli.sink import sink
from penstock.cli.spool import spool
from penstock.cli.top import top
from penstock.cli.user import user

EPILOG = """\b
Examples:
  penstock serve                              a complete server on 127.0.0.1:2525, Maildir below ./penstock-data
  penstock serve --config penstock.toml       as the file says
  penstock sink --messages 10000              take 10,000 messages, forget them, print counts
  penstock sink --web 127.0.0.1:8025          the same with a live page; `penstock top` shows it in a terminal
  penstock config describe > penstock.toml    every key with its meaning and its default
  penstock user add alice                     a user who may authenticate
"""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="penstock", message="%(prog)s %(version)s")
def main() -> None:
    """Penstock is an SMTP server for people who receive mail by the million.

    `serve` accepts mail, judges it, and delivers it; `sink` accepts mail and forgets it, as the target of a load test.
    """


main.add_command(serve)
main.add_command(sink)
main.add_command(load)
main.add_command(spool)
main.add_command(config)
main.add_command(top)
main.add_command(user)
