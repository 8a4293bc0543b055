"""Greylisting: whose attempts are the same, and who is greylisted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.journal import Journal, JournalSettings
from penstock.mailauth.spf import SpfResult
from penstock.message import NULL_PATH, Recipient
from penstock.policy.base import Mark
from penstock.policy.evidence import evidence_of
from penstock.policy.greylist import make_checks, make_key, wide_network
from penstock.policy.judge import Judge
from penstock.policy.settings import PolicySettings
from penstock.results import IprevResult
from penstock.state import StateUnavailableError
from penstock.state.local import LocalState
from penstock.state.tables import Tables
from penstock.transaction import Transaction
from tests.policy.judging import make_parts, make_transaction, path_of
from tests.state.clock import Clock


class Greylist:
    def __init__(self, state: Any = None, **settings: Any) -> None:
        table = {"mode": "enforce", "greylist": {"when": "always", **settings}}
        policy = msgspec.convert(table, PolicySettings)
        self.clock = Clock()
        state = state or LocalState(Path("unused"), pytest.fail, tables=Tables(self.clock))
        self.judge = Judge(policy, make_checks(policy, make_parts(state=state)), Journal(JournalSettings()))

    async def code(self, transaction: Transaction | None = None, recipient: str = "bob@example.org") -> int:
        reply = await self.judge.on_rcpt(transaction or make_transaction(), Recipient(path_of(recipient)))
        return 250 if reply is None else reply.code


def with_spf(result: Any, domain: str = "example.com", **client: Any) -> Transaction:
    transaction = make_transaction(**client)
    transaction.results.spf = SpfResult(result, domain, "mailfrom")
    return transaction


async def test_an_attempt_is_known_by_network_sender_and_recipient() -> None:
    greylist = Greylist()
    assert await greylist.code() == 451
    greylist.clock.advance(61)
    assert await greylist.code(make_transaction(address="198.51.100.200")) == 250
    assert await greylist.code(make_transaction("ALICE@example.com"), "BOB@example.org") == 250
    assert await greylist.code(make_transaction(address="198.51.101.1")) == 451
    assert await greylist.code(make_transaction("carol@example.com")) == 451
    assert await greylist.code(recipient="eve@example.org") == 451
    bounce = make_transaction()
    bounce.sender = NULL_PATH
    assert await greylist.code(bounce) == 451


async def test_an_authenticated_domain_is_known_from_every_network() -> None:
    greylist = Greylist()
    assert await greylist.code(with_spf("pass")) == 451
    greylist.clock.advance(61)
    assert await greylist.code(with_spf("pass", address="192.0.2.1"), "other@example.org") == 250
    assert await greylist.code(with_spf("pass", "example.net")) == 451
    assert await greylist.code(with_spf("fail")) == 451


async def test_the_reply_has_the_time_to_wait() -> None:
    greylist = Greylist(delay="5m")
    recipient = Recipient(path_of("bob@example.org"))
    assert await greylist.code() == 451
    greylist.clock.advance(100.5)
    reply = await greylist.judge.on_rcpt(make_transaction(), recipient)
    assert reply is not None
    assert reply.encoded == b"451 4.7.1 Greylisted, please try again in 200 seconds\r\n"


@pytest.mark.parametrize(
    ("change", "is_greylisted"),
    [
        (lambda _: None, False),
        (lambda transaction: transaction.results.scores.update(x=2.0), True),
        (lambda transaction: transaction.results.scores.update(x=1.9), False),
        (lambda transaction: evidence_of(transaction).keep_mark("x", Mark(score=2), is_monitored=False), True),
        (lambda transaction: evidence_of(transaction).keep_mark("x", Mark(score=2), is_monitored=True), False),
        (lambda transaction: setattr(transaction.results, "iprev", IprevResult("fail")), True),
        (lambda transaction: setattr(transaction.results, "iprev", IprevResult("temperror")), False),
        (lambda transaction: setattr(transaction.results, "spf", SpfResult("none", "", "helo")), True),
        (lambda transaction: setattr(transaction.results, "spf", None), True),
    ],
)
async def test_only_suspicious_clients_are_greylisted_by_default(change: Any, is_greylisted: bool) -> None:
    greylist = Greylist(when="suspicious")
    transaction = with_spf("pass")
    change(transaction)
    assert await greylist.code(transaction) == (451 if is_greylisted else 250)


async def test_trusted_and_authenticated_clients_are_not_greylisted() -> None:
    greylist = Greylist()
    assert await greylist.code(make_transaction(identity="alice")) == 250
    assert await greylist.code(make_transaction(address="127.0.0.1")) == 250


async def test_without_the_state_mail_is_accepted() -> None:
    class Gone:
        def greylist(self, *_: object) -> int:
            raise StateUnavailableError

    class Late:
        async def greylist(self, *_: object) -> int:
            raise StateUnavailableError

    for state in (Gone(), Late()):
        assert await Greylist(state).code() == 250


def test_keys_are_short_whatever_clients_send() -> None:
    keys = [make_key("network", text) for text in ("a" * 1000, "ä", "\udcff", "ä" * 5000, "a")]
    assert len(set(keys)) == 5
    assert all(len(key) < 200 and key.isascii() and key.startswith("network\0") for key in keys)
    assert wide_network("2001:db8:1:2:3::4") == "2001:db8:1:2::/64"
    assert wide_network("192.0.2.255") == "192.0.2.0/24"
