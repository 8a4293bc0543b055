"""Which node relays which partition.

A lease is a record of the bucket NAME-lease that the servers delete when it is as old as a lease. Its owner writes it
again every third of that time, sooner after a failure, on the condition that its own record is the last one; others can
write it only when it is gone. An owner that could not renew a lease for two thirds of its time stops beginning
attempts, by its own monotonic clock: before another node can have it. So two nodes do not relay a partition at the same
time, except for attempts that were under way, and when a process is suspended within one.

Nodes aim at equal shares. One that has too many gives some up, after its attempts have ended, and one that has too few
takes those that are free.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Final, TypeVar

import msgspec
import trio

from penstock.cluster.control import Control, read_control
from penstock.cluster.jetstream import ApiError, JetStream, acknowledged
from penstock.cluster.layout import WRONG_LAST_SEQUENCE, Layout
from penstock.net.nats import Message, NatsError, Request
from penstock.net.natswire import parse_headers

_BALANCE_AGAIN: Final = 1.0
"""Seconds until a node tries again to take partitions when it could not, with leases of three seconds or more."""
_RETRIES_PER_LEASE: Final = 15
"""A failed write is repeated after 1/15 of the lease time."""
_TIMEOUT: Final = 2.0
"""Seconds to wait for an answer; at most a third of a lease for the answer to its renewal."""
_encode = msgspec.json.encode


class Lease(msgspec.Struct, frozen=True):
    """Which node has a partition; none if the name is empty."""

    node: str = ""
    sequence: int = 0
    """Of the record."""
    process: str = ""
    """Another one with the same name is another owner."""


class NodeState(msgspec.Struct, frozen=True):
    """What a living node says about itself."""

    version: str = ""
    is_draining: bool = False
    spooled: int = 0
    """Messages in its local spool."""


async def _read_all(jetstream: JetStream, bucket: str, keys: Sequence[str]) -> list[Message | None]:
    """Return the last record of each key, as a server knows it; None for a key without one. Raise NatsError."""
    subject = f"$JS.API.DIRECT.GET.KV_{bucket}.$KV.{bucket}"
    answers = await jetstream.client.request_many([Request(f"{subject}.{key}") for key in keys], timeout=_TIMEOUT)
    found: list[Message | None] = []
    for answer in answers:
        if isinstance(answer, NatsError):
            raise answer
        found.append(None if answer.status else answer)
    return found


async def read_leases(jetstream: JetStream, layout: Layout) -> dict[int, Lease]:
    """Return the lease of each partition that has a record. Raise NatsError."""
    found: dict[int, Lease] = {}
    records = await _read_all(jetstream, layout.leases, [str(number) for number in range(layout.partitions)])
    for partition, record in enumerate(records):
        if record is not None:
            lease = _decode(record.data, Lease, Lease())
            sequence = int(parse_headers(record.headers).get("Nats-Sequence", "0"))
            found[partition] = Lease(lease.node, sequence, lease.process)
    return found


async def read_nodes(jetstream: JetStream, layout: Layout) -> dict[str, NodeState]:
    """Return the living nodes. Raise NatsError."""
    bucket = layout.nodes
    names = [name.rpartition(".")[2] for name in await jetstream.subjects(f"KV_{bucket}", f"$KV.{bucket}.>")]
    records = await _read_all(jetstream, bucket, names)
    return {
        name: _decode(record.data, NodeState, NodeState())
        for name, record in zip(names, records, strict=True)
        if record is not None and record.data  # it is empty when the node has ended
    }


T = TypeVar("T")


def _decode(data: bytes, kind: type[T], default: T) -> T:
    """Return a record; the default for one that another version has written."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError):
        return default


class _Held:
    """A lease that this node has."""

    __slots__ = ("is_leaving", "sequence", "until")

    def __init__(self, sequence: int, until: float) -> None:
        self.sequence = sequence
        self.until = until
        """When attempts must not begin any more, by the clock of trio."""
        self.is_leaving = False


