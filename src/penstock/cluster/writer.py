"""Writes messages into the stream exactly once, even if requests or acknowledgments are lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Final, NamedTuple

import trio
from crc32c import crc32c

from penstock.cluster.jetstream import ApiError, JetStream, PubAck, read_ack
from penstock.cluster.layout import (
    MARGIN,
    PIECE,
    STREAM_FULL,
    WRONG_LAST_SEQUENCE,
    Layout,
    LayoutError,
    Place,
    StoredMessage,
    encode_envelope,
    message_headers,
    read_message,
)
from penstock.message import Body, Envelope, Message
from penstock.net.nats import DisconnectedError, NatsError, OverloadedError, RequestTimeoutError

_ANSWER: Final = 3.0
"""Seconds to wait for an answer before a message is published again."""
_PAUSE: Final = 0.1
"""Seconds before a message is published again that was refused for now."""


class UnavailableError(Exception):
    """The cluster has not confirmed a message in time. Whether it is in the stream is unknown."""


class StreamFullError(Exception):
    """There is no space in the stream, or too much waits for it."""


class Written(NamedTuple):
    """A message in the stream."""

    place: Place | None
    """None if it was relayed meanwhile."""
    text: bytes
    """The prefix and the body if they are one piece."""
    found: Envelope | None = None
    """The envelope of the message that was there already."""


class Writer:
    """Publishes messages."""

    def __init__(self, jetstream: JetStream, layout: Layout) -> None:
        self._jetstream = jetstream
        self._layout = layout
        self.resent = 0
        """Messages and pieces that were published again."""

    async def write(self, message: Message, partition: int, *, patience: float) -> Written:
        """Publish a message; return once a majority of the servers has synced it.

        Raise UnavailableError after `patience` seconds, StreamFullError, and OSError if the body
        cannot be read.
        """
        begun = time.monotonic()
        body, prefix = message.body, message.prefix
        client = self._jetstream.client
        envelope, before = encode_envelope(message.envelope)
        if client.is_connected and _in_memory(body) and len(before) + message.size <= self.most_octets:
            # Nearly all messages: one request, and its acknowledgment.
            text = b"".join([prefix, *body.chunks()])
            crc = crc32c(text)
            headers = message_headers(message, envelope, before, crc=crc, pieces=0)
            try:
                data = before + text if before else text
                subject = self._layout.message(partition, message.id)
                answer = await client.request(subject, data, headers, timeout=min(patience / 2, _ANSWER))
                ack = read_ack(answer, subject)
            except NatsError:
                self.resent += 1  # it may find itself there already
            else:
                if not ack.duplicate:
                    return Written(Place(partition, ack.seq, 0, crc, len(before), len(prefix), 0, False), text)
        deadline = trio.current_time() + patience - (time.monotonic() - begun)
        return await self._write_slowly(message, envelope, before, partition, deadline)

    async def _write_slowly(
        self, message: Message, envelope: bytes, before: bytes, partition: int, deadline: float
    ) -> Written:
        """Write a message that is large or in a file, or whose acknowledgment did not come."""
        body, prefix = message.body, message.prefix
        text = b""
        count = 0
        is_separate = False
        """The envelope has pieces of its own."""
        if len(before) + message.size > self.most_octets:
            is_separate = len(before) > self.most_octets
            try:
                if is_separate:
                    pieces = iter([before[start : start + PIECE] for start in range(0, len(before), PIECE)])
                    await self._write_pieces(pieces, message, partition, deadline, name="e")
                crc, count = await self._write_pieces(_pieces(message), message, partition, deadline)
            except StreamFullError:
                stream = self._layout.stream_of(partition)
                with suppress(NatsError):  # then they are deleted after a day
                    await self._jetstream.purge(stream, self._layout.piece(partition, message.id, "*"))
                raise
        else:
            text = b"".join([prefix, *body.chunks()]) if _in_memory(body) else await _read(prefix, body)
            crc = crc32c(text)
        headers = message_headers(message, envelope, before, crc=crc, pieces=count)
        subject = self._layout.message(partition, message.id)
        place = Place(partition, 0, count, crc, len(before), len(prefix), 0, False)
        ack = await self._publish(subject, text if is_separate else before + text, headers, deadline)
        if ack is None or ack.duplicate:
            found = await self._find(subject, partition, deadline)
            return Written(None, text) if found is None else Written(found.place, text, found.envelope)
        return Written(place._replace(sequence=ack.seq), text)

    @property
    def most_octets(self) -> int:
        """Octets of a payload, as far as is known."""
        return self._jetstream.client.max_payload - MARGIN

    async def _find(self, subject: str, partition: int, deadline: float) -> StoredMessage | None:
        """Return a message that was in the stream already; None if it was relayed meanwhile."""
        stream = self._layout.stream_of(partition)
        while True:
            try:
                found = await self._jetstream.last(stream, subject)
                message = None if found is None else read_message(subject, found.sequence, found.headers)
            except (NatsError, LayoutError) as exc:
                if trio.current_time() >= deadline:
                    raise UnavailableError(str(exc)) from exc
                await trio.sleep(_PAUSE)
            else:
                return message

    async def _publish(self, subject: str, data: bytes, headers: bytes, deadline: float) -> PubAck | None:
        """Publish until it is acknowledged; None if the subject has a message already. Raise what `write` raises."""
        client = self._jetstream.client
        while True:
            left = deadline - trio.current_time()
            try:
                answer = await client.request(subject, data, headers, timeout=max(0.01, min(left, _ANSWER)))
                return read_ack(answer, subject)
            except OverloadedError as exc:
                raise StreamFullError(str(exc)) from exc
            except NatsError as exc:
                if isinstance(exc, ApiError):
                    if exc.number == WRONG_LAST_SEQUENCE:
                        return None
                    if exc.number in STREAM_FULL:
                        raise StreamFullError(str(exc)) from exc
                if trio.current_time() >= deadline:
                    raise UnavailableError(str(exc)) from exc
                self.resent += 1
                await self._pause(exc, deadline)

    async def _pause(self, exc: NatsError, deadline: float) -> None:
        if isinstance(exc, DisconnectedError):
            with trio.move_on_at(deadline):
                await self._jetstream.client.wait_connected()
        elif not isinstance(exc, RequestTimeoutError):
            await trio.sleep(_PAUSE)

    async def _write_pieces(
        self, pieces: Iterator[bytes], message: Message, partition: int, deadline: float, *, name: str = ""
    ) -> tuple[int, int]:
        """Publish pieces of a message. Return their checksum and how many there are."""
        crc = count = 0
        while True:
            piece = (
                next(pieces, None) if _in_memory(message.body) else await trio.to_thread.run_sync(next, pieces, None)
            )
            if piece is None:
                return crc, count
            crc = crc32c(piece, crc)
            # Published again, a piece takes the place of itself.
            await self._publish(self._layout.piece(partition, message.id, f"{name}{count}"), piece, b"", deadline)
            count += 1


def _in_memory(body: Body) -> bool:
    return bool(getattr(body, "in_memory", False))


async def _read(prefix: bytes, body: Body) -> bytes:
    return await trio.to_thread.run_sync(lambda: b"".join([prefix, *body.chunks()]))


def _pieces(message: Message) -> Iterator[bytes]:
    """Yield the prefix and the body in pieces of the size that the layout says, at least one."""
    buffer = bytearray(message.prefix)
    for chunk in message.body.chunks():
        buffer += chunk
        while len(buffer) > PIECE:
            yield bytes(buffer[:PIECE])
            del buffer[:PIECE]
    yield bytes(buffer)
