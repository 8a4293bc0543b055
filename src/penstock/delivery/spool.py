"""Delivery into the spool: the message is on stable storage before its 250, and the relay takes it from there.

The spool is for mail that has to wait. A message whose recipients all have mailboxes on this machine need not: it is
written there while its client waits, together with those of other clients (penstock.delivery.maildir). The spool gets
what cannot be written now, and tries again later, and everything else: mail for next hops, in quarantine, of a
suspended domain, with a report to be sent, or too large to keep other clients waiting.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from penstock import reply as replies
from penstock.delivery.base import Delivery
from penstock.files import is_disk_full
from penstock.message import Message, Recipient
from penstock.reply import Reply
from penstock.results import parse_quarantine
from penstock.spool.diskspace import DiskSpace
from penstock.spool.entry import Entry
from penstock.spool.queue import DurableQueue
from penstock.spool.spool import SpoolFullError, without_duplicates
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


class Destinations(Protocol):
    """What knows which mail is for mailboxes of this machine (penstock.relay.scheduler)."""

    def are_mailboxes(self, queues: Sequence[str]) -> bool:
        """Return whether all mail of these queues is for mailboxes here, which may be written to now."""

    def qualified(self, recipient: Recipient) -> Recipient:
        """Return a recipient with a domain: that of <Postmaster> is ours (RFC 5321 4.1.1.3)."""

    def note_filed(self, message: Message, queues: Sequence[str], reply: Reply) -> None:
        """Journal and count a message that was written to the mailboxes of its recipients."""


class Mailboxes(NamedTuple):
    """The mailboxes of this machine."""

    delivery: Delivery
    """Writes to them."""
    destinations: Destinations


class SpoolDelivery(Delivery):
    """Puts messages into the spool or into mailboxes. Its 250 promises that the message survives a power failure."""

    def __init__(self, spool: DurableQueue, relay: Relay, space: DiskSpace, mailboxes: Mailboxes | None = None) -> None:
        """`mailboxes` writes mail for those of this machine; without it, the relay does."""
        self._spool = spool
        self._relay = relay
        self._space = space
        self._mailboxes = mailboxes

    async def start(self) -> None:
        """Create the mailbox that all recipients share, if there is one. Raise OSError."""
        if self._mailboxes is not None:
            await self._mailboxes.delivery.start()

    async def aclose(self) -> None:
        """Finish the messages that are being written to mailboxes. The spool is closed by who has opened it."""
        if self._mailboxes is not None:
            await self._mailboxes.delivery.aclose()

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
        mailboxes = self._mailboxes
        if mailboxes is not None and mailboxes.destinations.are_mailboxes(queues) and _may_wait(message, transaction):
            reply = await self._file(mailboxes, message, queues, transaction)
            if reply is not None:
                return reply
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

    async def _file(
        self, mailboxes: Mailboxes, message: Message, queues: Sequence[str], transaction: Transaction
    ) -> Reply | None:
        """Write a message to the mailboxes of its recipients: 250, or None if that is not possible now."""
        delivery, destinations = mailboxes
        if len(queues) > 1:
            message, queues = without_duplicates(message, queues)
        envelope = message.envelope
        if "" in [recipient.path.domain for recipient in envelope.recipients]:
            envelope = envelope._replace(recipients=tuple(map(destinations.qualified, envelope.recipients)))
        try:
            reply = await delivery.accept(message._replace(envelope=envelope), transaction)
        except Exception:  # noqa: BLE001 - the relay tries it at once, and journals what is wrong
            return None
        if not reply.accepts:
            return None
        self._space.count(message.size)
        destinations.note_filed(message, queues, reply)
        return reply

    def _queues(self, message: Message) -> list[str]:
        domain_of = self._relay.domain_of
        return [domain_of(recipient) for recipient in message.envelope.recipients]


def _may_wait(message: Message, transaction: Transaction) -> bool:
    """Return whether the client of a message may wait until it is in the mailboxes."""
    return (
        transaction.quarantine in ("", "tag")
        and getattr(message.body, "in_memory", False)  # a large one would keep other clients waiting
        and not any(recipient.notify and "SUCCESS" in recipient.notify for recipient in message.envelope.recipients)
    )


def _refusal(failure: BaseException) -> Reply:
    """Return the reply after a failure: the message was not accepted."""
    is_full = isinstance(failure, SpoolFullError) or is_disk_full(failure)
    return (replies.DISK_FULL if is_full else replies.TRY_LATER).because(f"{type(failure).__name__}: {failure}")
