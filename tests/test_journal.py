"""The journal: one line for each event, escaped and bounded."""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import journal as module
from penstock.journal import Journal, JournalSettings, _fields, escape
from penstock.message import MessageId, Path, Recipient
from penstock.reply import OK, Reply
from penstock.transaction import Peer, TlsInfo

PEER = Peer("192.0.2.1", 4711)


def path(text: str) -> Path:
    return Path(text, text, "")


def fill(journal: Journal, text: str) -> None:
    """Record one event of each kind, with a text from a client."""
    journal.listening("127.0.0.1:25", "main")
    journal.connected(1, PEER, "main")
    journal.rejected_connection(2, PEER, "main", Reply(421, "4.3.2", "Busy", cause=text))
    journal.tls(1, PEER, TlsInfo("TLSv1.3", text, 256))
    journal.authenticated(1, PEER, text, "PLAIN")
    journal.auth_failed(1, PEER, text, "PLAIN", text)
    journal.refused(1, PEER, "RCPT", Reply(550, "5.1.1", "No", cause=text), path(text), text)
    journal.accepted(1, PEER, MessageId("ABC"), path(text), [Recipient(path(f"{text}{i}")) for i in range(12)], 10, OK)
    journal.lost(1, PEER, path(text), text)
    journal.hook_failed("a:b", "on_mail", text)
    try:
        raise ValueError(text)
    except ValueError as exc:
        journal.error(1, "connection", exc)
    journal.disconnected(1, PEER, 1, 0, 100, 0.5, "QUIT")
    journal.stopping(3)
    journal.stopped()


EVENTS = [
    "listening", "connected", "rejected", "tls", "authenticated", "auth-failed", "refused", "accepted", "lost",
    "hook-failed", "error", "disconnected", "stopping", "stopped",
]  # fmt: skip


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("first", [1, 255 * 10**12])
def test_a_part_of_the_sessions_is_logged_as_a_whole(part: float, first: int) -> None:
    journal = Journal(JournalSettings(format="json", sessions=part))
    for session in range(first, first + 1000):
        journal.connected(session, PEER, "main")
        journal.accepted(session, PEER, MessageId("ABC"), path("a"), [Recipient(path("b"))], 10, OK)
        journal.disconnected(session, PEER, 1, 0, 100, 0.5, "QUIT")
    events = [json.loads(line) for line in journal.drain().splitlines()]
    sessions = {kind: [each["session"] for each in events if each["event"] == kind] for kind in EVENTS}
    assert sessions["connected"] == sessions["disconnected"]
    assert len(sessions["connected"]) == pytest.approx(1000 * part, abs=3)
    assert len(sessions["accepted"]) == 1000


@given(st.text(max_size=300))
def test_client_text_cannot_break_a_line_or_move_the_cursor(text: str) -> None:
    for form in ("human", "json"):
        journal = Journal(JournalSettings(format="human" if form == "human" else "json"))
        fill(journal, text)
        lines = journal.drain().decode().split("\n")
        assert lines.pop() == ""
        assert len(lines) == len(EVENTS)
        for line in lines:
            assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn") for c in line), line


def test_json_lines_have_their_fields() -> None:
    journal = Journal(JournalSettings(format="json"), clock=lambda: 1_700_000_000.25)
    fill(journal, "x\r\ny")
    records = [json.loads(line) for line in journal.drain().splitlines()]
    assert [record["event"] for record in records] == EVENTS
    accepted = records[EVENTS.index("accepted")]
    assert accepted["time"] == "2023-11-14T22:13:20.250Z"
    assert accepted["from"] == r"x\r\ny"
    assert len(accepted["to"]) == 10
    assert accepted["recipients"] == 12
    refused = records[EVENTS.index("refused")]
    assert refused["reply"] == "550 5.1.1 No"
    assert refused["cause"] == r"x\r\ny"
    error = records[EVENTS.index("error")]
    assert error["error"] == r"ValueError: x\r\ny"
    assert "test_journal.py" in error["trace"][-1]


def test_client_text_cannot_forge_fields() -> None:
    journal = Journal(JournalSettings(format="human"))
    journal.lost(1, PEER, path('"a> peer=<b c"@example.org'), 'gone" reply="250 ok \\')
    line = journal.drain().decode().rstrip("\n")
    assert line.partition(" peer=")[2] == (
        r'192.0.2.1 from=<"a\x3e\x20peer=\x3cb\x20c"@example.org> cause="gone\" reply=\"250 ok \\"'
    )


