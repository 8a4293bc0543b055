"""The cost of the journal and of awaiting a delivery.

Workers, each a process of its own, with deliveries that do nothing:

    discarded    nothing is kept, nothing is journaled
    journaled    the same with the default journal: all events, as JSON, into a file
    awaited      the body is collected, and the delivery is a coroutine that answers at once

They take turns, round by round; the client is smtp-source with 20 sessions and messages of 4 KB.

    python -m bench.delivery_cost [--rounds 7] [--messages 10000]
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import trio

from bench.measure import Peer, Round, machine, running, smtp_source, summary, verdict
from penstock.app import assemble
from penstock.config import DeliverySettings, ListenerSettings, Settings
from penstock.delivery.base import Delivery
from penstock.delivery.discard import DiscardDelivery
from penstock.journal import Journal, JournalSettings
from penstock.message import Message
from penstock.net.tls import TlsSettings
from penstock.reply import Reply
from penstock.server.listener import Listener
from penstock.server.worker import Worker
from penstock.transaction import Transaction

_ACCEPTED = Reply(250, "2.0.0", "Ok: accepted")
_BOUND = 0.10
"""What the journal may add to the CPU time of a message."""


class Awaited(Delivery):
    """Accepts each message, with its body, in a coroutine that never waits."""

    async def accept(self, message: Message, transaction: Transaction) -> Reply:  # noqa: ARG002 - the interface
        """Accept it."""
        return _ACCEPTED


KINDS: dict[str, tuple[Callable[[], Delivery], JournalSettings]] = {
    "discarded": (DiscardDelivery, JournalSettings(events="none")),
    "journaled": (DiscardDelivery, JournalSettings()),
    "awaited": (Awaited, JournalSettings(events="none")),
}


def _peer(kind: str) -> Peer:
    root = str(Path(__file__).parent.parent)

    def command(port: int, _: Path) -> Sequence[str]:
        program = f"import sys; sys.path[0] = {root!r}; from bench.delivery_cost import serve; serve({kind!r}, {port})"
        return [sys.executable, "-c", program]

    return Peer(kind, command, sys.executable)


def serve(kind: str, port: int) -> None:
    """Run the worker of a kind until SIGTERM."""
    make, journal_settings = KINDS[kind]
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        listener = ListenerSettings(address=f"127.0.0.1:{port}", tls=TlsSettings(mode="none"), max_hops=0)
        settings = Settings(
            hostname="localhost", data_dir=folder, listener=(listener,), delivery=DeliverySettings(kind="discard")
        )
        journal = Journal(journal_settings)

        def write(lines: bytes) -> None:
            sys.stderr.buffer.write(lines)
            sys.stderr.buffer.flush()

        parts = assemble(settings, journal, write)
        for bound in parts.listeners:
            _replace_delivery(bound.listener, make())
        trio.run(_run, parts.worker)


def _replace_delivery(listener: Listener, delivery: Delivery) -> None:
    """Give a listener a delivery that settings cannot name, before the first connection."""
    object.__setattr__(listener, "delivery", delivery)
    listener.__post_init__()


async def _run(worker: Worker) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(worker.run)
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 100)  # as `serve` does
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                worker.stop()
                return


def measure(rounds: int, messages: int, *, reuse: bool) -> None:
    """Let the kinds take turns and print what they cost."""
    results: dict[str, list[Round]] = {kind: [] for kind in KINDS}
    extra = ("-d",) if reuse else ()
    with ExitStack() as stack:
        servers = {kind: stack.enter_context(running(_peer(kind))) for kind in KINDS}
        for kind in KINDS:
            smtp_source(servers[kind], messages=2_000, sessions=20, size=4096, extra=extra)
        for _ in range(rounds):
            for kind in KINDS:
                results[kind].append(smtp_source(servers[kind], messages=messages, sessions=20, size=4096, extra=extra))
    print(
        f"4 KB, {'20 connections kept' if reuse else 'a new connection each'}, {rounds} rounds of {messages} messages"
    )
    for kind, each in results.items():
        cost, low, high = summary([one.cpu_per_message for one in each])
        user, _, _ = summary([one.cpu.user / one.messages for one in each])
        line = f"  {kind:<15} {cost:7.1f} us/message ({low:.1f} to {high:.1f}; user {user:.1f})"
        if kind != "discarded":
            more, low, high = summary(
                [a.cpu_per_message / b.cpu_per_message - 1 for a, b in zip(each, results["discarded"], strict=True)]
            )
            line += f"   {more:+.0%} ({low:+.0%} to {high:+.0%})"
            if kind == "journaled":
                line += f", bound {_BOUND:+.0%}: {verdict(more <= _BOUND)}"
        print(line, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--messages", type=int, default=10_000)
    arguments = parser.parse_args()
    print(machine(), flush=True)
    for reuse in (True, False):
        measure(arguments.rounds, arguments.messages, reuse=reuse)


if __name__ == "__main__":
    main()
