"""The limits of a next hop hold for all workers together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from penstock.metrics._shared import Segment, SharedTable
from penstock.metrics.segment import private_segment
from penstock.relay.connection import ClockSettings
from penstock.relay.hop import HopLimits, NextHopUnavailable
from penstock.relay.pool import Pool, PoolSettings
from penstock.relay.share import HopShare
from tests.relay.fake import PREFIX, STALL, TEXT, FakeHop, Text, envelope, send, serving, told

SETTINGS = PoolSettings(clocks=ClockSettings(connect=1.0))
"""A pool whose sweeper comes round often."""


def table_of(segment: Segment) -> SharedTable:
    return SharedTable(segment.page(segment.claim()))


@asynccontextmanager
async def two_pools() -> AsyncIterator[tuple[Segment, Pool, Pool]]:
    """Run the pools of two workers."""
    segment = private_segment(2)
    async with trio.open_nursery() as nursery:
        pools = [Pool(SETTINGS, table=table_of(segment)) for _ in range(2)]
        for pool in pools:
            await nursery.start(pool.run)
        yield segment, pools[0], pools[1]
        for pool in pools:
            await pool.aclose(grace=0)


async def test_workers_take_turns_with_the_only_connection_of_a_hop() -> None:
    hop = FakeHop()
    async with serving(hop), two_pools() as (_, one, two):
        there = hop.hop(limits=HopLimits(connections=1, wait=30))
        for pool in (one, two, one):
            with trio.fail_after(20):
                assert told(await send(pool, there)) == "delivered 250"
    assert hop.connections == 3  # each closed the one it had for the other


async def test_all_workers_together_have_so_many_connections_to_a_hop() -> None:
    hop = FakeHop(TEXT=[STALL] * 9)
    async with serving(hop), two_pools() as (segment, one, two):
        there = hop.hop(limits=HopLimits(connections=3, queue=2))
        for pool in (one, one, two):
            pool.deliver_later(there, envelope(), PREFIX, Text(TEXT), 1, lambda _: None)
        with trio.fail_after(10):
            while hop.verbs().count("DATA") < 3:  # noqa: ASYNC110 - the other end of a socket has no event for us
                await trio.sleep(0.005)
        for _ in range(2):
            two.deliver_later(there, envelope(), PREFIX, Text(TEXT), 1, lambda _: None)
        with pytest.raises(NextHopUnavailable, match="waiting"):
            await send(two, there)
        assert (hop.connections, one.connections, two.connections) == (3, 2, 1)
        segment.free(0)  # a worker that was killed has no connections any more
        assert HopShare(SharedTable(segment.page(1)), there.name).elsewhere == 1


async def test_workers_share_the_rates_of_a_hop() -> None:
    segment = private_segment(2)
    buckets = [HopShare(table_of(segment), "hop").bucket("messages", 0.01) for _ in range(2)]
    assert [bucket.take(0.0) for bucket in buckets] == [True, False]
    assert [bucket.available(0.0) for bucket in buckets] == [0, 0]
    assert HopShare(table_of(private_segment()), "hop").bucket("messages", 0.0).available(0.0) == 1_000_000
