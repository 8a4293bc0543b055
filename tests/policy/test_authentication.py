"""The watcher of arriving messages: any split of the text gives the same, and its memory is bounded."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Literal

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.dns import Answer, Resolver
from penstock.journal import Journal, JournalSettings
from penstock.mailauth import DecisionSettings
from penstock.mailauth.spf import SpfResult
from penstock.message import NULL_PATH, MailParameters
from penstock.message import Path as MailPath
from penstock.policy.authentication import Authentication
from penstock.policy.check import Parts
from penstock.policy.pipeline import Pipeline
from penstock.transaction import Peer, Transaction
from tests.dns.lying import Lying, resolving
from tests.mailauth.test_dkim import BODY, HEAD, NOW, sign
from tests.policy.judging import HEADER, PREFIX, TEXT, judge_with, make_message, make_transaction, octets_of

FORGED = b"Authentication-Results: mx.example.org; dmarc=pass\r\n"
CLIENT = Transaction(Peer("192.0.2.1", 25))


def authentication(settings: DecisionSettings | None = None, resolver: Resolver | None = None) -> Authentication:
    parts = Parts("mx.example.org", resolver or Resolver(), Journal(JournalSettings()), Path(), lambda _: True)
    return Authentication(settings or DecisionSettings(), parts, clock=lambda: NOW)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_any_split_gives_the_same_header_and_hashes(sizes: list[int]) -> None:
    text = sign() + b"\r\n" + BODY
    watcher = authentication().on_data(CLIENT)
    at = turn = 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        watcher.feed(text[at : at + size])
        at, turn = at + size, turn + 1
    check = watcher.finish()
    assert check.header.octets == sign()
    check._hashes.finish()
    digest, _ = check._hashes.digest(relaxed=True)
    whole = authentication().on_data(CLIENT)
    whole.feed(text)
    other = whole.finish()
    other._hashes.finish()
    assert other._hashes.digest(relaxed=True)[0] == digest


@pytest.mark.parametrize(
    ("text", "header"),
    [
        (b"\r\nonly a body\r\n", b""),
        (b"", b""),
        (b"Subject: no body\r\n", b"Subject: no body\r\n"),
        (HEAD + b"\r\n", HEAD),
    ],
)
def test_texts_without_header_or_body_are_read(text: bytes, header: bytes) -> None:
    for size in (1, 1000):
        watcher = authentication().on_data(CLIENT)
        for at in range(0, len(text), size):
            watcher.feed(text[at : at + size])
        assert watcher.finish().header.octets == header


def test_a_header_without_end_is_cut_and_said_to_be_too_long() -> None:
    watcher = authentication().on_data(CLIENT)
    for _ in range(40):
        watcher.feed(b"X-Filler: " + b"x" * 9000 + b"\r\n")
    assert watcher.is_too_long
    assert len(watcher.finish().header.octets) < 300_000


def test_headers_of_all_messages_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.policy.authentication._MAX_HELD", 1000)
    check = authentication()
    first, second = check.on_data(CLIENT), check.on_data(CLIENT)
    first.feed(b"X: " + b"x" * 700)
    second.feed(b"X: " + b"x" * 700)
    with pytest.raises(MemoryError):
        second.finish()
    first.close()
    second.close()
    second.close()
    assert check.held == 0
    third = check.on_data(CLIENT)
    third.feed(b"X: " + b"x" * 700 + b"\r\n\r\nbody\r\n")
    assert third.finish().header.octets


def test_long_headers_do_not_take_the_check_from_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.policy.authentication._MAX_HELD", 1_000_000)
    check = authentication()
    for _ in range(20):
        check.on_data(CLIENT).feed(b"X: " + b"x" * 100_000)  # never ends
    assert check.held <= 500_000, "what was given up is given back"
    watcher = check.on_data(CLIENT)
    watcher.feed(sign() + b"\r\n" + BODY)
    assert watcher.finish().authors == ("example.com",)


@pytest.mark.parametrize("mode", ["monitor", "enforce"])
async def test_a_failure_of_the_check_refuses_only_where_it_enforces(
    mode: Literal["monitor", "enforce"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.policy.authentication._MAX_HELD", 10)
    check = authentication(DecisionSettings(dmarc=mode))
    judge, journal = judge_with(check)
    transaction = make_transaction()
    header = FORGED + HEADER
    watcher = judge.begin(transaction)
    assert watcher is not None
    watcher.feed(header)
    reply, message = await judge.on_message(transaction, make_message(transaction, header + b"\r\n" + TEXT))
    assert journal.drain().count(b'"hook":"authentication"') == 1
    if mode == "enforce":
        assert reply is not None
        assert reply.code == 451
    else:
        assert reply is None
        assert octets_of(message) == PREFIX + HEADER + b"\r\n" + TEXT, "a forged field is left out nevertheless"


@pytest.mark.parametrize("client", [{"address": "127.0.0.1"}, {"identity": "alice"}, {"address": ""}])
async def test_forged_results_of_clients_that_are_not_judged_are_left_out(client: dict[str, str]) -> None:
    judge = judge_with(authentication())[0]
    foreign = b"Authentication-Results: mx.example.net; spf=fail\r\n"
    transaction = make_transaction(**client)
    message = make_message(transaction, foreign + FORGED + HEADER + b"\r\n" + TEXT, piece=50)
    reply, message = await judge.on_message(transaction, message)
    assert reply is None
    assert octets_of(message) == PREFIX + foreign + HEADER + b"\r\n" + TEXT
    pipeline = Pipeline((), Journal(JournalSettings()), judge).unjudged
    assert pipeline.message, "that of listeners that are not judged"
    again = make_message(transaction, FORGED + HEADER + b"\r\n" + TEXT)
    assert octets_of((await pipeline.on_message(transaction, again))[1]) == PREFIX + HEADER + b"\r\n" + TEXT


@pytest.mark.parametrize("client", [{"address": "127.0.0.1"}, {"identity": "alice"}])
@pytest.mark.parametrize("text", [b"no header at all\r\n", b" From: folded\r\n\r\nx\r\n", b"\r\ntext\r\n", b""])
async def test_a_message_without_a_header_is_accepted(client: dict[str, str], text: bytes) -> None:
    judge = judge_with(authentication())[0]
    transaction = make_transaction(**client)
    separated = make_message(transaction, text)._replace(prefix=PREFIX + b"\r\n")  # as the server joins them
    reply, message = await judge.on_message(transaction, separated)
    assert reply is None
    assert octets_of(message) == PREFIX + b"\r\n" + text


async def test_a_sender_with_u_labels_is_shown_with_a_labels() -> None:
    async with resolving(Lying()) as resolver:
        judge = judge_with(authentication(resolver=resolver))[0]
        transaction = make_transaction()
        transaction.sender = MailPath("a@bücher.example", "a", "xn--bcher-kva.example")
        transaction.results.spf = SpfResult("fail", "xn--bcher-kva.example", "mailfrom")
        watcher = judge.begin(transaction)
        assert watcher is not None
        watcher.feed(HEADER + b"\r\n" + TEXT)
        _, message = await judge.on_message(transaction, make_message(transaction))
    assert b"smtp.mailfrom=a@xn--bcher-kva.example;" in octets_of(message)


@pytest.mark.parametrize("address", ["198.51.100.1", "127.0.0.1"])
async def test_a_header_too_long_to_be_read_is_refused_in_every_mode(address: str) -> None:
    async with resolving(Lying()) as resolver:
        judge = judge_with(authentication(resolver=resolver))[0]
        transaction = make_transaction(address=address)
        header = (b"X-Filler: " + b"x" * 9000 + b"\r\n") * 200 + FORGED
        watcher = judge.begin(transaction)
        if watcher is not None:
            for at in range(0, len(header), 65_536):
                watcher.feed(header[at : at + 65_536])
        reply, _ = await judge.on_message(transaction, make_message(transaction, header + b"\r\n" + TEXT))
    assert reply is not None
    assert (reply.code, reply.status) == (550, "5.6.0")


async def test_mail_waits_five_seconds_for_a_silent_dns_in_monitor_mode(autojump_clock: trio.testing.MockClock) -> None:
    class Silent(Resolver):
        async def query(self, name: str, kind: str, seconds: float = 0, **_: int) -> Answer:
            await trio.sleep(seconds)
            return Answer("failed", name=name)

        async def query_all(self, questions: Sequence[tuple[str, str]], seconds: float = 0) -> list[Answer]:
            return [await self.query(*each, seconds) for each in questions[:1]]

    check = authentication(resolver=Silent())
    began = trio.current_time()
    transaction = make_transaction()
    asked = check.on_mail(transaction, transaction.sender or NULL_PATH, MailParameters())
    assert isinstance(asked, Awaitable)
    await asked
    assert trio.current_time() - began == pytest.approx(5)
    judge = judge_with(check)[0]
    watcher = judge.begin(transaction)
    assert watcher is not None
    watcher.feed(sign() + b"\r\n" + BODY)
    assert (await judge.on_message(transaction, make_message(transaction)))[0] is None
    assert trio.current_time() - began == pytest.approx(10)


async def test_questions_are_asked_ahead_until_the_message_is_given_up() -> None:
    asked: list[tuple[str, str]] = []
    ended: list[str] = []

    class Asked(Resolver):
        async def query_all(self, questions: Sequence[tuple[str, str]], seconds: float = 0) -> list[Answer]:
            asked.extend(questions)
            try:
                await trio.sleep_forever()
            finally:
                ended.extend(name for name, _ in questions)
            raise AssertionError

    check = authentication(resolver=Asked())
    async with trio.open_nursery() as nursery:
        await nursery.start(check.run)
        watcher = check.on_data(CLIENT)
        watcher.feed(sign() + b"\r\nthe first piece\r\n")
        await trio.testing.wait_all_tasks_blocked()
        assert asked == [], "a message in one piece asks at its end"
        watcher.feed(b"the second piece\r\n")
        await trio.testing.wait_all_tasks_blocked()
        assert (watcher.budget is not None, ended) == (True, [])
        watcher.close()  # the message was given up
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(ended) == ["_dmarc.example.com", "s1._domainkey.example.com"]
        nursery.cancel_scope.cancel()
    assert sorted(asked) == [("_dmarc.example.com", "TXT"), ("s1._domainkey.example.com", "TXT")]
