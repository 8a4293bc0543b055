"""What every delivery has to keep, as a function that anybody's delivery can be given to."""

from __future__ import annotations

from collections.abc import Iterator

import trio

from penstock.delivery.base import Delivery
from penstock.message import Envelope, Message, MessageIds, Path, Recipient
from penstock.reply import Reply
from tests.helpers import TRANSACTION


class Pieces:
    """A body in memory that tells how it was treated."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.closed = 0

    @property
    def size(self) -> int:
        return sum(map(len, self.pieces))

    def chunks(self) -> Iterator[bytes]:
        return iter(self.pieces)

    def close(self) -> None:
        self.closed += 1


def make_message(
    *pieces: bytes, sender: str = "a@example.com", recipients: tuple[str, ...] = ("b@example.org",)
) -> Message:
    """Return a message as a connection hands it over."""

    def path(text: str) -> Path:
        local, _, domain = text.rpartition("@")
        return Path(text, local, domain.lower())

    envelope = Envelope(path(sender), tuple(Recipient(path(text)) for text in recipients))
    return Message(MessageIds().next(), envelope, b"Received: by test\r\n", Pieces(*pieces), 0.0)


async def check_delivery(delivery: Delivery) -> None:
    """Raise AssertionError when a delivery that has room breaks its contract."""
    await delivery.start()
    messages = [make_message(b"Subject: x\r\n\r\n", b"body\r\n"), make_message(), make_message(b"\0\xff no line end")]
    replies: list[Reply] = []

    async def accept(message: Message) -> None:
        replies.append(await delivery.accept(message, TRANSACTION))

    async with trio.open_nursery() as nursery:  # several at a time
        for message in messages:
            nursery.start_soon(accept, message)
    for reply in replies:
        assert reply.code == 250
        assert reply.status == "2.0.0"
        assert not reply.closes
    if delivery.needs_body:  # what is kept can be found again
        assert {str(message.id) for message in messages} == {reply.text.split()[-1] for reply in replies}
    for message in messages:
        assert isinstance(message.body, Pieces)
        assert message.body.closed == 0, "the body belongs to the connection"
    await delivery.aclose()
