"""The HTTP address of /metrics, /livez and /readyz.

Served by the supervisor, so that it answers while a worker hangs. Every client has bounds, because the address may be
reachable from other machines:

    connections      64; then the oldest that has sent no request is closed, or else the new one
    a request        16 KiB, within 10 s
    an answer        10 s
"""

from __future__ import annotations

import hmac
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import h11
import trio

MAX_CONNECTIONS: Final = 64
_TIMEOUT: Final = 10.0
_MAX_HEAD: Final = 16_384
_READ: Final = 4096
_LEAST_TOKEN: Final = 16
_MOST_TOKEN: Final = 1024
_TEXT: Final = "text/plain; charset=utf-8"


class Answer(NamedTuple):
    """The answer to a request."""

    status: int
    body: str
    content_type: str = _TEXT


Page = Callable[[], Awaitable[Answer]]


def read_token(file: Path) -> bytes:
    """Return the token in a file. Raise OSError, or ValueError for one that is too short."""
    with file.open("rb") as stream:
        token = stream.read(_MOST_TOKEN + 1).strip()
    if not _LEAST_TOKEN <= len(token) <= _MOST_TOKEN:
        raise ValueError(f"{file}: a token has {_LEAST_TOKEN} to {_MOST_TOKEN} characters")
    return token


class Endpoint:
    """Answers GET and HEAD of a few paths."""

    def __init__(self, pages: Mapping[str, Page], *, token_file: Path | None, protected: frozenset[str]) -> None:
        """Requests for the `protected` paths need the token of the file, if there is one."""
        self._pages = pages
        self._token_file = token_file
        self._protected = protected
        self._connections = 0
        self._reading: dict[trio.SocketStream, trio.CancelScope] = {}
        """Connections that have sent no request so far, the oldest first."""

    async def run(
        self, sockets: Sequence[socket.socket], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled; `started` once clients are accepted."""
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in sockets]
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._serve, listeners)
            task_status.started()

    async def _serve(self, stream: trio.SocketStream) -> None:
        """Be the task of one connection: one request, one answer."""
        if self._connections >= MAX_CONNECTIONS:
            if not self._reading:
                await trio.aclose_forcefully(stream)
                return
            self._reading.pop(next(iter(self._reading))).cancel()
        self._connections += 1
        try:
            async with stream:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError):
                    await self._answer_one(stream)
        finally:
            self._reading.pop(stream, None)
            self._connections -= 1

    async def _answer_one(self, stream: trio.SocketStream) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        request: h11.Request | None = None
        with trio.move_on_after(_TIMEOUT) as self._reading[stream]:
            try:
                request = await _read_request(stream, http)
            except h11.RemoteProtocolError:
                await _send(stream, http, Answer(400, "not an HTTP/1.1 request\n"), is_head=False)
        self._reading.pop(stream, None)
        if request is None:
            return
        answer = await self._answer_to(request)
        with trio.move_on_after(_TIMEOUT):
            await _send(stream, http, answer, is_head=request.method == b"HEAD")

    async def _answer_to(self, request: h11.Request) -> Answer:
        path = request.target.partition(b"?")[0].decode("latin-1")
        page = self._pages.get(path)
        if page is None:
            return Answer(404, "not found; there are " + " ".join(self._pages) + "\n")
        if request.method not in (b"GET", b"HEAD"):
            return Answer(405, "only GET and HEAD\n")
        if self._token_file is not None and path in self._protected:
            try:
                token = read_token(self._token_file)
            except (OSError, ValueError):
                return Answer(503, "metrics.token_file cannot be used; see penstock config check\n")
            sent = dict(request.headers).get(b"authorization", b"")
            if not hmac.compare_digest(sent, b"Bearer " + token):
                return Answer(401, "wrong token\n")
        return await page()


async def _read_request(stream: trio.SocketStream, http: h11.Connection) -> h11.Request | None:
    """Return the head of a request; None if the client leaves before its end. Raise h11.RemoteProtocolError."""
    while True:
        event = http.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        http.receive_data(await stream.receive_some(_READ))


async def _send(stream: trio.SocketStream, http: h11.Connection, answer: Answer, *, is_head: bool) -> None:
    body = answer.body.encode()
    headers = [("Content-Type", answer.content_type), ("Content-Length", str(len(body))), ("Connection", "close")]
    if answer.status == 401:
        headers.append(("WWW-Authenticate", "Bearer"))
    data = http.send(h11.Response(status_code=answer.status, headers=headers)) or b""
    if not is_head:
        data += http.send(h11.Data(data=body)) or b""
    await stream.send_all(data + (http.send(h11.EndOfMessage()) or b""))
