"""The spool: what is put is taken out again, whatever happens in between."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import outcome
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.message import Body, Envelope, Recipient
from penstock.message import Path as MailPath
from penstock.server.body import BodyCollector, BodySettings, FileBody, MemoryBudget
from penstock.spool import store
from penstock.spool.admin import QueueAdmin
from penstock.spool.entry import DUE, AttemptRecord, Entry, Outcome, Put, QueueDue
from penstock.spool.spool import Spool, SpoolError, SpoolFullError, SpoolSettings
from penstock.spool.store import LOCK, Store
from tests.contracts.delivery import make_message

NOW = 1_000_000.0


@asynccontextmanager
async def opened(folder: Path, now: float = NOW, **changes: Any) -> AsyncIterator[Spool]:
    spool = Spool(SpoolSettings(**changes), folder, clock=lambda: now)
    await spool.start()
    try:
        yield spool
    finally:
        await spool.aclose()


def settled(entry: Entry, what: Outcome, reply: str = "", next_try: float = 0.0) -> list[AttemptRecord]:
    return [AttemptRecord(row.number, entry.queue, what, reply, next_try) for row in entry.rows]


def text_of(entry: Entry) -> bytes:
    return entry.prefix + b"".join(entry.body.chunks())


class Blocked:
    """Holds the thread of the committer in a transaction until the end of the block."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._begun = threading.Event()
        self._over = threading.Event()

    async def __aenter__(self) -> None:
        self._spool._committer.do_later(self._hold, lambda _: None)
        while not self._begun.is_set():
            await trio.lowlevel.checkpoint()

    async def __aexit__(self, *_: object) -> None:
        self._over.set()

    def _hold(self, _: Store) -> None:
        self._begun.set()
        assert self._over.wait(30)


async def take_all(spool: Spool, now: float = NOW) -> list[Entry]:
    entries: list[Entry] = []
    for due in await spool.due_queues(now, 100):
        entries += await spool.take(due.queue, now, 1000, 1 << 30)
    return entries


async def test_a_message_is_taken_as_it_was_put(tmp_path: Path) -> None:
    recipients = (
        Recipient(
            MailPath('"j. d"@Example.org', "j. d", "example.org"), frozenset({"SUCCESS", "FAILURE"}), "rfc822;x@y"
        ),
        Recipient(MailPath("grün@example.org", "grün", "example.org")),
    )
    envelope = Envelope(
        MailPath("", "", ""),
        recipients,
        "8BITMIME",
        smtputf8=True,
        size=77,
        ret="HDRS",
        envid="x+2By",
        auth="",
        requiretls=True,
    )
    message = make_message(b"Subject: x\r\n", b"\r\n.\0\xff\r\n")._replace(envelope=envelope)
    async with opened(tmp_path) as spool:
        await spool.put(message, ["example.org"] * 2)
        (entry,) = await take_all(spool)
    assert entry.envelope == envelope
    assert entry.id == message.id
    assert entry.received_at == message.received_at
    assert text_of(entry) == b"Received: by test\r\nSubject: x\r\n\r\n.\0\xff\r\n"
    assert [row.attempts for row in entry.rows] == [1, 1]


async def test_a_message_that_is_put_as_taken_need_not_be_read_back(tmp_path: Path) -> None:
    message = make_message(b"body", recipients=("a@x", "b@y", "c@x"))
    async with opened(tmp_path) as spool:
        first, second = await spool.put(message, ["x", "y", "x"], is_taken=True)
        assert await take_all(spool) == []
        assert [str(to) for to in first.envelope.recipients] == ["a@x", "c@x"]
        assert [str(to) for to in second.envelope.recipients] == ["b@y"]
        message.body.close()
        assert text_of(second).endswith(b"body")
        await spool.record(settled(first, Outcome.RETURNED, next_try=NOW) + settled(second, Outcome.DELIVERED))
        (again,) = await take_all(spool)
    assert again.rows == first.rows
    assert again.envelope == first.envelope


