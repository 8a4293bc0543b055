"""The page on real sockets: its bounds on clients, its time-outs, and its end."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from penstock.metrics._session import Metrics
from penstock.sink.kept import KeptMessage, KeptMessages
from penstock.sink.web.app import make_app
from penstock.sink.web.guard import Receive, Scope, Send
from penstock.sink.web.serve import bind_web, serve_web
from tests.sink.test_statistics import receipts

HEALTH = b"GET /api/health HTTP/1.1\r\nhost: localhost\r\n\r\n"
LARGE = 16 << 20
"""Octets that no socket buffers of the kernel have room for."""


@asynccontextmanager
async def serving(
    *, limit: int = 10, shelf: KeptMessages | None = None, token: str | None = None
) -> AsyncIterator[int]:
    """Serve the page of a sink, and return its port."""
    (sock,) = bind_web("127.0.0.1:0", None)
    port: int = sock.getsockname()[1]
    app = make_app(receipts(Metrics())[0], shelf=shelf, token=token)
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await serve_web(app, [sock], limit=limit)

        nursery.start_soon(serve)
        yield port
        nursery.cancel_scope.cancel()


class Caller:
    """A client that sends octets."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def answer(self, request: bytes = HEALTH) -> tuple[int, dict[str, object]]:
        """Send a request, and return the status and the body of the answer."""
        if request:
            await self.stream.send_all(request)
        data = b""
        while b"\r\n\r\n" not in data:
            more = await self.stream.receive_some()
            assert more, data
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(body) < length:
            body += await self.stream.receive_some()
        return int(head.split(b" ")[1]), json.loads(body)

    async def rest(self) -> bytes:
        """Return what is received until the end of the connection."""
        data = b""
        try:
            while more := await self.stream.receive_some():
                data += more
        except trio.BrokenResourceError:
            pass
        return data


@asynccontextmanager
async def calling(port: int) -> AsyncIterator[Caller]:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        yield Caller(stream)


async def served(port: int) -> None:
    """Call again until there is room: the server needs a turn to see that a client has left."""
    status = 503
    with trio.fail_after(60):
        while status == 503:
            async with calling(port) as caller:
                status, _ = await caller.answer()
    assert status == 200


async def test_a_client_too_many_is_refused() -> None:
    async with serving(limit=2) as port, calling(port) as first:
        async with calling(port) as second:
            for caller in (first, second):
                assert await caller.answer() == (200, {"status": "ok"})
            async with calling(port) as third:
                status, said = await third.answer()
                assert (status, said) == (503, {"error": "all 2 connections to this page are in use; try again later"})
                assert await third.rest() == b""
            assert (await first.answer())[0] == 200
        await served(port)


