"""A faulty connection with a client that reads and writes octets, in memory or on TCP."""

from __future__ import annotations

import dataclasses
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
import trio.testing

from penstock.journal import Journal, JournalSettings
from penstock.metrics._session import Metrics
from penstock.net.stream import SocketStream
from penstock.server.connection import Connection
from penstock.server.deadlines import Sweeper
from penstock.sink.certificates import Certificates
from penstock.sink.faults import FaultEngine, FaultLog
from penstock.sink.injector import fault_injection
from penstock.sink.plan import parse_plan
from penstock.transaction import Peer
from tests.helpers import PEER, FakeWorker, Recorder, listener_of

CERTIFICATES = Certificates(["localhost"])
EHLO, MAIL, RCPT = "EHLO client.example", "MAIL FROM:<a@example.com>", "RCPT TO:<b@example.org>"


class Talk:
    """The client's end of a faulty connection."""

    def __init__(
        self, stream: trio.abc.Stream, engine: FaultEngine, recorder: Recorder, connection: Connection
    ) -> None:
        self.connection = connection
        self.stream = stream
        self.engine = engine
        self.recorder = recorder
        self._buffer = b""

    @property
    def log(self) -> FaultLog:
        assert isinstance(self.engine.receipts, FaultLog)
        return self.engine.receipts

    async def send(self, *lines: str) -> None:
        await self.stream.send_all("".join(f"{line}\r\n" for line in lines).encode())

    async def line(self) -> bytes:
        """Return the next line with its end; what there is of it when the server has closed."""
        while b"\n" not in self._buffer:
            data = await self.stream.receive_some(65536)
            if not data:
                rest, self._buffer = self._buffer, b""
                return rest
            self._buffer += data
        line, end, self._buffer = self._buffer.partition(b"\n")
        return line + end

    async def reply(self) -> str:
        """Return the last line of the next reply; "" at the end."""
        while (line := await self.line())[3:4] == b"-":
            pass
        return line.decode().rstrip()

    async def ask(self, *lines: str) -> str:
        """Send lines and return the last reply to them."""
        await self.send(*lines)
        answer = ""
        for _ in lines:
            answer = await self.reply()
        return answer

    async def begin(self, *recipients: str, sender: str = "a@example.com") -> str:
        """Say EHLO, MAIL and RCPT; return the reply to the last one."""
        rcpts = [f"RCPT TO:<{recipient}>" for recipient in recipients or ("b@example.org",)]
        return await self.ask(EHLO, f"MAIL FROM:<{sender}>", *rcpts)

    async def mail(self, *recipients: str, sender: str = "a@example.com", text: str = "Subject: x\r\n\r\nHello") -> str:
        """Send a message; return the reply to its dot."""
        await self.begin(*recipients, sender=sender)
        assert (await self.ask("DATA")).startswith("354")
        return await self.end(text)

    async def end(self, text: str = "Hello") -> str:
        """Send a text and its end; return the reply."""
        await self.send(text, ".")
        return await self.reply()


@asynccontextmanager
async def _serving(connection: Connection, sweeper: Sweeper) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        sweeper.watched.add(connection)
        nursery.start_soon(sweeper.run)

        async def run() -> None:
            await connection.run()
            sweeper.watched.discard(connection)

        nursery.start_soon(run)
        yield nursery
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def talking(
    folder: Path,
    plan: str = "",
    *,
    settings: dict[str, Any] | None = None,
    tls: ssl.SSLContext | None = None,
    engine: FaultEngine | None = None,
    recorder: Recorder | None = None,
    tcp: bool = False,
    has_magic: bool = False,
    greeted: bool = True,
    peer: Peer = PEER,
    journal: Journal | None = None,
    metrics: Metrics | None = None,
) -> AsyncIterator[Talk]:
    """Run a faulty connection, and talk to it. `tcp` has it on a socket, which alone can be reset."""
    engine = engine or FaultEngine(parse_plan(plan), has_magic=has_magic)
    recorder = recorder or Recorder()
    journal = journal or Journal(JournalSettings())
    settings = {"max_hops": 0, **(settings or {})}
    listener = listener_of(settings, recorder, folder, tls=tls, journal=journal)
    if metrics is not None:
        listener = dataclasses.replace(listener, metrics=metrics)
    listener = dataclasses.replace(listener, components=(fault_injection(engine, CERTIFICATES),))
    if tcp:
        ours, theirs = tcp_pair()
        server_end: trio.abc.Stream = SocketStream.of(ours)
        client_end: trio.abc.Stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    else:
        client_end, server_end = trio.testing.memory_stream_pair()
    connection = Connection(server_end, peer, listener, FakeWorker())
    async with _serving(connection, Sweeper(1.0)):
        talk = Talk(client_end, engine, recorder, connection)
        if greeted:
            assert (await talk.reply()).startswith("220")
        yield talk
        await trio.aclose_forcefully(client_end)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return two ends of a connection through the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    client.setblocking(False)
    return server, client


async def took(what: Callable[[], Any]) -> tuple[float, Any]:
    """Return how many seconds something takes, and what comes of it."""
    began = trio.current_time()
    result = await what()
    return trio.current_time() - began, result
