"""The HTTP API of a sink, and the page that stands on it.

    GET    /                            the live page
    GET    /api/health                  {"status": "ok"}
    GET    /api/receipts                the whole report (penstock.sink.report)
    GET    /api/live?after=N            what changes: totals, and the samples behind the N-th
    GET    /api/events?after=ID         the same as server-sent events, one a second
    POST   /api/receipts/reset          all counters start over
    GET    /api/plan                    the fault plan in force, TOML
    PUT    /api/plan                    another one; 400 names the key that is wrong
    POST   /api/fail-next               {"phase": "RCPT", "reply": "452 4.2.2 Full", "count": 3}
    GET    /api/messages?q=&limit=&before=      kept messages, the newest first
    DELETE /api/messages                forget them all
    GET    /api/messages/ID             headers and parts;  DELETE forgets it
    GET    /api/messages/ID/raw         the text as it was received
    GET    /api/messages/ID/parts/N     a part, decoded

`before` is the id of a message: the list goes on with those that were kept before it, in the order in which they were
kept, which need not be that of their ids. A message that was deleted meanwhile still has its place; one that has made
room for others, or was never there, has nothing before it, so a list that is read page by page ends. What is kept in
the meantime is in none of the further pages.

Errors are {"error": "..."} with 400, 401, 403, 404, 408, 409, 413, 421 or 503.

What all pages ask for once a second is made once a second, however many they are. Most of them follow the events: each
is what /api/live gives, behind the sample that the event before had as its last. An event's id names this sink, the
generation of its counters and that sample; whoever comes again with it (`Last-Event-ID`, or `after`) gets what was
missed, or all samples when the id is of another sink or generation. Beyond 50 streams the answer is 503, and there is
/api/live, which scripts may like better anyway.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import quote

import msgspec
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from penstock.sink.kept import KeptMessage, Shelf
from penstock.sink.report import FaultCount, Report, Sample, encode
from penstock.sink.statistics import FaultControl, Statistics
from penstock.sink.web import mime
from penstock.sink.web.guard import PART_POLICY, App, Guard, Receive, Scope, Send

_PAGE: Final = Path(__file__).parent / "page"
_MOST_LISTED: Final = 200
_LISTED: Final = 50
_MOST_QUERY: Final = 200
_FRESH: Final = 0.5
"""Seconds for which the answer to /api/live is given again."""
_LAST_MESSAGES: Final = 12
MOST_STREAMS: Final = 50
"""Clients that follow /api/events at a time; half of the connections that there are."""
_AGAIN: Final = 1000
"""Milliseconds until a browser tries again when a stream broke off."""

Meta = msgspec.Meta


class FailNext(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What /api/fail-next is sent."""

    phase: Annotated[str, Meta(min_length=1, max_length=20)]
    reply: Annotated[str | int, Meta(description='"452 4.2.2 Mailbox full", "452" or 452')]
    count: Annotated[int, Meta(ge=1, le=1_000_000)] = 1


class MessageLine(msgspec.Struct, frozen=True, kw_only=True):
    """A message in a list."""

    id: str
    received_at: float
    sender: str
    recipients: list[str]
    subject: str
    size: int


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """What a page shows: the report without what is long."""

    generation: Annotated[int, Meta(description="Goes up when the counters start over")]
    report: Report
    samples: Annotated[list[Sample], Meta(description="Behind the one that was asked for, the newest at the end")]
    last: Annotated[int, Meta(description="Ask for what is behind this next time")]
    faults: list[FaultCount]
    pending: Annotated[dict[str, int], Meta(description="What fail-next still waits for")]
    has_plan: Annotated[bool, Meta(description="There is an engine of fault plans")]
    keeps: Annotated[int, Meta(description="How many messages are kept at most; 0 keeps none")]
    kept: Annotated[int, Meta(description="How many are kept now")]
    messages: Annotated[list[MessageLine], Meta(description="The last ones that are kept, the newest first")]


class _Refused(Exception):  # noqa: N818 - an answer, not an accident
    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status
        self.error = error


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _refuse(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, _Refused)
    return _json({"error": exc.error}, exc.status)


async def _not_found(_: Request, __: Exception) -> Response:
    return _json({"error": "there is no such page"}, 404)


async def _wrong_method(_: Request, __: Exception) -> Response:
    return _json({"error": "this page has no such method"}, 405)


