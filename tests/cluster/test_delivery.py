"""The delivery into the cluster keeps the contract of all deliveries; its writes are idempotent."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio
from bench.nats_servers import NatsServers

from penstock.app import Server
from penstock.cluster.layout import Layout, LayoutError, read_message, read_state, state_record
from penstock.cluster.layout import RecipientState as State
from penstock.cluster.setup import make_layout
from penstock.cluster.writer import Writer
from penstock.delivery.base import ChecksCapacity
from penstock.reply import Reply
from penstock.spool.entry import DUE, AttemptRecord, ClockJump, Outcome
from tests.cluster.nodes import NextHop, gateway, made, next_hop, node_of, owns, rows
from tests.contracts.delivery import check_delivery, make_message


async def test_it_keeps_the_contract(servers: NatsServers, tmp_path: Path) -> None:
    async with (
        made(servers, tmp_path) as (_, settings),
        next_hop(tmp_path, NextHop()) as url,
        gateway(tmp_path, settings, url, "g1") as server,
    ):
        await owns(server, 4)
        assert isinstance(server.delivery, ChecksCapacity)
        await check_delivery(server.delivery)


@pytest.mark.parametrize("count", [1, 400])
async def test_a_message_is_read_as_it_was_written(servers: NatsServers, tmp_path: Path, count: int) -> None:
    """With one recipient its envelope is in the headers, with many it is in the payload."""
    message = make_message(b"text\r\n", recipients=tuple(f"{n:0120}@example.org" for n in range(count)))
    async with made(servers, tmp_path) as (jetstream, settings), next_hop(tmp_path, hop := NextHop()) as url:
        layout = Layout(settings.name, streams=1, partitions=4)
        written = await Writer(jetstream, layout).write(message, 2, patience=10)
        assert written.place is not None
        stored = await jetstream.last(layout.stream(0), layout.message(2, message.id))
        assert stored is not None
        found = read_message(stored.subject, stored.sequence, stored.headers)
        assert found is not None
        assert found.envelope == (message.envelope if count == 1 else None)
        assert (found.id, found.size, found.place) == (
            message.id,
            6,
            written.place._replace(is_uncertain=True),
        )
        async with gateway(tmp_path, settings, url, "g1"):
            await hop.until(lambda: len(hop.seen) == count)


async def test_a_message_is_in_the_stream_once_however_often_it_is_written(
    servers: NatsServers, tmp_path: Path
) -> None:
    message = make_message(b"text\r\n")
    large = make_message(b"x" * 1_500_000)
    async with made(servers, tmp_path) as (jetstream, settings):
        layout = Layout(settings.name, streams=1, partitions=4)
        writer = Writer(jetstream, layout)
        for each in (message, large):
            first = await writer.write(each, 0, patience=10)
            second = await writer.write(each, 0, patience=10)
            assert first.place is not None
            assert second.place == first.place._replace(is_uncertain=True)
        assert len(await jetstream.subjects(layout.stream(0), layout.message(0, "*"))) == 2
        assert len(await jetstream.subjects(layout.stream(0), layout.piece(0, large.id, "*"))) == 3
        assert first.place is not None
        # What was relayed meanwhile is not put there again.
        assert second.place is not None
        await jetstream.delete(layout.stream(0), second.place.sequence)
        assert (await writer.write(large, 0, patience=10)).place is None


async def test_more_streams_have_their_partitions(servers: NatsServers, tmp_path: Path) -> None:
    async with (
        made(servers, tmp_path, streams=2) as (_, settings),
        next_hop(tmp_path, hop := NextHop()) as url,
        gateway(tmp_path, settings, url, "g1") as server,
    ):
        await owns(server, 4)
        queue = node_of(server).queue
        assert {queue.choose() for _ in range(8)} == {0, 1, 2, 3}
        await check_delivery(server.delivery)
        await hop.until(lambda: hop.begun == 3)


def test_states_are_read_as_they_were_written() -> None:
    states = [State(0, 0, 12.5, 3, True, '450 "busy" ä'), State(7, 2, 0.0, 0, False, "")]
    data, headers = state_record(states, 5)
    assert (data, read_state(headers)) == (b"", states)


def test_the_state_of_many_recipients_is_in_the_payload_and_fits() -> None:
    states = [State(place, 0, 12.5, 3, True, f"450 <{place * 12345}@example.org> busy") for place in range(3000)]
    data, headers = state_record(states, 5)
    assert len(headers) < 100
    assert read_state(headers, data) == states
    data, headers = state_record(states, 5, most=len(data) - 1)
    shorter = read_state(headers, data)
    assert [each._replace(last_reply="") for each in states] == [each._replace(last_reply="") for each in shorter]
    for wrong in (b"", data[:-9], b"x" + data):
        with pytest.raises(LayoutError):
            read_state(headers, wrong)


async def test_what_has_become_of_many_recipients_is_known_to_the_next_owner(
    servers: NatsServers, tmp_path: Path
) -> None:
    addresses = tuple(f"{n:0120}@example.org" for n in range(400))
    busy = {address: Reply(450, "4.2.1", f"Mailbox {address} is busy") for address in addresses[1:]}
    async with (
        made(servers, tmp_path) as (jetstream, settings),
        next_hop(tmp_path, hop := NextHop(replies=busy)) as url,
    ):
        message = make_message(b"", recipients=addresses)._replace(received_at=time.time())
        await Writer(jetstream, make_layout(settings)).write(message, 2, patience=10)
        async with gateway(tmp_path, settings, url, "g1") as server:
            while {row[1:3] for row in await rows(server)} != {(DUE, 1)} or len(await rows(server)) != 399:
                await trio.lowlevel.checkpoint()
            before = await rows(server)
        async with gateway(tmp_path, settings, url, "g2") as server:
            await owns(server, 4)
            assert await rows(server) == before
        assert hop.begun == 1


@pytest.mark.parametrize("count", [1, 400], ids=["short state", "long state"])
async def test_a_corrected_time_of_receipt_is_known_to_the_next_owner(
    servers: NatsServers, tmp_path: Path, count: int
) -> None:
    """The clock was set forward by an hour after the message was received, and before it was tried again."""
    addresses = tuple(f"{n:0120}@example.org" for n in range(count))
    busy = {address: Reply(450, "4.2.1", "Mailbox busy") for address in addresses}
    received_at = float(int(time.time())) - 3600
    async with (
        made(servers, tmp_path) as (jetstream, settings),
        next_hop(tmp_path, NextHop(replies=busy)) as url,
    ):
        message = make_message(b"", recipients=addresses)._replace(received_at=received_at)
        await Writer(jetstream, make_layout(settings)).write(message, 2, patience=10)
        async with gateway(tmp_path, settings, url, "g1") as server:
            while {row[1:3] for row in await rows(server)} != {(DUE, 1)}:
                await trio.lowlevel.checkpoint()
            assert await received(server) == [received_at]
            queue = node_of(server).queue
            jump = ClockJump(3600, received_at + 3600, queue.newest)
            assert await queue.shift_received(jump, 0) > 0
            numbers = await queue._committer.do(
                lambda store: [row for (row,) in store._database.execute("SELECT number FROM recipient")]
            )
            await queue.record([AttemptRecord(row, "example.org", Outcome.DEFERRED, "busy", 5e9) for row in numbers])
        async with gateway(tmp_path, settings, url, "g2") as server:
            await owns(server, 4)
            assert await received(server) == [received_at + 3600]


async def received(server: Server) -> list[float]:
    """Return when the messages in the index were received."""
    return await node_of(server).queue._committer.do(
        lambda store: [when for (when,) in store._database.execute("SELECT received_at FROM message")]
    )


@pytest.mark.parametrize(("count", "size"), [(500, 900_000), (2100, 10)], ids=["with the body", "alone"])
async def test_an_envelope_that_exceeds_the_payload_is_relayed(
    servers: NatsServers, tmp_path: Path, count: int, size: int
) -> None:
    addresses = tuple(f"{n:0230}@example.org" for n in range(count))
    message = make_message(b"\r\ntext\r\n" + b"x\r\n" * (size // 3), recipients=addresses)._replace(
        received_at=time.time()
    )
    async with made(servers, tmp_path) as (jetstream, settings), next_hop(tmp_path, hop := NextHop()) as url:
        layout = make_layout(settings)
        written = await Writer(jetstream, layout).write(message, 2, patience=10)
        assert written.place is not None
        assert written.place.pieces == 1 + size // 512_000
        async with gateway(tmp_path, settings, url, "g1"):
            await hop.until(lambda: len(hop.seen) == count)
        assert {text for _, text in hop.seen} == {"text"}
        assert await jetstream.subjects(layout.stream(0), layout.piece(2, message.id, "*")) == []
