"""The command line. Each command has a module of its own."""

from __future__ import annotations

import click

from penstock import __version__
from penstock.cli.cluster import cluster
from penstock.cli.config import config
from penstock.cli.ctl import ctl
from penstock.cli.judge import judge
from penstock.cli.load import load
from penstock.cli.serve import serve
from penstock.cli.sink import sink
from penstock.cli.spool import spool
from penstock.cli.status import status
from penstock.cli.top import top
from penstock.cli.user import user

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


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="penstock", message="%(prog)s %(version)s")
def main() -> None:
    """Penstock is an SMTP server for high volumes of mail.

    `serve` accepts mail, filters it and delivers it. `sink` accepts mail and discards it: a target for load tests.
    `load` generates mail.
    """


main.add_command(serve)
main.add_command(sink)
main.add_command(load)
main.add_command(judge)
main.add_command(spool)
main.add_command(cluster)
main.add_command(config)
main.add_command(status)
main.add_command(top)
main.add_command(ctl)
main.add_command(user)
