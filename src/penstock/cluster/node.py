"""A node of the cluster: the connection, the leases, the queue and the forwarder, started and stopped together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import trio

from penstock.cluster.admin import AdminService
from penstock.cluster.control import Control
from penstock.cluster.durability import Durability
from penstock.cluster.exchange import Exchange
from penstock.cluster.forwarder import Forwarder
from penstock.cluster.jetstream import JetStream
from penstock.cluster.leases import LeaseKeeper
from penstock.cluster.queue import ReplicatedQueue
from penstock.cluster.settings import JetStreamSettings
from penstock.cluster.setup import make_client, make_layout
from penstock.cluster.state import RunningState, SharedState
from penstock.cluster.writer import UnavailableError, Writer
from penstock.journal import Journal
from penstock.message import Message, Recipient
from penstock.net.nats import DisconnectedError
from penstock.spool.entry import Entry
from penstock.spool.spool import Spool, SpoolSettings

_LOOK: Final = 5.0
"""Seconds between two looks at the local spool."""
_FORWARDING: Final = 10.0
"""Seconds to wait for the cluster to take a message of the local spool."""
_ENDING: Final = 4.0
"""Seconds to write how the last attempts have ended, if leases last that long: they are not renewed any more."""
_RELEASING: Final = 2.0
"""Seconds to let others have the partitions; otherwise they wait until the leases end."""


class Throttle(Protocol):
    """Counts failed passwords (penstock.auth.throttle)."""

    on_change: Callable[[int, str, int, float], None]

    def learn(self, kind: int, key: str, more: int, *, is_first: bool = False) -> None:
        """Count those of another node; with `is_first` in the place of all that were learned before."""


class Recipients(Protocol):
    """Asks next hops about recipients (penstock.policy.recipients)."""

    on_answer: Callable[[str, float, str | None], None]

    def learn(self, key: str, seconds: float, cause: str | None) -> None:
        """Take over an answer that another node got."""


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
        self._writer = Writer(jetstream, layout)
        # Worker processes are nodes of their own.
        name = settings.node_name + index.removeprefix("index")
        self.queue = ReplicatedQueue(
            jetstream,
            layout,
            self._writer,
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
        self.keeper.on_control = self._obey
        self.keeper.spooled = lambda: self._spooled
        self.keeper.report = partial(journal.error, 0, "leases")
        self.forwarder = Forwarder(spool, self, journal)
        self._admin = AdminService(self._client, layout.operations(name), data_dir / index, journal, self.queue.settle)
        self._is_first = index == "index"
        """This is the only worker of the server, or its first one, which counts what others have found."""
        self.exchange = Exchange(jetstream, layout, node=name, machine=settings.node_name, report=self._report_exchange)
        self.count: Callable[[str, int], None] = _ignore
        """Gets the names of counters, and how much is added to them."""
        self.measure: Callable[[str, float], None] = _ignore
        """Gets the names of gauges, and their values."""
        self.in_flight: Callable[[], int] = int
        """Returns how many messages wait for the cluster."""
        self._exchange_complaint = ""
        self._is_lost = False
        self._spooled = 0
        """Messages in the local spool when that was looked at last."""

    def attach(
        self,
        domain_of: Callable[[Recipient], str],
        withdraw: Callable[[Sequence[int]], Sequence[Entry]],
        suspend: Callable[[frozenset[str]], None],
    ) -> None:
        """Connect the queue to the relay."""
        self.queue.suspend = suspend
        self.queue.domain_of = domain_of
        self.queue.withdraw = lambda rows: withdraw(list(rows))

    def share(self, state: RunningState) -> SharedState:
        """Return a state of checks with what other nodes have found."""
        return SharedState(state, self.exchange, learns=self._is_first)

    def share_failures(self, throttle: Throttle, *, is_shared: bool) -> None:
        """Count failed passwords of all nodes together. With `is_shared` all workers of the server have one count."""
        throttle.on_change = self.exchange.note_failures
        if self._is_first or not is_shared:
            self.exchange.on_failures = throttle.learn

    def share_recipients(self, recipients: Recipients | None) -> None:
        """Use what other nodes have asked about recipients, in the place of those before; None: use it no more."""
        self.exchange.on_recipient = _ignore_answer if recipients is None else recipients.learn
        if recipients is not None:
            recipients.on_answer = self.exchange.note_recipient

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
                    with trio.CancelScope(shield=True), trio.move_on_after(_RELEASING):
                        await self.keeper.release_all()
                    nursery.cancel_scope.cancel()
        finally:
            await self.spool.aclose()

    async def serve(self) -> None:
        """Keep leases, follow the stream and forward, until cancelled. The queue is open."""
        try:
            async with trio.open_nursery() as nursery:

                def release(partition: int) -> None:
                    nursery.start_soon(self.keeper.release, partition)

                self.queue.released = release
                nursery.start_soon(self.queue.run)
                nursery.start_soon(self.keeper.run)
                nursery.start_soon(self.forwarder.run)
                nursery.start_soon(self._admin.run)
                nursery.start_soon(self._keep_listening)
                nursery.start_soon(self.exchange.run)
                nursery.start_soon(self._keep_counting)
                nursery.start_soon(self._keep_looking)
        finally:
            self.queue.end(min(_ENDING, self.settings.lease / 2))

    async def _keep_counting(self) -> None:
        """Report what has been counted, once a second."""
        before: dict[str, int] = {}
        while True:
            self.measure("jetstream_connected", self._client.is_connected)
            self.measure("jetstream_in_flight", self.in_flight())
            self.measure("jetstream_leases", len(self.queue.owned))
            totals = {
                "jetstream_forwarded_total": self.forwarder.forwarded,
                "jetstream_damaged_total": self.queue.damaged,
                "jetstream_resent_total": self._writer.resent,
                "jetstream_takeovers_total": self.keeper.takeovers,
            }
            for name, total in totals.items():
                self.count(name, total - before.get(name, 0))
            before = totals
            await trio.sleep(1)

    async def _keep_looking(self) -> None:
        """Look from time to time how many messages the local spool has, for operators."""
        is_failing = False
        while True:
            try:
                self._spooled = await self.spool.count()
            except Exception as exc:  # noqa: BLE001 - the disk may work later
                if not is_failing:
                    self._journal.error(0, "spool", exc)
                is_failing = True
            else:
                is_failing = False
            await trio.sleep(_LOOK)

    async def _keep_listening(self) -> None:
        """Read again what operators want when they have changed it."""
        async with self._client.subscribed(self._layout.control_changed, limit=10) as changes:
            while True:
                await changes.receive_all()
                self.keeper.wake()

    def _obey(self, control: Control) -> None:
        self.queue.set_suspended(control.suspended)

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

    def _report_exchange(self, exc: Exception) -> None:
        """Journal why nothing is exchanged, once for as long as it lasts. A lost connection is known already."""
        if type(exc).__name__ != self._exchange_complaint and not isinstance(exc, DisconnectedError):
            self._exchange_complaint = type(exc).__name__
            self._journal.error(0, "exchange", exc)


def _ignore_answer(_key: str, _seconds: float, _cause: str | None) -> None:
    """Without recipient verification."""


def _ignore(_name: str, _value: float) -> None:
    """Without metrics."""
