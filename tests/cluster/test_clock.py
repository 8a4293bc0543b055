"""Nodes of a cluster whose clock is set: what they accept and forward keeps its age."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cluster.forwarder import Forwarder
from penstock.cluster.layout import Place
from penstock.cluster.queue import _ACTIVE
from penstock.cluster.writer import Written
from penstock.journal import Journal, JournalSettings
from penstock.message import Message
from penstock.spool.clock import Ages, ClockGuard
from tests.cluster.test_leaving import make_queue
from tests.contracts.delivery import make_message
from tests.spool.test_clock import DAY, START, Clock, opened


class Target:
    """Takes what is forwarded."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def forward(self, message: Message, queue: str) -> None:
        assert queue == "cluster"
        self.messages.append(message)


async def forward_after(folder: Path, jump: float) -> float:
    """Return the age of a message that is forwarded after a jump of the clock."""
    clock, target, journal = Clock(), Target(), Journal(JournalSettings(events="none"))
    async with opened(folder, clock) as (spool, _):
        forwarder = Forwarder(spool, target, journal)
        forwarder._ages = Ages(spool, ClockGuard(clock, steady=lambda: START))
        assert not await forwarder._forward_some()
        await spool.put(make_message(b"x")._replace(received_at=clock.now), ["cluster"])
        clock.now += jump
        while not target.messages:
            if not await forwarder._forward_some():
                clock.now += 2
        return clock.now - target.messages[0].received_at


@pytest.mark.parametrize("jump", [6 * DAY, -6 * DAY])
async def test_mail_of_an_outage_is_forwarded_with_its_age_though_the_clock_was_set(
    tmp_path: Path, jump: float
) -> None:
    assert 0 <= await forward_after(tmp_path, jump) < 10


async def test_a_message_that_waits_for_the_cluster_during_a_jump_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, clock = make_queue(tmp_path), Clock()
    ages = Ages(queue, ClockGuard(clock, steady=lambda: START))

    async def write(message: Message, partition: int, *, patience: float) -> Written:
        clock.now += 6 * DAY
        assert ages.notice() is not None
        await ages.correct()
        return Written(Place(partition, 2, 0, 0, 0, 0, 0, False), b"x")

    monkeypatch.setattr(queue, "_clock", clock)
    monkeypatch.setitem(queue._owned, 0, _ACTIVE)
    monkeypatch.setattr(queue._writer, "write", write)
    await queue.start()
    try:
        assert ages.notice() is None
        await queue.put_into(0, make_message(b"x")._replace(received_at=clock.now), ["example.org"])
        assert await queue.received_at([queue.newest]) == {queue.newest: clock.now}
    finally:
        await queue.aclose()
