"""What the API shows of ten kinds of mail that programs often show wrongly. Their structures are those of real mail."""

from __future__ import annotations

import base64
from typing import NamedTuple

import pytest

from tests.sink.mails import PNG, encoded, mixed
from tests.sink.test_messages import keeping

_SIGNATURE = b"-----BEGIN PGP SIGNATURE-----\r\n\r\niQEzBAEBCAAdFiEE\r\n-----END PGP SIGNATURE-----"
_ORIGINAL = (
    b"From: Alice <alice@example.com>\r\nTo: nobody@example.org\r\nSubject: =?iso-8859-1?q?Gr=FC=DFe?=\r\n"
    b"Date: Tue, 24 Nov 2026 10:00:00 +0100\r\nContent-Type: text/plain; charset=iso-8859-1\r\n\r\nSch\xf6nen Tag"
)
_CALENDAR = (
    b"BEGIN:VCALENDAR\r\nMETHOD:REQUEST\r\nBEGIN:VEVENT\r\nSUMMARY:Release planning\r\n"
    b"DTSTART:20261201T090000Z\r\nLOCATION:Room 1\\, second floor\r\nORGANIZER;CN=Bob:mailto:bob@example.com\r\n"
    b"END:VEVENT\r\nEND:VCALENDAR\r\n"
)

NEWSLETTER = mixed(
    mixed(
        b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\nFr=C3=BChling",
        mixed(
            b"Content-Type: text/html; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n"
            b'<h1>Fr=C3=BChling</h1><img src=3D"cid:logo@example.com"><img src=3D"https://tracker.exam=\r\nple/p.gif">',
            encoded(PNG, b"Content-Type: image/png\r\nContent-ID: <logo@example.com>\r\n"),
            kind=b"related; type=text/html",
            boundary=b"related",
        ),
        kind=b"alternative",
        boundary=b"alternative",
    ),
    b"Content-Type: text/plain\r\nContent-Disposition: inline\r\n\r\nYou receive this mail as a member of the list.",
    header=b"From: Shop <news@example.com>\r\nSubject: =?utf-8?q?Fr=C3=BC?=\r\n =?utf-8?q?hling?=\r\n",
    boundary=b"mixed",
)
INVITATION = mixed(
    mixed(
        b"Content-Type: text/plain\r\n\r\nRelease planning",
        b"Content-Type: text/html\r\n\r\n<p>Release planning</p>",
        encoded(_CALENDAR, b"Content-Type: text/calendar; charset=UTF-8; method=REQUEST\r\n"),
        kind=b"alternative",
        boundary=b"alternative",
    ),
    encoded(_CALENDAR, b"Content-Type: application/ics; name=invite.ics\r\nContent-Disposition: attachment\r\n"),
    header=b"From: bob@example.com (Bob)\r\nSubject: Invitation\r\n",
    boundary=b"mixed",
)
FORWARDED = mixed(
    b"Content-Type: text/plain\r\n\r\nSee the message below.",
    b"Content-Type: message/rfc822\r\nContent-Disposition: attachment; filename=Forwarded.eml\r\n\r\n"
    + mixed(
        b"Content-Type: text/html\r\n\r\n<b>inner</b>",
        b"Content-Type: message/rfc822\r\n\r\n" + _ORIGINAL,
        header=b"From: carol@example.net\r\nSubject: Fwd: first\r\n",
        boundary=b"inner",
    ),
    header=b"From: dave@example.net\r\nSubject: Fwd: second\r\n",
    boundary=b"outer",
)
REPORT = mixed(
    b"Content-Description: Notification\r\nContent-Type: text/plain; charset=us-ascii\r\n\r\nUser unknown",
    b"Content-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; mx.example.org\r\n\r\n"
    b"Final-Recipient: rfc822; nobody@example.org\r\nAction: failed\r\nStatus: 5.1.1",
    b"Content-Type: message/rfc822\r\n\r\n" + _ORIGINAL,
    kind=b"report; report-type=delivery-status",
    header=b"From: MAILER-DAEMON@mx.example.org (Mail Delivery System)\r\nSubject: Undelivered Mail\r\n",
)
JAPANESE = (
    b"From: =?ISO-2022-JP?B?GyRCOzNFRBsoQg==?= <yamada@example.jp>\r\nSubject: =?iso-2022-jp?b?GyRCJV8lZCVCGyhC?=\r\n"
    b"Content-Type: text/plain; charset=ISO-2022-JP\r\n\r\n" + "すみません。".encode("iso-2022-jp") + b"\r\n"
)
UNLABELLED = (
    "From: Café <cafe@example.fr>\r\nSubject: 10 € – déjà vu\r\n\r\n“10 €” – déjà vu\r\n".encode("windows-1252")
)  # fmt: skip
SMIME = mixed(
    mixed(
        b"Content-Type: text/plain; charset=utf-8\r\n\r\nSigned text",
        encoded(b"\0\1data", b"Content-Type: application/pdf; name*=utf-8''r%C3%A9sum%C3%A9.pdf\r\n"),
        boundary=b"content",
    ),
    encoded(
        b"\x30\x82signature",
        b"Content-Type: application/pkcs7-signature; name=smime.p7s\r\nContent-Disposition: attachment\r\n",
    ),
    kind=b'signed; protocol="application/pkcs7-signature"; micalg=sha-256',
    header=b"From: a@example.com\r\nSubject: Signed\r\n",
    boundary=b"signed",
)
PGP = mixed(
    b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\nGr\xc3\xbc\xc3\x9fe",
    b'Content-Type: application/pgp-signature; name="signature.asc"\r\n\r\n' + _SIGNATURE,
    kind=b'signed; protocol="application/pgp-signature"; micalg=pgp-sha256',
    header=b"From: a@example.com\r\nSubject: PGP/MIME\r\n",
)
ODD_CHARSETS = mixed(
    b"Content-Type: text/plain; charset=ks_c_5601-1987\r\n\r\n" + "한국말".encode("euc-kr"),
    b"Content-Type: text/plain; charset=windows-31j\r\n\r\n" + "髙橋①".encode("cp932"),
    b"Content-Type: text/plain; charset=x-unknown\r\n\r\n" + "ñandú".encode(),
    b'Content-Type: text/plain; charset="us-ascii"\r\n\r\n' + "naïve".encode(),
    b"Content-Type: text/plain; charset=iso-8859-1\r\n\r\n" + "5 €".encode("windows-1252"),
    header=b"From: a@example.com\r\nSubject: =?gb2312?B?1tDOxA==?=\r\n",
)
IMAGES = mixed(
    b"Content-Type: text/html; charset=us-ascii\r\n\r\n"
    b'<img src="cid:image001.png@01D3BA12.F6C6AEB0"><img src="cid:b%40example.com"><img src="photo.png">',
    encoded(PNG, b"Content-Type: image/x-png; name=image001.png\r\nContent-ID: <image001.png@01D3BA12.F6C6AEB0>\r\n"),
    encoded(PNG, b"Content-Type: image/png\r\nContent-ID: b@example.com\r\nContent-Disposition: inline\r\n"),
    encoded(PNG, b"Content-Type: image/png\r\nContent-Location: photo.png\r\nContent-Disposition: attachment\r\n"),
    kind=b"related",
    header=b"From: a@example.com\r\nSubject: Images\r\n",
)

