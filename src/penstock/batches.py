"""A thread that works on batches: on everything that came since it last looked, together.

So a single job is begun at once, and under load a batch is what came in while the one before was worked on: there is no
timer, nothing to tune, no added latency. The spool makes one transaction of a batch, a Maildir delivery syncs its
files together.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

import trio

Job = TypeVar("Job")
Result = TypeVar("Result")


class BatchThread(Generic[Job, Result]):
    """Works on jobs in a thread of its own, and answers them in the trio thread, from which it is called."""

    def __init__(
        self,
        name: str,
        work: Callable[[list[Job]], Sequence[Result]],
        answer: Callable[[list[Job], Sequence[Result]], None],
        size_of: Callable[[Job], int],
        *,
        most: int,
        most_octets: int,
        rest: Callable[[], None] | None = None,
    ) -> None:
        """A batch has at most `most` jobs, and only its last one may exceed `most_octets`.

        `work` gets a batch in the thread; then `answer` gets it, with what `work` has returned, in the trio thread.
        Neither may raise. `rest` is called in the thread whenever a batch has been worked on.
        """
        self._name = name
        self._work = work
        self._answer = answer
        self._size_of = size_of
        self._most = most
        self._most_octets = most_octets  # it bounds how long the first job of a batch waits for the others
        self._rest = rest
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._token: trio.lowlevel.TrioToken
        self._thread: threading.Thread | None = None
        self._over = trio.Event()
        self.is_closed = False
        """Takes no more jobs."""
        self._begun = math.inf
        """When the current batch was begun; infinity while the thread waits. Written by the thread."""

    @property
    def busy_for(self) -> float:
        """Seconds for which the thread has worked on its current batch; 0 while it waits for jobs."""
        return max(0.0, time.monotonic() - self._begun)

    def put(self, job: Job) -> None:
        """Have a job done. Raise trio.ClosedResourceError after `aclose`, RuntimeError if there is no thread."""
        if self.is_closed:
            raise trio.ClosedResourceError("this thread was closed")
        if self._thread is None:
            self._token = trio.lowlevel.current_trio_token()
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        self._jobs.put(job)

    async def aclose(self) -> None:
        """Do all jobs that were put, then end the thread. Cannot be cancelled."""
        self.is_closed = True
        if self._thread is not None:
            self._jobs.put(None)
            with trio.CancelScope(shield=True):
                await self._over.wait()

    # ---- the thread

    def _run(self) -> None:
        is_last = False
        while not is_last:
            batch, is_last = self._next_batch()
            if batch:
                self._begun = time.monotonic()
                results = self._work(batch)
                self._begun = math.inf
                with suppress(trio.RunFinishedError):  # the loop has crashed, and no task waits any more
                    self._token.run_sync_soon(self._answer, batch, results)
                if self._rest is not None:
                    self._rest()
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._over.set)

    def _next_batch(self) -> tuple[list[Job], bool]:
        """Wait for a job; return it with those that are already there, and whether it was the last batch."""
        batch: list[Job] = []
        octets = self._most_octets
        job = self._jobs.get()
        while job is not None:
            batch.append(job)
            octets -= self._size_of(job)
            if len(batch) >= self._most or octets <= 0 or self._jobs.empty():
                break
            job = self._jobs.get_nowait()
        return batch, job is None
