"""The spool as deliveries and the relay see it. All of it belongs to the loop; the disk is another thread's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import outcome
import trio

from penstock.message import Message
from penstock.spool.committer import Committer, SpoolFullError
from penstock.spool.entry import Entry, LaneDue, Put, Recovered, Row, Settlement
from penstock.spool.store import PLACES, SpoolError, Store

__all__ = ["Spool", "SpoolError", "SpoolFullError", "SpoolSettings"]

_FILES_AT_A_TIME: Final = 8
"""Large bodies that are being written and synced at a time."""


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


class Spool:
    """Messages that wait, on stable storage. See penstock.spool.entry for what goes in and out."""

    def __init__(self, settings: SpoolSettings, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """`clock` tells seconds since the epoch."""
        self._settings = settings
        self._store = Store(folder)
        self._clock = clock
        self._committer = Committer(
            self._store, clock, most_waiting=settings.waiting, most_octets=settings.waiting_octets
        )
        self._writers = trio.CapacityLimiter(_FILES_AT_A_TIME)
        self.became_due: Callable[[Sequence[str]], None] = _nobody_waits
        """Told the lanes of each message that was put and not taken, so that the relay need not poll."""

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
        return recovered

    async def aclose(self) -> None:
        """Write what waits, and close."""
        await self._committer.aclose()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._store.close)

    # ---- in

    def fits(self, message: Message) -> bool:
        """Say whether a body goes into the database, so that `put_later` is enough."""
        return message.body.size <= self._settings.body_in_file

    def put_later(
        self,
        message: Message,
        lanes: Sequence[str],
        done: Callable[[BaseException | None, list[Entry]], None],
        *,
        is_taken: bool = False,
    ) -> None:
        """Write a message whose body `fits`; `lanes` has the lane of each recipient.

        `done` is called in the loop: with the exception that kept it from being written (OSError, sqlite3.Error), or
        with None once it is on stable storage. With `is_taken` it is written as being attempted, and `done` gets the
        entries to attempt, one a lane; their bodies are that of the message. Raise SpoolFullError.
        """
        put = Put(self._store.new_number(), message, b"".join(message.body.chunks()), lanes, is_taken)

        def written(result: outcome.Outcome[Any]) -> None:
            if isinstance(result, outcome.Error):
                done(result.error, [])
                return
            done(None, self._entries(put) if is_taken else [])
            if not is_taken:
                self.became_due(lanes)

        self._committer.put_later(put, written)

    async def put(self, message: Message, lanes: Sequence[str], *, is_taken: bool = False) -> list[Entry]:
        """Do what `put_later` does, for a body of any size. Raise what it tells `done`, and SpoolFullError."""
        number = self._store.new_number()
        data: bytes | None = None
        if self.fits(message):
            data = b"".join(message.body.chunks())
        else:
            await trio.to_thread.run_sync(self._store.files.write, number, message.body, limiter=self._writers)
        put = Put(number, message, data, lanes, is_taken)
        try:
            await self._written(put)
        except BaseException:
            if data is None:
                self._store.files.remove(number)
            raise
        if is_taken:
            return self._entries(put)
        self.became_due(lanes)
        return []

    async def _written(self, put: Put) -> None:
        """Wait until a message is written. Not to be cancelled: whatever was begun is over when this returns."""
        task = trio.lowlevel.current_task()

        def done(result: outcome.Outcome[Any]) -> None:
            trio.lowlevel.reschedule(task, result)

        self._committer.put_later(put, done)
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)

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
            rows = tuple(Row(first + place, 1, False) for place in places)
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

        The attempt is recorded when this returns. A cancelled call may have taken entries nobody gets: they are due
        again at the next start, so cancel it only then.
        """
        return await self._committer.do(lambda store: store.take(lane, now, limit, octets, until))

    async def settle(
        self, settlements: Sequence[Settlement], messages: Sequence[tuple[Message, Sequence[str]]] = ()
    ) -> None:
        """Write the ends of attempts, and put the messages that tell of them, in one transaction: both or neither.

        The messages (bounces, notices) have bodies in memory.
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

        filed = await self._committer.do(act)
        for number in filed:
            await trio.to_thread.run_sync(self._store.files.remove, number)
        for _, lanes in messages:
            self.became_due(lanes)

    async def postpone(self, lane: str, until: float) -> None:
        """Let nothing of a lane be found due before a time; a message that is put into it meanwhile brings it back."""
        await self._committer.do(lambda store: store.postpone(lane, until))


def _nobody_waits(_: Sequence[str]) -> None:
    """There is no relay."""


def _open(store: Store) -> Recovered:
    return store.open()
