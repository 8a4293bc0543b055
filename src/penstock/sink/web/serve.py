"""Serves the page and the HTTP API in the trio loop of the sessions: an ASGI server on h11.

The page shares its process with the SMTP sessions, so everything a client can take has a bound, and no client can
delay the end of the sink:

    connections      100; further ones are answered with 503
    a request head   32 KiB, within 15 s of the connection or of the answer before it
    a request body   256 KiB, within 15 s (penstock.sink.web.guard)
    an answer        15 s for each 64 KiB

A client that sends nothing while it waits for an answer is normal: one that follows /api/events never sends again.
General ASGI servers have no bound on connections and none on clients that do not read, and shield their writes from
cancellation; h11 does what is hard about HTTP/1.1, and what is left is below.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final
from urllib.parse import unquote

import h11
import msgspec
import trio

from penstock.net.listen import ListenAddress, bind, name_of
from penstock.sink.web.guard import App, Message, Scope, WebOrigin
from penstock.sink.web.release import Hop

MAX_CONNECTIONS: Final = 100
"""Clients at a time: a browser opens up to six."""
_TIMEOUT: Final = 15
"""Seconds for the head of a request, and for each piece of an answer."""
_PIECE: Final = 65_536
_MAX_HEAD: Final = 32_768
_MAX_AHEAD: Final = 65_536
"""Octets read of further requests while one is answered."""
_FAREWELL: Final = 1.0
"""Seconds a client has to read why it is refused."""
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{8,128}")

_log = logging.getLogger(__name__)


def check_token(address: ListenAddress, token: str | None) -> None:
    """Raise ValueError when an address needs a token and has none, or when the token is too weak or malformed."""
    if token is None and not address.is_loopback:
        raise ValueError(f"{address} can be reached from other machines: it needs a token (PENSTOCK_WEB_TOKEN)")
    if token is not None and not _TOKEN.fullmatch(token):
        raise ValueError("a token consists of 8 to 128 letters, digits, - and _")


def bind_web(address: str, token: str | None) -> list[socket.socket]:
    """Bind the sockets of an address, "127.0.0.1:8025". Raise ValueError, OSError."""
    parsed = ListenAddress.parse(address)
    check_token(parsed, token)
    return bind(parsed)


def web_settings(origin: str | None, release: str | None) -> tuple[WebOrigin | None, Hop | None]:
    """Read the URL behind a proxy, and the server that takes released messages. Raise ValueError."""
    return (
        None if origin is None else WebOrigin.parse(origin),
        None if release is None else Hop.parse(release),
    )


def url_of(sock: socket.socket) -> str:
    """Return the URL to open in a browser."""
    return f"http://{name_of(sock)}/"


class _Client:
    """A connection, and the HTTP/1.1 spoken on it."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        self._ahead = 0
        self._is_head = False
        self._is_broken = False
        """An answer could not be sent."""

    async def serve(self, app: App) -> None:
        """Answer requests until the connection ends."""
        while (request := await self._next_request()) is not None:
            self._is_head = request.method == b"HEAD"
            try:
                await app(_scope(request), self._receive, self._send)
            except Exception:  # noqa: BLE001 - a bug costs one connection, not the sink
                if self._is_broken:
                    return
                _log.exception("the page failed to answer %s", request.target.decode("latin-1"))
            if self._http.our_state is h11.SEND_RESPONSE:
                await self.refuse(500, "internal error; its trace is on the sink's standard error")
            self._skip_body()
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                await self._linger()
                return
            self._http.start_next_cycle()
            self._ahead = 0

    def _skip_body(self) -> None:
        """Take in what has come of a request that was answered unread: without a body, that is its end."""
        with suppress(h11.RemoteProtocolError):
            while self._http.their_state is h11.SEND_BODY and self._http.next_event() is not h11.NEED_DATA:
                pass

    async def _next_request(self) -> h11.Request | None:
        """Return the next request; None at the end of the connection, or when nothing came in time."""
        try:
            with trio.move_on_after(_TIMEOUT):
                event = await self._next_event()
                return event if isinstance(event, h11.Request) else None
        except h11.RemoteProtocolError as exc:
            if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                await self.refuse(exc.error_status_hint, f"this is not HTTP/1.1: {exc}")
            await self._linger()
        return None

    async def _next_event(self) -> h11.Event | type[h11.PAUSED] | type[h11.NEED_DATA]:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self._http.they_are_waiting_for_100_continue:
                await self._write(self._http.send(h11.InformationalResponse(status_code=100, headers=[])))
            self._http.receive_data(await self._read())

    async def _receive(self) -> Message:
        """Return the next piece of the request's body; after it, wait until the client leaves (ASGI `receive`)."""
        try:
            if self._http.their_state is h11.SEND_BODY:
                event = await self._next_event()
                if isinstance(event, h11.Data):
                    return {"type": "http.request", "body": bytes(event.data), "more_body": True}
                if isinstance(event, h11.EndOfMessage):
                    return {"type": "http.request", "body": b"", "more_body": False}
            while self._ahead < _MAX_AHEAD and (data := await self._read()):
                self._http.receive_data(data)
                self._ahead += len(data)
            if self._ahead >= _MAX_AHEAD:
                await trio.sleep_forever()
        except h11.RemoteProtocolError:
            pass
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        """Send a piece of the answer (ASGI `send`)."""
        if message["type"] == "http.response.start":
            await self._write(self._http.send(h11.Response(status_code=message["status"], headers=message["headers"])))
            return
        body = memoryview(b"" if self._is_head else message.get("body", b""))
        for at in range(0, len(body), _PIECE):  # a large answer must not hold up the sessions
            await self._write(self._http.send(h11.Data(data=bytes(body[at : at + _PIECE]))))
        if not message.get("more_body", False):
            await self._write(self._http.send(h11.EndOfMessage()))

    async def refuse(self, status: int, error: str) -> None:
        """Send an answer of our own, the last one on this connection."""
        body = msgspec.json.encode({"error": error})
        fields = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        events = [h11.Response(status_code=status, headers=list(fields.items())), h11.Data(data=body)]
        if self._is_head:
            events.pop()
        await self._write(b"".join(self._http.send(event) or b"" for event in [*events, h11.EndOfMessage()]))

    async def turn_away(self, limit: int) -> None:
        """Refuse a client for which there is no connection."""
        with trio.move_on_after(_FAREWELL):
            await self.refuse(503, f"all {limit} connections to this page are in use; try again later")
        await self._linger()

    async def _linger(self) -> None:
        """Read for a moment: closing a socket with unread octets resets it, and the answer may be lost."""
        with trio.move_on_after(_FAREWELL):
            try:
                await self._stream.send_eof()
                while await self._read():
                    pass
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

    async def _read(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(_PIECE))
        except trio.BrokenResourceError:
            return b""

    async def _write(self, data: bytes | None) -> None:
        """Send a piece of an answer. Raise BrokenResourceError when the client does not read it in time."""
        if not data:
            return
        self._is_broken = True
        with trio.move_on_after(_TIMEOUT) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            raise trio.BrokenResourceError("the client does not read")
        self._is_broken = False


