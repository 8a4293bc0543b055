"""The delivery seam: where a message goes between the end of its data and its 250."""

from __future__ import annotations

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
class HasRoom(Protocol):
    """The add-on of a delivery that knows whether there is room for a message before it comes."""

    def room_for(self, octets: int) -> Reply | None:
        """Return the refusal of a MAIL that announces so many octets (0 when it does not say), None when there is room.

        Asked for each MAIL: must not block, and has to cost next to nothing.
        """
