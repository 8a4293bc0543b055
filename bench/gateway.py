"""From the client through a durable server to its destination: a next hop, or Maildir files.

Penstock and Postfix take turns at the same work. A round ends when the last message has arrived; wall time is counted
from the first connection to that moment, CPU time is the server's own. Postfix needs root.

    python -m bench.gateway [--to hop|maildir] [--rounds 5] [--messages 10000] [--sessions 100] [--size 4096] [--new]

hop        Both relay to the same smtp-sink, over up to 20 connections (Postfix's default for a destination); what
           smtp-sink has counted is checked.
maildir    A bare `penstock serve`, and Postfix's `virtual` transport; the files are counted.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from bench.measure import (
    PENSTOCK_SERVE,
    POSTFIX,
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
from bench.processes import ENVIRONMENT

RATE_BOUND: Final = 8.0
"""Relayed messages per second, as a multiple of Postfix's."""
CPU_BOUND: Final = 1 / 6
"""CPU time of a message filed into a Maildir, as a share of Postfix's."""
_TIMEOUT: Final = 300.0
"""Seconds for the last message of a round to arrive."""
_COUNT = re.compile(rb"mesg=(\d+)")

_POSTFIX_CLIENTS = """smtp unix - - n - 100 smtp
relay unix - - n - 100 smtp
retry unix - - n - - error
error unix - - n - - error
scache unix - - n - 1 scache
"""
_POSTFIX_VIRTUAL = """relay_domains =
virtual_mailbox_domains = static:ALL
virtual_mailbox_maps = static:maildir/
virtual_mailbox_base = {folder}
virtual_minimum_uid = 1
virtual_uid_maps = static:{uid}
virtual_gid_maps = static:{uid}
"""
_CONFIG = """hostname = "localhost"
[[listener]]
address = "127.0.0.1:{port}"
[[route]]
next_hop = "smtp://127.0.0.1:{sink}"
"""

CountArrived = Callable[[], int]


def _sink(port: int, _: Path) -> Sequence[str]:
    return ["smtp-sink", "-c", "-u", "nobody", "-m", "20000", f"127.0.0.1:{port}", "4096"]


COUNTING_SINK = Peer("smtp-sink", _sink, "smtp-sink")


def penstock_with(settings: str) -> Peer:
    """Return a Penstock with these settings, in which {port} is its port."""

    def command(port: int, folder: Path) -> Sequence[str]:
        (folder / "penstock.toml").write_text(settings.replace("{port}", str(port)))
        return [
            sys.executable, "-m", "penstock", "serve", "--config", str(folder / "penstock.toml"), "--data", str(folder),
        ]  # fmt: skip

    return Peer("penstock", command, sys.executable)


def penstock_to(sink: Running) -> Peer:
    """Return a Penstock that relays to a sink."""
    return penstock_with(_CONFIG.replace("{sink}", str(sink.port)))


def postfix_to(sink: Running) -> Peer:
    """Return a Postfix that relays to a sink."""

    def command(port: int, folder: Path) -> Sequence[str]:
        start = POSTFIX.command(port, folder)
        main, master = folder / "config" / "main.cf", folder / "config" / "master.cf"
        relayed = main.read_text().replace("transport = discard", f"transport = smtp:[127.0.0.1]:{sink.port}")
        main.write_text(f"{relayed}disable_dns_lookups = yes\nsmtp_tls_security_level = none\n")
        master.write_text(f"{master.read_text()}{_POSTFIX_CLIENTS}")
        return start

    return Peer("postfix", command, "postfix", share=0.2)


def _postfix_virtual(port: int, folder: Path) -> Sequence[str]:
    start = POSTFIX.command(port, folder)
    main, master = folder / "config" / "main.cf", folder / "config" / "master.cf"
    nobody = 65534
    os.mkdir(folder / "maildir")  # noqa: PTH102 - beside chown
    os.chown(folder / "maildir", nobody, nobody)
    kept = main.read_text().replace("relay_domains = static:ALL\n", "")
    main.write_text(kept + _POSTFIX_VIRTUAL.format(folder=folder, uid=nobody))
    master.write_text(f"{master.read_text()}virtual unix - n n - - virtual\n")
    return start


POSTFIX_VIRTUAL = Peer("postfix", _postfix_virtual, "postfix", share=0.2)


