"""What a metrics is told by the sessions of a worker."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from penstock import app
from penstock.config import parse
from penstock.journal import Journal, JournalSettings
from penstock.message import Message
from penstock.metrics._session import Metrics
from penstock.reply import Reply
from penstock.server.connection import Connection
from penstock.transaction import Transaction
from tests.helpers import PEER, FakeWorker, Recorder, listener_of
from tests.server.test_worker import LISTENER, TO_DATA, Client, Running, client

Counts = dict[str, int]


def counts_of(metrics: Metrics) -> Counts:
    return {f"{phase} {code} {status}": count for phase, code, status, _, count in metrics.counted()}


@asynccontextmanager
async def counted(
    folder: Path, metrics: Metrics, toml: str = LISTENER, kind: str = "discard"
) -> AsyncIterator[Running]:
    settings = parse(f'hostname = "mx.example.org"\ndelivery.kind = "{kind}"\ndata_dir = "{folder}"\n{toml}')
    lines: list[bytes] = []
    given = app.Overrides(metrics=metrics)
    parts = app.assemble(settings, Journal(JournalSettings(format="json")), lines.append, overrides=given)
    await parts.delivery.start()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(parts.worker.run)
            yield Running(parts, lines)
            parts.worker.stop()


@pytest.mark.parametrize("kind", ["discard", "maildir"])
async def test_a_session_is_counted_reply_by_reply_and_clock_by_clock(tmp_path: Path, kind: str) -> None:
    metrics = Metrics()
    async with counted(tmp_path, metrics, kind=kind) as server, client(server) as talk:
        await talk.reply()
        said = []
        for number in (1, 2, 2):
            sender = f"MAIL FROM:<seq-run-{number}@example.com>"
            said += ["EHLO client", sender, TO_DATA[2], "RCPT TO:<>", "NONSENSE", "DATA", "hello\r\n."]
        said.append("QUIT")
        await talk.ask(*said[:-1])
        assert metrics.open_sessions == 1
        await talk.ask("QUIT")
        assert await talk.reply() == ""
    assert counts_of(metrics) == {
        "banner 220 None": 1, "EHLO 250 None": 3, "MAIL 250 2.1.0": 3, "RCPT 250 2.1.5": 3, "RCPT 501 5.1.3": 3,
        "unknown 500 5.5.1": 3, "DATA 354 None": 3, "message 250 2.0.0": 3, "QUIT 221 2.0.0": 1,
    }  # fmt: skip
    clocks = {"banner": 1, "EHLO": 3, "MAIL": 3, "RCPT": 6, "DATA": 3, "text": 3, "message": 3, "QUIT": 1, "think": 22}
    for phase, count in {**clocks, "tls": 0}.items():
        assert metrics.latency(phase).count == count, phase
    assert (metrics.sessions, metrics.open_sessions, metrics.peak_sessions, metrics.ends) == (1, 0, 1, {"QUIT": 1})
    assert (metrics.accepted, metrics.recipients, metrics.text_octets) == (3, 3, 21)
    assert metrics.recent_messages.count == 3
    assert metrics.recent_replies.count == metrics.replies == sum(counts_of(metrics).values())
    run = metrics.sequences.runs["run"]
    assert (run.received, run.distinct, run.duplicates) == (3, 2, 1)
    assert metrics.received == sum(len(line) + 2 for line in said)


async def test_pipelined_commands_are_counted_each(tmp_path: Path) -> None:
    metrics = Metrics()
    async with counted(tmp_path, metrics) as server, client(server) as talk:
        await talk.reply()
        await talk.stream.send_all(
            b"".join(line.encode() + b"\r\n" for line in (*TO_DATA[:3], *TO_DATA[2:3] * 3, "DATA"))
        )
        for _ in range(7):
            await talk.reply()
        await talk.ask("hello\r\n.", "QUIT")
    assert counts_of(metrics)["RCPT 250 2.1.5"] == metrics.latency("RCPT").count == 4
    assert metrics.latency("think").count == 3


async def test_bdat_has_a_text_and_a_reply_for_each_chunk(tmp_path: Path) -> None:
    metrics = Metrics()
    async with counted(tmp_path, metrics) as server, client(server) as talk:
        await talk.reply()
        await talk.ask(*TO_DATA[:3])
        await talk.ask("BDAT 7\r\nhello")
        await talk.ask("BDAT 7 LAST\r\nhello")
    assert counts_of(metrics)["BDAT 250 2.0.0"] == counts_of(metrics)["message 250 2.0.0"] == 1
    assert metrics.latency("text").count == metrics.latency("message").count == 1
    assert (metrics.accepted, metrics.text_octets) == (1, 14)


async def test_a_message_that_breaks_off_is_lost_and_not_received(tmp_path: Path) -> None:
    metrics = Metrics()
    async with counted(tmp_path, metrics) as server, client(server) as talk:
        await talk.reply()
        await talk.ask(*TO_DATA)
        await talk.stream.send_all(b"half a mess")
    assert metrics.lost == {"the client closed the connection": 1}
    assert (metrics.accepted, metrics.latency("text").count, metrics.open_sessions) == (0, 0, 0)


async def test_what_answers_nothing_is_unasked(tmp_path: Path) -> None:
    metrics = Metrics()
    async with (
        counted(tmp_path, metrics, f"{LISTENER}limits.command_timeout = 0.3\n") as server,
        client(server) as talk,
    ):
        await talk.reply()
        await talk.ask("EHLO client")
        assert (await talk.reply()).startswith("421")
    assert counts_of(metrics)["unasked 421 4.4.2"] == 1


async def test_clients_that_are_turned_away_are_counted(tmp_path: Path) -> None:
    metrics = Metrics()
    async with (
        counted(tmp_path, metrics, f"{LISTENER}[admission]\nconnections = 1\n") as server,
        client(server) as talk,
    ):
        await talk.reply()
        async with client(server) as other:
            assert (await other.reply()).startswith("421")
    assert counts_of(metrics)["banner 421 4.3.2"] == 1
    assert metrics.ends["turned away"] == 1
    assert metrics.sessions == 2


async def test_lmtp_counts_a_reply_for_each_recipient_and_one_message(tmp_path: Path) -> None:
    metrics = Metrics()
    async with counted(tmp_path, metrics, f'{LISTENER}kind = "lmtp"\n') as server, client(server) as talk:
        await talk.reply()
        await talk.ask("LHLO client", TO_DATA[1], TO_DATA[2], TO_DATA[2], "DATA")
        await talk.ask("hello\r\n.")
        await talk.reply()
    assert counts_of(metrics)["message 250 2.0.0"] == 2
    assert (metrics.accepted, metrics.recipients) == (1, 2)


async def test_a_source_of_its_own_finds_the_marks(tmp_path: Path) -> None:
    def of_recipient(transaction: Transaction) -> tuple[str, int] | None:
        name = transaction.recipients[0].path.local
        return ("r", int(name[1:])) if name[1:].isdigit() else None

    metrics = Metrics(source=of_recipient)
    async with counted(tmp_path, metrics) as server, client(server) as talk:
        await talk.reply()
        for name in ("b7", "bob"):
            await talk.ask("EHLO c", "MAIL FROM:<a@example.com>", f"RCPT TO:<{name}@example.org>", "DATA", "hello\r\n.")
    assert 7 in metrics.sequences.runs["r"]
    assert metrics.sequences.unmarked == 1


@asynccontextmanager
async def talking(folder: Path, metrics: Metrics, delivery: Recorder) -> AsyncIterator[Client]:
    """Talk to a connection on a stream that is no socket."""
    listener = listener_of({}, delivery, folder)
    object.__setattr__(listener, "metrics", metrics)
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Connection(ours, PEER, listener, FakeWorker()).run)
        talk = Client(theirs)  # type: ignore[arg-type]
        await talk.reply()
        yield talk


async def test_a_session_on_any_stream_is_counted_too(tmp_path: Path) -> None:
    metrics = Metrics()
    async with talking(tmp_path, metrics, Recorder()) as talk:
        await talk.ask(*TO_DATA, "hello\r\n.", "QUIT")
    assert counts_of(metrics)["message 250 2.0.0"] == 1
    assert metrics.latency("MAIL").count == 1
    assert metrics.ends == {"QUIT": 1}


async def test_a_reply_that_waits_for_a_delivery_has_waited_for_it(tmp_path: Path) -> None:
    waited: list[int] = []

    class Slow(Recorder):
        async def accept(self, message: Message, transaction: Transaction) -> Reply:
            began = time.monotonic_ns()
            for _ in range(100):
                await trio.lowlevel.checkpoint()
            waited.append(time.monotonic_ns() - began)
            return await super().accept(message, transaction)

    metrics = Metrics()
    async with talking(tmp_path, metrics, Slow()) as talk:
        await talk.ask(*TO_DATA, "hello\r\n.", "QUIT")
    assert metrics.latency("message").min >= waited[0]
