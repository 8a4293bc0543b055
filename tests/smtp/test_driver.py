"""What a driver of the session decides itself."""

from __future__ import annotations

import pytest

from penstock import reply as replies
from penstock.reply import Reply
from penstock.smtp._wire import Wire
from penstock.smtp.events import CLOSED, NEED_DATA, TURN_OVER, BeginData, BodyChunk, Command, MessageAborted, Rcpt
from penstock.smtp.extensions import Extensions
from penstock.smtp.server import (
    AUTO_ACCEPT_HELLO,
    AUTO_ACCEPT_MAIL,
    AUTO_ACCEPT_RCPT,
    INTERCEPTABLE_VERBS,
    ServerSession,
)
from penstock.transaction import Peer, Transaction

AUTO_ACCEPT = AUTO_ACCEPT_HELLO | AUTO_ACCEPT_MAIL | AUTO_ACCEPT_RCPT


def session_of(auto_accept: int = 0) -> ServerSession:
    session = ServerSession(Extensions(), Wire(), Transaction(Peer("192.0.2.1", 1)), auto_accept)
    session.greet()
    session.take_output()
    return session


@pytest.mark.parametrize("line", [b"NOOP", b"RSET", b"HELP", b"VRFY bob", b"EXPN list"])
def test_an_intercepted_command_is_executed_as_usual(line: bytes) -> None:
    plain, asked = session_of(), session_of()
    asked.intercepted_verbs = INTERCEPTABLE_VERBS
    for session in (plain, asked):
        session.receive(line + b"\r\n")
    assert plain.next_event() is NEED_DATA
    event = asked.next_event()
    assert event == Command(line[:4].decode(), line[5:])
    assert asked.execute() is None
    assert asked.next_event() is NEED_DATA
    assert asked.take_output() == plain.take_output()


def test_an_intercepted_command_may_be_refused() -> None:
    session = session_of()
    session.intercepted_verbs = INTERCEPTABLE_VERBS
    session.receive(b"NOOP\r\nRSET\r\n")
    session.next_event()
    session.reply(Reply(450, "4.3.0", "Not now"))
    session.next_event()
    session.reply(replies.SHUTTING_DOWN)
    assert session.next_event() is CLOSED
    assert session.take_output() == b"450 4.3.0 Not now\r\n" + replies.SHUTTING_DOWN.encoded


def test_an_executed_rset_reports_the_text_it_has_ended() -> None:
    session = session_of(AUTO_ACCEPT)
    session.intercepted_verbs = INTERCEPTABLE_VERBS
    session.receive(b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nBDAT 1\r\nxRSET\r\n")
    assert isinstance(session.next_event(), BeginData)
    session.reply(replies.GO_AHEAD_DATA)
    assert isinstance(session.next_event(), BodyChunk)
    assert isinstance(session.next_event(), Command)
    assert isinstance(session.execute(), MessageAborted)
    assert session.transaction.sender is None


def test_only_a_command_is_executed() -> None:
    session = session_of()
    with pytest.raises(RuntimeError, match="no command"):
        session.execute()
    session.receive(b"EHLO c\r\n")
    session.next_event()
    with pytest.raises(RuntimeError, match="no command"):
        session.execute()


@pytest.mark.parametrize(
    ("recipient", "is_asked"),
    [(b"drop@d", True), (b"drop-x@d", True), (b"450-4.2.2@d", True), (b'"drop x"@d', True), (b"xdrop@d", False)],
)
def test_a_watched_recipient_becomes_an_event(recipient: bytes, is_asked: bool) -> None:
    session = session_of(AUTO_ACCEPT)
    session.watch(("drop", "4"))
    session.receive(b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<" + recipient + b">\r\n")
    event = session.next_event()
    assert isinstance(event, Rcpt) is is_asked
    if is_asked:
        session.reply(replies.RECIPIENT_OK)
    assert session.take_output().endswith(replies.RECIPIENT_OK.encoded)


def test_a_watched_prefix_begins_in_ascii() -> None:
    session = session_of(AUTO_ACCEPT)
    with pytest.raises(ValueError, match="begin with an ASCII character, not 'ü'"):
        session.watch(("ü",))
    session.watch(None)
    session.receive(b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<drop@d>\r\n")
    assert session.next_event() is NEED_DATA


def test_costly_commands_make_a_turn_shorter() -> None:
    def commands_of_a_turn(mail: str) -> int:
        session = session_of(AUTO_ACCEPT)
        session.turn_limit = 16
        session.receive(b"EHLO c\r\n" + f"{mail}\r\nRSET\r\n".encode() * 16)
        assert session.next_event() is TURN_OVER
        return session.commands

    assert commands_of_a_turn("MAIL FROM:<a@example.org>") == 16
    assert commands_of_a_turn("MAIL FROM:<a@b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.example> SMTPUTF8") < 8
