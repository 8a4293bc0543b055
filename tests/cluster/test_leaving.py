"""What becomes of the index, and of the files beside it, when a partition is given up or the disk is full."""

from __future__ import annotations

import errno
import io
import itertools
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from penstock.cluster.durability import Durability, ServerState
from penstock.cluster.forwarder import Forwarder
from penstock.cluster.jetstream import JetStream, Stored
from penstock.cluster.layout import Place
from penstock.cluster.queue import DamagedError, ReplicatedQueue
from penstock.cluster.settings import JetStreamSettings
from penstock.cluster.setup import make_client, make_layout
from penstock.cluster.writer import Writer
from penstock.journal import Journal, JournalSettings
from penstock.message import Message, MessageId
from penstock.net.nats import NatsError, RequestTimeoutError
from penstock.spool.entry import AttemptRecord, Entry, Row
from penstock.spool.spool import Spool, SpoolSettings
from tests.cluster.nodes import PATIENCE
from tests.contracts.delivery import make_message

SETTINGS = JetStreamSettings(servers=("nats://127.0.0.1:1",), monitors=("http://127.0.0.1:1",), node="g1")


PLACE = (0, 0, 0, 0, 0, False)
"""What a place has beside its partition and sequence."""


def make_queue(folder: Path) -> ReplicatedQueue:
    """Return the queue of a node without a connection."""
    jetstream, layout = JetStream(make_client(SETTINGS, folder)), make_layout(SETTINGS)
    return ReplicatedQueue(
        jetstream,
        layout,
        Writer(jetstream, layout),
        folder=folder / "index",
        settings=SpoolSettings(),
        node="g1",
        journal=Journal(JournalSettings()),
        patience=1,
        interval=1,
    )


@asynccontextmanager
async def waiting(folder: Path) -> AsyncIterator[ReplicatedQueue]:
    """Run the index of a node, in which one message of partition 0 waits in the memory of the relay."""
    queue = make_queue(folder)
    await queue.start()
    message = make_message(b"text\r\n")
    place = Place(0, 1, 0, 0, 0, 0, 0, False)
    memory = queue._add_accepted(place, b"text\r\n", message, ["example.org"], is_taken=True)

    def withdraw(rows: Collection[int]) -> Sequence[Entry]:
        found = [entry for entry in memory if any(row.number in rows for row in entry.rows)]
        memory.clear()
        return found

    queue.withdraw = withdraw
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(queue._keep_dropping, nursery)
            yield queue
            nursery.cancel_scope.cancel()
    finally:
        await queue.aclose()


