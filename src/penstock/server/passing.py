"""Connections whose messages are passed on while they come (penstock.delivery.base.Streams).

Everything is as on any other connection, the body is collected, too; a flow runs beside it. The end of the text goes
on only when the message is whole and was judged.
"""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine
from typing import Any

from penstock.delivery.base import Flow
from penstock.message import Body, CountedBody, Message
from penstock.reply import Reply
from penstock.server.connection import Connection
from penstock.smtp.events import BeginData, BodyChunk, EndOfMessage


class PassingConnection(Connection):
    """A connection in front of a delivery that streams."""

    asks_all = True
    _flow: Flow | None = None
    _head: Message | None = None
    """The message of the flow, without its body."""

    def _on_begin_data(self, event: BeginData) -> None:
        super()._on_begin_data(event)
        streams = self._listener.streams
        if streams is not None:
            head = super()._message(CountedBody(0))
            self._flow = streams.open(head)
            self._head = head if self._flow is not None else None

    def _on_chunk(self, event: BodyChunk) -> Coroutine[Any, Any, None] | None:
        collecting = super()._on_chunk(event)
        flow = self._flow
        if flow is None or flow.feed_nowait(event.data):
            return collecting
        return self._take_chunk(collecting, flow, event.data)

    async def _take_chunk(self, collecting: Coroutine[Any, Any, None] | None, flow: Flow, chunk: bytes) -> None:
        if collecting is not None:
            await collecting
        await flow.feed(chunk)

    async def _judge(self, event: EndOfMessage) -> None:
        try:
            await super()._judge(event)
        finally:
            self._forget_flow()  # which does nothing to one that is finished

    def _message(self, body: Body) -> Message:
        return super()._message(body) if self._head is None else self._head._replace(body=body)

    def _deliver(self, message: Message) -> Awaitable[Reply]:
        return super()._deliver(message) if self._flow is None else self._flow.finish(message)

    def _drop_body(self, cause: str, *, will_be_refused: bool = False) -> None:
        is_dropped = self._is_in_message
        super()._drop_body(cause, will_be_refused=will_be_refused)
        if is_dropped:
            self._forget_flow()

    def _forget_flow(self) -> None:
        flow, self._flow, self._head = self._flow, None, None
        if flow is not None:
            flow.abort()


PassingConnection.handlers = {
    **Connection.handlers,
    BeginData: PassingConnection._on_begin_data,
    BodyChunk: PassingConnection._on_chunk,
}