class SinkApi:
    """The handlers of the API."""

    def __init__(
        self,
        receipts: Statistics,
        *,
        shelf: Shelf | None = None,
        faults: FaultControl | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._receipts = receipts
        self._shelf = shelf
        self._faults = faults
        self._clock = clock
        self._made_at = -1.0
        self._made: tuple[Report, list[MessageLine]] | None = None
        self._generation = -1
        self._name = secrets.token_hex(4)
        self._streams = 0
        self._events: dict[int, bytes] = {}
        self._events_of = ""

    def routes(self) -> list[Route]:
        """Return where each handler is found."""
        return [
            *(Route(path, _file(name)) for path, name in _FILES.items()),
            Route("/api/health", self.health),
            Route("/api/receipts", self.receipts),
            Route("/api/receipts/reset", self.reset, methods=["POST"]),
            Route("/api/live", self.live),
            Route("/api/events", self.events),
            Route("/api/plan", self.plan),
            Route("/api/plan", self.replace_plan, methods=["PUT"]),
            Route("/api/fail-next", self.fail_next, methods=["POST"]),
            Route("/api/messages", self.messages),
            Route("/api/messages", self.forget_all, methods=["DELETE"]),
            Route("/api/messages/{name}", self.message),
            Route("/api/messages/{name}", self.forget, methods=["DELETE"]),
            Route("/api/messages/{name}/raw", self.raw),
            Route("/api/messages/{name}/parts/{number:int}", self.part),
        ]

    # ---- receipts

    async def health(self, _: Request) -> Response:
        """Say that the loop has its turns."""
        return _json({"status": "ok"})

    async def receipts(self, _: Request) -> Response:
        """Return the whole report."""
        return Response(encode(self._receipts.report()), media_type="application/json")

    async def reset(self, _: Request) -> Response:
        """Start the counters over."""
        self._receipts.reset()
        return _json({"generation": self._receipts.generation})

    async def live(self, request: Request) -> Response:
        """Return what a page shows."""
        return _json(self._live(_number(request, "after", 0, 0, 1 << 53)))

    def _live(self, after: int) -> Live:
        """Return what a page shows that has the samples up to one."""
        receipts, now = self._receipts, self._clock()
        if self._made is None or now - self._made_at >= _FRESH or self._generation != receipts.generation:
            self._made = (receipts.report(is_full=False), self._last_messages())
            self._made_at, self._generation = now, receipts.generation
        report, messages = self._made
        wanted = min(max(receipts.taken - after, 0), len(receipts.samples)) if after else len(receipts.samples)
        samples = list(receipts.samples)[len(receipts.samples) - wanted :]
        shelf, faults = self._shelf, self._faults
        return Live(
            generation=receipts.generation,
            report=report,
            samples=samples,
            last=receipts.taken,
            faults=report.faults,
            pending={} if faults is None else faults.pending(),
            has_plan=faults is not None,
            keeps=0 if shelf is None else shelf.count,
            kept=0 if shelf is None else len(shelf),
            messages=messages,
        )

    async def events(self, request: Request) -> App:
        """Follow what a page shows."""
        known = self._known(request.headers.get("last-event-id") or request.query_params.get("after", ""))

        async def stream(scope: Scope, receive: Receive, send: Send) -> None:
            if self._streams >= MOST_STREAMS:
                raise _Refused(503, f"{MOST_STREAMS} clients follow the events already: ask /api/live instead")
            headers = [(b"content-type", b"text/event-stream")]
            self._streams += 1
            try:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                if scope["method"] == "HEAD":
                    await send({"type": "http.response.body", "body": b""})
                    return
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_watch, receive, nursery.cancel_scope)
                    await self._follow(send, known)
            finally:
                self._streams -= 1

        return stream

    def _known(self, event: str) -> int:
        """Return the last sample that the receiver of an event has; 0 when it was none of ours."""
        whose, _, taken = event.rpartition(".")
        is_ours = whose == f"{self._name}.{self._receipts.generation}"
        return int(taken) if is_ours and taken.isascii() and taken.isdigit() and len(taken) <= 16 else 0

    async def _follow(self, send: Send, known: int) -> None:
        """Send an event for each sample, and when the counters start over, for ever."""
        receipts = self._receipts
        generation = receipts.generation
        await send({"type": "http.response.body", "body": b"retry: %d\n" % _AGAIN, "more_body": True})
        while True:
            taken = receipts.taken
            await send({"type": "http.response.body", "body": self._event(known), "more_body": True})
            known = taken
            if (receipts.generation, receipts.taken) == (generation, taken):
                await receipts.wait_for_news()
            if receipts.generation != generation:
                generation, known = receipts.generation, 0

    def _event(self, known: int) -> bytes:
        """Return the event for those that have the samples up to one: made once for all of them."""
        receipts = self._receipts
        name = f"{self._name}.{receipts.generation}.{receipts.taken}"
        if name != self._events_of:
            self._events_of, self._events = name, {}
        if known not in self._events:
            self._events[known] = b"id: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(self._live(known)))
        return self._events[known]

    def _last_messages(self) -> list[MessageLine]:
        return [] if self._shelf is None else [_line(each) for each in self._shelf.newest(_LAST_MESSAGES)]

    # ---- faults

    def _control(self) -> FaultControl:
        if self._faults is None:
            raise _Refused(409, "this sink has no fault plan")
        return self._faults

    async def plan(self, _: Request) -> Response:
        """Return the plan in force."""
        return Response(self._control().plan(), media_type="application/toml")

    async def replace_plan(self, request: Request) -> Response:
        """Put another plan in force."""
        try:
            self._control().replace((await request.body()).decode())
        except ValueError as exc:
            raise _Refused(400, f"the plan was not taken: {exc}") from exc
        return _json({"plan": "in force"})

    async def fail_next(self, request: Request) -> Response:
        """Let the next commands of a phase fail."""
        control = self._control()
        try:
            wanted = msgspec.json.decode(await request.body(), type=FailNext)
            control.fail_next(wanted.phase, str(wanted.reply), wanted.count)
        except msgspec.ValidationError as exc:
            raise _Refused(400, str(exc)) from exc
        except msgspec.DecodeError as exc:
            raise _Refused(400, f"the body is no JSON: {exc}") from exc
        except ValueError as exc:
            raise _Refused(400, str(exc)) from exc
        return _json({"pending": control.pending()})

    # ---- messages

    def _kept(self, request: Request) -> KeptMessage:
        message = None if self._shelf is None else self._shelf.get(request.path_params["name"])
        if message is None:
            raise _Refused(404, "this message is not kept, or no longer")
        return message

    def _shelf_or_not(self) -> Shelf:
        if self._shelf is None:
            raise _Refused(409, "this sink keeps no messages: start it with --keep last:1000")
        return self._shelf

    async def messages(self, request: Request) -> Response:
        """List the messages that a query finds."""
        shelf = self._shelf_or_not()
        query = request.query_params.get("q", "").strip()
        limit = _number(request, "limit", _LISTED, 1, _MOST_LISTED)
        before = request.query_params.get("before")
        if len(query) > _MOST_QUERY:
            raise _Refused(400, f"q has at most {_MOST_QUERY} characters")
        if not query:
            found = shelf.newest(limit, before)
        else:
            candidates = shelf.newest(shelf.count, before)
            found = await trio.to_thread.run_sync(mime.find, candidates, query, limit, limiter=_threads())
        return _json({"kept": len(shelf), "keeps": shelf.count, "messages": [_line(each) for each in found]})

    async def forget_all(self, _: Request) -> Response:
        """Forget all messages."""
        return _json({"forgotten": self._shelf_or_not().clear()})

    async def message(self, request: Request) -> Response:
        """Return a message taken apart."""
        return _json(await trio.to_thread.run_sync(mime.view, self._kept(request), limiter=_threads()))

    async def forget(self, request: Request) -> Response:
        """Forget a message."""
        self._shelf_or_not().delete(self._kept(request).id)
        return _json({"forgotten": 1})

    async def raw(self, request: Request) -> Response:
        """Return the text of a message."""
        message = self._kept(request)
        headers = {"content-disposition": f'inline; filename="{message.id}.eml"'}
        return Response(message.raw, media_type="text/plain; charset=utf-8", headers=headers)

    async def part(self, request: Request) -> Response:
        """Return a part of a message, so that a browser can do no harm with it."""
        message = self._kept(request)
        try:
            number = request.path_params["number"]
            found = await trio.to_thread.run_sync(mime.content, message, number, limiter=_threads())
        except Exception as exc:
            raise _Refused(404, f"this part can not be read: {type(exc).__name__}") from exc
        if found is None:
            raise _Refused(404, "this message has no such part")
        way = "attachment" if found.is_file else "inline"
        headers = {
            "content-security-policy": PART_POLICY,
            "content-disposition": f"{way}; filename*=UTF-8''{quote(found.filename, safe='')}",
        }
        return Response(found.data, media_type=found.media_type, headers=headers)


