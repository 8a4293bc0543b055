"""`python -m bench.peers`: CPU of the server for each message, beside the peers that are installed.

Each case plays its servers in turn, round by round, so that all of them meet the same machine; a round's ratio is that
of its own neighbours. Plaintext is driven by Postfix's smtp-source, TLS by the client of bench/tls.py.

    python -m bench.peers [--rounds 5] [--cases reused,new,...] [--scale 1.0]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from bench.measure import (
    AIOSMTPD,
    PENSTOCK_SINK,
    POSTFIX,
    SMTP_SINK,
    Peer,
    Round,
    Running,
    machine,
    running,
    smtp_source,
    summary,
)
from bench.tls import tls_source


@dataclass(frozen=True)
class Case:
    """Work that is given to several servers."""

    name: str
    title: str
    drive: Callable[[Running, int], Round]
    """Plays so many messages against a server."""
    messages: int
    peers: tuple[Peer, ...]
    target: float | None = None
    """The ratio to the first peer that we mean to reach."""


def _plain(sessions: int, size: int, *extra: str) -> Callable[[Running, int], Round]:
    return lambda server, messages: smtp_source(server, messages=messages, sessions=sessions, size=size, extra=extra)


def _tls(size: int, *, reuse: bool) -> Callable[[Running, int], Round]:
    return lambda server, messages: tls_source(server, messages=messages, sessions=20, size=size, reuse=reuse)


CASES = [
    Case("reused", "4 KB, 20 connections kept", _plain(20, 4096, "-d"), 20_000, (SMTP_SINK, AIOSMTPD), 0.70),
    Case("new", "4 KB, a new connection each", _plain(20, 4096), 10_000, (SMTP_SINK, AIOSMTPD), 0.90),
    Case("1k", "1 KB, 20 connections kept", _plain(20, 1024, "-d"), 20_000, (SMTP_SINK, AIOSMTPD)),
    Case("100k", "100 KB, 20 connections kept", _plain(20, 100_000, "-d"), 3_000, (SMTP_SINK, AIOSMTPD), 0.25),
    Case("10m", "10 MB, 20 connections kept", _plain(20, 10_000_000, "-d"), 60, (SMTP_SINK, AIOSMTPD)),
    Case("rcpt", "4 KB, 10 recipients, kept", _plain(20, 4096, "-d", "-r", "10"), 8_000, (SMTP_SINK, AIOSMTPD)),
    Case("200", "4 KB, 200 connections kept", _plain(200, 4096, "-d"), 20_000, (SMTP_SINK, AIOSMTPD)),
    Case("2000", "4 KB, 2,000 connections kept", _plain(2000, 4096, "-d"), 20_000, (SMTP_SINK, AIOSMTPD)),
    Case("aio", "4 KB, 20 connections kept", _plain(20, 4096, "-d"), 10_000, (AIOSMTPD,), 0.08),
    Case("tls-new", "4 KB, STARTTLS, a new connection each", _tls(4096, reuse=False), 1_000, (AIOSMTPD,), 0.50),
    Case("tls", "4 KB, STARTTLS, connections kept", _tls(4096, reuse=True), 8_000, (AIOSMTPD,), 0.25),
    Case("postfix", "4 KB, a new connection each", _plain(20, 4096), 2_000, (POSTFIX,)),
]


def play(case: Case, rounds: int, scale: float) -> None:
    """Play a case and print its table."""
    peers = [peer for peer in (PENSTOCK_SINK, *case.peers) if peer.is_installed]
    messages = max(20, int(case.messages * scale))
    results: dict[Peer, list[Round]] = {peer: [] for peer in peers}
    with ExitStack() as stack:
        servers = {peer: stack.enter_context(running(peer)) for peer in peers}
        for peer in peers:
            case.drive(servers[peer], max(20, messages // 10))  # warm
        for _ in range(rounds):
            for peer in peers:
                results[peer].append(case.drive(servers[peer], messages))
    print(f"{case.name}: {case.title}, {rounds} rounds of {messages} messages")
    ours = results[PENSTOCK_SINK]
    for peer, each in results.items():
        cpu, low, high = summary([one.cpu_per_message for one in each])
        user, _, _ = summary([one.cpu.user / one.messages for one in each])
        rate, _, _ = summary([one.rate for one in each])
        line = f"  {peer.name:<15} {cpu:8.1f} us/message ({low:.1f} to {high:.1f}; user {user:.1f}) {rate:8.0f}/s"
        if peer is not PENSTOCK_SINK:
            ratio, low, high = summary([a.cpu_per_message / b.cpu_per_message for a, b in zip(ours, each, strict=True)])
            line += f"   ours is {ratio:.2f} of it ({low:.2f} to {high:.2f})"
            if case.target is not None and peer is case.peers[0]:
                line += f", target {case.target:.2f}: {'reached' if ratio <= case.target else 'MISSED'}"
        print(line, flush=True)


def main() -> None:
    """Play the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="times the messages of each round")
    parser.add_argument("--cases", default="", help=", ".join(case.name for case in CASES))
    arguments = parser.parse_args()
    wanted = set(filter(None, arguments.cases.split(",")))
    print(machine(), flush=True)
    for case in CASES:
        if not wanted or case.name in wanted:
            play(case, arguments.rounds, arguments.scale)


if __name__ == "__main__":
    main()
