"""The spool, for deliveries and the relay. Called in the trio thread; another thread writes to the disk."""

from __future__ import annotations

import glob
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import trio

from penstock.message import Message
from penstock.spool.bodies import BodyThreads
from penstock.spool.committer import Committer, SpoolFullError
from penstock.spool.entry import AdminInput, AttemptRecord, ClockJump, Entry, HopState, Put, QueueDue, Recovered, Row
from penstock.spool.store import PLACES, SpoolError, Store

__all__ = ["Spool", "SpoolError", "SpoolFullError", "SpoolSettings"]


class SpoolSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The durable queue on disk."""

    path: Annotated[str, msgspec.Meta(min_length=1, description="Spool directory, relative to data_dir")] = "spool"
    body_in_file: Annotated[
        int,
        msgspec.Meta(ge=0, le=1 << 30, description="Larger bodies (octets) are stored as files beside the database"),
    ] = 256 * 1024
    waiting: Annotated[
        int, msgspec.Meta(ge=1, le=1_000_000, description="Maximum messages waiting for the disk; beyond that, 452")
    ] = 20_000
    waiting_octets: Annotated[
        int, msgspec.Meta(ge=1 << 20, le=1 << 40, description="Maximum octets of bodies waiting for the disk")
    ] = 256 * 1024 * 1024
    reserve_octets: Annotated[
        int,
        msgspec.Meta(
            ge=0, description="Octets of free space to keep; a message that would use them is refused with 452 4.3.1"
        ),
    ] = 256 * 1024 * 1024
    reserve_inodes: Annotated[int, msgspec.Meta(ge=0, description="Free inodes to keep")] = 10_000


def shard_of(path: str, index: int) -> str:
    """Return the directory of a worker's part of a spool: that of the first worker is the path itself."""
    return f"{path}-{index}" if index else path


def shards(folder: Path) -> list[int]:
    """Return the numbers of the existing parts of a spool."""
    beginning = f"{folder.name}-"
    names = [each.parent.name for each in folder.parent.glob(f"{glob.escape(folder.name)}*/spool.db")]
    numbers = [name.removeprefix(beginning) for name in names if name.startswith(beginning)]
    found = [int(number) for number in numbers if number.isascii() and number.isdecimal()]
    return sorted([0] * (folder.name in names) + found)


