"""A worker: sessions with and without a task, their clocks, and the end."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.app import Overrides, Server, assemble
from penstock.config import Settings, parse
from penstock.journal import Journal, JournalSettings
from penstock.server.connection import Component, Connection
from tests.helpers import Replies

LISTENER = '[[listener]]\naddress = "127.0.0.1:0"\ntls.mode = "none"\n'


class Running:
    """A worker that runs, and what it has written."""

    def __init__(self, parts: Server, lines: list[bytes]) -> None:
        self.worker = parts.worker
        self.listener = parts.listeners[0].socket
        self.port: int = self.listener.getsockname()[1]
        self._lines = lines

    def events(self, name: str) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in b"".join(self._lines).splitlines()]
        return [record for record in records if record["event"] == name]


@asynccontextmanager
async def running(
    folder: Path,
    toml: str = LISTENER,
    kind: str = "discard",
    *,
    components: tuple[Component, ...] = (),
    errors: int = 0,
) -> AsyncIterator[Running]:
    settings: Settings = parse(f'hostname = "mx.example.org"\ndelivery.kind = "{kind}"\n{toml}')
    settings = msgspec.structs.replace(settings, data_dir=str(folder), journal=JournalSettings(format="json"))
    lines: list[bytes] = []
    parts = assemble(settings, Journal(settings.journal), lines.append, overrides=Overrides(components=components))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(parts.run)
            yield Running(parts, lines)
            parts.stop()
    assert parts.worker.open_connections == parts.worker.watched == parts.worker.admitted == 0
    assert b"".join(lines).count(b'"event":"error"') == errors


class Client:
    """A client of a worker."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._replies = Replies(stream)

    async def reply(self) -> str:
        """Return the last line of the next reply; "" at the end."""
        return await self._replies.next()

    async def ask(self, *lines: str) -> str:
        """Send each line and return the last reply."""
        answer = ""
        for line in lines:
            await self.stream.send_all(line.encode() + b"\r\n")
            answer = await self.reply()
        return answer


@asynccontextmanager
async def client(server: Running) -> AsyncIterator[Client]:
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        talk = Client(stream)
        yield talk


TO_DATA = ("EHLO client", "MAIL FROM:<a@example.com>", "RCPT TO:<b@example.org>", "DATA")


@pytest.mark.parametrize("kind", ["discard", "maildir"])
async def test_a_session_from_greeting_to_bye(tmp_path: Path, kind: str) -> None:
    async with running(tmp_path, kind=kind) as server, client(server) as talk:
        assert await talk.reply() == "220 mx.example.org ESMTP Penstock"
        for _ in range(3):
            assert (await talk.ask(*TO_DATA)).startswith("354")
            assert (await talk.ask("hello\r\n.")).startswith("250 2.0.0 Ok")
        assert await talk.ask("QUIT") == "221 2.0.0 Bye"
        assert await talk.reply() == ""
    assert server.events("disconnected")[0]["messages"] == 3


async def test_a_client_that_sends_single_octets_is_idle(tmp_path: Path) -> None:
    toml = f"{LISTENER}limits.command_timeout = 0.3\n"
    async with running(tmp_path, toml) as server, client(server) as talk:
        await talk.reply()
        await talk.stream.send_all(b"N")
        assert await talk.reply() == "421 4.4.2 Idle for too long, closing"
        assert await talk.reply() == ""


async def test_a_message_that_drips_is_cut(tmp_path: Path) -> None:
    toml = f"{LISTENER}limits.data_timeout = 0.3\n"
    async with running(tmp_path, toml) as server, client(server) as talk:
        await talk.reply()
        await talk.ask(*TO_DATA)
        await talk.stream.send_all(b"half a li")
        assert await talk.reply() == "421 4.4.2 The message took too long, closing"
    assert len(server.events("lost")) == 1


@pytest.mark.parametrize("kind", ["discard", "maildir"])
async def test_stopping_lets_a_message_arrive_and_sends_the_idle_away(tmp_path: Path, kind: str) -> None:
    async with running(tmp_path, kind=kind) as server, client(server) as busy, client(server) as idle:
        for talk in (busy, idle):
            await talk.reply()
        await busy.ask(*TO_DATA)
        server.worker.stop()
        assert (await idle.reply()).startswith("421 4.3.2")
        assert (await busy.ask("hello\r\n.")).startswith("250")
        assert (await busy.reply()).startswith("421 4.3.2")
        with pytest.raises(OSError, match=r"refused|attempts"):
            await trio.open_tcp_stream("127.0.0.1", server.port)


