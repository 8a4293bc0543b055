"""The watcher of arriving messages: any split of the text gives the same, and its memory is bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.dns import Resolver
from penstock.journal import Journal, JournalSettings
from penstock.mailauth import DecisionSettings
from penstock.policy.authentication import Authentication
from penstock.policy.check import Parts
from penstock.transaction import Peer, Transaction
from tests.mailauth.test_dkim import BODY, HEAD, NOW, sign

CLIENT = Transaction(Peer("192.0.2.1", 25))


def authentication() -> Authentication:
    parts = Parts("mx.example.org", Resolver(), Journal(JournalSettings()), Path(), lambda _: True)
    return Authentication(DecisionSettings(), parts, clock=lambda: NOW)


@settings(max_examples=50, deadline=None)
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


async def test_questions_are_asked_ahead_when_the_body_takes_time() -> None:
    asked: list[tuple[str, str]] = []

    class Asked(Resolver):
        async def query(self, name: str, kind: str, seconds: float = 0) -> None:  # type: ignore[override]
            asked.append((name, kind))

    parts = Parts("mx.example.org", Asked(), Journal(JournalSettings()), Path(), lambda _: True)
    check = Authentication(DecisionSettings(), parts, clock=lambda: NOW)
    async with trio.open_nursery() as nursery:
        await nursery.start(check.run)
        watcher = check.on_data(CLIENT)
        watcher.feed(sign() + b"\r\nthe first piece\r\n")
        await trio.testing.wait_all_tasks_blocked()
        assert asked == [], "a message in one piece asks at its end"
        watcher.feed(b"the second piece\r\n")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert sorted(asked) == [("_dmarc.example.com", "TXT"), ("s1._domainkey.example.com", "TXT")]
