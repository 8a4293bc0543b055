"""The judge: whose verdicts count, and what follows when a check fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from penstock.app import rolling_changes
from penstock.assembly.listeners import is_judged
from penstock.config import ListenerSettings, Settings
from penstock.journal import Journal, JournalSettings
from penstock.message import NULL_PATH, CountedBody, Envelope, Message, MessageId
from penstock.policy.base import ACCEPT, Mark
from penstock.policy.check import Check, Edited, Proposal
from penstock.policy.evidence import Evidence, Lookup, Pending
from penstock.policy.hooks import HookSettings
from penstock.policy.judge import Judge
from penstock.policy.pipeline import Pipeline
from penstock.policy.scores import Thresholds
from penstock.policy.settings import PolicySettings
from penstock.reply import Reply
from penstock.results import IprevResult
from penstock.server.domains import Domains
from penstock.transaction import Peer, Transaction
from tests.policy.judging import count_in, counted

NO = Reply(550, "5.7.1", "No")
MESSAGE = Message(MessageId("x"), Envelope(NULL_PATH, ()), b"Received: here\r\n", CountedBody(5), 0.0)


class Says(Check):
    """A check that says the same at each hook point."""

    name = "says"

    def __init__(self, answer: object, mode: str = "enforce") -> None:
        self.answer = answer
        self.mode = mode  # type: ignore[assignment]
        self.heard: list[str] = []

    def on_connect(self, transaction: Transaction) -> Any:
        return self._say()

    def on_message(self, transaction: Transaction, message: Message) -> Any:
        return self._say()

    def on_refused(self, transaction: Transaction, hook_point: str) -> None:
        self.heard.append(f"refused {hook_point}")

    def on_accepted(self, transaction: Transaction, message: Message) -> None:
        self.heard.append("accepted")

    def _say(self) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer() if callable(self.answer) else self.answer


class Hook:
    """A policy in Python that says the same at each message."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def on_message(self, transaction: Transaction, message: Message) -> Any:
        return self.answer


def pipeline_of(*checks: Check, hooks: Sequence[object] = (), **policy: Any) -> tuple[Pipeline, Journal]:
    journal = Journal(JournalSettings())
    settings = msgspec.convert({"mode": "enforce", **policy}, PolicySettings)
    judge = Judge(settings, checks, journal)
    asked = [(hook, HookSettings(hook="test:Hook")) for hook in hooks]
    return Pipeline(asked, journal, judge, Thresholds.of(settings)), journal


def transaction_of(address: str = "192.0.2.1", **more: Any) -> Transaction:
    return Transaction(Peer(address, 4711), "main", **more)


async def judge(pipeline: Pipeline, transaction: Transaction | None = None) -> tuple[Reply | None, Message]:
    transaction = transaction or transaction_of()
    if pipeline.connect:
        refusal = await pipeline.on_connect(transaction)
        if refusal is not None and not refusal.accepts:
            return refusal, MESSAGE
    return await pipeline.on_message(transaction, MESSAGE)


async def test_a_refusal_of_a_check_counts() -> None:
    pipeline, _ = pipeline_of(Says(NO))
    assert (await judge(pipeline))[0] == NO


async def test_a_check_that_monitors_refuses_and_changes_nothing() -> None:
    edited = Edited(MESSAGE._replace(prefix=b"X: y\r\n"), Mark(score=99, header="X-Spam: yes", quarantine=True))
    for answer in (NO, edited):
        pipeline, journal = pipeline_of(Monitored(answer))
        transaction = transaction_of()
        assert await judge(pipeline, transaction) == (None, MESSAGE)
        assert transaction.quarantine == ""
        assert '"event":"monitored"' in journal.drain().decode()


class Monitored(Says):
    """Says something about messages only, in monitor mode."""

    def __init__(self, answer: object) -> None:
        super().__init__(answer, "monitor")

    def on_connect(self, transaction: Transaction) -> Any:
        return None


@pytest.mark.parametrize(
    ("address", "more"),
    [("127.0.0.1", {}), ("::1", {}), ("", {}), ("192.0.2.1", {"identity": "alice"})],
    ids=["IPv4 loopback", "IPv6 loopback", "unix socket", "authenticated"],
)
async def test_trusted_and_authenticated_clients_are_not_judged(address: str, more: dict[str, Any]) -> None:
    pipeline, _ = pipeline_of(Says(NO))
    assert (await judge(pipeline, transaction_of(address, **more)))[0] is None


async def test_trusted_networks_replace_loopback() -> None:
    pipeline, _ = pipeline_of(Says(NO), trusted=["192.0.2.0/24"])
    assert (await judge(pipeline))[0] is None
    assert (await judge(pipeline, transaction_of("127.0.0.1")))[0] == NO


