"""`penstock serve`: accept mail, judge it, deliver it."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from penstock.app import Server
from penstock.cli.running import listen_on, print_authority, run
from penstock.cli.workers import indexes, supervise, work
from penstock.config import ConfigError, Settings, load


@click.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="TOML file; see `penstock config describe`.",
)
@click.option(
    "--listen",
    "addresses",
    multiple=True,
    metavar="HOST:PORT",
    help="Listen here instead (127.0.0.1:2525 without a file; unix:/path for a unix socket). May be repeated.",
)
@click.option("--data", "data_dir", metavar="DIR", help="Folder of all that is kept [default: ./penstock-data].")
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Processes that share the work [default: 1, or the file's].",
)
@click.option("--worker", hidden=True, help="For the supervisor.")
def serve(
    config_file: Path | None, addresses: tuple[str, ...], data_dir: str | None, workers: int | None, worker: str | None
) -> None:
    """Accept mail and deliver it.

    Without any option this is a complete server: it listens on 127.0.0.1:2525, offers STARTTLS with a certificate of
    its own making, and delivers into the Maildir ./penstock-data/maildir. A message is on stable storage before its
    250.

    With several workers, each has a part of the spool, limits and a relay of its own; one that ends is started again.

    SIGTERM and SIGINT stop it gently: idle clients hear 421, messages under way may arrive. A second one stops it now.
    """
    try:
        settings = Settings() if config_file is None else load(config_file)
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    if data_dir is not None or config_file is None:
        settings = msgspec.structs.replace(settings, data_dir=str(Path(data_dir or settings.data_dir).absolute()))
    settings = listen_on(settings, addresses)
    if worker is not None:
        work(settings, worker)
        return
    count = workers or settings.server.workers
    wanted = indexes(settings, count)
    if len(wanted) > 1:
        supervise(settings, wanted, count)
        return

    def announce(parts: Server) -> None:
        where = ", ".join(parts.addresses)
        click.echo(f"penstock: listening on {where}; {settings.delivery.kind} below {settings.data_dir}")
        print_authority(parts)

    run(settings, announce)
