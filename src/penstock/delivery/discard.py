"""The delivery that keeps nothing: for a sink, and for measuring all that comes before a delivery."""

from __future__ import annotations

from penstock.message import Message
from penstock.reply import Reply


class DiscardDelivery:
    """Accepts every message, counts it, and forgets it. Its 250 promises nothing."""

    needs_body = False

    def __init__(self) -> None:
        self.messages = 0
        self.recipients = 0
        self.octets = 0
        """Of the bodies, un-stuffed."""

    async def start(self) -> None:
        """Do nothing."""

    async def accept(self, message: Message) -> Reply:
        """Accept."""
        return self.accept_nowait(message)

    def accept_nowait(self, message: Message) -> Reply:
        """Accept."""
        self.messages += 1
        self.recipients += len(message.envelope.recipients)
        self.octets += message.body.size
        return Reply(250, "2.0.0", f"Ok: discarded as {message.id}")

    async def aclose(self) -> None:
        """Do nothing."""
