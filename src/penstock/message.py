"""What travels: a path, a recipient, an envelope, a message.

Everything here is immutable once made: named tuples, which cost the least of what can not be changed.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, NewType, Protocol, runtime_checkable

MessageId = NewType("MessageId", str)
"""Names one accepted message for ever: 20 characters, letters and digits, increasing within a process."""

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def _base32(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, digit = divmod(number, 32)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


class MessageIds:
    """Makes message ids that no other maker makes: start time in milliseconds, a random tag, a counter.

    The time and the tag are drawn once, so that an id costs one counter and one string; ids of one maker sort in the
    order of their making.
    """

    def __init__(self) -> None:
        tag = int.from_bytes(os.urandom(2), "big")
        self._start = _base32(time.time_ns() // 1_000_000, 9) + _base32(tag, 4)[1:]
        self._numbers = itertools.count()

    def next(self) -> MessageId:
        """Return the next id."""
        return MessageId(f"{self._start}{next(self._numbers):08X}")


class Path(NamedTuple):
    """A reverse-path or forward-path (RFC 5321 4.1.2) without its angle brackets and without a source route.

    >>> Path("John.Doe@Example.ORG", "John.Doe", "example.org")
    """

    text: str
    """The mailbox as the client wrote it; "" is the null reverse-path."""
    local: str
    """The local part with quoting removed."""
    domain: str
    """The domain in canonical form (lower-case A-labels, no trailing dot), or the address literal with its brackets.

    "" for the null path, and for a mailbox without a domain.
    """

    def __str__(self) -> str:
        return self.text


NULL_PATH = Path("", "", "")
"""The null reverse-path `<>` of bounces (RFC 5321 4.5.5)."""


class Recipient(NamedTuple):
    """An accepted forward-path with its DSN wishes (RFC 3461 4.1, 4.2)."""

    path: Path
    notify: frozenset[str] | None = None
    """NOTIFY: {"NEVER"} or a subset of {"SUCCESS", "FAILURE", "DELAY"}; None when the client did not say."""
    orcpt: str | None = None
    """ORCPT as sent, still xtext-encoded: "rfc822;bob@example.org"."""

    def __str__(self) -> str:
        return self.path.text


class Envelope(NamedTuple):
    """What MAIL and RCPT said of one message."""

    sender: Path
    recipients: tuple[Recipient, ...]
    body_type: str = "7BIT"
    """BODY= of MAIL: "7BIT", "8BITMIME" (RFC 6152) or "BINARYMIME" (RFC 3030)."""
    smtputf8: bool = False
    """SMTPUTF8 was asked for (RFC 6531)."""
    size: int | None = None
    """SIZE= of MAIL in octets (RFC 1870), as announced, not as counted."""
    ret: str | None = None
    """RET= of MAIL: "FULL" or "HDRS" (RFC 3461 4.3)."""
    envid: str | None = None
    """ENVID= of MAIL, still xtext-encoded (RFC 3461 4.4)."""
    auth: str | None = None
    """AUTH= of MAIL, decoded (RFC 4954 5): the identity the client vouches for, "" for `<>`."""
    requiretls: bool = False
    """REQUIRETLS was asked for (RFC 8689)."""


class MailParameters(NamedTuple):
    """The checked ESMTP parameters of MAIL; the fields mean what they mean in `Envelope`."""

    size: int | None = None
    body_type: str = "7BIT"
    smtputf8: bool = False
    ret: str | None = None
    envid: str | None = None
    auth: str | None = None
    requiretls: bool = False


NO_PARAMETERS = MailParameters()


class Body(Protocol):
    """The text of a message as it was received: dots un-stuffed, otherwise never rewritten.

    In memory or in a temporary file; whoever holds the message may read it any number of times until `close`. One that
    has `in_memory`, and it is true, is read without a thread.
    """

    @property
    def size(self) -> int:
        """Octets of the body."""

    def chunks(self) -> Iterator[bytes]:
        """Yield the body in pieces of at most 256 KiB. Reads a file where it lies in one: may block on the disk."""

    def close(self) -> None:
        """Give back the memory or the file; calling it again does nothing."""


@runtime_checkable
class Linkable(Protocol):
    """The add-on of a body that lies in a file without a name: it can be given one, and need not be copied."""

    def link(self, path: os.PathLike[str]) -> bool:
        """Give the file a name, and write its text to stable storage: it outlives this body then.

        The entry in the folder is for the caller to sync. Return False when the file can not have this name, because
        it lies on another file system for example. Blocks on the disk. Raise OSError when it can not be written.
        """


@dataclass(frozen=True, slots=True)
class CountedBody:
    """A body that nobody wanted: it was counted and not kept, and has no chunks."""

    size: int

    def chunks(self) -> Iterator[bytes]:
        """Yield nothing."""
        return iter(())

    def close(self) -> None:
        """Do nothing."""


class Message(NamedTuple):
    """An envelope and a body on their way to a delivery."""

    id: MessageId
    envelope: Envelope
    prefix: bytes
    """Header fields this server adds above the body (`Received:` and findings), each line ending in CRLF."""
    body: Body
    received_at: float
    """Seconds since the epoch."""

    @property
    def size(self) -> int:
        """Octets of the prefix and the body."""
        return len(self.prefix) + self.body.size
