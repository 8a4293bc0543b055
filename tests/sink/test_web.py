"""The HTTP API: what it answers, and whom."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.headerregistry import HeaderRegistry
from email.message import Message

import httpx
import pytest

from penstock.metrics._session import Metrics
from penstock.sink.control import FaultDesk
from penstock.sink.faults import FaultEngine, FaultLog
from penstock.sink.kept import KeptMessage, Shelf
from penstock.sink.statistics import FaultControl
from penstock.sink.web import mime
from penstock.sink.web.app import make_app
from penstock.sink.web.guard import MAX_BODY
from tests.sink.test_statistics import receipts

HTML = (
    b"From: a@example.com\r\nTo: b@example.org\r\nSubject: =?utf-8?q?gr=C3=BC=C3=9Fe?=\r\nMIME-Version: 1.0\r\n"
    b'Content-Type: multipart/mixed; boundary="b"\r\n\r\n--b\r\nContent-Type: text/plain; charset=iso-8859-1\r\n'
    b"Content-Transfer-Encoding: quoted-printable\r\n\r\nk=E4se\r\n--b\r\nContent-Type: text/html\r\n\r\n"
    b'<script>alert(1)</script><img src="http://tracker.example/x">hi\r\n--b\r\nContent-Type: image/svg+xml\r\n'
    b'Content-Disposition: attachment; filename="a\xffb.svg"\r\n\r\n<svg onload="alert(1)"/>\r\n--b--\r\n'
)
BROKEN = b"Subject: =?no-such-charset?b?////?=\r\nContent-Type: text/plain; charset=nonsense\r\n\r\n\xff\xfe text\r\n"


class Control:
    """An engine of faults."""

    def __init__(self) -> None:
        self.text = "seed = 1\n"
        self.failing: dict[str, int] = {}

    def plan(self) -> str:
        return self.text

    def replace(self, text: str) -> None:
        if "rule" in text:
            raise ValueError("rule: there is no such key")
        self.text = text

    def fail_next(self, phase: str, reply: str, count: int) -> None:
        if phase != "RCPT":
            raise ValueError(f"there is no reply in a phase {phase!r}")
        self.failing[f"{phase} {reply}"] = count

    def pending(self) -> dict[str, int]:
        return self.failing


def shelf() -> Shelf:
    made = Shelf(10)
    made.put(KeptMessage("M1", 1.5, "a@example.com", ("b@example.org",), len(HTML), HTML))
    made.put(KeptMessage("M2", 2.5, "", ("c@example.org",), len(BROKEN), BROKEN))
    made.put(KeptMessage("M3", 3.5, "d@example.net", (), 3, b"\xff\x00\r\n" * 20_000))
    return made


@asynccontextmanager
async def api(
    *,
    token: str | None = None,
    shelf: Shelf | None = None,
    faults: FaultControl | None = None,
    metrics: Metrics | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    made, clock, _, _ = receipts(metrics or Metrics())
    for _ in range(3):
        clock.now += 1
        made.take_sample()
    app = make_app(made, shelf=shelf, faults=faults, token=token)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8025") as client:
        yield client


async def test_health_and_the_page_need_nothing() -> None:
    async with api() as client:
        assert (await client.get("/api/health")).json() == {"status": "ok"}
        page = await client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert page.headers["x-content-type-options"] == "nosniff"
        for name in ("page.css", "page.js"):
            assert (await client.get(f"/{name}")).status_code == 200


async def test_the_page_names_no_other_host() -> None:
    async with api() as client:
        for path in ("/", "/page.css", "/page.js"):
            text = (await client.get(path)).text.replace("http://www.w3.org/2000/svg", "")
            assert "http:" not in text
            assert "https:" not in text


async def test_receipts_are_the_report() -> None:
    metrics = Metrics()
    metrics.turned_away(b"421 4.3.2 Too many\r\n")
    async with api(metrics=metrics) as client:
        report = (await client.get("/api/receipts")).json()
        assert report["schema"] == "penstock-receipts"
        assert report["replies"][0]["code"] == 421
        assert len(report["samples"]) == 3
        assert (await client.post("/api/receipts/reset")).json() == {"generation": 1}
        assert (await client.get("/api/receipts")).json()["replies"] == []


async def test_live_gives_the_samples_behind_those_that_are_known() -> None:
    async with api() as client:
        first = (await client.get("/api/live")).json()
        assert (first["last"], len(first["samples"]), first["report"]["samples"]) == (3, 3, [])
        assert len((await client.get("/api/live?after=2")).json()["samples"]) == 1
        assert (await client.get("/api/live?after=3")).json()["samples"] == []
        assert (await client.get("/api/live?after=99")).json()["samples"] == []
        assert (await client.get("/api/live?after=x")).status_code == 400


async def test_the_plan_is_read_and_replaced() -> None:
    async with api(faults=Control()) as client:
        assert (await client.get("/api/plan")).text == "seed = 1\n"
        assert (await client.put("/api/plan", content="seed = 2\n")).status_code == 200
        assert (await client.get("/api/plan")).text == "seed = 2\n"
        refused = await client.put("/api/plan", content="[[rule]]\n")
        assert refused.status_code == 400
        assert "there is no such key" in refused.json()["error"]
        assert (await client.put("/api/plan", content=b"\xff")).status_code == 400


async def test_a_word_that_is_none_is_refused_with_the_words_there_are() -> None:
    log = FaultLog()
    async with api(faults=FaultDesk(FaultEngine(receipts=log), log)) as client:
        refused = await client.put("/api/plan", content='[[rule]]\nphase = "rctp"\nreply = "450"')
        assert refused.status_code == 400
        why = "the plan was not taken: rule[0].phase: unknown value 'rctp' (did you mean rcpt?); expected one of: "
        assert refused.json()["error"].startswith(why)
        refused = await client.post("/api/fail-next", json={"phase": "rctp", "reply": 450})
        assert refused.json()["error"].startswith("unknown phase 'rctp'; expected one of: banner, ehlo")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("", "JSON"),
        ('{"phase": "RCPT"}', "reply"),
        ('{"phase": "RCPT", "reply": "450", "count": 0}', "count"),
        ('{"phase": "RCPT", "reply": "450", "more": 1}', "more"),
        ('{"phase": "body", "reply": "450"}', "no reply in a phase"),
    ],
)
async def test_a_failure_that_can_not_be_is_said_to_be_one(body: str, why: str) -> None:
    async with api(faults=Control()) as client:
        refused = await client.post("/api/fail-next", content=body)
        assert refused.status_code == 400
        assert why in refused.json()["error"]


async def test_the_next_ones_fail() -> None:
    async with api(faults=Control()) as client:
        answer = await client.post("/api/fail-next", json={"phase": "RCPT", "reply": 452, "count": 3})
        assert answer.json() == {"pending": {"RCPT 452": 3}}
        assert (await client.get("/api/live")).json()["pending"] == {"RCPT 452": 3}


async def test_without_faults_and_messages_it_says_so() -> None:
    async with api() as client:
        for method, path in (("GET", "plan"), ("PUT", "plan"), ("POST", "fail-next")):
            assert (await client.request(method, f"/api/{path}")).status_code == 409
        assert (await client.get("/api/messages")).status_code == 409
        assert (await client.get("/api/messages/M1")).status_code == 404
        assert (await client.get("/api/live")).json()["keeps"] == 0


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", ["M3", "M2", "M1"]),
        ("example.org", ["M2", "M1"]),
        ("GRÜSSE käse", ["M1"]),
        ("from:a@ käse", ["M1"]),
        ("to:c@", ["M2"]),
        ("to:a@", []),
        ("tracker", ["M1"]),
        ("nowhere", []),
    ],
)
async def test_messages_are_found_by_words(query: str, found: list[str]) -> None:
    async with api(shelf=shelf()) as client:
        answer = (await client.get("/api/messages", params={"q": query})).json()
        assert [each["id"] for each in answer["messages"]] == found
        assert answer["kept"] == 3


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", f"q={'x' * 201}"])
async def test_a_list_has_bounds(query: str) -> None:
    async with api(shelf=shelf()) as client:
        assert (await client.get(f"/api/messages?{query}")).status_code == 400


async def test_a_list_goes_on_behind_a_message() -> None:
    async with api(shelf=shelf()) as client:
        answer = (await client.get("/api/messages?limit=1&before=M3")).json()
        assert [each["id"] for each in answer["messages"]] == ["M2"]


async def test_a_message_is_shown_with_its_header_and_parts() -> None:
    async with api(shelf=shelf()) as client:
        shown = (await client.get("/api/messages/M1")).json()
        assert ["Subject", "grüße"] in shown["headers"]
        assert [(part["depth"], part["shown_as"]) for part in shown["parts"]] == [
            (0, "multipart"), (1, "text"), (1, "html"), (1, "file"),
        ]  # fmt: skip
        assert shown["parts"][1]["text"] == "käse"
        assert (await client.get("/api/messages/M1/raw")).content == HTML


async def test_parts_do_no_harm() -> None:
    async with api(shelf=shelf()) as client:
        page = await client.get("/api/messages/M1/parts/2")
        assert page.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        file = await client.get("/api/messages/M1/parts/3")
        assert file.headers["content-type"] == "application/octet-stream"
        assert file.headers["content-disposition"].startswith("attachment; filename*=UTF-8''a%")
        assert (await client.get("/api/messages/M1/parts/9")).status_code == 404


async def test_malformed_mail_is_shown_all_the_same() -> None:
    async with api(shelf=shelf()) as client:
        for name in ("M2", "M3"):
            shown = await client.get(f"/api/messages/{name}")
            assert shown.status_code == 200
            assert shown.json()["parts"] or shown.json()["trouble"]
            assert (await client.get(f"/api/messages/{name}/parts/0")).status_code == 200


def of(*raws: bytes) -> Shelf:
    made = Shelf(10)
    for number, raw in enumerate(raws):
        made.put(KeptMessage(f"M{number}", 1.5, "a@example.com", ("b@example.org",), len(raw), raw))
    return made


def mixed(*parts: bytes) -> bytes:
    within = b"".join(b"--b\r\n" + part + b"\r\n" for part in parts)
    return b'Content-Type: multipart/mixed; boundary="b"\r\n\r\n' + within + b"--b--\r\n"


@pytest.fixture
def no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """No message can be read, as one can not that has a thousand multiparts in each other."""

    def throw(_: bytes) -> Message:
        raise RecursionError("too deep")

    monkeypatch.setattr(mime, "_parsed", throw)


def counted_fields(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what will have the value of each field that is parsed."""
    parsed: list[str] = []
    parse = HeaderRegistry.__call__

    def counted(registry: HeaderRegistry, name: str, value: str) -> object:
        parsed.append(value)
        return parse(registry, name, value)

    monkeypatch.setattr(HeaderRegistry, "__call__", counted)
    return parsed


