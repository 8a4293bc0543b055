"""One connection: its clocks, its end, its last words."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from penstock import reply as replies
from penstock.journal import Journal, JournalSettings
from penstock.message import Message
from penstock.net._poller import Poller
from penstock.net.stream import SocketStream
from penstock.reply import DISK_FULL, Reply
from penstock.server.connection import Connection
from penstock.server.deadlines import Sweeper
from penstock.transaction import Peer, Transaction
from tests.helpers import PEER, FakeWorker, Recorder, Replies, listener_of


class Talk:
    """The client's end of a connection under test."""

    def __init__(self, stream: trio.abc.Stream, connection: Connection, host: FakeWorker, recorder: Recorder) -> None:
        self.stream = stream
        self.connection = connection
        self.host = host
        self.recorder = recorder
        self._replies = Replies(stream)

    async def send(self, *lines: str) -> None:
        await self.stream.send_all("".join(f"{line}\r\n" for line in lines).encode())

    async def reply(self) -> str:
        """Return the last line of the next reply; "" at the end."""
        return await self._replies.next()

    async def ask(self, *lines: str) -> str:
        """Send lines and return the last reply to them."""
        await self.send(*lines)
        answer = ""
        for _ in lines:
            answer = await self.reply()
        return answer

    async def begin_data(self) -> None:
        await self.ask("EHLO client", "MAIL FROM:<a@example.com>", "RCPT TO:<b@example.org>")
        assert (await self.ask("DATA")).startswith("354")


@asynccontextmanager
async def talking(
    folder: Path,
    settings: dict[str, Any],
    *,
    recorder: Recorder | None = None,
    journal: Journal | None = None,
    policies: tuple[object, ...] = (),
    peer: Peer = PEER,
    greeted: bool = True,
) -> AsyncIterator[Talk]:
    """Run a connection with its sweeper, and talk to it."""
    recorder = recorder or Recorder()
    host = FakeWorker()
    listener = listener_of(settings, recorder, folder, journal=journal, policies=policies)
    client_end, server_end = trio.testing.memory_stream_pair()
    sweeper = Sweeper(listener.limits.shortest_timeout)
    connection = Connection(server_end, peer, listener, host)
    async with trio.open_nursery() as nursery:
        sweeper.watched.add(connection)
        nursery.start_soon(sweeper.run)

        async def run() -> None:
            await connection.run()
            nursery.cancel_scope.cancel()

        nursery.start_soon(run)
        talk = Talk(client_end, connection, host, recorder)
        if greeted:
            assert (await talk.reply()).startswith("220")
        yield talk
        await client_end.aclose()


