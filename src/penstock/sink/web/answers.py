"""What the handlers of the HTTP API share: errors, JSON, query parameters, work in a thread."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from penstock.sink.web.guard import App, Receive
from penstock.sink.web.mime import Work

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)


class Refused(Exception):  # noqa: N818 - an answer, not an accident
    """A request is answered with an error."""

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status
        self.error = error


def as_json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def encoded(data: bytes) -> Response:
    """Return a response of JSON that was encoded before: in a thread, if it is large."""
    return Response(data, media_type="application/json")


async def read_json(request: Request, kind: type[S]) -> S:
    """Return the body of a request. Raise Refused when it is not JSON of this shape."""
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except msgspec.ValidationError as exc:
        raise Refused(400, str(exc)) from exc
    except (msgspec.DecodeError, RecursionError) as exc:
        raise Refused(400, f"the body is not JSON: {exc}") from exc


def route(path: str, answer: Callable[[Request], Awaitable[App | Response]], *known: str, method: str = "GET") -> Route:
    """Return a route whose query parameters are known; others, and repeated ones, are refused."""

    async def checked(request: Request) -> App | Response:
        _check_parameters(request, *known)
        return await answer(request)

    return Route(path, checked, methods=[method])


def _check_parameters(request: Request, *known: str) -> None:
    given = [name for name, _ in request.query_params.multi_items()]
    for name in given:
        if name not in known:
            expected = (
                f"expected {'one of' if len(known) > 1 else 'only'}: {', '.join(known)}" if known else "none is known"
            )
            raise Refused(400, f"unknown query parameter {name[:40]!r}; {expected}")
        if given.count(name) > 1:
            raise Refused(400, f"query parameter {name!r} is given more than once")


def number_of(request: Request, name: str, default: int, least: int, most: int) -> int:
    """Return a number from the query. Raise Refused when it is out of range."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and least <= int(text) <= most):
        raise Refused(400, f"{name} is a number from {least} to {most}, not {text[:40]!r}")
    return int(text)


async def wait_until_gone(receive: Receive, scope: trio.CancelScope) -> None:
    """Cancel a scope when the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def in_thread(request: Request, function: Callable[[Work], T]) -> T:
    """Run a function in the one thread that reads mail: it shares the interpreter with the SMTP sessions.

    The work is cancelled when the client leaves; what is returned then is discarded.
    """
    work = Work()
    results: list[T] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_until_gone, request.receive, nursery.cancel_scope)
        try:
            results.append(
                await trio.to_thread.run_sync(function, work, limiter=_limiter_of(_READING, 1), abandon_on_cancel=True)
            )
        finally:
            work.abandon()
        nursery.cancel_scope.cancel()
    if not results:
        raise Refused(499, "the client has closed the connection")
    return results[0]


_READING: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("penstock-web-reading")
_RELEASING: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("penstock-web-releasing")


def _limiter_of(variable: trio.lowlevel.RunVar[trio.CapacityLimiter], threads: int) -> trio.CapacityLimiter:
    """Return a limiter of the running loop."""
    try:
        return variable.get()
    except LookupError:
        limiter = trio.CapacityLimiter(threads)
        variable.set(limiter)
        return limiter


def releasing_limiter() -> trio.CapacityLimiter:
    """Return what bounds the messages that are released at a time."""
    return _limiter_of(_RELEASING, 2)
