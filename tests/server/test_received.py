"""The Received field: true, parseable, and not to be broken out of."""

from __future__ import annotations

from email import message_from_bytes
from email.utils import parsedate_to_datetime

from hypothesis import given
from hypothesis import strategies as st

from penstock.message import MailParameters, MessageId, Path
from penstock.server.received import received_field
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


def test_it_says_from_by_with_id_for_and_when() -> None:
    text = field_of(make(), Path("b@example.org", "b", "example.org"))
    assert text == (
        "from client.example ([192.0.2.1]) by mx.example.org (Penstock) with ESMTP id ABC for <b@example.org>; "
        "Tue, 14 Nov 2023 22:13:20 +0000"
    )
    assert parsedate_to_datetime(text.partition("; ")[2]).timestamp() == int(WHEN)


def test_it_says_what_protects_the_connection() -> None:
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


@given(st.text(max_size=255))
def test_no_hello_breaks_the_header(hello: str) -> None:
    text = field_of(make(hello=hello))
    assert text.count("(") == text.count(")") == 2
