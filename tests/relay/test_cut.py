"""Cables cut at every step: each recipient has the right outcome, and nothing is said to be delivered that was not."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from penstock.relay.conversation import ClockSettings
from penstock.relay.hop import HopDown, HopLimits, Outcome
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

QUICK = PoolSettings(
    clocks=ClockSettings(
        connect=0.2, greeting=0.2, hello=0.2, mail=0.2, rcpt=0.2, data=0.2, block=0.2, final=0.2, quit=0.2
    )
)
CUTS = [CLOSE, RESET, STALL]
BEFORE = ["CONNECT", "EHLO"]


@pytest.fixture
async def quick(nursery: trio.Nursery, pool: Pool) -> AsyncIterator[Pool]:
    """A pool whose clocks run out soon. (`pool` sets the way of waiting, and has the journal.)"""
    quick = Pool(QUICK, journal=pool.journal)
    await nursery.start(quick.run)
    yield quick
    await quick.aclose()
    assert quick.connections == 0


@pytest.mark.parametrize("cut", [*CUTS, f"421 4.3.2 no{CLOSE}", "554 5.3.2 no"])
@pytest.mark.parametrize("step", BEFORE)
async def test_before_the_first_transaction_nothing_was_sent(quick: Pool, step: str, cut: str) -> None:
    hop = FakeHop(**{step: [cut] * 9, "HELO": [cut] * 9})
    async with serving(hop):
        with pytest.raises(HopDown):
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
    quick: Pool, step: str, offer: tuple[str, ...], cut: str
) -> None:
    hop = FakeHop(offer, **{step: [cut]})
    async with serving(hop):
        results = await send(quick, hop.hop(), "a@x.org", "b@x.org")
        assert [one.kind for one in results] == [Outcome.DEFERRED] * 2
        assert all(one.text.startswith("421") for one in results) == cut.startswith("421")
        in_doubt = not cut.startswith("421") and (step in ("TEXT", "BDAT") or offer is CHUNKING)
        if step != "TEXT_CUT":  # the end of a text this short has left with its beginning
            assert all("in doubt" in one.text for one in results) == in_doubt
        assert hop.texts == []
        assert hop.connections == 1, "not at once: the spool decides when"
        assert told(await send(quick, hop.hop())) == "delivered 250"


@pytest.mark.parametrize("cut", [CLOSE, RESET, STALL, f"421 4.3.2 no{CLOSE}"])
async def test_a_cut_behind_a_refusal_keeps_the_refusal(quick: Pool, cut: str) -> None:
    hop = FakeHop(RCPT=["550 5.1.1 no", "250 ok", cut])
    async with serving(hop):
        results = await send(quick, hop.hop(), "a@x.org", "b@x.org", "c@x.org")
    assert [one.kind for one in results] == [Outcome.FAILED, Outcome.DEFERRED, Outcome.DEFERRED]


@pytest.mark.parametrize("cut", [CLOSE, RESET, STALL])
async def test_an_lmtp_server_that_goes_after_one_answer_leaves_the_others_in_doubt(quick: Pool, cut: str) -> None:
    hop = FakeHop(TEXT=["250 2.0.0 taken", f"{cut}"])
    hop.is_lmtp = True
    async with serving(hop):
        results = await send(quick, hop.hop(kind="lmtp"), "a@x.org", "b@x.org", "c@x.org")
    assert [one.kind for one in results] == [Outcome.DELIVERED, Outcome.DEFERRED, Outcome.DEFERRED]
    assert all("in doubt" in one.text for one in results[1:])


@pytest.mark.parametrize("cut", [CLOSE, RESET, f"421 4.4.2 idle for too long{CLOSE}"])
async def test_a_connection_that_died_while_it_rested_costs_no_attempt(quick: Pool, cut: str) -> None:
    hop = FakeHop(MAIL=["250 ok", cut])
    async with serving(hop):
        assert told(await send(quick, hop.hop())) == "delivered 250"
        assert told(await send(quick, hop.hop())) == "delivered 250"
    assert hop.connections == 2
    assert hop.texts == [STUFFED, STUFFED]


async def test_a_hop_that_always_closes_at_mail_is_not_tried_for_ever(quick: Pool) -> None:
    hop = FakeHop(MAIL=["250 ok", *[f"421 no{CLOSE}"] * 20])
    async with serving(hop):
        assert told(await send(quick, hop.hop())) == "delivered 250"
        assert told(await send(quick, hop.hop())) == "deferred 421"
    assert hop.connections == 2


@pytest.mark.parametrize("cut", [CLOSE, RESET, f"421 4.3.2 no{CLOSE}"])
async def test_a_message_behind_one_that_is_cut_goes_on_elsewhere(quick: Pool, cut: str) -> None:
    hop = FakeHop(TEXT=["250 2.0.0 taken", cut])
    got: list[str] = []
    async with serving(hop):
        there = hop.hop(limits=HopLimits(connections=1))

        async def one() -> None:
            got.append(told(await send(quick, there)))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(one)
    lost = "deferred 421" if cut.startswith("421") else "deferred 4.4.2"
    assert sorted(got) == ["deferred" + lost[8:], *["delivered 250"] * 3]
    assert hop.texts == [STUFFED] * 3
    assert hop.connections == 2


async def test_a_text_that_is_refused_before_its_end_is_refused(quick: Pool) -> None:
    large = b"x" * 998 + b"\r\n"
    hop = FakeHop(("PIPELINING",), TEXT_CUT=[f"552 5.3.4 too big{CLOSE}"])
    async with serving(hop):
        results = await send(quick, hop.hop(), body=Text(*[large * 100] * 100))
    assert told(results) == "failed 552"
    assert hop.texts == []


async def test_a_pool_that_is_cancelled_tells_everybody(pool: Pool, nursery: trio.Nursery) -> None:
    hop = FakeHop(TEXT=[STALL], MAIL=["250 ok", STALL])
    own = Pool(QUICK)
    outcomes: list[str] = []
    async with serving(hop), trio.open_nursery() as waiting:
        there = hop.hop(limits=HopLimits(connections=1))

        async def one() -> None:
            try:
                outcomes.append(told(await send(own, there)))
            except HopDown:
                outcomes.append("down")

        async with trio.open_nursery() as running:
            await running.start(own.run)
            for _ in range(3):
                waiting.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            running.cancel_scope.cancel()
    assert sorted(outcomes) == ["deferred 4.4.2", "down", "down"]


async def test_nothing_listens(quick: Pool) -> None:
    hop = FakeHop()
    async with serving(hop):
        pass
    with pytest.raises(HopDown, match="refused"):
        await send(quick, hop.hop())
