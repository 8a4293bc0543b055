"""The gateway: spool, scheduler, recorder and pool, started in this order and stopped in reverse."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from typing import Protocol

import msgspec
import outcome
import trio

from penstock.journal import Journal
from penstock.message import Message
from penstock.relay.operators import Operators
from penstock.relay.pool import Pool
from penstock.relay.recorder import AttemptRecorder
from penstock.relay.scheduler import RelaySettings, Scheduler
from penstock.reply import Reply
from penstock.spool.diskspace import DiskSpace
from penstock.spool.queue import DurableQueue


class LocalDelivery(Protocol):
    """Delivery on this machine."""

    async def start(self) -> None:
        """Open what it needs. Raise OSError."""

    def deliver_later(self, message: Message, done: Callable[[outcome.Outcome[Reply]], None]) -> None:
        """Deliver to all recipients, or to none of them, then call `done` in the trio thread."""

    async def aclose(self) -> None:
        """Finish deliveries in progress, and release everything."""


class Gateway:
    """Runs the spool and the relay."""

    def __init__(
        self,
        *,
        spool: DurableQueue,
        disk_space: DiskSpace,
        pool: Pool,
        recorder: AttemptRecorder,
        scheduler: Scheduler,
        local: LocalDelivery,
        journal: Journal,
        grace: float,
        services: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
        beside: Sequence[Callable[[], Awaitable[None]]] = (),
    ) -> None:
        """`grace` is how many seconds transactions with next hops have to end when the gateway stops.

        The spool is opened and closed within `services`; all of `beside` run as long as the relay.
        """
        self._services = services
        self._beside = beside
        self.spool = spool
        self.scheduler = scheduler
        self.pool = pool
        self._disk_space = disk_space
        self._recorder = recorder
        self._local = local
        self._journal = journal
        self._grace = grace
        self.over = trio.Event()
        """`run` has ended."""
        self._is_stopping = trio.Event()
        self._work = trio.CancelScope()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open the spool and relay until `stop`.

        Raise OSError, sqlite3.Error or SpoolError if the spool cannot be opened. All sessions must have ended before
        `stop`, as the spool is closed then.
        """
        async with self._services():
            await self._run(task_status)

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        self.spool.report_bug = partial(self._journal.error, 0, "spool")
        recovered = await self.spool.start()
        try:
            self._journal.recovered(*recovered)
            await self._local.start()
            with self._work:
                await self._relay(task_status)
        finally:
            with trio.CancelScope(shield=True):
                self.scheduler.stop()
                await self._local.aclose()  # what was delivered is recorded
                self.scheduler.close()
                await self._recorder.flush()
                await self.spool.aclose()
            self.over.set()

    async def _relay(self, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._disk_space.run)
            await nursery.start(self._recorder.run)
            await nursery.start(self.pool.run)
            await nursery.start(self.scheduler.run)
            nursery.start_soon(Operators(self.scheduler, self._recorder).run)
            for each in self._beside:
                nursery.start_soon(each)
            task_status.started()
            await self._is_stopping.wait()
            self.scheduler.stop()
            await self.pool.aclose(self._grace)
            nursery.cancel_scope.cancel()

    def use_settings(self, settings: RelaySettings, *, has_other_routes: bool) -> None:
        """Use other settings, and routes that were replaced, for all attempts that begin from now on."""
        self._recorder.backoff.use(settings.retry)
        self._recorder.reporter.use(settings.reports)
        self.pool.settings = msgspec.structs.replace(self.pool.settings, connections=settings.pool.connections)
        self.scheduler.use_settings(settings)
        if has_other_routes:
            self.scheduler.reroute()

    def stop(self) -> None:
        """Start no more transactions; those in progress may end within the grace period."""
        self._is_stopping.set()

    def abort(self) -> None:
        """End now. Transactions in progress are cut, and made again after the next start."""
        self.scheduler.stop()  # before anything that is cut is recorded: it is no attempt
        self._is_stopping.set()
        self._work.cancel()
