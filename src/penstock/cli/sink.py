"""`penstock sink`: accept and discard mail, inject faults on request, report what arrived: a target for load tests."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import click
import msgspec

from penstock.app import Overrides, Server
from penstock.cli import reports
from penstock.cli.faulting import FaultInjection, fault_options
from penstock.cli.once import OnceCommand
from penstock.cli.receiving import Receiving, ReceivingOptions, as_expected, duplicates_of, receipt_options
from penstock.cli.running import listen_on, run
from penstock.cli.smtpsink import smtp_sink_help
from penstock.config import ConfigError, DeliverySettings, ListenerSettings, Settings, load
from penstock.delivery.discard import DiscardDelivery
from penstock.journal import JournalSettings
from penstock.policy.recipients import RecipientSettings
from penstock.server.limits import LimitSettings
from penstock.server.listener import WireSettings
from penstock.sink.report import Report, encode

_replace = msgspec.structs.replace

_LISTENER = ListenerSettings(
    max_size=0,
    max_hops=0,
    limits=LimitSettings(recipients=100_000, errors=1_000_000, unknown_recipients=1_000_000, auth_failures=1_000_000),
    wire=WireSettings(bare_lf="accept", bare_cr="accept", nul="accept", long_line="accept"),
)


@click.command(
    cls=OnceCommand,
    epilog=f"\b\n{smtp_sink_help()}",
    context_settings={"help_option_names": ["--help"], "max_content_width": 110},
)
@click.option(
    "--listen",
    "addresses",
    multiple=True,
    metavar="HOST:PORT",
    help="Listen on this address; unix:/path for a unix socket. May be repeated. [default: 127.0.0.1:2525]",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="Use the listeners, users, checks and limits of a `penstock serve` configuration; its delivery is ignored.",
)
@click.option(
    "--tls",
    type=click.Choice(["none", "starttls", "implicit"]),
    help="TLS mode of all listeners; implicit: from the first octet, as on port 465 [default: starttls].",
)
@click.option("--certificate", metavar="FILE", help="Certificate chain (PEM) [default: generated for each run].")
@click.option("--key", metavar="FILE", help="Private key (PEM) [default: in the certificate file].")
@click.option(
    "--ca-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the CA of the generated certificate to this file, for clients that verify.",
)
@click.option("--messages", type=click.IntRange(min=1), metavar="N", help="Stop after N messages.")
@click.option(
    "--open",
    "is_open",
    is_flag=True,
    help="Allow addresses that other machines can reach, although they accept mail for every domain.",
)
@click.option("--user", metavar="NAME", help="Run as this user after the sockets are bound and the keys are read.")
@click.option("--allow-root", is_flag=True, help="Allow root on addresses that other machines can reach.")
@click.option("--json", "as_json", is_flag=True, help="Print the final counters as JSON.")
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
    user: str | None,
    allow_root: bool,
    config_file: Path | None,
    tls: str | None,
    certificate: str | None,
    key: str | None,
    ca_file: Path | None,
    **options: Any,
) -> None:
    """Accept and discard every message, and report what arrived.

    The sink has all extensions of `penstock serve`, STARTTLS with a generated certificate included. Without --config,
    it accepts bare line ends, NULs and long lines; only CR LF . CR LF ends the data. SIGINT and SIGTERM stop it
    gracefully.
    """
    faults = FaultInjection.of(options)
    letters = faults.letters
    if letters.given.get("h") == "":
        click.echo(context.get_help())
        return
    receiving = Receiving(ReceivingOptions(**options), letters.stores)
    messages, sessions = messages or letters.messages, sessions or letters.sessions
    with tempfile.TemporaryDirectory(prefix="penstock-sink-") as folder:
        settings = _with_tls(_base(config_file, folder), tls, certificate, key)
        settings = _as_user(settings, user, allow_root)
        settings = faults.prepare(settings, Path(folder) / "tls")
        if ca_file is not None:
            _copy(Path(folder) / "tls" / "ca.pem", ca_file)
        settings = listen_on(settings, (*addresses, *letters.listen()))
        counted: list[Server] = []

        def announce(parts: Server) -> None:
            counted.append(parts)
            faults.begin(parts)
            receiving.begin(parts, faults.desk)
            click.echo(f"penstock: sink on {', '.join(parts.addresses)}", err=True)

        def is_done(parts: Server) -> bool:
            if sessions is not None and parts.worker.sessions >= sessions and not parts.worker.open_connections:
                return True
            return messages is not None and _counts(parts, receiving)["messages"] >= messages

        run(
            settings,
            announce,
            done=is_done,
            allow_open=is_open,
            overrides=Overrides(
                delivery=receiving.delivery,
                authenticator=faults.authenticator,
                metrics=receiving.metrics,
                components=(faults.component,),
            ),
            beside=lambda _: receiving.run(faults.desk),
        )
        for parts in counted:
            faults.end()
            report, file = receiving.end(), options["report_file"]
            click.echo(
                _report(_counts(parts, receiving) | _troubles(report), as_json=as_json), err=file == reports.STDOUT
            )
            if report is not None:
                if file is not None:
                    reports.write(file, encode(report))
                if not as_expected(report):
                    raise click.ClickException("messages are missing or duplicated")


def _base(config_file: Path | None, folder: str) -> Settings:
    """Return the settings of a sink, or those of a configuration file with the delivery of a sink."""
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
    """Return the settings with the TLS options applied to every listener."""
    if key is not None and certificate is None:
        raise click.UsageError("--key requires --certificate")
    changed: dict[str, str] = {} if mode is None else {"mode": mode}
    if certificate is not None:
        changed |= {"certificate": certificate, "key": key or ""}
    return _replace(
        settings, listener=tuple(_replace(each, tls=_replace(each.tls, **changed)) for each in settings.listener)
    )


def _as_user(settings: Settings, user: str | None, allow_root: bool) -> Settings:
    """Return the settings with the options about the user applied."""
    changed = {} if user is None else {"user": user, "group": ""}
    server = _replace(settings.server, allow_root=settings.server.allow_root or allow_root, **changed)
    return _replace(settings, server=server)


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as exc:
        raise click.ClickException(f"{target}: {exc.strerror}") from exc


def _counts(parts: Server, receiving: Receiving) -> dict[str, int]:
    """Return what the sink has received."""
    metrics, delivery = receiving.metrics, parts.delivery
    if metrics is not None:
        sessions, messages = metrics.sessions, metrics.accepted + metrics.unheard
        recipients, octets = metrics.recipients, metrics.text_octets
    else:
        assert isinstance(delivery, DiscardDelivery)
        sessions, messages = parts.worker.sessions, delivery.messages
        recipients, octets = delivery.recipients, delivery.octets
    return {"sessions": sessions, "messages": messages, "recipients": recipients, "octets": octets}


def _troubles(report: Report | None) -> dict[str, int]:
    """Return refusing replies, lost and duplicate messages and faults; nothing without statistics."""
    if report is None:
        return {}
    return {
        "refusals": sum(each.count for each in report.replies if each.code >= 400),
        "lost": report.messages.lost,
        "duplicates": duplicates_of(report),
        "faults": sum(each.count for each in report.faults),
    }


def _report(counts: dict[str, int], *, as_json: bool) -> str:
    """Return the counts as one line of text or JSON."""
    if as_json:
        return msgspec.json.encode(counts).decode()
    return " ".join(f"{name}={count}" for name, count in counts.items())
