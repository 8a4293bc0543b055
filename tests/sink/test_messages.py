"""The HTTP API of kept mail: lists, messages, parts, release."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from penstock.sink.kept import KeptMessage, KeptMessages
from penstock.sink.web import mime, view
from penstock.sink.web.mime import Work
from penstock.sink.web.release import Hop, _line_ends
from penstock.testing import SmtpServer
from tests.sink.mails import FORWARDED, INVITATION, NEWSLETTER, PNG, REPORT, encoded, mixed
from tests.sink.test_web import api

PDF, IMAGE, HTML = 6, 5, 4
"""Numbers of parts of NEWSLETTER."""


def of(*raws: bytes) -> KeptMessages:
    made = KeptMessages(100)
    for number, raw in enumerate(raws):
        made.put(KeptMessage(f"M{number}", 1.5 + number, "a@example.com", ("b@example.org",), len(raw), raw))
    return made


@asynccontextmanager
async def keeping(*raws: bytes) -> AsyncIterator[httpx.AsyncClient]:
    async with api(shelf=of(*raws)) as client:
        yield client


# ---- lists


async def test_a_list_has_what_people_look_for() -> None:
    async with keeping(NEWSLETTER) as client:
        answer = (await client.get("/api/messages")).json()
        assert (answer["kept"], answer["keeps"], answer["has_more"]) == (1, 100, False)
        (line,) = answer["messages"]
        assert line == {
            "id": "M0", "received_at": 1.5, "sender": "a@example.com",
            "author": {"name": "Néws", "address": "news@example.com"}, "recipients": ["b@example.org"],
            "recipient_count": 1, "subject": "News", "size": len(NEWSLETTER), "attachments": 1,
            "is_read": False, "is_cut": False,
        }  # fmt: skip


async def test_a_list_counts_all_recipients() -> None:
    kept = of()
    kept.put(KeptMessage("M", 1, "", tuple(f"r{number}@example.org" for number in range(150)), 0, b""))
    async with api(shelf=kept) as client:
        (line,) = (await client.get("/api/messages")).json()["messages"]
        assert (len(line["recipients"]), line["recipient_count"]) == (100, 150)


async def test_a_list_is_the_newest_that_a_query_finds() -> None:
    async with keeping(b"Subject: a\r\n\r\n", b"Subject: b\r\n\r\n", b"Subject: a\r\n\r\n") as client:
        answer = (await client.get("/api/messages", params={"q": "subject:a", "limit": 1})).json()
        assert ([each["id"] for each in answer["messages"]], answer["has_more"]) == (["M2"], True)
        answer = (await client.get("/api/messages", params={"q": "subject:a", "limit": 1, "before": "M2"})).json()
        assert ([each["id"] for each in answer["messages"]], answer["has_more"]) == (["M0"], False)


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", f"q={'x' * 201}", "q=size:x", "q=before:x"])
async def test_a_list_refuses_what_it_does_not_understand(query: str) -> None:
    async with keeping(b"") as client:
        assert (await client.get(f"/api/messages?{query}")).status_code == 400


async def test_a_list_is_read_to_its_end_whatever_the_order_of_ids_is() -> None:
    kept = KeptMessages(10)
    for name in ("M2", "M5", "M1", "M4", "M3"):
        kept.put(KeptMessage(name, 1.5, "a@example.com", (), 0, b""))
    for query in ("", "&q=example"):
        found: list[str] = []
        async with api(shelf=kept) as client:
            has_more = True
            while has_more:
                before = f"&before={found[-1]}" if found else ""
                page = (await client.get(f"/api/messages?limit=2{query}{before}")).json()
                found += [each["id"] for each in page["messages"]]
                has_more = page["has_more"]
        assert found == ["M3", "M4", "M1", "M5", "M2"]


# ---- deletion


async def test_messages_are_deleted() -> None:
    async with keeping(b"", b"", b"") as client:
        assert (await client.delete("/api/messages/M1")).json() == {"deleted": 1}
        assert (await client.delete("/api/messages/M1")).status_code == 404
        assert (await client.delete("/api/messages")).json() == {"deleted": 2}


async def test_a_missing_id_deletes_nothing() -> None:
    async with keeping(b"", b"") as client:
        assert (await client.delete("/api/messages/", follow_redirects=True)).status_code == 404
        assert len((await client.get("/api/messages")).json()["messages"]) == 2


async def test_a_query_deletes_only_what_it_finds() -> None:
    async with keeping(b"Subject: a\r\n\r\n", b"Subject: b\r\n\r\n") as client:
        assert (await client.delete("/api/messages", params={"q": "subject:a"})).json() == {"deleted": 1}
        assert [each["id"] for each in (await client.get("/api/messages")).json()["messages"]] == ["M1"]


@pytest.mark.parametrize("query", ["q=", "q=%20", "q=from:", "q=size:x", "query=x"])
async def test_a_query_without_a_meaning_deletes_nothing(query: str) -> None:
    async with keeping(b"", b"") as client:
        assert (await client.delete(f"/api/messages?{query}")).status_code == 400
        assert (await client.get("/api/live")).json()["kept"] == 2


# ---- one message


async def test_a_message_has_all_its_parts() -> None:
    async with keeping(NEWSLETTER) as client:
        shown = (await client.get("/api/messages/M0")).json()
        assert [(part["number"], part["depth"], part["shown_as"]) for part in shown["parts"]] == [
            (0, 0, "multipart"), (1, 1, "multipart"), (2, 2, "text"), (3, 2, "multipart"), (4, 3, "html"),
            (5, 3, "image"), (6, 1, "pdf"),
        ]  # fmt: skip
        image, pdf = shown["parts"][IMAGE], shown["parts"][PDF]
        assert (image["content_id"], image["size"], image["is_attachment"]) == ("logo@example", len(PNG), False)
        assert (pdf["filename"], pdf["type"], pdf["size"]) == ("a b.pdf", "application/pdf", 13)
        assert (pdf["encoding"], pdf["is_attachment"], pdf["is_whole"]) == ("base64", True, True)
        assert shown["parts"][HTML]["has_remote_content"]
        assert shown["trouble"] == ""
        assert (await client.get("/api/messages/M0/raw")).content == NEWSLETTER


async def test_parts_are_whole() -> None:
    data = bytes(range(256)) * 4000
    async with keeping(
        mixed(
            encoded(data, b"Content-Type: application/zip\r\nContent-Disposition: attachment; filename=my file.zip\r\n")
        ),
        FORWARDED,
        REPORT,
    ) as client:
        answer = await client.get("/api/messages/M0/parts/1")
        assert answer.content == data
        assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''my%20file.zip"
        embedded = await client.get("/api/messages/M1/parts/2")
        assert embedded.content.startswith(b"From: Inner <inner@example.net>\r\n")
        assert embedded.headers["content-disposition"] == "attachment; filename*=UTF-8''inn%C3%A9r.eml"
        assert (await client.get("/api/messages/M2/parts/2")).text.startswith("Reporting-MTA: dns; mx.example.org")
        assert (await client.get("/api/messages/M2/parts/9")).status_code == 404


async def test_embedded_messages_reports_and_invitations_are_readable() -> None:
    async with keeping(FORWARDED, REPORT, INVITATION) as client:
        forwarded, report, invitation = [(await client.get(f"/api/messages/M{n}")).json() for n in range(3)]
    assert forwarded["parts"][2]["facts"] == [["Subject", "innér"], ["From", "Inner <inner@example.net>"]]
    assert (forwarded["parts"][2]["shown_as"], forwarded["parts"][2]["is_attachment"]) == ("message", True)
    assert (forwarded["parts"][3]["within"], forwarded["parts"][3]["text"]) == (3, "<b>inner</b>")
    assert report["parts"][2]["text"].endswith("Status: 5.1.1")
    assert invitation["parts"][2]["facts"] == [
        ["Method", "REQUEST"], ["Summary", "Kick, off"], ["Start", "2026-12-01 10:00 Europe/Berlin"],
        ["End", "2026-12-01 10:00 UTC"], ["Organizer", "Alice; A <alice@example.com>"],
        ["Attendee", "bob@example.org"],
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "is_attachment"), [(b"text/html", False), (b"text/plain", True)])
async def test_an_image_is_an_attachment_where_no_html_shows_it(kind: bytes, is_attachment: bool) -> None:
    image = encoded(PNG, b"Content-Type: image/png\r\nContent-ID: <x>\r\nContent-Disposition: inline\r\n")
    async with keeping(mixed(b"Content-Type: " + kind + b"\r\n\r\ntext", image)) as client:
        assert (await client.get("/api/messages/M0")).json()["parts"][2]["is_attachment"] == is_attachment


async def test_html_is_made_fit_for_a_frame() -> None:
    async with keeping(NEWSLETTER) as client:
        page = await client.get(f"/api/messages/M0/parts/{HTML}/view")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert policy.startswith("sandbox allow-popups allow-popups-to-escape-sandbox; default-src 'none'")
        assert "http:" not in policy
        assert page.text.startswith('<!doctype html><base target="_blank"><html>')
        assert 'href="http://x.example/">' in page.text
        assert f'src="data:image/png;base64,{base64.b64encode(PNG).decode()}"' in page.text
        remote = await client.get(f"/api/messages/M0/parts/{HTML}/view?remote=true")
        assert "img-src data: http: https:" in remote.headers["content-security-policy"]
        assert "script-src" not in remote.headers["content-security-policy"]
        assert (await client.get(f"/api/messages/M0/parts/{HTML}/view?remote=yes")).status_code == 400
        assert (await client.get(f"/api/messages/M0/parts/{PDF}/view")).status_code == 404


async def test_images_that_are_shown_many_times_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.sink.web.html.MAX_IMAGES", 1000)
    raw = mixed(
        b"Content-Type: text/html\r\n\r\n" + b'<img src="cid:x">' * 100,
        encoded(PNG, b"Content-Type: image/png\r\nContent-ID: <x>\r\n"),
        kind=b"related",
    )
    async with keeping(raw) as client:
        page = await client.get("/api/messages/M0/parts/1/view")
    assert 0 < page.text.count("data:image/png") < 10
    assert page.text.count("data:image/png") + page.text.count("cid:x") == 100


@pytest.mark.parametrize(
    ("kind", "way", "media_type"),
    [
        (b"image/png", "inline", "image/png"),
        (b"application/pdf", "inline", "application/pdf"),
        (b"image/svg+xml", "attachment", "application/octet-stream"),
        (b"text/html; charset=iso-8859-1", "inline", "text/html; charset=windows-1252"),
        (b"text/javascript", "inline", "text/plain; charset=utf-8"),
        (b"application/xhtml+xml", "inline", "text/plain; charset=utf-8"),
        (b"application/octet-stream", "attachment", "application/octet-stream"),
        (b"x\xff/y z", "inline", "text/plain; charset=utf-8"),
    ],
)
async def test_parts_do_no_harm(kind: bytes, way: str, media_type: str) -> None:
    async with keeping(b"Content-Type: " + kind + b"\r\n\r\n<script>alert(1)</script>") as client:
        answer = await client.get("/api/messages/M0/parts/0")
        assert answer.headers["content-type"] == media_type
        assert answer.headers["content-disposition"].startswith(way)
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "script-src" not in policy
        assert "default-src 'none'" in policy
        assert policy.startswith("sandbox") or media_type == "application/pdf"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe\r\n" * 1000,
        b"Subject: =?no-such-charset?b?////?=\r\nContent-Type: text/plain; charset=nonsense\r\n\r\n\xff\xfe text\r\n",
        b"Content-Type: text/plain; charset=utf-7\r\n\r\n+2AA-",
        b"Content-Type: text/plain; charset=unicode_escape\r\n\r\n\\ud800",
        b"Content-Type: text/plain; charset=undefined\r\n\r\n\xff",
        b'Content-Type: text/plain; charset="a\0b"\r\n\r\nx',
        b"Content-Type: text/plain; name*=idna''%ff\r\n\r\nx",
        b"Subject: \xff\xed\xa0\x80\r\nX: \xff =?utf-7?q?+2AA-?=\r\n\r\n",
        b'Content-Type: =?utf-7?q?+2AA-?=/x; name="=?utf-7?q?+2AA-?="\r\n\r\n',
        b"Content-Type: multipart/mixed; boundary=\xff\r\n\r\n--\xff\r\n\r\nx",
        b"Content-Type: message/rfc822\r\n\r\n" * 200,
    ],
)
async def test_malformed_mail_is_shown(raw: bytes) -> None:
    kept = of(raw)
    kept.put(KeptMessage("M1", 1.5, "a\ud800@b", ("c\udcff@b",), len(raw), raw))
    async with api(shelf=kept) as client:
        for name in ("M0", "M1"):
            assert (await client.get(f"/api/messages/{name}")).status_code == 200
            assert (await client.get(f"/api/messages/{name}/parts/0")).status_code == 200
        (line, _) = (await client.get("/api/messages?q=-nowhere")).json()["messages"]
        assert (line["sender"], line["recipients"]) == ("a?@b", ["c?@b"])


async def test_what_is_shown_of_a_message_has_bounds() -> None:
    fields = b"".join(b"X-%d: %s\r\n" % (number, b"y" * (5000 if number < 100 else 1)) for number in range(600))
    texts = mixed(*[b"\r\n" + b"x" * 300_000] * 6, header=fields)
    async with keeping(texts) as client:
        shown = (await client.get("/api/messages/M0")).json()
        assert (len(shown["headers"]), max(len(value) for _, value in shown["headers"])) == (500, 4000)
        assert [len(part["text"]) for part in shown["parts"]] == [0, 262_144, 262_144, 262_144, 262_144, 0, 0]
        assert [part["is_text_whole"] for part in shown["parts"]] == [True, *[False] * 6]
        assert "101 more header fields" in shown["trouble"]
        assert len((await client.get("/api/messages/M0/parts/5")).content) == 300_000


async def test_a_message_that_is_not_kept_whole_says_so_everywhere() -> None:
    raw = mixed(b"\r\nfirst", encoded(b"x" * 3000, b"Content-Type: application/zip\r\n"))
    kept = KeptMessages(10, octets=len(raw) - 1000)
    kept.put(KeptMessage("M", 1, "", (), len(raw), raw))
    async with api(shelf=kept, hop=Hop("localhost", 1)) as client:
        shown = (await client.get("/api/messages/M")).json()
        assert (shown["is_cut"], shown["size"]) == (True, len(raw))
        assert "octets are kept" in shown["trouble"]
        assert [part["is_whole"] for part in shown["parts"]] == [False, True, False]
        assert (await client.get("/api/messages/M/parts/1")).content == b"first"
        for path in ("raw", "parts/0", "parts/2"):
            refused = await client.get(f"/api/messages/M/{path}")
            assert (refused.status_code, "octets of this message are kept" in refused.json()["error"]) == (409, True)
        refused = await client.post("/api/messages/M/release", json={"recipients": ["a@b"]})
        assert refused.status_code == 409


async def test_a_message_is_marked_as_read() -> None:
    async with keeping(b"") as client:
        assert (await client.patch("/api/messages/M0", json={"is_read": True})).json() == {"is_read": True}
        assert (await client.get("/api/messages")).json()["messages"][0]["is_read"]
        assert (await client.get("/api/messages/M0")).json()["is_read"]
        assert (await client.patch("/api/messages/M0", json={"read": True})).status_code == 400
        assert (await client.patch("/api/messages/M9", json={"is_read": True})).status_code == 404


# ---- threads


async def test_mail_is_read_in_a_thread_however_small_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    read = mime.read

    def noted(data: bytes, work: Work) -> mime.Structure:
        threads.add(threading.get_ident())
        return read(data, work)

    monkeypatch.setattr(mime, "read", noted)
    async with keeping(b"") as client:
        for path in ("", "/M0", "/M0/parts/0", "/M0/parts/0/view"):
            assert (await client.get(f"/api/messages{path}")).status_code == 200
        assert (await client.get("/api/messages?q=x")).status_code == 200
    assert threads
    assert threading.get_ident() not in threads


async def test_work_ends_when_its_client_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()

    def endless(_: KeptMessage, work: Work) -> view.MessageView:
        token.run_sync_soon(begun.set)
        try:
            while True:
                work.pause()
        finally:
            ended.set()

    monkeypatch.setattr(view, "view", endless)
    with trio.fail_after(60):
        async with keeping(b"") as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.get, "/api/messages/M0")
                await begun.wait()
                nursery.cancel_scope.cancel()
            await trio.to_thread.run_sync(ended.wait)
            monkeypatch.undo()
            assert (await client.get("/api/messages/M0")).status_code == 200


# ---- release


@asynccontextmanager
async def releasing(raw: bytes) -> AsyncIterator[tuple[httpx.AsyncClient, SmtpServer]]:
    with SmtpServer() as server:
        async with api(shelf=of(raw), hop=Hop(server.host, server.port)) as client:
            yield client, server


async def test_a_message_is_released_as_it_was_received() -> None:
    raw = b"Subject: gr\xfc\xdfe\r\n\r\n.dot\r\n..dots\r\n"
    async with releasing(raw) as (client, server):
        wanted = {"recipients": ["x@example.org", "y@example.org"]}
        answer = await client.post("/api/messages/M0/release", json=wanted)
        assert answer.json() == {"released": ["x@example.org", "y@example.org"], "refused": []}
        await client.post("/api/messages/M0/release", json={**wanted, "sender": ""})
        first, second = server.inbox
        assert (first.sender, [*first.recipients], first.raw) == ("a@example.com", wanted["recipients"], raw)
        assert second.sender == ""


@pytest.mark.parametrize("ending", [b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r.\r\n", b"\r\n.\r"])
async def test_a_released_message_has_no_bare_line_ends(ending: bytes) -> None:
    """Hops exist that take these for the end of the data, and what follows for commands."""
    async with releasing(b"Subject: x\r\n\r\nx" + ending + b"RSET\r\n") as (client, server):
        answer = await client.post("/api/messages/M0/release", json={"recipients": ["x@example.org"]})
        assert answer.status_code == 200
        raw = server.inbox[0].raw
    assert b"RSET" in raw and not re.search(rb"\r(?!\n)|(?<!\r)\n", raw)


@given(st.lists(st.sampled_from([b"\r", b"\n", b"x"])).map(b"".join))
def test_line_ends_are_those_of_single_steps(text: bytes) -> None:
    assert _line_ends(text) == re.sub(rb"(?<!\r)\n", b"\r\n", re.sub(rb"\r(?!\n)", b" ", text))


async def test_a_hop_that_refuses_is_reported() -> None:
    wanted = {"recipients": ["x@example.org", "y@example.org"]}
    async with releasing(b"x\r\n") as (client, server):
        server.fail_next("RCPT", 550, status="5.1.1")
        answer = await client.post("/api/messages/M0/release", json=wanted)
        assert answer.json() == {"released": ["y@example.org"], "refused": ["x@example.org"]}
        for phase, times in (("RCPT", 2), ("MAIL", 1), ("dot", 1)):
            server.fail_next(phase, 550, times=times)
            refused = await client.post("/api/messages/M0/release", json=wanted)
            assert (refused.status_code, "550" in refused.json()["error"]) == (502, True)
        server.stop()
        assert (await client.post("/api/messages/M0/release", json=wanted)).status_code == 502


@pytest.mark.parametrize(
    "body",
    [{}, {"recipients": []}, {"recipients": ["a b@c"]}, {"recipients": ["a@b\r\nDATA"]}, {"recipients": ["<a@b>"]}],
)
async def test_a_release_without_proper_addresses_is_refused(body: object) -> None:
    async with api(shelf=of(b""), hop=Hop("127.0.0.1", 1)) as client:
        assert (await client.post("/api/messages/M0/release", json=body)).status_code == 400


async def test_without_a_hop_nothing_is_released() -> None:
    async with keeping(b"") as client:
        refused = await client.post("/api/messages/M0/release", json={"recipients": ["a@b"]})
        assert refused.status_code == 409
        assert "--release HOST:PORT" in refused.json()["error"]


@pytest.mark.parametrize("text", ["", "host", "host:", ":25", "host:0", "host:70000", "host:x"])
def test_a_malformed_hop_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a release hop looks like"):
        Hop.parse(text)


def test_a_hop_is_read() -> None:
    assert Hop.parse("[::1]:25") == Hop("::1", 25)
    assert str(Hop.parse("[::1]:25")) == "[::1]:25"