def _scope(request: h11.Request) -> Scope:
    path, _, query = request.target.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": request.http_version.decode(),
        "method": request.method.decode(),
        "scheme": "http",
        "path": unquote(path.decode("latin-1")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [(bytes(name), bytes(value)) for name, value in request.headers],
    }


@asynccontextmanager
async def _lifespan(app: App) -> AsyncIterator[None]:
    """Start and stop the application (ASGI lifespan protocol)."""
    to_app, from_server = trio.open_memory_channel[Message](2)
    started, stopped = trio.Event(), trio.Event()
    events = {"lifespan.startup.complete": started, "lifespan.shutdown.complete": stopped}

    async def send(message: Message) -> None:
        if message["type"] not in events:
            raise RuntimeError(message.get("message", message["type"]))
        events[message["type"]].set()

    # Shielded: the application is to end because it is asked to, after its clients.
    shield = trio.CancelScope(shield=True)

    async def run() -> None:
        with shield:
            await app({"type": "lifespan", "asgi": {"version": "3.0"}}, from_server.receive, send)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await to_app.send({"type": "lifespan.startup"})
        try:
            await started.wait()
            yield
        finally:
            to_app.send_nowait({"type": "lifespan.shutdown"})
            with trio.move_on_after(_FAREWELL, shield=True):
                await stopped.wait()
            shield.cancel()


async def serve_web(app: App, sockets: list[socket.socket], *, limit: int = MAX_CONNECTIONS) -> None:
    """Serve at most this number of clients at a time, until cancelled. Closes the sockets."""
    count = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal count
        count += 1
        try:
            client = _Client(stream)
            if count <= limit:
                await client.serve(app)
            elif count <= limit * 2:
                await client.turn_away(limit)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            count -= 1

    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in sockets]
    async with _lifespan(app):
        await trio.serve_listeners(serve, listeners)
