"""The parts of a message: paths, recipients, envelopes, bodies.

Everything here is immutable: named tuples are the cheapest immutable objects.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, NewType, Protocol, runtime_checkable

MessageId = NewType("MessageId", str)
"""Unique name of an accepted message: 20 letters and digits, increasing within a process."""

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def _base32(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, digit = divmod(number, 32)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


class MessageIds:
    """Generates unique message ids: start time in milliseconds, a random tag, a counter.

    Time and tag are determined once, so an id costs one counter and one string; the ids of one generator sort in the
    order of their creation.
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
    """The mailbox as the client wrote it; "" for the null reverse-path."""
    local: str
    """The local part without quoting."""
    domain: str
    """The domain in canonical form (lower-case A-labels, no trailing dot), or the address literal with its brackets.

    "" for the null path, and for a mailbox without a domain.
    """

    @property
    def ascii_text(self) -> str:
        """The mailbox with its domain in A-labels if that makes it ASCII (RFC 5890 2.3.2.1); otherwise `text`."""
        text = self.text
        if text.isascii() or not self.domain:
            return text
        changed = f"{text.rpartition('@')[0]}@{self.domain}"
        return changed if changed.isascii() else text

    def __str__(self) -> str:
        return self.text


NULL_PATH = Path("", "", "")
"""The null reverse-path `<>` of bounces (RFC 5321 4.5.5)."""


class Recipient(NamedTuple):
    """An accepted forward-path with its DSN parameters (RFC 3461 4.1, 4.2)."""

    path: Path
    """The forward-path (RFC 5321 4.1.1.3)."""
    notify: frozenset[str] | None = None
    """NOTIFY: {"NEVER"} or a subset of {"SUCCESS", "FAILURE", "DELAY"}; None if it was not given."""
    orcpt: str | None = None
    """ORCPT as received, xtext-encoded: "rfc822;bob@example.org"."""

    def __str__(self) -> str:
        return self.path.text

    def wants(self, report: Literal["SUCCESS", "FAILURE", "DELAY"]) -> bool:
        """Return whether the sender wants this report: without NOTIFY, of failures and delays (RFC 3461 4.1)."""
        return report != "SUCCESS" if self.notify is None else report in self.notify


class Envelope(NamedTuple):
    """The arguments of MAIL and RCPT for one message."""

    sender: Path
    """The reverse-path (RFC 5321 4.1.1.2); `NULL_PATH` for bounces."""
    recipients: tuple[Recipient, ...]
    """The accepted recipients, in the order of their RCPT; at least one."""
    body_type: str = "7BIT"
    """BODY= of MAIL: "7BIT", "8BITMIME" (RFC 6152) or "BINARYMIME" (RFC 3030)."""
    smtputf8: bool = False
    """SMTPUTF8 was requested (RFC 6531)."""
    size: int | None = None
    """SIZE= of MAIL in octets (RFC 1870): the declared size, not the counted one."""
    ret: str | None = None
    """RET= of MAIL: "FULL" or "HDRS" (RFC 3461 4.3)."""
    envid: str | None = None
    """ENVID= of MAIL, xtext-encoded (RFC 3461 4.4)."""
    auth: str | None = None
    """AUTH= of MAIL, decoded (RFC 4954 5): the identity of the submitter, "" for `<>`."""
    requiretls: bool = False
    """REQUIRETLS was requested (RFC 8689)."""


class MailParameters(NamedTuple):
    """The checked ESMTP parameters of MAIL (RFC 5321 4.1.2)."""

    size: int | None = None
    """SIZE= in octets (RFC 1870); None without it."""
    body_type: str = "7BIT"
    """BODY=: "7BIT", "8BITMIME" (RFC 6152) or "BINARYMIME" (RFC 3030)."""
    smtputf8: bool = False
    """SMTPUTF8 (RFC 6531)."""
    ret: str | None = None
    """RET=: "FULL" or "HDRS" (RFC 3461 4.3); None without it."""
    envid: str | None = None
    """ENVID=, xtext-encoded (RFC 3461 4.4); None without it."""
    auth: str | None = None
    """AUTH=, decoded (RFC 4954 5): the identity of the submitter, "" for `<>`; None without it."""
    requiretls: bool = False
    """REQUIRETLS (RFC 8689)."""


NO_PARAMETERS = MailParameters()


class Body(Protocol):
    """The text of a message as it was received: without dot-stuffing, otherwise unchanged.

    It is in memory or in a temporary file, and can be read any number of times before `close`. If it has a true
    attribute `in_memory`, reading it does not block.
    """

    @property
    def size(self) -> int:
        """Size in octets."""

    def chunks(self) -> Iterator[bytes]:
        """Yield the body in pieces of at most 256 KiB. May block on the disk if it is in a file."""

    def close(self) -> None:
        """Release the memory or the file; further calls do nothing."""


@runtime_checkable
class Linkable(Protocol):
    """Optional interface of a body in an unnamed temporary file: it can be linked to a name instead of copied."""

    def link(self, path: os.PathLike[str]) -> bool:
        """Link the file to a name and write it to stable storage, so that it outlives this body.

        The caller syncs the directory. Return False if the file cannot have this name, for example on another file
        system. Blocks on the disk. Raise OSError if it cannot be written.
        """


@dataclass(frozen=True, slots=True)
class CountedBody:
    """A body that was counted and discarded: it has no chunks."""

    size: int

    def chunks(self) -> Iterator[bytes]:
        """Yield nothing."""
        return iter(())

    def close(self) -> None:
        """Do nothing."""


class Message(NamedTuple):
    """An envelope and a body, as passed to a delivery."""

    id: MessageId
    """The unique id that the 250 and the journal show: 20 letters and digits."""
    envelope: Envelope
    """The sender and the recipients."""
    prefix: bytes
    """Header fields that this server puts before the body (`Received:` and those of policies), lines end with CRLF."""
    body: Body
    """The text as the client sent it; valid until `Delivery.accept` returns."""
    received_at: float
    """Seconds since the epoch."""

    @property
    def size(self) -> int:
        """Octets of the prefix and the body."""
        return len(self.prefix) + self.body.size
