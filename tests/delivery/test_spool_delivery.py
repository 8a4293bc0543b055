"""Delivery into the spool: what its 250 promises, and what it says when it cannot keep it."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from penstock.delivery.base import ChecksCapacity
from penstock.delivery.spool import SpoolDelivery
from penstock.message import Message, Recipient
from penstock.reply import Reply
from penstock.spool.diskspace import DiskSpace
from penstock.spool.entry import Entry
from penstock.spool.spool import Spool, SpoolFullError, SpoolSettings
from tests.contracts.delivery import check_delivery, make_message
from tests.helpers import TRANSACTION


class Relay:
    """A relay that takes what it is told to."""

    def __init__(self) -> None:
        self.is_eager = False
        self.reserved = 0
        self.offered: list[Entry] = []

    def domain_of(self, recipient: Recipient) -> str:
        return recipient.path.domain

    def reserve(self, queues: Sequence[str], octets: int) -> bool:
        self.reserved += octets * self.is_eager
        return self.is_eager

    def release(self, octets: int) -> None:
        self.reserved -= octets

    def offer(self, entries: Sequence[Entry]) -> None:
        self.offered += entries

    def are_mailboxes(self, queues: Sequence[str]) -> bool:
        return False

    def note_delivered(self, message: Message, queues: Sequence[str], reply: Reply) -> None:
        """Note nothing."""


@asynccontextmanager
async def delivery_into(folder: Path, relay: Relay | None = None) -> AsyncIterator[tuple[SpoolDelivery, Spool]]:
    spool = Spool(SpoolSettings(body_in_file=100_000), folder)
    await spool.start()
    try:
        yield SpoolDelivery(spool, relay or Relay(), DiskSpace(folder, reserve_octets=0, reserve_inodes=0)), spool
    finally:
        await spool.aclose()


async def accept(delivery: SpoolDelivery, body: bytes) -> Reply:
    return await delivery.accept(make_message(body), TRANSACTION)


async def test_it_keeps_the_contract(tmp_path: Path) -> None:
    async with delivery_into(tmp_path) as (delivery, spool):
        assert isinstance(delivery, ChecksCapacity)
        await check_delivery(delivery)
        assert (await accept(delivery, b"x")).text.startswith("Ok: spooled as ")
        assert len(await spool.take("example.org", 4e9, 100, 1 << 20)) == 4


async def test_the_age_of_a_message_begins_when_its_checks_are_over(tmp_path: Path) -> None:
    """The clock may have been set meanwhile, and what is in the spool was corrected by that."""
    relay = Relay()
    relay.is_eager = True
    async with delivery_into(tmp_path, relay) as (delivery, spool):
        spool.now = lambda: 4e9  # type: ignore[method-assign]
        await delivery.accept(make_message(b"one")._replace(received_at=5e8), TRANSACTION)
        assert {entry.received_at for entry in relay.offered} == {4e9}


async def test_an_eager_relay_gets_the_message_without_reading_it_back(tmp_path: Path) -> None:
    relay = Relay()
    relay.is_eager = True
    async with delivery_into(tmp_path, relay) as (delivery, spool):
        await accept(delivery, b"one")
        await delivery.accept(make_message(b"two"), TRANSACTION)
        await delivery.accept(make_message(b"3" * 200_000), TRANSACTION)
        assert [b"".join(entry.body.chunks())[:3] for entry in relay.offered] == [b"one", b"two", b"333"]
        assert await spool.due_queues(4e9, 10) == []


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 452),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 452),
        (OSError(errno.EIO, "Input/output error"), 451),
        (sqlite3.OperationalError("disk I/O error"), 451),
        (SpoolFullError("20000 messages wait"), 452),
    ],
)
async def test_what_could_not_be_written_is_not_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, code: int
) -> None:
    async with delivery_into(tmp_path) as (delivery, spool):

        def fail(*_: object) -> None:
            raise failure

        if isinstance(failure, SpoolFullError):
            monkeypatch.setattr(spool._committer, "put", fail)
        else:
            monkeypatch.setattr(spool._store, "put", fail)
        reply = await accept(delivery, b"x")
        assert reply.code == code
        assert str(failure) in reply.cause
        assert str(failure) not in reply.text
        monkeypatch.undo()
        assert (await delivery.accept(make_message(b"x"), TRANSACTION)).code == 250, "the spool goes on"


async def test_a_full_database_is_a_full_disk(tmp_path: Path) -> None:
    async with delivery_into(tmp_path) as (delivery, spool):
        await spool._committer.do(lambda store: store._database.execute("PRAGMA max_page_count = 22").fetchall())
        assert (await accept(delivery, b"x" * 90_000)).code == 250
        assert (await accept(delivery, b"x" * 90_000)).code == 452


async def test_mail_is_refused_before_the_reserve_is_touched(tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    free = found.f_bavail * found.f_frsize
    space = DiskSpace(tmp_path, reserve_octets=free // 2, reserve_inodes=0)
    async with delivery_into(tmp_path) as (_, spool):
        delivery = SpoolDelivery(spool, Relay(), space)
        assert delivery.check_capacity(0) is None
        assert delivery.check_capacity(1000) is None
        refusal = delivery.check_capacity(free)
        assert refusal is not None
        assert (refusal.code, refusal.status) == (452, "4.3.1")
        space.count(free)
        assert delivery.check_capacity(0) is not None
        space.check()
        assert delivery.check_capacity(0) is None


def test_inodes_have_a_reserve_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    for files, free, has in ((1000, 10, False), (1000, 500, True), (0, 0, True)):
        faked = os.statvfs_result((*real[:5], files, free, free, *real[8:10]))
        monkeypatch.setattr(os, "statvfs", lambda _, faked=faked: faked)
        assert DiskSpace(tmp_path, reserve_octets=0, reserve_inodes=100).has_capacity(0) is has


def test_an_unreadable_file_system_is_assumed_to_have_space(tmp_path: Path) -> None:
    space = DiskSpace(tmp_path, reserve_octets=0, reserve_inodes=0)
    before = space.octets
    space._folder = tmp_path / "gone"
    space.check()
    assert space.octets == before


async def test_the_file_system_is_looked_at_again_and_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = DiskSpace(tmp_path, reserve_octets=0, reserve_inodes=0)
    looked = trio.Event()
    token = trio.lowlevel.current_trio_token()
    monkeypatch.setattr(space, "check", lambda: token.run_sync_soon(looked.set))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(space.run)
        await looked.wait()
        nursery.cancel_scope.cancel()
