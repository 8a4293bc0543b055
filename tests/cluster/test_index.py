"""The index gets what was accepted in few transactions, and reads back little of it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from bench.nats_servers import NatsServers

from penstock.cluster.index import IndexCommitter, IndexStore, Loaded, pack, unpack
from penstock.cluster.jetstream import Stored
from penstock.cluster.layout import Place, RecipientState
from penstock.cluster.queue import ReplicatedQueue
from penstock.message import CountedBody
from penstock.spool.entry import DUE, HELD, Put
from tests.cluster.nodes import PATIENCE, NextHop, gateway, made, next_hop, node_of, owns, send, until
from tests.contracts.delivery import make_message


def _put(number: int, size: int | None = 10, recipients: tuple[str, ...] = ("b@example.org",)) -> Put:
    place = Place(0, number, 0, 0, 0, 0, 0, False)
    message = make_message(b"", recipients=recipients)
    message = message._replace(prefix=pack(place), body=CountedBody(size))  # type: ignore[arg-type]
    return Put(number, message, b"", ["example.org"] * len(recipients))


@asynccontextmanager
async def _opened(folder: Path, failed: list[int]) -> AsyncIterator[tuple[IndexStore, IndexCommitter]]:
    def fail(puts: Sequence[Put], _: Exception) -> None:
        failed.extend(put.number for put in puts)

    store = IndexStore(folder / "index")
    store.open()
    committer = IndexCommitter(store, time.time, lambda exc: None, on_failure=fail)
    try:
        yield store, committer
    finally:
        await committer.aclose()
        store.close()


async def test_accepted_messages_are_written_together_before_the_index_is_used(tmp_path: Path) -> None:
    async with _opened(tmp_path, []) as (store, committer):
        for number in range(1, 41):
            committer.add(_put(number))
        assert await committer.do(lambda _: store.count(0)) == 40
        assert committer.transactions <= 2


async def test_accepted_messages_are_written_when_nothing_uses_the_index(tmp_path: Path) -> None:
    async with _opened(tmp_path, []) as (_, committer), trio.open_nursery() as nursery:
        nursery.start_soon(committer.run)
        for transactions in (1, 2):
            committer.add(_put(transactions))
            await until(lambda wanted=transactions: committer.transactions == wanted)  # type: ignore[misc]
        nursery.cancel_scope.cancel()


async def test_messages_that_cannot_be_written_are_reported(tmp_path: Path) -> None:
    failed: list[int] = []
    async with _opened(tmp_path, failed) as (store, committer):
        committer.add(_put(1))
        committer.add(_put(2, size=None))
        assert await committer.do(lambda _: store.count(0)) == 0
    assert failed == [1, 2]


def test_what_another_node_has_put_off_for_too_long_follows_the_schedule(tmp_path: Path) -> None:
    """Its clock may have been ahead."""
    now, day = 1e9, 86_400.0
    states = [
        RecipientState(0, DUE, now + 30 * day, 1, False, ""),
        RecipientState(1, DUE, now + 30 * day, 7, False, ""),
        RecipientState(2, DUE, now + 1250, 7, False, ""),
        RecipientState(3, HELD, now + 30 * day, 1, False, ""),
    ]
    recipients = tuple(f"{state.place}@example.org" for state in states)
    store = IndexStore(tmp_path / "index")
    store.open()
    try:
        with store.transaction():
            assert store.reschedule(now, (600.0, 1200.0), 1300.0) == 0
            put = _put(1, recipients=recipients)
            store.load([Loaded(put, unpack(put.message.prefix), states)], now)
            found = store._database.execute("SELECT due_at - ? FROM recipient ORDER BY number", (now,)).fetchall()
            assert [seconds for (seconds,) in found] == [600, 1200, 1250, 30 * day]
            assert store.next_due() == now + 600
    finally:
        store.close()


async def test_what_this_node_has_accepted_is_not_read_from_the_stream(
    servers: NatsServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ReplicatedQueue._read
    scans: list[int] = []

    def note(
        queue: ReplicatedQueue, stream: int, subjects: Iterable[str], start: int, end: int
    ) -> AsyncGenerator[list[Stored], None]:
        scans.append(start)
        return read(queue, stream, subjects, start, end)

    monkeypatch.setattr(ReplicatedQueue, "_read", note)
    monkeypatch.setattr("penstock.cluster.writer._ANSWER", PATIENCE)  # nothing is published again
    hop = NextHop(waits=trio.Event())
    async with (
        made(servers, tmp_path, partitions=2, lease=600, patience=2 * PATIENCE) as (_, settings),
        next_hop(tmp_path, hop) as url,
        gateway(tmp_path, settings, url, "g1") as server,
    ):
        await owns(server, 2)
        queue = node_of(server).queue
        for text in "abc":
            assert (await send(server, text)).startswith("250 2.0.0 Ok: replicated as ")
        assert await queue._follow() == 0
        assert set(scans) == {1}, "partitions are loaded, and nothing else is read"
        assert hop.waits is not None
        hop.waits.set()
        await hop.until(lambda: hop.seen.total() == 3)
