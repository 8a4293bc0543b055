"""Many wishes, one fsync.

One thread owns the store. It takes all that was wished for since it last looked, does it in one transaction, and tells
the loop, once for the whole batch. So a lone wish starts at once and waits for one fsync, and under load a batch is
what came in while the one before was synced: there is no timer, nothing to tune, and no latency added.

Rules
-----
1. Nothing is told before its transaction is committed.
2. A transaction that fails, fails for all of its wishes when the disk is to blame. Otherwise each is tried again alone,
   so that one that can not be fulfilled costs nobody else.
3. The wishes that wait are bounded, in number and octets: who comes then is told so at once (`SpoolFullError`).
4. A waiter that is cancelled does not take its wish back: it may be fulfilled already.
5. Whatever happens to a batch, the thread goes on: nobody waits for ever, and a disk that works again is used again.

The interval at which threads take turns in the interpreter (sys.setswitchinterval) was tried from 0.2 to 50 ms: it
made no difference, since a batch is a few steps of SQLite, whatever its size.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

import outcome
import trio

from penstock.spool.entry import Put
from penstock.spool.store import Store

_BATCH: Final = 256
_BATCH_OCTETS: Final = 8 << 20
_BATCH_RECIPIENTS: Final = 5_000
"""What a transaction has at most: it keeps the first of its wishes from waiting for too many others."""

T = TypeVar("T")
Done = Callable[[outcome.Outcome[Any]], None]


class SpoolFullError(Exception):
    """More waits to be written than there is room for."""


def _is_disk(exc: Exception) -> bool:
    """Say whether the disk, or the database on it, is to blame, and not what was asked of it."""
    return isinstance(exc, OSError | sqlite3.OperationalError) or type(exc) is sqlite3.DatabaseError


class _Wish:
    """Something to be done within a transaction, and whom to tell."""

    __slots__ = ("act", "done", "octets", "put", "result")

    def __init__(self, act: Callable[[Store], Any] | None, put: Put | None, done: Done, octets: int) -> None:
        self.act = act
        self.put = put
        self.done = done
        self.octets = octets
        self.result: outcome.Outcome[Any] | None = None


class Committer:
    """The thread that owns a store. All methods belong to the loop."""

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float],
        report_bug: Callable[[Exception], None],
        *,
        most_waiting: int,
        most_octets: int,
    ) -> None:
        """At most so many puts, of so many octets, wait to be written.

        `clock` tells seconds since the epoch, `report_bug` is told what a `done` raises.
        """
        self._store = store
        self._clock = clock
        self._report_bug = report_bug
        self._most_waiting = most_waiting
        self._most_octets = most_octets
        self.waiting = 0
        """Puts that wait to be written."""
        self.octets = 0
        """Their octets."""
        self.transactions = 0
        """Transactions so far."""
        self._wishes: queue.SimpleQueue[_Wish | None] = queue.SimpleQueue()
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
        """Fulfil what was wished for, then end the thread."""
        if self._thread is None or self._is_closed:
            return
        self._is_closed = True
        self._wishes.put(None)
        with trio.CancelScope(shield=True):
            await self._over.wait()

    # ---- wishing

    def check_room(self, octets: int, also_waiting: int = 0) -> None:
        """Raise SpoolFullError when so many octets are too many, with messages that wait elsewhere."""
        waiting = self.waiting + also_waiting
        # What is too large for the bound has its turn when nobody else waits.
        is_full = waiting >= self._most_waiting or (self.octets and self.octets + octets > self._most_octets)
        if is_full or self._is_closed:
            raise SpoolFullError(f"{waiting} messages of {self.octets} octets wait to be written")

    def put_later(self, put: Put, done: Done) -> None:
        """Write a message. `done` is called in the loop. Raise SpoolFullError."""
        octets = 0 if put.data is None else len(put.data)
        self.check_room(octets)
        self.waiting += 1
        self.octets += octets
        self._wishes.put(_Wish(None, put, done, octets))

    def do_later(self, act: Callable[[Store], T], done: Done) -> None:
        """Have something done with the store, in the next transaction and in the order of asking.

        Raise trio.ClosedResourceError when nothing is done any more.
        """
        if self._is_closed:
            raise trio.ClosedResourceError("the spool is closed")
        self._wishes.put(_Wish(act, None, done, 0))

    async def do(self, act: Callable[[Store], T], *, whole: bool = False) -> T:
        """Have something done with the store; return what it returns once that is committed. Raise what it raises.

        With `whole` the wait can not be cancelled: who has it done hears how it ended.
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
                self._fulfil(batch)
                with suppress(trio.RunFinishedError):  # the loop has died, and nobody waits any more
                    self._token.run_sync_soon(self._tell, batch)
                self._store.tidy()
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._over.set)

    def _next_batch(self) -> tuple[list[_Wish], bool]:
        """Wait for a wish; return it with those that are there, and whether it was the last batch."""
        batch: list[_Wish] = []
        octets, recipients = _BATCH_OCTETS, _BATCH_RECIPIENTS
        wish = self._wishes.get()
        while wish is not None:
            batch.append(wish)
            octets -= wish.octets
            if wish.put is not None:
                recipients -= len(wish.put.lanes)
            if len(batch) >= _BATCH or octets <= 0 or recipients <= 0 or self._wishes.empty():
                break
            wish = self._wishes.get_nowait()
        return batch, wish is None

    def _fulfil(self, batch: list[_Wish]) -> None:
        """Fulfil a batch in one transaction; alone where that fails through no fault of the disk."""
        try:
            self._commit(batch)
        except Exception as exc:  # noqa: BLE001 - whatever it is, those who wait have to hear of it
            if _is_disk(exc) or len(batch) == 1:
                if _is_disk(exc):
                    self._store.checkpoints.relieve()
                for wish in batch:
                    wish.result = outcome.Error(exc)
                return
            for wish in batch:
                self._fulfil([wish])

    def _commit(self, batch: list[_Wish]) -> None:
        store = self._store
        with store.transaction():
            puts = [wish.put for wish in batch if wish.put is not None]
            if puts:
                store.put(puts, self._clock())
            for wish in batch:
                if wish.act is not None:
                    wish.result = outcome.Value(wish.act(store))
        self.transactions += 1

    def _tell(self, batch: list[_Wish]) -> None:
        """Tell the waiters of a batch, back to back. Runs in the loop."""
        for wish in batch:
            if wish.put is not None:
                self.waiting -= 1
                self.octets -= wish.octets
            try:
                wish.done(wish.result or outcome.Value(None))
            except Exception as exc:  # noqa: BLE001 - a bug of one who waits is not to cost the others
                self._report_bug(exc)
