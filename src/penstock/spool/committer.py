"""Group commit: one fsync for many requests.

One thread owns the store (penstock.batches). It executes all requests made since it last looked in one transaction, and
wakes the tasks that wait, once for the whole batch.

Rules
-----
1. A request is answered after its transaction is committed.
2. If a transaction fails because of the disk, all its requests fail. Otherwise each is tried again alone, so that one
   that cannot be executed does not affect the others.
3. The requests that wait are bounded, in number and octets; beyond that, they are refused at once (`SpoolFullError`).
4. A task that is cancelled does not withdraw its request: it may have been executed already.
5. The thread continues after any error: no task waits for ever, and a disk that works again is used again.

The interval at which threads take turns in the interpreter (sys.setswitchinterval) was tried from 0.2 to 50 ms: it
makes no difference, since a batch is a few steps of SQLite, whatever its size.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import outcome
import trio

from penstock.batches import BatchThread
from penstock.spool.entry import Put
from penstock.spool.store import Store

_BATCH: Final = 256
_BATCH_OCTETS: Final = 8 << 20
"""The size of a transaction: it bounds how long its first request waits for the others."""
_RECIPIENT: Final = 1_700
"""Octets that a recipient counts for."""

T = TypeVar("T")
Done = Callable[[outcome.Outcome[Any]], None]


class SpoolFullError(Exception):
    """Too much is waiting to be written."""


def _is_disk(exc: Exception) -> bool:
    """Return whether the disk, or the database on it, failed, and not the request."""
    return isinstance(exc, OSError | sqlite3.OperationalError) or type(exc) is sqlite3.DatabaseError


class _Request(NamedTuple):
    """Something to be done within a transaction, and the callback for its result."""

    act: Callable[[Store], Any] | None
    put: Put | None
    done: Done
    octets: int


def _size_of(request: _Request) -> int:
    return request.octets if request.put is None else request.octets + _RECIPIENT * len(request.put.queues)


class Committer:
    """The thread that owns a store. Called in the trio thread."""

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float],
        report_bug: Callable[[Exception], None],
        *,
        most_waiting: int,
        most_octets: int,
    ) -> None:
        """At most `most_waiting` messages of `most_octets` octets wait to be written.

        `clock` returns seconds since the epoch; `report_bug` gets the exceptions of callbacks.
        """
        self._store = store
        self._clock = clock
        self._report_bug = report_bug
        self._most_waiting = most_waiting
        self._most_octets = most_octets
        self.waiting = 0
        """Messages that wait to be written."""
        self.octets = 0
        """Their octets."""
        self.transactions = 0
        """Transactions so far."""
        self.on_commit: Callable[[float, int], None] | None = None
        """Called in the thread with the seconds and the requests of each transaction."""
        self._thread: BatchThread[_Request, outcome.Outcome[Any]] = BatchThread(
            "penstock-spool",
            self._work,
            self._answer,
            _size_of,
            most=_BATCH,
            most_octets=_BATCH_OCTETS,
            rest=store.tidy,
        )

    async def aclose(self) -> None:
        """Execute the requests made so far, then end the thread."""
        await self._thread.aclose()

    # ---- requests

    def check_capacity(self, octets: int, also_waiting: int = 0) -> None:
        """Raise SpoolFullError if these octets exceed the bound, together with messages that wait elsewhere."""
        waiting = self.waiting + also_waiting
        # A message larger than the bound is accepted when no other one waits.
        is_full = waiting >= self._most_waiting or (self.octets and self.octets + octets > self._most_octets)
        if is_full or self._thread.is_closed:
            raise SpoolFullError(f"{waiting} messages of {self.octets} octets are waiting to be written")

    async def put(self, put: Put) -> None:
        """Write a message; return once it is committed. Raise SpoolFullError, OSError or sqlite3.Error.

        The wait cannot be cancelled: the caller learns what became of the message.
        """
        octets = 0 if put.data is None else len(put.data)
        self.check_capacity(octets)
        done = partial(trio.lowlevel.reschedule, trio.lowlevel.current_task())
        self._thread.put(_Request(None, put, done, octets))
        self.waiting += 1
        self.octets += octets
        await trio.lowlevel.wait_task_rescheduled(_refuse_to_abort)

    def do_later(self, act: Callable[[Store], T], done: Done) -> None:
        """Execute a function on the store, in the next transaction and in the order of the requests.

        Raise trio.ClosedResourceError after `aclose`.
        """
        self._thread.put(_Request(act, None, done, 0))

    async def do(self, act: Callable[[Store], T], *, whole: bool = False) -> T:
        """Execute a function on the store; return its result once it is committed. Raise its exception.

        With `whole` the wait cannot be cancelled: the caller learns how it ended.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        task = trio.lowlevel.current_task()
        is_waiting = True

        def done(result: outcome.Outcome[Any]) -> None:
            if is_waiting:
                trio.lowlevel.reschedule(task, result)

        def abort(_: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            nonlocal is_waiting
            if whole:
                return trio.lowlevel.Abort.FAILED
            is_waiting = False
            return trio.lowlevel.Abort.SUCCEEDED

        self.do_later(act, done)
        result: T = await trio.lowlevel.wait_task_rescheduled(abort)
        return result

    # ---- the thread

    def _work(self, batch: list[_Request]) -> list[outcome.Outcome[Any]]:
        """Execute a batch. Return the result of each request."""
        began = time.perf_counter()
        results = self._execute(batch)
        if self.on_commit is not None:
            self.on_commit(time.perf_counter() - began, len(batch))
        return results

    def _execute(self, batch: list[_Request]) -> list[outcome.Outcome[Any]]:
        """Execute a batch in one transaction; one by one if that fails and the disk is not the cause."""
        try:
            return self._commit(batch)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the tasks that wait must be answered
            if _is_disk(exc):
                self._store.checkpoints.relieve()
            elif len(batch) > 1:
                return [result for request in batch for result in self._execute([request])]
            return [outcome.Error(exc) for _ in batch]

    def _commit(self, batch: list[_Request]) -> list[outcome.Outcome[Any]]:
        store = self._store
        with store.transaction():
            puts = [request.put for request in batch if request.put is not None]
            if puts:
                store.put(puts, self._clock())
            results: list[outcome.Outcome[Any]] = [
                outcome.Value(None if request.act is None else request.act(store)) for request in batch
            ]
        self.transactions += 1
        return results

    def _answer(self, batch: list[_Request], results: Sequence[outcome.Outcome[Any]]) -> None:
        """Call back for all requests of a batch. Runs in the trio thread."""
        for request, result in zip(batch, results, strict=True):
            if request.put is not None:
                self.waiting -= 1
                self.octets -= request.octets
            try:
                request.done(result)
            except Exception as exc:  # noqa: BLE001 - a bug in one callback must not affect the others
                self._report_bug(exc)


def _refuse_to_abort(_: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED
