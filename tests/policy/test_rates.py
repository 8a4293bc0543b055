"""Rate limits: what counts, for whom, and when it is given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.journal import Journal, JournalSettings
from penstock.message import NULL_PATH, Recipient
from penstock.policy.check import Check
from penstock.policy.judge import Judge
from penstock.policy.rates import make_checks
from penstock.policy.settings import PolicySettings
from penstock.reply import Reply
from penstock.state import StateUnavailableError
from penstock.state.local import LocalState
from penstock.state.tables import Tables
from penstock.transaction import Transaction
from tests.policy.judging import count_in, counted, make_message, make_parts, make_transaction, path_of
from tests.state.clock import Clock


class Limits:
    """A judge with rate limits only, as a server asks it."""

    def __init__(self, *rates: dict[str, Any], mode: str = "enforce", state: Any = None) -> None:
        settings = msgspec.convert({"mode": mode, "rate": list(rates)}, PolicySettings)
        self.clock = Clock()
        state = state or LocalState(Path("unused"), pytest.fail, tables=Tables(self.clock))
        self.checks = make_checks(settings, make_parts(state=state))
        journal = Journal(JournalSettings())
        self.counters = count_in(journal)
        self.judge = Judge(settings, self.checks, journal)

    async def rcpt(self, transaction: Transaction, address: str = "bob@example.org") -> Reply | None:
        recipient = Recipient(path_of(address))
        reply = await self.judge.on_rcpt(transaction, recipient)
        if reply is None:
            transaction.recipients.append(recipient)
        else:
            self.judge.refused(transaction, "on_rcpt")
        return reply

    async def send(
        self,
        sender: str = "alice@example.com",
        *recipients: str,
        accepted: bool = True,
        size: int = 100,
        **client: Any,
    ) -> int:
        """Send a message; return the code of the reply, 250 for an acceptance by these checks."""
        transaction = make_transaction(sender, **client)
        transaction.sender = path_of(sender) if sender else NULL_PATH
        transaction.recipients = []
        for recipient in recipients or ("bob@example.org",):
            refusal = await self.rcpt(transaction, recipient)
        if not transaction.recipients:
            assert refusal is not None
            return refusal.code
        message = make_message(transaction, b"x" * size)
        reply, message = await self.judge.on_message(transaction, message)
        if reply is not None:
            self.judge.refused(transaction, "on_message")
            return reply.code
        self.judge.answered(
            transaction, message, Reply(250, "2.0.0", "Ok") if accepted else Reply(452, "4.3.1", "Full")
        )
        return 250


def rule(*by: str, count: str = "messages", limit: str = "2/h", **more: Any) -> dict[str, Any]:
    return {"by": list(by), "count": count, "limit": limit, **more}


async def test_messages_are_limited_by_network() -> None:
    limits = Limits(rule("network"))
    assert [await limits.send() for _ in range(3)] == [250, 250, 450]
    assert await limits.send(address="198.51.100.2") == 250
    assert [await limits.send(address=f"2001:db8::{number}") for number in range(1, 4)] == [250, 250, 450]
    limits.clock.advance(1801)
    assert [await limits.send() for _ in range(2)] == [250, 450]


@pytest.mark.parametrize(
    ("key", "same", "other"),
    [
        ("sender", "ALICE@example.com", "carol@example.com"),
        ("sender_domain", "carol@example.com", "alice@example.net"),
    ],
)
async def test_messages_are_limited_by_sender(key: str, same: str, other: str) -> None:
    limits = Limits(rule(key))
    assert [await limits.send(each) for each in ("alice@example.com", same, same, other)] == [250, 250, 450, 250]


async def test_combined_keys_have_limits_of_their_own() -> None:
    limits = Limits(rule("network", "sender", limit="1/h"))
    assert await limits.send("a@example.com") == 250
    assert await limits.send("b@example.com") == 250
    assert await limits.send("a@example.com", address="198.51.100.9") == 250
    assert await limits.send("a@example.com") == 450


async def test_recipients_are_counted() -> None:
    limits = Limits(rule("network", count="recipients", limit="3/h"))
    transaction = make_transaction()
    transaction.recipients = []
    codes = [await limits.rcpt(transaction, f"u{number}@example.org") for number in range(5)]
    assert [code is None for code in codes] == [True, True, True, False, False]
    assert await limits.send("a@example.com", "u1@example.org", "u2@example.org") == 250
    assert await limits.send("a@example.com", "u1@example.org", "u2@example.org", "u3@example.org") == 250, (
        "one of them"
    )
    assert await limits.send() == 450


async def test_messages_are_limited_by_recipient() -> None:
    limits = Limits(rule("recipient", limit="1/h"))
    assert await limits.send("a@example.com", "bob@example.org") == 250
    assert await limits.send("a@example.com", "BOB@example.org") == 450
    assert await limits.send("a@example.com", "bob@example.org", "eve@example.org") == 250, "for eve"
    assert await limits.send("a@example.com", "joe@example.org", "joe@example.org") == 250, "who counts once"
    assert await limits.send("a@example.com", "eve@example.org") == 450


async def test_octets_are_counted() -> None:
    limits = Limits(rule("network", count="octets", limit="1000/h"))
    assert [await limits.send(size=400) for _ in range(3)] == [250, 250, 450]
    assert await limits.send(size=200) == 250
    assert await limits.send(size=10_000, address="198.51.100.2") == 250, "larger than the limit, which it uses up"
    assert await limits.send(size=1, address="198.51.100.2") == 450


async def test_null_senders_are_counted_alone() -> None:
    limits = Limits(rule("network", count="null_senders", limit="1/h"))
    assert [await limits.send("") for _ in range(2)] == [250, 450]
    assert await limits.send() == 250


async def test_connections_are_limited_before_the_greeting() -> None:
    limits = Limits(rule("network", count="connections"))
    replies = [await limits.judge.on_connect(make_transaction()) for _ in range(3)]
    assert replies[:2] == [None, None]
    assert replies[2] is not None
    assert (replies[2].code, replies[2].closes) == (421, True)


async def test_refusals_of_others_are_counted() -> None:
    limits = Limits(rule("network", count="refused"))
    assert await limits.send(accepted=False) == 250
    for _ in range(5):
        assert await limits.send() == 250
    limits.judge.refused(make_transaction(), "on_rcpt")
    assert [await limits.send() for _ in range(3)] == [450] * 3
    limits.clock.advance(1801)
    assert await limits.send() == 250, "its own refusals do not count"


async def test_what_is_refused_later_does_not_count() -> None:
    limits = Limits(rule("network"), rule("sender", limit="100/h"))
    for _ in range(5):
        assert await limits.send(accepted=False) == 250
    assert [await limits.send() for _ in range(3)] == [250, 250, 450]


async def test_a_message_that_breaks_one_limit_takes_nothing_of_others() -> None:
    limits = Limits(rule("network", limit="1/h"), rule("sender", limit="2/h"))
    assert await limits.send() == 250
    for _ in range(5):
        assert await limits.send() == 450
    assert await limits.send(address="198.51.100.2") == 250
    assert await limits.send(address="198.51.100.3") == 450


async def test_authenticated_users_have_rules_of_their_own() -> None:
    limits = Limits(rule("network"), rule("identity"))
    for _ in range(2):
        assert await limits.send(identity="alice") == 250
    assert await limits.send(identity="Alice") == 450
    assert await limits.send(identity="bob") == 250
    assert [await limits.send() for _ in range(3)] == [250, 250, 450]


async def test_monitored_limits_refuse_nothing() -> None:
    limits = Limits(rule("network"), mode="monitor")
    assert [await limits.send() for _ in range(5)] == [250] * 5
    would = counted(limits.counters, "policy_would_total")
    assert would == {'{check="rate",verdict="defer"}': 6}, "at RCPT and at the end of three messages"
    limits = Limits(rule("network", limit="1/h", mode="monitor"), rule("network", limit="2/h", mode="enforce"))
    assert [await limits.send() for _ in range(3)] == [250, 250, 450]


async def test_without_the_state_mail_is_accepted() -> None:
    class Gone:
        def available(self, _: object) -> int:
            raise StateUnavailableError

        take = available

    class Late(Gone):
        async def available(self, _: object) -> int:  # type: ignore[override]
            raise StateUnavailableError

        take = available  # type: ignore[assignment]

    for state in (Gone(), Late()):
        limits = Limits(rule("network"), state=state)
        assert [await limits.send() for _ in range(5)] == [250] * 5


def test_a_limit_that_is_off_is_no_check() -> None:
    assert Limits(rule("network", mode="off")).checks == []
    assert isinstance(Limits(rule("network")).checks[0], Check)
