"""Gateways that share a queue, with real servers and a real next hop."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from bench.nats_servers import NatsServers

from penstock.reply import Reply
from tests.cluster.nodes import NextHop, gateway, made, next_hop, node_of, owns, rows, send, until

BUSY = Reply(450, "4.2.1", "Mailbox busy")


async def test_an_accepted_message_is_replicated_and_relayed(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop()
    async with made(servers, tmp_path) as (jetstream, settings), next_hop(tmp_path, hop) as url:
        async with gateway(tmp_path, settings, url, "g1") as server:
            await owns(server, settings.partitions)
            replies = [
                await send(server, "small"),
                await send(server, "large", size=2_000_000),
                await send(server, "two", to=("b@example.org", "c@example.net")),
            ]
            assert all(reply.startswith("250 2.0.0 Ok: replicated as ") for reply in replies), replies
            await hop.until(lambda: sum(hop.seen.values()) == 4)
        assert set(hop.seen.values()) == {1}
        left = await jetstream.subjects(f"{settings.name}-MAIL-0", f"{settings.name}.>")
        assert left == [f"{settings.name}.o.0.g1"]


async def test_states_and_due_times_survive_a_takeover(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop(replies={"busy@example.org": BUSY})
    async with made(servers, tmp_path) as (jetstream, settings), next_hop(tmp_path, hop) as url:
        state = f"{settings.name}.s.>"
        async with gateway(tmp_path, settings, url, "g1") as first:
            await owns(first, 4)
            await send(first, "one", to=("busy@example.org", "b@example.net"))
            await hop.until(lambda: hop.asked == 2)
            while not await jetstream.subjects(f"{settings.name}-MAIL-0", state):
                pass
            while len(before := await rows(first)) > 1:
                pass
        async with gateway(tmp_path, settings, url, "g2") as second:
            await owns(second, 4)
            assert await rows(second) == before
        assert before[0][:3] == ("busy@example.org", 0, 1)
        assert hop.asked == 2


async def test_partitions_are_shared_and_given_up(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop()
    async with made(servers, tmp_path) as (_, settings), next_hop(tmp_path, hop) as url:
        async with gateway(tmp_path, settings, url, "g1") as first:
            await owns(first, 4)
            async with gateway(tmp_path, settings, url, "g2") as second:
                await owns(second, 2)
                await owns(first, 2)
                for number in range(8):
                    assert "replicated" in await send((first, second)[number % 2], f"{number}")
                await hop.until(lambda: len(hop.seen) == 8)
            await owns(first, 4)  # the other one has given its leases up
        assert set(hop.seen.values()) == {1}


async def test_mail_for_partitions_of_others_is_relayed_by_them(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop()
    async with made(servers, tmp_path, partitions=1) as (jetstream, settings), next_hop(tmp_path, hop) as url:
        async with gateway(tmp_path, settings, url, "g1") as first, gateway(tmp_path, settings, url, "g2") as second:
            await until(lambda: node_of(first).queue.owned or node_of(second).queue.owned)
            idle = second if node_of(first).queue.owned else first
            assert "replicated" in await send(idle, "found")
            await hop.until(lambda: hop.seen["b@example.org", "found"])
        # For an hour it is known that it was relayed.
        (marker,) = await jetstream.subjects(f"{settings.name}-MAIL-0", f"{settings.name}.m.>")
        stored = await jetstream.last(f"{settings.name}-MAIL-0", marker)
        assert stored is not None
        assert b"P-Done" in stored.headers
        assert hop.begun == 1


async def test_a_lost_gateway_is_replaced_within_three_leases(
    servers: NatsServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hop = NextHop(replies={"busy@example.org": BUSY})
    retry = {"relay": {"retry": {"schedule": [1]}}}
    async with made(servers, tmp_path) as (_, settings), next_hop(tmp_path, hop) as url:
        async with gateway(tmp_path, settings, url, "g2") as second:
            async with gateway(tmp_path, settings, url, "g1", **retry) as first:
                await owns(first, 2)
                await owns(second, 2)
                for number in range(4):
                    await send(first, f"{number}", to=("busy@example.org",))
                await hop.until(lambda: hop.asked >= 4)
                # It ends without a word, as when it is killed.
                monkeypatch.setattr(node_of(first).keeper, "release_all", trio.lowlevel.checkpoint)
            hop.replies.clear()
            with trio.fail_after(3 * settings.lease):
                await hop.until(lambda: len(hop.seen) == 4)
        assert set(hop.seen.values()) == {1}