async def test_each_field_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = b"".join(b"X-%d: %d\r\n" % (number, number) for number in range(1000))
    async with api(shelf=of(fields + b"\r\ntext")) as client:
        parsed = counted_fields(monkeypatch)
        shown = (await client.get("/api/messages/M0")).json()
    assert shown["headers"] == [[f"X-{number}", str(number)] for number in range(500)]
    assert len([value for value in parsed if value.isdigit()]) == 500


async def test_long_fields_are_parsed_in_their_beginning_and_not_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    field = b"To: " + b"=?utf-8?q?=C3=BC?= <a@b>, " * 4000 + b"\r\n"
    async with api(shelf=of(field * 100 + b"\r\ntext")) as client:
        parsed = counted_fields(monkeypatch)
        shown = (await client.get("/api/messages/M0")).json()
    assert sum(map(len, parsed)) < 100_000
    assert len(shown["headers"]) == 100
    assert shown["headers"][0][1].startswith("ü <a@b>, ü")
    assert shown["headers"][-1][1].startswith("=?utf-8?q?=C3=BC?=")
    assert max(len(value) for _, value in shown["headers"]) == 4000


async def test_a_message_is_taken_apart_in_a_thread_however_small_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    view = mime.view

    def noted(message: KeptMessage) -> mime.MessageView:
        threads.append(threading.get_ident())
        return view(message)

    monkeypatch.setattr(mime, "view", noted)
    async with api(shelf=of(b"")) as client:
        assert (await client.get("/api/messages/M0")).status_code == 200
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


