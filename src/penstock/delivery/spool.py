"""Delivery into the spool, from which the relay takes the message, or into mailboxes: before the 250.

The spool is for mail that has to wait. A message whose recipients all have mailboxes on this machine need not: it is
written there while its client waits, together with those of other clients (penstock.delivery.maildir). The spool gets
what cannot be written now, and tries again later, and everything else: mail for next hops, in quarantine, of a
suspended domain, with a report to be sent, or so large that other clients would wait for it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final, Protocol

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

_MOST_RECIPIENTS: Final = 50
_MOST_OCTETS: Final = 1 << 20
"""Copies of a message, and their octets, that are written while other clients wait as well."""
_PATIENCE: Final = 1.0
"""Seconds after which a disk with mailboxes is too slow: what comes meanwhile goes into the spool."""


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

    def are_mailboxes(self, queues: Sequence[str]) -> bool:
        """Return whether all mail of these queues is for mailboxes here, which may be written to now."""

    def note_delivered(self, message: Message, queues: Sequence[str], reply: Reply) -> None:
        """Journal and count a message that was written to the mailboxes of its recipients. Does not raise."""


class MailboxWriter(Protocol):
    """The mailboxes of this machine (penstock.delivery.maildir)."""

    @property
    def busy_for(self) -> float:
        """Seconds for which messages have been written."""

    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        """Deliver to all recipients, or to none. Raise OSError."""

    async def aclose(self) -> None:
        """Finish the deliveries in progress."""


class SpoolDelivery(Delivery):
    """Puts messages into the spool or into mailboxes. Its 250 promises that the message survives a power failure."""

    def __init__(
        self, spool: DurableQueue, relay: Relay, space: DiskSpace, mailboxes: MailboxWriter | None = None
    ) -> None:
        """`mailboxes`: write mail for them before the 250; without it, the relay delivers it."""
        self._spool = spool
        self._relay = relay
        self._space = space
        self._mailboxes = mailboxes

    async def aclose(self) -> None:
        """Finish the messages that are being written to mailboxes. The gateway closes the spool."""
        if self._mailboxes is not None:
            await self._mailboxes.aclose()

    def check_capacity(self, octets: int) -> Reply | None:
        """Refuse a MAIL whose message would use the reserve of the disk (RFC 1870 6.1)."""
        if self._space.has_capacity(octets):
            return None
        return replies.DISK_FULL.because("the reserve of free space or inodes is reached")

    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        """Accept the message: 250 once it is on stable storage, 452 4.3.1 when the disk is full, 451 for other errors.

        A message in quarantine is held, or waits in the queue of the route that `transaction.quarantine` names.
        """
        # Checks take time: if the clock was set meanwhile, a message that is corrected by that would be put too late.
        message = message._replace(received_at=self._spool.now())
        queues = self._queues(message)
        mailboxes, failure = self._mailboxes, ""
        if (
            mailboxes is not None
            and self._relay.are_mailboxes(queues)
            and _may_be_written(message, transaction, mailboxes)
        ):
            reply = await self._deliver(mailboxes, message, queues, transaction)
            if reply.accepts:
                return reply
            failure = f"the mailbox could not be written: {reply.cause or reply.text}"
        quarantine = parse_quarantine(transaction.quarantine)
        if quarantine is not None and quarantine.route:
            queues = [transaction.quarantine] * len(queues)  # the queue of a named route is called so as well
        is_held = quarantine is not None and quarantine.is_held
        is_taken = not is_held and self._relay.reserve(queues, message.size)
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
        return Reply(250, "2.0.0", f"Ok: spooled as {message.id}", cause=failure)

    async def _deliver(
        self, mailboxes: MailboxWriter, message: Message, queues: Sequence[str], transaction: Transaction
    ) -> Reply:
        """Write a message to the mailboxes of its recipients: 250, or why that is not possible now."""
        if len(queues) > 1:
            message, queues = without_duplicates(message, queues)
        try:
            reply = await mailboxes.accept(message, transaction)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the relay tries again
            return replies.TRY_LATER.because(f"{type(exc).__name__}: {exc}")
        if reply.accepts:
            self._space.count(message.size)
            self._relay.note_delivered(message, queues, reply)
        return reply

    def _queues(self, message: Message) -> list[str]:
        domain_of = self._relay.domain_of
        return [domain_of(recipient) for recipient in message.envelope.recipients]


def _may_be_written(message: Message, transaction: Transaction, mailboxes: MailboxWriter) -> bool:
    """Return whether a message may be written to mailboxes now.

    It is to be delivered, no report is owed, and no client has to wait long for it.
    """
    recipients = message.envelope.recipients
    return (
        transaction.quarantine in ("", "tag")
        and getattr(message.body, "in_memory", False)
        and len(recipients) <= _MOST_RECIPIENTS
        and message.size * len(recipients) <= _MOST_OCTETS
        and mailboxes.busy_for < _PATIENCE
        # <Postmaster> without a domain is completed by the relay.
        and not any(to.wants("SUCCESS") or not to.path.domain for to in recipients)
    )


def _refusal(failure: BaseException) -> Reply:
    """Return the reply after a failure: the message was not accepted."""
    is_full = isinstance(failure, SpoolFullError) or is_disk_full(failure)
    return (replies.DISK_FULL if is_full else replies.TRY_LATER).because(f"{type(failure).__name__}: {failure}")
