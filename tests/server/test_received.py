"""The Received field, and how the body is kept apart from it."""

from __future__ import annotations

from email import message_from_bytes
from email.utils import parsedate_to_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.message import MailParameters, MessageId, Path
from penstock.server.received import MAX_START, Seam, received_field, seam
from penstock.transaction import Peer, TlsInfo, Transaction

WHEN = 1_700_000_000.25


def field_of(transaction: Transaction, recipient: Path | None = None) -> str:
    raw = received_field(transaction, MessageId("ABC"), "mx.example.org", WHEN, recipient)
    assert raw.startswith(b"Received: ")
    assert raw.endswith(b"\r\n")
    assert all(len(line) < 998 and line.endswith(b"\r\n") for line in raw.splitlines(keepends=True))
    parsed = message_from_bytes(raw + b"Subject: x\r\n\r\n")
    assert list(parsed) == ["Received", "Subject"]
    return " ".join(str(parsed["Received"]).split())


def make(**facts: object) -> Transaction:
    transaction = Transaction(Peer("192.0.2.1", 25), hello="client.example", is_esmtp=True)
    for name, value in facts.items():
        setattr(transaction, name, value)
    return transaction


def test_the_field_has_from_by_with_id_for_and_date() -> None:
    text = field_of(make(), Path("b@example.org", "b", "example.org"))
    assert text == (
        "from client.example ([192.0.2.1]) by mx.example.org (Penstock) with ESMTP id ABC for <b@example.org>; "
        "Tue, 14 Nov 2023 22:13:20 +0000"
    )
    assert parsedate_to_datetime(text.partition("; ")[2]).timestamp() == int(WHEN)


def test_the_field_has_the_parameters_of_tls() -> None:
    text = field_of(make(tls=TlsInfo("TLSv1.3", "TLS_AES_256_GCM_SHA384", 256), identity="alice"))
    assert "(using TLSv1.3 with cipher TLS_AES_256_GCM_SHA384 (256 bits))" in text
    assert "with ESMTPSA id" in text
    assert "alice" not in text


def test_the_protocol_has_the_word_of_its_rfc() -> None:
    tls = TlsInfo("TLSv1.2", "x", 128)
    utf8 = MailParameters(smtputf8=True)
    words = [
        make(is_esmtp=False).protocol,
        make().protocol,
        make(tls=tls).protocol,
        make(identity="a").protocol,
        make(tls=tls, identity="a").protocol,
        make(parameters=utf8).protocol,
        make(parameters=utf8, tls=tls, identity="a").protocol,
        make(is_lmtp=True).protocol,
        make(is_lmtp=True, tls=tls, identity="a").protocol,
        make(is_lmtp=True, parameters=utf8).protocol,
    ]
    assert words == [
        "SMTP", "ESMTP", "ESMTPS", "ESMTPA", "ESMTPSA", "UTF8SMTP", "UTF8SMTPSA", "LMTP", "LMTPSA", "UTF8LMTP",
    ]  # fmt: skip


def test_peers_of_all_kinds_have_a_literal() -> None:
    assert "([IPv6:2001:db8::1])" in field_of(make(peer=Peer("2001:db8::1", 25)))
    assert "([unix])" in field_of(make(peer=Peer("", 0)))

    assert "([192.0.2.1])" in field_of(make(peer=Peer("::ffff:192.0.2.1", 25)))


@given(st.text(max_size=255))
def test_no_hello_breaks_the_header(hello: str) -> None:
    text = field_of(make(hello=hello))
    assert text.count("(") == text.count(")") == 2
    assert text.count(";") == 1
    assert not set('"\\<') & set(text)
    assert text.count(",") == 1
    assert text.isascii()
    assert text.isprintable()


@pytest.mark.parametrize(
    ("hello", "shown"),
    [
        ("[IPv6:2001:db8::1]", "[IPv6:2001:db8::1]"),
        ("my_windows_pc", "my_windows_pc"),
        ('x" by evil; Mon', "x??by?evil??Mon"),
        ("two words", "two?words"),
        ("café", "caf?"),
    ],
)
def test_specials_of_a_hello_name_are_replaced(hello: str, shown: str) -> None:
    assert field_of(make(hello=hello)).startswith(f"from {shown} (")


