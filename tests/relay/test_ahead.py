"""What a session asks of next hops before a message is ours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest
import trio

from penstock.message import Recipient
from penstock.relay.ahead import Callahead, as_reply
from penstock.relay.hop import Hop, HopLimits, Outcome, Result
from penstock.relay.pool import Pool
from penstock.relay.route import LOCAL, Choice, Route
from penstock.reply import Reply
from tests.relay.fake import CHUNKING, CLOSE, PREFIX, STALL, STUFFED, TEXT, FakeHop, envelope, path, serving


class Map:
    """Routes: all domains lead to the same hops, but local.org."""

    def __init__(self, *hops: Hop) -> None:
        self.route = Route("route", tuple((Choice(1, (hop,)),) for hop in hops))

    def domain_of(self, recipient: Recipient) -> str:
        return recipient.path.domain

    def static_route(self, domain: str) -> Route | None:
        return LOCAL if domain == "local.org" else None if domain == "dns.org" else self.route

    async def find_route(self, domain: str) -> Route:
        return self.static_route(domain) or self.route


def bob(text: str = "bob@example.org") -> Recipient:
    return Recipient(path(text))


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ({}, None),
        ({"RCPT": "251 elsewhere"}, None),
        ({"RCPT": "550 5.1.1 who?"}, 550),
        ({"RCPT": "450 4.2.0 greylisted"}, 451),
        ({"MAIL": "550 5.7.1 no bounces here"}, 451),
        ({"MAIL": "451 4.3.0 later"}, 451),
        ({"RCPT": CLOSE}, 451),
        ({"CONNECT": "554 no"}, 451),
        ({"RCPT": "550 who?"}, 550),
        ({"RCPT": "553 5.1.3 what?"}, 550),
        ({"RCPT": "552 mailbox full"}, 452),
        ({"RCPT": "550 5.2.2 over quota"}, 452),
        ({"RCPT": "452 4.2.2 over quota"}, 452),
        ({"RCPT": "554 5.7.1 your address is blocked"}, 451),
        ({"RCPT": "550 5.7.1 blocked"}, 451),
        ({"RCPT": "553 5.1.8 the domain of the sender does not exist"}, 451),
        ({"RCPT": "501 5.1.7 bad sender"}, 451),
        ({"RCPT": "554 rejected"}, 451),
    ],
)
@pytest.mark.parametrize("offer", [("PIPELINING",), (), CHUNKING], ids=["pipelining", "plain", "chunking"])
async def test_only_a_refusal_of_the_recipient_is_one(
    pool: Pool, answers: dict[str, str], code: int | None, offer: tuple[str, ...]
) -> None:
    hop = FakeHop(offer, **answers)
    async with serving(hop):
        callahead = Callahead(pool, Map(hop.hop()))
        said = await callahead.ask(bob())
        assert (said and said.code) == code
        if code is None or "RCPT" in answers:
            hop.answers = {}
            assert await callahead.ask(bob()) is None
            assert hop.connections == (2 if answers.get("RCPT") == CLOSE else 1)
    assert "DATA" not in hop.verbs()
    assert "MAIL FROM:<>" in hop.heard or "CONNECT" in answers


async def test_the_words_of_the_hop_are_the_cause(pool: Pool) -> None:
    hop = FakeHop(RCPT="550 5.1.1 who?")
    async with serving(hop):
        said = await Callahead(pool, Map(hop.hop())).ask(bob())
    assert said is not None
    assert (said.text, said.cause) == ("who?", f"127.0.0.1:{hop.port}: 550 5.1.1 who?")


async def test_the_next_hop_is_asked_when_one_is_down(pool: Pool) -> None:
    down, up = FakeHop(CONNECT=["421 no!close"] * 3), FakeHop(RCPT="550 5.1.1 who?")
    async with serving(down, up):
        callahead = Callahead(pool, Map(down.hop(), up.hop()))
        said = await callahead.ask(bob())
        assert said is not None
        assert said.code == 550
        assert await callahead.ask(bob("bob@local.org")) is None
    assert down.connections == 1


@pytest.mark.parametrize(
    "answers",
    [
        {"MAIL": "452 4.3.1 no space"},
        {"RCPT": "450 4.2.0 greylisted"},
        {"RCPT": "554 5.7.1 your address is blocked"},
        {"RCPT": CLOSE},
        {"RCPT": "421 4.3.2 going down!close"},
    ],
)
async def test_the_next_hop_is_asked_when_one_does_not_know(pool: Pool, answers: dict[str, str]) -> None:
    first, second = FakeHop(**answers), FakeHop(RCPT="550 5.1.1 who?")
    async with serving(first, second):
        callahead = Callahead(pool, Map(first.hop(), second.hop()))
        said = await callahead.ask(bob())
        assert said is not None
        assert (said.code, said.text) == (550, "who?")
        assert await callahead.ask(bob()) is None
    assert first.connections


async def test_questions_take_no_connection_from_the_mail(pool: Pool) -> None:
    hop = FakeHop(RCPT=[STALL] * 2)
    async with serving(hop), trio.open_nursery() as nursery:
        there = hop.hop(limits=HopLimits(connections=3))
        callahead = Callahead(pool, Map(there), connections=2)
        for _ in range(5):
            nursery.start_soon(callahead.ask, bob())
        await trio.testing.wait_all_tasks_blocked()
        assert pool.room(there) == 6
        nursery.cancel_scope.cancel()
    await pool.aclose(grace=0)
    assert hop.connections <= 2


@pytest.mark.parametrize(
    ("result", "reply"),
    [
        (Result(Outcome.DELIVERED, "250 2.0.0 queued", "2.0.0", "mx"), Reply(250, "2.0.0", "queued")),
        (Result(Outcome.FAILED, "550 5.1.1 who?", "5.1.1", "mx"), Reply(550, "5.1.1", "who?")),
        (Result(Outcome.FAILED, "554 no", "5.0.0", "mx"), Reply(550, "5.0.0", "no")),
        (Result(Outcome.DEFERRED, "421 5.3.2 wrong class", "5.3.2", "mx"), Reply(451, "4.0.0", "wrong class")),
        (Result(Outcome.DEFERRED, "450", "4.0.0", "mx"), Reply(451, "4.0.0", "The next hop said so")),
        (
            Result(Outcome.DEFERRED, "the connection was lost", "4.4.2", "mx", is_said=False),
            Reply(451, "4.4.2", "The next hop did not take it"),
        ),
    ],
)
def test_a_result_is_a_reply(result: Result, reply: Reply) -> None:
    assert as_reply(result) == reply


# ---- passing on


async def coming(*chunks: bytes, then: BaseException | None = None) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    if then is not None:
        raise then


class Heard:
    """What became of a message that was passed on."""

    def __init__(self) -> None:
        self.replies: Sequence[Reply] | None = ()
        self.event = trio.Event()

    def __call__(self, replies: Sequence[Reply] | None) -> None:
        self.replies = replies
        self.event.set()


@pytest.mark.parametrize("body_type", ["7BIT", "BINARYMIME"])
async def test_a_message_is_passed_on_as_it_comes(pool: Pool, body_type: str) -> None:
    hop = FakeHop(CHUNKING, RCPT=["250 ok", "550 5.1.1 who?"])
    heard = Heard()
    async with serving(hop):
        callahead = Callahead(pool, Map(hop.hop()))
        to = envelope("a@x.org", "b@y.org", body_type=body_type)
        counted: list[tuple[str, int, int]] = []
        callahead.on_result = lambda domain, place, count, _: counted.append((domain, place, count))
        assert callahead.begin(to, 0, coming(PREFIX, TEXT[:5], TEXT[5:]), heard) is not None
        await heard.event.wait()
    assert counted == [("x.org", 0, 1), ("y.org", 2, 1)]
    assert [reply.code for reply in heard.replies or ()] == [250, 550]
    if body_type == "7BIT":
        assert hop.texts == [STUFFED]
    else:
        assert hop.texts == [PREFIX, TEXT[:5], TEXT[5:], b""]


async def test_a_message_that_does_not_come_to_its_end_is_not_delivered(pool: Pool) -> None:
    for body_type in ("7BIT", "BINARYMIME"):
        hop = FakeHop(CHUNKING)
        heard = Heard()
        async with serving(hop):
            begun = Callahead(pool, Map(hop.hop())).begin(
                envelope(body_type=body_type), 0, coming(PREFIX, TEXT, then=ConnectionAbortedError("gone")), heard
            )
            assert begun is not None
            await heard.event.wait()
        assert [reply.code for reply in heard.replies or ()] == [451]
        assert "doubt" not in (heard.replies or ())[0].cause
        assert STUFFED not in hop.texts


async def test_a_hop_that_is_down_had_nothing(pool: Pool) -> None:
    hop = FakeHop(CONNECT="421 no!close")
    heard = Heard()
    async with serving(hop):
        assert Callahead(pool, Map(hop.hop())).begin(envelope(), 0, coming(TEXT), heard) is not None
        await heard.event.wait()
    assert heard.replies is None


async def test_a_message_that_cannot_be_passed_on_now_is_not_started(pool: Pool) -> None:
    hop = FakeHop(CONNECT=["421 no!close"] * 3)
    async with serving(hop):
        there = hop.hop(limits=HopLimits(breaker_failures=1))
        callahead = Callahead(pool, Map(there))
        heard = Heard()
        for recipients in (("a@local.org",), ("a@dns.org",), ("a@x.org", "b@local.org")):
            assert callahead.begin(envelope(*recipients), 0, coming(TEXT), heard) is None
        to = Recipient(path("a@x.org"), frozenset({"SUCCESS"}))
        assert callahead.begin(envelope()._replace(recipients=(to,)), 0, coming(TEXT), heard) is None
        assert callahead.begin(envelope(), 0, coming(TEXT), heard) is not None
        await heard.event.wait()
        assert callahead.begin(envelope(), 0, coming(TEXT), heard) is None  # it is not used now


@pytest.mark.parametrize("limits", [HopLimits(recipients=2), HopLimits()])
async def test_recipients_of_another_transaction_are_deferred(pool: Pool, limits: HopLimits) -> None:
    hop = FakeHop(RCPT=["250 ok", "250 ok" if limits.recipients == 2 else "452 4.5.3 too many", "452 4.5.3 too many"])
    heard = Heard()
    async with serving(hop):
        callahead = Callahead(pool, Map(hop.hop(limits=limits)))
        assert callahead.begin(envelope("a@x.org", "b@x.org", "c@x.org"), 0, coming(PREFIX, TEXT), heard) is not None
        await heard.event.wait()
    assert hop.texts == [STUFFED]
    assert [reply.code for reply in heard.replies or ()] == [250, 250 if limits.recipients == 2 else 451, 451]


@pytest.mark.parametrize("name", ["x.org", "hop"])
async def test_nothing_is_passed_on_to_what_an_operator_suspended(pool: Pool, name: str) -> None:
    hop = FakeHop()
    async with serving(hop):
        there = hop.hop()
        names = frozenset({there.host.lower() if name == "hop" else name})
        callahead = Callahead(pool, Map(there), suspended=lambda: names)
        assert callahead.begin(envelope("a@x.org"), 0, coming(TEXT), Heard()) is None
