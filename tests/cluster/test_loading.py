"""How partitions are loaded when something cannot be read, or changes meanwhile."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from bench.nats_servers import NatsServers

from penstock.cluster.jetstream import JetStream, Stored
from penstock.cluster.layout import (
    LayoutError,
    RecipientState,
    StoredMessage,
    read_message,
    read_state,
    state_record,
)
from penstock.cluster.leases import LeaseKeeper, NodeState
from penstock.cluster.queue import ReplicatedQueue, _Contents
from penstock.cluster.setup import make_layout
from penstock.cluster.writer import Writer, Written
from penstock.message import Message
from penstock.spool.entry import DUE, HELD
from tests.cluster.nodes import NextHop, gateway, made, next_hop, node_of, owns, rows, send, until
from tests.contracts.delivery import make_message


async def test_a_partition_that_is_lost_while_it_is_loaded_is_loaded_again(
    servers: NatsServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.cluster.queue._SLICE", 1)
    add = ReplicatedQueue._add
    count = 0

    async def add_and_lose(queue: ReplicatedQueue, *args: Any, **more: Any) -> None:
        nonlocal count
        await add(queue, *args, **more)
        count += 1
        if count == 2:
            queue.lose(0)
            queue.gain(0)
            await until(lambda: not queue._dropping)  # what was loaded is removed again

    monkeypatch.setattr(ReplicatedQueue, "_add", add_and_lose)
    async with made(servers, tmp_path, partitions=1, lease=60) as (jetstream, settings):
        writer = Writer(jetstream, make_layout(settings))
        for number in range(4):
            message = make_message(b"text\r\n", recipients=(f"{number}@example.org",))
            await writer.write(message._replace(received_at=time.time()), 0, patience=10)
        async with gateway(tmp_path, settings, "smtp://127.0.0.1:1", "g1") as server:
            await owns(server, 1)
            assert [address for address, *_ in await rows(server)] == [f"{number}@example.org" for number in range(4)]


async def test_an_unreadable_envelope_does_not_keep_its_partition_from_loading(
    servers: NatsServers, tmp_path: Path
) -> None:
    async with made(servers, tmp_path) as (jetstream, settings), next_hop(tmp_path, hop := NextHop()) as url:
        headers = b"NATS/1.0\r\nP-V: 1\r\nP-Env: \r\nP-At: 1.0\r\nP-Size: 4 0 0 0\r\nP-CRC: 00000001\r\n\r\n"
        layout = make_layout(settings)
        await jetstream.publish(layout.message(0, "BAD"), b"text", headers)
        writer = Writer(jetstream, layout)
        await writer.write(make_message(b"Subject: test\r\n\r\ngood"), 0, patience=10)
        async with gateway(tmp_path, settings, url, "g1") as server:
            await hop.until(lambda: hop.seen["b@example.org", "good"])
            assert node_of(server).queue.damaged == 1
        assert await jetstream.subjects(layout.stream(0), layout.message(0, "BAD")), "it stays"


GOOD = {"at": b"1.0", "size": b"4 0 0 0"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"at": b"nan"},
        {"at": b"-1"},
        {"at": b"1e300"},
        {"size": b"4 99999999999 0 0"},
        {"size": b"4 0 99999999999999999999 0"},
        {"size": b"4 0 0 99999999999"},
    ],
    ids=str,
)
def test_numbers_that_the_index_cannot_have_are_refused(wrong: dict[str, bytes]) -> None:
    text = b"\r\nP-V: 1\r\nP-Env: \r\nP-At: %(at)b\r\nP-Size: %(size)b\r\nP-CRC: 00000001\r\n"
    values = {key.encode(): value for key, value in {**GOOD, **wrong}.items()}
    good = {key.encode(): value for key, value in GOOD.items()}
    assert read_message("x.m.0.ID", 1, b"NATS/1.0" + text % good) is not None
    with pytest.raises(LayoutError):
        read_message("x.m.0.ID", 1, b"NATS/1.0" + text % values)


@pytest.mark.parametrize(
    "wrong", [{"place": -1}, {"place": 1 << 20}, {"state": 1}, {"attempts": 1 << 40}, {"due_at": 1e300}], ids=str
)
def test_states_that_the_index_cannot_have_are_refused(wrong: dict[str, Any]) -> None:
    good = RecipientState(0, DUE, 0.0, 1, False, "")
    assert read_state(state_record([good], 0)[1]) == [good]
    with pytest.raises(LayoutError):
        read_state(state_record([good._replace(**wrong)], 0)[1])


async def test_what_moves_between_two_pages_of_a_list_is_found(
    servers: NatsServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = JetStream.subjects
    monkeypatch.setattr("penstock.cluster.queue.PAGE", 2)

    async def all_but_one(jetstream: JetStream, stream: str, subject: str) -> list[str]:
        """Return a list of two pages, whose first one has become shorter before the second was asked for."""
        return (await subjects(jetstream, stream, subject))[1:]

    async with made(servers, tmp_path, partitions=1) as (jetstream, settings):
        writer = Writer(jetstream, make_layout(settings))
        for number in range(3):
            message = make_message(b"text\r\n", recipients=(f"{number}@example.org",))
            await writer.write(message._replace(received_at=time.time()), 0, patience=10)
        with monkeypatch.context() as listing:
            listing.setattr(ReplicatedQueue, "_find_missing", _note_ids)
            listing.setattr(JetStream, "subjects", all_but_one)
            async with gateway(tmp_path, settings, "smtp://127.0.0.1:1", "g1") as server:
                await owns(server, 1)
                assert len(await rows(server)) == 3


async def _note_ids(_queue: ReplicatedQueue, _stream: int, contents: _Contents, *_: object) -> None:
    contents.note_ids()


async def test_mail_is_accepted_when_only_the_index_fails(
    servers: NatsServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        made(servers, tmp_path, partitions=1) as (_, settings),
        next_hop(tmp_path, hop := NextHop()) as url,
        gateway(tmp_path, settings, url, "g1") as server,
    ):
        await owns(server, 1)
        queue = node_of(server).queue
        write = Writer.write

        async def write_twice(writer: Writer, message: Message, partition: int, *, patience: float) -> Written:
            """Write a message whose first acknowledgment is lost."""
            await write(writer, message, partition, patience=patience)
            return await write(writer, message, partition, patience=patience)

        async def fail(*_: object, **_more: object) -> None:
            monkeypatch.undo()
            raise OSError("disk full")

        monkeypatch.setattr(Writer, "write", write_twice)
        monkeypatch.setattr(queue, "_add", fail)
        assert (await send(server, "text")).startswith("250 2.0.0 Ok: replicated as ")
        await hop.until(lambda: hop.seen["b@example.org", "text"])


async def test_a_found_message_is_relayed_while_others_are_looked_up(
    servers: NatsServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hop = NextHop()
    last = JetStream.last
    looked_up: set[str] = set()

    written = trio.Event()
    follow = ReplicatedQueue._follow

    async def follow_late(queue: ReplicatedQueue) -> int:
        await written.wait()  # one look finds both
        return await follow(queue)

    monkeypatch.setattr(ReplicatedQueue, "_follow", follow_late)

    async def last_slowly(jetstream: JetStream, stream: str, subject: str, **more: Any) -> Stored | None:
        """Answer for the second message of a look once the first one is finished."""
        if ".m." in subject:
            looked_up.add(subject)
            if len(looked_up) == 2:
                await hop.until(lambda: hop.seen)
        return await last(jetstream, stream, subject, **more)

    async with (
        made(servers, tmp_path, partitions=1, lease=600) as (jetstream, settings),
        next_hop(tmp_path, hop) as url,
        gateway(tmp_path, settings, url, "g1") as server,
    ):
        await owns(server, 1)
        monkeypatch.setattr(JetStream, "last", last_slowly)
        writer = Writer(jetstream, make_layout(settings))
        for text in (b"one", b"two"):
            message = make_message(b"Subject: test\r\n\r\n" + text)
            await writer.write(message._replace(received_at=time.time()), 0, patience=10)
        written.set()
        await hop.until(lambda: len(hop.seen) == 2)
        assert set(hop.seen.values()) == {1}


async def test_a_stream_that_begins_again_is_read_from_its_begin(
    servers: NatsServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow = ReplicatedQueue._follow

    async def follow_a_shorter_stream(queue: ReplicatedQueue) -> int:
        queue._seen[0] = 1 << 40
        return await follow(queue)

    monkeypatch.setattr(ReplicatedQueue, "_follow", follow_a_shorter_stream)
    async with (
        made(servers, tmp_path, partitions=1) as (jetstream, settings),
        next_hop(tmp_path, hop := NextHop()) as url,
        gateway(tmp_path, settings, url, "g1") as server,
    ):
        await owns(server, 1)
        writer = Writer(jetstream, make_layout(settings))
        await writer.write(make_message(b"Subject: test\r\n\r\nfound"), 0, patience=10)
        await hop.until(lambda: hop.seen["b@example.org", "found"])


async def test_a_node_with_the_same_name_is_another_owner(servers: NatsServers, tmp_path: Path) -> None:
    async with made(servers, tmp_path, partitions=1, lease=60) as (jetstream, settings):
        layout = make_layout(settings)
        keepers = [LeaseKeeper(jetstream, layout, node="g1", version="1", lease=60) for _ in range(2)]
        for keeper in keepers:
            await keeper._balance()
        first, second = keepers
        assert (first.held, second.held) == ([0], [])
        second._held[0] = first._held[0]  # the lease ended while the first process was suspended
        first._held[0] = copy.copy(first._held[0])
        await second._rewrite([0], "g1")
        await first._rewrite([0], "g1")
        assert (first.held, second.held) == ([], [0])


async def test_leases_are_renewed_while_a_slow_cluster_is_asked_for_more(
    servers: NatsServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with made(servers, tmp_path, partitions=2, lease=6) as (jetstream, settings), trio.open_nursery() as nursery:
        keeper = LeaseKeeper(jetstream, make_layout(settings), node="g1", version="1", lease=6)
        await keeper._balance()
        keeper._held[1].is_leaving = True
        await keeper.release(1)
        before = keeper._held[0].sequence

        async def read_slowly(*_: object) -> dict[str, NodeState]:
            await until(lambda: 0 not in keeper._held or keeper._held[0].sequence > before)
            return {}

        monkeypatch.setattr("penstock.cluster.leases.read_nodes", read_slowly)
        nursery.start_soon(keeper.run)
        await until(lambda: keeper.held == [0, 1])
        nursery.cancel_scope.cancel()


async def test_a_lease_whose_acknowledgment_was_lost_is_taken_again(servers: NatsServers, tmp_path: Path) -> None:
    async with made(servers, tmp_path, partitions=1, lease=60) as (jetstream, settings):
        keeper = LeaseKeeper(jetstream, make_layout(settings), node="g1", version="1", lease=60)
        await keeper._balance()
        keeper._held.clear()
        with trio.fail_after(60):
            while keeper.held != [0]:  # the server that is asked may not have it yet
                await keeper._balance()


@pytest.mark.parametrize("is_shown", [True, False], ids=["another server shows it", "no server shows it"])
async def test_what_the_leader_cannot_read_is_reported_and_stays(
    servers: NatsServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_shown: bool
) -> None:
    hop = NextHop()
    damaged: set[str] = set()
    last = JetStream.last

    async def last_readable(jetstream: JetStream, stream: str, subject: str, **more: Any) -> Stored | None:
        """Return what a leader does with damaged blocks: it lists them, and answers as if there were nothing."""
        return None if subject in damaged else await last(jetstream, stream, subject, **more)

    monkeypatch.setattr(JetStream, "last", last_readable)
    async with made(servers, tmp_path, partitions=1) as (jetstream, settings), next_hop(tmp_path, hop) as url:
        layout = make_layout(settings)
        writer = Writer(jetstream, layout)
        many = make_message(b"text\r\n", recipients=tuple(f"{number}@example.org" for number in range(3000)))
        await writer.write(many, 0, patience=10)  # its envelope is in the payload
        subject = layout.message(0, many.id)
        state = layout.state(0, many.id)
        await jetstream.publish(state, *state_record([RecipientState(0, DUE, 0.0, 1, False, "")], 0))
        damaged.add(subject)
        add = _Contents.add
        if not is_shown:
            monkeypatch.setattr(
                _Contents, "add", lambda self, found: add(self, [each for each in found if each.subject != subject])
            )
        async with gateway(tmp_path, settings, url, "g1") as server:
            await owns(server, 1)
            queue = node_of(server).queue
            assert queue.damaged == 1
            # A message of another node whose copy at the leader is damaged: the other servers can read it.
            message = make_message(b"Subject: test\r\n\r\nfound")
            damaged.add(layout.message(0, message.id))
            await writer.write(message, 0, patience=10)
            await hop.until(lambda: hop.seen["b@example.org", "found"])
            assert queue.damaged == 1
        assert await jetstream.subjects(layout.stream(0), subject)
        assert await jetstream.subjects(layout.stream(0), state), "it is needed when the message can be read again"
        assert hop.begun == 1


@pytest.mark.parametrize("how", ["in a payload", "malformed", "not shown"])
async def test_a_message_whose_state_cannot_be_read_waits_until_it_can(
    servers: NatsServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    hop = NextHop()
    damaged: set[str] = set()
    last, add = JetStream.last, _Contents.add

    async def last_readable(jetstream: JetStream, stream: str, subject: str, **more: Any) -> Stored | None:
        return None if subject in damaged else await last(jetstream, stream, subject, **more)

    def add_readable(contents: _Contents, found: Sequence[Stored]) -> None:
        add(contents, [each for each in found if how == "in a payload" or each.subject not in damaged])

    monkeypatch.setattr("penstock.cluster.queue._READ_AGAIN", 0.01)
    monkeypatch.setattr(JetStream, "last", last_readable)
    monkeypatch.setattr(_Contents, "add", add_readable)
    async with (
        made(servers, tmp_path, partitions=2, lease=60) as (jetstream, settings),
        next_hop(tmp_path, hop) as url,
        gateway(tmp_path, settings, url, "g1") as server,
    ):
        layout, queue = make_layout(settings), node_of(server).queue
        await owns(server, 2)
        queue.lose(0)
        # Another node has relayed a message to all recipients but one, before it was lost.
        writer = Writer(jetstream, layout)
        count = 3000 if how == "in a payload" else 2
        message = make_message(b"Subject: test\r\n\r\nleft", recipients=tuple(f"{n}@example.org" for n in range(count)))
        await writer.write(message._replace(received_at=time.time()), 0, patience=10)
        state = layout.state(0, message.id)
        good = state_record([RecipientState(1, DUE, 0.0, 1, False, "")], 0)
        headers = good[1].replace(b"P-State: [", b"P-State: x[") if how == "malformed" else good[1]
        if how == "in a payload":
            many = [RecipientState(n, HELD, 0.0, 1, False, "x" * 50) for n in range(2, count)]
            good = state_record([RecipientState(1, DUE, 0.0, 1, False, ""), *many], 0)
            headers = good[1]
        sequence = await jetstream.publish(state, good[0], headers)
        if how != "malformed":
            damaged.add(state)
        queue.gain(0)
        await owns(server, 2)
        assert queue.damaged == 1
        other = make_message(b"Subject: test\r\n\r\nother")
        await writer.write(other._replace(received_at=time.time()), 0, patience=10)
        queue._wake.set()
        await hop.until(lambda: hop.seen["b@example.org", "other"])
        assert hop.begun == 1
        assert await jetstream.subjects(layout.stream(0), state), "it is not swept"

        damaged.clear()
        if how == "malformed":
            expected = b"Sequence: %d\r\n" % sequence
            await jetstream.publish(state, good[0], good[1].replace(b"Sequence: 0\r\n", expected))
        await hop.until(lambda: hop.seen["1@example.org", "left"])
        assert hop.begun == 2
        assert sum(hop.seen.values()) == 2


async def test_a_scan_is_followed_however_slowly_messages_come(servers: NatsServers, tmp_path: Path) -> None:
    async with made(servers, tmp_path) as (jetstream, settings):
        layout = make_layout(settings)
        with trio.fail_after(60):
            scan = jetstream.scan(layout.stream(0), [layout.message(0, "*")])
            found: list[Stored] = []
            for number in range(20):  # the server takes fewer requests at a time
                await jetstream.publish(layout.message(0, f"{number}"), b"", b"NATS/1.0\r\n\r\n")
                while len(found) <= number:
                    found += await anext(scan)
            await scan.aclose()
        assert [each.subject for each in found] == [layout.message(0, f"{number}") for number in range(20)]


async def test_partitions_are_read_while_others_are_written(
    servers: NatsServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.cluster.queue._GROUP", 1)
    read, write = ReplicatedQueue._read, ReplicatedQueue._load_messages
    reads = 0

    def count(*args: Any) -> AsyncGenerator[list[Stored], None]:
        nonlocal reads
        reads += 1
        return read(*args)

    async def write_late(queue: ReplicatedQueue, *args: Any) -> set[str]:
        await until(lambda: reads >= 2)
        return await write(queue, *args)

    monkeypatch.setattr(ReplicatedQueue, "_read", count)
    monkeypatch.setattr(ReplicatedQueue, "_load_messages", write_late)
    async with (
        made(servers, tmp_path, partitions=4, lease=60) as (_, settings),
        gateway(tmp_path, settings, "smtp://127.0.0.1:1", "g1") as server,
    ):
        await owns(server, 4)


async def test_headers_are_read_in_the_thread_of_the_index(
    servers: NatsServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def note(subject: str, sequence: int, headers: bytes) -> StoredMessage | None:
        threads.append(threading.current_thread())
        return read_message(subject, sequence, headers)

    monkeypatch.setattr("penstock.cluster.queue.read_message", note)
    async with made(servers, tmp_path, partitions=1, lease=60) as (jetstream, settings):
        message = make_message(b"text\r\n")._replace(received_at=time.time())
        await Writer(jetstream, make_layout(settings)).write(message, 0, patience=10)
        async with gateway(tmp_path, settings, "smtp://127.0.0.1:1", "g1") as server:
            await owns(server, 1)
            assert len(await rows(server)) == 1
    assert threads
    assert threading.current_thread() not in threads
