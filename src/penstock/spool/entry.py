"""The types that go into and out of the spool."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from penstock.message import Body, Envelope, Message, MessageId

DUE, ATTEMPTING, HELD = 0, 1, 2
"""The states of a recipient on disk; see schema.sql."""
STATES = ("due", "attempting", "held")


class Row(NamedTuple):
    """A recipient that is being attempted."""

    number: int
    attempts: int
    """Attempts that have begun, including this one."""
    delay_told: bool
    """The sender has been notified of the delay."""
    queue: str
    """The domain queue it waits in between attempts."""


class Entry(NamedTuple):
    """A message with some of its recipients, for one attempt: those of one domain queue, or of several."""

    number: int
    """The number of the message."""
    id: MessageId
    queue: str
    """The domain queue it was taken from."""
    envelope: Envelope
    """Contains only the recipients of this entry."""
    rows: tuple[Row, ...]
    """In the order of the recipients."""
    prefix: bytes
    body: Body
    """Closed by the recorder after the attempt. Reading one that is stored in a file blocks on the disk."""
    received_at: float
    asked_at: float = 0.0
    """When the operator asked for this attempt, in seconds since the epoch; 0 if it follows the schedule."""

    @property
    def size(self) -> int:
        """Octets of the prefix and the body."""
        return len(self.prefix) + self.body.size


class Outcome(Enum):
    """How an attempt at a recipient ended."""

    DELIVERED = "delivered"
    FAILED = "failed"
    """Permanently: the recipient leaves the spool, with a report if the sender wants one."""
    DEFERRED = "deferred"
    """It is tried again later."""
    RETURNED = "returned"
    """It was not attempted: the attempt does not count."""


class AttemptRecord(NamedTuple):
    """The end of an attempt at a recipient."""

    row: int
    """The number of the row."""
    queue: str
    outcome: Outcome
    reply: str = ""
    """The reply of the next hop, or why there was none."""
    next_try: float = 0.0
    """When a deferred recipient is due again."""
    delay_told: bool = False


class QueueDue(NamedTuple):
    """A domain queue that has recipients due."""

    queue: str
    due_at: float
    """Since when; negative if an operator asked for a try at the negative of this time."""

    @property
    def is_asked_for(self) -> bool:
        """An operator asked for this try."""
        return self.due_at < 0


class ClockJump(NamedTuple):
    """The clock was set. Messages from before are corrected by it: their age stays the same, or they get younger."""

    seconds: float
    noticed_at: float
    """When it was noticed, by the clock after it."""
    newest: int
    """The number of the newest message when it was noticed."""


class Put(NamedTuple):
    """A message to be written to the spool."""

    number: int
    message: Message
    data: bytes | None
    """The body; None if it is stored in a file."""
    queues: Sequence[str]
    """The domain queue of each recipient, in their order."""
    is_taken: bool = False
    """Written as being attempted for the first time."""
    is_held: bool = False
    """Written as held: an operator decides."""


class Recovered(NamedTuple):
    """The state of the spool when it was opened."""

    messages: int
    """Messages in the spool."""
    interrupted: int
    """Recipients that were being attempted when the previous process ended; they are due again."""
    swept: int
    """Body files without a message, removed."""


class Instruction(NamedTuple):
    """A request of an operator about a recipient that the server may have in memory (spool/admin.py)."""

    row: int
    action: str
    """hold, drop, retry or bounce."""
    state: int | None
    """The state of the recipient now; None if it has left the spool."""
    queue: str


class AdminEvent(NamedTuple):
    """What an operator did with a message, for the journal of the server."""

    action: str
    id: str
    recipients: int


class AdminInput(NamedTuple):
    """The requests of operators since the last call."""

    instructions: Sequence[Instruction]
    events: Sequence[AdminEvent]
    suspended: frozenset[str]
    """All domains and next hops that are suspended."""


class HopState(NamedTuple):
    """A next hop that is backing off, as `penstock spool hops` shows it. Times are seconds since the epoch."""

    name: str
    since: float
    until: float
    """When it is tried again."""
    reason: str