async def slow() -> Mark:
    await trio.sleep_forever()
    raise AssertionError


@pytest.mark.parametrize("trouble", [ValueError("a bug"), slow], ids=["a bug", "no answer"])
@pytest.mark.parametrize("is_left_out", [True, False])
async def test_a_check_that_fails_defers_or_is_left_out(
    trouble: object, is_left_out: bool, autojump_clock: trio.testing.MockClock
) -> None:
    check = Says(trouble)
    if is_left_out:
        check.failure = None
    pipeline, journal = pipeline_of(check)
    verdict, _ = await judge(pipeline)
    assert (None if verdict is None else verdict.code) == (None if is_left_out else 451)
    assert '"event":"hook-failed","hook":"says"' in journal.drain().decode()


async def test_a_check_that_cannot_be_told_changes_nothing() -> None:
    class Broken(Says):
        def on_refused(self, transaction: Transaction, hook_point: str) -> None:
            raise RuntimeError("broken")

        def on_accepted(self, transaction: Transaction, message: Message) -> None:
            raise RuntimeError("broken")

        def on_disconnect(self, transaction: Transaction) -> None:
            raise RuntimeError("broken")

    pipeline, journal = pipeline_of(Broken(None), works := Says(None))
    judge_, transaction = pipeline.judge, transaction_of()
    assert judge_ is not None
    judge_.answered(transaction, MESSAGE, Reply(250, "2.0.0", "OK"))
    judge_.refused(transaction, "on_rcpt")
    pipeline.close(transaction)
    assert works.heard == ["accepted", "refused on_rcpt"]
    assert journal.drain().count(b"broken") == 3


async def test_a_background_task_that_raises_ends_no_other() -> None:
    class Fails(Lookup[int]):
        name = "says"

        async def finish(self, *, are_due: bool) -> None:
            raise ValueError("broken")

    class Works(Fails):
        async def finish(self, *, are_due: bool) -> None:
            self.pending.set(int(are_due))

    journal, evidence = Journal(JournalSettings()), Evidence()
    pending: list[Pending[int]] = [Pending(), Pending()]
    async with trio.open_nursery() as nursery:
        evidence.look_up(Fails(pending[0]), nursery, journal)
        evidence.look_up(Works(pending[1]), nursery, journal)
        assert [await each.get() for each in pending] == [None, 1]
    assert journal.drain().count(b"broken") == 1


async def test_the_lookups_of_a_client_end_with_its_connection() -> None:
    class Hangs(Lookup[int]):
        name = "hangs"

        async def finish(self, *, are_due: bool) -> None:
            await trio.sleep_forever()

    evidence, pending = Evidence(), Pending[int]()
    async with trio.open_nursery() as nursery:
        evidence.look_up(Hangs(pending), nursery, Journal(JournalSettings()))
        await trio.testing.wait_all_tasks_blocked()
        evidence.close()
        assert await pending.get() is None


@pytest.mark.parametrize(
    ("scores", "expected"),
    [((5.9,), ""), ((3, 3), "tag"), ((12, -4), "tag"), ((5, 5), "refused"), ((10.0,), "refused")],
)
async def test_scores_of_checks_and_policies_are_added_up(scores: tuple[float, ...], expected: str) -> None:
    first, *others = scores
    pipeline, _ = pipeline_of(
        OnlyMessages(Mark(score=first)), hooks=[Hook(Mark(score=score)) for score in others], trusted=[]
    )
    transaction = transaction_of()
    verdict, message = await judge(pipeline, transaction)
    if expected == "refused":
        assert verdict is not None
        assert (verdict.code, verdict.status) == (550, "5.7.1")
        return
    assert verdict is None
    assert transaction.quarantine == expected
    flagged = f"X-Spam-Flag: YES\r\nX-Spam-Score: {sum(scores):g}\r\n".encode() if expected else b""
    assert message.prefix == flagged + MESSAGE.prefix


class OnlyMessages(Says):
    """Says something about messages only."""

    def on_connect(self, transaction: Transaction) -> Any:
        return None


@pytest.mark.parametrize("field", ["X-Virus: none", ("X-Virus", "none")])
async def test_a_mark_adds_a_header_field(field: Any) -> None:
    pipeline, _ = pipeline_of(hooks=[Hook(Mark(header=field)), Hook(ACCEPT)])
    _, message = await judge(pipeline)
    assert message.prefix == b"X-Virus: none\r\n" + MESSAGE.prefix


async def test_a_mark_that_is_no_field_has_failed() -> None:
    pipeline, _ = pipeline_of(hooks=[Hook(Mark(header="X: a\r\n\r\nbody"))])
    verdict, _ = await judge(pipeline)
    assert verdict is not None
    assert verdict.code == 451


