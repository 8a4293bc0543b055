"""`python -m bench.commit`: what it costs to put a message on stable storage before its 250.

puts      one process puts messages into a spool, with few and with a million of them waiting: CPU and latency of a
put, and the memory that those who wait cost. No network.
accepts   `penstock serve` with the spool beside Postfix (smtpd and cleanup, the queue file synced, then the discard
transport), driven by smtp-source in turn.
latency   the time from the dot to the 250 at half of the rate that was the most, by `penstock load` in open loop.

python -m bench.commit [--rounds 5] [--waiting 1000000] [--parts puts,accepts,latency]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from bench.measure import POSTFIX, Peer, Round, Running, machine, running, smtp_source, summary
from penstock.message import Envelope, Message, MessageIds, Recipient
from penstock.message import Path as MailPath
from penstock.server.body import MemoryBody, MemoryBudget
from penstock.spool.spool import Spool, SpoolSettings

_SENDER = MailPath("a@example.com", "a", "example.com")
_RECIPIENT = Recipient(MailPath("b@example.org", "b", "example.org"))
_CONFIG = """hostname = "bench.example"
data_dir = "data"
delivery = { kind = "spool" }
[[route]]
next_hop = "smtp://127.0.0.1:9"
tls.mode = "none"
[[listener]]
address = "127.0.0.1:{port}"
tls.mode = "none"
"""


# ---- puts


class Putter:
    """Puts messages into a spool, so many at a time."""

    def __init__(self, spool: Spool, octets: int) -> None:
        self._spool = spool
        self._data = (b"x" * 78 + b"\r\n") * (octets // 80)
        self._ids = MessageIds()
        self._budget = MemoryBudget(1 << 40)

    async def put(self, count: int, at_a_time: int) -> tuple[float, list[float]]:
        """Put messages. Return the CPU of one in microseconds, and how long each took in seconds."""
        latencies: list[float] = []
        over = trio.Event()
        left = count

        def one() -> None:
            nonlocal left
            left -= 1
            body = MemoryBody([self._data], len(self._data), self._budget)
            message = Message(self._ids.next(), Envelope(_SENDER, (_RECIPIENT,)), b"Received: x\r\n", body, time.time())
            begun = time.perf_counter()

            def done(failure: BaseException | None, _: object) -> None:
                assert failure is None, failure
                latencies.append(time.perf_counter() - begun)
                if left > 0:
                    one()
                elif len(latencies) == count:
                    over.set()

            self._spool.put_later(message, ["example.org"], done)

        before = _cpu()
        for _ in range(min(at_a_time, count)):
            one()
        await over.wait()
        return (_cpu() - before) / count * 1e6, latencies


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def measure_puts(folder: Path, waiting: int, rounds: int) -> None:
    """Print what a put costs while few and while many wait."""
    costs: dict[int, list[float]] = {}
    memory: dict[int, int] = {}
    spool = Spool(SpoolSettings(), folder)
    await spool.start()
    putter = Putter(spool, 1024)
    await putter.put(1_000, 100)
    for target in (1_000, waiting):
        while True:
            there = spool.puts
            if there >= target:
                break
            await putter.put(min(50_000, target - there), 100)
        costs[target] = []
        memory[target] = _rss()
        for _ in range(rounds):
            cost, latencies = await putter.put(5_000, 100)
            latencies.sort()
            costs[target].append(cost)
        print(
            f"  {target:>9,} waiting: {summary(costs[target])[0]:6.1f} us of CPU a put, 100 at a time; "
            f"last round p50 {latencies[2500] * 1e3:.1f} ms, p99 {latencies[4950] * 1e3:.1f} ms; "
            f"RSS {memory[target] / 1e6:.0f} MB",
            flush=True,
        )
    await spool.aclose()
    few, many = (summary(costs[target])[0] for target in costs)
    grown = (memory[waiting] - memory[1_000]) / (1 << 20)
    print(f"  a put costs {many / few:.2f} of what it did, target 1.2: {_verdict(many / few <= 1.2)}")
    print(f"  memory grew by {grown:.0f} MB, target 64: {_verdict(grown <= 64)}")


def _verdict(is_reached: bool) -> str:
    return "reached" if is_reached else "MISSED"


# ---- accepts


def _gateway(port: int, folder: Path) -> Sequence[str]:
    (folder / "penstock.toml").write_text(_CONFIG.replace("{port}", str(port)))
    return [sys.executable, "-m", "penstock", "serve", "--config", str(folder / "penstock.toml")]


GATEWAY = Peer("penstock serve", _gateway, sys.executable)


def measure_accepts(rounds: int) -> None:
    """Print the durable accepts beside Postfix's."""
    for title, extra, messages, target in (
        ("connections kept", ("-d",), 20_000, 10.0),
        ("a new connection each", (), 10_000, 5.0),
    ):
        with running(GATEWAY) as ours, running(POSTFIX) as theirs:
            pairs: list[tuple[Round, Round]] = []
            for number in range(rounds + 1):
                pair = (_accepts(ours, messages, extra), _accepts(theirs, messages // 8, extra))
                if number:  # the first one warms
                    pairs.append(pair)
        for name, which in (("penstock serve", 0), ("postfix", 1)):
            each = [pair[which] for pair in pairs]
            rate, low, high = summary([one.rate for one in each])
            cpu, least, most = summary([one.cpu_per_message for one in each])
            print(
                f"  {title}: {name:<15} {rate:8.0f}/s ({low:.0f} to {high:.0f}) "
                f"{cpu:8.1f} us/message ({least:.1f} to {most:.1f})",
                flush=True,
            )
        for name, ratios in (
            ("by the clock", [a.rate / b.rate for a, b in pairs]),
            ("by CPU", [b.cpu_per_message / a.cpu_per_message for a, b in pairs]),
        ):
            ratio, low, high = summary(ratios)
            print(
                f"  {title}: {name} {ratio:.1f} times postfix ({low:.1f} to {high:.1f}), "
                f"target {target:.0f}: {_verdict(ratio >= target)}",
                flush=True,
            )


def _accepts(server: Running, messages: int, extra: Sequence[str]) -> Round:
    return smtp_source(server, messages=messages, sessions=100, size=4096, extra=extra)


# ---- latency


def measure_latency() -> None:
    """Print the time from the dot to the 250 at half of the most."""
    with running(GATEWAY) as server:
        peak = max(_load(server, "--messages", "20000")["rate"] for _ in range(2))
        found = _load(server, "--rate", str(int(peak / 2)), "--duration", "15")
    p50, p99 = (found["phases"]["dot"][name] * 1e3 for name in ("p50", "p99"))
    print(
        f"  {peak:.0f}/s at the most; at half of it p50 {p50:.2f} ms, p99 {p99:.2f} ms, "
        f"target 20: {_verdict(p99 <= 20)}"
    )


def _load(server: Running, *words: str) -> dict[str, Any]:
    report = server.folder / "load.json"
    subprocess.run(
        [
            sys.executable, "-m", "penstock", "load", server.address, "--sessions", "100", "--reuse", "--size", "4096",
            "--report", str(report), *words,
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(report.read_bytes())
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--waiting", type=int, default=1_000_000)
    parser.add_argument("--parts", default="puts,accepts,latency")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    print(machine(), flush=True)
    if "puts" in parts:
        print("puts: 1 KB messages into a spool", flush=True)
        with tempfile.TemporaryDirectory(prefix="penstock-bench-", dir="/var/tmp") as name:
            trio.run(measure_puts, Path(name) / "spool", arguments.waiting, arguments.rounds)
    if "accepts" in parts:
        print("accepts: 4 KB messages, smtp-source -s 100", flush=True)
        measure_accepts(arguments.rounds)
    if "latency" in parts:
        print("latency: 4 KB messages, 100 connections kept, penstock load", flush=True)
        measure_latency()


if __name__ == "__main__":
    main()