class LeaseKeeper:
    """Gets, renews and gives up the leases of a node. Callbacks are called in the trio thread and must not block."""

    def __init__(self, jetstream: JetStream, layout: Layout, *, node: str, version: str, lease: float) -> None:
        self.on_gain: Callable[[int], None] = _ignore
        """Gets a partition that this node relays from now on."""
        self.on_lose: Callable[[int], None] = _ignore
        """Gets a partition that others may relay now."""
        self.on_leave: Callable[[int], None] = _ignore
        """Gets a partition that is to be given up: `release` it when nothing of it is under way."""
        self.on_control: Callable[[Control], None] = _ignore_control
        """Gets what operators have requested of all nodes, before any partition is gained and whenever it changes."""
        self.report: Callable[[Exception], None] = _ignore_error
        """Gets why leases cannot be written or read, once for as long as it lasts."""
        self.node = node
        self.takeovers = 0
        """Leases that another node had before."""
        self.is_draining = False
        """The node gives up what it has and takes nothing."""
        self.spooled: Callable[[], int] = lambda: 0
        """Returns how many messages the local spool has."""
        self._jetstream = jetstream
        self._layout = layout
        self._version = version
        self._lease = lease
        self._timeout = min(_TIMEOUT, lease / 3)
        self._process = os.urandom(8).hex()
        self._control: Control | None = None
        self._held: dict[int, _Held] = {}
        self._last: dict[int, tuple[str, float]] = {}
        """Which other node had a partition when that was looked at last, and when that was."""
        self._wake = trio.Event()

    @property
    def held(self) -> list[int]:
        """The partitions that this node has and does not give up."""
        return [partition for partition, each in self._held.items() if not each.is_leaving]

    async def run(self) -> None:
        """Keep the leases until cancelled; then call `release_all`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._expire)
            nursery.start_soon(self._keep_renewing)
            is_failing = False
            while True:
                try:
                    await self._balance()
                except Exception as exc:  # noqa: BLE001 - the cluster may work later
                    if not is_failing:
                        self.report(exc)
                    is_failing = True
                else:
                    is_failing = False
                pause = self._lease / 3
                with trio.move_on_after(min(pause, _BALANCE_AGAIN) if is_failing else pause):
                    await self._wake.wait()
                self._wake = trio.Event()

    async def _keep_renewing(self) -> None:
        """Renew what this node has, however long it takes to balance; soon again what could not be renewed."""
        is_failing = False
        begun = trio.current_time()
        while True:
            await trio.sleep_until(begun + self._lease / (_RETRIES_PER_LEASE if is_failing else 3))
            begun = trio.current_time()
            failure: Exception | None
            try:
                failure = await self._rewrite(list(self._held), self.node)
            except Exception as exc:  # noqa: BLE001 - the cluster may work later
                failure = exc
            if failure is not None and not is_failing:
                self.report(failure)
            is_failing = failure is not None

    def wake(self) -> None:
        """Balance now."""
        self._wake.set()

    async def _expire(self) -> None:
        """Lose what could not be renewed."""
        while True:
            now = trio.current_time()
            for partition in [partition for partition, each in self._held.items() if each.until <= now]:
                self._lose(partition)
            # What is gained meanwhile may end before what is held now: look from time to time.
            await trio.sleep(min([self._lease / 10, *(each.until - now for each in self._held.values())]))

    def _lose(self, partition: int) -> None:
        del self._held[partition]
        self.on_lose(partition)

    async def _balance(self) -> None:
        """Take partitions, or give some up. Raise NatsError.

        It is not cancelled when it takes long: a lease that was written meanwhile would be of no use until it ends.
        """
        await self._read_control()
        await self._announce()
        nodes = await read_nodes(self._jetstream, self._layout)
        nodes[self.node] = NodeState(self._version, self.is_draining)
        working = sum(not state.is_draining for state in nodes.values())
        share = 0 if self.is_draining else -(-self._layout.partitions // max(1, working))
        held = self.held
        if len(held) > share:
            for partition in held[share:]:
                self._held[partition].is_leaving = True
                self.on_leave(partition)
        elif len(held) < share:
            await self._claim(share - len(held), nodes)

    async def _read_control(self) -> None:
        """Read what operators want. Nothing is relayed before that is known once."""
        control = await read_control(self._jetstream, self._layout)
        if control != self._control:
            self._control = control
            self.is_draining = self.node in control.draining
            self.on_control(control)

    async def _announce(self) -> None:
        state = NodeState(self._version, self.is_draining, self.spooled())
        await self._jetstream.publish(f"$KV.{self._layout.nodes}.{self.node}", _encode(state), b"", timeout=_TIMEOUT)

    def _subject(self, partition: int) -> str:
        return f"$KV.{self._layout.leases}.{partition}"

    def _record(self, partition: int, last: int, node: str) -> Request:
        headers = b"NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: %d\r\n\r\n" % last
        return Request(self._subject(partition), _encode(Lease(node, process=self._process)), headers)

    async def _write(self, wanted: Sequence[tuple[int, int]], node: str) -> dict[int, int | NatsError]:
        """Write the records of partitions that follow records with these sequences. Return sequences or errors."""
        requests = [self._record(partition, last, node) for partition, last in wanted]
        answers = await self._jetstream.client.request_many(requests, timeout=self._timeout)
        results: dict[int, int | NatsError] = {}
        for (partition, _), answer in zip(wanted, answers, strict=True):
            try:
                if isinstance(answer, NatsError):
                    raise answer
                results[partition] = acknowledged(answer, self._subject(partition))
            except NatsError as exc:
                results[partition] = exc
        return results

    async def _rewrite(self, partitions: Sequence[int], node: str) -> NatsError | None:
        """Renew leases that this node has; with an empty `node`, let others have them.

        Return why something could not be written. Raise NatsError.
        """
        failure: NatsError | None = None
        wanted = [(partition, self._held[partition]) for partition in partitions if partition in self._held]
        while wanted:
            begun = trio.current_time()
            results = await self._write([(partition, each.sequence) for partition, each in wanted], node)
            refused = []
            for partition, held in wanted:
                result = results[partition]
                if self._held.get(partition) is not held:
                    continue  # it has expired meanwhile
                if isinstance(result, NatsError):
                    if _is_refused(result):
                        refused.append((partition, held))
                    else:
                        failure = result
                elif node:
                    held.sequence, held.until = result, begun + self._lease * 2 / 3
                else:
                    del self._held[partition]
            wanted = [each for each in refused if await self._is_ours(*each)]
        return failure

    async def _is_ours(self, partition: int, held: _Held) -> bool:
        """Find out why a record was refused: our own last one was written, or the lease is gone."""
        found = await self._jetstream.last(f"KV_{self._layout.leases}", self._subject(partition), timeout=self._timeout)
        if self._held.get(partition) is not held:
            return False
        if found is not None and self._has_written(_decode(found.data, Lease, Lease())):
            held.sequence = found.sequence
            return True
        self._lose(partition)
        return False

    def _has_written(self, lease: Lease) -> bool:
        """Return whether this process has written a lease."""
        return (lease.node, lease.process) == (self.node, self._process)

    async def _claim(self, count: int, nodes: Collection[str]) -> None:
        leases = await read_leases(self._jetstream, self._layout)
        now = trio.current_time()
        free = []
        for partition in range(self._layout.partitions):
            lease = leases.get(partition)
            if partition in self._held:
                continue
            # A lease of this process that it does not hold: its acknowledgment was lost, or it could not be renewed.
            if lease is not None and lease.node and not self._has_written(lease):
                self._last[partition] = (lease.node, now)
                continue
            # Without a leader no node could renew. The last owner knows what it has relayed: it may take it first.
            owner, seen = self._last.get(partition, ("", 0.0))
            if lease is None and owner != self.node and owner in nodes and now - seen < 2 * self._lease:
                continue
            free.append(partition)
        chosen = random.sample(free, min(count, len(free)))
        begun = trio.current_time()
        results = await self._write([(each, leases.get(each, Lease()).sequence) for each in chosen], self.node)
        failure: NatsError | None = None
        for partition, result in results.items():
            if isinstance(result, NatsError):
                failure = failure if _is_refused(result) else result  # it is refused if another node was faster
            else:
                self._held[partition] = _Held(result, begun + self._lease * 2 / 3)
                owner, _ = self._last.pop(partition, ("", 0.0))
                self.takeovers += owner not in ("", self.node)
                self.on_gain(partition)
        if failure is not None:
            raise failure

    async def release(self, partition: int) -> None:
        """Let others have a partition now: nothing of it is under way here. It is renewed until that is written.

        Nothing is done unless it is to be given up: its lease may have been lost and gained again meanwhile.
        """
        held = self._held.get(partition)
        if held is None or not held.is_leaving:
            return
        while self._held.get(partition) is held:
            try:
                failure = await self._rewrite([partition], "")
            except NatsError as exc:
                failure = exc
            if failure is not None:
                await trio.sleep(self._lease / _RETRIES_PER_LEASE)

    async def release_all(self) -> None:
        """Let others have everything now, and tell them that this node ends. What cannot be written expires."""
        with suppress(NatsError):
            await self._rewrite(list(self._held), "")
        with suppress(NatsError):
            await self._jetstream.publish(f"$KV.{self._layout.nodes}.{self.node}", b"", b"", timeout=_TIMEOUT)


def _is_refused(error: NatsError) -> bool:
    """Return whether a record was not written because the last one is another."""
    return isinstance(error, ApiError) and error.number == WRONG_LAST_SEQUENCE


def _ignore(_: int) -> None:
    """Without a queue."""


def _ignore_control(_: Control) -> None:
    """Without a queue."""


def _ignore_error(_: Exception) -> None:
    """Without a journal."""
