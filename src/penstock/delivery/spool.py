"""Delivery into the spool: the message is on stable storage before its 250, and the relay takes it from there."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from penstock import reply as replies
from penstock.message import Message, Recipient
from penstock.reply import Reply
from penstock.spool.diskspace import Room
from penstock.spool.entry import Entry
from penstock.spool.spool import Spool, SpoolFullError

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Relay(Protocol):
    """What the relay offers to those who put messages into the spool."""

    def lane_of(self, recipient: Recipient) -> str:
        """Return the lane that a recipient waits in."""

    def takes(self, lanes: Sequence[str], octets: int) -> bool:
        """Say whether a message of so many octets would be attempted at once, so that it need not be read back."""

    def offer(self, entries: Sequence[Entry]) -> None:
        """Attempt what was put as taken."""


class SpoolDelivery:
    """Puts messages into the spool. Its 250 promises that the message survives a power failure."""

    needs_body = True

    def __init__(self, spool: Spool, relay: Relay, room: Room) -> None:
        self._spool = spool
        self._relay = relay
        self._room = room

    async def start(self) -> None:
        """Do nothing: the spool is opened by whoever runs it."""

    def check_capacity(self, octets: int) -> Reply | None:
        """Refuse a MAIL that would touch the reserve of the disk (RFC 1870 6.1)."""
        if self._room.takes(octets):
            return None
        return replies.DISK_FULL.because("the reserve of free space or inodes is reached")

    async def accept(self, message: Message) -> Reply:
        """Put the message: 250 once it is on stable storage, 452 4.3.1 when the disk is full, 451 for its errors."""
        lanes = self._lanes(message)
        is_taken = self._relay.takes(lanes, message.size)
        try:
            entries = await self._spool.put(message, lanes, is_taken=is_taken)
        except (OSError, sqlite3.Error, SpoolFullError) as exc:
            return _refusal(exc)
        return self._accepted(message, entries)

    def accept_later(self, message: Message, done: Callable[[Reply], None]) -> None:
        """Do the same without a task, for a body that the database takes; a larger one needs `accept`."""
        lanes = self._lanes(message)

        def written(failure: BaseException | None, entries: list[Entry]) -> None:
            done(_refusal(failure) if failure is not None else self._accepted(message, entries))

        try:
            self._spool.put_later(message, lanes, written, is_taken=self._relay.takes(lanes, message.size))
        except SpoolFullError as exc:
            done(_refusal(exc))

    async def aclose(self) -> None:
        """Do nothing: every accepted message is in the spool."""

    def _lanes(self, message: Message) -> list[str]:
        lane_of = self._relay.lane_of
        return [lane_of(recipient) for recipient in message.envelope.recipients]

    def _accepted(self, message: Message, entries: list[Entry]) -> Reply:
        self._room.used(message.size)
        if entries:
            self._relay.offer(entries)
        return Reply(250, "2.0.0", f"Ok: spooled as {message.id}")


def _refusal(failure: BaseException) -> Reply:
    """Return what the client hears of a failure: its message was not taken."""
    is_full = isinstance(failure, SpoolFullError) or (isinstance(failure, OSError) and failure.errno in _FULL)
    if isinstance(failure, sqlite3.Error):
        is_full = getattr(failure, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return (replies.DISK_FULL if is_full else replies.TRY_LATER).because(f"{type(failure).__name__}: {failure}")
