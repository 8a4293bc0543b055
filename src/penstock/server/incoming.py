"""A message while it is being received: its body, and the flow to the next hop where the delivery passes it on.

The body is collected in any case; a flow runs beside it. The end of the text goes on only when the message is whole and
was accepted by the policies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.delivery.base import Flow
from penstock.message import Body, CountedBody, Message
from penstock.reply import Reply
from penstock.server.body import BodyCollector
from penstock.transaction import Transaction

if TYPE_CHECKING:
    from penstock.server.listener import Listener


class IncomingMessage:
    """Takes the chunks of a body, then hands the message to the delivery. `close` it in any case."""

    __slots__ = ("_body", "_collector", "_delivery", "_flow", "_transaction", "head")

    def __init__(self, listener: Listener, head: Message | None, transaction: Transaction) -> None:
        """`head` is the message without its body, for a delivery that begins before the end of the text."""
        self._delivery = listener.delivery
        self._transaction = transaction
        self._body: Body | None = None
        self._collector: BodyCollector | None = None
        if listener.keeps_body:
            self._collector = BodyCollector(listener.body, listener.budget, listener.folder)
        self._flow: Flow | None = None
        if head is not None and listener.streams is not None:
            self._flow = listener.streams.open(head)
        self.head = head if self._flow is not None else None
        """The message without its body, where it is being passed on already."""

    def add_nowait(self, chunk: bytes) -> bool:
        """Keep a chunk in memory. Return False, and keep nothing, when it does not fit: then `await add(chunk)`."""
        if self._flow is not None:
            return False
        return self._collector is None or self._collector.add_nowait(chunk)

    async def add(self, chunk: bytes) -> None:
        """Keep a chunk, and pass it on. A disk error is kept in `failure`."""
        if self._collector is not None and not self._collector.add_nowait(chunk):
            await self._collector.add(chunk)
        if self._flow is not None and not self._flow.feed_nowait(chunk):
            await self._flow.feed(chunk)

    @property
    def failure(self) -> Reply | None:
        """The reply when the disk has failed; the body is lost then."""
        return None if self._collector is None else self._collector.failure

    def received_fields(self) -> int:
        """Count the Received fields of the header: the servers this message has passed (RFC 5321 6.3)."""
        return 0 if self._collector is None else self._collector.received_fields()

    async def finish(self, size: int) -> Body:
        """Return the whole body of `size` octets; it lives until `close`."""
        if self._collector is None:
            self._body = CountedBody(size)
        else:
            self._body = self._collector.finish_nowait() or await self._collector.finish()
        return self._body

    async def deliver(self, message: Message) -> Reply:
        """Hand the message over. Return the reply for the client."""
        if self._flow is None:
            return await self._delivery.accept(message, self._transaction)
        return await self._flow.finish(message, self._transaction)

    def close(self) -> None:
        """Give everything back; nothing of a message that was not delivered goes on."""
        if self._flow is not None:
            self._flow.abort()
            self._flow = None
        if self._body is not None:
            self._body.close()
        elif self._collector is not None:
            self._collector.discard()
        self._collector = None
