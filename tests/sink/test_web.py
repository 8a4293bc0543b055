"""The HTTP API: statistics, faults, and who has access."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from penstock.cli.faulting import FaultInjection, WorkersFaultControl
from penstock.cli.smtpsink import SmtpSinkOptions
from penstock.metrics._session import Metrics
from penstock.sink.control import EXAMPLES, FaultAdmin
from penstock.sink.faults import FaultEngine, FaultLog
from penstock.sink.kept import KeptMessage, KeptMessages
from penstock.sink.statistics import FaultControl
from penstock.sink.web.app import make_app
from penstock.sink.web.guard import MAX_BODY, WebOrigin
from penstock.sink.web.release import Hop
from tests.sink.test_statistics import receipts


class Control:
    """An engine of faults."""

    def __init__(self) -> None:
        self.text = "seed = 1\n"
        self.failing: dict[str, int] = {}

    fails_next = True

    def check(self, text: str) -> list[str]:
        if "rule" in text:
            raise ValueError("rule: unknown key")
        return []

    def plan(self) -> str:
        return self.text

    def replace(self, text: str) -> None:
        self.check(text)
        self.text = text

    def fail_next(self, phase: str, reply: str, count: int) -> None:
        if phase != "RCPT":
            raise ValueError(f"unknown phase {phase!r}")
        self.failing[f"{phase} {reply}"] = count

    def pending(self) -> dict[str, int]:
        return self.failing


def shelf() -> KeptMessages:
    made = KeptMessages(10)
    for number in (1, 2, 3):
        made.put(KeptMessage(f"M{number}", 1.5, "a@example.com", ("b@example.org",), 4, b"text"))
    return made


@asynccontextmanager
async def api(
    *,
    token: str | None = None,
    shelf: KeptMessages | None = None,
    faults: FaultControl | None = None,
    metrics: Metrics | None = None,
    origin: WebOrigin | None = None,
    hop: Hop | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    made, clock, _, _ = receipts(metrics or Metrics())
    for _ in range(3):
        clock.now += 1
        made.take_sample()
    app = make_app(made, shelf=shelf, faults=faults, token=token, origin=origin, hop=hop)
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
        for name in ("page.css", "page.js", "dom.js", "plots.js", "run.js", "mail.js", "plan.js"):
            assert (await client.get(f"/{name}")).status_code == 200


async def test_the_page_names_no_other_host() -> None:
    async with api() as client:
        for path in ("/", "/page.css", "/page.js", "/dom.js", "/plots.js", "/run.js", "/mail.js", "/plan.js"):
            text = (await client.get(path)).text.replace("http://www.w3.org/2000/svg", "")
            assert "http:" not in text
            assert "https:" not in text
            assert not re.search(r"""["'`(]/(api|page)""", text), "an absolute path does not work below a prefix"


async def test_receipts_are_the_report() -> None:
    metrics = Metrics()
    metrics.count_refused_connection(b"421 4.3.2 Too many\r\n")
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
        assert refused.json()["error"] == "the plan is invalid: rule: unknown key"
        assert (await client.put("/api/plan", content=b"\xff")).status_code == 400


async def test_a_plan_keeps_its_comments() -> None:
    log = FaultLog()
    text = '# why\n[[rule]]\nphase = "rcpt"  # here\nreply = "450"\n'
    async with api(faults=FaultAdmin(FaultEngine(receipts=log), log)) as client:
        assert (await client.put("/api/plan", content=text)).status_code == 200
        assert (await client.get("/api/plan")).text == text
        await client.post("/api/receipts/reset")
        assert (await client.get("/api/plan")).text == text


async def test_a_plan_is_checked_without_being_used() -> None:
    log = FaultLog()
    async with api(faults=FaultAdmin(FaultEngine(receipts=log), log)) as client:
        checked = await client.post("/api/plan/check", content='[[rule]]\nphase = "rctp"\nreply = "450"')
        assert checked.status_code == 200
        assert checked.json()["error"].startswith("rule[0].phase: ")
        checked = await client.post("/api/plan/check", content='[[rule]]\nphase = "rcpt"\nreply = "450"')
        assert checked.json() == {"error": "", "rules": ["rcpt-1"]}
        assert (await client.get("/api/plan")).text == ""
        for body in ("rule = 1", "= 1", b"\xff"):
            assert (await client.post("/api/plan/check", content=body)).json()["error"]


