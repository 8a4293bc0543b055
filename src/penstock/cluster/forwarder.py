"""Moves mail that was spooled during an outage into the stream, the oldest first; message ids are kept.

A message is put into the stream before it leaves the spool. If that was there already, because its acknowledgment was
lost or this process was killed in between, nothing is changed. A message of which only some recipients are moved, as
an operator holds others, gets an id of its own for the others later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import trio

from penstock.journal import Journal
from penstock.message import Message, MessageId
from penstock.spool.clock import Ages, ClockGuard
from penstock.spool.entry import AttemptRecord, Entry, Outcome
from penstock.spool.spool import Spool
from penstock.spool.store import PLACES

_LOOK: Final = 5.0
"""Seconds between two looks: an operator may have released something."""
_RETRY: Final = 2.0
"""Seconds until a message is tried again that the cluster has not taken."""
_AT_A_TIME: Final = 100
_OCTETS: Final = 16 << 20


class Target(Protocol):
    """What takes the messages."""

    async def forward(self, message: Message, queue: str) -> None:
        """Put a message of a queue into the stream, unless it is there. Raise an exception if that failed."""


class Forwarder:
    """Runs beside the relay."""

    def __init__(self, spool: Spool, target: Target, journal: Journal) -> None:
        self._spool = spool
        self._target = target
        self._journal = journal
        self._wake = trio.Event()
        self._ages = Ages(spool, ClockGuard(spool.now))
        self._complaint = ""
        self.forwarded = 0
        """Messages moved."""
        spool.became_due = self._note_due

    def _note_due(self, _: Sequence[str]) -> None:
        self._wake.set()

    async def run(self) -> None:
        """Move messages until cancelled."""
        while True:
            try:
                is_more = await self._forward_some()
            except Exception as exc:  # noqa: BLE001 - the cluster or the disk may work later
                self._complain(exc)
                await trio.sleep(_RETRY)
                continue
            self._complaint = ""
            if is_more:
                continue
            with trio.move_on_after(_LOOK):
                await self._wake.wait()
            self._wake = trio.Event()

    def _complain(self, exc: Exception) -> None:
        """Journal an error, once for as long as it lasts."""
        if str(exc) != self._complaint:
            self._complaint = str(exc)
            self._journal.error(0, "forwarder", exc)

    async def _forward_some(self) -> bool:
        """Move some messages. Return whether there may be more. Raise what `Target.forward` does."""
        self._ages.notice()
        await self._ages.correct()
        now = self._spool.now()
        found = await self._spool.due_queues(now, 1)
        if not found:
            # What is due later than it can be: the clock was set back.
            return await self._spool.reschedule(now, (_RETRY,), _RETRY) > 0
        entries = await self._spool.take(found[0].queue, now, _AT_A_TIME, _OCTETS, same_route=_any_route)
        failures: list[Exception] = []
        async with trio.open_nursery() as nursery:
            for entry in entries:
                nursery.start_soon(self._forward, entry, failures)
        if failures:
            raise failures[0]
        return True

    async def _forward(self, entry: Entry, failures: list[Exception]) -> None:
        """Move one message."""
        first = min(row.number for row in entry.rows) & ((1 << PLACES) - 1)
        name = MessageId(f"{entry.id}-{first}") if first else entry.id
        message = Message(name, entry.envelope, entry.prefix, entry.body, entry.received_at)
        outcome, when = Outcome.RETURNED, self._spool.now() + _RETRY
        try:
            await self._target.forward(message, entry.queue)
            outcome, when = Outcome.DELIVERED, 0.0
            self.forwarded += 1
        except Exception as exc:  # noqa: BLE001 - reported by the caller
            failures.append(exc)
        finally:
            entry.body.close()
            records = [AttemptRecord(row.number, row.queue, outcome, "", when) for row in entry.rows]
            await self._record(records)

    async def _record(self, records: Sequence[AttemptRecord]) -> None:
        """Write what has become of a message. It is not moved again before that works, or the server restarts."""
        while True:
            try:
                with trio.CancelScope(shield=True):
                    await self._spool.record(records)
            except Exception as exc:  # noqa: BLE001 - the disk may work later
                self._complain(exc)
                await trio.sleep(_RETRY)
            else:
                return


def _any_route(_: str) -> bool:
    """All recipients of a message go into the stream together."""
    return True
