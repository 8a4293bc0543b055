"""`python -m bench.gateway`: from smtp-source through a server that makes each message durable, to smtp-sink.

Penstock and Postfix relay to the same smtp-sink, in alternating rounds. A round ends when smtp-sink has got the last
message: the wall time is from the first connection to then, and the CPU is the server's own. What smtp-sink has counted
is checked. Both use up to 20 connections to it (Postfix's default for a destination); Postfix needs root.

    python -m bench.gateway [--rounds 5] [--messages 10000] [--sessions 100] [--size 4096] [--new]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.measure import POSTFIX, Peer, Round, Running, cpu_of, machine, running, summary
from bench.processes import ENVIRONMENT

TARGET = 6.0
"""Times Postfix's messages per second."""
_PATIENCE = 300.0
_COUNT = re.compile(rb"mesg=(\d+)")

POSTFIX_SENDERS = """smtp unix - - n - 100 smtp
relay unix - - n - 100 smtp
retry unix - - n - - error
error unix - - n - - error
scache unix - - n - 1 scache
"""
CONFIG = """hostname = "localhost"
[[listener]]
address = "127.0.0.1:{port}"
[[route]]
next_hop = "smtp://127.0.0.1:{sink}"
"""


def _sink(port: int, _: Path) -> Sequence[str]:
    return ["smtp-sink", "-c", "-u", "nobody", "-m", "20000", f"127.0.0.1:{port}", "4096"]


COUNTING_SINK = Peer("smtp-sink", _sink, "smtp-sink")


def penstock_to(sink: Running) -> Peer:
    """Return a Penstock that relays to a sink."""

    def command(port: int, folder: Path) -> Sequence[str]:
        (folder / "penstock.toml").write_text(CONFIG.format(port=port, sink=sink.port))
        return [
            sys.executable, "-m", "penstock", "serve", "--config", str(folder / "penstock.toml"), "--data", str(folder),
        ]  # fmt: skip

    return Peer("penstock", command, sys.executable)


def postfix_to(sink: Running) -> Peer:
    """Return a Postfix that does."""

    def command(port: int, folder: Path) -> Sequence[str]:
        start = POSTFIX.command(port, folder)
        main, master = folder / "config" / "main.cf", folder / "config" / "master.cf"
        relayed = main.read_text().replace("transport = discard", f"transport = smtp:[127.0.0.1]:{sink.port}")
        main.write_text(f"{relayed}disable_dns_lookups = yes\nsmtp_tls_security_level = none\n")
        master.write_text(f"{master.read_text()}{POSTFIX_SENDERS}")
        return start

    return Peer("postfix", command, "postfix")


def arrived(sink: Running) -> int:
    """Return how many messages smtp-sink says that it has got."""
    log = (sink.folder / "log").read_bytes()[-200:]
    counts = _COUNT.findall(log)
    return int(counts[-1]) if counts else 0


def play(server: Running, sink: Running, *, messages: int, sessions: int, size: int, extra: Sequence[str]) -> Round:
    """Send messages, and wait until the last of them has arrived."""
    before_count, before, started = arrived(sink), cpu_of(server.pid), time.monotonic()
    subprocess.run(
        ["smtp-source", "-s", str(sessions), "-m", str(messages), "-l", str(size), *extra, server.address],
        check=True, env=ENVIRONMENT, timeout=600, capture_output=True,
    )  # fmt: skip
    while (count := arrived(sink) - before_count) < messages and time.monotonic() - started < _PATIENCE:
        time.sleep(0.005)
    seconds = time.monotonic() - started
    if count != messages:
        raise SystemExit(f"{count} of {messages} messages arrived within {_PATIENCE:.0f} s")
    return Round(messages, seconds, cpu_of(server.pid) - before)


def main() -> None:
    """Play the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--new", action="store_true", help="a new connection for each message")
    parser.add_argument("--alone", action="store_true", help="without Postfix")
    arguments = parser.parse_args()
    extra = [] if arguments.new else ["-d"]
    print(machine(), flush=True)
    results: dict[str, list[Round]] = {}
    with ExitStack() as stack:
        sink = stack.enter_context(running(COUNTING_SINK))
        peers = [penstock_to(sink)] + ([] if arguments.alone else [postfix_to(sink)])
        servers = {peer: stack.enter_context(running(peer)) for peer in peers if peer.is_installed}
        for turn in range(arguments.rounds + 1):
            for peer, server in servers.items():
                # Postfix gets fewer, so that a round is about as long.
                share = 1.0 if peer.name == "penstock" else 0.2
                messages = max(100, int(arguments.messages * share * (1 if turn else 0.2)))
                found = play(
                    server, sink, messages=messages, sessions=arguments.sessions, size=arguments.size, extra=extra
                )
                if turn:  # the first one only warms
                    results.setdefault(peer.name, []).append(found)
    print(f"{arguments.sessions} sessions, {arguments.size} octets, {arguments.rounds} rounds; to the same smtp-sink")
    for name, each in results.items():
        rate, low, high = summary([one.rate for one in each])
        cpu, _, _ = summary([one.cpu_per_message for one in each])
        user, _, _ = summary([one.cpu.user / one.messages for one in each])
        print(f"  {name:<10} {rate:8.0f}/s ({low:.0f} to {high:.0f})   {cpu:7.1f} us/message (user {user:.1f})")
    if "postfix" in results:
        pairs = list(zip(results["penstock"], results["postfix"], strict=True))
        ratio, low, high = summary([ours.rate / theirs.rate for ours, theirs in pairs])
        verdict = "reached" if ratio >= TARGET else "MISSED"
        cpu, _, _ = summary([theirs.cpu_per_message / ours.cpu_per_message for ours, theirs in pairs])
        print(f"  penstock is {ratio:.1f} x postfix ({low:.1f} to {high:.1f}), target {TARGET:.0f}: {verdict}")
        print(f"  and uses 1/{cpu:.1f} of its CPU")


if __name__ == "__main__":
    main()
