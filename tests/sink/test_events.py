"""Server-sent events: one per second, the same for all clients, continuing after the last one received."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
import pytest
import trio

from penstock.metrics._session import Metrics
from penstock.sink.statistics import Statistics
from penstock.sink.web import app
from penstock.sink.web.serve import bind_web, serve_web
from tests.sink.test_statistics import Clock, receipts


class Event(NamedTuple):
    id: str
    live: dict[str, Any]

    @property
    def seconds(self) -> list[float]:
        """When the samples were taken."""
        return [sample["at"] for sample in self.live["samples"]]


class Sink:
    """The page of a sink whose clock the test moves."""

    def __init__(self, made: Statistics, clock: Clock, port: int, scope: trio.CancelScope) -> None:
        self.receipts = made
        self.port = port
        self.scope = scope
        self._clock = clock

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pass_second(self) -> None:
        self._clock.now += 1
        self.receipts.take_sample()

    @asynccontextmanager
    async def follow(self, after: str = "", header: str = "") -> AsyncIterator[Follower]:
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            known = f"last-event-id: {header}\r\n" if header else ""
            head = f"GET /api/events?after={after} HTTP/1.1\r\nhost: localhost\r\n{known}\r\n"
            await stream.send_all(head.encode())
            yield Follower(stream)


class Follower:
    """A client of the events. Reads lines: each event is a chunk of its own."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._rest = b""

    async def line(self) -> str:
        """Return the next line. Raise EOFError after the last one."""
        while b"\n" not in self._rest:
            data = await self._stream.receive_some()
            if not data:
                raise EOFError
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode().removesuffix("\r")

    async def event(self) -> Event:
        name = ""
        while True:
            key, _, value = (await self.line()).partition(": ")
            if key == "id":
                name = value
            elif key == "data":
                return Event(name, json.loads(value))


@asynccontextmanager
async def sink(seconds: int = 3) -> AsyncIterator[Sink]:
    made, clock, _, _ = receipts(Metrics())
    sockets = bind_web("127.0.0.1:0", None)
    port = sockets[0].getsockname()[1]
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_web, app.make_app(made), sockets)
            running = Sink(made, clock, port, nursery.cancel_scope)
            for _ in range(seconds):
                running.pass_second()
            yield running
            nursery.cancel_scope.cancel()


async def test_a_stream_has_its_type() -> None:
    async with sink() as running, running.follow() as events:
        head = []
        while line := await events.line():
            head.append(line.lower())
        assert head[0].startswith("http/1.1 200")
        assert "content-type: text/event-stream" in head
        assert "cache-control: no-store" in head


async def test_the_first_event_has_all_samples() -> None:
    async with sink() as running, running.follow() as events:
        first = await events.event()
        assert (first.seconds, first.live["last"], first.live["generation"]) == ([1, 2, 3], 3, 0)
        for second in (4, 5):
            running.pass_second()
            event = await events.event()
            assert (event.seconds, event.live["last"]) == ([second], second)


async def test_an_event_is_what_live_returns() -> None:
    async with sink() as running, running.follow() as events, httpx.AsyncClient() as client:
        event = await events.event()
        assert event.live == (await client.get(f"{running.url}/api/live")).json()


@pytest.mark.parametrize("way", ["after", "header"])
async def test_a_stream_continues_after_the_last_event(way: str) -> None:
    async with sink() as running:
        async with running.follow() as events:
            known = (await events.event()).id
        running.pass_second()
        running.pass_second()
        async with running.follow(**{way: known}) as events:
            assert (await events.event()).seconds == [4, 5]


@pytest.mark.parametrize("known", ["7", "x.0.2", "..", "0.2", "x" * 1000, "%C3%A4.0.2"])
async def test_a_client_of_another_sink_gets_all_samples(known: str) -> None:
    async with sink() as running, running.follow(after=known) as events:
        assert (await events.event()).seconds == [1, 2, 3]


async def test_a_reset_is_an_event_of_its_own() -> None:
    async with sink() as running, running.follow() as events:
        known = (await events.event()).id
        running.receipts.reset()
        event = await events.event()
        assert (event.live["generation"], event.seconds) == (1, [])
        running.pass_second()
        assert (await events.event()).seconds == [1]
        async with running.follow(after=known) as again:
            assert (await again.event()).seconds == [1]


async def test_an_event_is_made_once_for_all_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    live = app.SinkApi._live

    def counted(self: app.SinkApi, after: int) -> app.Live:
        nonlocal made
        made += 1
        return live(self, after)

    monkeypatch.setattr(app.SinkApi, "_live", counted)
    async with sink() as running, running.follow() as one, running.follow() as two, running.follow() as three:
        first = [await events.event() for events in (one, two, three)]
        running.pass_second()
        second = [await events.event() for events in (one, two, three)]
        assert first == [first[0]] * 3
        assert second == [second[0]] * 3
        assert made == 2


async def test_a_stream_too_many_is_refused_until_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MAX_STREAMS", 2)
    async with sink() as running, httpx.AsyncClient(base_url=running.url) as client:
        async with running.follow() as one:
            await one.event()
            async with running.follow() as two:
                await two.event()
                refused = await client.get("/api/events")
                assert refused.status_code == 503
                assert "use /api/live" in refused.json()["error"]
                assert (await client.get("/api/live")).status_code == 200
        status = "503"
        while status == "503":  # the server needs a turn to see that a client has left
            async with running.follow() as again:
                status = (await again.line()).split(" ")[1]
        assert status == "200"


async def test_a_head_of_the_events_ends() -> None:
    async with sink() as running, httpx.AsyncClient(base_url=running.url) as client:
        assert (await client.head("/api/events")).status_code == 200


async def test_streams_end_with_the_sink() -> None:
    async with sink() as running, running.follow() as events:
        await events.event()
        running.scope.cancel()
        with trio.CancelScope(shield=True), pytest.raises((EOFError, trio.BrokenResourceError)):
            await events.event()


async def test_a_stream_outlasts_the_time_out_of_requests(autojump_clock: object) -> None:
    async with sink() as running, running.follow() as events:
        await events.event()
        for second in (4, 5, 6):
            await trio.sleep(18)
            running.pass_second()
            assert (await events.event()).seconds == [second]
