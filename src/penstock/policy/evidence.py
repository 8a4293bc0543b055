"""What is kept about one connection: what was found before MAIL, and the message that is arriving."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, Generic, Protocol, TypeVar

import trio

from penstock.journal import Journal
from penstock.policy.base import Mark
from penstock.transaction import Transaction

T = TypeVar("T")
_MAX_MARKS: Final = 100


class Watcher(Protocol):
    """Looks at a message while it arrives."""

    def feed(self, chunk: bytes) -> None:
        """Take the next octets of the message, header and body; never raises."""

    def close(self) -> None:
        """Give back what the message has taken; further calls do nothing."""


async def run_guarded(journal: Journal, check: str, run: Callable[..., Awaitable[object]], *arguments: object) -> None:
    """Be a background task of a check: an exception is journaled, and ends neither other tasks nor the server."""
    try:
        await run(*arguments)
    except Exception as exc:  # noqa: BLE001 - a bug of a check, or the operating system
        journal.hook_failed(check, "background", f"{type(exc).__name__}: {exc}")


class Pending(Generic[T]):
    """A result that a background task is going to set."""

    __slots__ = ("_done", "_value", "scope")

    def __init__(self) -> None:
        self._done = trio.Event()
        self._value: T | None = None
        self.scope = trio.CancelScope()
        """That of the task."""

    async def run(self, find: Callable[..., Any], *arguments: object) -> None:
        """Be the task: await the result; when that is cancelled, or raises, the result is None."""
        try:
            with self.scope:
                self._value = await find(*arguments)
        finally:
            self._done.set()

    def set(self, value: T) -> None:
        """Set the result without a task."""
        self._value = value
        self._done.set()

    @property
    def is_done(self) -> bool:
        """The task is over."""
        return self._done.is_set()

    @property
    def value(self) -> T | None:
        """The result, once the task is over; None if there is none."""
        return self._value

    async def get(self) -> T | None:
        """Wait for the result. None: there will be none. No checkpoint when it is known."""
        if not self._done.is_set():
            await self._done.wait()
        return self._value


class Evidence:
    """The connection's part of what was found: it outlives the transactions. `close` it at the end."""

    __slots__ = ("_pending", "header_field", "is_trusted", "marks", "watcher")

    def __init__(self) -> None:
        self.is_trusted: bool | None = None
        """The client is in a trusted network; None before that was looked up."""
        self.marks: list[tuple[str, Mark, bool]] = []
        """Marks made before MAIL: the check, the mark, and whether the check only monitors."""
        self.watcher: Watcher | None = None
        """What looks at the message that is arriving."""
        self.header_field = b""
        """The Authentication-Results field of the message that is judged."""
        self._pending: dict[str, Pending[Any]] | None = None

    def pending(self, name: str) -> Pending[Any] | None:
        """Return what a check has begun at the connection."""
        return None if self._pending is None else self._pending.get(name)

    def begin(self, name: str) -> Pending[Any]:
        """Return a new result of a check; the caller starts its task."""
        if self._pending is None:
            self._pending = {}
        pending = self._pending[name] = Pending()
        return pending

    def keep_mark(self, name: str, mark: Mark, *, is_monitored: bool) -> None:
        """Keep a mark for all messages of the connection; a client that says EHLO again and again adds no more."""
        if len(self.marks) < _MAX_MARKS:
            self.marks.append((name, mark, is_monitored))

    def watch(self, watcher: Watcher | None) -> None:
        """Look at the next message with this watcher; the one before is closed."""
        if self.watcher is not None:
            self.watcher.close()
        self.watcher = watcher

    def close(self) -> None:
        """Stop what still goes on for the connection."""
        self.watch(None)
        for pending in (self._pending or {}).values():
            pending.scope.cancel()


def evidence_of(transaction: Transaction) -> Evidence:
    """Return the evidence of a connection; it is made at first use."""
    found = transaction.evidence
    if found is None:
        found = transaction.evidence = Evidence()
    assert isinstance(found, Evidence)
    return found