async def test_examples_of_plans_are_valid() -> None:
    log = FaultLog()
    async with api(faults=FaultAdmin(FaultEngine(receipts=log), log)) as client:
        examples = (await client.get("/api/plan/examples")).json()
        assert [each["title"] for each in examples] == [each.title for each in EXAMPLES]
        for each in examples:
            assert (await client.put("/api/plan", content=each["text"])).status_code == 200


def workers_control() -> WorkersFaultControl:
    return WorkersFaultControl(FaultInjection(SmtpSinkOptions({})))


async def test_workers_offer_only_what_they_can_do() -> None:
    counting = '[[rule]]\nphase = "rcpt"\nreply = "450"\nmatch.first = 2\n'
    async with api(faults=workers_control()) as client:
        examples = (await client.get("/api/plan/examples")).json()
        assert 0 < len(examples) < len(EXAMPLES)
        for each in examples:
            assert (await client.put("/api/plan", content=each["text"])).status_code == 200
        checked = (await client.post("/api/plan/check", content=counting)).json()
        refused = await client.put("/api/plan", content=counting)
        assert checked["error"].startswith("rule[0].match.first cannot be combined")
        assert refused.json()["error"] == f"the plan is invalid: {checked['error']}"
        live = (await client.get("/api/live")).json()
        assert (live["has_plan"], live["fails_next"]) == (True, False)


async def test_workers_load_the_last_plan_whatever_its_length() -> None:
    control = workers_control()
    long = f'# {"ü" * 1000}\n[[rule]]\nphase = "rcpt"\nreply = "450"\n'
    async with api(faults=control) as client:
        for number, text in enumerate((long, "seed = 7\n"), 1):
            assert (await client.put("/api/plan", content=text.encode())).status_code == 200
            control.load(number)
            assert (control.number, control.plan()) == (number, text)


async def test_the_page_is_not_read_after_a_change_of_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", read)
    async with api() as client:
        assert (await client.get("/page.js")).status_code == 200


async def test_the_history_has_the_whole_run() -> None:
    metrics = Metrics()
    async with api(metrics=metrics) as client:
        history = (await client.get("/api/history")).json()
        assert (history["span"], [each["at"] for each in history["samples"]]) == (1, [1, 2, 3])
        await client.post("/api/receipts/reset")
        assert (await client.get("/api/history")).json()["samples"] == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/messages?query=x"),
        ("DELETE", "/api/messages?query=x"),
        ("GET", "/api/messages/M1?x=1"),
        ("GET", "/api/messages/M1/raw?x=1"),
        ("GET", "/api/messages/M1/parts/0?x=1"),
        ("GET", "/api/live?before=1"),
        ("GET", "/api/events?x=1"),
        ("GET", "/api/history?x=1"),
        ("GET", "/api/receipts?x=1"),
        ("GET", "/api/plan?x=1"),
        ("GET", "/api/messages?q=x&q=y"),
    ],
)
async def test_unknown_query_parameters_are_refused(method: str, path: str) -> None:
    kept = shelf()
    async with api(shelf=kept, faults=Control()) as client:
        refused = await client.request(method, path)
        assert refused.status_code == 400
        assert "query parameter" in refused.json()["error"]
        assert len(kept) == 3


async def test_the_known_query_parameters_are_named() -> None:
    async with api(shelf=shelf()) as client:
        refused = (await client.get("/api/messages?query=x")).json()
        assert refused["error"] == "unknown query parameter 'query'; expected one of: q, limit, before"


