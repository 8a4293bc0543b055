"""`penstock sink`: accept everything, misbehave if asked to, and say what has arrived: the target of a load test."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import click
import msgspec

from penstock.app import Overrides, Server
from penstock.cli import reports
from penstock.cli.faulting import Faulting, fault_options
from penstock.cli.receiving import Account, Wishes, as_expected, receipt_options
from penstock.cli.running import listen_on, run
from penstock.cli.smtpsink import letters_help
from penstock.config import ConfigError, DeliverySettings, ListenerSettings, Settings, load
from penstock.delivery.discard import DiscardDelivery
from penstock.journal import JournalSettings
from penstock.policy.recipients import RecipientSettings
from penstock.server.limits import LimitSettings
from penstock.server.listener import WireSettings
from penstock.sink.report import encode

_replace = msgspec.structs.replace

_LISTENER = ListenerSettings(
    max_size=0,
    max_hops=0,
    limits=LimitSettings(recipients=100_000, errors=1_000_000, unknown_recipients=1_000_000),
    wire=WireSettings(bare_lf="accept", bare_cr="accept", nul="accept", long_line="accept"),
)


@click.command(
    epilog=f"\b\n{letters_help()}", context_settings={"help_option_names": ["--help"], "max_content_width": 110}
)
@click.option(
    "--listen",
    "addresses",
    multiple=True,
    metavar="HOST:PORT",
    help="Listen here [default: 127.0.0.1:2525]. May be repeated.",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="Listeners, users, checks and limits as in this file of `penstock serve`; where it delivers is not looked at.",
)
@click.option(
    "--tls",
    type=click.Choice(["none", "starttls", "implicit"]),
    help="TLS of all listeners; implicit is from the first octet, as on port 465 [default: starttls].",
)
@click.option("--certificate", metavar="FILE", help="PEM chain [default: one is made for each run].")
@click.option("--key", metavar="FILE", help="PEM key [default: in the file of the certificate].")
@click.option(
    "--ca-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the authority of the certificate that is made to this file, for clients that verify.",
)
@click.option("--messages", type=click.IntRange(min=1), metavar="N", help="Stop after so many messages.")
@click.option(
    "--open",
    "is_open",
    is_flag=True,
    help="Allow an address that other machines can reach: it takes mail for all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
@fault_options
@receipt_options
@click.pass_context
def sink(
    context: click.Context,
    /,
    addresses: tuple[str, ...],
    messages: int | None,
    sessions: int | None,
    is_open: bool,
    as_json: bool,
    config_file: Path | None,
    tls: str | None,
    certificate: str | None,
    key: str | None,
    ca_file: Path | None,
    **wishes: Any,
) -> None:
    """Accept every message, and say at the end what has arrived.

    All of SMTP is spoken, STARTTLS with a generated certificate among it; without --config, bare line ends, NULs and
    long lines are accepted, and the end of the data is CR LF . CR LF all the same. SIGINT and SIGTERM stop it gently.
    """
    faulting = Faulting.take(wishes)
    letters = faulting.letters
    if letters.given.get("h") == "":
        click.echo(context.get_help())
        return
    account = Account(Wishes(**wishes), letters.stores)
    messages, sessions = messages or letters.messages, sessions or letters.sessions
    with tempfile.TemporaryDirectory(prefix="penstock-sink-") as folder:
        settings = _with_tls(_base(config_file, folder), tls, certificate, key)
        settings = faulting.prepare(settings, Path(folder) / "tls")
        if ca_file is not None:
            _copy(Path(folder) / "tls" / "ca.pem", ca_file)
        settings = listen_on(settings, (*addresses, *letters.listen()))
        counted: list[Server] = []

        def announce(parts: Server) -> None:
            counted.append(parts)
            faulting.begin(parts)
            account.begin(parts, faulting.desk)
            click.echo(f"penstock: sink on {', '.join(parts.addresses)}", err=True)

        def is_done(parts: Server) -> bool:
            if sessions is not None and parts.worker.sessions >= sessions and not parts.worker.open_connections:
                return True
            return messages is not None and _counts(parts, account)["messages"] >= messages

        run(
            settings,
            announce,
            done=is_done,
            allow_open=is_open,
            overrides=Overrides(
                delivery=account.delivery,
                authenticator=faulting.authenticator,
                metrics=account.metrics,
                components=(faulting.component,),
            ),
            beside=lambda _: account.run(faulting.desk),
        )
        for parts in counted:
            faulting.end()
            report, file = account.end(), wishes["report_file"]
            click.echo(_report(_counts(parts, account), as_json=as_json), err=file == reports.STDOUT)
            if report is not None:
                if file is not None:
                    reports.write(file, encode(report))
                if not as_expected(report):
                    raise click.ClickException("messages are missing, or came twice")


def _base(config_file: Path | None, folder: str) -> Settings:
    """Return the settings of a sink, or those of a file as far as they are about what a sink does."""
    if config_file is None:
        return Settings(
            hostname="localhost",
            data_dir=folder,
            listener=(_LISTENER,),
            delivery=DeliverySettings(kind="discard"),
            journal=JournalSettings(events="errors"),
        )
    try:
        settings = load(config_file)
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    return _replace(settings, delivery=DeliverySettings(kind="discard"), route=(), recipients=RecipientSettings())


def _with_tls(settings: Settings, mode: str | None, certificate: str | None, key: str | None) -> Settings:
    """Return the settings with the TLS of the options in every listener."""
    if key is not None and certificate is None:
        raise click.UsageError("--key goes with --certificate")
    changed: dict[str, str] = {} if mode is None else {"mode": mode}
    if certificate is not None:
        changed |= {"certificate": certificate, "key": key or ""}
    return _replace(
        settings, listener=tuple(_replace(each, tls=_replace(each.tls, **changed)) for each in settings.listener)
    )


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as exc:
        raise click.ClickException(f"{target}: {exc.strerror}") from exc


def _counts(parts: Server, account: Account) -> dict[str, int]:
    """Return what the sink has taken."""
    metrics, delivery = account.metrics, parts.delivery
    if metrics is not None:
        sessions, messages = metrics.sessions, metrics.accepted + metrics.unheard
        recipients, octets = metrics.recipients, metrics.text_octets
    else:
        assert isinstance(delivery, DiscardDelivery)
        sessions, messages = parts.worker.sessions, delivery.messages
        recipients, octets = delivery.recipients, delivery.octets
    return {"sessions": sessions, "messages": messages, "recipients": recipients, "octets": octets}


def _report(counts: dict[str, int], *, as_json: bool) -> str:
    """Return the counts as a line, or as JSON."""
    if as_json:
        return msgspec.json.encode(counts).decode()
    return " ".join(f"{name}={count}" for name, count in counts.items())