async def _watch(receive: Receive, scope: trio.CancelScope) -> None:
    """Wait until a client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("penstock-mime")


def _threads() -> trio.CapacityLimiter:
    """Return what lets one thread at a time take mail apart: it shares the interpreter with the sessions."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(1)
        _limiter.set(limiter)
        return limiter


def _line(message: KeptMessage) -> MessageLine:
    return MessageLine(
        id=message.id,
        received_at=message.received_at,
        sender=mime.without_surrogates(message.sender),
        recipients=[mime.without_surrogates(each) for each in message.recipients[:5]],
        subject=mime.without_surrogates(message.subject),
        size=message.size,
    )


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and least <= int(text) <= most):
        raise _Refused(400, f"{name} is a number from {least} to {most}, not {text[:40]!r}")
    return int(text)


_FILES: Final = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
_TYPES: Final = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    data = (_PAGE / name).read_bytes()
    media_type = _TYPES[Path(name).suffix]

    async def answer(_: Request) -> Response:
        return Response(data, media_type=media_type)

    return answer


def make_app(
    receipts: Statistics, *, shelf: Shelf | None = None, faults: FaultControl | None = None, token: str | None = None
) -> App:
    """Return the ASGI application."""
    api = SinkApi(receipts, shelf=shelf, faults=faults)
    handlers = {_Refused: _refuse, 404: _not_found, 405: _wrong_method}
    return Guard(Starlette(routes=api.routes(), exception_handlers=handlers), token=token)
