"""What is said in a transaction, what each answer means, and for whom."""

from __future__ import annotations

import pytest

from penstock.message import Recipient
from penstock.relay.hop import Delivered, HopLimits, NextHopUnavailable, Outcome
from penstock.relay.pool import Pool
from tests.relay.fake import CHUNKING, PREFIX, STALL, STUFFED, TEXT, FakeHop, Text, envelope, path, send, serving, told


@pytest.mark.parametrize(
    ("answers", "step"), [("250 ok", "RCPT"), ("250 ok\r\n250 ok", "DATA"), ("250 ok\r\n550 5.1.1 no", "DATA")]
)
async def test_an_invalid_reply_is_reported_with_its_command(pool: Pool, answers: str, step: str) -> None:
    hop = FakeHop(MAIL=[f"{answers}\r\nrubbish\r\n250 ok{STALL}"])  # in one segment
    async with serving(hop):
        *_, result = await send(pool, hop.hop(), "b@example.org")
    if "550" in answers:
        assert result.text == "550 5.1.1 no"
    else:
        assert result.text == f"this is not a reply: rubbish, at {step}"


async def test_a_354_without_recipients_gets_a_lone_dot(pool: Pool) -> None:
    hop = FakeHop(RCPT="550 5.1.1 no")
    async with serving(hop):
        assert told(await send(pool, hop.hop())) == "failed 550"
        assert told(await send(pool, hop.hop())) == "delivered 250"
    assert hop.verbs() == "EHLO MAIL RCPT DATA RSET MAIL RCPT DATA"
    assert hop.texts == [STUFFED]
    assert hop.connections == 1


@pytest.mark.parametrize("offer", [("PIPELINING",), (), CHUNKING], ids=["pipelining", "plain", "chunking"])
@pytest.mark.parametrize(
    ("step", "answer", "outcome"),
    [
        ("MAIL", "550 5.7.1 no", "failed 550"),
        ("MAIL", "451 4.3.0 later", "deferred 451"),
        ("RCPT", "550 5.1.1 no", "failed 550"),
        ("RCPT", "452 4.5.3 too many", "deferred 452"),
        ("DATA", "451 4.3.0 later", "deferred 451"),
        ("TEXT", "554 5.6.0 spam", "failed 554"),
        ("BDAT", "554 5.6.0 spam", "failed 554"),
        ("TEXT", "452 4.3.1 full", "deferred 452"),
    ],
)
async def test_after_a_refusal_the_connection_is_used_again(
    pool: Pool, offer: tuple[str, ...], step: str, answer: str, outcome: str
) -> None:
    hop = FakeHop(offer, **{step: answer})
    async with serving(hop):
        first = told(await send(pool, hop.hop()))
        if step in ("DATA", "TEXT", "BDAT") and (step == "BDAT") != (offer is CHUNKING):
            assert first == "delivered 250"  # there is no such step
        else:
            assert first == outcome
        assert told(await send(pool, hop.hop())) == "delivered 250"
    assert hop.connections == 1


@pytest.mark.parametrize("offer", [("PIPELINING",), (), CHUNKING], ids=["pipelining", "plain", "chunking"])
async def test_recipients_beyond_what_the_hop_takes_follow_at_once(pool: Pool, offer: tuple[str, ...]) -> None:
    hop = FakeHop(offer, RCPT=["250 ok", "250 ok", "452 4.5.3 too many", "552 too many", "550 5.1.1 no", "250 ok"])
    async with serving(hop):
        results = await send(pool, hop.hop(), *(f"{name}@x.org" for name in "abcde"))
    assert told(results) == "delivered 250, delivered 250, delivered 250, delivered 250, failed 550"
    assert len(hop.texts) == 2


@pytest.mark.parametrize("code", ["450", "451", "452", "550", "552", "554"])
async def test_a_status_of_too_many_recipients_splits_them(pool: Pool, code: str) -> None:
    """RFC 3463 3.6, X.5.3, whatever the code."""
    hop = FakeHop(CHUNKING, RCPT=["250 ok", f"{code} {code[0]}.5.3 too many", f"{code} {code[0]}.5.3 too many"])
    async with serving(hop):
        results = await send(pool, hop.hop(), *(f"{name}@x.org" for name in "abc"))
    assert told(results) == ", ".join(["delivered 250"] * 3)
    hop = FakeHop(RCPT=[f"{code} {code[0]}.5.3 too many"])
    async with serving(hop):
        (result,) = await send(pool, hop.hop())
    assert result.kind.value == "deferred"


async def test_recipients_are_split_by_the_limit_of_the_hop(pool: Pool) -> None:
    hop = FakeHop(("PIPELINING", "LIMITS RCPTMAX=2"))
    async with serving(hop):
        results = await send(pool, hop.hop(), *(f"{name}@x.org" for name in "abcde"))
    assert told(results) == ", ".join(["delivered 250"] * 5)
    assert hop.verbs() == "EHLO MAIL RCPT RCPT DATA MAIL RCPT RCPT DATA MAIL RCPT DATA"


async def test_without_a_limit_100_recipients_are_sent_at_a_time(pool: Pool) -> None:
    hop = FakeHop()
    async with serving(hop):
        results = await send(pool, hop.hop(), *(f"u{number}@x.org" for number in range(250)))
    assert {one.kind for one in results} == {Outcome.DELIVERED}
    assert len(results) == 250
    assert len(hop.texts) == 3


