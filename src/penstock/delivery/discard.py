"""The delivery that keeps nothing: for a sink, and for measurements without a delivery."""

from __future__ import annotations

from typing import Final

from penstock.delivery.base import Delivery
from penstock.message import Message
from penstock.reply import Reply
from penstock.transaction import Transaction

_DISCARDED: Final = Reply(250, "2.0.0", "Ok: discarded")


class DiscardDelivery(Delivery):
    """Accepts and counts every message, and discards it. Its 250 promises nothing."""

    needs_body = False

    def __init__(self) -> None:
        self.messages = 0
        self.recipients = 0
        self.octets = 0
        """Of the bodies, un-stuffed."""

    async def accept(self, message: Message, transaction: Transaction) -> Reply:  # noqa: ARG002 - the interface
        """Accept."""
        return self.discard(len(message.envelope.recipients), message.body.size)

    def discard(self, recipients: int, octets: int) -> Reply:
        """Accept."""
        self.messages += 1
        self.recipients += recipients
        self.octets += octets
        return _DISCARDED
