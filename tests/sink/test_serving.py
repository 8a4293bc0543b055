"""The page on real sockets: how many clients it has, how long it waits for them, and how it ends."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing

from penstock.metrics._session import Metrics
from penstock.sink.kept import KeptMessage, Shelf
from penstock.sink.web.app import make_app
from penstock.sink.web.serve import bind_web, serve_web
from tests.sink.test_statistics import receipts

HEALTH = b"GET /api/health HTTP/1.1\r\nhost: localhost\r\n\r\n"
LARGE = 16 << 20
"""Octets that no socket buffers of the kernel have room for."""


@asynccontextmanager
async def serving(*, limit: int = 10, shelf: Shelf | None = None) -> AsyncIterator[int]:
    """Serve the page of a sink, and return its port."""
    (sock,) = bind_web("127.0.0.1:0", None)
    port: int = sock.getsockname()[1]
    app = make_app(receipts(Metrics())[0], shelf=shelf)
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await serve_web(app, [sock], limit=limit)

        nursery.start_soon(serve)
        yield port
        nursery.cancel_scope.cancel()


class Caller:
    """A client that says what it likes."""

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
        """Return what comes up to the end of the connection."""
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
    """Call again until there is room: it takes the server a turn to see that somebody has left."""
    status = 503
    with trio.fail_after(60):
        while status == 503:
            async with calling(port) as caller:
                status, _ = await caller.answer()
    assert status == 200


async def test_a_client_too_many_hears_so() -> None:
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


async def test_a_client_that_has_left_keeps_no_connection(autojump_clock: object) -> None:
    async with serving(limit=1) as port:
        began = trio.current_time()
        for _ in range(5):
            await served(port)
        assert trio.current_time() - began < 1, "its connection was kept for a next request"


async def test_a_request_that_comes_octet_by_octet_is_not_waited_for(autojump_clock: object) -> None:
    async with serving() as port, calling(port) as slow:
        for octet in HEALTH[:10]:
            try:
                await slow.stream.send_all(bytes([octet]))
            except trio.BrokenResourceError:
                break
            await trio.sleep(10)
        assert await slow.rest() == b""


async def test_a_client_that_says_nothing_is_not_waited_for(autojump_clock: object) -> None:
    async with serving() as port, calling(port) as silent:
        assert await silent.rest() == b""
    async with serving() as port, calling(port) as again:
        assert (await again.answer())[0] == 200
        assert await again.rest() == b""


async def test_a_body_that_comes_octet_by_octet_is_not_waited_for(autojump_clock: object) -> None:
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


def large() -> Shelf:
    shelf = Shelf(1)
    shelf.put(KeptMessage("M1", 1.5, "a@example.com", ("b@example.org",), LARGE, b"x" * LARGE))
    return shelf


async def test_a_client_that_does_not_read_is_not_waited_for(autojump_clock: object) -> None:
    async with serving(shelf=large(), limit=1) as port, calling(port) as deaf:
        deaf.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await deaf.stream.send_all(b"GET /api/messages/M1/raw HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await trio.sleep(1)
        async with calling(port) as other:
            assert (await other.answer())[0] == 503
        await trio.sleep(60)
        async with calling(port) as other:
            assert (await other.answer())[0] == 200


async def test_a_client_that_does_not_read_holds_up_no_end() -> None:
    with trio.fail_after(10):
        async with serving(shelf=large()) as port, calling(port) as deaf:
            await deaf.stream.send_all(b"GET /api/messages/M1/raw HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await trio.testing.wait_all_tasks_blocked()


async def test_what_is_no_http_costs_its_client_only() -> None:
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