async def test_the_wishes_of_the_sender_are_handed_on(pool: Pool) -> None:
    hop = FakeHop(CHUNKING)
    bob = Recipient(path("bob@example.org"), frozenset({"NEVER"}), "rfc822;b@example.org")
    wish = envelope(body_type="8BITMIME", smtputf8=True, ret="HDRS", envid="x")._replace(recipients=(bob,))
    async with serving(hop):
        assert told(await pool.deliver(hop.hop(), wish, PREFIX, Text(TEXT), len(PREFIX + TEXT))) == "delivered 250"
    size = len(PREFIX + TEXT)
    assert hop.heard[1:3] == [
        f"MAIL FROM:<a@example.com> SIZE={size} BODY=8BITMIME SMTPUTF8 RET=HDRS ENVID=x",
        "RCPT TO:<bob@example.org> NOTIFY=NEVER ORCPT=rfc822;b@example.org",
    ]


async def test_octets_of_any_kind_arrive_as_they_are_with_chunking(pool: Pool) -> None:
    hop = FakeHop(CHUNKING)
    octets = bytes(range(256)) * 300 + b"\r\n.\r\nno end"
    async with serving(hop):
        for body in (Text(octets), Text(octets, in_memory=False), Text(octets[:300]), Text()):
            assert told(await send(pool, hop.hop(), body=body, body_type="BINARYMIME")) == "delivered 250"
    assert hop.texts == [PREFIX + octets] * 2 + [PREFIX + octets[:300], PREFIX]


async def test_chunking_can_be_left_alone(pool: Pool) -> None:
    hop = FakeHop(CHUNKING)
    async with serving(hop):
        assert told(await send(pool, hop.hop(limits=HopLimits(chunking=False)))) == "delivered 250"
    assert hop.texts == [STUFFED]


async def test_an_empty_message_is_a_message(pool: Pool) -> None:
    for offer in (("PIPELINING",), CHUNKING):
        hop = FakeHop(offer)
        async with serving(hop):
            (result,) = await pool.deliver(hop.hop(), envelope(), b"", Text(), 0)
        assert result.kind is Outcome.DELIVERED
        assert hop.texts == [b".\r\n"]


@pytest.mark.parametrize("size", [3, 300])
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("offer", [("PIPELINING",), CHUNKING], ids=["data", "chunking"])
async def test_a_body_of_another_size_is_not_delivered_in_part(
    pool: Pool, size: int, in_memory: bool, offer: tuple[str, ...]
) -> None:
    hop = FakeHop(offer)
    body = Text(TEXT, in_memory=in_memory)
    async with serving(hop):
        (result,) = await pool.deliver(hop.hop(), envelope(), b"", body, size)
        if offer is CHUNKING:
            assert (result.kind, result.is_said) == (Outcome.DEFERRED, False)
            assert hop.texts == []
        else:  # the size was no more than an estimate
            assert result.kind is Outcome.DELIVERED


async def test_an_unreadable_body_is_tried_again_later(pool: Pool) -> None:
    class Broken(Text):
        def chunks(self):  # type: ignore[no-untyped-def]
            yield b"Subject: x\r\n"
            raise OSError("the disk is on fire")

    for offer in (("PIPELINING",), CHUNKING):
        hop = FakeHop(offer)
        async with serving(hop):
            (result,) = await send(pool, hop.hop(), body=Broken(TEXT, in_memory=False))
        assert result.kind is Outcome.DEFERRED
        assert "on fire" in result.text
        assert "doubt" not in result.text
        assert hop.texts == []


@pytest.mark.parametrize(
    ("step", "answer"),
    [("MAIL", "354 what"), ("RCPT", "334 what"), ("DATA", "250 what"), ("TEXT", "354 what"), ("MAIL", "what")],
)
async def test_an_answer_that_makes_no_sense_ends_the_conversation(pool: Pool, step: str, answer: str) -> None:
    hop = FakeHop(("PIPELINING",), **{step: answer})
    async with serving(hop):
        (result,) = await send(pool, hop.hop())
        assert result.kind is Outcome.DEFERRED
        assert not result.is_said
        assert told(await send(pool, hop.hop())) == "delivered 250"
    assert hop.connections == 2


async def test_an_unexpected_reply_ends_the_connection(pool: Pool) -> None:
    hop = FakeHop(TEXT=["250 2.0.0 taken\r\n250 and another one"])
    async with serving(hop):
        assert told(await send(pool, hop.hop())) == "delivered 250"
        assert told(await send(pool, hop.hop())) == "delivered 250"
    assert hop.connections == 2


async def test_replies_of_a_hop_are_made_printable(pool: Pool) -> None:
    hop = FakeHop(RCPT="550 5.1.1 \x1b[2Jno\u202e")
    async with serving(hop):
        (result,) = await send(pool, hop.hop())
    assert result.text == "550 5.1.1 ?[2Jno?"


async def test_an_endless_answer_is_no_answer(pool: Pool) -> None:
    for answer in ("250 " + "x" * 10_000, "\r\n".join(["250-x"] * 1000)):
        hop = FakeHop(EHLO=[answer] * 3)
        async with serving(hop):
            with pytest.raises(NextHopUnavailable):
                await send(pool, hop.hop())


async def test_the_result_of_a_cancelled_delivery_is_dropped(pool: Pool) -> None:
    heard: list[Delivered | NextHopUnavailable] = []
    hop = FakeHop()
    async with serving(hop):
        pool.deliver_later(hop.hop(), envelope(), PREFIX, Text(TEXT), 0, heard.append)
        assert heard == []
        await send(pool, hop.hop())
    assert [told(one) for one in heard if not isinstance(one, NextHopUnavailable)] == ["delivered 250"]