@given(st.text(max_size=260), st.integers(0, 12), st.floats(0, 1e6))
def test_compiled_lines_equal_those_of_the_python_code(text: str, count: int, seconds: float) -> None:
    lines = []
    for peer in (PEER, PEER._replace(proxy="192.0.2.9")):  # with a proxy, the Python code formats the line
        journal = Journal(JournalSettings(format="json"), clock=lambda: 1_700_000_000.25)
        journal.connected(1, peer, text)
        for sender in (path(text), path("a@b"), path(""), None):
            for reply in (OK, OK.because(text), Reply(354, None, "Go")):
                journal.accepted(1, peer, MessageId("A"), sender, [Recipient(path(text))] * count, 3, reply)
        journal.accepted(1, peer, MessageId("A"), path("a@b"), [Recipient(path("c@d"))] * count, 3, OK)
        journal.disconnected(1, peer, 1, 0, 100, seconds, "QUIT")
        for score in (0, 2.5, -0.0, seconds, -seconds, 1e300, math.inf, math.nan):
            journal.judged(1, peer, "A", "accept", score, "spf=pass,dkim=pass:example.org")
        journal.judged(1, peer, "A", "accept", 0, text)
        lines.append([json.loads(line) for line in journal.drain().splitlines()])
    for compiled, general in zip(*lines, strict=True):
        assert general.pop("proxy") == "192.0.2.9"
        assert compiled == general


@given(st.text(max_size=260), st.integers(1, 12), st.floats(0, 1e6))
def test_compiled_relay_lines_equal_those_of_the_python_code(text: str, count: int, seconds: float) -> None:
    values = [(MessageId("A"), [Recipient(path(text))] * count, "mx:25", "250 Ok", 3, round(seconds, 3))]
    values += [(MessageId("A"), [Recipient(path("c@d"))] * count, hop, text, 1, 0.0) for hop in ("mx:25", "", text)]
    journal = Journal(JournalSettings(format="json"), clock=lambda: 1_700_000_000.25)
    for each in values:
        journal.delivered(*each)
    head = {"time": "2023-11-14T22:13:20.250Z", "event": "delivered"}
    lines = [json.loads(line) for line in journal.drain().splitlines()]
    assert lines == [{**head, **_fields("delivered", 0, None, each)} for each in values]


def test_every_relay_event_has_a_line() -> None:
    journal = Journal(JournalSettings(format="human"))
    to = [Recipient(path("bob@example.org"))]
    journal.recovered(5, 2, 1)
    journal.attempted("A", to, "mx:25", 2)
    journal.delivered("A", to, "mx:25", "250 Ok", 2, 61.5)
    journal.deferred("A", to, "mx:25", "450 Busy", 2, 300.4)
    journal.bounced("A", to, "mx:25", "550 No", 2, "sent")
    journal.reported("B", "A", "failed", path("a@example.com"))
    lines = [line.split(maxsplit=1)[1] for line in journal.drain().decode().splitlines()]
    bob = "to=<bob@example.org> recipients=1 hop=mx:25"
    assert lines == [
        "recovered     messages=5 interrupted=2 swept=1",
        f"attempted     id=A {bob} attempts=2",
        f'delivered     id=A {bob} reply="250 Ok" attempts=2 seconds=61.5',
        f'deferred      id=A {bob} reply="450 Busy" attempts=2 wait=300',
        f'bounced       id=A {bob} reply="550 No" attempts=2 report=sent',
        "reported      id=B about=A action=failed sender=a@example.com",
    ]


def test_auto_is_human_on_a_terminal() -> None:
    for is_terminal, first in ((True, b"0123456789"), (False, b"{")):
        journal = Journal(JournalSettings(), is_terminal=is_terminal)
        journal.stopped()
        assert journal.drain()[:1] in [bytes([octet]) for octet in first]


@pytest.mark.parametrize(("events", "count"), [("all", len(EVENTS)), ("mail", 8), ("errors", 2), ("none", 0)])
def test_events_are_filtered_by_the_setting(events: Literal["all", "mail", "errors", "none"], count: int) -> None:
    journal = Journal(JournalSettings(events=events))
    fill(journal, "x")
    assert len(journal.drain().splitlines()) == count


def test_an_undrained_journal_is_bounded_and_reports_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING", 10)
    journal = Journal(JournalSettings(format="json"))
    for _ in range(25):
        journal.stopped()
    lines = journal.drain().splitlines()
    assert len(lines) == 11
    assert json.loads(lines[-1])["events"] == 15
    assert journal.drain() == b""


def test_long_values_are_cut() -> None:
    assert len(escape("x" * 1000)) == 256
    assert escape("a\\b") == "a\\\\b"
    assert escape("\u202e\x1b[31m") == r"\u202e\x1b[31m"