async def test_a_client_that_has_left_keeps_no_connection(autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = 0.05  # octets may be on their way through the kernel
    async with serving(limit=1) as port:
        began = trio.current_time()
        for _ in range(5):
            await served(port)
        assert trio.current_time() - began < 1, "its connection was kept for a next request"


async def test_a_request_that_drips_is_given_up(autojump_clock: object) -> None:
    async with serving() as port, calling(port) as slow:
        for octet in HEALTH[:10]:
            try:
                await slow.stream.send_all(bytes([octet]))
            except trio.BrokenResourceError:
                break
            await trio.sleep(10)
        assert await slow.rest() == b""


async def test_a_silent_client_is_given_up(autojump_clock: object) -> None:
    async with serving() as port, calling(port) as silent:
        assert await silent.rest() == b""
    async with serving() as port, calling(port) as again:
        assert (await again.answer())[0] == 200
        assert await again.rest() == b""


async def test_a_body_that_drips_is_given_up(autojump_clock: object) -> None:
    async with serving() as port, calling(port) as slow:
        await slow.stream.send_all(b"PUT /api/plan HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n")
        async with trio.open_nursery() as nursery:

            async def drip() -> None:
                while True:
                    await slow.stream.send_all(b"#")
                    await trio.sleep(10)

            nursery.start_soon(drip)
            assert (await slow.answer(b""))[0] == 408
            nursery.cancel_scope.cancel()


def large() -> KeptMessages:
    shelf = KeptMessages(1)
    shelf.put(KeptMessage("M1", 1.5, "a@example.com", ("b@example.org",), LARGE, b"x" * LARGE))
    return shelf


async def test_a_client_that_does_not_read_is_given_up(autojump_clock: object) -> None:
    async with serving(shelf=large(), limit=1) as port, calling(port) as deaf:
        deaf.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await deaf.stream.send_all(b"GET /api/messages/M1/raw HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await trio.sleep(1)
        async with calling(port) as other:
            assert (await other.answer())[0] == 503
        await trio.sleep(60)
        async with calling(port) as other:
            assert (await other.answer())[0] == 200


async def test_a_client_that_does_not_read_delays_no_end() -> None:
    with trio.fail_after(60):
        async with serving(shelf=large()) as port, calling(port) as deaf:
            await deaf.stream.send_all(b"GET /api/messages/M1/raw HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await trio.testing.wait_all_tasks_blocked()


async def test_malformed_requests_cost_their_client_only() -> None:
    async with serving() as port:
        for nonsense in (b"EHLO client\r\n\r\n", b"\xff" * 100 + b"\r\n\r\n", b"GET / HTTP/1.1\r\nhost: x\r\n" * 5000):
            async with calling(port) as caller:
                try:
                    await caller.stream.send_all(nonsense)
                    await caller.rest()
                except trio.BrokenResourceError:
                    pass
        async with calling(port) as caller:
            assert (await caller.answer())[0] == 200


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serving() as port, calling(port) as caller:
        last = HEALTH.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        await caller.stream.send_all(HEALTH + HEALTH.replace(b"health", b"nowhere") + last)
        assert re.findall(rb"HTTP/1.1 (\d+)", await caller.rest()) == [b"200", b"404", b"200"]


async def test_a_connection_outlives_a_request_that_is_refused_unread() -> None:
    async with serving(token="secret") as port, calling(port) as caller:
        request = HEALTH.replace(b"health", b"receipts")
        assert [(await caller.answer(request))[0] for _ in range(3)] == [401] * 3


async def test_a_head_has_no_body() -> None:
    async with serving() as port, calling(port) as caller:
        await caller.stream.send_all(HEALTH.replace(b"GET", b"HEAD") + HEALTH)
        data = b""
        while data.count(b"\r\n\r\n") < 2 or not data.endswith(b"}"):
            data += await caller.stream.receive_some()
        assert data.count(b"{") == 1


async def test_a_client_that_waits_to_send_its_body_is_asked_for_it() -> None:
    async with serving() as port, calling(port) as caller:
        head = b"PUT /api/plan HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\n"
        await caller.stream.send_all(head)
        assert (await caller.stream.receive_some()).startswith(b"HTTP/1.1 100")
        assert (await caller.answer(b"#"))[0] == 409


async def test_a_large_answer_is_whole() -> None:
    async with serving(shelf=large()) as port, calling(port) as caller:
        request = b"GET /api/messages/M1/raw HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        await caller.stream.send_all(request)
        head, _, body = (await caller.rest()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert body == b"x" * LARGE


async def test_a_body_that_is_too_long_is_refused_before_it_is_read() -> None:
    async with serving() as port, calling(port) as caller:
        head = b"PUT /api/plan HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n"
        assert (await caller.answer(head + b"#" * 100_000))[0] == 413
        assert await caller.rest() == b""


async def test_a_bug_of_the_page_costs_one_answer(caplog: pytest.LogCaptureFixture) -> None:
    (sock,) = bind_web("127.0.0.1:0", None)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raise ZeroDivisionError
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_web, app, [sock])
        async with calling(sock.getsockname()[1]) as caller:
            status, answer = await caller.answer()
            assert (status, str(answer["error"]).startswith("internal error")) == (500, True)
            assert await caller.rest() == b""
        nursery.cancel_scope.cancel()
    assert "ZeroDivisionError" in caplog.text