@pytest.mark.parametrize(
    "raw",
    [
        b"Content-Type: text/plain; charset=utf-7\r\n\r\n+2AA-",
        b"Content-Type: text/html; charset=utf-7\r\n\r\n+2AA-",
        b"Content-Type: text/plain; charset=unicode_escape\r\n\r\n\\ud800",
        b"To: =?utf-7?q?+2AA-?= <a@b>\r\n\r\n",
        b"Subject: =?utf-7?q?+2AA-?=\r\n\r\n",
        b"Subject: \xff\xed\xa0\x80\r\nX: \xff =?utf-7?q?+2AA-?=\r\n\r\n",
        b"Content-Disposition: attachment; filename*=utf-7''+2AA-\r\n\r\n",
        b'Content-Type: =?utf-7?q?+2AA-?=/x; name="=?utf-7?q?+2AA-?="\r\n\r\n',
    ],
)
async def test_halves_of_characters_are_replaced(raw: bytes) -> None:
    kept = of(raw)
    kept.put(KeptMessage("M1", 1.5, "a\ud800@b", ("c\udcff@b",), len(raw), raw, _subject="half \ud800"))
    async with api(shelf=kept) as client:
        for name in ("M0", "M1"):
            shown = await client.get(f"/api/messages/{name}")
            assert shown.status_code == 200
            assert shown.json()["trouble"] == ""
            assert (await client.get(f"/api/messages/{name}/parts/0")).status_code == 200
        for path in ("/api/live", "/api/messages", "/api/messages?q=half"):
            (line, *_) = (await client.get(path)).json()["messages"]
            assert (line["sender"], line["recipients"], line["subject"]) == ("a?@b", ["c?@b"], "half ?")