async def test_a_mark_at_the_connection_is_for_all_its_messages() -> None:
    pipeline, _ = pipeline_of(Says(Mark(score=3.5)))
    transaction = transaction_of()
    await judge(pipeline, transaction)
    assert transaction.quarantine == "tag", "3.5 at the connection and 3.5 for the message"
    transaction.reset()
    await pipeline.on_message(transaction, MESSAGE)
    assert transaction.quarantine == "tag"


async def test_in_monitor_mode_scores_of_policies_decide_nothing() -> None:
    pipeline, _ = pipeline_of(hooks=[Hook(Mark(score=99, header="X-Score: 99"))], mode="monitor")
    verdict, message = await judge(pipeline)
    assert verdict is None
    assert message.prefix == b"X-Score: 99\r\n" + MESSAGE.prefix


async def test_a_check_that_answers_421_closes_the_connection() -> None:
    pipeline, _ = pipeline_of(Says(Reply(421, "4.7.0", "Come back later")))
    verdict = await pipeline.on_connect(transaction_of())
    assert verdict is not None
    assert verdict.closes


async def test_parts_of_a_check_have_modes_of_their_own() -> None:
    parts = [Proposal("dmarc", "monitor", NO), Proposal("spf", "enforce", Reply(451, "4.7.24", "Later"))]
    pipeline, journal = pipeline_of(OnlyMessages(parts))
    counters = count_in(journal)
    verdict, _ = await judge(pipeline)
    assert verdict is not None
    assert verdict.code == 451
    assert '"event":"monitored"' in journal.drain().decode()
    assert counted(counters, "policy_would_total") == {'{check="dmarc",verdict="reject"}': 1}
    assert counted(counters, "policy_verdicts_total") == {'{check="spf",verdict="defer"}': 1}


async def test_results_of_messages_are_counted_with_the_mode() -> None:
    pipeline, journal = pipeline_of(OnlyMessages(None), fcrdns={"mode": "monitor"})
    counters = count_in(journal)
    for found in (IprevResult("pass"), IprevResult("fail"), IprevResult("fail")):
        transaction = transaction_of()
        transaction.results.iprev = found
        await judge(pipeline, transaction)
    assert counted(counters, "policy_results_total") == {
        '{check="fcrdns",result="pass",mode="monitor"}': 1,
        '{check="fcrdns",result="fail",mode="monitor"}': 2,
    }


async def test_checks_that_count_hear_what_became_of_a_message() -> None:
    check = OnlyMessages(None)
    pipeline, _ = pipeline_of(check, hooks=[Hook(NO)])
    await judge(pipeline)
    assert check.heard == ["refused on_message"]
    assert pipeline.judge is not None
    pipeline.judge.answered(transaction_of(), MESSAGE, Reply(250, "2.0.0", "Ok"))
    pipeline.judge.answered(transaction_of(), MESSAGE, Reply(452, "4.3.1", "Full"))
    assert check.heard[1:] == ["accepted", "refused on_message"]


@pytest.mark.parametrize(
    ("address", "domains", "auth", "expected"),
    [
        (":25", ["example.org"], None, True),
        ("127.0.0.1:25", ["example.org"], None, False),
        ("unix:/run/x", ["example.org"], None, False),
        (":25", None, None, False),
        (":587", ["example.org"], {"required": True}, False),
    ],
)
def test_public_listeners_with_domains_are_judged_by_default(
    address: str, domains: list[str] | None, auth: dict[str, Any] | None, expected: bool
) -> None:
    listener = msgspec.convert({"address": address, "auth": auth}, ListenerSettings)
    ours = None if domains is None else Domains(domains)
    assert is_judged(listener, ours, judges_all=False) is expected
    assert is_judged(listener, ours, judges_all=True)


@pytest.mark.parametrize(("others", "expected"), [(0, ["policy"]), (1, [])])
def test_a_listener_that_becomes_public_is_judged_after_a_reload(others: int, expected: list[str]) -> None:
    """Without checks so far, workers are started anew; otherwise the new listener gets those that there are."""

    def settings(*, is_required: bool) -> Settings:
        listeners = [{"address": ":587", "auth": {"required": is_required}}, *[{"address": ":25"}] * others]
        return msgspec.convert({"domains": ["example.org"], "listener": listeners}, Settings)

    assert rolling_changes(settings(is_required=True), settings(is_required=False)) == expected


async def test_mail_waits_where_the_delivery_cannot_hold_it() -> None:
    hooks = [(Hook(Mark(quarantine="hold")), HookSettings(hook="test:Hook"))]
    thresholds = Thresholds.of(None, can_hold=False)
    refusal, _ = await Pipeline(hooks, Journal(JournalSettings()), None, thresholds).on_message(
        transaction_of(), MESSAGE
    )
    assert refusal is not None
    assert (refusal.code, refusal.status) == (451, "4.3.0")
