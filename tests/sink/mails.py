"""Messages for the tests of the page: difficult ones, and large ones."""

from __future__ import annotations

import base64

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def mixed(*parts: bytes, kind: bytes = b"mixed", header: bytes = b"", boundary: bytes = b"b") -> bytes:
    """Return a multipart of parts, each with its header."""
    within = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts)
    head = header + b"Content-Type: multipart/" + kind + b'; boundary="' + boundary + b'"\r\n\r\n'
    return head + within + b"--" + boundary + b"--\r\n"


def encoded(data: bytes, header: bytes) -> bytes:
    """Return a part in base64."""
    text = base64.encodebytes(data).replace(b"\n", b"\r\n")
    return header + b"Content-Transfer-Encoding: base64\r\n\r\n" + text


def nested(levels: int, octets: int) -> bytes:
    """Return multiparts in each other, around a text whose lines look like delimiters."""
    head = b"".join(
        b'Content-Type: multipart/mixed; boundary="b%d"\r\n\r\n--b%d\r\n' % (level, level) for level in range(levels)
    )
    tail = b"".join(b"--b%d--\r\n" % level for level in reversed(range(levels)))
    return head + b"Content-Type: text/plain\r\n\r\n" + b"-- text of a line\r\n" * (octets // 19) + b"\r\n" + tail


FORWARDED = mixed(
    b"Content-Type: text/plain\r\n\r\nsee below",
    b"Content-Type: message/rfc822\r\nContent-Disposition: attachment\r\n\r\n"
    b"From: Inner <inner@example.net>\r\nSubject: =?utf-8?q?inn=C3=A9r?=\r\n"
    b"Content-Type: text/html\r\n\r\n<b>inner</b>",
    header=b"From: Outer <outer@example.com>\r\nSubject: Fwd: inner\r\n",
)
REPORT = mixed(
    b"Content-Type: text/plain; charset=us-ascii\r\n\r\nI could not deliver your message.",
    b"Content-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; mx.example.org\r\n\r\n"
    b"Final-Recipient: rfc822; bob@example.org\r\nAction: failed\r\nStatus: 5.1.1",
    b"Content-Type: text/rfc822-headers\r\n\r\nSubject: original",
    kind=b"report; report-type=delivery-status",
    header=b"From: MAILER-DAEMON <postmaster@example.org>\r\nSubject: Undelivered\r\n",
)
INVITATION = mixed(
    b"Content-Type: text/plain\r\n\r\nYou are invited",
    b"Content-Type: text/calendar; method=REQUEST; charset=utf-8\r\n\r\nBEGIN:VCALENDAR\r\nMETHOD:REQUEST\r\n"
    b"BEGIN:VTIMEZONE\r\nDTSTART:19700101T000000\r\nEND:VTIMEZONE\r\nBEGIN:VEVENT\r\nSUMMARY:Kick\\, off\r\n"
    b"DTSTART;TZID=Europe/Berlin:20261201T100000\r\nDTEND:20261201T100000Z\r\n"
    b'ORGANIZER;CN="Alice; A":mailto:alice@example.com\r\nATTENDEE:mailto:bob@exa\r\n mple.org\r\nEND:VEVENT\r\n'
    b"END:VCALENDAR",
    kind=b"alternative",
)
NEWSLETTER = mixed(
    mixed(
        b"Content-Type: text/plain\r\n\r\nplain news",
        mixed(
            b'Content-Type: text/html\r\n\r\n<!doctype html><html><head></head><body><a href="http://x.example/" '
            b'target="_self">link</a><img src="cid:logo@example"><img src="https://tracker.example/p.gif"></body></html>',
            encoded(PNG, b"Content-Type: image/png; name=logo.png\r\nContent-ID: <logo@example>\r\n"),
            kind=b"related",
            boundary=b"rel",
        ),
        kind=b"alternative",
        boundary=b"alt",
    ),
    encoded(
        b"%PDF-1.4 text", b'Content-Type: application/pdf\r\nContent-Disposition: attachment; filename="a b.pdf"\r\n'
    ),
    header=b"From: =?utf-8?b?TsOpd3M=?= <news@example.com>\r\nTo: list@example.org\r\nSubject: News\r\n",
)