def test_a_recipient_that_makes_a_line_too_long_is_not_named() -> None:
    local = "x" * 1000
    assert "for <" not in field_of(make(), Path(f"{local}@example.org", local, "example.org"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("b@bücher.example", "b@xn--bcher-kva.example"),
        ('"b@c"@bücher.example', '"b@c"@xn--bcher-kva.example'),
        ("bü@bücher.example", "bü@bücher.example"),
    ],
)
def test_the_field_is_ascii_if_the_local_part_is(text: str, shown: str) -> None:
    raw = received_field(make(), MessageId("ABC"), "mx", WHEN, Path(text, "b", "xn--bcher-kva.example"))
    assert f"for <{shown}>;" in raw.decode()


# ---- the seam between the trace fields and the body

EMPTY_LINE = Seam(0, b"\r\n")
NOTHING = Seam(0, b"")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"Subject: x\r\n\r\ntext\r\n", NOTHING),
        (b"Subject:x", NOTHING),
        (b"Subject : x\r\n", NOTHING),
        (b"X-!#$%&'*+:\r\n", NOTHING),
        (b"\r\ntext\r\n", NOTHING),
        (b"\ntext\n", NOTHING),
        (b"", NOTHING),
        (b" folded: into the field above\r\n", EMPTY_LINE),
        (b"\tby evil.example\r\n", EMPTY_LINE),
        (b"just text\r\n", EMPTY_LINE),
        (b"text", EMPTY_LINE),
        (b": no name\r\n", EMPTY_LINE),
        (b"two words: no field\r\n", EMPTY_LINE),
        (b"caf\xc3\xa9: no field\r\n", EMPTY_LINE),
        (b"\0: x", EMPTY_LINE),
        (b"\r", EMPTY_LINE),
        (b"From a@b Mon Jan  1 00:00:00 2024\r\nSubject: x\r\n", Seam(35, b"")),
        (b"From a@b\nSubject: x\n", Seam(9, b"")),
        (b">From a@b\r\nSubject: x\r\n", Seam(11, b"")),
        (b"From a@b\r\n folded\r\n", Seam(10, b"\r\n")),
        (b"From a@b\r\ntext\r\n", Seam(10, b"\r\n")),
        (b"From a@b\r\n\r\ntext\r\n", Seam(10, b"")),
        (b"From a@b\r\nFrom c@d\r\n", Seam(10, b"\r\n")),
        (b"From a@b\r\n", Seam(10, b"")),
        (b"From a@b", EMPTY_LINE),
        (b"From " + b"x" * MAX_START + b"\r\nSubject: x\r\n", EMPTY_LINE),
        (b"From: a@b\r\n", NOTHING),
        (b"From\t: a@b\r\n", NOTHING),
        (b"From : a@b\r\n", NOTHING),
        (b"From \t : a@b\r\n", NOTHING),
        (b">From : a@b\r\n", NOTHING),
        (b"Fro: x", NOTHING),
        (b"x" * (MAX_START + 10) + b": y", EMPTY_LINE),
    ],
)
def test_a_body_never_continues_the_trace_fields(body: bytes, expected: Seam) -> None:
    assert seam(body, is_whole=True) == expected
    for end in range(len(body) + 1):
        assert seam(body[:end], is_whole=False) in (None, expected)


def test_the_seam_is_known_from_few_octets() -> None:
    for start in (b"x", b">", b"From x", b"x ", b"\r"):
        body = start + start[-1:] * MAX_START
        assert seam(body, is_whole=False) is not None


@given(
    st.lists(st.sampled_from([b"From ", b">", b":", b" ", b"\t", b"\r\n", b"\n", b"\r", b"a", b"\x80"]), max_size=12)
)
def test_trace_fields_above_any_body_parse_as_they_were(parts: list[bytes]) -> None:
    body = b"".join(parts)
    joined = seam(body, is_whole=True)
    assert joined is not None
    field = received_field(make(), MessageId("ABC"), "mx.example.org", WHEN, None)
    parsed = message_from_bytes(field + joined.separator + body[joined.skip :])
    alone = message_from_bytes(field + b"\r\n")
    assert parsed.items()[:1] == alone.items()
    for end in range(len(body)):
        assert seam(body[:end], is_whole=False) in (None, joined)
