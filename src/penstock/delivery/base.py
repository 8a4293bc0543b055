"""The delivery interface: where a message goes between the end of its data and its 250.

A delivery is an object with an `accept` method; `Delivery` has defaults for the others:

>>> class Archive(Delivery):
...     async def accept(self, message, transaction):
...         await trio.Path(f"/srv/archive/{message.id}").write_bytes(b"".join(message.body.chunks()))
...         return Reply(250, "2.0.0", f"Ok: archived as {message.id}")

Optional features are separate interfaces (`Discards`, `ChecksCapacity`, `Streams`): a delivery has them if it has their
methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

from penstock.message import Message
from penstock.reply import Reply
from penstock.transaction import Transaction


class Delivery(ABC):
    """Takes responsibility for messages (RFC 5321 4.2.5).

    An accepting reply is a promise: the message is as safe as the docstring of the delivery says. If `accept` raises an
    exception, the client receives 451, and the message is not accepted.
    """

    needs_body: bool = True
    """False for a delivery that never reads the body, which is then not kept."""

    async def start(self) -> None:  # noqa: B027 - most need nothing
        """Create or open what the delivery needs (folders, files). Raise OSError with the path if that fails."""

    @abstractmethod
    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        """Accept the message for all its recipients, or refuse it for all of them.

        Return the reply for the client: 250 2.0.0 with the message id once it is safe, 452 4.3.1 if the disk is full,
        or another refusal. Does not close the body, and must not use it after it returns. `transaction` has the facts
        about the client and the results of checks; it is valid until this returns. May be cancelled when the server
        stops: then the message was not accepted.
        """

    async def aclose(self) -> None:  # noqa: B027 - most have nothing to finish
        """Finish deliveries in progress and release everything."""


@runtime_checkable
class Discards(Protocol):
    """Optional interface of a delivery that keeps nothing and never waits."""

    def discard(self, recipients: int, octets: int) -> Reply:
        """Do what `accept` does for a message with this many recipients and octets of body."""


@runtime_checkable
class ChecksCapacity(Protocol):
    """Optional interface of a delivery that can refuse a message at MAIL for lack of space (RFC 1870 6.1)."""

    def check_capacity(self, octets: int) -> Reply | None:
        """Return the refusal of a MAIL that announces this size (0: no size), None if there is space.

        Called for each MAIL: it must not block and should be fast.
        """


class Flow(Protocol):
    """A message that is passed on while its client sends it (see `Streams`). After `abort` all methods do nothing."""

    def feed_nowait(self, chunk: bytes) -> bool:
        """Add octets of the body. Return False if there is no space for them: then `await feed(chunk)`."""

    async def feed(self, chunk: bytes) -> None:
        """Add octets of the body, and wait for space, for a bounded time."""

    async def finish(self, message: Message, transaction: Transaction) -> Reply:
        """Do what `Delivery.accept` does, after the message was received and judged."""

    def abort(self) -> None:
        """Discard the message: the client has disconnected, or it was refused. Nothing of it may be delivered."""


@runtime_checkable
class Streams(Protocol):
    """Optional interface of a delivery that starts with a message before its end.

    The body is collected as well, as for any other delivery: `accept` is for messages that were not streamed.
    """

    def open(self, head: Message) -> Flow | None:
        """Start with a message whose body follows; return None if it cannot be streamed. Must not block."""
