"""What the spool gives out and takes back."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from penstock.message import Body, Envelope, Message, MessageId

DUE, ATTEMPTING, HELD = 0, 1, 2
"""The states of a recipient on the disk; see schema.sql."""
STATES = ("due", "attempting", "held")


class Row(NamedTuple):
    """A recipient that is being attempted."""

    number: int
    attempts: int
    """Those that have begun, this one among them."""
    delay_told: bool
    """The sender was told that it is late."""
    lane: str
    """Where it waits when it is not attempted."""


class Entry(NamedTuple):
    """A message for some of its recipients, for an attempt: those of a lane, or of several at the first one."""

    number: int
    """The number of the message."""
    id: MessageId
    lane: str
    """That of its first recipient."""
    envelope: Envelope
    """With the recipients of this entry alone."""
    rows: tuple[Row, ...]
    """In the order of the recipients."""
    prefix: bytes
    body: Body
    """To be closed by whoever attempts the message. Reading one that lies in a file blocks on the disk."""
    received_at: float
    asked_at: float = 0.0
    """When the operator asked for this attempt, in seconds since the epoch; 0 when it is due by itself."""

    @property
    def size(self) -> int:
        """Octets of the prefix and the body."""
        return len(self.prefix) + self.body.size


class Outcome(Enum):
    """What has become of an attempt at a recipient."""

    DELIVERED = "delivered"
    FAILED = "failed"
    """For good: the sender hears of it, and the recipient leaves the spool."""
    DEFERRED = "deferred"
    """It is tried again later."""
    RETURNED = "returned"
    """It was not attempted after all, and the attempt does not count."""


class Settlement(NamedTuple):
    """The end of an attempt at a recipient."""

    row: int
    """The number of the row."""
    lane: str
    outcome: Outcome
    reply: str = ""
    """What the next hop said, or why it could not be asked."""
    next_try: float = 0.0
    """When a deferred recipient is due again."""
    delay_told: bool = False


class LaneDue(NamedTuple):
    """A lane that has something due, and since when."""

    lane: str
    due_at: float


class Put(NamedTuple):
    """A message on its way into the spool."""

    number: int
    message: Message
    data: bytes | None
    """The body; None when it is in a file already."""
    lanes: Sequence[str]
    """The lane of each recipient, in their order."""
    is_taken: bool = False
    """It is written as being attempted, for the first time."""


class Recovered(NamedTuple):
    """What a spool has found when it was opened."""

    messages: int
    """Messages that wait."""
    interrupted: int
    """Recipients that were being attempted when the process before ended, and are due again."""
    swept: int
    """Files of bodies that belong to no message, removed."""
