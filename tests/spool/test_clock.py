"""A queue whose clock is set: every message keeps its age, whatever was being written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from penstock.spool.bodies import BodyThreads
from penstock.spool.clock import Ages, ClockGuard
from penstock.spool.spool import Spool, SpoolSettings
from tests.contracts.delivery import make_message

START = 1_000_000.0
DAY = 86_400.0


class Clock:
    """A clock that can be set."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def opened(folder: Path, clock: Clock) -> AsyncIterator[tuple[Spool, Ages]]:
    spool = Spool(SpoolSettings(body_in_file=1000), folder, clock=clock)
    await spool.start()
    ages = Ages(spool, ClockGuard(clock, steady=lambda: START))
    assert ages.notice() is None
    try:
        yield spool, ages
    finally:
        await spool.aclose()


async def ages_of(spool: Spool) -> list[float]:
    found = await spool.received_at(range(1, spool.newest + 1))
    return [spool.now() - received_at for received_at in found.values()]


@pytest.mark.parametrize("jump", [6 * DAY, -6 * DAY])
async def test_a_message_whose_file_is_written_during_a_jump_keeps_its_age(
    tmp_path: Path, jump: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, may_end = BodyThreads.write, trio.Event()

    async def slow(threads: BodyThreads, *arguments: object) -> None:
        await write(threads, *arguments)  # type: ignore[arg-type]
        await may_end.wait()

    clock = Clock()
    monkeypatch.setattr(BodyThreads, "write", slow)
    async with opened(tmp_path, clock) as (spool, ages):
        async with trio.open_nursery() as nursery:
            message = make_message(b"x" * 2000)._replace(received_at=clock.now)
            nursery.start_soon(spool.put, message, ["example.org"])
            await trio.testing.wait_all_tasks_blocked()
            clock.now += jump
            assert ages.notice() is not None
            nursery.start_soon(ages.correct)
            await trio.testing.wait_all_tasks_blocked()
            assert ages.are_wrong, "a file is still being written"
            may_end.set()
        assert await ages_of(spool) == [0.0]


async def test_a_report_that_waits_for_the_disk_during_a_jump_is_new(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock) as (spool, ages):
        report = make_message(b"x")._replace(received_at=clock.now)
        clock.now += 6 * DAY
        ages.notice()
        await ages.correct()
        await spool.record([], [(report, ["example.org"])])
        assert await ages_of(spool) == [0.0]
