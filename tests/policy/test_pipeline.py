"""The pipeline asks in order, and survives what it asks."""

from __future__ import annotations

import asyncio

import pytest
import trio
import trio.testing

from penstock.journal import Journal, JournalSettings
from penstock.policy.base import ACCEPT, Verdict
from penstock.policy.hooks import HookSettings
from penstock.policy.pipeline import Pipeline
from penstock.reply import CHECK_FAILED, Reply
from penstock.transaction import Peer, Transaction

PEER = Peer("192.0.2.1", 1)
NO = Reply(550, "5.7.1", "No")
WELCOME = Reply(250, "2.0.0", "Welcome")


class Says:
    """A policy that answers the same each time, and counts."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.asked = 0

    def on_connect(self, peer: Peer, listener: str) -> Verdict:
        self.asked += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer  # type: ignore[return-value]  # wrong answers are what is tested


class Sleeps:
    """A policy that takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.running = 0
        self.most = 0

    async def on_connect(self, peer: Peer, listener: str) -> Verdict:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await trio.sleep(self.seconds)
        finally:
            self.running -= 1
        return None


def make(*policies: object, **settings: float) -> tuple[Pipeline, Journal]:
    journal = Journal(JournalSettings())
    hook = HookSettings(hook="test:policy", **settings)  # type: ignore[arg-type]  # numbers of both kinds
    return Pipeline([(policy, hook) for policy in policies], journal), journal


async def ask(pipeline: Pipeline) -> Reply | None:
    return await pipeline.on_connect(Transaction(PEER, "main"))


def test_a_hook_point_without_policies_is_empty() -> None:
    pipeline, _ = make(Says(None))
    assert len(pipeline.connect) == 1
    assert pipeline.helo == pipeline.auth == pipeline.mail == pipeline.rcpt == pipeline.message == ()


async def test_the_first_refusal_ends_the_asking() -> None:
    first, second, third = Says(None), Says(NO), Says(None)
    pipeline, _ = make(first, second, third)
    assert await ask(pipeline) == NO
    assert (first.asked, second.asked, third.asked) == (1, 1, 0)


async def test_accept_ends_the_asking_with_a_yes() -> None:
    second = Says(NO)
    pipeline, _ = make(Says(ACCEPT), second)
    assert await ask(pipeline) is None
    assert second.asked == 0


async def test_an_accepting_reply_is_kept_unless_a_policy_refuses() -> None:
    assert await ask(make(Says(WELCOME), Says(None))[0]) == WELCOME
    assert await ask(make(Says(WELCOME), Says(NO))[0]) == NO


@pytest.mark.parametrize(
    "thrown",
    [
        KeyError("gone"),
        SystemExit(3),
        KeyboardInterrupt(),
        asyncio.CancelledError(),
        BaseExceptionGroup("of a nursery", [SystemExit(3)]),
    ],
)
async def test_a_policy_that_throws_has_failed(thrown: BaseException) -> None:
    pipeline, journal = make(Says(thrown))
    assert await ask(pipeline) == CHECK_FAILED
    cause = thrown.exceptions[0] if isinstance(thrown, BaseExceptionGroup) else thrown
    assert type(cause).__name__.encode() in journal.drain()


async def test_a_reply_that_asks_for_more_has_failed() -> None:
    """A 354 behind the dot would be no refusal to us, and no acceptance to the client, who sends again."""
    pipeline, journal = make(Says(Reply(354, None, "Go on")))
    assert await ask(pipeline) == CHECK_FAILED
    assert b"not 354" in journal.drain()


async def test_421_closes() -> None:
    answer = await ask(make(Says(Reply(421, "4.3.2", "Later", cause="so it is")))[0])
    assert answer is not None
    assert (answer.encoded, answer.closes, answer.cause) == (b"421 4.3.2 Later\r\n", True, "so it is")


async def test_an_answer_of_a_wrong_type_has_failed() -> None:
    for wrong in (True, "550 no", 550):
        pipeline, journal = make(Says(wrong))
        assert await ask(pipeline) == CHECK_FAILED
        assert b"an answer is None, ACCEPT, a Mark or a Reply" in journal.drain()


async def test_a_policy_that_takes_too_long_has_failed(autojump_clock: trio.testing.MockClock) -> None:
    pipeline, journal = make(Sleeps(60), deadline=10.0)
    started = trio.current_time()
    assert await ask(pipeline) == CHECK_FAILED
    assert trio.current_time() - started == 10
    assert b"no answer within 10.0 s" in journal.drain()


class ThrowsWhenCancelled:
    """A policy whose own nursery has more to say when its time is up."""

    async def on_connect(self, peer: Peer, listener: str) -> Verdict:
        async def clean_up() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while cleaning up")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(clean_up)
            nursery.start_soon(trio.sleep_forever)
        return None


async def test_a_policy_that_throws_when_its_time_is_up_has_failed(autojump_clock: trio.testing.MockClock) -> None:
    pipeline, journal = make(ThrowsWhenCancelled(), deadline=10.0)
    assert await ask(pipeline) == CHECK_FAILED
    assert b"ValueError: while cleaning up" in journal.drain()


class UnprintableError(Exception):
    """What cannot even say what it is."""

    def __str__(self) -> str:
        raise RuntimeError

    __repr__ = __str__


async def test_what_cannot_be_printed_has_failed_all_the_same() -> None:
    pipeline, journal = make(Says(UnprintableError()))
    assert await ask(pipeline) == CHECK_FAILED
    assert b'"UnprintableError"' in journal.drain()
    wrong = type("Wrong", (), {"__repr__": UnprintableError.__str__})()
    pipeline, journal = make(Says(wrong))
    assert await ask(pipeline) == CHECK_FAILED
    assert journal.drain().count(b"hook-failed") == 1


async def test_calls_of_a_policy_are_bounded(autojump_clock: trio.testing.MockClock) -> None:
    policy = Sleeps(1)
    pipeline, _ = make(policy, concurrency=3)
    async with trio.open_nursery() as nursery:
        for _ in range(9):
            nursery.start_soon(ask, pipeline)
    assert policy.most == 3


async def test_a_policy_that_fails_again_and_again_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    policy = Says(ValueError("no"))
    pipeline, _ = make(policy, breaker_failures=3, breaker_pause=30.0)
    for _ in range(10):
        assert await ask(pipeline) == CHECK_FAILED
    assert policy.asked == 3
    await trio.sleep(31)
    policy.answer = None
    assert await ask(pipeline) is None


async def test_cancellation_goes_through() -> None:
    pipeline, journal = make(Sleeps(1000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, pipeline)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert journal.drain() == b""