def arrived_at(sink: Running) -> int:
    """Return how many messages smtp-sink has counted."""
    log = (sink.folder / "log").read_bytes()[-200:]
    counts = _COUNT.findall(log)
    return int(counts[-1]) if counts else 0


def filed_by(server: Running) -> int:
    """Return how many messages are in the Maildir of a server."""
    folder = server.folder / "maildir" / "new"
    return sum(1 for _ in os.scandir(folder)) if folder.exists() else 0


def play(
    server: Running, count_arrived: CountArrived, *, messages: int, sessions: int, size: int, extra: Sequence[str]
) -> Round:
    """Send messages and wait until the last of them has arrived. Raise RuntimeError if it does not."""
    before_count, before, started = count_arrived(), cpu_of(server.pid), time.monotonic()
    subprocess.run(
        ["smtp-source", "-s", str(sessions), "-m", str(messages), "-l", str(size), *extra, server.address],
        check=True, env=ENVIRONMENT, timeout=600, capture_output=True,
    )  # fmt: skip
    while (count := count_arrived() - before_count) < messages and time.monotonic() - started < _TIMEOUT:
        time.sleep(0.005)
    seconds = time.monotonic() - started
    if count != messages:
        raise RuntimeError(f"{count} of {messages} messages arrived within {_TIMEOUT:.0f} s")
    return Round(messages, seconds, cpu_of(server.pid) - before)


def compare(
    to: str,
    *,
    rounds: int,
    messages: int = 10_000,
    sessions: int = 100,
    size: int = 4096,
    extra: Sequence[str] = ("-d",),
) -> Mapping[str, list[Round]]:
    """Let Penstock and, if it is installed, Postfix take turns. `to` is "hop" or "maildir"."""
    results: dict[str, list[Round]] = {}
    with ExitStack() as stack:
        if to == "hop":
            sink = stack.enter_context(running(COUNTING_SINK))
            peers = [penstock_to(sink), postfix_to(sink)]
        else:
            peers = [PENSTOCK_SERVE, POSTFIX_VIRTUAL]
        servers = {peer: stack.enter_context(running(peer)) for peer in peers if peer.is_installed}
        for number in range(rounds + 1):
            for peer, server in servers.items():

                def count_arrived(server: Running = server) -> int:
                    return arrived_at(sink) if to == "hop" else filed_by(server)

                count = max(100, int(messages * peer.share * (1 if number else 0.2)))
                found = play(server, count_arrived, messages=count, sessions=sessions, size=size, extra=extra)
                if number:  # the first round warms up
                    results.setdefault(peer.name.removesuffix(" serve"), []).append(found)
    return results


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", choices=["hop", "maildir"], default="hop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--new", action="store_true", help="a new connection for each message")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    results = compare(
        arguments.to,
        rounds=arguments.rounds,
        messages=arguments.messages,
        sessions=arguments.sessions,
        size=arguments.size,
        extra=() if arguments.new else ("-d",),
    )
    place = "the same smtp-sink" if arguments.to == "hop" else "a Maildir"
    print(f"{arguments.sessions} sessions, {arguments.size} octets, {arguments.rounds} rounds; to {place}")
    for name, each in results.items():
        rate, low, high = summary([one.rate for one in each])
        cpu, _, _ = summary([one.cpu_per_message for one in each])
        user, _, _ = summary([one.cpu.user / one.messages for one in each])
        print(f"  {name:<10} {rate:8.0f}/s ({low:.0f} to {high:.0f})   {cpu:7.1f} us/message (user {user:.1f})")
    if "postfix" in results:
        ours, theirs = results["penstock"], results["postfix"]
        rate, low, high = ratio_of([one.rate for one in ours], [one.rate for one in theirs])
        cpu, least, most = ratio_of([one.cpu_per_message for one in ours], [one.cpu_per_message for one in theirs])
        is_hop = arguments.to == "hop"
        print(
            f"  penstock is {rate:.1f} x postfix ({low:.1f} to {high:.1f})"
            + (f", bound {RATE_BOUND:.0f}: {verdict(rate >= RATE_BOUND)}" if is_hop else "")
        )
        print(
            f"  penstock uses {cpu:.3f} of its CPU time ({least:.3f} to {most:.3f})"
            + ("" if is_hop else f", bound {CPU_BOUND:.3f}: {verdict(cpu <= CPU_BOUND)}")
        )


if __name__ == "__main__":
    main()
