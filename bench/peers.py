"""CPU time of the server per message, beside other servers.

The servers of a case take turns, round by round, so that all have the same conditions; a ratio compares rounds
next to each other. smtp-source of Postfix is the client in plain text, bench/tls_client.py over TLS.

    python -m bench.peers [--rounds 5] [--cases kept,new,...] [--scale 1.0] [--without haraka,...]

Ratios are those of `penstock sink`. `penstock serve`, which keeps every message on disk, is measured as well. A server
that does not finish a round within 90 seconds is reported as stalled and left out of the rest of the case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
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
    raise_file_limit,
    ratio_of,
    running,
    smtp_source,
    summary,
    verdict,
)
from bench.other_servers import GO_SMTP, HARAKA, NODEMAILER
from bench.tls_client import tls_source


@dataclass(frozen=True)
class Case:
    """Work that several servers are given."""

    name: str
    title: str
    drive: Callable[[Running, int], Round]
    """Sends N messages to a server."""
    messages: int
    peers: tuple[Peer, ...]
    bounds: Mapping[Peer, float] = field(default_factory=dict)
    """What the ratio to a server may be at most."""


_ROUND_TIMEOUT = 90
"""Seconds."""


def _plain(sessions: int, size: int, *extra: str) -> Callable[[Running, int], Round]:
    return lambda server, messages: smtp_source(
        server, messages=messages, sessions=sessions, size=size, extra=extra, timeout=_ROUND_TIMEOUT
    )


def _tls(size: int, *, reuse: bool) -> Callable[[Running, int], Round]:
    return lambda server, messages: tls_source(server, messages=messages, sessions=20, size=size, reuse=reuse)


_ALL = (PENSTOCK_SERVE, SMTP_SINK, GO_SMTP, NODEMAILER, HARAKA, AIOSMTPD, POSTFIX)
_SINKS = (SMTP_SINK, GO_SMTP, NODEMAILER, HARAKA, AIOSMTPD)
_WITH_TLS = (PENSTOCK_SERVE, GO_SMTP, NODEMAILER, HARAKA, AIOSMTPD, POSTFIX)
_FOR_TLS_NEW = {AIOSMTPD: 0.55, GO_SMTP: 1.35}
_FOR_TLS = {AIOSMTPD: 0.25, GO_SMTP: 0.90}

CASES = [
    Case("kept", "4 KB, 20 connections kept", _plain(20, 4096, "-d"), 20_000, _ALL, {SMTP_SINK: 0.70}),
    Case("new", "4 KB, a new connection each", _plain(20, 4096), 10_000, _ALL, {SMTP_SINK: 1.00}),
    Case("1k", "1 KB, 20 connections kept", _plain(20, 1024, "-d"), 20_000, _SINKS),
    Case("1k-new", "1 KB, a new connection each", _plain(20, 1024), 10_000, _SINKS),
    Case("100k", "100 KB, 20 connections kept", _plain(20, 100_000, "-d"), 3_000, _ALL, {SMTP_SINK: 0.20}),
    Case("10m", "10 MB, 20 connections kept", _plain(20, 10_000_000, "-d"), 60, (SMTP_SINK, GO_SMTP, AIOSMTPD)),
    Case("rcpt", "4 KB, 10 recipients, kept", _plain(20, 4096, "-d", "-r", "10"), 8_000, _SINKS),
    Case("rcpt-new", "4 KB, 10 recipients, a new connection each", _plain(20, 4096, "-r", "10"), 6_000, _SINKS),
    Case("200", "4 KB, 200 connections kept", _plain(200, 4096, "-d"), 20_000, _SINKS),
    Case("2000", "4 KB, 2,000 connections kept", _plain(2000, 4096, "-d"), 40_000, _SINKS),
    Case("tls-new", "4 KB, STARTTLS, a new connection each", _tls(4096, reuse=False), 1_000, _WITH_TLS, _FOR_TLS_NEW),
    Case("tls", "4 KB, STARTTLS, connections kept", _tls(4096, reuse=True), 8_000, _WITH_TLS, _FOR_TLS),
]


@dataclass
class Comparison:
    """The rounds of each server, and why some did not finish theirs."""

    rounds: dict[Peer, list[Round]] = field(default_factory=dict)
    stalled: dict[Peer, str] = field(default_factory=dict)


def compare(case: Case, peers: Sequence[Peer], rounds: int, scale: float = 1.0) -> Comparison:
    """Let servers take turns at a case."""
    found = Comparison({peer: [] for peer in peers})
    with ExitStack() as stack:
        servers = {peer: stack.enter_context(running(peer)) for peer in peers}
        for number in range(rounds + 1):
            for peer in peers:
                if peer in found.stalled:
                    continue
                messages = max(40, int(case.messages * scale * peer.share) // (1 if number else 10))
                try:
                    one = case.drive(servers[peer], messages)
                except (Stalled, OSError, RuntimeError) as exc:
                    found.stalled[peer] = str(exc)
                else:
                    if number:  # the first round warms up
                        found.rounds[peer].append(one)
    return found


def print_case(case: Case, rounds: int, scale: float, without: Sequence[str]) -> None:
    """Measure a case and print its table."""
    print(f"{case.name}: {case.title}, {rounds} rounds of {int(case.messages * scale)} messages", flush=True)
    peers = [PENSTOCK_SINK]
    for peer in case.peers:
        if peer.name in without:
            continue
        if peer.is_installed:
            peers.append(peer)
        else:
            print(f"  {peer.name:<15} not installed")
    found = compare(case, peers, rounds, scale)
    for peer, each in found.rounds.items():
        if each:
            print(_line(case, peer, each, found.rounds[PENSTOCK_SINK]), flush=True)
        if peer in found.stalled:
            print(f"  {peer.name:<15} {found.stalled[peer]}", flush=True)


def _line(case: Case, peer: Peer, each: list[Round], ours: list[Round]) -> str:
    """Return a line of the table."""
    cpu, low, high = summary([one.cpu_per_message for one in each])
    user, _, _ = summary([one.cpu.user / one.messages for one in each])
    rate, _, _ = summary([one.rate for one in each])
    line = f"  {peer.name:<15} {cpu:8.1f} us/message ({low:.1f} to {high:.1f}; user {user:.1f}) {rate:8.0f}/s"
    if peer is PENSTOCK_SINK or not ours:
        return line
    ratio, low, high = ratio_of([one.cpu_per_message for one in ours], [one.cpu_per_message for one in each])
    line += f"   ours is {ratio:.2f} of it ({low:.2f} to {high:.2f})"
    bound = case.bounds.get(peer)
    return line if bound is None else f"{line}, bound {bound:.2f}: {verdict(ratio <= bound)}"


def main() -> None:
    """Measure the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the messages of each round")
    parser.add_argument("--cases", default="", help=", ".join(case.name for case in CASES))
    parser.add_argument("--without", default="", help="names of servers to leave out, separated by commas")
    arguments = parser.parse_args()
    raise_file_limit()
    wanted = set(filter(None, arguments.cases.split(",")))
    print(machine(), flush=True)
    for case in CASES:
        if not wanted or case.name in wanted:
            print_case(case, arguments.rounds, arguments.scale, arguments.without.split(","))


if __name__ == "__main__":
    main()
