"""Delivery into the spool: the message is on stable storage before its 250, and the relay takes it from there."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Sequence
from typing import Final, Protocol

from penstock import reply as replies
from penstock.delivery.base import Delivery
from penstock.message import Message, Recipient
from penstock.reply import Reply
from penstock.spool.diskspace import Room
from penstock.spool.entry import Entry
from penstock.spool.spool import Spool, SpoolFullError
from penstock.transaction import Transaction

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Relay(Protocol):
    """What the relay offers to those who put messages into the spool."""

    def lane_of(self, recipient: Recipient) -> str:
        """Return the lane that a recipient waits in."""

    def takes(self, lanes: Sequence[str], octets: int) -> bool:
        """Say whether a message of so many octets would be attempted at once, so that it need not be read back."""

    def offer(self, entries: Sequence[Entry]) -> None:
        """Attempt what was put as taken."""


class SpoolDelivery(Delivery):
    """Puts messages into the spool. Its 250 promises that the message survives a power failure."""

    def __init__(self, spool: Spool, relay: Relay, space: Room) -> None:
        self._spool = spool
        self._relay = relay
        self._space = space

    def check_capacity(self, octets: int) -> Reply | None:
        """Refuse a MAIL that would touch the reserve of the disk (RFC 1870 6.1)."""
        if self._space.takes(octets):
            return None
        return replies.DISK_FULL.because("the reserve of free space or inodes is reached")

    async def accept(self, message: Message, transaction: Transaction) -> Reply:  # noqa: ARG002 - the interface
        """Put the message: 250 once it is on stable storage, 452 4.3.1 when the disk is full, 451 for its errors."""
        lanes = self._lanes(message)
        is_taken = self._relay.takes(lanes, message.size)
        try:
            entries = await self._spool.put(message, lanes, is_taken=is_taken)
        except (OSError, sqlite3.Error, SpoolFullError) as exc:
            return _refusal(exc)
        self._space.used(message.size)
        if entries:
            self._relay.offer(entries)
        return Reply(250, "2.0.0", f"Ok: spooled as {message.id}")

    def _lanes(self, message: Message) -> list[str]:
        lane_of = self._relay.lane_of
        return [lane_of(recipient) for recipient in message.envelope.recipients]


def _refusal(failure: BaseException) -> Reply:
    """Return what the client hears of a failure: its message was not taken."""
    is_full = isinstance(failure, SpoolFullError) or (isinstance(failure, OSError) and failure.errno in _FULL)
    if isinstance(failure, sqlite3.Error):
        is_full = getattr(failure, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return (replies.DISK_FULL if is_full else replies.TRY_LATER).because(f"{type(failure).__name__}: {failure}")
