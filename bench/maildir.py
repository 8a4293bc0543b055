"""What a message costs on its way into a Maildir, into the spool, and with a second worker.

Both sides of a row take turns, and each round is followed by a pause that belongs to it, so that what is written after
the last message has arrived counts, too. The bounds are on CPU time, which a busy machine disturbs less than rates.

    python -m bench.maildir [--rounds 5] [--scale 1.0] [--rows one,kind] [--list]

bare        `penstock serve` without options, and Postfix's `virtual` transport: from the client to the file.
kind        `delivery.kind = "maildir"`: the file is synced before the 250.
spool       Durable accepts alone; Postfix with the discard transport.
workers     Two workers and one, accepting into the spool, and relaying to the same smtp-sink.
servers     Two servers that share nothing, each with half of the sessions, and one: what a second busy process costs on
            this machine, whatever the program.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.commit import GATEWAY
from bench.gateway import COUNTING_SINK, POSTFIX_VIRTUAL, arrived_at, filed_by, penstock_to, play
from bench.measure import (
    PENSTOCK_SERVE,
    POSTFIX,
    Cpu,
    Peer,
    Round,
    Running,
    cpu_of,
    machine,
    ratio_of,
    running,
    summary,
    verdict,
)

_PAUSE: Final = 0.5
"""Seconds that are counted with a round, for what follows the last message."""
_KIND: Final = """hostname = "localhost"
data_dir = "."
delivery = { kind = "maildir" }
[[listener]]
address = "127.0.0.1:{port}"
"""


def _kind_maildir(port: int, folder: Path) -> Sequence[str]:
    (folder / "penstock.toml").write_text(_KIND.replace("{port}", str(port)))
    return [sys.executable, "-m", "penstock", "serve", "--config", str(folder / "penstock.toml")]


KIND_MAILDIR: Final = Peer("penstock kind", _kind_maildir, sys.executable)


def with_workers(peer: Peer, count: int) -> Peer:
    """Return the same Penstock with a number of workers."""

    def command(port: int, folder: Path) -> Sequence[str]:
        return [*peer.command(port, folder), "--workers", str(count)]

    return Peer("one worker" if count == 1 else f"{count} workers", command, peer.program)


Count = Callable[[Running], int]


def _sent(_: Running) -> int:
    """Return how many messages have arrived where nothing counts them: smtp-source waits for each 250."""
    return -1


@dataclass(frozen=True)
class Row:
    """A comparison."""

    title: str
    ours: Peer
    theirs: Peer
    sessions: int
    messages: int
    count: Count
    most: float = 0.0
    """Microseconds of CPU time per message; 0 without such a bound."""
    ratio: float = 0.0
    """Of the CPU time of the other side."""
    least_rate: float = 0.0
    """Messages per second."""
    relays: bool = False
    """Both sides relay to the same smtp-sink."""
    servers: int = 1
    """On our side, which share sessions and messages."""


ROWS: Final = (
    Row("bare serve, 100 sessions", PENSTOCK_SERVE, POSTFIX_VIRTUAL, 100, 10_000, filed_by, 250, 1 / 6),
    Row("bare serve, one session", PENSTOCK_SERVE, POSTFIX_VIRTUAL, 1, 1_000, filed_by, 700),
    Row("kind maildir, 100 sessions", KIND_MAILDIR, POSTFIX_VIRTUAL, 100, 10_000, filed_by, 200, least_rate=5_000),
    Row("kind maildir, one session", KIND_MAILDIR, POSTFIX_VIRTUAL, 1, 1_000, filed_by),
    Row("spool alone, one session", GATEWAY, POSTFIX, 1, 1_000, _sent, 350),
    Row("two workers, accepting", with_workers(GATEWAY, 2), with_workers(GATEWAY, 1), 100, 10_000, _sent, ratio=1.05),
    Row("two servers, accepting", with_workers(GATEWAY, 1), with_workers(GATEWAY, 1), 100, 10_000, _sent, servers=2),
    Row("two workers, relaying", PENSTOCK_SERVE, PENSTOCK_SERVE, 100, 10_000, arrived_at, ratio=1.05, relays=True),
)


def measure(row: Row, rounds: int, scale: float) -> tuple[list[Round], list[Round]]:
    """Let both sides take turns. Return their rounds."""
    results: tuple[list[Round], list[Round]] = ([], [])
    with ExitStack() as stack:
        sides = [row.ours, row.theirs]
        sink: Running | None = None
        if row.relays:
            sink = stack.enter_context(running(COUNTING_SINK))
            sides = [with_workers(penstock_to(sink), count) for count in (2, 1)]
        started = [
            [stack.enter_context(running(peer)) for _ in range(count)]
            for peer, count in zip(sides, (row.servers, 1), strict=True)
        ]
        for number in range(rounds + 1):
            for servers, peer, found in zip(started, sides, results, strict=True):
                messages = max(100, int(row.messages * scale * peer.share * (1 if number else 0.2)))
                result = _round(row, servers, sink, messages)
                if number:  # the first round warms up
                    found.append(result)
    return results


def _round(row: Row, servers: Sequence[Running], sink: Running | None, messages: int) -> Round:
    """Load the servers, all at the same time."""
    share, sessions = messages // len(servers), row.sessions // len(servers)
    before = [cpu_of(server.pid) for server in servers]

    def load(server: Running) -> float:
        done = 0

        def count() -> int:
            nonlocal done
            if row.count is _sent:
                done, now = share, done  # asked before and after
                return now
            return row.count(sink or server)

        return play(server, count, messages=share, sessions=sessions, size=4096, extra=("-d",)).seconds

    with ThreadPoolExecutor(len(servers)) as threads:
        seconds = max(threads.map(load, servers))
    time.sleep(_PAUSE)
    used = [cpu_of(server.pid) - then for server, then in zip(servers, before, strict=True)]
    return Round(share * len(servers), seconds, Cpu(sum(each.user for each in used), sum(each.system for each in used)))


def report(row: Row, ours: Sequence[Round], theirs: Sequence[Round]) -> bool:
    """Print a row. Return whether its bounds are kept."""
    cpu, low, high = summary([each.cpu_per_message for each in ours])
    other, _, _ = summary([each.cpu_per_message for each in theirs])
    rate, _, _ = summary([each.rate for each in ours])
    ratio, least, most = ratio_of([each.cpu_per_message for each in ours], [each.cpu_per_message for each in theirs])
    checks = [
        (f"<= {row.most:.0f} us", cpu <= row.most, row.most),
        (f"<= {row.ratio:.3f}", ratio <= row.ratio, row.ratio),
        (f">= {row.least_rate:.0f}/s", rate >= row.least_rate, row.least_rate),
    ]
    bounds = [(text, is_kept) for text, is_kept, bound in checks if bound]
    peer = "one worker" if row.relays else row.theirs.name
    print(
        f"{row.title:<27} {cpu:6.0f} us ({low:.0f} to {high:.0f}) {rate:6.0f}/s   {peer:<10} {other:6.0f} us   "
        f"{ratio:.3f} ({least:.3f} to {most:.3f})   {', '.join(f'{text}: {verdict(kept)}' for text, kept in bounds)}",
        flush=True,
    )
    return all(is_kept for _, is_kept in bounds)


def main() -> None:
    """Measure the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the messages of a round")
    parser.add_argument("--rows", default="", help="words in the titles of the rows to measure")
    parser.add_argument("--list", action="store_true", help="print the rows and exit")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if any(word.lower() in row.title.lower() for word in arguments.rows.split(","))]
    if arguments.list:
        print(*(row.title for row in rows), sep="\n")
        return
    print(machine(), flush=True)
    kept = [report(row, *measure(row, arguments.rounds, arguments.scale)) for row in rows if row.theirs.is_installed]
    raise SystemExit(not all(kept))


if __name__ == "__main__":
    main()
