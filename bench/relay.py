"""`python -m bench.relay`: CPU of the sending side for each message, on kept connections to smtp-sink.

Round by round beside Postfix's smtp-source, which only sends the same message repeatedly: the
least that a sender can cost. `deliver` is a task that waits for each message, `deliver_later` is none.

    python -m bench.relay [--rounds 5] [--messages 10000] [--size 4096] [--connections 20]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import time
from collections.abc import Iterator

import trio

from bench.measure import SMTP_SINK, Cpu, Round, Running, machine, running, summary
from bench.processes import ENVIRONMENT
from penstock.message import Envelope, Path, Recipient
from penstock.relay.hop import Delivered, Hop, HopLimits, NextHopUnavailable, Outcome, TlsPolicy
from penstock.relay.pool import Pool

ENVELOPE = Envelope(Path("a@example.com", "a", "example.com"), (Recipient(Path("b@example.org", "b", "example.org")),))
PREFIX = b"Received: from client (client [192.0.2.1]) by mx.example.org with ESMTP id 4711;\r\n Mon, 1 Jan 2024\r\n"


class Text:
    """A body in memory."""

    in_memory = True

    def __init__(self, size: int) -> None:
        line = b"x" * 76 + b"\r\n"
        self._text = b"Subject: bench\r\n\r\n" + line * max(1, size // len(line))
        self.size = len(self._text)

    def chunks(self) -> Iterator[bytes]:
        """Yield it in one piece."""
        return iter((self._text,))

    def close(self) -> None:
        """Do nothing."""


def cpu_of(who: int) -> Cpu:
    """Return the CPU of this process, or of its children that have ended."""
    used = resource.getrusage(who)
    return Cpu(int(used.ru_utime * 1e6), int(used.ru_stime * 1e6))


async def send(pool: Pool, hop: Hop, text: Text, messages: int, connections: int, *, later: bool) -> Round:
    """Send a number of messages."""
    size = len(PREFIX) + text.size
    left = messages
    over = trio.Event()
    before, started = cpu_of(resource.RUSAGE_SELF), time.monotonic()

    def heard(outcome: Delivered | NextHopUnavailable) -> None:
        nonlocal left
        if isinstance(outcome, NextHopUnavailable) or outcome[0].kind is not Outcome.DELIVERED:
            raise SystemExit(f"not delivered: {outcome}")
        left -= 1
        if not left:
            over.set()

    def again(outcome: Delivered | NextHopUnavailable) -> None:
        heard(outcome)
        if left >= 2 * connections:
            pool.deliver_later(hop, ENVELOPE, PREFIX, text, size, again)

    async def one_after_the_other(numbers: Iterator[int]) -> None:
        for _ in numbers:
            heard(await pool.deliver(hop, ENVELOPE, PREFIX, text, size))

    async with trio.open_nursery() as nursery:
        if later:
            for _ in range(2 * connections):
                pool.deliver_later(hop, ENVELOPE, PREFIX, text, size, again)
        else:
            numbers = iter(range(messages))
            for _ in range(2 * connections):
                nursery.start_soon(one_after_the_other, numbers)
        await over.wait()
    return Round(messages, time.monotonic() - started, cpu_of(resource.RUSAGE_SELF) - before)


def source(server: Running, messages: int, size: int, connections: int) -> Round:
    """Send as many with smtp-source."""
    command = ["smtp-source", "-d", "-s", str(connections), "-m", str(messages), "-l", str(size), server.address]
    before, started = cpu_of(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True, env=ENVIRONMENT, timeout=600, capture_output=True)
    return Round(messages, time.monotonic() - started, cpu_of(resource.RUSAGE_CHILDREN) - before)


async def play(server: Running, arguments: argparse.Namespace) -> dict[str, list[Round]]:
    """Play all rounds."""
    limits = HopLimits(connections=arguments.connections, messages=10_000_000, queue=100_000)
    hop = Hop(host="127.0.0.1", port=server.port, tls=TlsPolicy(mode="none"), limits=limits)
    text, messages, connections = Text(arguments.size), arguments.messages, arguments.connections
    results: dict[str, list[Round]] = {"smtp-source": [], "deliver": [], "deliver_later": []}
    pool = Pool(hostname="bench.example.org")
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        await send(pool, hop, text, 1000, connections, later=True)  # warm
        for _ in range(arguments.rounds):
            results["smtp-source"].append(source(server, messages, arguments.size, connections))
            for name in ("deliver", "deliver_later"):
                later = name == "deliver_later"
                results[name].append(await send(pool, hop, text, messages, connections, later=later))
        await pool.aclose()
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--connections", type=int, default=20)
    arguments = parser.parse_args()
    print(machine(), flush=True)
    with running(SMTP_SINK) as server:
        results = trio.run(play, server, arguments)
    print(f"{arguments.size} octets, {arguments.connections} connections kept, {arguments.rounds} rounds")
    for name, each in results.items():
        cpu, low, high = summary([one.cpu_per_message for one in each])
        rate, _, _ = summary([one.rate for one in each])
        print(f"  {name:<14} {cpu:6.1f} us/message ({low:.1f} to {high:.1f}) {rate:8.0f}/s")


if __name__ == "__main__":
    main()
