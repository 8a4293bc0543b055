"""What the relay, the deliveries and the operators' requests need of a durable queue. `Spool` is the one on disk.

Everything is called in the trio thread. What is named `put`, `take`, `record`, `carry_out` or `take_rows` cannot be
cancelled once it has begun: the caller learns how it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from penstock.message import Message
from penstock.spool.entry import AdminInput, AttemptRecord, ClockJump, Entry, HopState, QueueDue, Recovered


class DurableQueue(Protocol):
    """Messages that wait, on stable storage. See penstock.spool.entry for what goes in and out."""

    report_bug: Callable[[Exception], None]
    """Gets the exceptions of callbacks."""
    became_due: Callable[[Sequence[str]], None]
    """Gets the domain queues of each message that was put and not taken, so that the relay need not poll."""

    @property
    def newest(self) -> int:
        """The number of the newest message."""

    def now(self) -> float:
        """Return the seconds since the epoch, by the clock of the queue."""

    async def start(self) -> Recovered:
        """Open the queue and recover from a crash. Raise OSError, sqlite3.Error or SpoolError."""

    async def aclose(self) -> None:
        """Write what waits, and close."""

    async def put(
        self, message: Message, queues: Sequence[str], *, is_taken: bool = False, is_held: bool = False
    ) -> list[Entry]:
        """Write a message; `queues` has the domain queue of each recipient. Return once it is on stable storage.

        With `is_taken` the recipients are written as being attempted, and the entries to attempt are returned. With
        `is_held` an operator has to release them. Raise OSError, sqlite3.Error or SpoolFullError: then nothing was
        written.
        """

    async def due_queues(self, now: float, limit: int, until: float = 0.0) -> list[QueueDue]:
        """Return queues that have recipients due, the earliest first. They are not found again before `until`."""

    async def next_due(self) -> float | None:
        """Return when the first queue is due, perhaps too early; None if nothing waits."""

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

        The attempt is recorded when this returns. `same_route` may be called in another thread.
        """

    async def record(
        self, records: Sequence[AttemptRecord], messages: Sequence[tuple[Message, Sequence[str]]] = ()
    ) -> None:
        """Write the ends of attempts, and put the reports on them, in one transaction: both or neither."""

    async def reschedule(self, now: float, waits: Sequence[float], longest: float) -> int:
        """After a clock jump: give what is due later than `longest` seconds from now a time of the schedule `waits`.

        Return the number of recipients.
        """

    async def shift_received(self, jump: ClockJump, after: int) -> int:
        """Correct when some messages were received, after a jump of the clock. Return the number of the last one.

        Messages up to the number `after` are done. All are when the number of the newest one is returned.
        """

    async def received_at(self, numbers: Sequence[int]) -> dict[int, float]:
        """Return when messages were received, by their numbers, as far as they are here."""

    async def admin_input(self) -> AdminInput:
        """Return what operators have asked for since the last call."""

    async def carry_out(self, action: str, withdrawn: Sequence[int], at_rest: Sequence[int]) -> None:
        """Hold, drop or retry recipients, and answer the instructions.

        `withdrawn` are written as being attempted, but are not. `at_rest` were not; those that are now are not changed.
        """

    async def answer(self, rows: Sequence[int], *, is_done: bool) -> None:
        """Answer the instructions on recipients."""

    async def take_rows(self, rows: Sequence[int]) -> list[Entry]:
        """Take recipients that wait or are held, whenever they are due. It does not count as an attempt."""

    async def write_hops(self, hops: Sequence[HopState]) -> None:
        """Write which next hops are backing off, for `penstock spool hops`."""
