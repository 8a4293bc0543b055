"""The HTTP API: what it answers, and whom."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from penstock._tally import Tally
from penstock.sink.desk import FaultDesk
from penstock.sink.faults import FaultEngine, FaultLog
from penstock.sink.kept import KeptMessage, Shelf
from penstock.sink.receipts import FaultControl
from penstock.sink.web.app import make_app
from penstock.sink.web.guard import MAX_BODY
from tests.sink.test_receipts import receipts

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
    tally: Tally | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    made, clock, _, _ = receipts(tally or Tally())
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
    tally = Tally()
    tally.turned_away(b"421 4.3.2 Too many\r\n")
    async with api(tally=tally) as client:
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
        why = "the plan was not taken: rule[0].phase: there is no 'rctp'; here may stand: connect, banner, ehlo, "
        assert refused.json()["error"].startswith(why)
        refused = await client.post("/api/fail-next", json={"phase": "rctp", "reply": 450})
        assert refused.json()["error"].startswith("there is no reply in a phase 'rctp'; a phase is one of banner, ehlo")


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
        for origin in ("https://evil.example", "null", "http://localhost:9999"):
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


async def test_a_body_has_a_bound() -> None:
    async with api(faults=Control()) as client:
        assert (await client.put("/api/plan", content=b"#" * MAX_BODY)).status_code == 200
        answer = await client.put("/api/plan", content=b"#" * (MAX_BODY + 1))
        assert answer.status_code == 413
        assert json.loads(answer.content)["error"].startswith("a body has at most")
