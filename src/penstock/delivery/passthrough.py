"""Delivery straight to the next hop: the client receives 250 after the next hop has accepted the message.

The text is sent to the hop while the client sends it, and collected as well, as for any other delivery. If the hop is
slow, down, or cannot accept the message now, the collected message goes to the fallback, usually the spool, whose reply
the client receives. So the client never waits for a slow hop.

Outcomes
--------
- The hop accepts the message for all recipients: 250, with the text of the hop's reply.
- The hop refuses it for all of them: the client receives the refusal.
- The hop accepts it for some: for the others it goes to the fallback, which tries again, or reports to the sender.
- Anything else: it goes to the fallback for all recipients.

If the fallback refuses the rest of the recipients, the client receives that refusal and sends the message again; those
who had it receive it twice.

One case is in doubt: the end of the text was sent, and the hop does not reply in time. The message goes to the fallback
and may arrive twice (penstock.relay.ahead has the reason). Before the end of the text there is no doubt: the connection
to the hop is closed, and the hop has no complete message.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Final, Protocol

import msgspec
import trio

from penstock.delivery.base import ChecksCapacity, Delivery
from penstock.message import Envelope, Message, Recipient
from penstock.reply import Reply
from penstock.transaction import Transaction

_MOST_WORDS: Final = 300
"""Characters of the hop's reply that a 250 repeats."""

Cancel = Callable[[], None]


class PassthroughSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sending messages to the next hop while they are being received."""

    buffer: Annotated[
        int, msgspec.Meta(ge=4096, le=1 << 30, description="Octets of a message buffered for the next hop")
    ] = 131_072
    patience: Annotated[
        float, msgspec.Meta(gt=0, le=600, description="Seconds the buffer may be full before the message is spooled")
    ] = 5.0
    answer: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=600,
            description="Seconds to wait for the reply to the text; after that the message is also spooled",
        ),
    ] = 30.0


class PassthroughClient(Protocol):
    """Sends messages to next hops while they are being received (penstock.relay.ahead)."""

    def begin(
        self,
        envelope: Envelope,
        size: int,
        coming: AsyncIterator[bytes],
        done: Callable[[Sequence[Reply] | None], None],
    ) -> Cancel | None:
        """Start sending; call `done` with a reply for each recipient, or with None if nothing was delivered.

        Return a function after which `done` is not called any more, or None if the message cannot be passed on now. If
        `coming` raises OSError, nothing of the message may be delivered.
        """

    def note_delivered(self, message: Message, to: Recipient, reply: Reply) -> None:
        """Journal that the hop has accepted a message for a recipient, with the reply that `done` received."""


class PassthroughDelivery(Delivery):
    """Passes messages on to the next hop, or to a fallback.

    Its 250 promises what the 250 of the hop or fallback does.
    """

    def __init__(self, client: PassthroughClient, fallback: Delivery, settings: PassthroughSettings) -> None:
        self.settings = settings
        self.fallback = fallback
        self.client = client
        self._checks_capacity = fallback if isinstance(fallback, ChecksCapacity) else None

    async def start(self) -> None:
        """Start the fallback. Raise OSError."""
        await self.fallback.start()

    async def aclose(self) -> None:
        """Close the fallback."""
        await self.fallback.aclose()

    def check_capacity(self, octets: int) -> Reply | None:
        """Ask the fallback, which may get any message."""
        return None if self._checks_capacity is None else self._checks_capacity.check_capacity(octets)

    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        """Pass on a complete message, which policies have judged; one in quarantine goes to the fallback."""
        passed = self.open(message) if transaction.quarantine in ("", "tag") else None
        if passed is None:
            return await self.fallback.accept(message, transaction)
        try:
            chunks = message.body.chunks()
            is_blocking = not getattr(message.body, "in_memory", False)
            while chunk := await trio.to_thread.run_sync(next, chunks, b"") if is_blocking else next(chunks, b""):
                if not passed.feed_nowait(chunk):
                    await passed.feed(chunk)
            return await passed.finish(message, transaction)
        finally:
            passed.abort()

    def open(self, head: Message) -> PassedMessage | None:
        """Start passing a message on, if all recipients have the same next hop and it has capacity."""
        passed = PassedMessage(self, head)
        size = head.envelope.size
        announced = size + len(head.prefix) if size else 0
        passed.cancel = self.client.begin(head.envelope, announced, passed.pipe, passed.done)
        return None if passed.cancel is None else passed


class Pipe:
    """The chunks of a text between the client's connection and the hop's, at most `most` octets. An iterator."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._chunks: list[bytes] = []
        self._octets = 0
        self._has_ended = False
        self._is_broken = False
        self._changed = trio.Event()
        self.is_read_to_end = False
        """The reader has seen the end of the text: from then on the message cannot be aborted."""

    def put_nowait(self, chunk: bytes) -> bool:
        """Add a chunk if it fits; an empty pipe accepts a chunk of any size. Return whether it was added."""
        if self._octets and self._octets + len(chunk) > self._most:
            return False
        self._chunks.append(chunk)
        self._octets += len(chunk)
        self._change()
        return True

    async def put(self, chunk: bytes) -> None:
        """Add a chunk, and wait until it fits."""
        while not self._is_broken and not self.put_nowait(chunk):
            await self._changed.wait()

    def end(self) -> None:
        """Note the end of the text."""
        self._has_ended = True
        self._change()

    def abort(self) -> None:
        """Abort the text: its end will not come. Too late if it `is_read_to_end`."""
        self._is_broken = True
        self._chunks.clear()
        self._octets = 0
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def __aiter__(self) -> Pipe:
        return self

    async def __anext__(self) -> bytes:
        while self._is_broken or not self._chunks:
            if self._is_broken:
                raise ConnectionAbortedError("the message was aborted")
            if self._has_ended:
                self.is_read_to_end = True
                raise StopAsyncIteration
            await self._changed.wait()
        chunk = b"".join(self._chunks)  # at most one buffer, in one send
        self._chunks.clear()
        self._octets = 0
        self._change()
        return chunk


