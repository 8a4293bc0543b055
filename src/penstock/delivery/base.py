"""The delivery interface: where a message goes between the end of its data and its 250.

A delivery is an object with an `accept`; inheriting from `Delivery` gives it the rest:

>>> class Archive(Delivery):
...     async def accept(self, message, transaction):
...         await trio.Path(f"/srv/archive/{message.id}").write_bytes(b"".join(message.body.chunks()))
...         return Reply(250, "2.0.0", f"Ok: archived as {message.id}")

What a delivery can do beside is an interface of its own (`Discards`, `ChecksCapacity`, `Streams`): it has it when it
has the methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

from penstock.message import Message
from penstock.reply import Reply
from penstock.transaction import Transaction


class Delivery(ABC):
    """Takes responsibility for messages (RFC 5321 4.2.5).

    An accepting reply is a promise: the message is as safe as this kind of delivery says in its docstring. Anything
    raised is a failure: the client gets 451, and the message was not accepted.
    """

    needs_body: bool = True
    """False for a delivery that never reads the body, so that it need not be kept."""

    async def start(self) -> None:  # noqa: B027 - most need nothing
        """Open what deliveries need (folders, files). Raise OSError with the path when that is not possible."""

    @abstractmethod
    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        """Accept the message for all its recipients, or refuse it for all of them.

        Return the reply for the client: 250 2.0.0 with the message id once it is safe, 452 4.3.1 when the disk is
        full, any other refusal in its own words. Does not close the body. `transaction` tells who the client is and
        what the checks have found; it is valid until this returns.
        """

    async def aclose(self) -> None:  # noqa: B027 - most have nothing to finish
        """Finish what was begun and give everything back."""


@runtime_checkable
class Discards(Protocol):
    """A delivery that keeps nothing and never waits: it counts a message instead of accepting it."""

    def discard(self, recipients: int, octets: int) -> Reply:
        """Do what `accept` does for a message with this many recipients and octets of body."""


@runtime_checkable
class ChecksCapacity(Protocol):
    """A delivery that knows whether there is space for a message before it comes."""

    def check_capacity(self, octets: int) -> Reply | None:
        """Return the refusal of a MAIL that announces this size (0 when it does not say), None when there is space.

        Called for each MAIL: must not block, and has to cost next to nothing.
        """


class Flow(Protocol):
    """A message that is passed on while its client sends it (see `Streams`). After `abort` all methods do nothing."""

    def feed_nowait(self, chunk: bytes) -> bool:
        """Take the next octets of the body. Return False when there is no space: then `await feed(chunk)`."""

    async def feed(self, chunk: bytes) -> None:
        """Take the next octets of the body, and wait for space, within bounds."""

    async def finish(self, message: Message, transaction: Transaction) -> Reply:
        """Do what `Delivery.accept` does, now that the message is whole and was judged. It is the one of `open`."""

    def abort(self) -> None:
        """Forget the message: its client has left, or it was refused. Nothing of it may be delivered."""


@runtime_checkable
class Streams(Protocol):
    """A delivery that begins with a message before its end.

    The body is collected as well, as for any other delivery: `accept` is for messages that were not streamed.
    """

    def open(self, head: Message) -> Flow | None:
        """Begin with a message whose body is still to come; None when it cannot be streamed. Must not block."""