@pytest.mark.parametrize(
    "bad",
    [
        b"Content-Type: text/plain; charset=undefined",
        b"Content-Type: text/plain; charset=idna",
        b"Content-Type: text/plain; charset=punycode",
        b'Content-Type: text/plain; charset="a\0b"',
        b"Content-Type: text/plain; name*=a\0b''x",
        b"Content-Type: text/plain; name*=idna''%ff",
        b"Content-Disposition: inline; filename*=a\0b''x",
        b"Content-Disposition: inline; filename*=undefined''x%ff",
        b"Content-Disposition: inline; filename*=a\0b''x; filename*0=x",
    ],
)
async def test_a_part_that_is_bad_hides_nothing(bad: bytes) -> None:
    raw = mixed(bad + b"\r\n\r\nxn--bad", b"Content-Type: text/plain\r\n\r\ngood")
    async with api(shelf=of(raw, bad + b"\r\n\r\nalone")) as client:
        shown = (await client.get("/api/messages/M0")).json()
        assert shown["trouble"] == ""
        assert [part["text"] for part in shown["parts"]] == ["", "xn--bad", "good"]
        for number, text in ((1, "xn--bad"), (2, "good")):
            assert (await client.get(f"/api/messages/M0/parts/{number}")).text == text
        for query, name in (("xn--bad", "M0"), ("good", "M0"), ("alone", "M1")):
            (line,) = (await client.get("/api/messages", params={"q": query})).json()["messages"]
            assert line["id"] == name


async def test_a_part_that_can_not_be_read_is_a_file_without_octets(monkeypatch: pytest.MonkeyPatch) -> None:
    octets = mime._octets

    def throwing(part: Message) -> bytes:
        data = octets(part)
        if data == b"bad":
            raise IndexError(data)
        return data

    monkeypatch.setattr(mime, "_octets", throwing)
    async with api(shelf=of(mixed(b"\r\nbad", b"\r\ngood"))) as client:
        shown = (await client.get("/api/messages/M0")).json()
        assert [(part["shown_as"], part["size"]) for part in shown["parts"]] == [
            ("multipart", 0), ("file", 0), ("text", 4),
        ]  # fmt: skip
        assert (await client.get("/api/messages/M0/parts/1")).status_code == 404
        assert len((await client.get("/api/messages?q=good")).json()["messages"]) == 1


@pytest.mark.parametrize("query", ["from:", "to: subject:", "FROM: from:a@"])
async def test_a_word_with_nothing_behind_its_colon_is_ignored(query: str) -> None:
    async with api(shelf=of(HTML, BROKEN)) as client:
        answer = (await client.get("/api/messages", params={"q": query})).json()
        assert [each["id"] for each in answer["messages"]] == ["M1", "M0"]


async def test_a_message_that_can_not_be_read_is_not_searched_in_its_header(no_parser: None) -> None:
    async with api(shelf=of(b"From: x\r\nX-Field: x\r\n\r\nto: text")) as client:
        assert (await client.get("/api/messages/M0")).json()["trouble"] == "RecursionError: too deep"
        for query, count in (("x-field", 0), ("from:", 1), ("text", 1)):
            assert len((await client.get("/api/messages", params={"q": query})).json()["messages"]) == count


