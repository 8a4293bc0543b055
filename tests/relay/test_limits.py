"""What a hop gets at most, and what becomes of one that is down."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio.testing

from penstock.breaker import Breaker
from penstock.journal import Journal, JournalSettings
from penstock.relay.connection import ClockSettings
from penstock.relay.hop import HopLimits, NextHopUnavailable
from penstock.relay.pool import Pool, PoolSettings
from penstock.tokenbucket import TokenBucket
from tests.relay.fake import CLOSE, PREFIX, STALL, TEXT, FakeHop, Text, envelope, send, serving, told

BUSY = PoolSettings(clocks=ClockSettings(connect=1.0))
"""A pool whose sweeper comes round often."""


@pytest.fixture
async def swept(pool: Pool, nursery: trio.Nursery) -> AsyncIterator[Pool]:
    swept = Pool(BUSY, journal=pool.journal)
    await nursery.start(swept.run)
    yield swept
    await swept.aclose()


async def until(condition: Callable[[], object]) -> None:
    """Wait until a function returns something true."""
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - the other end of a socket has no event for us
            await trio.sleep(0.005)


# ---- the parts


def test_a_breaker_waits_twice_as_long_each_time_up_to_a_bound() -> None:
    breaker = Breaker(2, 10.0, 25.0)
    assert not breaker.failed(0.0)
    assert not breaker.blocks(0.0)
    assert breaker.failed(0.0)
    now = 0.0
    for pause in (10.0, 20.0, 25.0, 25.0):
        assert breaker.blocks(now + pause - 0.1)
        now += pause
        assert not breaker.blocks(now)
        breaker.probe()
        assert breaker.blocks(now), "one at a time"
        assert breaker.failed(now)
    breaker.probe()
    assert breaker.succeeded()
    assert not breaker.blocks(now)
    assert not breaker.succeeded()


def test_a_probe_that_came_to_nothing_lets_another_one_try() -> None:
    breaker = Breaker(1, 1.0, 1.0)
    breaker.failed(0.0)
    breaker.probe()
    assert breaker.blocks(5.0)
    breaker.abandon()
    assert not breaker.blocks(5.0)


def test_a_failure_that_began_earlier_does_not_extend_the_pause() -> None:
    breaker = Breaker(1, 1.0, 60.0)
    assert breaker.failed(0.0)
    assert not breaker.failed(0.1)
    assert breaker.until == 1.0


def test_a_request_after_the_last_failure_is_tried_at_once() -> None:
    breaker = Breaker(1, 100.0, 1000.0)
    breaker.failed(10.0)
    assert not breaker.try_again(9.0, 20.0)
    assert breaker.blocks(20.0)
    assert breaker.try_again(15.0, 20.0)
    assert not breaker.blocks(20.0)
    breaker.probe()
    assert breaker.try_again(15.0, 20.0)
    assert breaker.blocks(20.0), "one at a time"
    assert breaker.failed(21.0)
    assert not breaker.try_again(15.0, 22.0)
    assert breaker.blocks(22.0)


def test_a_bucket_holds_a_second() -> None:
    bucket = TokenBucket(3)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(10.4), bucket.take(10.4)] == [True, False]
    assert bucket.available(100.0) == 3
    slow = TokenBucket(0.5)
    assert [slow.take(1.0), slow.take(2.9), slow.take(3.0)] == [True, False, True]
    assert all(TokenBucket(0).take(0.0) for _ in range(10))


# ---- together


async def test_a_hop_gets_no_more_connections_than_it_may_have(pool: Pool) -> None:
    hop = FakeHop(TEXT=[STALL] * 2)
    async with serving(hop):
        # With more messages for a connection, the first one may take the second message behind the text that stalls.
        there = hop.hop(limits=HopLimits(connections=2, queue=1, messages=1))
        assert pool.room(there) == 4
        for left in (2, 0):
            pool.deliver_later(there, envelope(), PREFIX, Text(TEXT), 1, lambda _: None)
            await until(lambda: hop.verbs().count("DATA") == (4 - left) // 2)  # noqa: B023
            assert pool.room(there) == left
        pool.deliver_later(there, envelope(), PREFIX, Text(TEXT), 1, lambda _: None)
        with pytest.raises(NextHopUnavailable, match="waiting"):
            await send(pool, there)
        assert hop.connections == 2
        await pool.aclose(grace=0)


async def test_a_slow_hop_delays_no_other(pool: Pool) -> None:
    slow, other = FakeHop(CONNECT=[STALL] * 5), FakeHop()
    async with serving(slow, other), trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(_try, pool, slow)
        for _ in range(20):
            assert told(await send(pool, other.hop())) == "delivered 250"
        await pool.aclose(grace=0)


async def _try(pool: Pool, hop: FakeHop) -> None:
    with pytest.raises(NextHopUnavailable):
        await send(pool, hop.hop())


async def test_a_dead_hop_is_left_alone_and_then_tried_by_one(pool: Pool, swept: Pool) -> None:
    hop = FakeHop(CONNECT=[f"421 4.3.2 no{CLOSE}"] * 3)
    async with serving(hop):
        there = hop.hop(limits=HopLimits(breaker_failures=2, breaker_pause=0.1))
        for _ in range(2):
            with pytest.raises(NextHopUnavailable, match="no"):
                await send(swept, there)
        assert swept.room(there) == 0
        assert swept.down_until(there) > trio.current_time()
        with pytest.raises(NextHopUnavailable, match="not tried"):
            await send(swept, there)
        assert hop.connections == 2
        await until(lambda: swept.room(there))
        assert swept.room(there) == 1
        with pytest.raises(NextHopUnavailable, match="no"):
            await send(swept, there)  # the probe fails: twice as long
        await until(lambda: swept.room(there))
        assert told(await send(swept, there)) == "delivered 250"
        assert swept.room(there) > 1
        assert swept.down_until(there) == 0
    assert swept.journal is not None
    lines = swept.journal.drain().decode()
    assert lines.count("hop-down") == 2
    assert lines.count("hop-up") == 1


async def test_a_hop_that_takes_connections_and_no_mail_is_left_alone(pool: Pool, swept: Pool) -> None:
    hop = FakeHop(MAIL=[CLOSE] * 9)
    async with serving(hop):
        there = hop.hop(limits=HopLimits(breaker_failures=2))
        for number in range(2):
            assert told(await send(swept, there, prefix=b"X: %d\r\n" % number)) == "deferred 4.4.2"
        with pytest.raises(NextHopUnavailable, match="not tried"):
            await send(swept, there)
        ((down, since, reason),) = swept.hops_down()
        assert abs(time.time() - since) < 60
        assert (down, reason) == (there, "the hop closed the connection at MAIL")


async def test_a_probe_with_the_message_that_failed_last_counts(swept: Pool) -> None:
    hop = FakeHop(MAIL=[CLOSE] * 9)
    async with serving(hop):
        there = hop.hop(limits=HopLimits(breaker_failures=2, breaker_pause=0.1))
        for number in range(2):
            assert told(await send(swept, there, prefix=b"X: %d\r\n" % number)) == "deferred 4.4.2"
        began = swept.down_until(there)
        await until(lambda: swept.room(there))
        assert told(await send(swept, there, prefix=b"X: 1\r\n")) == "deferred 4.4.2"
        assert swept.down_until(there) >= began + 0.2, "the pause is twice as long"


@pytest.mark.parametrize("step", ["MAIL", "RCPT", "DATA"])
async def test_one_message_that_ends_connections_stops_no_other(swept: Pool, step: str) -> None:
    hop = FakeHop()
    hop.answers[step] = [CLOSE] * 9
    async with serving(hop):
        there = hop.hop(limits=HopLimits(breaker_failures=2))
        for _ in range(9):
            assert told(await send(swept, there)) == "deferred 4.4.2"
        assert told(await send(swept, there, prefix=b"X: other\r\n")) == "delivered 250"
    assert list(swept.hops_down()) == []


async def test_a_hop_that_wants_fewer_connections_gets_fewer(pool: Pool) -> None:
    hop = FakeHop(CONNECT=["220 hop", *[f"421 4.7.0 too many{CLOSE}"] * 20])
    async with serving(hop), trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(_deliver, pool, hop)
    assert hop.connections <= 5
    assert len(hop.texts) == 30
    assert pool.down_until(hop.hop()) == 0


async def _deliver(pool: Pool, hop: FakeHop) -> None:
    assert told(await send(pool, hop.hop())) == "delivered 250"


async def test_a_connection_that_rests_is_let_go(pool: Pool, swept: Pool) -> None:
    hop = FakeHop()
    async with serving(hop):
        assert told(await send(swept, hop.hop(limits=HopLimits(idle=0.05)))) == "delivered 250"
        await until(lambda: "QUIT" in hop.heard)
        await until(lambda: swept.connections == 0)


async def test_a_connection_has_its_share_of_messages(pool: Pool) -> None:
    hop = FakeHop()
    async with serving(hop):
        for _ in range(5):
            assert told(await send(pool, hop.hop(limits=HopLimits(messages=2)))) == "delivered 250"
    assert hop.connections == 3
    assert hop.heard.count("QUIT") == 2


async def test_a_rate_is_kept(pool: Pool, swept: Pool) -> None:
    hop = FakeHop()
    async with serving(hop), trio.open_nursery() as nursery:
        there = hop.hop(limits=HopLimits(message_rate=20))
        begun = trio.current_time()

        async def one() -> None:
            assert told(await send(swept, there)) == "delivered 250"

        for _ in range(24):
            nursery.start_soon(one)
    assert trio.current_time() - begun > 0.19  # 20 at once, 4 more take a fifth of a second


async def test_connections_are_made_at_a_rate(pool: Pool, swept: Pool) -> None:
    hop = FakeHop(TEXT=["250 2.0.0 taken"])
    async with serving(hop), trio.open_nursery() as nursery:
        there = hop.hop(limits=HopLimits(connection_rate=1, messages=1))

        async def one() -> None:
            assert told(await send(swept, there)) == "delivered 250"

        begun = trio.current_time()
        for _ in range(2):
            nursery.start_soon(one)
    assert hop.connections == 2
    assert trio.current_time() - begun > 0.9


async def test_all_hops_together_have_so_many_connections(pool: Pool, nursery: trio.Nursery) -> None:
    small = Pool(PoolSettings(connections=2, clocks=BUSY.clocks))
    await nursery.start(small.run)
    hops = [FakeHop() for _ in range(4)]
    async with serving(*hops):
        for hop in hops:
            assert told(await send(small, hop.hop())) == "delivered 250"
            assert small.connections <= 2
        await small.aclose()


async def test_a_message_waits_for_a_connection_only_so_long(pool: Pool, swept: Pool) -> None:
    hop = FakeHop(TEXT=[STALL])
    async with serving(hop):
        there = hop.hop(limits=HopLimits(connections=1, wait=0.1))
        swept.deliver_later(there, envelope(), PREFIX, Text(TEXT), 1, lambda _: None)
        swept.deliver_later(there, envelope(), PREFIX, Text(TEXT), 1, lambda _: None)  # behind the first one's text
        with pytest.raises(NextHopUnavailable, match="no connection was free"):
            await send(swept, there)
        await swept.aclose(grace=0)


async def test_a_closed_pool_accepts_nothing_and_finishes_its_jobs(pool: Pool) -> None:
    hop = FakeHop()
    async with serving(hop), trio.open_nursery() as nursery:
        nursery.start_soon(_deliver, pool, hop)
        await until(lambda: any(line.startswith("MAIL") for line in hop.heard))
        await pool.aclose()
        with pytest.raises(NextHopUnavailable, match="stopping"):
            await send(pool, hop.hop())
    assert hop.heard[-1] == "QUIT"
    assert pool.room(hop.hop()) == 0


async def test_a_pool_that_never_ran_can_be_closed() -> None:
    pool = Pool()
    await pool.aclose()
    with pytest.raises(NextHopUnavailable):
        await send(pool, FakeHop().hop())


async def test_a_callback_that_breaks_costs_one_connection(nursery: trio.Nursery) -> None:
    journal = Journal(JournalSettings(format="human"))
    pool = Pool(journal=journal)
    await nursery.start(pool.run)

    def done(_: object) -> None:
        raise ValueError("a bug")

    hop = FakeHop()
    async with serving(hop):
        pool.deliver_later(hop.hop(), envelope(), PREFIX, Text(TEXT), 0, done)
        await until(lambda: b"a bug" in journal.drain())
        assert told(await send(pool, hop.hop())) == "delivered 250"
        await pool.aclose()
