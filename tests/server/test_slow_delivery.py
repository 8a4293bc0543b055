"""Deliveries that take their time: whatever the client sends meanwhile, no reply is lost or overtaken."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from penstock import reply as replies
from penstock.journal import Journal, JournalSettings
from penstock.message import Message
from penstock.reply import Reply
from penstock.server.deadlines import Sweeper
from penstock.server.limits import Admission, AdmissionSettings
from penstock.server.listener import Listener
from penstock.server.worker import BoundListener, Worker
from penstock.transaction import Transaction
from tests.helpers import Recorder, Replies, listener_of

TAKEN = Reply(250, "2.0.0", "Ok: later")
TO_DATA = "EHLO client\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n"
SECOND = "MAIL FROM:<c@example.com>\r\nRCPT TO:<d@example.org>\r\nDATA\r\n"


class Later(Recorder):
    """A delivery that waits until the test says what becomes of each message."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Waiting] = []
        self.failure: Exception | None = None
        self._came = trio.Event()

    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        if self.failure is not None:
            raise self.failure
        waiting = Waiting(message)
        self.waiting.append(waiting)
        self._came.set()
        await waiting.settled.wait()
        return waiting.reply

    async def came(self, count: int = 1) -> None:
        """Wait until this many messages wait."""
        while len(self.waiting) < count:
            self._came = trio.Event()
            await self._came.wait()

    def settle(self, reply: Reply = TAKEN) -> list[str]:
        """Answer all that wait, and return their bodies."""
        waiting, self.waiting = self.waiting, []
        bodies = [b"".join(each.message.body.chunks()).decode() for each in waiting]
        for each in waiting:
            each.reply = reply
            each.settled.set()
        return bodies


class Waiting:
    """A message that waits for its delivery."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.settled = trio.Event()
        self.reply = TAKEN


class Running:
    """A worker whose delivery answers later."""

    def __init__(self, worker: Worker, listener: Listener, port: int, delivery: Later, lines: list[bytes]) -> None:
        self.worker = worker
        self.listener = listener
        self.port = port
        self.delivery = delivery
        self._lines = lines

    def events(self, name: str) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in b"".join(self._lines).splitlines()]
        return [record for record in records if record["event"] == name]


@asynccontextmanager
async def running(
    folder: Path,
    settings: dict[str, Any] | None = None,
    *,
    tls: ssl.SSLContext | None = None,
    policies: tuple[object, ...] = (),
    grace: float = 5.0,
    errors: int = 0,
) -> AsyncIterator[Running]:
    delivery = Later()
    journal = Journal(JournalSettings(format="json"))
    listener = listener_of(settings or {}, delivery, folder, tls=tls, journal=journal, policies=policies)
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    lines: list[bytes] = []
    sweeper = Sweeper(listener.limits.shortest_timeout)
    worker = Worker(
        [BoundListener(sock, listener)], Admission(AdmissionSettings()), sweeper, journal, lines.append, grace=grace
    )
    server = Running(worker, listener, sock.getsockname()[1], delivery, lines)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(worker.run)
            yield server
            delivery.settle()
            worker.stop()
    assert worker.open_connections == worker.watched == worker.admitted == listener.budget.used == 0
    assert len(server.events("error")) == errors


class Client:
    """A client of a worker."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._replies = Replies(stream)

    async def send(self, text: str) -> None:
        await self.stream.send_all(text.encode())

    async def replies(self, count: int) -> list[str]:
        """Return the codes of the next replies."""
        return [(await self._replies.next())[:3] for _ in range(count)]

    async def reply(self) -> str:
        return await self._replies.next()

    async def say_message(self, body: str = "hello") -> None:
        """Say all of a message, after the greeting was read."""
        await self.send(TO_DATA)
        assert await self.replies(4) == ["250", "250", "250", "354"]
        await self.send(f"{body}\r\n.\r\n")


@asynccontextmanager
async def client(server: Running) -> AsyncIterator[Client]:
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        talk = Client(stream)
        assert await talk.replies(1) == ["220"]
        yield talk


