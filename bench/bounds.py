"""Every performance bound of Penstock, measured beside its peer in one run.

Each row prints both sides as medians of all rounds, the median of the ratios round by round, the bound, and whether it
is kept. The exit code is 1 if one is missed. Rows whose peer is not installed are reported and not counted.

    python -m bench.bounds [--rounds 5] [--scale 1.0] [--rows kept,starttls] [--list]

--scale 0.1 is a quick look. --rows selects rows with one of these words in their titles.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bench import commit, gateway, idle, peers, replies, scaling, turns
from bench.measure import (
    AIOSMTPD,
    PENSTOCK_SINK,
    POSTFIX,
    SMTP_SINK,
    Peer,
    machine,
    raise_file_limit,
    ratio_of,
    running,
    smtp_source,
    summary,
    verdict,
)
from bench.other_servers import GO_SMTP

Pairs = Sequence[tuple[float, float]]
"""Penstock's value and the peer's, for each round."""


@dataclass(frozen=True)
class Options:
    """How much to measure."""

    rounds: int
    scale: float


@dataclass(frozen=True)
class Row:
    """A bound. Without a peer the bound is on Penstock's own value, with one on the ratio of both."""

    title: str
    unit: str
    bound: float
    measure: Callable[[Options], Pairs]
    peer: str = ""
    is_minimum: bool = False
    """The value has to be at least the bound, not at most."""
    needs: Peer | None = None
    """The server that must be installed."""


# ---- measurements


def _case(name: str, peer: Peer) -> Callable[[Options], Pairs]:
    """Return a measurement of CPU time by a case of bench.peers."""

    def measure(options: Options) -> Pairs:
        case = next(case for case in peers.CASES if case.name == name)
        found = peers.compare(case, [PENSTOCK_SINK, peer], options.rounds, options.scale)
        if found.stalled:
            raise RuntimeError(", ".join(f"{peer.name} {reason}" for peer, reason in found.stalled.items()))
        ours, theirs = found.rounds[PENSTOCK_SINK], found.rounds[peer]
        return [(a.cpu_per_message, b.cpu_per_message) for a, b in zip(ours, theirs, strict=True)]

    return measure


def _accepts(title: str) -> Callable[[Options], Pairs]:
    return lambda options: [
        (ours.rate, theirs.rate) for ours, theirs in commit.compare_accepts(title, options.rounds, options.scale)
    ]


def _relayed(options: Options) -> Pairs:
    results = gateway.compare("hop", rounds=options.rounds, messages=int(10_000 * options.scale))
    return [(a.rate, b.rate) for a, b in zip(results["penstock"], results["postfix"], strict=True)]


def _filed(options: Options) -> Pairs:
    results = gateway.compare("maildir", rounds=options.rounds, messages=int(10_000 * options.scale))
    pairs = zip(results["penstock"], results["postfix"], strict=True)
    return [(a.cpu_per_message, b.cpu_per_message) for a, b in pairs]


def _idle(peer: Peer) -> Callable[[int], float]:
    def measure(count: int) -> float:
        with running(peer) as server:
            idle.warm_up(server)
            return idle.octets_per_connection(server, count)

    return measure


def _idle_connections(options: Options) -> Pairs:
    count = min(int(10_000 * options.scale), raise_file_limit() - 200)
    theirs = _idle(GO_SMTP)(count) if GO_SMTP.is_installed else 0.0
    return [(_idle(PENSTOCK_SINK)(count), theirs)]


def _many_connections(options: Options) -> Pairs:
    messages = int(10_000 * options.scale)
    count = min(10_000, raise_file_limit() - 500)
    with running(PENSTOCK_SINK) as server:
        smtp_source(server, messages=messages, sessions=20, size=4096, extra=("-d",))  # warms up
        few = scaling.cost_with(server, 20, options.rounds, messages)
        many = scaling.cost_with(server, count, options.rounds, messages)
    return list(zip(many, few, strict=True))


def _turns(load: str) -> Callable[[Options], Pairs]:
    def measure(options: Options) -> Pairs:
        with running(turns.serve()) as server:
            found = turns.measure(server, turns.LOADS[load], clients=100, seconds=10 * options.scale)
        return [(found.percentile(0.99) * 1e3, 0.0)]

    return measure


