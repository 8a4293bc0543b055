"""Delivery straight to the next hop: the client hears 250 when the hop has said it, and not before.

The text goes on while the client sends it; a copy is collected beside, as for any other delivery. Whenever the hop is
slow, down, or cannot take the message now, the copy goes to the spool (any other delivery that is given as the
fallback), and the client hears what that says: it waits for nobody but us.

What comes of a message
-----------------------
- The hop takes it for all recipients: 250, with the words of the hop.
- The hop refuses it for all of them: the client hears the refusal, and may tell its user.
- It takes it for some: for the others it goes to the fallback, which tries again, or reports to the sender.
- Anything else: it goes to the fallback for all.

Where the fallback cannot take the others, the client hears that, sends again, and those who had it get it twice.

The one case of doubt: the end of the text was sent, and the hop does not answer in time. The message goes to the
fallback, and may arrive twice (penstock.relay.ahead has the reason). Up to the end of the text there is no doubt:
the connection to the hop is closed before it, and what the hop has is no message.
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
"""Characters of the hop's words in a 250."""

Forget = Callable[[], None]


class PassthroughSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Passing messages on while they come."""

    buffer: Annotated[
        int, msgspec.Meta(ge=4096, le=1 << 30, description="Octets of a message that wait for the next hop")
    ] = 131_072
    patience: Annotated[
        float, msgspec.Meta(gt=0, le=600, description="Seconds the buffer may be full before the message is spooled")
    ] = 5.0
    answer: Annotated[
        float,
        msgspec.Meta(gt=0, le=600, description="Seconds for the answer to the text; then the message is spooled, too"),
    ] = 30.0


class Onward(Protocol):
    """What can pass a message on while it comes (penstock.relay.ahead)."""

    def begin(
        self,
        envelope: Envelope,
        size: int,
        coming: AsyncIterator[bytes],
        done: Callable[[Sequence[Reply] | None], None],
    ) -> Forget | None:
        """Begin, and tell `done` a reply for each recipient, or None when nothing was sent.

        Return what makes `done` hear nothing more, or None when the message cannot be passed on now. When `coming`
        raises OSError, nothing of the message may be delivered.
        """

    def note_delivered(self, message: Message, to: Recipient, reply: Reply) -> None:
        """Journal that the hop has taken a message for one of its recipients, with the reply that `done` has heard."""


class PassthroughDelivery(Delivery):
    """Passes messages on to the next hop, or to another delivery. Its 250 promises what the one of those does."""

    def __init__(self, onward: Onward, fallback: Delivery, settings: PassthroughSettings) -> None:
        self.settings = settings
        self.fallback = fallback
        self.onward = onward
        self._room = fallback if isinstance(fallback, ChecksCapacity) else None

    async def start(self) -> None:
        """Start the fallback. Raise OSError."""
        await self.fallback.start()

    async def aclose(self) -> None:
        """Close the fallback."""
        await self.fallback.aclose()

    def check_capacity(self, octets: int) -> Reply | None:
        """Ask the fallback: whatever comes has to fit there."""
        return None if self._room is None else self._room.check_capacity(octets)

    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        """Accept a message that is there as a whole, because policies have judged it; not one in quarantine."""
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
        """Begin with a message, if the next hop of all its recipients is known and has room."""
        passed = PassedMessage(self, head)
        size = head.envelope.size
        announced = size + len(head.prefix) if size else 0
        passed.forget = self.onward.begin(head.envelope, announced, passed.pipe, passed.done)
        return None if passed.forget is None else passed


class Pipe:
    """The text on its way from the client's connection to the hop's: chunks, at most so many octets. An iterator."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._chunks: list[bytes] = []
        self._octets = 0
        self._has_ended = False
        self._is_broken = False
        self._changed = trio.Event()
        self.is_read_to_end = False
        """The end was told to the reader: from here on it cannot be taken back."""

    def put_nowait(self, chunk: bytes) -> bool:
        """Put a chunk, if there is room, which for one there is in an empty pipe."""
        if self._octets and self._octets + len(chunk) > self._most:
            return False
        self._chunks.append(chunk)
        self._octets += len(chunk)
        self._change()
        return True

    async def put(self, chunk: bytes) -> None:
        """Put a chunk, and wait for room."""
        while not self._is_broken and not self.put_nowait(chunk):
            await self._changed.wait()

    def end(self) -> None:
        """Note that this was all."""
        self._has_ended = True
        self._change()

    def break_off(self) -> None:
        """Note that the end will not come. Too late when it `is_read_to_end`."""
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
                raise ConnectionAbortedError("it was broken off")
            if self._has_ended:
                self.is_read_to_end = True
                raise StopAsyncIteration
            await self._changed.wait()
        chunk = b"".join(self._chunks)  # at most a buffer full, in one send
        self._chunks.clear()
        self._octets = 0
        self._change()
        return chunk


class PassedMessage:
    """A message that is being passed on: the flow of a PassthroughDelivery."""

    def __init__(self, delivery: PassthroughDelivery, head: Message) -> None:
        self.pipe = Pipe(delivery.settings.buffer)
        self.pipe.put_nowait(head.prefix)
        self.forget: Forget | None = None
        self._delivery = delivery
        self._replies: Sequence[Reply] | None = None
        self._answered = trio.Event()
        self._is_over = False
        """Nobody reads the pipe any more, or should."""

    def done(self, replies: Sequence[Reply] | None) -> None:
        """Hear what the hop says, perhaps before the end of the text."""
        self._replies = replies
        self._is_over = True
        self.pipe.break_off()
        self._answered.set()

    def feed_nowait(self, chunk: bytes) -> bool:
        """Put a chunk into the pipe, if there is room."""
        return self._is_over or self.pipe.put_nowait(chunk)

    async def feed(self, chunk: bytes) -> None:
        """Put a chunk into the pipe; give the hop up when it takes nothing for too long."""
        with trio.move_on_after(self._delivery.settings.patience) as scope:
            await self.pipe.put(chunk)
        if scope.cancelled_caught:
            self.abort()

    async def finish(self, message: Message, transaction: Transaction) -> Reply:
        """Let the end of the text go on, and return what the client is to hear."""
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
            return reply.because("the next hop did not answer in time, and may have it, too") if in_doubt else reply
        left = tuple(to for to, reply in zip(recipients, replies, strict=True) if not reply.accepts)
        if not left:
            return Reply(250, "2.0.0", f"Ok: passed on as {message.id}: {replies[0].text[:_MOST_WORDS]}")
        if all(reply.is_permanent for reply in replies):
            return replies[0]
        for to, reply in zip(recipients, replies, strict=True):
            if reply.accepts:  # that the message was spooled says nothing of those
                self._delivery.onward.note_delivered(message, to, reply)
        rest = message._replace(envelope=message.envelope._replace(recipients=left))
        return await self._delivery.fallback.accept(rest, transaction)

    def abort(self) -> None:
        """See to it that nothing more is sent, and nothing more heard."""
        self._is_over = True
        self.pipe.break_off()
        if self.forget is not None:
            self.forget()
            self.forget = None
