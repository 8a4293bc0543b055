"""The HTTP API of a sink, and its page.

    GET    /                            the page
    GET    /api/health                  {"status": "ok"}
    GET    /api/receipts                the whole report (penstock.sink.report)
    POST   /api/receipts/reset          reset all counters
    GET    /api/live?after=N            what changes: totals, and the samples after the N-th
    GET    /api/events?after=ID         the same as server-sent events, one per second
    GET    /api/history                 the whole run in at most 720 samples
    GET    /api/plan                    the fault plan in force, TOML, with its comments
    PUT    /api/plan                    replace it; 400 names the wrong key
    POST   /api/plan/check              check a plan without using it: {"error": "", "rules": [...]}
    GET    /api/plan/examples           plans to start from
    POST   /api/fail-next               {"phase": "RCPT", "reply": "452 4.2.2 Full", "count": 3}
    GET    /api/messages?q=&limit=&before=      kept messages, the newest first; q: see penstock.sink.web.search
    DELETE /api/messages?q=             delete the messages that match, all of them without q
    GET    /api/messages/ID             header and parts
    PATCH  /api/messages/ID             {"is_read": true}
    DELETE /api/messages/ID             delete it
    GET    /api/messages/ID/raw         the message as it was received
    POST   /api/messages/ID/release     {"recipients": ["a@example.org"]}: send it on through the hop of --release
    GET    /api/messages/ID/parts/N     a part, decoded, whole
    GET    /api/messages/ID/parts/N/view?remote=    an HTML or text part as UTF-8; HTML is made fit for a frame

`before` is the id of a message: the list continues with those kept before it, in the order in which they were kept,
which need not be the order of their ids. A deleted message still has its place; nothing is before a message that had to
make room for others or was never there, so a list that is read page by page ends. Messages kept in the meantime appear
on none of the further pages.

Errors are {"error": "..."} with 400, 401, 403, 404, 405, 408, 409, 413, 421, 502 or 503. Unknown query parameters are
an error. Parts that are not kept whole are 409, never shortened.

What all pages ask for once a second is made once a second, however many they are. Most of them follow the events: each
has what /api/live returns after the last sample of the event before. An event's id names this sink, the generation of
its counters and that sample; a client that comes back with it (`Last-Event-ID`, or `after`) gets what it missed, or all
samples when the id is from another sink or generation. More than 50 streams are refused with 503; /api/live remains.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Final

import msgspec
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from penstock.sink.control import EXAMPLES
from penstock.sink.kept import KeptMessages
from penstock.sink.plan import parse_plan
from penstock.sink.report import FaultCount, Report, Sample, encode
from penstock.sink.statistics import FaultControl, Statistics
from penstock.sink.web.answers import Refused, as_json, number_of, read_json, route, wait_until_gone
from penstock.sink.web.guard import App, Guard, Receive, Scope, Send, WebOrigin
from penstock.sink.web.history import History
from penstock.sink.web.messages import MessagesApi
from penstock.sink.web.release import Hop

_PAGE: Final = Path(__file__).parent / "page"
_FRESH: Final = 0.5
"""Seconds for which a report is used again."""
MAX_STREAMS: Final = 50
"""Clients that follow /api/events at a time: half of the connections."""
_RETRY: Final = 1000
"""Milliseconds after which a browser opens a broken stream again."""

Meta = msgspec.Meta


class FailNext(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of /api/fail-next."""

    phase: Annotated[str, Meta(min_length=1, max_length=20)]
    reply: Annotated[str | int, Meta(description='"452 4.2.2 Mailbox full", "452" or 452')]
    count: Annotated[int, Meta(ge=1, le=1_000_000)] = 1


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """What a page shows: the report without its long parts."""

    generation: Annotated[int, Meta(description="Incremented when the counters are reset")]
    report: Report
    samples: Annotated[list[Sample], Meta(description="After the sample that the client named, the newest last")]
    last: Annotated[int, Meta(description="The number to send as `after` next time")]
    faults: list[FaultCount]
    pending: Annotated[dict[str, int], Meta(description="Commands that fail-next will still fail, by phase")]
    has_plan: Annotated[bool, Meta(description="Fault plans are available")]
    fails_next: Annotated[bool, Meta(description="fail-next is available")]
    keeps: Annotated[int, Meta(description="How many messages are kept at most; 0: none")]
    kept: Annotated[int, Meta(description="How many messages are kept now")]
    mail_changes: Annotated[int, Meta(description="Incremented with each change of the kept mail")]
    release_hop: Annotated[str, Meta(description="Where released messages go; empty: they cannot be released")]


