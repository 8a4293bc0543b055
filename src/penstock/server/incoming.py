"""A message while it is being received: its body, and the flow to the next hop if the delivery passes messages on.

The body is always collected, whether there is a flow or not. The end of the text is passed on only after the message is
complete and the policies have accepted it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from penstock.delivery.base import Flow
from penstock.message import Body, CountedBody, Message
from penstock.policy.evidence import Watcher
from penstock.reply import Reply
from penstock.server.body import BodyCollector
from penstock.server.received import seam

if TYPE_CHECKING:
    from penstock.server.listener import Listener


class IncomingMessage:
    """Collects a body, then gives the message to the delivery. Always call `close`."""

    __slots__ = ("_body", "_collector", "_start", "_watcher", "flow", "head", "separator")

    def __init__(self, listener: Listener, head: Message | None, watcher: Watcher | None = None) -> None:
        """`head` is the message without its body, for a delivery that begins before the end of the text.

        `watcher` sees the octets that are kept.
        """
        self._watcher = watcher
        self._body: Body | None = None
        self._collector = BodyCollector(listener.body, listener.budget, listener.folder)
        self._start: bytes | None = b""
        """The first octets, until it is known how to join them to our header fields; None afterwards."""
        self.separator = b""
        """The octets between our header fields and the body: b"" or an empty line."""
        self.flow: Flow | None = None
        """The message that is being passed on to the next hop; None if it is not."""
        if head is not None and listener.streams is not None:
            self.flow = listener.streams.open(head)
        self.head = head
        """The message without its body, for a delivery that may begin before the end of the text."""

    def add_nowait(self, chunk: bytes) -> bool:
        """Keep a chunk in memory. Return False, and keep nothing, if it does not fit: then `await add(chunk)`."""
        if self.flow is not None:
            return False
        start = self._start
        if start is not None:
            chunk = self._join(chunk)
            if not chunk:
                return True
        if not self._collector.add_nowait(chunk):
            self._start = start
            return False
        if self._watcher is not None:
            self._watch(chunk, is_first=start is not None)
        return True

    async def add(self, chunk: bytes) -> None:
        """Keep a chunk, and pass it on. A disk error is stored in `failure`."""
        passed_on = chunk
        is_first = self._start is not None
        if is_first:
            chunk = self._join(chunk)
            passed_on = self.separator + chunk
        if chunk and not self._collector.add_nowait(chunk):
            await self._collector.add(chunk)
        if chunk and self._watcher is not None:
            self._watch(chunk, is_first=is_first)
        if self.flow is not None and passed_on and not self.flow.feed_nowait(passed_on):
            await self.flow.feed(passed_on)

    def _watch(self, chunk: bytes, *, is_first: bool) -> None:
        """Show the watcher the octets that are kept, after the empty line before a body without a header."""
        assert self._watcher is not None
        self._watcher.feed(self.separator + chunk if is_first and self.separator else chunk)

    def _join(self, chunk: bytes, *, is_whole: bool = False) -> bytes:
        """Decide how the body follows our header fields, which it must not continue. Return the octets to keep."""
        start = (self._start or b"") + chunk
        joined = seam(start, is_whole=is_whole)
        if joined is None:
            self._start = start
            return b""
        self._start = None
        self.separator = joined.separator
        return start[joined.skip :]

    @property
    def failure(self) -> Reply | None:
        """The reply when the disk has failed; the body is lost then."""
        return self._collector.failure

    def received_fields(self) -> int:
        """Count the Received fields of the header: the servers this message has passed (RFC 5321 6.3)."""
        return self._collector.received_fields()

    async def finish(self, octets: int) -> Body:  # noqa: ARG002 - as CountedMessage
        """Return the complete body, which is valid until `close`."""
        if self._start is not None:
            start, self._start = self._start, b""
            rest = self._join(start, is_whole=True)
            if rest and not self._collector.add_nowait(rest):
                await self._collector.add(rest)
            if rest and self._watcher is not None:
                self._watch(rest, is_first=True)
            if self.flow is not None and (passed_on := self.separator + rest):
                await self.flow.feed(passed_on)
        self._body = self._collector.finish_nowait() or await self._collector.finish()
        return self._body

    def close(self) -> None:
        """Release everything. A message that was not delivered is not passed on."""
        if self.flow is not None:
            self.flow.abort()
            self.flow = None
        if self._watcher is not None:
            self._watcher.close()
        if self._body is not None:
            self._body.close()
        else:
            self._collector.discard()


class CountedMessage:
    """A message whose body the wire counts and discards."""

    flow: Final = None
    head: Final = None
    failure: Final = None
    separator: Final = b""

    def add_nowait(self, chunk: bytes) -> bool:  # noqa: ARG002 - as IncomingMessage
        """Do nothing."""
        return True

    async def add(self, chunk: bytes) -> None:
        """Do nothing."""

    def received_fields(self) -> int:
        """Return 0: the header is not read."""
        return 0

    async def finish(self, octets: int) -> Body:
        """Return a body of this size, without its octets."""
        return CountedBody(octets)

    def close(self) -> None:
        """Do nothing."""


COUNTED: Final = CountedMessage()
"""Shared by all connections: it has no state."""