async def test_the_client_gets_no_reply_before_the_commit(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client(server) as talk:
        await talk.say_message()
        await server.delivery.came()
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0) as scope:
            await talk.reply()
        assert scope.cancelled_caught
        assert server.listener.budget.used == len("hello\r\n")
        assert server.delivery.settle() == ["hello\r\n"]
        assert await talk.reply() == "250 2.0.0 Ok: later"
        assert server.listener.budget.used == 0, "the body was not closed"
        await talk.send("QUIT\r\n")
        assert await talk.replies(2) == ["221", ""]
    assert len(server.events("accepted")) == 1
    assert server.events("disconnected")[0]["messages"] == 1


async def test_a_refusal_is_sent_and_journaled(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client(server) as talk:
        await talk.say_message()
        await server.delivery.came()
        server.delivery.settle(replies.DISK_FULL)
        assert (await talk.reply()).startswith("452 4.3.1")
        await talk.say_message("again")
        await server.delivery.came()
        assert server.delivery.settle() == ["again\r\n"]
        assert await talk.replies(1) == ["250"]
    assert len(server.events("refused")) == len(server.events("accepted")) == 1


async def test_a_delivery_that_breaks_has_not_taken_the_message(tmp_path: Path) -> None:
    async with running(tmp_path, errors=1) as server, client(server) as talk:
        server.delivery.failure = OSError("the disk is on fire")
        await talk.say_message()
        assert (await talk.reply()).startswith("451")
        server.delivery.failure = None
        await talk.say_message()
        await server.delivery.came()
        server.delivery.settle()
        assert await talk.replies(1) == ["250"]


async def test_commands_pipelined_after_a_message_wait_for_its_reply(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client(server) as talk:
        await talk.send(f"{TO_DATA}one\r\n.\r\n{SECOND}two\r\n.\r\nNOOP\r\nQUIT\r\n")
        await server.delivery.came()
        await trio.testing.wait_all_tasks_blocked()
        assert server.delivery.settle() == ["one\r\n"]
        await server.delivery.came()
        assert server.delivery.settle() == ["two\r\n"]
        assert await talk.replies(12) == [
            "250",
            "250",
            "250",
            "354",
            "250",
            "250",
            "250",
            "354",
            "250",
            "250",
            "221",
            "",
        ]
    assert len(server.events("accepted")) == 2


async def test_a_client_that_sends_on_is_not_read_from(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client(server) as talk:
        await talk.say_message()
        await server.delivery.came()
        await talk.send("NOOP\r\n" * 90)
        await trio.testing.wait_all_tasks_blocked()
        server.delivery.settle()
        assert await talk.replies(91) == ["250"] * 91


@pytest.mark.parametrize("way", ["closes", "resets"])
async def test_a_message_stays_accepted_when_its_client_hangs_up(tmp_path: Path, way: str) -> None:
    async with running(tmp_path) as server:
        async with client(server) as talk:
            await talk.say_message()
            await server.delivery.came()
            if way == "resets":
                assert isinstance(talk.stream, trio.SocketStream)
                talk.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        assert server.worker.open_connections == 1
        assert server.delivery.settle() == ["hello\r\n"]
        while server.worker.open_connections:  # noqa: ASYNC110 - the worker has no event for this
            await trio.sleep(0.01)
    assert len(server.events("accepted")) == 1
    assert server.events("lost") == []


async def test_stopping_waits_for_the_commit_and_replies_before_the_421(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client(server) as talk:
        await talk.say_message()
        await server.delivery.came()
        server.worker.stop()
        await trio.testing.wait_all_tasks_blocked()
        assert server.worker.open_connections == 1
        server.delivery.settle()
        assert await talk.reply() == "250 2.0.0 Ok: later"
        assert await talk.replies(2) == ["421", ""]
    assert len(server.events("accepted")) == 1


async def test_a_clock_that_runs_out_lets_the_reply_go_first(tmp_path: Path) -> None:
    settings = {"limits": {"command_timeout": 0.2}}
    async with running(tmp_path, settings) as server, client(server) as talk:
        await talk.say_message()
        await server.delivery.came()
        await trio.sleep(0.5)
        server.delivery.settle()
        assert await talk.reply() == "250 2.0.0 Ok: later"
        assert await talk.reply() == "421 4.4.2 Idle for too long, closing"


async def test_lmtp_answers_for_each_recipient(tmp_path: Path) -> None:
    async with running(tmp_path, {"kind": "lmtp"}) as server, client(server) as talk:
        await talk.send(
            "LHLO client\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nRCPT TO:<c@example.org>\r\n"
        )
        await talk.send("DATA\r\nhello\r\n.\r\nQUIT\r\n")
        await server.delivery.came()
        server.delivery.settle()
        assert await talk.replies(8) == ["250", "250", "250", "250", "354", "250", "250", "221"]


async def test_chunks_are_handed_over_like_data(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client(server) as talk:
        await talk.send("EHLO client\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\n")
        await talk.send("BDAT 7\r\nhello\r\nBDAT 7 LAST\r\nworld\r\nNOOP\r\n")
        await server.delivery.came()
        assert server.delivery.settle() == ["hello\r\nworld\r\n"]
        assert await talk.replies(6) == ["250"] * 6


async def test_tls_sessions_wait_without_reading_too(
    tmp_path: Path, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    settings = {"tls": {"mode": "starttls"}}
    async with running(tmp_path, settings, tls=server_tls) as server, client(server) as plain:
        await plain.send("EHLO client\r\nSTARTTLS\r\n")
        assert await plain.replies(2) == ["250", "220"]
        stream = trio.SSLStream(plain.stream, client_tls, server_hostname="localhost", https_compatible=True)
        talk = Client(stream)
        for _ in range(2):
            await talk.say_message()
            await server.delivery.came()
            server.delivery.settle()
            assert await talk.reply() == "250 2.0.0 Ok: later"
        await talk.send(f"{TO_DATA}one\r\n.\r\n{SECOND}two\r\n.\r\nQUIT\r\n")
        for body in ("one\r\n", "two\r\n"):
            await server.delivery.came()
            assert server.delivery.settle() == [body]
        assert (await talk.replies(10))[-1] == "221"


class AsksFirst:
    """A policy that needs a task for each recipient."""

    async def on_rcpt(self, transaction: Transaction, recipient: object) -> Reply | None:
        await trio.lowlevel.checkpoint()
        return None


async def test_with_an_async_policy_replies_keep_their_order(tmp_path: Path) -> None:
    async with running(tmp_path, policies=(AsksFirst(),)) as server, client(server) as talk:
        await talk.send(f"{TO_DATA}one\r\n.\r\n{SECOND}two\r\n.\r\n")
        for body in ("one\r\n", "two\r\n"):
            await server.delivery.came()
            await trio.testing.wait_all_tasks_blocked()
            assert server.delivery.settle() == [body]
        assert (await talk.replies(9))[-1] == "250"
        await talk.say_message("three")
        await server.delivery.came()
        server.delivery.settle()
        assert await talk.replies(1) == ["250"]


@pytest.fixture
def _no_epoll(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("penstock.server.worker.HAS_EPOLL", False)
    yield


@pytest.mark.usefixtures("_no_epoll")
async def test_without_a_poller_replies_keep_their_order(tmp_path: Path) -> None:
    async with running(tmp_path) as server, client(server) as talk:
        await talk.say_message()
        await server.delivery.came()
        await talk.send("NOOP\r\nQUIT\r\n")
        await trio.testing.wait_all_tasks_blocked()
        server.delivery.settle()
        assert await talk.reply() == "250 2.0.0 Ok: later"
        assert await talk.replies(2) == ["250", "221"]


async def test_a_loop_is_refused_before_the_delivery_sees_it(tmp_path: Path) -> None:
    async with running(tmp_path, {"max_hops": 2}) as server, client(server) as talk:
        await talk.say_message("Received: a\r\nReceived: b\r\n")
        assert (await talk.reply()).startswith("554 5.4.6")
        assert server.delivery.waiting == []
