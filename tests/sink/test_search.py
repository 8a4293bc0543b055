"""The search of kept mail: everything a message says is found, and nothing that a query excludes."""

from __future__ import annotations

import time

import pytest

from penstock.sink.kept import KeptMessage
from penstock.sink.web.mime import Work
from penstock.sink.web.search import Query, QueryError
from tests.sink.mails import FORWARDED, INVITATION, NEWSLETTER, REPORT

MAIL = (
    b"From: =?utf-8?q?J=C3=BCrgen?= Smith <jurgen@example.com>\r\nTo: Bob Builder <bob@example.org>\r\n"
    b"Cc: Carol Copy <carol@example.net>\r\nSubject: =?utf-8?q?gr=C3=BC=C3=9Fe?= from\r\n here\r\n"
    b"Message-ID: <unique-17@example.com>\r\nX-Campaign: =?utf-8?q?summer_sale?=\r\n"
    b'Content-Type: text/html; charset=iso-8859-1; name="letter.html"\r\n\r\n'
    b"<p>k\xe4se <b>and</b>\r\n ham &amp; eggs</p>"
)
MESSAGES = [
    KeptMessage("mail", 1_764_417_600.0, "bounce@example.com", ("hidden@example.org",), len(MAIL), MAIL),
    KeptMessage("news", 1_764_417_600.0, "", ("b@example.org",), 2_000_000, NEWSLETTER, is_read=True),
    KeptMessage("forward", 1_700_000_000.0, "c@example.org", (), 500, FORWARDED),
    KeptMessage("report", 1_700_000_000.0, "", (), 1000, REPORT),
    KeptMessage("invitation", 1_700_000_000.0, "", (), 999, INVITATION),
    KeptMessage("bad", 1_700_000_000.0, "x\ud800", (), 4, b"\xff\xfe\r\n"),
]
ALL = [each.id for each in MESSAGES]


def found(query: str) -> list[str]:
    return [each.id for each in Query(query).find(MESSAGES, 100, Work())]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", ALL),
        ("JÜRGEN", ["mail"]),
        ("Jürgen smith", ["mail"]),
        ("from:smith", ["mail"]),
        ("from:bounce@", ["mail"]),
        ("from:bob", []),
        ("to:builder", ["mail"]),
        ("to:carol", ["mail"]),
        ("cc:carol", ["mail"]),
        ("cc:bob", []),
        ("to:hidden", ["mail"]),
        ("subject:grüsse", ["mail"]),
        ('"GRÜSSE from here"', ["mail"]),
        ('subject:"from here"', ["mail"]),
        ("unique-17@example.com", ["mail"]),
        ("message-id:unique-17", ["mail"]),
        ("summer sale", ["mail"]),
        ('"summer sale"', ["mail"]),
        ("x-campaign:", ["mail"]),
        ('"käse and ham & eggs"', ["mail"]),
        ('"ham käse"', []),
        ("attachment:letter", ["mail"]),
        ('filename:"a b.pdf"', ["news"]),
        ("logo.png", ["news"]),
        ("has:attachment", ["news", "forward"]),
        ("-has:attachment", ["mail", "report", "invitation", "bad"]),
        ("is:read", ["news"]),
        ("example.com -from:smith", ["news", "forward", "invitation"]),
        ('-"summer sale" from:example.com', ["news", "forward"]),
        ("-käse -news", ["forward", "report", "invitation", "bad"]),
        ("inner@example.net", ["forward"]),
        ("Final-Recipient", ["report"]),
        ("kick", ["invitation"]),
        ("https://tracker.example", ["news"]),
        ("size:>1M", ["news"]),
        ("size:<=500", ["mail", "forward", "bad"]),
        ("size:1k", ["report"]),
        ("size:>=1.5MB", ["news"]),
        ("before:2025-01-01", ["forward", "report", "invitation", "bad"]),
        ("after:2025-01-01 is:unread", ["mail"]),
        ("- -", ALL),
        ("nowhere", []),
    ],
)
def test_a_query_finds(query: str, names: list[str]) -> None:
    assert found(query) == names


def test_a_day_begins_at_midnight_in_the_time_zone_of_the_sink() -> None:
    at = time.mktime((2026, 11, 29, 0, 0, 0, 0, 0, -1))
    midnight = KeptMessage("m", at, "", (), 0, b"")
    for query, count in (
        ("after:2026-11-29", 1),
        ("before:2026-11-29", 0),
        ("before:2026-11-30", 1),
        ("after:2026-11-30", 0),
    ):
        assert len(Query(query).find([midnight], 1, Work())) == count, query


@pytest.mark.parametrize(
    ("query", "form"),
    [
        ("size:big", "size:>1M"),
        ("size:>", "size:>1M"),
        ("before:tomorrow", "before:2026-11-29"),
        ("after:99999", "after:2026-11-29"),
        ("has:cheese", "has:attachment"),
        ("is:new", "is:read or is:unread"),
        ("from: alice", "from:word"),
        ('-subject:""', "subject:word"),
        ("has:", "has:attachment"),
        ("x" * 201, "200 characters"),
    ],
)
def test_a_query_without_a_meaning_is_refused_with_the_right_form(query: str, form: str) -> None:
    with pytest.raises(QueryError, match=form):
        Query(query)


def test_html_with_an_endless_character_reference_is_searched() -> None:
    raw = b"Content-Type: text/html\r\n\r\n&#" + b"1" * 5000 + b"; &amp; more"
    assert len(Query('"& more"').find([KeptMessage("M1", 1.0, "", (), len(raw), raw)], 1, Work())) == 1


def test_a_search_ends_at_its_limit() -> None:
    assert len(Query("").find(MESSAGES, 2, Work())) == 2
    assert len(Query("example").find(MESSAGES, 1, Work())) == 1