async def _refuse(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, Refused)
    return as_json({"error": exc.error}, exc.status)


async def _not_found(request: Request, _: Exception) -> Response:
    return as_json({"error": f"unknown path {request.url.path[:200]!r}"}, 404)


async def _wrong_method(request: Request, _: Exception) -> Response:
    routes = [each for each in request.app.routes if each.matches(request.scope)[0] is not Match.NONE]
    allowed = ", ".join(sorted({method for each in routes for method in each.methods}))  # one path has several routes
    error = f"{request.method} is not allowed here; expected one of: {allowed}"
    return as_json({"error": error}, 405, {"allow": allowed})


class SinkApi:
    """The handlers of statistics and faults."""

    def __init__(
        self,
        statistics: Statistics,
        *,
        shelf: KeptMessages | None = None,
        faults: FaultControl | None = None,
        hop: Hop | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._statistics = statistics
        self._kept_messages = shelf
        self._faults = faults
        self._hop = hop
        self._clock = clock
        self._report: Report | None = None
        self._report_at = -1.0
        self._generation = -1
        self._name = secrets.token_hex(4)
        self._streams = 0
        self._events: dict[int, bytes] = {}
        self._events_of = ""
        self.history = History(statistics)

    def routes(self) -> list[Route]:
        """Return the routes of the handlers."""
        return [
            *(Route(path, _answer(*file)) for path, file in _FILES.items()),
            route("/api/health", self.health),
            route("/api/receipts", self.receipts),
            route("/api/receipts/reset", self.reset, method="POST"),
            route("/api/live", self.live, "after"),
            route("/api/events", self.events, "after"),
            route("/api/history", self.whole_run),
            route("/api/plan", self.plan),
            route("/api/plan", self.replace_plan, method="PUT"),
            route("/api/plan/check", self.check_plan, method="POST"),
            route("/api/plan/examples", self.examples),
            route("/api/fail-next", self.fail_next, method="POST"),
        ]

    # ---- statistics

    async def health(self, _: Request) -> Response:
        """Answer, which shows that the loop of the sessions runs."""
        return as_json({"status": "ok"})

    async def receipts(self, _: Request) -> Response:
        """Return the whole report."""
        return Response(encode(self._statistics.report()), media_type="application/json")

    async def reset(self, _: Request) -> Response:
        """Reset the counters."""
        self._statistics.reset()
        return as_json({"generation": self._statistics.generation})

    async def whole_run(self, _: Request) -> Response:
        """Return the whole run."""
        self.history.update()
        points, span = self.history.points, self.history.span
        return as_json({"generation": self._statistics.generation, "span": span, "samples": points})

    async def live(self, request: Request) -> Response:
        """Return what a page shows."""
        return as_json(self._live(number_of(request, "after", 0, 0, 1 << 53)))

    def _live(self, after: int) -> Live:
        """Return what a page shows that has the samples up to one."""
        statistics, now = self._statistics, self._clock()
        is_old = now - self._report_at >= _FRESH or self._generation != statistics.generation
        if self._report is None or is_old:
            self._report = statistics.report(is_full=False)
            self._report_at, self._generation = now, statistics.generation
        available = len(statistics.samples)
        wanted = min(max(statistics.taken - after, 0), available) if after else available
        shelf, faults = self._kept_messages, self._faults
        return Live(
            generation=statistics.generation,
            report=self._report,
            samples=list(statistics.samples)[available - wanted :],
            last=statistics.taken,
            faults=self._report.faults,
            pending={} if faults is None else faults.pending(),
            has_plan=faults is not None,
            fails_next=faults is not None and faults.fails_next,
            keeps=0 if shelf is None else shelf.count,
            kept=0 if shelf is None else len(shelf),
            mail_changes=0 if shelf is None else shelf.changes,
            release_hop="" if self._hop is None or shelf is None else str(self._hop),
        )

    async def events(self, request: Request) -> App:
        """Follow what a page shows."""
        known = self._known(request.headers.get("last-event-id") or request.query_params.get("after", ""))

        async def stream(scope: Scope, receive: Receive, send: Send) -> None:
            if self._streams >= MAX_STREAMS:
                raise Refused(503, f"{MAX_STREAMS} clients follow the events, which is the limit; use /api/live")
            # nginx buffers answers by default, which would hold events back.
            headers = [(b"content-type", b"text/event-stream"), (b"x-accel-buffering", b"no")]
            self._streams += 1
            try:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                if scope["method"] == "HEAD":
                    await send({"type": "http.response.body", "body": b""})
                    return
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait_until_gone, receive, nursery.cancel_scope)
                    await self._follow(send, known)
            finally:
                self._streams -= 1

        return stream

    def _known(self, event: str) -> int:
        """Return the last sample that the receiver of an event has; 0 when the event is not from this sink."""
        source, _, taken = event.rpartition(".")
        is_ours = source == f"{self._name}.{self._statistics.generation}"
        return int(taken) if is_ours and taken.isascii() and taken.isdigit() and len(taken) <= 16 else 0

    async def _follow(self, send: Send, known: int) -> None:
        """Send an event for each sample, and when the counters are reset, until cancelled."""
        statistics = self._statistics
        generation = statistics.generation
        await send({"type": "http.response.body", "body": b"retry: %d\n" % _RETRY, "more_body": True})
        while True:
            taken = statistics.taken
            await send({"type": "http.response.body", "body": self._event(known), "more_body": True})
            known = taken
            if (statistics.generation, statistics.taken) == (generation, taken):
                await statistics.wait_for_news()
            if statistics.generation != generation:
                generation, known = statistics.generation, 0

    def _event(self, known: int) -> bytes:
        """Return the event for clients that have the samples up to one: made once for all of them."""
        statistics = self._statistics
        name = f"{self._name}.{statistics.generation}.{statistics.taken}"
        if name != self._events_of:
            self._events_of, self._events = name, {}
        if known not in self._events:
            self._events[known] = b"id: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(self._live(known)))
        return self._events[known]

    # ---- faults

    def _control(self) -> FaultControl:
        if self._faults is None:
            raise Refused(409, "this sink injects no faults")
        return self._faults

    async def plan(self, _: Request) -> Response:
        """Return the plan in force."""
        return Response(self._control().plan(), media_type="application/toml")

    async def replace_plan(self, request: Request) -> Response:
        """Put another plan in force."""
        control = self._control()
        try:
            control.replace((await request.body()).decode())
        except ValueError as exc:
            raise Refused(400, f"the plan is invalid: {exc}") from exc
        return as_json({"plan": "in force"})

    async def check_plan(self, request: Request) -> Response:
        """Check a plan. Return what is wrong with it, or the names of its rules."""
        text = await request.body()
        try:
            rules = self._check(text.decode())
        except ValueError as exc:
            return as_json({"error": str(exc), "rules": []})
        return as_json({"error": "", "rules": rules})

    def _check(self, text: str) -> list[str]:
        """Return the names of the rules of a plan. Raise ValueError if it cannot be used here."""
        return parse_plan(text).names() if self._faults is None else self._faults.check(text)

    async def examples(self, _: Request) -> Response:
        """Return plans to start from: those that can be used here."""
        found = []
        for each in EXAMPLES:
            with suppress(ValueError):
                self._check(each.text)
                found.append(each._asdict())
        return as_json(found)

    async def fail_next(self, request: Request) -> Response:
        """Let the next commands of a phase fail."""
        control = self._control()
        wanted = await read_json(request, FailNext)
        try:
            control.fail_next(wanted.phase, str(wanted.reply), wanted.count)
        except ValueError as exc:
            raise Refused(400, str(exc)) from exc
        return as_json({"pending": control.pending()})


