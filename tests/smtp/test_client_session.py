"""The client's role of the protocol without a socket: what is sent when, and what is never sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.smtp.client import CannotSendError, Credentials, ProtocolError, ReplyReader, ServerReply
from penstock.smtp.client_session import (
    BodyError,
    ClientSession,
    ClientTransaction,
    ClosingError,
    OpeningError,
    Step,
)

TEXT = b"the text of the message\r\n"


def feed(session: ClientSession, data: bytes) -> bytes:
    """Return what a session sends in reply to some octets."""
    session.receive_data(data)
    sent = b""
    while (reply := session.next_reply()) is not None:
        sent += session.handle(reply)
        transaction = session.transaction
        if transaction is not None and transaction.step is Step.TEXT:
            sent += transaction.begin_text() + transaction.feed_text(TEXT) + transaction.finish_text()
    return sent


def opened(offer: bytes = b"250 hop", **settings: object) -> ClientSession:
    session = ClientSession("me", **settings)  # type: ignore[arg-type]
    hello = b"LHLO me\r\n" if settings.get("lmtp") else b"EHLO me\r\n"
    assert feed(session, b"220 ready\r\n") == hello
    assert feed(session, b"250-hop\r\n" + offer + b"\r\n") == b""
    assert session.step is Step.READY
    return session


def transaction(recipients: int = 1, **settings: object) -> ClientTransaction:
    rcpts = [b"RCPT TO:<%d@x.org>\r\n" % n for n in range(recipients)]
    return ClientTransaction(b"MAIL FROM:<a@x.org>\r\n", rcpts, **settings)  # type: ignore[arg-type]


def test_each_command_waits_for_its_reply_without_pipelining() -> None:
    session = opened()
    each = transaction(2)
    assert session.begin(each) == b"MAIL FROM:<a@x.org>\r\n"
    assert feed(session, b"250 ok\r\n") == b"RCPT TO:<0@x.org>\r\n"
    assert feed(session, b"550 5.1.1 no\r\n") == b"RCPT TO:<1@x.org>\r\n"
    assert feed(session, b"250 ok\r\n") == b"DATA\r\n"
    assert feed(session, b"354 go\r\n") == TEXT + b".\r\n"
    assert each.is_in_doubt
    assert feed(session, b"250 ok\r\n") == b""
    assert [reply and reply.code for reply in each.outcomes] == [550, 250]
    assert each.is_accepted
    assert session.step is Step.READY


def test_the_next_transaction_follows_the_end_of_a_text() -> None:
    session = opened()
    first, second = transaction(pipelining=True), transaction(pipelining=True)
    assert session.begin(first) == b"MAIL FROM:<a@x.org>\r\nRCPT TO:<0@x.org>\r\nDATA\r\n"
    assert feed(session, b"250 ok\r\n250 ok\r\n354 go\r\n") == TEXT + b".\r\n"
    session.begin(second)
    assert feed(session, b"250 taken\r\n250 ok\r\n550 no\r\n554 no\r\n") == b"RSET\r\n"
    assert first.is_accepted
    assert second.has_result
    assert not second.is_accepted
    assert feed(session, b"250 reset\r\n") == b""
    assert session.quit() == b"QUIT\r\n"
    assert feed(session, b"221 bye\r\n") == b""
    assert session.step is Step.CLOSED


def test_lmtp_replies_to_the_text_once_for_each_accepted_recipient() -> None:
    """RFC 2033 4.2, with BDAT as well."""
    for chunking in (False, True):
        session = opened(lmtp=True)
        each = transaction(3, pipelining=True, chunking=chunking, lmtp=True, size=len(TEXT))
        session.begin(each)
        feed(session, b"250 ok\r\n250 ok\r\n550 no\r\n250 ok\r\n" + (b"" if chunking else b"354 go\r\n"))
        feed(session, b"250 taken\r\n452 4.2.2 full\r\n")
        assert [reply and reply.code for reply in each.outcomes] == [250, 550, 452]
        assert session.step is Step.READY


def test_clear_text_between_starttls_and_tls_is_an_error() -> None:
    """RFC 3207 6."""
    session = ClientSession("me", starttls="offered")
    feed(session, b"220 ready\r\n")
    assert feed(session, b"250-hop\r\n250 STARTTLS\r\n") == b"STARTTLS\r\n"
    with pytest.raises(ProtocolError):
        feed(session, b"220 go on\r\n250 injected\r\n")


def test_after_the_handshake_everything_is_asked_again() -> None:
    session = ClientSession("me", starttls="required", credentials=Credentials("bob", "secret"))
    feed(session, b"220 ready\r\n")
    feed(session, b"250-hop\r\n250-STARTTLS\r\n250 AUTH PLAIN\r\n")
    assert feed(session, b"220 go on\r\n") == b""
    assert session.needs_handshake
    assert session.tls_started(is_private=True) == b"EHLO me\r\n"
    assert feed(session, b"250-hop\r\n250 AUTH LOGIN\r\n") == b"AUTH LOGIN\r\n"


@pytest.mark.parametrize("refusal", [b"550 no\r\n", b"450 later\r\n"])
def test_no_text_follows_when_every_recipient_is_refused(refusal: bytes) -> None:
    for pipelining in (False, True):
        session = opened()
        session.begin(transaction(2, pipelining=pipelining, chunking=True, size=len(TEXT)))
        sent = b"".join(feed(session, reply) for reply in (b"250 ok\r\n", refusal, refusal))
        assert sent.endswith(b"RSET\r\n")
        assert b"BDAT" not in sent


LINES = st.lists(
    st.sampled_from(
        [
            b"220 ready", b"250 ok", b"250-PIPELINING", b"250 CHUNKING", b"354 go", b"334 ", b"235 ok", b"421 bye",
            b"450 4.2.1 later", b"452 4.5.3 too many", b"550 5.1.1 no", b"502 what", b"503 no", b"221 bye", b"\r", b"",
            b"999 x", b"25", b"250\tok", b"\xff\x00",
        ]
    ),
    max_size=30,
).map(lambda lines: b"".join(line + b"\r\n" for line in lines))  # fmt: skip


@given(LINES, st.booleans(), st.booleans(), st.booleans(), st.integers(1, 3), st.sampled_from([None, len(TEXT)]))
def test_no_text_precedes_an_accepted_recipient(
    data: bytes, pipelining: bool, chunking: bool, lmtp: bool, recipients: int, size: int | None
) -> None:
    session = opened()
    each = transaction(recipients, pipelining=pipelining, chunking=chunking, lmtp=lmtp, size=size)
    sent = session.begin(each)
    try:
        for line in data.splitlines(keepends=True):
            sent += feed(session, line)
    except (ProtocolError, ClosingError, OpeningError, BodyError):
        pass
    if TEXT in sent:
        assert each.accepted
    if each.is_accepted:
        assert TEXT in sent


@given(LINES)
def test_an_opening_ends_in_ready_or_in_an_error(data: bytes) -> None:
    session = ClientSession("me", starttls="offered", credentials=Credentials("bob", "secret"), is_private=True)
    try:
        feed(session, data)
    except (ProtocolError, ClosingError, OpeningError, CannotSendError):
        return
    assert session.step in (*list(Step)[:7], Step.READY)


@given(st.lists(st.sampled_from([b"2", b"5", b"0", b" ", b"-", b"\r", b"\n", b"x", b"\r\n", b"250 ok\r\n"])), st.data())
def test_replies_do_not_depend_on_how_the_octets_are_cut(pieces: list[bytes], data: st.DataObject) -> None:
    octets = b"".join(pieces)
    cut = data.draw(st.integers(0, len(octets)))
    assert replies(octets) == replies(octets[:cut], octets[cut:])


def replies(*chunks: bytes) -> list[ServerReply | str]:
    """Return the replies in some octets, and the error that ends them."""
    reader = ReplyReader()
    found: list[ServerReply | str] = []
    try:
        for chunk in chunks:
            single = reader.single(chunk)
            if single is not None:
                found.append(single)
                continue
            reader.feed(chunk)
            while (reply := reader.next()) is not None:
                found.append(reply)
    except ProtocolError:
        found.append("error")
    return found


def test_reading_takes_steps_in_proportion_to_the_octets() -> None:
    """The reader keeps at most one incomplete line: a long input in small pieces is not copied again and again."""
    reader = ReplyReader()
    kept = 0
    for _ in range(5000):
        reader.feed(b"250 ok\r\n250 ")
        while reader.next() is not None:
            pass
        kept = max(kept, reader.waiting)
    assert kept <= len(b"250 250 ok\r\n250 ")
