"""Connections to next hops: what is said, what it comes to, what is kept."""

from __future__ import annotations

import trio

from penstock.relay.hop import Delivered, HopLimits, NextHopUnavailable
from penstock.relay.pool import Pool
from tests.relay.fake import CHUNKING, ORDINARY, PREFIX, STUFFED, TEXT, FakeHop, Text, envelope, send, serving, told


async def test_a_message_is_delivered_and_the_connection_kept(pool: Pool) -> None:
    hop = FakeHop()
    async with serving(hop):
        assert told(await send(pool, hop.hop())) == "delivered 250"
        assert told(await send(pool, hop.hop())) == "delivered 250"
        assert hop.connections == 1
        assert hop.texts == [STUFFED, STUFFED]
        assert hop.verbs() == "EHLO MAIL RCPT DATA MAIL RCPT DATA"
        await pool.aclose()
    assert hop.heard[-1] == "QUIT"


async def test_each_recipient_has_its_own_result(pool: Pool) -> None:
    hop = FakeHop(RCPT=["250 ok", "450 4.2.1 later", "550 5.1.1 no"])
    async with serving(hop):
        results = await send(pool, hop.hop(), "a@x.org", "b@x.org", "c@x.org")
    assert told(results) == "delivered 250, deferred 450, failed 550"
    assert [result.status for result in results] == ["2.0.0", "4.2.1", "5.1.1"]


async def test_with_chunking_a_small_message_leaves_in_one_send(pool: Pool) -> None:
    hop = FakeHop(CHUNKING)
    async with serving(hop):
        assert told(await send(pool, hop.hop())) == "delivered 250"
    assert hop.texts == [PREFIX + TEXT]
    assert hop.verbs() == "EHLO MAIL RCPT BDAT"


async def test_without_pipelining_each_command_waits_for_the_answer_before(pool: Pool) -> None:
    hop = FakeHop(("SIZE",))
    async with serving(hop):
        assert told(await send(pool, hop.hop(), "a@x.org", "b@x.org")) == "delivered 250, delivered 250"
    assert hop.texts == [STUFFED]


async def test_a_body_in_a_file_and_a_large_one_arrive_whole(pool: Pool) -> None:
    large = b"0123456789abcde\r\n" * 60_000
    for offer in (("PIPELINING",), CHUNKING):
        hop = FakeHop(offer)
        async with serving(hop):
            for text in (Text(TEXT, in_memory=False), Text(large), Text(large[:500_000], large[500_000:])):
                assert told(await send(pool, hop.hop(), body=text)) == "delivered 250"
        ends = b"" if offer is CHUNKING else b".\r\n"
        assert hop.texts == [PREFIX + TEXT if offer is CHUNKING else STUFFED, *[PREFIX + large + ends] * 2]


async def test_many_messages_share_a_few_connections(pool: Pool) -> None:
    hop = FakeHop()
    heard: list[Delivered | NextHopUnavailable] = []
    async with serving(hop):
        there = hop.hop(limits=HopLimits(connections=3))
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(send, pool, there)
        all_there = trio.Event()

        def done(outcome: Delivered | NextHopUnavailable) -> None:
            heard.append(outcome)
            if len(heard) == 50:
                all_there.set()

        for _ in range(50):
            pool.deliver_later(there, envelope(), PREFIX, Text(TEXT), len(PREFIX + TEXT), done)
        await all_there.wait()
    assert hop.connections <= 3
    assert hop.texts == [STUFFED] * 100


async def test_a_connection_may_be_retired_by_the_outcome_of_its_message(pool: Pool) -> None:
    """`done` is called within the turn of the connection."""
    hop = FakeHop(TEXT=["250 2.0.0 taken"])
    over = trio.Event()
    async with serving(hop):
        there = hop.hop()

        def done(_: Delivered | NextHopUnavailable) -> None:
            pool._host_pools[there].close()
            over.set()

        pool.deliver_later(there, envelope(), PREFIX, Text(TEXT), len(PREFIX + TEXT), done)
        await over.wait()
        await pool.aclose()
    assert hop.verbs() == "EHLO MAIL RCPT DATA QUIT"


async def test_one_message_after_the_other_is_for_one_connection(pool: Pool) -> None:
    for offer in (ORDINARY, CHUNKING, ()):
        hop = FakeHop(offer)
        over = trio.Event()
        left = 20
        async with serving(hop):
            there = hop.hop()

            def done(_: Delivered | NextHopUnavailable) -> None:
                nonlocal left
                left -= 1
                if left:
                    pool.deliver_later(there, envelope(), PREFIX, Text(TEXT), len(PREFIX + TEXT), done)  # noqa: B023
                else:
                    over.set()  # noqa: B023

            pool.deliver_later(there, envelope(), PREFIX, Text(TEXT), len(PREFIX + TEXT), done)
            await over.wait()
        assert len(hop.texts) == 20
        assert hop.connections == 1