def failing_once(act: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that fails as on a full disk when it is called for the first time."""
    has_failed = False

    def failing(*args: Any) -> Any:
        nonlocal has_failed
        if not has_failed:
            has_failed = True
            raise sqlite3.OperationalError("database or disk is full")
        return act(*args)

    return failing


@pytest.mark.parametrize("step", ["attempting", "drop_partition", "count"])
async def test_a_partition_is_released_once_the_disk_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr("penstock.cluster.queue._DROP_AGAIN", 0)
    async with waiting(tmp_path) as queue:
        monkeypatch.setattr(queue._index, step, failing_once(getattr(queue._index, step)))
        released: list[int] = []
        done = trio.Event()

        def release(partition: int) -> None:
            released.append(partition)
            done.set()

        queue.released = release
        queue.leave(0)
        with trio.fail_after(30):
            await done.wait()
        assert released == [0]
        assert await queue._committer.do(lambda _: queue._index.count(0)) == 0
        assert queue._gone == {}
        assert b"database or disk is full" in queue._journal.drain()


async def test_a_partition_that_is_gained_again_while_it_is_given_up_is_not_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[int] = []
    counts = [1]

    def count(_: int) -> int:
        """Count an attempt that ends after the partition has come back."""
        if not counts:
            return 0
        trio.from_thread.run_sync(queue.lose, 0, trio_token=token)
        trio.from_thread.run_sync(queue.gain, 0, trio_token=token)
        return counts.pop()

    token = trio.lowlevel.current_trio_token()
    queue = make_queue(tmp_path)
    await queue.start()
    try:
        monkeypatch.setattr(queue._index, "count", count)
        queue.released = released.append
        with trio.fail_after(PATIENCE):
            await queue._leave(0)
        assert (released, list(queue._owned)) == ([], [0])
    finally:
        await queue.aclose()


def files_of(queue: ReplicatedQueue) -> list[Path]:
    return [path for path in queue._store.files._folder.rglob("*") if path.is_file()]


class FullDisk(io.RawIOBase):
    """A file that is made, and that nothing can be written into."""

    def __init__(self, path: Path) -> None:
        path.touch()

    def writable(self) -> bool:
        return True

    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("sizes", [[100], [100, 40_000]])
async def test_a_message_that_does_not_fit_on_the_disk_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    async with waiting(tmp_path) as queue:

        async def last(_stream: str, subject: str) -> Stored:
            return Stored(subject, 1, b"", b"x" * sizes[int(subject[-1])])

        monkeypatch.setattr(queue._jetstream, "last", last)
        monkeypatch.setattr(
            "penstock.cluster.queue.open",
            lambda path, *_, **__: io.BufferedWriter(FullDisk(path)),
            raising=False,
        )
        message = make_message(b"")
        rows = (Row(5 << 20, 1, False, "example.org"),)
        entry = Entry(5, MessageId("ID"), "example.org", message.envelope, rows, b"", message.body, 0.0)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                await queue._collect(entry, Place(0, 1, len(sizes), 0, 0, 0, 0, False))
        assert files_of(queue) == []


async def test_files_of_large_messages_are_removed_with_their_partition(tmp_path: Path) -> None:
    async with waiting(tmp_path) as queue:
        place = Place(0, 2, 1, 0, 0, 0, 0, False)
        queue._add_accepted(place, b"", make_message(b""), ["example.org"], is_taken=False)
        number = await queue._committer.do(lambda _: queue._index._number(place))
        assert number is not None
        path = queue._store.files.path(number)
        path.write_bytes(b"text")  # an attempt has failed
        await queue._drop(0)
        await queue._threads.aclose()
        assert files_of(queue) == []


async def test_a_mute_cluster_is_not_asked_for_each_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with waiting(tmp_path) as queue:
        asked: list[int] = []

        async def direct(_stream: str, sequences: Sequence[int]) -> list[NatsError]:
            asked.extend(sequences)
            return [RequestTimeoutError("late")] * len(sequences)

        monkeypatch.setattr(queue._jetstream, "direct", direct)
        queue.gain(0)
        for number in range(2, 12):
            queue._add_accepted(Place(0, number, *PLACE), b"", make_message(b""), ["other.example"], is_taken=False)
        assert await queue.take("other.example", queue.now() + 1, 100, 1000) == []
        assert sorted(asked) == sorted([*range(2, 12), asked[10]])
        assert (await queue.take("other.example", queue.now() + 60, 100, 1000)) == [], "they are due again"
        assert len(asked) == 22


async def test_a_scan_whose_marker_was_deleted_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async def scan(*_: object, **__: object) -> AsyncIterator[list[Stored]]:
        while True:
            await trio.sleep(2)
            yield []

    queue = make_queue(tmp_path)
    monkeypatch.setattr(queue._jetstream, "scan", scan)
    with pytest.raises(NatsError, match="is not found"):
        async for _ in queue._read(0, [], 1, 5):
            pass


async def test_a_scan_ends_at_a_message_beyond_its_deleted_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scan(*_: object, **__: object) -> AsyncIterator[list[Stored]]:
        for sequence in itertools.count(1, 2):
            assert sequence < 10, "the scan goes on"
            await trio.lowlevel.checkpoint()
            yield [Stored("x.m.0.ID", sequence, b"", b"")]

    queue = make_queue(tmp_path)
    monkeypatch.setattr(queue._jetstream, "scan", scan)
    found = [stored.sequence async for batch in queue._read(0, [], 1, 6) for stored in batch]
    assert found == [1, 3, 5, 7]


async def test_a_monitor_that_does_not_end_its_response_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()

    def read(_: str) -> ServerState:
        end.wait()
        raise OSError("closed")

    monkeypatch.setattr("penstock.cluster.durability.read_monitor", read)
    monkeypatch.setattr("penstock.cluster.durability._LONGEST", 0.01)
    durability = Durability(["http://127.0.0.1:1"])
    try:
        for _ in range(2):  # the thread of the first look is the only one
            await durability.look()
            assert "no response within" in durability.problem
        assert durability._limiter.borrowed_tokens == 1
    finally:
        end.set()


@pytest.mark.parametrize("step", ["forget_rows", "hold", "record"])
async def test_what_was_taken_is_given_back_once_the_disk_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr("penstock.cluster.queue._DROP_AGAIN", 0)
    async with waiting(tmp_path) as queue:

        async def text(*_: object) -> None:
            raise DamagedError("damaged") if step == "hold" else RequestTimeoutError("late")

        monkeypatch.setattr(queue, "_text", text)
        monkeypatch.setattr(queue._index, step, failing_once(getattr(queue._index, step)))
        if step != "forget_rows":  # otherwise another node relays it
            queue.gain(0)
        queue._add_accepted(Place(0, 2, *PLACE), b"", make_message(b""), ["other.example"], is_taken=False)
        assert await queue.take("other.example", queue.now() + 1, 100, 1000) == []
        number = await queue._committer.do(lambda _: queue._index._number(Place(0, 2, *PLACE)))
        rows = [] if number is None else [number << 20]
        assert await queue._committer.do(lambda _: queue._index.idle(rows)) == rows, "it is not being attempted"
        assert len(rows) == (step != "forget_rows")


async def test_moved_messages_leave_the_spool_once_the_disk_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.cluster.forwarder._RETRY", 0)
    spool = Spool(SpoolSettings(), tmp_path)
    await spool.start()
    try:
        for _ in range(3):
            await spool.put(make_message(b"text"), ["cluster-0"])
        record, moved, journal = spool.record, Moved(), Journal(JournalSettings())
        failures = 0

        async def fail(records: Sequence[AttemptRecord]) -> None:
            nonlocal failures
            failures += 1
            if failures > 10:
                await record(records)
            else:
                raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(spool, "record", fail)
        forwarder = Forwarder(spool, moved, journal)
        assert await forwarder._forward_some()
        assert (await spool.count(), len(moved.ids)) == (0, 3)
        assert journal.drain().count(b"database or disk is full") == 1
    finally:
        await spool.aclose()


class Moved:
    """Takes what is forwarded."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    async def forward(self, message: Message, queue: str) -> None:
        self.ids.append(message.id)
