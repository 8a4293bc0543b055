"""What rates, greylisting and the dialog with a milter cost (CPU of one operation).

The state is asked as in a server of one process, and as in one of two workers: the keeper is another process, and both
costs are printed. The milter is rspamd with its built-in rules only; what is printed is our side of a dialog about a
message of 4 KB, beside which the same dialog without rspamd shows what the network costs.

    python -m bench.filters
"""

from __future__ import annotations

import gc
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
import trio
from tests.policy.judging import make_message, make_transaction
from tests.policy.peers import rspamd

from penstock.message import Message
from penstock.policy.milter import MilterCheck
from penstock.policy.settings import MilterSettings
from penstock.state import Charge, GreylistTimes, State
from penstock.state.keeper import Keeper
from penstock.state.local import LocalState
from penstock.state.remote import RemoteState

_HOUR: Final = 3600 * 10**9
_TIMES: Final = GreylistTimes(60 * 10**9, 48 * _HOUR, 840 * _HOUR)
_ROUNDS: Final = 5
_HEADER: Final = b"".join(
    b"Received: from mx%d.example.com (mx%d.example.com [192.0.2.%d])\r\n\tby mx.example.com with ESMTP id %d;\r\n"
    b"\tMon, 02 Jun 2025 10:00:00 +0000\r\n" % (n, n, n, n) for n in range(4)
) + (
    b"From: Joe Sender <joe@sender.example>\r\nTo: Ann <ann@example.org>\r\nSubject: The minutes of the meeting\r\n"
    b"Date: Mon, 02 Jun 2025 10:00:00 +0000\r\nMessage-ID: <1@sender.example>\r\nMIME-Version: 1.0\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\n\r\n"
)  # fmt: skip
_BODY: Final = _HEADER + b"We met on Monday, and agreed to meet again on Tuesday of next week.\r\n" * 50


def cpu_of(pid: int) -> float:
    """Return the CPU seconds that a process has used, with all its threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def row(what: str, value: float, bound: float | None = None) -> None:
    """Print a line of the table."""
    print(f"{what:<56}{value:>8,.1f} us" + (f"  bound {bound:,.0f}" if bound is not None else ""))


async def measure(operate: Callable[[int], Awaitable[object]], count: int, other: int = 0) -> tuple[float, float]:
    """Return the median CPU of one operation in microseconds, here and in another process."""
    here, there = [], []
    for _ in range(_ROUNDS):
        start, start_there = time.process_time(), cpu_of(other) if other else 0.0
        for number in range(count):
            await operate(number)
        here.append((time.process_time() - start) / count * 1e6)
        there.append((cpu_of(other) - start_there) / count * 1e6 if other else 0.0)
    return statistics.median(here), statistics.median(there)


async def bench_state(state: State, name: str, bound: float, keeper: int = 0) -> None:
    """Print what a state costs."""

    async def take(number: int) -> None:
        key = f"network:messages:100/h\0192.0.2.{number % 200}"
        answer = state.take((Charge(key, _HOUR, 10**7),))
        assert (answer if isinstance(answer, int) else await answer) == -1

    async def greylist(number: int) -> None:
        answer = state.greylist(f"198.51.100.0/24\0joe@sender.example\0user{number % 200}@example.org", _TIMES)
        assert (answer if isinstance(answer, int) else await answer) > 0

    for what, operate in (("rate limit", take), ("greylisting", greylist)):
        here, there = await measure(operate, 5000, keeper)
        row(f"{what}, {name}", here + there, bound)
        if keeper:
            row("  of which the worker", here)


def bench_keeper(folder: Path) -> None:
    """Print what the state of several workers costs. The keeper is another process here."""
    keeper = Keeper(folder / "state.db", print)
    ours = keeper.connect()
    other = os.fork()
    if not other:
        ours.close()
        with keeper:
            signal.pause()
        os._exit(0)
    try:

        async def run() -> None:
            async with trio.open_nursery() as nursery:
                state = RemoteState(ours, print)
                await nursery.start(state.run)
                await bench_state(state, "2 workers (worker and keeper)", 40, other)
                nursery.cancel_scope.cancel()

        trio.run(run)
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)


async def bench_milter(port: int) -> None:
    """Print what our side of a dialog costs."""
    check = MilterCheck(
        msgspec.convert({"address": f"inet:127.0.0.1:{port}"}, MilterSettings), "enforce", "mx.example.org"
    )
    transaction = make_transaction("joe@sender.example", "ann@example.org")
    message = make_message(transaction, _BODY)
    changed: list[Message] = []

    async def ask(_: int) -> None:
        finding = await check.on_message(transaction, message)
        changed.append(finding.message)  # type: ignore[union-attr]

    async with trio.open_nursery() as nursery:
        await nursery.start(check.run)
        while not check._pool.reusable:  # noqa: ASYNC110, SLF001 - it is being found out whether rspamd keeps connections
            await trio.sleep(0.01)
        row("milter dialog with rspamd, 4 KB, our side", (await measure(ask, 200))[0], 100)

        async def ask_ten(number: int) -> None:
            async with trio.open_nursery() as askers:
                for _ in range(10):
                    askers.start_soon(ask, number)

        row("  ten at a time", (await measure(ask_ten, 50))[0] / 10, 100)
        assert all(b"X-Rspamd-Queue-Id" in b"".join(each.body.chunks()) for each in changed[:10])
        nursery.cancel_scope.cancel()


def main() -> None:
    """Print the table."""
    gc.set_threshold(20_000, 20, 100)  # as penstock.cli.running has it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trio.run(bench_state, LocalState(folder / "local.db", print), "1 worker", 3)
        bench_keeper(folder)
        (folder / "rspamd").mkdir()
        with rspamd(folder / "rspamd") as (port, _):
            trio.run(bench_milter, port)


if __name__ == "__main__":
    main()
