"""Deliveries in Python: `[delivery] kind = "package.module:Class"` or `"file.py:Class"`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from penstock.delivery.base import ChecksCapacity, Delivery, Discards, Streams
from penstock.loading import HookError, load_object
from penstock.message import Message
from penstock.reply import Reply
from penstock.transaction import Transaction


def load_delivery(reference: str, arguments: Mapping[str, object] = {}) -> Delivery:
    """Return the delivery that a reference names: a class or function is called with the arguments.

    An object that does not inherit from `Delivery` is one when it has an `accept(message, transaction)`; `start`,
    `aclose` and the methods of the other interfaces of penstock.delivery.base may be missing. Raise HookError if
    there is no such object, or if it is not a delivery.
    """
    made = load_object(reference, arguments)
    if isinstance(made, Delivery):
        return made
    accept = getattr(made, "accept", None)
    if not inspect.iscoroutinefunction(accept):
        raise HookError(f"{reference!r}: a delivery has an `async def accept(self, message, transaction)`")
    try:
        inspect.signature(accept).bind(None, None)
    except TypeError as exc:
        raise HookError(f"{reference!r}: accept is called with a message and a transaction: {exc}") from exc
    return _Adopted(made)


_OPTIONAL: Final = (
    (ChecksCapacity, "check_capacity", 1),
    (Discards, "discard", 2),
    (Streams, "open", 1),
)
"""The optional interfaces of a delivery, their method, and its number of arguments."""


class _Adopted(Delivery):
    """Makes a delivery of an object with an `accept` method."""

    def __init__(self, adopted: Any) -> None:
        self.needs_body = bool(getattr(adopted, "needs_body", True))
        self._adopted = adopted
        for interface, name, arguments in _OPTIONAL:
            # A method of this name with other arguments has another purpose.
            if isinstance(adopted, interface) and _accepts(getattr(adopted, name), arguments):
                setattr(self, name, getattr(adopted, name))

    async def start(self) -> None:
        """Call `start`, if the object has it."""
        if hasattr(self._adopted, "start"):
            await self._adopted.start()

    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        """Call `accept`. Raise TypeError if it does not return a Reply."""
        reply = await self._adopted.accept(message, transaction)
        if not isinstance(reply, Reply):
            raise TypeError(f"accept returns a Reply, not {reply!r}")
        return reply

    async def aclose(self) -> None:
        """Call `aclose`, if the object has it."""
        if hasattr(self._adopted, "aclose"):
            await self._adopted.aclose()


def _accepts(method: Any, arguments: int) -> bool:
    """Return whether a function can be called with a number of arguments, and is not `async`."""
    try:
        inspect.signature(method).bind(*[None] * arguments)
    except (TypeError, ValueError):
        return False
    return not inspect.iscoroutinefunction(method)
