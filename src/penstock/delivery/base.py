"""The delivery seam: where a message goes between the end of its data and its 250."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from penstock.message import Message
from penstock.reply import Reply


class Delivery(Protocol):
    """Takes responsibility for messages (RFC 5321 4.2.5).

    An accepting reply is a promise: the message is as safe as this kind of delivery says in its docstring. Whatever
    raises instead of replying is a surprise; the client hears 451 and the message was not taken.
    """

    needs_body: bool
    """False for a delivery that never reads the body, so that nobody has to keep it."""

    async def start(self) -> None:
        """Open what deliveries need (folders, files). Raise OSError with the path when that is not possible."""

    async def accept(self, message: Message) -> Reply:
        """Take the message for all its recipients, or refuse it for all of them.

        Return the reply for the client: 250 2.0.0 with the message id once it is safe, 452 4.3.1 when the disk is
        full, any other refusal in its own words. Does not close the body.
        """

    async def aclose(self) -> None:
        """Finish what was begun and give everything back."""


@runtime_checkable
class Discards(Protocol):
    """The add-on of a delivery that keeps nothing and never waits: it is told of a message, not given it."""

    def discard(self, recipients: int, octets: int) -> Reply:
        """Do what `accept` does for a message with so many recipients and octets of body."""


@runtime_checkable
class Defers(Protocol):
    """The add-on of a delivery that answers later, for many messages at a time: nobody keeps a task waiting for it.

    Such a delivery has `accept` as well, for connections that have a task anyway and for messages that policies judge.
    """

    def accept_later(self, message: Message, done: Callable[[Reply], None]) -> None:
        """Do what `accept` does, but call `done` with the reply instead of returning it.

        `done` is called exactly once, in the trio thread, perhaps before this returns. It closes the body, and its
        reply reaches the client with those of all messages that are settled at the same time. Must not block; whatever
        it raises means that the message was not taken, and then `done` must not be called.
        """


@runtime_checkable
class ChecksCapacity(Protocol):
    """The add-on of a delivery that knows whether there is room for a message before it comes."""

    def check_capacity(self, octets: int) -> Reply | None:
        """Return the refusal of a MAIL that announces so many octets (0 when it does not say), None when there is room.

        Asked for each MAIL: must not block, and has to cost next to nothing.
        """


class Flow(Protocol):
    """A message that is passed on while its client sends it (see `Streams`). After `abort` everything does nothing."""

    def feed_nowait(self, chunk: bytes) -> bool:
        """Take the next octets of the body. Return False when there is no room: then `await feed(chunk)`."""

    async def feed(self, chunk: bytes) -> None:
        """Take the next octets of the body, and wait for room, within bounds."""

    async def finish(self, message: Message) -> Reply:
        """Do what `Delivery.accept` does, now that the message is whole and was judged. It is the one of `open`."""

    def abort(self) -> None:
        """Forget the message: its client has left, or it was refused. Nothing of it may be delivered."""


@runtime_checkable
class Streams(Protocol):
    """The add-on of a delivery that begins with a message before its end.

    The body is collected beside, as for any other delivery: `accept` is for messages that were not streamed.
    """

    def open(self, head: Message) -> Flow | None:
        """Begin with a message whose body is still to come; None when it can not be streamed. Must not block."""