def _replies(kind: str) -> Callable[[Options], Pairs]:
    def measure(options: Options) -> Pairs:
        counts = {"plain": int(10_000 * options.scale), "TLS": int(2_000 * options.scale)}
        return [(replies.measure(kind, counts, seed=1, is_quiet=True), 0.0)]

    return measure


_CPU, _RATE = "us of CPU time per message", "messages per second"
ROWS: Final = (
    Row("sink, 4 KB, connections kept", _CPU, 0.70, _case("kept", SMTP_SINK), "smtp-sink", needs=SMTP_SINK),
    Row("sink, 4 KB, new connections", _CPU, 1.00, _case("new", SMTP_SINK), "smtp-sink", needs=SMTP_SINK),
    Row("sink, 100 KB, connections kept", _CPU, 0.20, _case("100k", SMTP_SINK), "smtp-sink", needs=SMTP_SINK),
    Row("sink, STARTTLS, new connections", _CPU, 0.55, _case("tls-new", AIOSMTPD), "aiosmtpd", needs=AIOSMTPD),
    Row("sink, STARTTLS, connections kept", _CPU, 0.25, _case("tls", AIOSMTPD), "aiosmtpd", needs=AIOSMTPD),
    Row("sink, STARTTLS, new connections", _CPU, 1.35, _case("tls-new", GO_SMTP), "go-smtp", needs=GO_SMTP),
    Row("sink, STARTTLS, connections kept", _CPU, 0.90, _case("tls", GO_SMTP), "go-smtp", needs=GO_SMTP),
    Row(
        "durable accepts, connections kept", _RATE, 10, _accepts("connections kept"), "Postfix", is_minimum=True,
        needs=POSTFIX,
    ),
    Row(
        "durable accepts, new connections", _RATE, 6, _accepts("a new connection each"), "Postfix", is_minimum=True,
        needs=POSTFIX,
    ),
    Row("bare serve, client to Maildir file", _CPU, 1 / 6, _filed, "Postfix virtual", needs=POSTFIX),
    Row("client to the same smtp-sink", _RATE, 8, _relayed, "Postfix relay", is_minimum=True, needs=POSTFIX),
    Row("idle connection", "octets (go-smtp beside it)", 6 * 1024, _idle_connections),
    Row("4 KB with 10,000 open connections", _CPU, 1.1, _many_connections, "itself with 20", needs=SMTP_SINK),
    *(Row(f"NOOP while 100 clients pipeline {load}", "ms (p99)", 100, _turns(load)) for load in turns.LOADS),
    *(Row(f"replies of {kind}", "lost, unexpected or out of order", 0, _replies(kind)) for kind in replies.SERVERS),
)  # fmt: skip


def line_of(row: Row, options: Options) -> tuple[str, bool]:
    """Measure a row. Return its line, and whether the bound is kept."""
    pairs = row.measure(options)
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    peer_value = f"{summary(theirs)[0]:.1f}" if any(theirs) else ""
    line = f"{row.title:<53} {summary(ours)[0]:>10.1f} {peer_value:>10} {row.unit:<32}"
    if row.peer:
        ratio, low, high = ratio_of(ours, theirs)
        line += f" {ratio:7.2f} ({low:.2f} to {high:.2f}) of {row.peer}"
    else:
        ratio = summary(ours)[0]
    is_kept = ratio >= row.bound if row.is_minimum else ratio <= row.bound
    return f"{line}; bound {row.bound:.3g}: {verdict(is_kept)}", is_kept


def main() -> None:
    """Measure the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for messages, sessions and seconds")
    parser.add_argument("--rows", default="", help="words in the titles of the rows to measure")
    parser.add_argument("--list", action="store_true", help="print the rows and exit")
    arguments = parser.parse_args()
    words = arguments.rows.split(",")
    rows = [row for row in ROWS if any(word.lower() in row.title.lower() for word in words)]
    if arguments.list:
        print(*(f"{row.title} {row.peer and f'({row.peer})'}".strip() for row in rows), sep="\n")
        return
    print(machine(), flush=True)
    print(f"{'':<53} {'penstock':>10} {'peer':>10}")
    is_missed = False
    for row in rows:
        if row.needs is not None and not row.needs.is_installed:
            print(f"{row.title:<53} {row.needs.name} is not installed")
            continue
        line, is_kept = line_of(row, Options(arguments.rounds, arguments.scale))
        is_missed = is_missed or not is_kept
        print(line, flush=True)
    raise SystemExit(is_missed)


if __name__ == "__main__":
    main()
