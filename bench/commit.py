"""The cost of putting a message on stable storage before its 250.

    python -m bench.commit [--rounds 5] [--waiting 1000000] [--parts puts,accepts,latency]

puts       One process puts messages into a spool, without network, while few and while a million messages wait there:
           CPU time and latency of a put, and the memory that waiting messages cost.
accepts    `penstock serve` with the spool takes turns with Postfix (smtpd and cleanup, the queue file synced, then the
           discard transport); smtp-source is the client.
latency    The time from the final dot to the 250 at half of the highest rate, by `penstock load` in open loop.
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
from typing import Any, Final

import trio

from bench.measure import (
    POSTFIX,
    Peer,
    Round,
    Running,
    machine,
    ratio_of,
    running,
    smtp_source,
    summary,
    verdict,
)
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
    """Puts messages into a spool, a number of them at a time."""

    def __init__(self, spool: Spool, octets: int) -> None:
        self._spool = spool
        self._data = (b"x" * 78 + b"\r\n") * (octets // 80)
        self._ids = MessageIds()
        self._budget = MemoryBudget(1 << 40)

    async def put(self, count: int, at_a_time: int) -> tuple[float, list[float]]:
        """Put messages. Return the CPU time of one in microseconds, and how long each took in seconds."""
        latencies: list[float] = []
        left = count

        async def keep_putting() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                body = MemoryBody([self._data], len(self._data), self._budget)
                envelope = Envelope(_SENDER, (_RECIPIENT,))
                message = Message(self._ids.next(), envelope, b"Received: x\r\n", body, time.time())
                begun = time.perf_counter()
                await self._spool.put(message, ["example.org"])
                latencies.append(time.perf_counter() - begun)

        before = _cpu()
        async with trio.open_nursery() as nursery:
            for _ in range(at_a_time):
                nursery.start_soon(keep_putting)
        return (_cpu() - before) / count * 1e6, latencies


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def measure_puts(folder: Path, waiting: int, rounds: int) -> None:
    """Print what a put costs while few and while many messages wait."""
    costs: dict[int, list[float]] = {}
    memory: dict[int, int] = {}
    spool = Spool(SpoolSettings(), folder)
    await spool.start()
    putter = Putter(spool, 1024)
    await putter.put(1_000, 100)
    for target in (1_000, waiting):
        while True:
            waiting_now = spool.puts
            if waiting_now >= target:
                break
            await putter.put(min(50_000, target - waiting_now), 100)
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
    print(f"  a put costs {many / few:.2f} of a put into a small spool, bound 1.2: {verdict(many / few <= 1.2)}")
    print(f"  memory grew by {grown:.0f} MB, bound 64: {verdict(grown <= 64)}")


# ---- accepts


def _gateway(port: int, folder: Path) -> Sequence[str]:
    (folder / "penstock.toml").write_text(_CONFIG.replace("{port}", str(port)))
    return [sys.executable, "-m", "penstock", "serve", "--config", str(folder / "penstock.toml")]


GATEWAY = Peer("penstock serve", _gateway, sys.executable)


ACCEPTS: Final = {
    "connections kept": (("-d",), 20_000, 10.0),
    "a new connection each": ((), 10_000, 6.0),
}
"""By title: the options of smtp-source, the messages of a round, and the bound: a multiple of Postfix's rate."""


def compare_accepts(title: str, rounds: int, scale: float = 1.0) -> list[tuple[Round, Round]]:
    """Let Penstock and Postfix take turns at durable accepts. Return the rounds of both."""
    extra, messages, _ = ACCEPTS[title]
    count = int(messages * scale)
    with running(GATEWAY) as ours, running(POSTFIX) as theirs:
        pairs = [(_accepts(ours, count, extra), _accepts(theirs, count // 8, extra)) for _ in range(rounds + 1)]
    return pairs[1:]  # the first round warms up


def measure_accepts(rounds: int) -> None:
    """Print the durable accepts beside Postfix's."""
    for title, (_, _, bound) in ACCEPTS.items():
        pairs = compare_accepts(title, rounds)
        for name, which in (("penstock serve", 0), ("postfix", 1)):
            each = [pair[which] for pair in pairs]
            rate, low, high = summary([one.rate for one in each])
            cpu, least, most = summary([one.cpu_per_message for one in each])
            print(
                f"  {title}: {name:<15} {rate:8.0f}/s ({low:.0f} to {high:.0f}) "
                f"{cpu:8.1f} us/message ({least:.1f} to {most:.1f})",
                flush=True,
            )
        ratio, low, high = ratio_of([ours.rate for ours, _ in pairs], [theirs.rate for _, theirs in pairs])
        print(
            f"  {title}: {ratio:.1f} times the rate of postfix ({low:.1f} to {high:.1f}), "
            f"bound {bound:.0f}: {verdict(ratio >= bound)}",
            flush=True,
        )


def _accepts(server: Running, messages: int, extra: Sequence[str]) -> Round:
    return smtp_source(server, messages=messages, sessions=100, size=4096, extra=extra)


# ---- latency


def measure_latency() -> None:
    """Print the time from the final dot to the 250 at half of the highest rate."""
    with running(GATEWAY) as server:
        peak = max(_load(server, "--messages", "20000")["rate"] for _ in range(2))
        found = _load(server, "--rate", str(int(peak / 2)), "--duration", "15")
    p50, p99 = (found["phases"]["dot"][name] * 1e3 for name in ("p50", "p99"))
    print(
        f"  highest rate {peak:.0f}/s; at half of it p50 {p50:.2f} ms, p99 {p99:.2f} ms, bound 20: {verdict(p99 <= 20)}"
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
