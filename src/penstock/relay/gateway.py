"""The gateway: spool, scheduler, ledger and pool, started in their order and stopped in the other one."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import trio

from penstock.journal import Journal
from penstock.message import Message
from penstock.relay.ledger import Ledger
from penstock.relay.pool import Pool
from penstock.relay.scheduler import Scheduler
from penstock.reply import Reply
from penstock.spool.diskspace import Room
from penstock.spool.spool import Spool


class Mailboxes(Protocol):
    """Delivery on this machine, with its own start and end."""

    async def start(self) -> None:
        """Open what it needs. Raise OSError."""

    async def deliver(self, message: Message) -> Reply:
        """Deliver to all recipients, or to none of them."""

    async def aclose(self) -> None:
        """Give everything back."""


class Gateway:
    """Runs all that stands behind a SpoolDelivery."""

    def __init__(
        self,
        *,
        spool: Spool,
        room: Room,
        pool: Pool,
        ledger: Ledger,
        scheduler: Scheduler,
        local: Mailboxes,
        journal: Journal,
        grace: float,
    ) -> None:
        """`grace` is the seconds that transactions with next hops have to end when the gateway stops."""
        self.spool = spool
        self.scheduler = scheduler
        self.pool = pool
        self._room = room
        self._ledger = ledger
        self._local = local
        self._journal = journal
        self._grace = grace
        self.over = trio.Event()
        """`run` has come to its end."""
        self._stop_wanted = trio.Event()
        self._work = trio.CancelScope()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open the spool and relay until `stop`.

        Raise OSError, sqlite3.Error or SpoolError when the spool can not be opened. What is said by the clients must
        have come to its end before `stop`: the spool is closed then.
        """
        self.spool.report_bug = partial(self._journal.error, 0, "spool")
        recovered = await self.spool.start()
        try:
            self._journal.recovered(*recovered)
            await self._local.start()
            with self._work:
                await self._relay(task_status)
        finally:
            self.scheduler.close()
            with trio.CancelScope(shield=True):
                await self._ledger.flush()
                await self.spool.aclose()
                await self._local.aclose()
            self.over.set()

    async def _relay(self, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._room.keep_looking)
            await nursery.start(self._ledger.run)
            await nursery.start(self.pool.run)
            await nursery.start(self.scheduler.run)
            task_status.started()
            await self._stop_wanted.wait()
            self.scheduler.stop()
            await self.pool.aclose(self._grace)
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """Begin no more transactions; let those under way end within the grace, then end."""
        self._stop_wanted.set()

    def abort(self) -> None:
        """End now. Transactions under way are cut, and made again after the next start."""
        self._stop_wanted.set()
        self._work.cancel()