_TYPES: Final = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}


def _read(name: str) -> tuple[bytes, str]:
    return (_PAGE / name).read_bytes(), _TYPES[Path(name).suffix]


_FILES: Final = {
    "/": _read("index.html"),
    **{
        f"/{name}": _read(name)
        for name in ("page.css", "page.js", "dom.js", "plots.js", "run.js", "mail.js", "plan.js")
    },
}
"""The page. Read at the import: the user of --user need not be able to read it."""


def _answer(data: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_: Request) -> Response:
        return Response(data, media_type=media_type)

    return answer


def make_app(
    statistics: Statistics,
    *,
    shelf: KeptMessages | None = None,
    faults: FaultControl | None = None,
    token: str | None = None,
    origin: WebOrigin | None = None,
    hop: Hop | None = None,
) -> App:
    """Return the ASGI application. `origin` is its URL behind a proxy, `hop` takes released messages."""
    api = SinkApi(statistics, shelf=shelf, faults=faults, hop=hop)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.history.follow)
            yield
            nursery.cancel_scope.cancel()

    handlers = {Refused: _refuse, 404: _not_found, 405: _wrong_method}
    routes = [*api.routes(), *MessagesApi(shelf, hop).routes()]
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    # DELETE /api/messages/ is that of a message whose id is missing: it must not lead to the deletion of all.
    app.router.redirect_slashes = False
    return Guard(app, token=token, origin=origin)
