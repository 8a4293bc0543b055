"""Delivery into the spool: the message is on stable storage before its 250, and the relay takes it from there."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Protocol

from penstock import reply as replies
from penstock.delivery.base import Delivery
from penstock.files import is_disk_full
from penstock.message import Message, Recipient
from penstock.reply import Reply
from penstock.results import parse_quarantine
from penstock.spool.diskspace import DiskSpace
from penstock.spool.entry import Entry
from penstock.spool.queue import DurableQueue
from penstock.spool.spool import SpoolFullError
from penstock.transaction import Transaction


class Relay(Protocol):
    """The relay, as used by deliveries into the spool."""

    def domain_of(self, recipient: Recipient) -> str:
        """Return the domain whose queue a recipient waits in."""

    def reserve(self, queues: Sequence[str], octets: int) -> bool:
        """Return whether a message of this size would be attempted at once, so that it need not be read back.

        If so, memory is reserved for it until `release`.
        """

    def release(self, octets: int) -> None:
        """Release the memory that `reserve` has reserved."""

    def offer(self, entries: Sequence[Entry]) -> None:
        """Attempt entries that were put as taken."""


class SpoolDelivery(Delivery):
    """Puts messages into the spool. Its 250 promises that the message survives a power failure."""

    def __init__(self, spool: DurableQueue, relay: Relay, space: DiskSpace) -> None:
        self._spool = spool
        self._relay = relay
        self._space = space

    def check_capacity(self, octets: int) -> Reply | None:
        """Refuse a MAIL whose message would use the reserve of the disk (RFC 1870 6.1)."""
        if self._space.has_capacity(octets):
            return None
        return replies.DISK_FULL.because("the reserve of free space or inodes is reached")

    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        """Put the message: 250 once it is on stable storage, 452 4.3.1 when the disk is full, 451 for other errors.

        A message in quarantine is held, or waits in the queue of the route that `transaction.quarantine` names.
        """
        queues = self._queues(message)
        quarantine = parse_quarantine(transaction.quarantine)
        if quarantine is not None and quarantine.route:
            queues = [transaction.quarantine] * len(queues)  # the queue of a named route is called so as well
        is_held = quarantine is not None and quarantine.is_held
        is_taken = not is_held and self._relay.reserve(queues, message.size)
        # Checks take time: if the clock was set meanwhile, a message that is corrected by that would be put too late.
        message = message._replace(received_at=self._spool.now())
        try:
            entries = await self._spool.put(message, queues, is_taken=is_taken, is_held=is_held)
        except (OSError, sqlite3.Error, SpoolFullError) as exc:
            return _refusal(exc)
        finally:
            if is_taken:
                self._relay.release(message.size)
        self._space.count(message.size)
        if entries:
            self._relay.offer(entries)
        return Reply(250, "2.0.0", f"Ok: spooled as {message.id}")

    def _queues(self, message: Message) -> list[str]:
        domain_of = self._relay.domain_of
        return [domain_of(recipient) for recipient in message.envelope.recipients]


def _refusal(failure: BaseException) -> Reply:
    """Return the reply after a failure: the message was not accepted."""
    is_full = isinstance(failure, SpoolFullError) or is_disk_full(failure)
    return (replies.DISK_FULL if is_full else replies.TRY_LATER).because(f"{type(failure).__name__}: {failure}")