class PassedMessage:
    """A message that is being passed on: the flow of a PassthroughDelivery."""

    def __init__(self, delivery: PassthroughDelivery, head: Message) -> None:
        self.pipe = Pipe(delivery.settings.buffer)
        self.pipe.put_nowait(head.prefix)
        self.cancel: Cancel | None = None
        self._delivery = delivery
        self._replies: Sequence[Reply] | None = None
        self._answered = trio.Event()
        self._is_over = False
        """The pipe has no reader any more."""

    def done(self, replies: Sequence[Reply] | None) -> None:
        """Note the replies of the hop, which may come before the end of the text."""
        self._replies = replies
        self._is_over = True
        self.pipe.abort()
        self._answered.set()

    def feed_nowait(self, chunk: bytes) -> bool:
        """Add a chunk to the pipe if it fits. Return whether it was added."""
        return self._is_over or self.pipe.put_nowait(chunk)

    async def feed(self, chunk: bytes) -> None:
        """Add a chunk to the pipe; abort if the hop accepts nothing for `patience` seconds."""
        with trio.move_on_after(self._delivery.settings.patience) as scope:
            await self.pipe.put(chunk)
        if scope.cancelled_caught:
            self.abort()

    async def finish(self, message: Message, transaction: Transaction) -> Reply:
        """Send the end of the text, and return the reply for the client."""
        if not self._is_over:
            self.pipe.end()
            with trio.move_on_after(self._delivery.settings.answer):
                await self._answered.wait()
        in_doubt = not self._answered.is_set() and self.pipe.is_read_to_end
        self.abort()
        replies = self._replies
        recipients = message.envelope.recipients
        if replies is None:
            reply = await self._delivery.fallback.accept(message, transaction)
            return (
                reply.because("the next hop did not answer in time; it may have received the message")
                if in_doubt
                else reply
            )
        left = tuple(to for to, reply in zip(recipients, replies, strict=True) if not reply.accepts)
        if not left:
            return Reply(250, "2.0.0", f"Ok: passed on as {message.id}: {replies[0].text[:_MOST_WORDS]}")
        if all(reply.is_permanent for reply in replies):
            return replies[0]
        for to, reply in zip(recipients, replies, strict=True):
            if reply.accepts:  # the journal line of the fallback does not name these
                self._delivery.client.note_delivered(message, to, reply)
        rest = message._replace(envelope=message.envelope._replace(recipients=left))
        return await self._delivery.fallback.accept(rest, transaction)

    def abort(self) -> None:
        """Send nothing more, and ignore further replies."""
        self._is_over = True
        self.pipe.abort()
        if self.cancel is not None:
            self.cancel()
            self.cancel = None
