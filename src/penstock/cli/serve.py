"""`penstock serve`: accept mail, filter it, deliver it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import click
import msgspec

from penstock.app import Server
from penstock.cli.filecheck import tls_problems
from penstock.cli.notify import ServiceManager
from penstock.cli.once import OnceCommand
from penstock.cli.running import account_of, listen_on, prepare_data_dir, print_authority, run
from penstock.cli.workers import indexes, needs_supervisor, supervise, work
from penstock.config import ConfigError, Settings, check, load
from penstock.spool.spool import SpoolError

_replace = msgspec.structs.replace


@click.command(cls=OnceCommand)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="Configuration file (TOML); `penstock config describe` prints all keys.",
)
@click.option(
    "--listen",
    "addresses",
    multiple=True,
    metavar="HOST:PORT",
    help="Listen on this address instead of the configured ones; unix:/path for a unix socket. May be repeated. "
    "[default without --config: 127.0.0.1:2525]",
)
@click.option("--data", "data_dir", metavar="DIR", help="State directory [default: ./penstock-data].")
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Number of worker processes [default: server.workers, 1].",
)
@click.option("--worker", hidden=True, help="Used by the supervisor.")
def serve(
    config_file: Path | None, addresses: tuple[str, ...], data_dir: str | None, workers: int | None, worker: str | None
) -> None:
    """Accept mail and deliver it.

    Without options, this is a complete server: it listens on 127.0.0.1:2525, offers STARTTLS with a generated
    certificate, and delivers to the Maildir ./penstock-data/maildir. A message is on stable storage before it is
    answered with 250.

    Each of several workers has its own part of the spool and its own relay. A worker that ends or hangs is replaced.

    SIGTERM and SIGINT stop the server gracefully: idle clients receive 421, messages in progress are accepted for
    server.grace seconds. A second signal stops it immediately. SIGHUP reads the configuration again, SIGUSR1 opens the
    journal file again, SIGUSR2 writes the state of the server to the journal, SIGQUIT prints the stacks of the process.
    """
    if worker is not None:
        work(worker)
        return

    def load_settings() -> Settings:
        settings = Settings() if config_file is None else load(config_file)
        if data_dir is not None or config_file is None:
            settings = _replace(settings, data_dir=str(Path(data_dir or settings.data_dir).absolute()))
        if workers is not None:
            settings = _replace(settings, server=_replace(settings.server, workers=workers))
        return listen_on(settings, addresses)

    try:
        settings = load_settings()
        check(settings)
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    wrong = tls_problems(settings)  # before OpenSSL prompts for a passphrase
    if wrong:
        raise click.ClickException("\n".join(wrong))
    account = account_of(settings)
    try:
        if account is not None:
            prepare_data_dir(settings, account)
        wanted = indexes(settings, account)
    except (OSError, SpoolError, sqlite3.Error) as exc:
        raise click.ClickException(str(exc)) from exc
    manager = ServiceManager()
    if needs_supervisor(settings, wanted, manager):
        supervise(settings, load_settings, wanted, manager, account)
        return

    def announce(parts: Server) -> None:
        where = ", ".join(parts.addresses)
        click.echo(f"penstock: listening on {where}; {settings.delivery.kind} below {settings.data_dir}")
        print_authority(parts)

    run(settings, announce, load=load_settings)