_SHOWN_IMAGE = f'<img src="data:image/png;base64,{base64.b64encode(PNG).decode()}">'


class Shown(NamedTuple):
    """What is shown of a message: subject, author, and each part that is no container."""

    subject: str
    author: str
    parts: list[tuple[str, str]]
    """The kind, "+" before it for a file, and what is found in its text, facts or octets."""


MAILS = {
    "newsletter": (NEWSLETTER, Shown("Frühling", "Shop", [
        ("text", "Frühling"), ("html", _SHOWN_IMAGE), ("image", ""), ("text", "a member of the list"),
    ])),
    "invitation": (INVITATION, Shown("Invitation", "Bob", [
        ("text", "Release"), ("html", "<p>Release"), ("calendar", "2026-12-01 09:00 UTC"),
        ("+calendar", "Release planning"),
    ])),
    "forwarded message": (FORWARDED, Shown("Fwd: second", "", [
        ("text", "below"), ("+message", "Fwd: first"), ("html", "<b>inner</b>"), ("+message", "Grüße"),
        ("text", "Schönen Tag"),
    ])),
    "delivery report": (REPORT, Shown("Undelivered Mail", "Mail Delivery System", [
        ("text", "User unknown"), ("text", "Status: 5.1.1"), ("+message", "Alice <alice@example.com>"),
        ("text", "Schönen Tag"),
    ])),
    "ISO-2022-JP": (JAPANESE, Shown("ミヤヂ", "山田", [("text", "すみません。")])),
    "windows-1252 without label": (UNLABELLED, Shown("10 € – déjà vu", "Café", [("text", "“10 €” – déjà vu")])),
    "S/MIME signature": (SMIME, Shown("Signed", "", [
        ("text", "Signed text"), ("+pdf", "data"), ("+file", "signature"),
    ])),
    "PGP/MIME signature": (PGP, Shown("PGP/MIME", "", [("text", "Grüße"), ("+text", "BEGIN PGP SIGNATURE")])),
    "odd charsets": (ODD_CHARSETS, Shown("中文", "", [
        ("text", "한국말"), ("text", "髙橋①"), ("text", "ñandú"), ("text", "naïve"), ("text", "5 €"),
    ])),
    "images in HTML": (IMAGES, Shown("Images", "", [
        ("html", _SHOWN_IMAGE * 2), ("image", ""), ("image", ""), ("+image", ""),
    ])),
}  # fmt: skip


@pytest.mark.parametrize("name", MAILS)
async def test_difficult_mail_is_shown_as_its_author_meant_it(name: str) -> None:
    raw, expected = MAILS[name]
    async with keeping(raw) as client:
        (line,) = (await client.get("/api/messages")).json()["messages"]
        shown = (await client.get("/api/messages/M0")).json()
        assert (line["subject"], line["author"]["name"], shown["trouble"]) == (expected.subject, expected.author, "")
        parts = [part for part in shown["parts"] if part["shown_as"] != "multipart"]
        assert [f"{'+' * part['is_attachment']}{part['shown_as']}" for part in parts] == [
            kind for kind, _ in expected.parts
        ]
        assert line["attachments"] == sum(kind.startswith("+") for kind, _ in expected.parts)
        for part, (kind, found) in zip(parts, expected.parts, strict=True):
            path = f"/api/messages/M0/parts/{part['number']}"
            data = await client.get(path)
            assert len(data.content) == part["size"]
            if kind.endswith("image"):
                assert (data.content, data.headers["content-type"][:6]) == (PNG, "image/")
            elif kind == "html":
                assert found in (await client.get(f"{path}/view")).text
            elif kind.startswith("+") and not part["facts"]:
                assert found.encode() in data.content
            else:
                assert found in part["text"] or any(found in value for _, value in part["facts"])