async def test_live_says_what_mail_there_is() -> None:
    kept = shelf()
    async with api(shelf=kept, hop=Hop("mail.example.org", 25)) as client:
        live = (await client.get("/api/live")).json()
        assert (live["kept"], live["keeps"], live["release_hop"]) == (3, 10, "mail.example.org:25")
        await client.delete("/api/messages/M1")
        after = (await client.get("/api/live")).json()
        assert (after["kept"], after["mail_changes"]) == (2, live["mail_changes"] + 1)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("", "JSON"),
        ('{"phase": "RCPT"}', "reply"),
        ('{"phase": "RCPT", "reply": "450", "count": 0}', "count"),
        ('{"phase": "RCPT", "reply": "450", "more": 1}', "more"),
        ('{"phase": "body", "reply": "450"}', "unknown phase"),
    ],
)
async def test_a_malformed_failure_is_refused(body: str, why: str) -> None:
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


async def test_unknown_pages_and_methods_are_answered_in_json() -> None:
    async with api() as client:
        assert (await client.get("/nowhere")).json() == {"error": "unknown path '/nowhere'"}
        refused = await client.delete("/api/health")
        assert refused.status_code == 405
        assert refused.json()["error"].startswith("DELETE is not allowed here; expected one of: ")
        assert "expected one of: DELETE, GET, HEAD" in (await client.post("/api/messages")).json()["error"]


# ---- access


async def test_requests_to_another_host_are_refused() -> None:
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


async def test_a_token_is_required_where_one_is_set() -> None:
    async with api(token="secret-token") as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret-token"}):
            assert (await client.get("/api/receipts", headers=headers)).status_code == 401
        assert (await client.get("/api/receipts?token=secret-token")).status_code == 401
        good = {"authorization": "Bearer secret-token", "host": "sink.example"}
        assert (await client.get("/api/receipts", headers=good)).status_code == 200


async def test_a_browser_changes_the_token_for_a_cookie() -> None:
    async with api(token="secret-token") as client:
        answer = await client.get("/?token=secret-token")
        assert (answer.status_code, answer.headers["location"]) == (303, "./")
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
        assert json.loads(answer.content)["error"].startswith("the body of a request has at most")


@pytest.mark.parametrize("path", ["/sink/", "/"])
async def test_a_page_behind_a_proxy_works_with_its_origin(path: str) -> None:
    """The proxy may remove the prefix or not, and send its own Host or ours."""
    kept = shelf()
    origin = WebOrigin.parse("https://mail.example.org/sink/")
    async with api(shelf=kept, origin=origin) as client:
        for host in ("mail.example.org", "127.0.0.1:8025"):
            headers = {"host": host, "origin": "https://mail.example.org"}
            assert (await client.get(path, headers=headers)).status_code == 200
            assert (await client.get(f"{path}page.js", headers=headers)).status_code == 200
            assert (await client.delete(f"{path}api/messages?q=nowhere", headers=headers)).status_code == 200
        foreign = {"host": "127.0.0.1:8025", "origin": "https://evil.example"}
        assert (await client.delete(f"{path}api/messages", headers=foreign)).status_code == 403
        assert (await client.get(path, headers={"host": "evil.example"})).status_code == 421
        assert len(kept) == 3


async def test_a_prefix_without_a_slash_is_redirected_to_one_with_it() -> None:
    async with api(origin=WebOrigin.parse("http://localhost/a/sink")) as client:
        answer = await client.get("/a/sink")
        assert (answer.status_code, answer.headers["location"]) == (303, "/a/sink/")
        assert (await client.get("/a/sinks")).status_code == 404


async def test_a_cookie_of_a_page_behind_a_proxy_is_for_its_prefix() -> None:
    async with api(token="secret-token", origin=WebOrigin.parse("https://x.example/sink/")) as client:
        cookie = (await client.get("/sink/?token=secret-token")).headers["set-cookie"]
        assert cookie == "penstock-token=secret-token; Path=/sink/; HttpOnly; SameSite=Strict; Secure"


@pytest.mark.parametrize("url", ["", "mail.example.org", "ftp://x/", "https://", "https://x/?a", "https://x/#a"])
def test_a_malformed_web_origin_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="a web origin looks like"):
        WebOrigin.parse(url)


async def test_events_are_not_buffered_by_a_proxy() -> None:
    async with api() as client:
        assert (await client.head("/api/events")).headers["x-accel-buffering"] == "no"