class Spool:
    """Messages that wait, on stable storage. See penstock.spool.entry for what goes in and out."""

    def __init__(
        self,
        settings: SpoolSettings,
        folder: Path,
        clock: Callable[[], float] = time.time,
        store: Store | None = None,
    ) -> None:
        """`clock` returns seconds since the epoch; `store` has the tables, by default those of the folder."""
        self._settings = settings
        self._store = store or Store(folder)
        self._clock = clock
        self.report_bug: Callable[[Exception], None] = traceback.print_exception
        """Gets the exceptions of callbacks."""
        self._committer = Committer(
            self._store,
            clock,
            self._report_bug,
            most_waiting=settings.waiting,
            most_octets=settings.waiting_octets,
        )
        self._threads = BodyThreads(self._store.files, self._report_bug)
        self._in_files: dict[int, trio.Event] = {}
        """Messages whose bodies are being written into files, by number, and what is set after that."""
        self.became_due: Callable[[Sequence[str]], None] = _ignore
        """Gets the queues of each message that was put and not taken, so that the relay need not poll."""

    def _report_bug(self, exc: Exception) -> None:
        self.report_bug(exc)

    def now(self) -> float:
        """Return the seconds since the epoch, by the clock of the spool."""
        return self._clock()

    @property
    def on_commit(self) -> Callable[[float, int], None] | None:
        """Gets the seconds and the requests of each transaction, in the thread of the spool."""
        return self._committer.on_commit

    @on_commit.setter
    def on_commit(self, call: Callable[[float, int], None] | None) -> None:
        self._committer.on_commit = call

    @property
    def waiting(self) -> int:
        """Messages that wait to be written."""
        return self._committer.waiting

    @property
    def puts(self) -> int:
        """Messages put so far."""
        return self._store.puts

    @property
    def newest(self) -> int:
        """The number of the newest message."""
        return self._store.newest

    @property
    def transactions(self) -> int:
        """Transactions so far."""
        return self._committer.transactions

    async def start(self) -> Recovered:
        """Open the spool and recover from a crash. Raise OSError, sqlite3.Error or SpoolError."""
        recovered = await trio.to_thread.run_sync(_open, self._store)
        self._threads.start()
        return recovered

    async def aclose(self) -> None:
        """Write what waits, and close."""
        with trio.CancelScope(shield=True):
            await self._threads.aclose()  # what is written goes to the committer
            await self._committer.aclose()
            await self._threads.aclose()  # files whose row could not be written are removed
            await trio.to_thread.run_sync(self._store.close)

    # ---- in

    async def put(
        self, message: Message, queues: Sequence[str], *, is_taken: bool = False, is_held: bool = False
    ) -> list[Entry]:
        """Write a message; `queues` has the domain queue of each recipient. Return once it is on stable storage.

        A recipient that is named several times is written once. With `is_taken` the recipients are written as being
        attempted, and the entries to attempt are returned, one for each queue; a body of the database is in them, one
        stored in a file is read from the file. With `is_held` they are not attempted before an operator releases them.

        Raise OSError, sqlite3.Error or SpoolFullError: then nothing was written. Cannot be cancelled once it has begun:
        the caller learns the result.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        put = self._put_of(message, queues, is_taken, is_held)
        if put.data is None:
            self._committer.check_capacity(0, self._threads.waiting)
            self._in_files[put.number] = written = trio.Event()
            try:
                await self._threads.write(put.number, message.body)
            finally:
                del self._in_files[put.number]
                written.set()
        try:
            await self._committer.put(put)
        except BaseException:
            if put.data is None:
                self._threads.remove_later(put.number)
            raise
        if is_taken:
            return self._entries(put)
        if not is_held:
            self.became_due(put.queues)
        return []

    def _put_of(self, message: Message, queues: Sequence[str], is_taken: bool, is_held: bool) -> Put:
        if len(queues) > 1:
            message, queues = without_duplicates(message, queues)
        is_filed = message.body.size > self._settings.body_in_file
        data = None if is_filed else b"".join(message.body.chunks())
        return Put(self._store.new_number(), message, data, queues, is_taken, is_held)

    def _entries(self, put: Put) -> list[Entry]:
        """Return the entries of a message that was put as taken, one for each queue."""
        message = put.message
        envelope, queues, first = message.envelope, put.queues, put.number << PLACES
        if len(queues) == 1:
            body = self._store.body(put.number, message.body.size, put.data)
            row = Row(first, 1, False, queues[0])
            return [
                Entry(put.number, message.id, row.queue, envelope, (row,), message.prefix, body, message.received_at)
            ]
        groups: dict[str, list[int]] = {}
        for place, queue in enumerate(queues):
            groups.setdefault(queue, []).append(place)
        entries = []
        for queue, places in groups.items():
            if len(groups) > 1:
                recipients = tuple(message.envelope.recipients[place] for place in places)
                envelope = message.envelope._replace(recipients=recipients)
            rows = tuple(Row(first + place, 1, False, queue) for place in places)
            body = self._store.body(put.number, message.body.size, put.data)
            entries.append(
                Entry(put.number, message.id, queue, envelope, rows, message.prefix, body, message.received_at)
            )
        return entries

    # ---- out

    async def due_queues(self, now: float, limit: int, until: float = 0.0) -> list[QueueDue]:
        """Return queues that have recipients due, the earliest first. An index look-up, never a scan.

        They are not found again before `until`, unless something is put into them: the caller takes from them.
        """
        return await self._committer.do(lambda store: store.due_queues(now, limit, until))

    async def next_due(self) -> float | None:
        """Return when the first queue is due, perhaps too early; None if nothing waits."""
        return await self._committer.do(lambda store: store.next_due())

    async def take(
        self,
        queue: str,
        now: float,
        limit: int,
        octets: int,
        until: float = 0.0,
        same_route: Callable[[str], bool] | None = None,
    ) -> list[Entry]:
        """Take what a queue has due: about `limit` recipients and `octets` octets, but at least one message.

        Recipients of these messages that are due in other queues are taken too where `same_route`, which is called in
        another thread, is true of the queue. What else is due is not found by `due_queues` before `until`: the caller
        takes again.

        The attempt is recorded when this returns. Cannot be cancelled once it has begun: what was taken is returned.
        """
        return await self._committer.do(
            lambda store: store.take(queue, now, limit, octets, until, same_route), whole=True
        )

    async def record(
        self, records: Sequence[AttemptRecord], messages: Sequence[tuple[Message, Sequence[str]]] = ()
    ) -> None:
        """Write the ends of attempts, and put the reports on them, in one transaction: both or neither.

        The reports have bodies in memory. Cannot be cancelled once it has begun.
        """
        now = self._clock()
        puts = [
            # With the time of its number: the clock may have been set since the report was made.
            Put(self._store.new_number(), message._replace(received_at=now), b"".join(message.body.chunks()), queues)
            for message, queues in messages
        ]

        def act(store: Store) -> list[int]:
            if puts:
                store.put(puts, now)
            return store.record(records)

        for number in await self._committer.do(act, whole=True):
            self._threads.remove_later(number)
        for _, queues in messages:
            self.became_due(queues)

    # ---- operators

    async def count(self) -> int:
        """Return the number of messages."""
        return await self._committer.do(lambda store: store.count_messages())

    async def admin_input(self) -> AdminInput:
        """Return what operators have asked for since the last call; see `QueueAdmin`."""
        return await self._committer.do(lambda store: store.admin_input(), whole=True)

    async def carry_out(self, action: str, withdrawn: Sequence[int], at_rest: Sequence[int]) -> None:
        """Hold, drop or retry recipients, and answer the instructions.

        `withdrawn` are written as being attempted, but are not. `at_rest` were not; those that are now are not changed.
        """
        now = self._clock()
        removed = await self._committer.do(lambda store: store.carry_out(action, withdrawn, at_rest, now), whole=True)
        for number in removed:
            self._threads.remove_later(number)

    async def answer(self, rows: Sequence[int], *, is_done: bool) -> None:
        """Answer the instructions on recipients."""
        await self._committer.do(lambda store: store.answer(rows, is_done=is_done), whole=True)

    async def take_rows(self, rows: Sequence[int]) -> list[Entry]:
        """Take recipients that wait or are held, whenever they are due. It does not count as an attempt."""
        return await self._committer.do(lambda store: store.take_rows(rows), whole=True)

    async def write_hops(self, hops: Sequence[HopState]) -> None:
        """Write which next hops are backing off, for `penstock spool hops`."""
        await self._committer.do(lambda store: store.write_hops(hops))

    async def reschedule(self, now: float, waits: Sequence[float], longest: float) -> int:
        """After a clock jump: give what is due later than `longest` seconds from now a time of the schedule `waits`.

        Return the number of recipients.
        """
        return await self._committer.do(lambda store: store.reschedule(now, waits, longest), whole=True)

    async def shift_received(self, jump: ClockJump, after: int) -> int:
        """Correct when some messages were received, after a jump of the clock. Return the number of the last one.

        Messages up to the number `after` are done. All are when the number of the newest one is returned.
        """
        for number, written in list(self._in_files.items()):
            if number <= jump.newest:
                await written.wait()  # its row, with the time before the jump, is with the committer then
        return await self._committer.do(lambda store: store.shift_received(jump, after), whole=True)

    async def received_at(self, numbers: Sequence[int]) -> dict[int, float]:
        """Return when messages were received, by their numbers, as far as they are here."""
        return await self._committer.do(lambda store: store.received_at(numbers))


def without_duplicates(message: Message, queues: Sequence[str]) -> tuple[Message, Sequence[str]]:
    """Return a message with each recipient once: a client may name one again, and it still gets one copy."""
    envelope = message.envelope
    places = {(to.path.local, to.path.domain): place for place, to in reversed(list(enumerate(envelope.recipients)))}
    if len(places) == len(queues):
        return message, queues
    kept = sorted(places.values())
    recipients = tuple(envelope.recipients[place] for place in kept)
    return message._replace(envelope=envelope._replace(recipients=recipients)), [queues[place] for place in kept]


def _ignore(_: Sequence[str]) -> None:
    """Without a relay."""


def _open(store: Store) -> Recovered:
    return store.open()
