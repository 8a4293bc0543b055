"""The data of the checks about one connection: results before MAIL, and the message that is being received."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, ClassVar, Final, Generic, Protocol, TypeVar

import trio

from penstock.journal import Journal
from penstock.policy.base import Mark
from penstock.transaction import Transaction

T = TypeVar("T")
_MAX_MARKS: Final = 100
_LOOKUP_SECONDS: Final = 10.0
"""What the lookups of a connection may take, which have shorter deadlines themselves."""


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
        _note_failure(journal, check, exc)


def _note_failure(journal: Journal, check: str, exc: Exception) -> None:
    journal.hook_failed(check, "background", f"{type(exc).__name__}: {exc}")


class Pending(Generic[T]):
    """A result that a background task is going to set."""

    __slots__ = ("_done", "_value", "is_done")

    def __init__(self) -> None:
        self._done: trio.Event | None = None
        """Made by the first task that has to wait."""
        self._value: T | None = None
        self.is_done = False
        """There is a result, or there will be none."""

    def set(self, value: T | None) -> None:
        """Set the result. None: there will be none."""
        self._value = value
        self.is_done = True
        if self._done is not None:
            self._done.set()

    @property
    def value(self) -> T | None:
        """The result, once it is there; None before that, or if it never comes."""
        return self._value

    async def get(self) -> T | None:
        """Wait for the result. None: there will be none. No checkpoint when it is known."""
        if not self.is_done:
            if self._done is None:
                self._done = trio.Event()
            await self._done.wait()
        return self._value


class Lookup(Generic[T]):
    """What a check asks the DNS about a client. All lookups of a connection are made by one task."""

    name: ClassVar[str]
    """That of the check."""
    asks_more: ClassVar[bool] = False
    """Some questions go to the client's own name servers, or depend on their answers: it is finished last."""

    def __init__(self, pending: Pending[T]) -> None:
        self.pending = pending
        """The result, which `finish` sets."""

    def begin(self) -> None:
        """Send the questions, without waiting."""

    async def finish(self, *, are_due: bool) -> None:
        """Wait for the answers, and set the result. `are_due`: the task has waited for something since `begin`."""

    def close(self) -> None:
        """Forget the questions that were not answered."""


class Evidence:
    """Results of the connection, which are kept for all its transactions. `close` it at the end."""

    __slots__ = ("_done", "_lookups", "_pending", "_scope", "is_trusted", "kept", "marks", "watcher")

    def __init__(self) -> None:
        self.is_trusted: bool | None = None
        """The client is in a trusted network; None before that was looked up."""
        self.marks: list[tuple[str, Mark, bool]] = []
        """Marks made before MAIL: the check, the mark, and whether the check only monitors."""
        self.watcher: Watcher | None = None
        """What looks at the message that is arriving."""
        self.kept: dict[object, Any] = {}
        """What checks keep for the connection, by the check."""
        self._pending: dict[str, Pending[Any]] | None = None
        self._lookups: list[Lookup[Any]] = []
        """Those that the task of the connection has not begun."""
        self._scope: trio.CancelScope | None = None
        """That of the task, while it runs."""
        self._done: trio.Event | None = None
        """The task has ended; made by the first that waits for it."""

    async def wait(self) -> None:
        """Wait for the lookups that are under way, for a few seconds at most."""
        if self._scope is not None:
            if self._done is None:
                self._done = trio.Event()
            await self._done.wait()

    def look_up(self, lookup: Lookup[Any], nursery: trio.Nursery, journal: Journal) -> None:
        """Have the task of the connection make a lookup, together with others that are asked for now."""
        self._lookups.append(lookup)
        if self._scope is None:
            scope = trio.CancelScope(deadline=trio.current_time() + _LOOKUP_SECONDS)
            nursery.start_soon(self._look_up, scope, journal)
            self._scope = scope

    async def _look_up(self, scope: trio.CancelScope, journal: Journal) -> None:
        """Be the task: make the lookups."""
        made: list[Lookup[Any]] = []
        try:
            with scope:
                while self._lookups:
                    begun, self._lookups = self._lookups, []
                    made += begun
                    for each in begun:
                        try:
                            each.begin()
                        except Exception as exc:  # noqa: BLE001 - as in `run_guarded`
                            _note_failure(journal, each.name, exc)
                    begun.sort(key=_asks_more)
                    for at, each in enumerate(begun):
                        await run_guarded(journal, each.name, partial(each.finish, are_due=at > 0))
        finally:
            self._scope = None
            for each in (*made, *self._lookups):
                each.close()
                if not each.pending.is_done:
                    each.pending.set(None)
            if self._done is not None:
                self._done.set()
                self._done = None

    def pending(self, name: str) -> Pending[Any] | None:
        """Return what a check has begun at the connection."""
        return None if self._pending is None else self._pending.get(name)

    def begin(self, name: str) -> Pending[Any]:
        """Return a new result of a check; the caller sets it, or has it looked up."""
        if self._pending is None:
            self._pending = {}
        pending = self._pending[name] = Pending()
        return pending

    def keep_mark(self, name: str, mark: Mark, *, is_monitored: bool) -> None:
        """Keep a mark for all messages of the connection; repeated EHLO commands add no more."""
        if len(self.marks) < _MAX_MARKS:
            self.marks.append((name, mark, is_monitored))

    def watch(self, watcher: Watcher | None) -> None:
        """Look at the next message with this watcher; the one before is closed."""
        if self.watcher is not None:
            self.watcher.close()
        self.watcher = watcher

    def close(self) -> None:
        """Stop the task of the connection."""
        self.watch(None)
        if self._scope is not None:
            self._scope.cancel()


def _asks_more(lookup: Lookup[Any]) -> bool:
    """Return whether a lookup comes last: the client's own name servers may be silent, and must delay no other."""
    return lookup.asks_more


def evidence_of(transaction: Transaction) -> Evidence:
    """Return the evidence of a connection; it is made at first use."""
    found = transaction.evidence
    if found is None:
        found = transaction.evidence = Evidence()
    assert isinstance(found, Evidence)
    return found