async def test_recipients_wait_in_their_queues(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await spool.put(make_message(b"1", recipients=("a@x", "b@y")), ["x", "y"])
        await spool.put(make_message(b"2", recipients=("c@x",)), ["x"])
        assert await spool.due_queues(NOW, 10) == [QueueDue("x", NOW), QueueDue("y", NOW)]
        assert [text_of(entry)[-1:] for entry in await spool.take("x", NOW, 10, 1 << 30)] == [b"1", b"2"]
        assert await spool.due_queues(NOW, 10) == [QueueDue("y", NOW)]
        assert await spool.take("z", NOW, 10, 1 << 30) == []


async def test_a_take_is_bounded_and_returns_at_least_one(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        for number in range(5):
            await spool.put(make_message(b"%d" % number * 1000), ["x"])
        assert len(await spool.take("x", NOW, 2, 1 << 30)) == 2
        assert len(await spool.take("x", NOW, 10, 1)) == 1
        assert len(await spool.take("x", NOW, 10, 1500)) == 2
        assert await spool.next_due() is None


async def test_a_deferred_recipient_is_due_again_and_not_before(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await spool.put(make_message(b"x"), ["x"])
        (entry,) = await take_all(spool)
        await spool.record(settled(entry, Outcome.DEFERRED, "451 later", NOW + 60))
        assert await take_all(spool, NOW + 59) == []
        assert await spool.next_due() == NOW + 60
        (entry,) = await take_all(spool, NOW + 60)
        assert entry.rows[0].attempts == 2


async def test_a_queue_that_is_taken_from_is_postponed(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await spool.put(make_message(b"x"), ["x"])
        await spool.put(make_message(b"x"), ["x"])
        await spool.put(make_message(b"y"), ["y"])
        assert len(await spool.take("x", NOW, 1, 1 << 20, NOW + 30)) == 1
        assert await spool.due_queues(NOW, 10) == [QueueDue("y", NOW)]
        assert await spool.due_queues(NOW + 30, 10) == [QueueDue("y", NOW), QueueDue("x", NOW + 30)]


async def test_a_bounce_and_its_record_share_a_transaction(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await spool.put(make_message(b"x"), ["x"])
        (entry,) = await take_all(spool)
        before = spool.transactions
        await spool.record(settled(entry, Outcome.FAILED, "550 no"), [(make_message(b"bounce", sender=""), ["back"])])
        assert spool.transactions == before + 1
        (bounce,) = await take_all(spool)
        assert bounce.queue == "back"


async def test_the_relay_is_notified_of_what_became_due(tmp_path: Path) -> None:
    heard: list[str] = []
    async with opened(tmp_path) as spool:
        spool.became_due = heard.extend
        await spool.put(make_message(b"x"), ["x"])
        await spool.put(make_message(b"x"), ["taken"], is_taken=True)
        (entry,) = await take_all(spool)
        await spool.record(settled(entry, Outcome.DELIVERED), [(make_message(b"bounce"), ["back"])])
    assert heard == ["x", "back"]


async def test_large_bodies_are_files_that_live_with_their_message(tmp_path: Path) -> None:
    body = os.urandom(300_000)
    async with opened(tmp_path, body_in_file=1000) as spool:
        (entry,) = await spool.put(make_message(body), ["x"], is_taken=True)
        (file,) = body_files(tmp_path)
        assert file.read_bytes() == body
        assert text_of(entry) == b"Received: by test\r\n" + body
        await spool.record(settled(entry, Outcome.DELIVERED))
    assert not file.exists()


def body_files(folder: Path) -> list[Path]:
    return [path for path in (folder / "bodies").rglob("*") if path.is_file()]


async def spilled(folder: Path, data: bytes) -> Body:
    """Return a body that was received in pieces into an unnamed file."""
    collector = BodyCollector(BodySettings(memory_per_message=1000), MemoryBudget(1 << 20), folder)
    for start in range(0, len(data), 5000):
        await collector.add(data[start : start + 5000])
    return await collector.finish()


async def test_a_body_that_came_into_a_file_is_not_copied(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    async with opened(tmp_path, body_in_file=1000) as spool:
        body = await spilled(tmp_path, data)
        assert isinstance(body, FileBody)
        inode = os.fstat(body._descriptor).st_ino
        (entry,) = await spool.put(make_message(b"")._replace(body=body), ["x"], is_taken=True)
        body.close()
        (file,) = body_files(tmp_path)
        assert file.stat().st_ino == inode
        assert text_of(entry).endswith(data)


async def test_a_body_on_another_file_system_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    data = os.urandom(100_000)
    async with opened(tmp_path, body_in_file=1000) as spool:
        body = await spilled(tmp_path, data)
        (entry,) = await spool.put(make_message(b"")._replace(body=body), ["x"], is_taken=True)
        body.close()
        assert text_of(entry).endswith(data)


async def test_large_bodies_that_wait_are_bounded(tmp_path: Path) -> None:
    refused: list[SpoolFullError] = []

    async def put(spool: Spool) -> None:
        try:
            await spool.put(make_message(b"x" * 2000), ["x"])
        except SpoolFullError as exc:
            refused.append(exc)

    async with opened(tmp_path, body_in_file=1000, waiting=3) as spool:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(put, spool)
        assert len(await take_all(spool)) == 3
    assert len(refused) == 2
    assert len(body_files(tmp_path)) == 3


async def test_files_without_a_message_are_removed_at_the_start(tmp_path: Path) -> None:
    async with opened(tmp_path, body_in_file=10) as spool:
        await spool.put(make_message(b"x" * 100), ["x"])
    stray = tmp_path / "bodies" / "99" / "999"
    stray.write_bytes(b"left by a crash")
    spool = Spool(SpoolSettings(), tmp_path)
    recovered = await spool.start()
    assert (recovered.messages, recovered.swept) == (1, 1)
    assert not stray.exists()
    (entry,) = await take_all(spool)
    assert text_of(entry).endswith(b"x" * 100)
    await spool.aclose()


async def test_interrupted_attempts_are_due_again_after_a_crash(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await spool.put(make_message(b"x"), ["x"], is_taken=True)
    spool = Spool(SpoolSettings(), tmp_path)
    recovered = await spool.start()
    assert recovered.interrupted == 1
    (entry,) = await take_all(spool)
    assert entry.rows[0].attempts == 2
    await spool.aclose()


async def test_a_spool_has_one_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_LOCK_WAIT", 0.0)
    async with opened(tmp_path):
        with pytest.raises(SpoolError, match="another server"):
            await Spool(SpoolSettings(), tmp_path).start()


# ---- the committer


async def test_many_puts_share_a_transaction(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        before = spool.transactions
        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(spool.put, make_message(b"x"), ["x"])
        assert spool.transactions - before < 100
        assert len(await spool.take("x", NOW, 1000, 1 << 30)) == 200


async def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await spool.put(make_message(b"x" * 100_000), ["x"])
        await spool._committer.do(lambda it: it._database.execute("PRAGMA max_page_count = 18").fetchall())
        with pytest.raises(sqlite3.OperationalError, match="full"):
            await spool.put(make_message(b"y" * 100_000), ["x"])
        await spool._committer.do(lambda it: it._database.execute("PRAGMA max_page_count = 1000000").fetchall())
        await spool.put(make_message(b"z" * 100_000), ["x"])
        assert [text_of(entry)[-1:] for entry in await take_all(spool)] == [b"x", b"z"]


async def test_a_large_body_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, body_in_file=10) as spool:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "I/O error")))
            with pytest.raises(OSError, match="I/O"):
                await spool.put(make_message(b"x" * 100), ["x"])
        assert body_files(tmp_path) == []
        assert await take_all(spool) == []


async def test_a_request_that_fails_does_not_affect_others(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        done: list[outcome.Outcome[object]] = []
        async with trio.open_nursery() as nursery, Blocked(spool):  # the two share the next batch
            spool._committer.do_later(lambda _: 1 / 0, done.append)
            nursery.start_soon(spool.put, make_message(b"x"), ["x"])
            await trio.testing.wait_all_tasks_blocked()
        assert isinstance(done[0], outcome.Error)
        assert len(await take_all(spool)) == 1


async def test_what_waits_to_be_written_is_bounded(tmp_path: Path) -> None:
    async with opened(tmp_path, waiting=2) as spool:
        async with trio.open_nursery() as nursery, Blocked(spool):
            for _ in range(2):
                nursery.start_soon(spool.put, make_message(b"x"), ["x"])
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(SpoolFullError):
                await spool.put(make_message(b"x"), ["x"])
        await spool.put(make_message(b"x"), ["x"])
        assert len(await take_all(spool)) == 3


async def test_octets_that_wait_to_be_written_are_bounded(tmp_path: Path) -> None:
    async with opened(tmp_path, waiting_octets=1 << 20, body_in_file=4 << 20) as spool:
        async with trio.open_nursery() as nursery, Blocked(spool):
            nursery.start_soon(spool.put, make_message(b"x" * (2 << 20)), ["x"])  # more than the bound, but alone
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(SpoolFullError):
                await spool.put(make_message(b"x"), ["x"])
        await take_all(spool)
        await spool.put(make_message(b"x"), ["x"])


async def test_a_cancelled_request_affects_no_other(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        async with Blocked(spool), trio.open_nursery() as nursery:
            nursery.start_soon(spool.next_due)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await spool.put(make_message(b"x"), ["x"])
        assert await spool.next_due() == NOW


async def test_a_put_cannot_be_cancelled_once_begun(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        entries: list[Entry] = []

        async def put() -> None:
            entries.extend(await spool.put(make_message(b"x"), ["x"], is_taken=True))

        async with trio.open_nursery() as nursery, Blocked(spool):
            nursery.start_soon(put)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert len(entries) == 1
        with trio.CancelScope() as scope:
            scope.cancel()
            await spool.put(make_message(b"not begun"), ["x"])
        assert scope.cancelled_caught
        assert await take_all(spool) == []


async def test_a_cancelled_take_takes_nothing_or_returns_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await spool.put(make_message(b"x"), ["x"])
        entries: list[Entry] = []

        async def take() -> None:
            entries.extend(await spool.take("x", NOW, 10, 1 << 20))

        async with trio.open_nursery() as nursery, Blocked(spool):
            nursery.start_soon(take)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert len(entries) == 1


async def test_a_callback_with_a_bug_does_not_affect_others(tmp_path: Path) -> None:
    bugs: list[Exception] = []

    def fail(_: object) -> None:
        raise ZeroDivisionError

    async with opened(tmp_path) as spool:
        spool.report_bug = bugs.append
        async with trio.open_nursery() as nursery, Blocked(spool):
            spool._committer.do_later(lambda _: None, fail)
            nursery.start_soon(spool.put, make_message(b"x"), ["x"])
            await trio.testing.wait_all_tasks_blocked()
        assert len(await take_all(spool)) == 1
    assert [type(bug) for bug in bugs] == [ZeroDivisionError]


async def test_a_closed_spool_refuses_requests(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        pass
    await spool.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await spool.next_due()
    with pytest.raises(SpoolFullError):
        await spool.put(make_message(b"x"), ["x"])


@pytest.mark.parametrize(
    ("messages", "octets", "recipients", "transactions"),
    [(600, 10, 1, 3), (9, 1 << 20, 1, 2), (12, 10, 1000, 3)],
    ids=["messages", "octets", "recipients"],
)
async def test_a_transaction_is_bounded(
    tmp_path: Path, messages: int, octets: int, recipients: int, transactions: int
) -> None:
    to = tuple(f"{number}@x" for number in range(recipients))
    async with opened(tmp_path, body_in_file=1 << 20) as spool:
        async with trio.open_nursery() as nursery, Blocked(spool):
            before = spool.transactions
            for _ in range(messages):
                nursery.start_soon(spool.put, make_message(b"x" * octets, recipients=to), ["x"] * recipients)
            await trio.testing.wait_all_tasks_blocked()
        assert spool.transactions - before == 1 + transactions


async def test_a_recipient_without_a_message_is_held(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await spool.put(make_message(b"x"), ["x"])
        await spool.put(make_message(b"y"), ["x"])
        await spool._committer.do(lambda it: it._database.execute("DELETE FROM message WHERE number = 1"))
        assert [text_of(entry)[-1:] for entry in await take_all(spool)] == [b"y"]
        assert await spool.next_due() is None


async def test_a_server_waits_for_a_command_that_tests_the_lock(tmp_path: Path) -> None:
    tmp_path.joinpath(LOCK).touch()
    looking = os.open(tmp_path / LOCK, os.O_RDWR)
    fcntl.flock(looking, fcntl.LOCK_SH)
    timer = threading.Timer(0.1, os.close, (looking,))
    timer.start()
    async with opened(tmp_path) as spool:
        await spool.put(make_message(b"x"), ["x"])
    timer.join()


async def test_a_spool_that_cannot_be_opened_leaves_nothing_open(tmp_path: Path) -> None:
    async with opened(tmp_path):
        pass
    with sqlite3.connect(tmp_path / "spool.db") as database:
        database.execute("PRAGMA user_version = 99")
    for _ in range(2):
        with pytest.raises(SpoolError, match="version 99, expected 3"):
            await Spool(SpoolSettings(), tmp_path).start()
        with pytest.raises(SpoolError, match="version 99, expected 3"), QueueAdmin.opened(tmp_path):
            pass
    database.execute("PRAGMA user_version = 3")
    database.close()
    async with opened(tmp_path):
        pass


# ---- a crash, for real

WRITER = """
import sys, trio
from pathlib import Path
from penstock.spool.spool import Spool, SpoolSettings
from tests.contracts.delivery import make_message

async def main():
    spool = Spool(SpoolSettings(body_in_file=4000), Path(sys.argv[1]))
    await spool.start()
    async def write(number):
        for again in range(10000):
            message = make_message(b"%d " % number * (1 + again % 3 * 1000))
            await spool.put(message, ["x"])
            print(message.id, flush=True)
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(write, number)
trio.run(main)
"""


@pytest.mark.parametrize("seed", range(3))
async def test_a_killed_process_loses_nothing_it_accepted(tmp_path: Path, seed: int) -> None:
    lines = random.Random(seed).randrange(5, 100)
    folder = tmp_path / "spool"
    with subprocess.Popen(  # noqa: ASYNC220 - nothing else is to happen meanwhile
        [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        promised = {process.stdout.readline().decode().strip() for _ in range(lines)}
        process.send_signal(signal.SIGKILL)
        promised |= {line.decode().strip() for line in process.stdout if line.endswith(b"\n")}
    async with opened(folder, now=2e9) as spool:
        entries = await spool.take("x", 2e9, 100_000, 1 << 40)
    assert promised <= {str(entry.id) for entry in entries}
    for entry in entries:
        assert len(set(text_of(entry).removeprefix(b"Received: by test\r\n").split())) == 1


# ---- against a model

QUEUES = ["x", "y"]
operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.lists(st.sampled_from(QUEUES), min_size=1, max_size=3), st.booleans()),
        st.tuples(st.just("take"), st.sampled_from(QUEUES), st.integers(1, 4)),
        st.tuples(st.just("record"), st.integers(0, 20), st.sampled_from(list(Outcome)), st.integers(0, 3)),
        st.tuples(st.just("wait"), st.integers(1, 3)),
        st.tuples(st.just("crash")),
    ),
    max_size=30,
)


@given(operations)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_order_of_events_matches_the_model(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[Any, ...]]
) -> None:
    """The store agrees with a dictionary of recipients, and finds due exactly what is."""
    db = Store(tmp_path_factory.mktemp("spool"))
    db.open()
    db._database.execute("PRAGMA synchronous = OFF")  # it is not the disk that is tested
    now = NOW
    due: dict[int, tuple[str, float]] = {}
    """Row -> queue and due time of recipients that wait."""
    out: dict[int, str] = {}
    """Row -> queue of recipients that are being attempted."""
    for step in steps:
        if step[0] == "wait":
            now += step[1]
        elif step[0] == "crash":
            db.close()
            db.open()
            db._database.execute("PRAGMA synchronous = OFF")
            due |= {row: (queue, now) for row, queue in out.items()}
            out.clear()
            continue
        with db.transaction():
            if step[0] == "put":
                number = db.new_number()
                recipients = tuple(f"{place}@{queue}" for place, queue in enumerate(step[1]))
                message = make_message(b"x", recipients=recipients)
                db.put([Put(number, message, b"x", step[1], step[2])], now)
                for place, queue in enumerate(step[1]):
                    row = (number << 20) + place
                    if step[2]:
                        out[row] = queue
                    else:
                        due[row] = (queue, now)
            elif step[0] == "take":
                entries = db.take(step[1], now, step[2], 1 << 30)
                rows = [row.number for entry in entries for row in entry.rows]
                could = sorted((when, row) for row, (queue, when) in due.items() if queue == step[1] and when <= now)
                assert len(rows) == min(step[2], len(could))
                for row in rows:
                    queue, when = due.pop(row)
                    assert queue == step[1]
                    assert when <= now
                    out[row] = queue
            elif step[0] == "record" and out:
                row = sorted(out)[step[1] % len(out)]
                queue = out.pop(row)
                db.record([AttemptRecord(row, queue, step[2], "", now + step[3])])
                if step[2] in (Outcome.DEFERRED, Outcome.RETURNED):
                    due[row] = (queue, now + step[3])
            queues = {queue for queue, when in due.values() if when <= now}
            assert {found.queue for found in db.due_queues(now, 10)} >= queues
            first = db.next_due()
            assert (first is None) is (not due)
            assert first is None or first <= min(when for _, when in due.values())
            held = {number for (number,) in db._database.execute("SELECT number FROM recipient")}
            assert held == due.keys() | out.keys()
            waiting = db._database.execute("SELECT number FROM recipient WHERE state = ?", (DUE,))
            assert {number for (number,) in waiting} == due.keys()
            messages = {number for (number,) in db._database.execute("SELECT number FROM message")}
            assert messages == {row >> 20 for row in held}
    db.close()


async def test_retries_count_as_written_to_the_log(tmp_path: Path) -> None:
    """Otherwise no checkpoint is made while no new mail comes."""
    async with opened(tmp_path) as spool:
        await spool.put(make_message(b"x", recipients=("a@x", "b@x")), ["x", "x"])
        before = spool._store.checkpoints.logged
        (entry,) = await spool.take("x", NOW, 10, 1 << 20)
        taken = spool._store.checkpoints.logged
        await spool.record(settled(entry, Outcome.DEFERRED, "busy", NOW + 60))
        assert (taken - before, spool._store.checkpoints.logged - taken) == (2000, 2000)
