"""Group commit: one fsync for many requests.

One thread owns the store. It takes all requests made since it last looked, executes them in one transaction, and wakes
the tasks that wait, once for the whole batch. So a single request starts at once and waits for one fsync, and under
load a batch is what came in while the one before was synced: there is no timer, nothing to tune, no added latency.

Rules
-----
1. A request is answered after its transaction is committed.
2. If a transaction fails because of the disk, all its requests fail. Otherwise each is tried again alone, so that one
   that cannot be executed does not affect the others.
3. The requests that wait are bounded, in number and octets; beyond that, they are refused at once (`SpoolFullError`).
4. A task that is cancelled does not withdraw its request: it may have been executed already.
5. Whatever happens to a batch, the thread continues: no task waits for ever, and a disk that works again is used again.

The interval at which threads take turns in the interpreter (sys.setswitchinterval) was tried from 0.2 to 50 ms: it
makes no difference, since a batch is a few steps of SQLite, whatever its size.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

import outcome
import trio

from penstock.spool.entry import Put
from penstock.spool.store import Store

_BATCH: Final = 256
_BATCH_OCTETS: Final = 8 << 20
_BATCH_RECIPIENTS: Final = 5_000
"""The size of a transaction: it bounds how long its first request waits for the others."""

T = TypeVar("T")
Done = Callable[[outcome.Outcome[Any]], None]


class SpoolFullError(Exception):
    """Too much is waiting to be written."""


def _is_disk(exc: Exception) -> bool:
    """Return whether the disk, or the database on it, failed, and not the request."""
    return isinstance(exc, OSError | sqlite3.OperationalError) or type(exc) is sqlite3.DatabaseError


class _Request:
    """Something to be done within a transaction, and the callback for its result."""

    __slots__ = ("act", "done", "octets", "put", "result")

    def __init__(self, act: Callable[[Store], Any] | None, put: Put | None, done: Done, octets: int) -> None:
        self.act = act
        self.put = put
        self.done = done
        self.octets = octets
        self.result: outcome.Outcome[Any] | None = None


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
        """Gets the seconds and the requests of each transaction, in this thread."""
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._token: trio.lowlevel.TrioToken
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._over = trio.Event()

    def start(self) -> None:
        """Start the thread. The store is open."""
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.Thread(target=self._work, name="penstock-spool", daemon=True)
        self._thread.start()

    async def aclose(self) -> None:
        """Execute the requests made so far, then end the thread."""
        if self._thread is None or self._is_closed:
            return
        self._is_closed = True
        self._requests.put(None)
        with trio.CancelScope(shield=True):
            await self._over.wait()

    # ---- requests

    def check_capacity(self, octets: int, also_waiting: int = 0) -> None:
        """Raise SpoolFullError if this many octets are too many, with messages that wait elsewhere."""
        waiting = self.waiting + also_waiting
        # A message larger than the bound is accepted when no other one waits.
        is_full = waiting >= self._most_waiting or (self.octets and self.octets + octets > self._most_octets)
        if is_full or self._is_closed:
            raise SpoolFullError(f"{waiting} messages of {self.octets} octets are waiting to be written")

    async def put(self, put: Put) -> None:
        """Write a message; return once it is committed. Raise SpoolFullError, OSError or sqlite3.Error.

        The wait cannot be cancelled: the caller learns what became of the message.
        """
        self.check_capacity(0 if put.data is None else len(put.data))
        self.put_later(put, partial(trio.lowlevel.reschedule, trio.lowlevel.current_task()))
        await trio.lowlevel.wait_task_rescheduled(_refuse_to_abort)

    def put_later(self, put: Put, done: Done) -> None:
        """Write a message, then call `done` in the trio thread, with the exception if that failed."""
        octets = 0 if put.data is None else len(put.data)
        self.waiting += 1
        self.octets += octets
        self._requests.put(_Request(None, put, done, octets))

    def do_later(self, act: Callable[[Store], T], done: Done) -> None:
        """Have something done with the store, in the next transaction and in the order of the requests.

        Raise trio.ClosedResourceError after `aclose`.
        """
        if self._is_closed:
            raise trio.ClosedResourceError("the spool is closed")
        self._requests.put(_Request(act, None, done, 0))

    async def do(self, act: Callable[[Store], T], *, whole: bool = False) -> T:
        """Have something done with the store; return its result once that is committed. Raise what it raises.

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

    def _work(self) -> None:
        is_last = False
        while not is_last:
            batch, is_last = self._next_batch()
            if batch:
                began = time.perf_counter()
                self._execute(batch)
                if self.on_commit is not None:
                    self.on_commit(time.perf_counter() - began, len(batch))
                with suppress(trio.RunFinishedError):  # the loop has crashed, and no task waits any more
                    self._token.run_sync_soon(self._answer, batch)
                self._store.tidy()
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._over.set)

    def _next_batch(self) -> tuple[list[_Request], bool]:
        """Wait for a request; return it with those that are already there, and whether it was the last batch."""
        batch: list[_Request] = []
        octets, recipients = _BATCH_OCTETS, _BATCH_RECIPIENTS
        request = self._requests.get()
        while request is not None:
            batch.append(request)
            octets -= request.octets
            if request.put is not None:
                recipients -= len(request.put.queues)
            if len(batch) >= _BATCH or octets <= 0 or recipients <= 0 or self._requests.empty():
                break
            request = self._requests.get_nowait()
        return batch, request is None

    def _execute(self, batch: list[_Request]) -> None:
        """Execute a batch in one transaction; one by one if that fails and the disk is not the cause."""
        try:
            self._commit(batch)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the tasks that wait must be answered
            if _is_disk(exc) or len(batch) == 1:
                if _is_disk(exc):
                    self._store.checkpoints.relieve()
                for request in batch:
                    request.result = outcome.Error(exc)
                return
            for request in batch:
                self._execute([request])

    def _commit(self, batch: list[_Request]) -> None:
        store = self._store
        with store.transaction():
            puts = [request.put for request in batch if request.put is not None]
            if puts:
                store.put(puts, self._clock())
            for request in batch:
                if request.act is not None:
                    request.result = outcome.Value(request.act(store))
        self.transactions += 1

    def _answer(self, batch: list[_Request]) -> None:
        """Call back for all requests of a batch. Runs in the trio thread."""
        for request in batch:
            if request.put is not None:
                self.waiting -= 1
                self.octets -= request.octets
            try:
                request.done(request.result or outcome.Value(None))
            except Exception as exc:  # noqa: BLE001 - a bug in one callback must not affect the others
                self._report_bug(exc)


def _refuse_to_abort(_: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED
