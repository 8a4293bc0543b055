"""What a 250 means while the cluster does not answer, is full, or would not keep its promise."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from bench.nats_servers import NatsServers

from penstock.app import Server
from penstock.cluster.durability import Durability, DurabilityError, ServerState, parse_version, read_monitor
from penstock.cluster.jetstream import JetStream
from penstock.cluster.layout import RecipientState, is_marker, read_state, state_record
from penstock.cluster.settings import JetStreamSettings
from penstock.cluster.setup import make_layout, problems
from penstock.cluster.writer import Writer
from penstock.reply import Reply
from penstock.spool.entry import DUE, HELD, AttemptRecord, Outcome
from tests.cluster.nodes import PATIENCE, NextHop, gateway, made, next_hop, node_of, owns, rows, send, until
from tests.contracts.delivery import make_message


@contextmanager
def halted(servers: NatsServers) -> Iterator[None]:
    """Let no server answer."""
    for number in range(3):
        servers.signal(number, signal.SIGSTOP)
    try:
        yield
    finally:
        for number in range(3):
            servers.signal(number, signal.SIGCONT)
        servers.wait_until_ready()


async def test_mail_is_spooled_and_forwarded_once_when_no_server_answers(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop()
    # A lease that is lost while a delivery is written would have it repeated: this is not what is tested here.
    async with made(servers, tmp_path, patience=0.3, lease=60) as (_, settings), next_hop(tmp_path, hop) as url:
        async with gateway(tmp_path, settings, url, "g1") as server:
            await owns(server, 4)
            with halted(servers):
                # The first ones are in the sockets of the servers, and may be stored later.
                replies = [await send(server, f"{number}") for number in range(5)]
            assert all(reply.startswith("250 2.0.0 Ok: spooled as ") for reply in replies), replies
            await hop.until(lambda: len(hop.seen) == 5)
            await until(lambda: node_of(server).forwarder.forwarded == 5)
            await owns(server, 4)
            count = 5
            while "replicated" not in await send(server, f"{count}"):  # at the latest when the breaker tries again
                count += 1
            await hop.until(lambda: len(hop.seen) == count + 1)
        assert set(hop.seen.values()) == {1}


async def test_a_moved_message_leaves_a_marker_as_it_may_come_again(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop()
    async with (
        made(servers, tmp_path, partitions=1) as (jetstream, settings),
        next_hop(tmp_path, hop) as url,
        gateway(tmp_path, settings, url, "g1") as server,
    ):
        await owns(server, 1)
        message = make_message(b"Subject: test\r\n\r\ntext")._replace(received_at=time.time())
        await node_of(server).queue.forward(message, 0, patience=PATIENCE)
        await hop.until(lambda: hop.seen["b@example.org", "text"] == 1)
        layout = make_layout(settings)
        with trio.fail_after(PATIENCE):
            while not (found := await jetstream.last(layout.stream(0), layout.message(0, message.id))) or not is_marker(
                found.headers
            ):
                pass


async def test_mail_is_refused_without_a_fallback(servers: NatsServers, tmp_path: Path) -> None:
    async with (
        made(servers, tmp_path, patience=0.2, fallback="refuse") as (_, settings),
        gateway(tmp_path, settings, "smtp://127.0.0.1:1", "g1") as server,
    ):
        await owns(server, 4)
        with halted(servers):
            replies = [await send(server, "text") for _ in range(4)]
        assert [reply[:9] for reply in replies] == ["451 4.3.0"] * 4


async def test_a_full_stream_is_452_and_states_still_fit(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop(replies={"busy@example.org": Reply(450, "4.2.1", "Mailbox busy")})
    async with (
        made(servers, tmp_path, max_octets=4 << 20) as (jetstream, settings),
        next_hop(tmp_path, hop) as url,
        gateway(tmp_path, settings, url, "g1") as server,
    ):
        await owns(server, 4)
        subject = f"{settings.name}.b.0.filling."
        headers = b"NATS/1.0\r\n\r\n"
        for number in range(8):
            await jetstream.publish(f"{subject}{number}", os.urandom(450_000), headers)
        assert (await send(server, "large", size=1_200_000)).startswith("452 4.3.1")
        await jetstream.publish(f"{subject}9", os.urandom(200_000), headers)
        await until(lambda: node_of(server).is_full)
        assert (await send(server, "text")).startswith("452 4.3.1")  # at MAIL
        # What is known of mail that is in the stream can still be written.
        name = f"{settings.name}.s.0.SOME"
        await jetstream.publish(name, *state_record([], 0))


async def test_a_stale_owner_cannot_write_over_the_state_of_the_next(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop(replies={"busy@example.org": Reply(450, "4.2.1", "Mailbox busy")})
    async with (
        made(servers, tmp_path, partitions=1, lease=600) as (jetstream, settings),
        next_hop(tmp_path, hop) as url,
        gateway(tmp_path, settings, url, "g1") as server,
        gateway(tmp_path, settings, url, "g2") as other,
    ):
        await until(lambda: node_of(server).queue.owned or node_of(other).queue.owned)
        stale, owner = (server, other) if node_of(server).queue.owned else (other, server)
        await send(stale, "one", to=("busy@example.org", "c@example.org"))
        await until(lambda: hop.asked == 2)
        await only_row(stale)
        node_of(owner).queue.gain(0)  # the lease of the first has expired, and it does not know
        await owns(owner, 1)
        await node_of(owner).queue.carry_out("hold", [], [await only_row(owner)])
        (before,) = await states(jetstream, settings)
        assert before[0].state == HELD

        # It is suspended within an attempt, and learns of the loss before the attempt ends.
        node_of(stale).queue._owned.clear()
        row = await only_row(stale)
        await node_of(stale).queue.record([AttemptRecord(row, "example.org", Outcome.DEFERRED, "late", 5.0)])
        assert await states(jetstream, settings) == [before]
        assert await rows(stale) == []

        # An owner whose own write was not the last adds what it knows to it.
        await jetstream.publish(
            f"{settings.name}.s.0.{await only_id(jetstream, settings)}",
            *state_record([before[0]._replace(last_reply="another")], await last_state(jetstream, settings)),
        )
        await node_of(owner).queue.carry_out("retry", [], [await only_row(owner)])
        (after,) = await states(jetstream, settings)
        assert [each.state for each in after] == [DUE]


async def only_row(server: Server) -> int:
    """Return the number of the only recipient that is left, once it is the only one."""

    def read(store: Any) -> list[int]:
        return [number for (number,) in store._database.execute("SELECT number FROM recipient")]

    while len(found := await node_of(server).queue._committer.do(read)) != 1:
        pass
    return found[0]


async def only_id(jetstream: JetStream, settings: JetStreamSettings) -> str:
    (subject,) = await jetstream.subjects(f"{settings.name}-MAIL-0", f"{settings.name}.m.>")
    return subject.rpartition(".")[2]


async def last_state(jetstream: JetStream, settings: JetStreamSettings) -> int:
    found = await jetstream.last(f"{settings.name}-MAIL-0", f"{settings.name}.s.>")
    assert found is not None
    return found.sequence


async def states(jetstream: JetStream, settings: JetStreamSettings) -> list[list[RecipientState]]:
    """Return the states in the stream."""
    stream = f"{settings.name}-MAIL-0"
    found = await jetstream.last_of_all(stream, f"{settings.name}.s.>")
    return [read_state(each.headers, each.data) for each in found.values()]


async def test_a_damaged_message_is_reported_and_not_relayed(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop()
    async with made(servers, tmp_path) as (jetstream, settings), next_hop(tmp_path, hop) as url:
        headers = (
            b'NATS/1.0\r\nP-V: 1\r\nP-Env: [["a@example.com","a","example.com"],'
            b'[[["b@example.org","b","example.org"]]]]\r\n'
            b"P-At: 1.0\r\nP-Size: 0 0 4 0\r\nP-CRC: 00000001\r\n\r\n"
        )
        await jetstream.publish(f"{settings.name}.m.0.DAMAGED", b"text", headers)
        async with gateway(tmp_path, settings, url, "g1") as server:
            await until(lambda: node_of(server).queue.damaged == 1)
            while not (found := await rows(server)) or found[0][1] != 2:
                await trio.lowlevel.checkpoint()
        assert hop.begun == 0


def flip(folder: Path, stream: str, text: bytes) -> int:
    """Flip a bit of a text in the stored blocks of a stream of a server. Return how many there were."""
    count = 0
    for block in folder.glob(f"js/jetstream/*/streams/{stream}/msgs/*.blk"):
        at = block.read_bytes().find(text)
        if at >= 0:
            with block.open("r+b") as file:
                file.seek(at)
                file.write(bytes([text[0] ^ 1]))
            count += 1
    return count


async def restart(servers: NatsServers, number: int) -> None:
    """Restart a server, so that it has no block in memory."""
    servers.kill(number, signal.SIGTERM)
    servers.start(number)
    await trio.to_thread.run_sync(servers.wait_until_ready)


async def test_a_flipped_byte_in_a_stored_block_is_reported_and_not_relayed(tmp_path: Path) -> None:
    hop = NextHop()
    with NatsServers.running(tmp_path / "nats", count=1) as servers:
        async with made(servers, tmp_path, replicas=1) as (jetstream, settings), next_hop(tmp_path, hop) as url:
            writer = Writer(jetstream, make_layout(settings))
            for text in (b"\r\nbefore", b"\r\nFLIPPED", b"\r\nafter"):
                await writer.write(make_message(b"Subject: test\r\n" + text), 0, patience=10)
            await restart(servers, 0)
            assert flip(servers.folder / "n1", f"{settings.name}-MAIL-0", b"FLIPPED") == 1
            async with gateway(tmp_path, settings, url, "g1") as server:
                await hop.until(lambda: len(hop.seen) == 2)
                assert node_of(server).queue.damaged == 1
            assert {text for _, text in hop.seen} == {"before", "after"}


async def test_a_copy_that_cannot_be_read_is_replaced_by_another(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop()
    async with made(servers, tmp_path) as (jetstream, settings), next_hop(tmp_path, hop) as url:
        writer = Writer(jetstream, make_layout(settings))
        await writer.write(make_message(b"Subject: test\r\n\r\nFLIPPED"), 0, patience=10)
        stream = f"{settings.name}-MAIL-0"
        follower = (await trio.to_thread.run_sync(servers.leader, stream) + 1) % 3
        await restart(servers, follower)
        await until(lambda: flip(servers.folder / f"n{follower + 1}", stream, b"FLIPPED"))
        near = msgspec.structs.replace(settings, servers=(servers.urls[follower],))
        async with gateway(tmp_path, near, url, "g1") as server:
            await hop.until(lambda: hop.seen["b@example.org", "FLIPPED"] == 1)
            assert node_of(server).queue.damaged == 0


# ---- the servers


async def test_servers_that_do_not_sync_or_are_too_old_get_no_mail(servers: NatsServers, tmp_path: Path) -> None:
    with NatsServers.running(tmp_path / "lazy", count=1, sync='"2m"') as lazy:
        with pytest.raises(DurabilityError, match="sync_interval: always"):
            await Durability(lazy.monitors).look()
        durability = Durability([*servers.monitors[:1], *lazy.monitors])
        with pytest.raises(DurabilityError):
            await durability.look()
        assert durability.problem
        async with made(servers, tmp_path) as (jetstream, settings):
            with trio.fail_after(PATIENCE):
                while await problems(jetstream, settings):  # a replica may be behind for a moment
                    pass
            found = await problems(jetstream, msgspec.structs.replace(settings, monitors=lazy.monitors))
            assert len(found) == 1
            assert "sync_interval: always" in found[0]
            (old,) = [ServerState("n1", "2.14.9", read_monitor(servers.monitors[0]).jetstream)]
            assert old.problem == "n1 has version 2.14.9, expected 2.15.1 or newer"


@pytest.mark.parametrize(
    "response",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{",
        b"HTTP/1.1 200 OK\r\n\r\n" + b'{"x":' * 100_000,
    ],
    ids=["another protocol", "a long line", "half a body", "nested JSON"],
)
async def test_a_port_that_is_no_monitoring_port_is_reported(monkeypatch: pytest.MonkeyPatch, response: bytes) -> None:
    monkeypatch.setattr("penstock.cluster.durability._TIMEOUT", PATIENCE)
    monkeypatch.setattr("penstock.cluster.durability._LONGEST", PATIENCE)

    async def respond(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                request += await stream.receive_some()
            await stream.send_all(response)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, respond, [listener])
        url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        durability = Durability([url])
        await durability.look()
        assert f"{url}: not a monitoring port" in durability.problem
        nursery.cancel_scope.cancel()


def test_versions_are_compared_as_numbers() -> None:
    assert parse_version("2.15.1-RC.2") == (2, 15, 1)
    assert parse_version("2.9.10") < parse_version("2.15.1")
    assert parse_version("devel") == ()


async def test_unknown_servers_get_no_mail(servers: NatsServers) -> None:
    durability = Durability([servers.monitors[0], "http://127.0.0.1:1", "http://127.0.0.1:2"])
    await durability.look()
    assert "not known whether a majority" in durability.problem
    durability = Durability([*servers.monitors[:2], "http://127.0.0.1:1"])
    await durability.look()
    assert durability.problem == ""
