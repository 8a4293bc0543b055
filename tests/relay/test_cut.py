"""Cables cut at every step: each recipient has the right outcome, and nothing is said to be delivered that was not."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from penstock.relay.connection import ClockSettings
from penstock.relay.hop import HopLimits, NextHopUnavailable, Outcome
from penstock.relay.pool import Pool, PoolSettings
from tests.relay.fake import (
    CHUNKING,
    CLOSE,
    ORDINARY,
    RESET,
    STALL,
    STUFFED,
    FakeHop,
    Text,
    send,
    serving,
    told,
)

CLOCK_OF = {
    "CONNECT": "greeting", "EHLO": "hello", "MAIL": "mail", "RCPT": "rcpt", "DATA": "data", "TEXT": "final",
    "TEXT_CUT": "final", "BDAT": "final",
}  # fmt: skip
CUTS = [CLOSE, RESET, STALL]
BEFORE = ["CONNECT", "EHLO"]


@asynccontextmanager
async def waiting_for(pool: Pool, step: str, cut: str) -> AsyncIterator[Pool]:
    """Give the pool, or one whose clock for the step runs out soon when the cut is silence."""
    if cut != STALL:
        yield pool
        return
    clocks = ClockSettings(**{CLOCK_OF[step]: 0.25})
    quick = Pool(PoolSettings(clocks=clocks), journal=pool.journal)
    async with trio.open_nursery() as nursery:
        await nursery.start(quick.run)
        yield quick
        await quick.aclose()
        assert quick.connections == 0


@pytest.mark.parametrize("cut", [*CUTS, f"421 4.3.2 no{CLOSE}", "554 5.3.2 no"])
@pytest.mark.parametrize("step", BEFORE)
async def test_before_the_first_transaction_nothing_was_sent(pool: Pool, step: str, cut: str) -> None:
    hop = FakeHop(**{step: [cut] * 9, "HELO": [cut] * 9})
    async with serving(hop), waiting_for(pool, step, cut) as quick:
        with pytest.raises(NextHopUnavailable):
            await send(quick, hop.hop())
    assert hop.texts == []


@pytest.mark.parametrize("cut", [*CUTS, f"421 4.3.2 no{CLOSE}"])
@pytest.mark.parametrize(
    ("offer", "step"),
    [
        *itertools.product([ORDINARY, ()], ["MAIL", "RCPT", "DATA", "TEXT_CUT", "TEXT"]),
        *itertools.product([CHUNKING], ["MAIL", "RCPT", "BDAT"]),
    ],
)
async def test_a_cut_within_a_transaction_defers_and_delivers_nothing_twice(
    pool: Pool, step: str, offer: tuple[str, ...], cut: str
) -> None:
    hop = FakeHop(offer, **{step: [cut]})
    async with serving(hop), waiting_for(pool, step, cut) as quick:
        results = await send(quick, hop.hop(), "a@x.org", "b@x.org")
        assert [one.kind for one in results] == [Outcome.DEFERRED] * 2
        assert all(one.text.startswith("421") for one in results) == cut.startswith("421")
        in_doubt = not cut.startswith("421") and step in ("TEXT", "BDAT")
        if step != "TEXT_CUT":  # the end of a text this short has left with its beginning
            assert all("in doubt" in one.text for one in results) == in_doubt
        assert hop.texts == []
        assert hop.connections == 1, "not at once: the spool decides when"
        assert told(await send(pool, hop.hop())) == "delivered 250"


@pytest.mark.parametrize("cut", [CLOSE, RESET, STALL, f"421 4.3.2 no{CLOSE}"])
async def test_a_lost_connection_after_a_refusal_keeps_the_refusal(pool: Pool, cut: str) -> None:
    hop = FakeHop(RCPT=["550 5.1.1 no", "250 ok", cut])
    async with serving(hop), waiting_for(pool, "RCPT", cut) as quick:
        results = await send(quick, hop.hop(), "a@x.org", "b@x.org", "c@x.org")
    assert [one.kind for one in results] == [Outcome.FAILED, Outcome.DEFERRED, Outcome.DEFERRED]


@pytest.mark.parametrize("cut", [CLOSE, RESET, STALL])
async def test_an_lmtp_connection_lost_after_one_reply_leaves_doubt(pool: Pool, cut: str) -> None:
    hop = FakeHop(TEXT=["250 2.0.0 taken", f"{cut}"])
    hop.is_lmtp = True
    async with serving(hop), waiting_for(pool, "TEXT", cut) as quick:
        results = await send(quick, hop.hop(kind="lmtp"), "a@x.org", "b@x.org", "c@x.org")
    assert [one.kind for one in results] == [Outcome.DELIVERED, Outcome.DEFERRED, Outcome.DEFERRED]
    assert all("in doubt" in one.text for one in results[1:])


@pytest.mark.parametrize("cut", [CLOSE, RESET, f"421 4.4.2 idle for too long{CLOSE}"])
async def test_a_connection_that_died_while_it_rested_costs_no_attempt(pool: Pool, cut: str) -> None:
    hop = FakeHop(MAIL=["250 ok", cut])
    async with serving(hop):
        assert told(await send(pool, hop.hop())) == "delivered 250"
        assert told(await send(pool, hop.hop())) == "delivered 250"
    assert hop.connections == 2
    assert hop.texts == [STUFFED, STUFFED]


async def test_a_hop_that_always_closes_at_mail_is_not_tried_for_ever(pool: Pool) -> None:
    hop = FakeHop(MAIL=["250 ok", *[f"421 no{CLOSE}"] * 20])
    async with serving(hop):
        assert told(await send(pool, hop.hop())) == "delivered 250"
        assert told(await send(pool, hop.hop())) == "deferred 421"
    assert hop.connections == 2


@pytest.mark.parametrize("cut", [CLOSE, RESET, f"421 4.3.2 no{CLOSE}"])
async def test_a_message_after_a_lost_one_continues_elsewhere(pool: Pool, cut: str) -> None:
    hop = FakeHop(TEXT=["250 2.0.0 taken", cut])
    got: list[str] = []
    async with serving(hop):
        there = hop.hop(limits=HopLimits(connections=1))

        async def one() -> None:
            got.append(told(await send(pool, there)))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(one)
    lost = "deferred 421" if cut.startswith("421") else "deferred 4.4.2"
    assert sorted(got) == ["deferred" + lost[8:], *["delivered 250"] * 3]
    assert hop.texts == [STUFFED] * 3
    assert hop.connections == 2


async def test_a_text_that_is_refused_before_its_end_is_refused(pool: Pool) -> None:
    large = b"x" * 998 + b"\r\n"
    hop = FakeHop(("PIPELINING",), TEXT_CUT=[f"552 5.3.4 too big{CLOSE}"])
    async with serving(hop):
        results = await send(pool, hop.hop(), body=Text(*[large * 100] * 100))
    assert told(results) == "failed 552"
    assert hop.texts == []


async def test_a_cancelled_pool_answers_every_job(pool: Pool, nursery: trio.Nursery) -> None:
    hop = FakeHop(TEXT=[STALL], MAIL=["250 ok", STALL])
    own = Pool()
    outcomes: list[str] = []
    async with serving(hop), trio.open_nursery() as waiting:
        there = hop.hop(limits=HopLimits(connections=1))

        async def one() -> None:
            try:
                outcomes.append(told(await send(own, there)))
            except NextHopUnavailable:
                outcomes.append("down")

        async with trio.open_nursery() as running:
            await running.start(own.run)
            for _ in range(3):
                waiting.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            running.cancel_scope.cancel()
    assert sorted(outcomes) == ["deferred 4.4.2", "down", "down"]


async def test_nothing_listens(pool: Pool) -> None:
    hop = FakeHop()
    async with serving(hop):
        pass
    with pytest.raises(NextHopUnavailable, match="refused"):
        await send(pool, hop.hop())
