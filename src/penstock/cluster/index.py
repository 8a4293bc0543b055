"""The index of the partitions that this node relays: the tables of the spool, without bodies, on the local disk.

It is thrown away at the start and rebuilt from the stream, so it is never synced, and what was accepted is written some
time later, with much else in one transaction. The column `prefix` of a message has its place in the stream; the header
fields and the body are read from the stream for each attempt.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import outcome
import trio

from penstock.cluster.layout import Place, RecipientState
from penstock.spool.committer import Committer
from penstock.spool.entry import ATTEMPTING, DUE, Put, Recovered
from penstock.spool.store import INSERT_MESSAGE, INSERT_RECIPIENT, PLACES, Store, add_message, encode_dsn

_PLACE: Final = struct.Struct(">HQIIIIQ?")
_KEY: Final = struct.Struct(">HQ")
_RESERVED: Final = (1 << PLACES) - 1
_ROW_OCTETS: Final = 1000
"""About what a message takes in the log of the database."""
_DELAY: Final = 0.1
"""Seconds that messages wait for others, to be written together..."""
_TOGETHER: Final = 500
"""...and how many messages at most."""

T = TypeVar("T")


class Loaded(NamedTuple):
    """A message that was found in the stream."""

    put: Put
    place: Place
    states: Sequence[RecipientState] | None
    """The recipients that are left; None if nothing has become of any."""


class Planned(NamedTuple):
    """A message some of whose recipients change."""

    number: int
    id: str
    place: Place
    states: list[RecipientState]
    """Those that are left."""
    received_at: float


Change = Callable[[RecipientState], RecipientState | None]
"""Returns what becomes of a recipient; None if it is finished."""


def pack(place: Place) -> bytes:
    """Return a place as it is in the index."""
    return _PLACE.pack(*place)


def unpack(data: bytes) -> Place:
    """Return a place of the index."""
    return Place(*_PLACE.unpack(data))


class IndexStore(Store):
    """The tables of the index."""

    _waits: Sequence[float] = (0.0,)
    _longest = float("inf")
    """The schedule, as `reschedule` got it."""

    def open(self) -> Recovered:
        """Create the tables. Raise OSError, sqlite3.Error or SpoolError."""
        recovered = super().open()
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE INDEX IF NOT EXISTS message_place ON message (prefix)")
        return recovered

    def _one(self, statement: str, values: Sequence[Any]) -> Any:
        return self._database.execute(statement, values).fetchone()

    def _number(self, place: Place) -> int | None:
        """Return the number of a message; None if it is not in the index."""
        first = _KEY.pack(place.partition, place.sequence)
        after = _KEY.pack(place.partition, place.sequence + 1)
        found = self._one("SELECT number FROM message WHERE prefix >= ? AND prefix < ?", (first, after))
        return None if found is None else int(found[0])

    def unknown(self, places: Sequence[Place]) -> set[int]:
        """Return the sequences of those places that are not in the index."""
        return {place.sequence for place in places if self._number(place) is None}

    def _restore(self, number: int, loaded: Loaded, now: float) -> None:
        first = number << PLACES
        rows = self._database.execute(
            "SELECT number FROM recipient WHERE number BETWEEN ? AND ?", (first, first + _RESERVED)
        ).fetchall()
        here = {row - first for (row,) in rows}
        temporary = loaded.put.number
        self.put([loaded.put], now)
        if loaded.states is not None:
            self._apply(temporary, loaded.states)
        start = temporary << PLACES
        self._database.executemany("DELETE FROM recipient WHERE number = ?", [(start + place,) for place in here])
        self._database.execute(
            "UPDATE recipient SET number = number - ? + ? WHERE number BETWEEN ? AND ?",
            (start, first, start, start + _RESERVED),
        )
        self._database.execute("DELETE FROM message WHERE number = ?", (temporary,))

    def load(self, loaded: Iterable[Loaded], now: float, *, restores: bool = False, is_new: bool = False) -> None:
        """Add messages that were found, each with what has become of its recipients. Those that are here stay.

        With `restores` they get the recipients back that they lost with the partition, while others were in flight.
        With `is_new` none of them is here, and that is not looked up.
        """
        found = self._on_schedule(loaded, now)
        self._put_loaded(found if is_new else self._missing(found, now, restores=restores), now)

    def _missing(self, loaded: Iterable[Loaded], now: float, *, restores: bool) -> Iterator[Loaded]:
        """Yield the messages that are not here; give the others their recipients back if `restores`."""
        for each in loaded:
            number = self._number(each.place)
            if number is None:
                yield each
            elif restores:
                self._restore(number, each, now)

    def _on_schedule(self, loaded: Iterable[Loaded], now: float) -> Iterator[Loaded]:
        """Yield messages as they are due by the schedule: the clock of the node that has written this may be ahead."""
        latest = now + self._longest
        for each in loaded:
            states = each.states
            if states is not None and any(state.due_at > latest for state in states):
                states = [self._sooner(state, now) if state.due_at > latest else state for state in states]
                yield each._replace(states=states)
            else:
                yield each

    def _sooner(self, state: RecipientState, now: float) -> RecipientState:
        """Return a recipient with the due time that `Store.reschedule` would give it."""
        wait = self._waits[min(max(state.attempts, 1), len(self._waits)) - 1]
        return state._replace(due_at=now + wait) if state.state == DUE else state

    def _put_loaded(self, loaded: Iterable[Loaded], now: float) -> None:
        """Insert messages that are not here with the recipients that are left: some statements for all of them."""
        messages: list[object] = []
        recipients: list[object] = []
        due: dict[int, float] = {}
        for put, _, states in loaded:
            left = None if states is None else {each.place: each for each in states}
            first, before = put.number << PLACES, len(recipients)
            for place, (recipient, name) in enumerate(zip(put.message.envelope.recipients, put.queues, strict=True)):
                state, due_at, attempts, is_told, reply = DUE, now, 0, False, ""
                if left is not None:
                    if place not in left:
                        continue
                    _, state, due_at, attempts, is_told, reply = left[place]
                queue = self._queue(name)
                if state == DUE:
                    due[queue] = min(due.get(queue, due_at), due_at)
                values = (queue, state, due_at, attempts, recipient.path.text, encode_dsn(recipient), reply, is_told)
                recipients += (first + place, *values)
            self.checkpoints.logged += _ROW_OCTETS
            if len(recipients) > before:
                add_message(messages, put)
        self._insert(INSERT_MESSAGE, 8, messages)
        self._insert(INSERT_RECIPIENT, 9, recipients)
        for queue, when in due.items():
            self._make_due(queue, when)

    def _apply(self, number: int, states: Sequence[RecipientState]) -> None:
        first = number << PLACES
        left = [first + each.place for each in states]
        rows = self._database.execute(
            "SELECT number FROM recipient WHERE number BETWEEN ? AND ?", (first, first + _RESERVED)
        ).fetchall()
        gone = {row for (row,) in rows} - set(left)
        self._database.executemany("DELETE FROM recipient WHERE number = ?", [(row,) for row in gone])
        self._database.executemany(
            "UPDATE recipient SET state = ?, due_at = ?, attempts = ?, delay_told = ?, last_reply = ? WHERE number = ?",
            [
                (each.state, each.due_at, each.attempts, each.delay_told, each.last_reply, first + each.place)
                for each in states
            ],
        )

    # ---- what changes

    def reschedule(self, now: float, waits: Sequence[float], longest: float) -> int:
        """See `Store.reschedule`. What is loaded later is due by the same schedule."""
        self._waits, self._longest = tuple(waits), longest
        return super().reschedule(now, waits, longest)

    def plan(self, changes: dict[int, Change]) -> list[Planned]:
        """Return what becomes of the messages of these recipients. Changes nothing."""
        planned = []
        for number in sorted({row >> PLACES for row in changes}):
            found = self._one("SELECT id, prefix, received_at FROM message WHERE number = ?", (number,))
            if found is None:
                continue
            first = number << PLACES
            rows = self._database.execute(
                "SELECT number, state, due_at, attempts, delay_told, last_reply FROM recipient"
                " WHERE number BETWEEN ? AND ?",
                (first, first + _RESERVED),
            ).fetchall()
            states = []
            for row, state, due_at, attempts, told, reply in rows:
                before = DUE if state == ATTEMPTING else state
                changed: RecipientState | None = RecipientState(
                    row - first, before, due_at, attempts, bool(told), reply
                )
                if row in changes and changed is not None:
                    changed = changes[row](changed)
                if changed is not None:
                    states.append(changed)
            planned.append(Planned(number, found[0], unpack(found[1]), states, found[2]))
        return planned

    def idle(self, rows: Sequence[int]) -> list[int]:
        """Return those of the recipients that are not being attempted."""
        statement = "SELECT number FROM recipient WHERE number = ? AND state != 1"
        return [row for row in rows if self._one(statement, (row,)) is not None]

    def set_places(self, places: Sequence[tuple[int, Place]]) -> None:
        """Write the places of messages."""
        self._database.executemany(
            "UPDATE message SET prefix = ? WHERE number = ?", [(pack(place), number) for number, place in places]
        )

    def forget_rows(self, rows: Sequence[int]) -> list[int]:
        """Remove recipients from the index only, and messages that have none left. Return those with a body file."""
        self._for_each("DELETE FROM recipient WHERE number IN", rows)
        return self.drop_empty({row >> PLACES for row in rows})

    def forget_idle(self, numbers: Sequence[int]) -> list[int]:
        """Remove the recipients of messages that are not being attempted from the index only. Return as above."""
        self._database.executemany(
            "DELETE FROM recipient WHERE number BETWEEN ? AND ? AND state != 1",
            [(number << PLACES, (number << PLACES) + _RESERVED) for number in numbers],
        )
        return self.drop_empty(numbers)

    def hold(self, rows: Sequence[int], reply: str) -> None:
        """Hold recipients whose message cannot be read."""
        self._database.executemany(
            "UPDATE recipient SET state = 2, last_reply = ? WHERE number = ?", [(reply, row) for row in rows]
        )

    # ---- partitions

    def attempting(self, partition: int) -> list[int]:
        """Return the recipients of a partition that are being attempted, or wait in memory for that."""
        found = self._database.execute(
            "SELECT recipient.number FROM message CROSS JOIN recipient NOT INDEXED"
            " ON recipient.number BETWEEN message.number << 20 AND (message.number << 20) + 1048575"
            " WHERE prefix >= ? AND prefix < ? AND state = 1",
            self._range(partition),
        ).fetchall()
        return [number for (number,) in found]

    def drop_partition(self, partition: int, withdrawn: Collection[int]) -> list[int]:
        """Remove what is not being attempted, with the recipients that were withdrawn from memory.

        Return the messages with a body file that are not here any more.
        """
        self._for_each("DELETE FROM recipient WHERE number IN", sorted(withdrawn))
        found = self._database.execute(
            "SELECT number FROM message WHERE prefix >= ? AND prefix < ?", self._range(partition)
        ).fetchall()
        gone = self.forget_idle([number for (number,) in found])
        self.refresh_queues()
        return gone

    def is_empty(self, partitions: Sequence[int]) -> bool:
        """Return whether nothing of some partitions is here."""
        return not any(self.count(partition) for partition in partitions)

    def count(self, partition: int) -> int:
        """Return the messages of a partition."""
        found = self._one("SELECT count(*) FROM message WHERE prefix >= ? AND prefix < ?", self._range(partition))
        return int(found[0])

    def _range(self, partition: int) -> tuple[bytes, bytes]:
        return _KEY.pack(partition, 0), _KEY.pack(partition + 1, 0)


class IndexCommitter(Committer):
    """Writes what was accepted many messages at a time, but before anything else is done with the index.

    The stream has them: nothing waits for these transactions, which cost less the fewer they are.
    """

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float],
        report_bug: Callable[[Exception], None],
        *,
        on_failure: Callable[[Sequence[Put], Exception], None],
    ) -> None:
        """See `Committer`. `on_failure` gets messages that could not be written."""
        super().__init__(store, clock, report_bug, most_waiting=0, most_octets=0)  # these are bounds of `put`
        self._on_failure = on_failure
        self._puts: list[Put] = []
        self._has_some = trio.Event()

    async def run(self) -> None:
        """Write what was accepted, until cancelled. Without this, it is written when the index is used or closed."""
        while True:
            await self._has_some.wait()
            await trio.sleep(_DELAY)
            self.flush()

    def add(self, put: Put) -> None:
        """Have a message written."""
        puts = self._puts
        puts.append(put)
        if len(puts) == 1:
            self._has_some.set()
        elif len(puts) >= _TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Have the messages written that wait."""
        puts = self._puts
        if not puts:
            return
        self._puts = []
        self._has_some = trio.Event()

        def done(result: outcome.Outcome[None]) -> None:
            if isinstance(result, outcome.Error) and isinstance(result.error, Exception):
                self._on_failure(puts, result.error)

        super().do_later(lambda store: store.put(puts, self._clock()), done)

    def do_later(self, act: Callable[[Store], T], done: Callable[[outcome.Outcome[Any]], None]) -> None:
        """Execute a function on the index. See `Committer.do_later`."""
        self.flush()
        super().do_later(act, done)

    async def aclose(self) -> None:
        """Execute the requests made so far, then end the thread."""
        self.flush()
        await super().aclose()