async def test_a_stop_refuses_no_client_who_waits_to_be_accepted(tmp_path: Path) -> None:
    for _ in range(12):  # the order of the poller's task and of this one is random
        async with running(tmp_path) as server:
            with server.listener.dup(), socket.socket() as waiting:  # the queue outlives the server
                waiting.connect(("127.0.0.1", server.port))
                await trio.lowlevel.checkpoint()
                server.worker.stop()
                await wait_all_tasks_blocked()
            assert not server.events("rejected")


async def test_aborting_ends_every_session_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client(server) as busy, client(server) as idle:
        for talk in (busy, idle):
            await talk.reply()
        await busy.ask(*TO_DATA)
        server.worker.abort()
        for talk in (busy, idle):
            while await talk.reply():
                pass


async def test_a_client_above_the_limit_receives_421_as_greeting(tmp_path: Path) -> None:
    toml = f"admission.connections = 1\n{LISTENER}"
    async with running(tmp_path, toml) as server, client(server) as first:
        await first.reply()
        async with client(server) as second:
            assert (await second.reply()).startswith("421 4.3.2 Too many connections")
            assert await second.reply() == ""
        assert (await first.ask("NOOP")).startswith("250")
    assert len(server.events("rejected")) == 1


async def test_a_bug_in_the_making_of_a_connection_costs_that_client_alone(tmp_path: Path) -> None:
    def broken(connection: Connection) -> None:
        if connection.number == 1:
            raise RuntimeError("a bug")

    async with running(tmp_path, components=(broken,), errors=1) as server:
        async with client(server) as first:
            assert await first.reply() == ""
        async with client(server) as second:
            assert (await second.reply())[:3] == "220"


async def test_clients_that_break_off_are_counted_out(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        for last in ("EHLO client", "DATA"):
            async with client(server) as talk:
                await talk.reply()
                await talk.ask(*TO_DATA[: TO_DATA.index(last) + 1])
                talk.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        with trio.fail_after(10):
            while server.worker.open_connections:  # noqa: ASYNC110 - the worker has no event for this
                await trio.sleep(0.01)
    assert len(server.events("lost")) == 1
    assert len(server.events("disconnected")) == 2


async def test_everything_in_one_breath_is_answered(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client(server) as talk:
        await talk.stream.send_all("\r\n".join([*TO_DATA, "hello", ".", "QUIT", ""]).encode())
        replies = [await talk.reply() for _ in range(8)]
        assert [reply[:3] for reply in replies] == ["220", "250", "250", "250", "354", "250", "221", ""]


def _greet_over_tls(port: int, context: ssl.SSLContext, session: ssl.SSLSession | None, way: str) -> ssl.SSLSocket:
    """Say EHLO inside TLS, so that the tickets have come, and return the socket. Blocks."""
    plain = socket.create_connection(("127.0.0.1", port), timeout=20)
    if way == "starttls":
        for line in (b"EHLO client\r\n", b"STARTTLS\r\n"):
            plain.recv(4096)
            plain.sendall(line)
        plain.recv(4096)
    sock = context.wrap_socket(plain, server_hostname="localhost", session=session)
    sock.sendall(b"EHLO client\r\n")
    while b"250 " not in sock.recv(4096):
        pass
    return sock


@pytest.mark.parametrize("way", ["starttls", "implicit"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_client_resumes_its_tls_session(tmp_path: Path, version: ssl.TLSVersion, way: str) -> None:
    toml = f'[[listener]]\naddress = "127.0.0.1:0"\ntls.mode = "{way}"\n'
    async with running(tmp_path, toml) as server:
        context = ssl.create_default_context(cafile=str(tmp_path / "tls" / "ca.pem"))
        context.minimum_version = context.maximum_version = version

        def talk_twice() -> list[bool | None]:
            with _greet_over_tls(server.port, context, None, way) as first:
                session, is_first_reused = first.session, first.session_reused
            with _greet_over_tls(server.port, context, session, way) as second:
                return [is_first_reused, second.session_reused]

        assert await trio.to_thread.run_sync(talk_twice) == [False, True]
