"""`python -m bench.peers`: CPU of the server for each message, beside the peers that are installed.

Each case plays its servers in turn, round by round, so that all of them meet the same machine; a round's ratio is that
of its own neighbours. Plaintext is driven by Postfix's smtp-source, TLS by the client of bench/tls.py.

    python -m bench.peers [--rounds 5] [--cases reused,new,...] [--scale 1.0] [--without haraka,...]

The ratio is that of `penstock sink`; `penstock serve`, which keeps every message on the disk, stands beside it. A
server that does not finish a round in 90 seconds is reported as stalled and left out of the rest of the case.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from bench.measure import (
    AIOSMTPD,
    PENSTOCK_SERVE,
    PENSTOCK_SINK,
    POSTFIX,
    SMTP_SINK,
    Peer,
    Round,
    Running,
    Stalled,
    machine,
    running,
    smtp_source,
    summary,
)
from bench.other_servers import GO_SMTP, HARAKA, NODEMAILER
from bench.tls_client import tls_source


@dataclass(frozen=True)
class Case:
    """Work that is given to several servers."""

    name: str
    title: str
    drive: Callable[[Running, int], Round]
    """Plays so many messages against a server."""
    messages: int
    peers: tuple[Peer, ...]
    targets: Mapping[Peer, float] = field(default_factory=dict)
    """The ratios to peers that we mean to reach."""


_PATIENCE = 90
"""Seconds of a round before it counts as stalled."""


def _plain(sessions: int, size: int, *extra: str) -> Callable[[Running, int], Round]:
    return lambda server, messages: smtp_source(
        server, messages=messages, sessions=sessions, size=size, extra=extra, timeout=_PATIENCE
    )


def _tls(size: int, *, reuse: bool) -> Callable[[Running, int], Round]:
    return lambda server, messages: tls_source(server, messages=messages, sessions=20, size=size, reuse=reuse)


_ALL = (PENSTOCK_SERVE, SMTP_SINK, GO_SMTP, NODEMAILER, HARAKA, AIOSMTPD, POSTFIX)
_SINKS = (SMTP_SINK, GO_SMTP, NODEMAILER, HARAKA, AIOSMTPD)
_WITH_TLS = (PENSTOCK_SERVE, GO_SMTP, NODEMAILER, HARAKA, AIOSMTPD, POSTFIX)
_FOR_REUSED = {SMTP_SINK: 0.70, AIOSMTPD: 0.08}

CASES = [
    Case("reused", "4 KB, 20 connections kept", _plain(20, 4096, "-d"), 20_000, _ALL, _FOR_REUSED),
    Case("new", "4 KB, a new connection each", _plain(20, 4096), 10_000, _ALL, {SMTP_SINK: 0.90}),
    Case("1k", "1 KB, 20 connections kept", _plain(20, 1024, "-d"), 20_000, _SINKS),
    Case("1k-new", "1 KB, a new connection each", _plain(20, 1024), 10_000, _SINKS),
    Case("100k", "100 KB, 20 connections kept", _plain(20, 100_000, "-d"), 3_000, _ALL, {SMTP_SINK: 0.25}),
    Case("10m", "10 MB, 20 connections kept", _plain(20, 10_000_000, "-d"), 60, (SMTP_SINK, GO_SMTP, AIOSMTPD)),
    Case("rcpt", "4 KB, 10 recipients, kept", _plain(20, 4096, "-d", "-r", "10"), 8_000, _SINKS),
    Case("rcpt-new", "4 KB, 10 recipients, a new connection each", _plain(20, 4096, "-r", "10"), 6_000, _SINKS),
    Case("200", "4 KB, 200 connections kept", _plain(200, 4096, "-d"), 20_000, _SINKS),
    Case("2000", "4 KB, 2,000 connections kept", _plain(2000, 4096, "-d"), 40_000, _SINKS),
    Case(
        "tls-new", "4 KB, STARTTLS, a new connection each", _tls(4096, reuse=False), 1_000, _WITH_TLS, {AIOSMTPD: 0.50}
    ),
    Case("tls", "4 KB, STARTTLS, connections kept", _tls(4096, reuse=True), 8_000, _WITH_TLS, {AIOSMTPD: 0.25}),
]


def play(case: Case, rounds: int, scale: float, without: Container[str]) -> None:
    """Play a case and print its table."""
    peers = [PENSTOCK_SINK]
    print(f"{case.name}: {case.title}, {rounds} rounds of {int(case.messages * scale)} messages", flush=True)
    for peer in case.peers:
        if peer.name in without:
            continue
        if peer.is_installed:
            peers.append(peer)
        else:
            print(f"  {peer.name:<15} not installed")
    results: dict[Peer, list[Round]] = {peer: [] for peer in peers}
    stalled: dict[Peer, str] = {}
    with ExitStack() as stack:
        servers = {peer: stack.enter_context(running(peer)) for peer in peers}
        for number in range(rounds + 1):
            for peer in peers:
                if peer in stalled:
                    continue
                messages = max(40, int(case.messages * scale * peer.share) // (1 if number else 10))
                try:
                    one = case.drive(servers[peer], messages)
                except (Stalled, OSError, RuntimeError) as exc:
                    stalled[peer] = str(exc)
                else:
                    if number:  # the first warms
                        results[peer].append(one)
    for peer, each in results.items():
        if each:
            print(_line(case, peer, each, results[PENSTOCK_SINK]), flush=True)
        if peer in stalled:
            print(f"  {peer.name:<15} {stalled[peer]}", flush=True)


def _line(case: Case, peer: Peer, each: list[Round], ours: list[Round]) -> str:
    """Return a line of the table."""
    cpu, low, high = summary([one.cpu_per_message for one in each])
    user, _, _ = summary([one.cpu.user / one.messages for one in each])
    rate, _, _ = summary([one.rate for one in each])
    line = f"  {peer.name:<15} {cpu:8.1f} us/message ({low:.1f} to {high:.1f}; user {user:.1f}) {rate:8.0f}/s"
    if peer is PENSTOCK_SINK or not ours:
        return line
    pairs = zip(ours, each, strict=False)  # one of the two may have stalled on its way
    ratio, low, high = summary([a.cpu_per_message / b.cpu_per_message for a, b in pairs])
    line += f"   ours is {ratio:.2f} of it ({low:.2f} to {high:.2f})"
    target = case.targets.get(peer)
    if target is not None:
        line += f", target {target:.2f}: {'reached' if ratio <= target else 'MISSED'}"
    return line


def main() -> None:
    """Play the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="times the messages of each round")
    parser.add_argument("--cases", default="", help=", ".join(case.name for case in CASES))
    parser.add_argument("--without", default="", help="peers to leave out: their names, with commas")
    arguments = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # inherited by the servers and the client
    wanted = set(filter(None, arguments.cases.split(",")))
    print(machine(), flush=True)
    for case in CASES:
        if not wanted or case.name in wanted:
            play(case, arguments.rounds, arguments.scale, set(arguments.without.split(",")))


if __name__ == "__main__":
    main()