async def test_a_list_is_read_to_its_end_whatever_the_order_of_ids_is() -> None:
    kept = Shelf(10)
    for name in ("M2", "M5", "M1", "M4", "M3"):
        kept.put(KeptMessage(name, 1.5, "a@example.com", (), 0, b""))
    for query in ("", "&q=example"):
        found: list[str] = []
        async with api(shelf=kept) as client:
            while True:
                before = f"&before={found[-1]}" if found else ""
                page = (await client.get(f"/api/messages?limit=2{query}{before}")).json()["messages"]
                if not page:
                    break
                found += [each["id"] for each in page]
        assert found == ["M3", "M4", "M1", "M5", "M2"]


async def test_messages_are_forgotten() -> None:
    async with api(shelf=shelf()) as client:
        assert (await client.delete("/api/messages/M1")).json() == {"forgotten": 1}
        assert (await client.delete("/api/messages/M1")).status_code == 404
        assert (await client.delete("/api/messages")).json() == {"forgotten": 2}


async def test_unknown_pages_and_methods_are_answered_in_json() -> None:
    async with api() as client:
        assert (await client.get("/nowhere")).json() == {"error": "there is no such page"}
        assert (await client.delete("/api/health")).status_code == 405


# ---- whom it answers


async def test_a_foreign_name_is_answered_nothing() -> None:
    async with api() as client:
        for host in ("rebound.example:8025", "", "[", "192.0.2.1"):
            answer = await client.get("/api/receipts", headers={"host": host})
            assert answer.status_code == 421, host
        for host in ("localhost", "127.0.0.1:1", "[::1]:8025"):
            assert (await client.get("/api/receipts", headers={"host": host})).status_code == 200, host


async def test_a_page_of_another_origin_changes_nothing() -> None:
    kept = shelf()
    async with api(shelf=kept) as client:
        for origin in ("https://evil.example", "null", "http://localhost:9999", "http://[", ""):
            answer = await client.delete("/api/messages", headers={"origin": origin})
            assert answer.status_code == 403
        assert len(kept) == 3
        own = await client.delete("/api/messages", headers={"origin": "http://localhost:8025"})
        assert own.status_code == 200


async def test_a_token_is_asked_for_where_there_is_one() -> None:
    async with api(token="secret-token") as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret-token"}):
            assert (await client.get("/api/receipts", headers=headers)).status_code == 401
        assert (await client.get("/api/receipts?token=secret-token")).status_code == 401
        good = {"authorization": "Bearer secret-token", "host": "sink.example"}
        assert (await client.get("/api/receipts", headers=good)).status_code == 200


async def test_a_browser_changes_the_token_for_a_cookie() -> None:
    async with api(token="secret-token") as client:
        answer = await client.get("/?token=secret-token")
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert "HttpOnly; SameSite=Strict" in answer.headers["set-cookie"]
        assert (await client.get("/api/receipts")).status_code == 200


@pytest.mark.parametrize(
    ("cookie", "status"),
    [
        ("penstock-token=secret-token", 200),
        ('theme={"a":1}; penstock-token=secret-token', 200),
        ('a; =b;;penstock-token=wrong;penstock-token = secret-token ; c="', 200),
        ('theme={"a":1}; penstock-token=wrong', 401),
        ("my-penstock-token=secret-token", 401),
        ("penstock-token", 401),
        ("theme=penstock-token=secret-token", 401),
    ],
)
async def test_cookies_of_others_do_not_matter(cookie: str, status: int) -> None:
    async with api(token="secret-token") as client:
        assert (await client.get("/api/receipts", headers={"cookie": cookie})).status_code == status


async def test_a_token_is_looked_for_in_the_first_fields() -> None:
    many = "&".join(f"a{number}=1" for number in range(12))
    async with api(token="secret-token") as client:
        assert (await client.get(f"/?{many}")).status_code == 401
        assert (await client.get(f"/?{many}&token=secret-token")).status_code == 401
        assert (await client.get(f"/?token=secret-token&{many}")).status_code == 303


async def test_a_body_has_a_bound() -> None:
    async with api(faults=Control()) as client:
        assert (await client.put("/api/plan", content=b"#" * MAX_BODY)).status_code == 200
        answer = await client.put("/api/plan", content=b"#" * (MAX_BODY + 1))
        assert answer.status_code == 413
        assert json.loads(answer.content)["error"].startswith("a body has at most")
