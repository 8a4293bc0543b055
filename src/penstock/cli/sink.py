"""`penstock sink`: accept everything and forget it, the target of a load test."""

from __future__ import annotations

import tempfile

import click
import msgspec

from penstock.assemble import Parts
from penstock.cli.running import addresses_of, listen_on, run
from penstock.config import DeliverySettings, ListenerSettings, Settings
from penstock.delivery.discard import DiscardDelivery
from penstock.inbound.gate import WireSettings
from penstock.inbound.limits import LimitSettings
from penstock.journal import JournalSettings

_LISTENER = ListenerSettings(
    max_size=0,
    max_hops=0,
    limits=LimitSettings(recipients=100_000, errors=1_000_000, unknown_recipients=1_000_000),
    wire=WireSettings(bare_lf="accept", bare_cr="accept", nul="accept", long_line="accept"),
)


@click.command()
@click.option(
    "--listen",
    "addresses",
    multiple=True,
    metavar="HOST:PORT",
    help="Listen here [default: 127.0.0.1:2525]. May be repeated.",
)
@click.option("--messages", type=click.IntRange(min=1), metavar="N", help="Stop after so many messages.")
@click.option(
    "--open",
    "is_open",
    is_flag=True,
    help="Allow an address that other machines can reach: it takes mail for all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def sink(addresses: tuple[str, ...], messages: int | None, is_open: bool, as_json: bool) -> None:
    """Accept every message, keep none, and print counts at the end.

    All of SMTP is spoken, STARTTLS with a generated certificate among it; bare line ends, NULs and long lines are
    accepted, and the end of the data is CR LF . CR LF all the same. SIGINT and SIGTERM stop it gently.
    """
    with tempfile.TemporaryDirectory(prefix="penstock-sink-") as folder:
        settings = Settings(
            hostname="localhost",
            data_dir=folder,
            listener=(_LISTENER,),
            delivery=DeliverySettings(kind="discard"),
            journal=JournalSettings(events="errors"),
            domains=None,
        )
        settings = listen_on(settings, addresses)
        counted: list[Parts] = []

        def announce(parts: Parts) -> None:
            counted.append(parts)
            click.echo(f"penstock: sink on {', '.join(addresses_of(parts))}", err=True)

        def is_done(parts: Parts) -> bool:
            assert isinstance(parts.delivery, DiscardDelivery)
            return messages is not None and parts.delivery.messages >= messages

        run(settings, announce, done=is_done, allow_open=is_open)
        for parts in counted:
            click.echo(_report(parts, as_json=as_json))


def _report(parts: Parts, *, as_json: bool) -> str:
    """Return the counts as a line, or as JSON."""
    delivery = parts.delivery
    assert isinstance(delivery, DiscardDelivery)
    counts = {
        "sessions": parts.worker.sessions,
        "messages": delivery.messages,
        "recipients": delivery.recipients,
        "octets": delivery.octets,
    }
    if as_json:
        return msgspec.json.encode(counts).decode()
    return " ".join(f"{name}={count}" for name, count in counts.items())
