"""A node of the cluster: the connection, the leases, the queue and the forwarder, started and stopped together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from penstock.cluster.admin import AdminService
from penstock.cluster.durability import Durability
from penstock.cluster.forwarder import Forwarder
from penstock.cluster.jetstream import JetStream
from penstock.cluster.leases import LeaseKeeper
from penstock.cluster.queue import ReplicatedQueue
from penstock.cluster.settings import JetStreamSettings
from penstock.cluster.setup import make_client, make_layout
from penstock.cluster.writer import UnavailableError, Writer
from penstock.journal import Journal
from penstock.message import Message, Recipient
from penstock.spool.entry import Entry
from penstock.spool.spool import Spool, SpoolSettings

_FORWARDING: Final = 10.0
"""Seconds to wait for the cluster to take a message of the local spool."""


class Node:
    """Runs beside the relay, whose queue is `queue`. `spool` has what the cluster could not take."""

    def __init__(
        self, settings: JetStreamSettings, spool: Spool, *, data_dir: Path, index: str, version: str, journal: Journal
    ) -> None:
        """`index` is the name of the folder of the index. Reads files. Raise OSError or ValueError."""
        self.settings = settings
        self.spool = spool
        self._journal = journal
        self._client = make_client(settings, data_dir)
        self._client.on_change = self._note_change
        self._durability = Durability(settings.monitors, is_trusted=settings.trust_durability)
        layout = self._layout = make_layout(settings)
        jetstream = JetStream(self._client)
        # Worker processes are nodes of their own.
        name = settings.node_name + index.removeprefix("index")
        self.queue = ReplicatedQueue(
            jetstream,
            layout,
            Writer(jetstream, layout),
            folder=data_dir / index,
            settings=SpoolSettings(),
            node=name,
            journal=journal,
            patience=settings.patience,
            interval=min(3.0, settings.lease / 3),
        )
        self.keeper = LeaseKeeper(jetstream, layout, node=name, version=version, lease=settings.lease)
        self.keeper.on_gain, self.keeper.on_lose = self.queue.gain, self.queue.lose
        self.keeper.on_leave = self.queue.leave
        self.keeper.report = self._report
        self.forwarder = Forwarder(spool, self, journal)
        self._admin = AdminService(self._client, layout.operations(name), data_dir / index, journal, self._drain)
        self.count: Callable[[str, int], None] = _ignore
        """Gets the names of counters, and how much is added to them."""
        self.measure: Callable[[str, float], None] = _ignore
        """Gets the names of gauges, and their values."""
        self._complaint = ""
        self._is_lost = False

    def attach(
        self,
        domain_of: Callable[[Recipient], str],
        withdraw: Callable[[Sequence[int]], Sequence[Entry]],
    ) -> None:
        """Connect the queue to the relay."""
        self.queue.domain_of = domain_of
        self.queue.withdraw = lambda rows: withdraw(list(rows))

    def spool_queue(self, partition: int) -> str:
        """Return the queue of the local spool for messages of a partition."""
        return self._layout.spool_queue(partition)

    @property
    def is_full(self) -> bool:
        """The stream has no space for mail."""
        return self.queue.is_full

    @property
    def problem(self) -> str:
        """Why no mail may be given to the cluster; "" if it may."""
        return self._durability.problem

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run for the length of an `async with`, in which the queue is started and closed.

        Raise DurabilityError if a server does not sync, OSError, sqlite3.Error or SpoolError for the local spool.
        """
        await self._durability.look()
        await self.spool.start()
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._client.run)
                nursery.start_soon(self._durability.run)
                try:
                    yield
                finally:
                    with trio.CancelScope(shield=True), trio.move_on_after(self.settings.lease):
                        await self.keeper.release_all()
                    nursery.cancel_scope.cancel()
        finally:
            await self.spool.aclose()

    async def serve(self) -> None:
        """Keep leases, follow the stream and forward, until cancelled. The queue is open."""
        async with trio.open_nursery() as nursery:

            def release(partition: int) -> None:
                nursery.start_soon(self.keeper.release, partition)

            self.queue.released = release
            nursery.start_soon(self.queue.run)
            nursery.start_soon(self.keeper.run)
            nursery.start_soon(self.forwarder.run)
            nursery.start_soon(self._admin.run)
            nursery.start_soon(self._keep_counting)

    async def _keep_counting(self) -> None:
        """Report what has been counted, once a second."""
        forwarded = damaged = 0
        while True:
            self.measure("cluster_partitions", len(self.queue.owned))
            now = self.forwarder.forwarded, self.queue.damaged
            for name, added in (
                ("cluster_forwarded_total", now[0] - forwarded),
                ("cluster_damaged_total", now[1] - damaged),
            ):
                if added:
                    self.count(name, added)
            forwarded, damaged = now
            await trio.sleep(1)

    def _drain(self, is_draining: bool) -> None:
        self.keeper.is_draining = is_draining
        self.keeper.wake()

    async def forward(self, message: Message, queue: str) -> None:
        """Put a message of the local spool into the stream (penstock.cluster.forwarder.Target)."""
        if self.problem:
            raise UnavailableError(self.problem)
        partition = self._layout.spooled_partition(queue, message.id)
        await self.queue.forward(message, partition, patience=_FORWARDING)

    def _note_change(self, server: str, reason: str) -> None:
        if server:
            self._is_lost = bool(reason)
        elif self._is_lost:
            return  # said already
        else:
            self._is_lost = True
        self._journal.cluster(server, reason)

    def _report(self, exc: Exception) -> None:
        if str(exc) != self._complaint:
            self._complaint = str(exc)
            self._journal.error(0, "leases", exc)


def _ignore(_name: str, _value: float) -> None:
    """Without metrics."""
