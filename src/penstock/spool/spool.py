"""The spool as deliveries and the relay see it. All of it belongs to the loop; the disk is another thread's."""

from __future__ import annotations

import glob
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import outcome
import trio

from penstock.message import Message
from penstock.spool.bodies import BodyThreads
from penstock.spool.committer import Committer, SpoolFullError
from penstock.spool.entry import Entry, LaneDue, Put, Recovered, Row, Settlement
from penstock.spool.store import PLACES, SpoolError, Store

__all__ = ["Spool", "SpoolError", "SpoolFullError", "SpoolSettings"]


class SpoolSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The durable queue on disk."""

    path: Annotated[str, msgspec.Meta(min_length=1, description="The folder of the spool, relative to data_dir")] = (
        "spool"
    )
    body_in_file: Annotated[
        int,
        msgspec.Meta(ge=0, le=1 << 30, description="Octets above which a body is a file beside the database"),
    ] = 256 * 1024
    waiting: Annotated[
        int, msgspec.Meta(ge=1, le=1_000_000, description="Messages that may wait for the disk; the next hears 452")
    ] = 20_000
    waiting_octets: Annotated[
        int, msgspec.Meta(ge=1 << 20, le=1 << 40, description="Octets of bodies that may wait for the disk")
    ] = 256 * 1024 * 1024
    reserve_octets: Annotated[
        int, msgspec.Meta(ge=0, description="Free space to be left; a message that would need it hears 452 4.3.1")
    ] = 256 * 1024 * 1024
    reserve_inodes: Annotated[int, msgspec.Meta(ge=0, description="Free inodes to be left")] = 10_000


def shard_of(path: str, index: int) -> str:
    """Return where worker `index` has its part of a spool: the first one has the path itself."""
    return f"{path}-{index}" if index else path


def shards(folder: Path) -> list[int]:
    """Return the numbers of the parts of a spool that there are."""
    beginning = f"{folder.name}-"
    names = [each.parent.name for each in folder.parent.glob(f"{glob.escape(folder.name)}*/spool.db")]
    numbers = [name.removeprefix(beginning) for name in names if name.startswith(beginning)]
    found = [int(number) for number in numbers if number.isascii() and number.isdecimal()]
    return sorted([0] * (folder.name in names) + found)


class Spool:
    """Messages that wait, on stable storage. See penstock.spool.entry for what goes in and out."""

    def __init__(self, settings: SpoolSettings, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """`clock` tells seconds since the epoch."""
        self._settings = settings
        self._store = Store(folder)
        self._clock = clock
        self.report_bug: Callable[[Exception], None] = traceback.print_exception
        """Told what those who put messages raise when they are told what became of them."""
        self._committer = Committer(
            self._store,
            clock,
            self._tell_of_bug,
            most_waiting=settings.waiting,
            most_octets=settings.waiting_octets,
        )
        self._threads = BodyThreads(self._store.files, self._tell_of_bug)
        self.became_due: Callable[[Sequence[str]], None] = _nobody_waits
        """Told the lanes of each message that was put and not taken, so that the relay need not poll."""

    def _tell_of_bug(self, exc: Exception) -> None:
        self.report_bug(exc)

    @property
    def puts(self) -> int:
        """Messages put so far."""
        return self._store.puts

    @property
    def transactions(self) -> int:
        """Transactions so far."""
        return self._committer.transactions

    async def start(self) -> Recovered:
        """Open the spool and make good what a crash has left. Raise OSError, sqlite3.Error, SpoolError."""
        recovered = await trio.to_thread.run_sync(_open, self._store)
        self._committer.start()
        self._threads.start()
        return recovered

    async def aclose(self) -> None:
        """Write what waits, and close."""
        with trio.CancelScope(shield=True):
            await self._threads.aclose()  # what is written goes to the committer
            await self._committer.aclose()
            await self._threads.aclose()  # what that could not write is removed
            await trio.to_thread.run_sync(self._store.close)

    # ---- in

    def put_later(
        self,
        message: Message,
        lanes: Sequence[str],
        done: Callable[[BaseException | None, list[Entry]], None],
        *,
        is_taken: bool = False,
    ) -> None:
        """Write a message; `lanes` has the lane of each recipient. Its body is not to be closed before `done`.

        `done` is called in the loop: with the exception that kept it from being written (OSError, sqlite3.Error,
        SpoolFullError), or with None once it is on stable storage. With `is_taken` it is written as being attempted,
        and `done` gets the entries to attempt, one a lane; a body of the database is in them, and one in a file is read
        from the file. Raise SpoolFullError.
        """
        is_filed = message.body.size > self._settings.body_in_file
        number = self._store.new_number()
        put = Put(number, message, None if is_filed else b"".join(message.body.chunks()), lanes, is_taken)

        def written(result: outcome.Outcome[Any]) -> None:
            if isinstance(result, outcome.Error):
                if is_filed:
                    self._threads.remove_later(number)
                done(result.error, [])
                return
            done(None, self._entries(put) if is_taken else [])
            if not is_taken:
                self.became_due(lanes)

        if not is_filed:
            self._committer.put_later(put, written)
            return

        def filed(result: outcome.Outcome[Any]) -> None:
            if isinstance(result, outcome.Error):
                done(result.error, [])
                return
            try:
                self._committer.put_later(put, written)
            except SpoolFullError as exc:
                written(outcome.Error(exc))

        self._committer.check_room(0, self._threads.waiting)
        self._threads.write_later(number, message.body, filed)

    async def put(self, message: Message, lanes: Sequence[str], *, is_taken: bool = False) -> list[Entry]:
        """Do what `put_later` does and return its entries. Raise what it tells `done`, and SpoolFullError.

        Not to be cancelled once it has begun: whatever becomes of the message, the caller hears it.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        task = trio.lowlevel.current_task()

        def done(failure: BaseException | None, entries: list[Entry]) -> None:
            trio.lowlevel.reschedule(task, outcome.Value(entries) if failure is None else outcome.Error(failure))

        self.put_later(message, lanes, done, is_taken=is_taken)
        entries: list[Entry] = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        return entries

    def _entries(self, put: Put) -> list[Entry]:
        """Return the entries of a message that was put as taken, one a lane."""
        message = put.message
        envelope, lanes = message.envelope, put.lanes
        groups: dict[str, list[int]] = {}
        for place, lane in enumerate(lanes):
            groups.setdefault(lane, []).append(place)
        first = put.number << PLACES
        entries = []
        for lane, places in groups.items():
            if len(groups) > 1:
                recipients = tuple(message.envelope.recipients[place] for place in places)
                envelope = message.envelope._replace(recipients=recipients)
            rows = tuple(Row(first + place, 1, False, lane) for place in places)
            body = self._store.body(put.number, message.body.size, put.data)
            entries.append(
                Entry(put.number, message.id, lane, envelope, rows, message.prefix, body, message.received_at)
            )
        return entries

    # ---- out

    async def due_lanes(self, now: float, limit: int, until: float = 0.0) -> list[LaneDue]:
        """Return lanes that have something due, the earliest first. An index, never a scan.

        They are not found again before `until`, unless something is put into them: whoever asks takes from them.
        """
        return await self._committer.do(lambda store: store.due_lanes(now, limit, until))

    async def next_due(self) -> float | None:
        """Return when the first lane is due, perhaps too early; None when nothing waits."""
        return await self._committer.do(lambda store: store.next_due())

    async def take(self, lane: str, now: float, limit: int, octets: int, until: float = 0.0) -> list[Entry]:
        """Take out what a lane has due: at most so many recipients and octets, but at least one message.

        What else is due is not found by `due_lanes` before `until`: whoever takes, takes again.

        The attempt is recorded when this returns. Not to be cancelled once it has begun: what was taken is given out.
        """
        return await self._committer.do(lambda store: store.take(lane, now, limit, octets, until), whole=True)

    async def settle(
        self, settlements: Sequence[Settlement], messages: Sequence[tuple[Message, Sequence[str]]] = ()
    ) -> None:
        """Write the ends of attempts, and put the messages that tell of them, in one transaction: both or neither.

        The messages (bounces, notices) have bodies in memory. Not to be cancelled once it has begun.
        """
        puts = [
            Put(self._store.new_number(), message, b"".join(message.body.chunks()), lanes)
            for message, lanes in messages
        ]
        now = self._clock()

        def act(store: Store) -> list[int]:
            if puts:
                store.put(puts, now)
            return store.settle(settlements)

        for number in await self._committer.do(act, whole=True):
            self._threads.remove_later(number)
        for _, lanes in messages:
            self.became_due(lanes)


def _nobody_waits(_: Sequence[str]) -> None:
    """There is no relay."""


def _open(store: Store) -> Recovered:
    return store.open()