async def test_an_idle_client_receives_421_at_its_timeout(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(tmp_path, {"limits": {"command_timeout": 300}}) as talk:
        await talk.ask("EHLO client")
        started = trio.current_time()
        assert await talk.reply() == "421 4.4.2 Idle for too long, closing"
        assert 300 <= trio.current_time() - started <= 302
        assert await talk.reply() == ""


async def test_a_client_that_drips_octets_is_idle(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(tmp_path, {"limits": {"command_timeout": 30}}) as talk:
        started = trio.current_time()

        async def drip() -> None:
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await talk.stream.send_all(b"N")
                    await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            assert (await talk.reply()).startswith("421 4.4.2")
            assert 30 <= trio.current_time() - started <= 32


async def test_a_client_that_talks_is_not_idle(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(tmp_path, {"limits": {"command_timeout": 30}}) as talk:
        for _ in range(10):
            await trio.sleep(25)
            assert (await talk.ask("NOOP")).startswith("250")


async def test_a_message_that_drips_is_cut_by_the_data_clock(tmp_path: Path, autojump_clock: object) -> None:
    journal = Journal(JournalSettings())
    async with talking(tmp_path, {"limits": {"data_timeout": 60, "command_timeout": 10}}, journal=journal) as talk:
        await talk.begin_data()
        started = trio.current_time()

        async def drip() -> None:
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await talk.stream.send_all(b"x\r\n")
                    await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            assert await talk.reply() == "421 4.4.2 The message took too long, closing"
            assert 60 <= trio.current_time() - started <= 62
    assert talk.recorder.delivered == []
    assert b'"event":"lost"' in journal.drain()


async def test_a_message_may_take_longer_than_the_idle_clock(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(tmp_path, {"limits": {"data_timeout": 60, "command_timeout": 10}}) as talk:
        await talk.begin_data()
        await trio.sleep(50)
        assert (await talk.ask("."))[:3] == "250"
        assert (await talk.reply()).startswith("421 4.4.2 Idle")


async def test_the_session_clock_is_never_armed_again(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(tmp_path, {"limits": {"session_timeout": 100}}) as talk:
        for _ in range(9):
            await trio.sleep(10)
            assert (await talk.ask("NOOP")).startswith("250")
        assert await talk.reply() == "421 4.4.2 The session took too long, closing"


async def test_stopping_sends_an_idle_client_away(tmp_path: Path) -> None:
    async with talking(tmp_path, {}) as talk:
        await talk.ask("EHLO client")
        talk.host.is_stopping = True
        talk.connection.stop(30)
        assert (await talk.reply()).startswith("421 4.3.2")
        assert await talk.reply() == ""


async def test_stopping_lets_a_message_arrive(tmp_path: Path) -> None:
    async with talking(tmp_path, {}) as talk:
        await talk.begin_data()
        talk.host.is_stopping = True
        talk.connection.stop(30)
        await trio.testing.wait_all_tasks_blocked()
        await talk.send("body", ".")
        assert (await talk.reply()).startswith("250")
        assert (await talk.reply()).startswith("421 4.3.2")
        assert len(talk.recorder.delivered) == 1


async def test_stopping_gives_a_message_no_more_than_the_grace(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(tmp_path, {}) as talk:
        await talk.begin_data()
        talk.host.is_stopping = True
        started = trio.current_time()
        talk.connection.stop(5)
        assert (await talk.reply()).startswith("421")
        assert 5 <= trio.current_time() - started <= 7


class SlowDelivery(Recorder):
    """Takes a minute to commit."""

    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        await trio.sleep(60)
        return await super().accept(message, transaction)


async def test_a_commit_is_not_cut_short_by_a_clock(tmp_path: Path, autojump_clock: object) -> None:
    recorder = SlowDelivery()
    limits = {"command_timeout": 10, "data_timeout": 10, "session_timeout": 20}
    async with talking(tmp_path, {"limits": limits}, recorder=recorder) as talk:
        await talk.begin_data()
        await talk.send(".")
        assert (await talk.reply()).startswith("250")  # committed, and said so
        assert (await talk.reply()).startswith("421")  # and only then sent away
        assert len(recorder.delivered) == 1


class Buggy(Recorder):
    """A delivery whose reply is no reply: a bug on our side of the wire."""

    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        return None  # type: ignore[return-value]  # the bug


async def test_a_bug_costs_one_connection_and_leaves_a_trace(tmp_path: Path) -> None:
    journal = Journal(JournalSettings())
    async with talking(tmp_path, {}, recorder=Buggy(), journal=journal) as talk:
        await talk.begin_data()
        await talk.send(".")
        assert await talk.reply() == "421 4.3.0 Internal error, closing"
    lines = journal.drain()
    assert b'"event":"error"' in lines
    assert b"AttributeError" in lines


async def test_the_proxy_header_names_the_client(tmp_path: Path) -> None:
    journal = Journal(JournalSettings())
    settings = {"proxy_networks": ["192.0.2.0/24"]}
    async with talking(tmp_path, settings, journal=journal, greeted=False) as talk:
        await talk.stream.send_all(b"PROXY TCP4 203.0.113.9 192.0.2.25 4711 25\r\nEHLO client\r\n")
        assert (await talk.reply()).startswith("220")
        assert (await talk.reply()).startswith("250")
    assert b'"peer":"203.0.113.9","proxy":"192.0.2.1"' in journal.drain()


async def test_a_proxy_that_does_not_announce_is_cut_off(tmp_path: Path) -> None:
    async with talking(tmp_path, {"proxy_networks": ["192.0.2.0/24"]}, greeted=False) as talk:
        await talk.send("EHLO client")
        assert await talk.reply() == ""


async def test_a_proxy_that_keeps_silent_is_cut_by_the_idle_clock(tmp_path: Path, autojump_clock: object) -> None:
    settings = {"proxy_networks": ["192.0.2.0/24"], "limits": {"command_timeout": 10}}
    async with talking(tmp_path, settings, greeted=False) as talk:
        assert (await talk.reply()).startswith("421")


async def test_others_do_not_announce(tmp_path: Path) -> None:
    settings = {"proxy_networks": ["198.51.100.0/24"]}
    async with talking(tmp_path, settings) as talk:
        assert (await talk.ask("PROXY TCP4 203.0.113.9 192.0.2.25 4711 25")).startswith("500")


async def test_a_large_message_goes_to_a_file_and_comes_back_whole(tmp_path: Path) -> None:
    async with talking(tmp_path, {}) as talk:
        await talk.begin_data()
        line = "x" * 900
        await talk.send(*[line] * 3000, ".")
        assert (await talk.reply()).startswith("250")
        assert talk.recorder.delivered[0]["body"] == (line + "\r\n") * 3000


async def test_a_client_that_is_sent_away_reads_why_before_the_reset(tmp_path: Path) -> None:
    left, right = socket.socketpair()
    listener = listener_of({}, Recorder(), tmp_path)
    connection = Connection(SocketStream.of(left), PEER, listener, FakeWorker())
    async with SocketStream.of(right) as client, trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        assert (await client.receive_some()).startswith(b"220")
        await client.send_all(b"GET / HTTP/1.1\r\n" + b"Header: x\r\n" * 10_000)
        received = b"".join([chunk async for chunk in client])
        assert received.startswith(b"500 5.5.1")


class Cramped(Recorder):
    """A delivery with room for a thousand octets."""

    def check_capacity(self, octets: int) -> Reply | None:
        return DISK_FULL if octets > 1000 else None


async def test_a_mail_that_there_is_no_room_for_is_refused_before_it_comes(tmp_path: Path) -> None:
    async with talking(tmp_path, {}, recorder=Cramped()) as talk:
        await talk.ask("EHLO client")
        assert await talk.ask("MAIL FROM:<a@b> SIZE=1001") == DISK_FULL.encoded.decode().strip()
        assert (await talk.ask("MAIL FROM:<a@b> SIZE=1000")).startswith("250")


class HelloChecker:
    async def on_helo(self, transaction: Transaction, name: str) -> Reply | None:
        return Reply(550, "5.7.1", "No") if name == "bad" else None


async def test_a_refused_hello_leaves_the_text_that_has_come(tmp_path: Path) -> None:
    async with talking(tmp_path, {}, policies=(HelloChecker(),)) as talk:
        await talk.ask("EHLO client", "MAIL FROM:<a@example.com>", "RCPT TO:<b@example.org>")
        await talk.stream.send_all(b"BDAT 14\r\nSubject: x\r\n\r\n")
        assert (await talk.reply()).startswith("250")
        assert (await talk.ask("EHLO bad")).startswith("550")
        await talk.stream.send_all(b"BDAT 7 LAST\r\nhello\r\n")
        assert (await talk.reply()).startswith("250")
        assert [each["body"] for each in talk.recorder.delivered] == ["Subject: x\r\n\r\nhello\r\n"]


class SenderChecker:
    """Notes each sender in a header field, and defers the first."""

    def __init__(self) -> None:
        self.results: list[tuple[list[str], int]] = []

    async def on_mail(self, transaction: Transaction, path: Path, parameters: object) -> Reply | None:
        transaction.add_field("X-Checked", str(path))
        transaction.results["senders"] = [*transaction.results.get("senders", ()), str(path)]
        return Reply(450, "4.7.1", "Later") if "first" in str(path) else None

    async def on_message(self, transaction: Transaction, message: Message) -> Reply | None:
        senders = [str(sender) for sender in transaction.results["senders"]]
        self.results.append((senders, message.prefix.count(b"X-Checked")))
        return None


async def test_what_policies_noted_of_a_refused_sender_is_forgotten(tmp_path: Path) -> None:
    checker = SenderChecker()
    async with talking(tmp_path, {}, policies=(checker,)) as talk:
        assert (await talk.ask("EHLO client", "MAIL FROM:<first@example.com>")).startswith("450")
        await talk.ask("MAIL FROM:<second@example.com>", "RCPT TO:<b@example.org>", "DATA")
        assert (await talk.ask("Subject: x\r\n\r\n.")).startswith("250")
    ((senders, fields),) = checker.results
    assert len(senders) == 1
    assert "second" in senders[0]
    assert fields <= 1


class Refusing(Recorder):
    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        return Reply(550, "5.7.1", "Spam")


async def test_a_refused_lmtp_message_is_one_error_whatever_its_recipients(tmp_path: Path) -> None:
    async with talking(tmp_path, {"kind": "lmtp"}, recorder=Refusing()) as talk:
        await talk.ask("LHLO client", "MAIL FROM:<a@example.com>")
        await talk.ask(*(f"RCPT TO:<b{n}@example.org>" for n in range(25)))
        await talk.ask("DATA")
        await talk.send("Subject: x", "", ".")
        assert [(await talk.reply())[:9] for _ in range(25)] == ["550 5.7.1"] * 25
        assert (await talk.ask("NOOP")).startswith("250")


async def test_a_refused_text_is_answered_at_its_end_however_long_it_comes(
    tmp_path: Path, autojump_clock: object
) -> None:
    settings = {"max_size": 70_000, "limits": {"command_timeout": 30, "data_timeout": 300}}
    async with talking(tmp_path, settings) as talk:
        await talk.begin_data()
        for _ in range(100):
            await talk.stream.send_all(b"x" * 998 + b"\r\n")
            await trio.sleep(1)
        await talk.send(".")
        assert (await talk.reply()).startswith("552")


async def test_every_pipelined_command_is_answered_before_quit_or_the_end(tmp_path: Path) -> None:
    listener = listener_of({}, Recorder(), tmp_path)
    for tail in (b"QUIT\r\n", b""):
        for count in range(300, 2_500, 200):
            poller = Poller()
            ours, theirs = socket.socketpair()
            for end in (ours, theirs):
                end.setblocking(False)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            connection = Connection(SocketStream.of(theirs, poller), PEER, listener, FakeWorker())
            got = b""
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run)
                await trio.testing.wait_all_tasks_blocked()
                ours.send(b"EHLO x\r\nMAIL FROM:<a@b.example>\r\n")
                poller.poll()
                ours.send(b"RCPT TO:<a@b.example>\r\n" * count)
                poller.poll()  # has begun, and has more than one turn to do: then comes the rest
                if tail:
                    ours.send(tail)
                else:
                    ours.shutdown(socket.SHUT_WR)
                while True:
                    poller.poll()
                    await trio.lowlevel.checkpoint()
                    try:
                        data = ours.recv(1 << 20)
                    except BlockingIOError:
                        continue
                    if not data:
                        break
                    got += data
            ours.close()
            poller.close()
            answered = sum(line.startswith((b"250 2.1.5", b"452 4.5.3")) for line in got.split(b"\r\n"))
            assert answered == count, tail


async def test_a_client_can_be_dismissed_after_a_wait_was_cut_short(tmp_path: Path) -> None:
    poller = Poller()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection = Connection(SocketStream.of(theirs, poller), PEER, listener_of({}, Recorder(), tmp_path), FakeWorker())
    with trio.move_on_after(0):
        await connection._wait(trio.sleep_forever)  # as the wait before a late greeting
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        await trio.testing.wait_all_tasks_blocked()
        connection.expire(replies.IDLE_TIMEOUT)
        await trio.testing.wait_all_tasks_blocked()
        got = ours.recv(4096)
        ours.close()
        while poller.poll():
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    poller.close()
    assert got.endswith(replies.IDLE_TIMEOUT.encoded)
