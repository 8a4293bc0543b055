"""The queue of the relay, in the cluster: the partitions that this node owns, with their index on the local disk.

A message is in the stream before it is in the index; how an attempt has ended is in the stream before it is in the
index. So the index may be lost at any time, and is rebuilt when a partition is taken over: what was under way is then
tried again, and everything else is as it was, due times included.

How a message comes into the index
----------------------------------
1. It was accepted here, into a partition that this node owns: at its acknowledgment.
2. Its partition is taken over (`_load`): the stream is read, up to a marker that this node writes first. What was
   acknowledged before the marker is before it in the stream. A server that lags may still show what others have
   deleted: what is not known to the leader is left out.
3. It was accepted by another node, or its acknowledgment was lost: `_follow` reads what has come since the last marker,
   unless this node has got acknowledgments of all of that.

A message of the kinds 2 and 3 may be published again by the node that waits for its acknowledgment, even when it was
relayed long since: for an hour a marker takes its place, and refuses that.
"""

from __future__ import annotations

import itertools
import shutil
import zlib
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

import trio
from crc32c import crc32c

from penstock.cluster.index import Change, IndexCommitter, IndexStore, Loaded, Planned, pack, unpack
from penstock.cluster.jetstream import PAGE, ApiError, JetStream, Stored, acknowledged, is_gone
from penstock.cluster.layout import (
    FULL,
    PIECES_WAIT,
    WRONG_LAST_SEQUENCE,
    Layout,
    LayoutError,
    Place,
    RecipientState,
    StoredMessage,
    has_state_in_payload,
    is_marker,
    read_envelope,
    read_message,
    read_received_at,
    read_state,
    state_record,
    tombstone_headers,
)
from penstock.cluster.writer import UnavailableError, Writer, Written
from penstock.files import open_private
from penstock.journal import Journal
from penstock.message import CountedBody, Envelope, Message, MessageId, Recipient
from penstock.net.nats import Message as NatsMessage
from penstock.net.nats import NatsError, Request
from penstock.spool.bodies import StoredBody
from penstock.spool.entry import DUE, HELD, AdminInput, AttemptRecord, Entry, Outcome, Put, Recovered
from penstock.spool.spool import Spool, SpoolSettings, without_duplicates

_TIMEOUT: Final = 5.0
_READS: Final = 3
"""Times that a damaged message is read from other servers, before it is read from the leader."""
_TRY_LATER: Final = 5.0
"""Seconds until a message is tried again that the cluster did not return."""
_REPORT_PATIENCE: Final = 5.0
_SCAN: Final = 30.0
"""Seconds to wait for something new in a stream until our marker is found."""
_RECORDING: Final = 10.0
"""Seconds for which the ends of attempts are written again and again while there is no leader..."""
_RECORD_PAUSE: Final = 0.2
"""...and the seconds in between."""
_GROUP: Final = 100_000
"""Messages of partitions that are read together. Twice as many are in memory, some hundred octets each."""
_SLICE: Final = 500
"""Messages added to the index in one transaction."""
_WRITES: Final = 2
"""Transactions that wait for the index at a time."""
_READ_AGAIN: Final = 600.0
"""Seconds between two looks at states that could not be read."""
_LEAVING_POLL: Final = 0.1
_DROP_AGAIN: Final = 1.0
"""Seconds until the index is written again when that failed."""
_SHORTEST_INTERVAL: Final = 0.1
_LONGEST_INTERVAL: Final = 15.0
"""Seconds between two looks at what others have accepted."""
_CONFLICTS: Final = 5
"""Times that a state is written again that others have changed."""
_LOADING, _ACTIVE = 1, 2


class DamagedError(Exception):
    """A message in the cluster differs from the one that was accepted."""


class _Ending:
    """The end of a node, which limits what must not be cancelled otherwise."""

    def __init__(self) -> None:
        self._at = float("inf")
        self._scopes: set[trio.CancelScope] = set()

    def begin(self, seconds: float) -> None:
        """Cancel what is shielded, and what will be, after this time."""
        self._at = trio.current_time() + seconds
        for scope in self._scopes:
            scope.deadline = self._at

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Shield what would be done twice if it was cancelled; the block is left early at the end of the node."""
        with trio.CancelScope(shield=True, deadline=self._at) as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.remove(scope)


class _Beside:
    """Does something beside what the caller does, some at a time."""

    def __init__(self, nursery: trio.Nursery, most: int) -> None:
        self.failures: list[Exception] = []
        """Why something has failed. Then start nothing more."""
        self._nursery = nursery
        self._slots = trio.Semaphore(most)

    @classmethod
    @asynccontextmanager
    async def opened(cls, most: int) -> AsyncIterator[_Beside]:
        """Do at most this many things at a time. Return when all are done, or raise the first failure as it is."""
        async with trio.open_nursery() as nursery:
            beside = cls(nursery, most)
            yield beside
        if beside.failures:
            raise beside.failures[0]

    async def start(self, act: Callable[[], Awaitable[None]]) -> None:
        """Begin something as soon as it may be."""
        await self._slots.acquire()
        self._nursery.start_soon(self._do, act)

    async def _do(self, act: Callable[[], Awaitable[None]]) -> None:
        try:
            await act()
        except Exception as exc:  # noqa: BLE001 - it is raised at the end
            self.failures.append(exc)
        finally:
            self._slots.release()


class ReplicatedQueue(Spool):
    """Messages of the partitions that this node owns (penstock.spool.queue.DurableQueue)."""

    def __init__(
        self,
        jetstream: JetStream,
        layout: Layout,
        writer: Writer,
        *,
        folder: Path,
        settings: SpoolSettings,
        node: str,
        journal: Journal,
        patience: float,
        interval: float,
    ) -> None:
        """`folder` is for the index. `patience`: see Writer; `interval`: seconds between two looks at the stream."""
        super().__init__(settings, folder, store=IndexStore(folder))
        self._committer = self._accepted = IndexCommitter(
            self._store, self._clock, self._report_bug, on_failure=self._not_indexed
        )
        self.domain_of: Callable[[Recipient], str] = _no_domain
        """Returns the domain whose queue a recipient waits in. Called in the thread of the index as well."""
        self.withdraw: Callable[[Collection[int]], Sequence[Entry]] = _withdraw_nothing
        """Takes recipients that only wait in memory from the relay."""
        self.released: Callable[[int], None] = _ignore
        """Gets a partition of which nothing is under way any more, after `leave`."""
        self.suspend: Callable[[frozenset[str]], None] = _ignore_names
        """Gets the domains and next hops to which nothing is to be sent."""
        self.suspended: frozenset[str] = frozenset()
        """What operators have suspended on all nodes."""
        self.is_full = False
        """The stream is so full that no mail is accepted."""
        self.damaged = 0
        """Messages that were found damaged."""
        self._jetstream = jetstream
        self._layout = layout
        self._writer = writer
        self._folder = folder
        self._node = node
        self._journal = journal
        self._patience = patience
        self._interval = interval
        self._owned: dict[int, int] = {}
        """The partitions that this node relays, and whether they are loaded."""
        self._active: list[int] | None = None
        """Those that are loaded; None if that has changed."""
        self._seen: dict[int, int] = {}
        """The sequence of the last marker by stream: what comes before it is in the index, or was left out."""
        self._known: defaultdict[int, set[int]] = defaultdict(set)  # what this node has written since then
        self._left_out: dict[int, set[str]] = {}
        """The ids of messages whose state could not be read when their partition was loaded."""
        self._pending: dict[str, bool] = {}
        """Messages that wait for their acknowledgment, and whether they were found in the stream meanwhile."""
        self._turn = 0
        self._writing = trio.Lock()
        """Of states: two at a time would be in each other's way."""
        self._wake = trio.Event()
        self._interrupted: set[int] = set()
        """Partitions that were given up since their load began: what was read of them may have been dropped again."""
        self._dropping: dict[int, bool] = {}
        """Partitions that are to be removed from the index, and whether `released` is to be called."""
        self._gone: dict[int, set[int]] = {}
        """Recipients of partitions that were taken from the relay, and that the index may still have."""
        self._drop_now = trio.Event()
        self._collections = itertools.count()  # numbers of files that pieces are written into
        self._complaint = ""
        self._ending = _Ending()

    @property
    def _index(self) -> IndexStore:
        assert isinstance(self._store, IndexStore)
        return self._store

    @property
    def owned(self) -> list[int]:
        """The partitions that are relayed here."""
        if self._active is None:
            self._active = [partition for partition, state in self._owned.items() if state == _ACTIVE]
        return self._active

    # ---- opening

    async def start(self) -> Recovered:
        """Begin with an empty index."""
        await trio.to_thread.run_sync(lambda: shutil.rmtree(self._folder, ignore_errors=True))
        return await super().start()

    async def run(self) -> None:
        """Load partitions, look for what others have accepted, and give partitions up, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._accepted.run)
            nursery.start_soon(self._keep_measuring)
            nursery.start_soon(self._keep_dropping, nursery)
            nursery.start_soon(self._keep_listening)
            nursery.start_soon(self._keep_reading_left_out)
            interval = self._interval
            while True:
                with trio.move_on_after(interval):
                    await self._wake.wait()
                self._wake = trio.Event()
                try:
                    await self._load()
                    # What this node has accepted itself is read in vain: without announcements, ever less often.
                    found = await self._follow()
                    interval = self._interval if found else min(2 * interval, _LONGEST_INTERVAL)
                except Exception as exc:  # noqa: BLE001 - the cluster or the disk may work later
                    self._complain(exc)
                else:
                    self._complaint = ""
                await trio.sleep(_SHORTEST_INTERVAL)

    async def _keep_listening(self) -> None:
        """Look when others have put something into our partitions."""
        subject = self._layout.announcement("*")
        async with self._jetstream.client.subscribed(subject, limit=100) as announcements:
            async for message in announcements:
                partition = message.subject.rpartition(".")[2]
                if partition.isdecimal() and int(partition) in self._owned:
                    self._wake.set()

    def _complain(self, exc: Exception) -> None:
        """Journal an error, once for as long as it lasts."""
        if str(exc) != self._complaint:
            self._complaint = str(exc)
            self._journal.error(0, "cluster", exc)

    async def _keep_measuring(self) -> None:
        """Look once a second how full the streams are."""
        while True:
            try:
                is_full = False
                for number in range(self._layout.streams):
                    info = await self._jetstream.api(f"STREAM.INFO.{self._layout.stream(number)}")
                    most = info["config"].get("max_bytes", 0)
                    is_full = is_full or (most > 0 and info["state"]["bytes"] >= most * FULL)
                self.is_full = is_full
            except ApiError as exc:
                self._complain(NatsError(f"{exc}; run penstock cluster init") if exc.is_not_found else exc)
            except NatsError:
                pass  # what cannot be reached is noticed where it is used
            except Exception as exc:  # noqa: BLE001 - an answer of another kind
                self._complain(exc)
            await trio.sleep(1)

    def end(self, seconds: float) -> None:
        """Wait for the cluster no longer than this from now on: the node ends. What is not written is tried again."""
        self._ending.begin(seconds)

    # ---- partitions

    def gain(self, partition: int) -> None:
        """Relay a partition from now on."""
        self._owned[partition] = _LOADING
        self._active = None
        self._wake.set()

    def set_suspended(self, names: Iterable[str]) -> None:
        """Send nothing to these domains and next hops from now on."""
        self.suspended = frozenset(names)
        self.suspend(self.suspended)

    async def admin_input(self) -> AdminInput:
        """Return what operators have asked for: of this node, and of all. See `Spool.admin_input`."""
        return (await super().admin_input())._replace(suspended=self.suspended)

    def lose(self, partition: int) -> None:
        """Begin no attempt of a partition any more: others may relay it."""
        self._give_up(partition, is_leaving=False)

    def leave(self, partition: int) -> None:
        """Begin no attempt of a partition any more, and call `released` when none is under way."""
        self._give_up(partition, is_leaving=True)

    def _give_up(self, partition: int, *, is_leaving: bool) -> None:
        self._owned.pop(partition, None)
        self._active = None
        self._interrupted.add(partition)
        self._dropping[partition] = is_leaving
        self._drop_now.set()

    async def _keep_dropping(self, nursery: trio.Nursery) -> None:
        while True:
            await self._drop_now.wait()
            self._drop_now = trio.Event()
            while self._dropping:
                partition = next(iter(self._dropping))
                try:
                    await self._drop(partition)
                except Exception as exc:  # noqa: BLE001 - the disk may work later
                    self._complain(exc)
                    await trio.sleep(_DROP_AGAIN)
                    continue
                is_leaving = self._dropping.pop(partition)
                if is_leaving and partition not in self._owned:
                    nursery.start_soon(self._leave, partition)
            self._wake.set()

    async def _drop(self, partition: int) -> None:
        """Remove a partition from the index and from the memory of the relay; what is in flight is not touched."""
        rows = set(await self._committer.do(lambda _: self._index.attempting(partition)))
        withdrawn = self.withdraw(rows)
        gone = self._gone.setdefault(partition, set())  # if the index cannot be written now, the next call does it
        gone.update(row.number for entry in withdrawn for row in entry.rows)
        for entry in withdrawn:
            entry.body.close()
        await self._forget(lambda: self._index.drop_partition(partition, gone))
        del self._gone[partition]

    async def _leave(self, partition: int) -> None:
        """Call `released` once nothing of a partition is in the index; its lease is renewed until then.

        Not if its lease was lost meanwhile and this node has got it again.
        """
        while True:
            try:
                count = await self._committer.do(lambda _: self._index.count(partition))
            except Exception as exc:  # noqa: BLE001 - the disk may work later
                self._complain(exc)
                await trio.sleep(_DROP_AGAIN)
                continue
            if partition in self._owned:
                return
            if not count:
                break
            await trio.sleep(_LEAVING_POLL)
        self.released(partition)

    def choose(self) -> int:
        """Return the partition for a new message: one of ours if there are any, in turn."""
        owned = self.owned or range(self._layout.partitions)
        self._turn += 1
        return owned[self._turn % len(owned)]

    # ---- in

    async def put(
        self, message: Message, queues: Sequence[str], *, is_taken: bool = False, is_held: bool = False
    ) -> list[Entry]:
        """Write a message into one of the partitions. See `put_into`."""
        assert not is_held, "the configuration refuses quarantine by hold"
        return await self.put_into(self.choose(), message, queues, is_taken=is_taken)

    async def put_into(
        self, partition: int, message: Message, queues: Sequence[str], *, is_taken: bool = False
    ) -> list[Entry]:
        """Write a message into a partition; return once a majority of the servers has synced it.

        With `is_taken` the entries to attempt are returned, if this node relays the partition. Raise UnavailableError,
        StreamFullError, NatsError or OSError.
        """
        if len(queues) > 1:
            message, queues = without_duplicates(message, queues)
        pending = self._pending
        pending[message.id] = False
        try:
            place, text, _ = await self._writer.write(message, partition, patience=self._patience)
        finally:
            was_found = pending.pop(message.id, False)
        if place is None or was_found:
            return []
        if self._owned.get(partition) != _ACTIVE:
            self._announce(partition)
            return []
        if place.is_uncertain or place.pieces:
            message = message._replace(received_at=self._clock())
            return await self._written(partition, message, queues, Written(place, text))
        return self._add_accepted(place, text, message, queues, is_taken=is_taken)

    def _announce(self, partition: int) -> None:
        """Announce new mail to the owner of a partition. If the announcement is lost, the owner finds it later."""
        with suppress(NatsError):
            self._jetstream.client.publish(self._layout.announcement(partition))

    def _add_accepted(
        self, place: Place, text: bytes, message: Message, queues: Sequence[str], *, is_taken: bool
    ) -> list[Entry]:
        """Write a message that was acknowledged just now into the index; return its entries if it is taken."""
        # With the time of its number in the index: the clock may have been set since the message was received.
        now = self._clock()
        put = self._indexed(message, place, queues, now, is_taken=is_taken)
        self._accepted.add(put)
        self._note_known(place.partition, place.sequence)
        if is_taken:
            message = message._replace(received_at=now)
            return self._entries(Put(put.number, message, text[len(message.prefix) :], queues, is_taken))
        self.became_due(queues)
        return []

    def _note_known(self, partition: int, sequence: int) -> None:
        """Note that `_follow` need not read this: it is in the index, or was, or is no message."""
        self._known[partition % self._layout.streams].add(sequence)

    async def settle(self) -> None:
        """Return once all that was accepted before is in the index. Raise OSError or sqlite3.Error."""
        await self._committer.do(lambda _: None)

    async def _write(self, partition: int, message: Message, patience: float) -> Written:
        """Write a message into the stream. What was found there meanwhile has no place: it is in the index."""
        self._pending[message.id] = False
        try:
            written = await self._writer.write(message, partition, patience=patience)
        finally:
            was_found = self._pending.pop(message.id, False)
        return written._replace(place=None) if was_found else written

    async def _written(self, partition: int, message: Message, queues: Sequence[str], written: Written) -> list[Entry]:
        """Write a message that is in the stream into the index, if its partition is relayed here."""
        place, text = written.place, written.text
        if place is None:
            return []
        if self._owned.get(partition) != _ACTIVE:
            self._announce(partition)
            return []
        if place.is_uncertain:
            try:
                put = self._indexed(message, place, queues, message.received_at)
                await self._add([Loaded(put, place, None)])
            except Exception as exc:  # noqa: BLE001 - the cluster has it: it is accepted
                self._load_again(partition, exc)
            self.became_due(queues)
            return []
        return self._add_accepted(place, text, message, queues, is_taken=False)

    async def forward(self, message: Message, partition: int, *, patience: float) -> None:
        """Put a message that was accepted before, unless it is in the stream already. Raise what `put` does."""
        written = await self._write(partition, message, patience)
        if written.place is not None:  # after a crash it may be in the spool still, and come again
            written = written._replace(place=written.place._replace(is_uncertain=True))
        envelope = message.envelope
        if written.found is not None:
            there = set(written.found.recipients)
            missing = tuple(each for each in envelope.recipients if each not in there)
            if missing:  # only some of its recipients were moved, and an operator has released the others
                name = MessageId(f"{message.id}-{zlib.crc32(repr(missing).encode()):08x}")
                rest = message._replace(id=name, envelope=envelope._replace(recipients=missing))
                await self.forward(rest, partition, patience=patience)
        queues = [self.domain_of(recipient) for recipient in envelope.recipients]
        await self._written(partition, message, queues, written)

    def _not_indexed(self, puts: Sequence[Put], error: Exception) -> None:
        """Read partitions again of which messages could not be written into the index."""
        for partition in {unpack(put.message.prefix).partition for put in puts}:
            self._load_again(partition, error)

    def _load_again(self, partition: int, error: Exception) -> None:
        """Read a partition again: something of it could not be written into the index."""
        self._journal.error(0, "index", error)
        self._reload(partition)

    def _reload(self, partition: int) -> None:
        """Remove a partition from the index and load it again, if it is loaded."""
        if self._owned.get(partition) == _ACTIVE:
            self.lose(partition)
            self.gain(partition)

    def _indexed(
        self, message: Message, place: Place, queues: Sequence[str], received_at: float, *, is_taken: bool = False
    ) -> Put:
        """Return a message as it is written into the index."""
        message = Message(message.id, message.envelope, pack(place), CountedBody(message.body.size), received_at)
        return Put(self._store.new_number(), message, None if place.pieces else b"", queues, is_taken)

    async def _add(self, loaded: Sequence[Loaded], *, restores: bool = False, is_new: bool = False) -> None:
        """Write messages into the index. See `IndexStore.load`."""
        for start in range(0, len(loaded), _SLICE):
            some, now = loaded[start : start + _SLICE], self._clock()
            await self._do(partial(self._index.load, some, now, restores=restores, is_new=is_new))

    async def _do(self, act: Callable[[], object]) -> None:
        """Do something with the index, in a transaction."""
        await self._committer.do(lambda _: act(), whole=True)

    async def _forget(self, act: Callable[[], Sequence[int]]) -> None:
        """Remove messages from the index, in a transaction, and the files of those that it returns."""
        for number in await self._committer.do(lambda _: act(), whole=True):
            self._threads.remove_later(number)

    # ---- what is in the stream

    async def _mark(self, stream: int) -> int:
        """Write our marker into a stream, and return its sequence."""
        sequence = await self._jetstream.publish(self._layout.marker(stream, self._node), b"", b"NATS/1.0\r\n\r\n")
        self._note_known(stream, sequence)
        return sequence

    async def _read(
        self, stream: int, subjects: Iterable[str], start: int, until: int
    ) -> AsyncGenerator[list[Stored], None]:
        """Yield what is in a stream from a sequence on, some at a time, up to the marker with the sequence `until`.

        Messages come in the order of the stream: one beyond the marker shows as well that all before it were seen.
        """
        marker = self._layout.marker(stream, self._node)
        scan = self._jetstream.scan(self._layout.stream(stream), [*subjects, marker], start=start)
        deadline = trio.current_time() + _SCAN
        async with aclosing(scan):
            async for batch in scan:
                if batch:
                    deadline = trio.current_time() + _SCAN
                elif trio.current_time() >= deadline:
                    break
                found = [stored for stored in batch if stored.subject != marker]
                if found:
                    yield found
                if any(stored.sequence >= until for stored in batch):
                    return
        raise NatsError(f"{marker} is not found: it was deleted, or the server lags")

    async def _load(self) -> None:
        """Load the partitions that this node has got."""
        loading = [
            partition
            for partition, state in self._owned.items()
            if state == _LOADING and partition not in self._dropping
        ]
        groups: list[tuple[int, Sequence[int]]] = []
        for stream in range(self._layout.streams):
            mine = [partition for partition in loading if partition % self._layout.streams == stream]
            if not mine:
                continue
            info = await self._jetstream.api(f"STREAM.INFO.{self._layout.stream(stream)}")
            share = info["state"].get("num_subjects", 0) * self._layout.streams / self._layout.partitions
            size = max(1, int(_GROUP // max(1.0, share)))
            groups += [(stream, mine[start : start + size]) for start in range(0, len(mine), size)]
        # The servers send a group while the one before is written: that takes about as long.
        async with _Beside.opened(1) as beside:
            for stream, partitions in groups:
                try:
                    contents, until = await self._read_group(stream, partitions)
                except Exception as exc:  # noqa: BLE001 - it is raised at the end
                    beside.failures.append(exc)
                if beside.failures:
                    break
                await beside.start(partial(self._write_group, stream, partitions, contents, until))

    async def _read_group(self, stream: int, partitions: Sequence[int]) -> tuple[_Contents, int]:
        """Read some partitions. Return what is in them, and the sequence of the marker."""
        layout = self._layout
        # Those that are being dropped since `_load` has chosen them stay interrupted.
        self._interrupted.difference_update([each for each in partitions if each not in self._dropping])
        subjects = [
            subject
            for each in partitions
            for subject in (layout.message(each, "*"), layout.state(each, "*"), layout.piece(each, "*", "*"))
        ]
        until = await self._mark(stream)
        contents = _Contents(layout)
        async with aclosing(self._read(stream, subjects, 1, until)) as batches:
            async for batch in batches:
                contents.add(batch)
        present: set[str] = set()
        for partition in partitions:
            names = await self._jetstream.subjects(layout.stream(stream), layout.message(partition, "*"))
            present.update(names)
            if len(names) >= PAGE:
                present.update(await self._unlisted(partition, contents.messages, present))
        contents.keep(present)
        await self._find_missing(stream, contents, present, until)
        await self._read_states(stream, contents, partitions)
        return contents, until

    async def _write_group(self, stream: int, partitions: Sequence[int], contents: _Contents, until: int) -> None:
        """Write partitions that were read into the index, and relay them from now on."""
        queues = await self._load_messages(contents, partitions)
        for partition in partitions:
            # One that was lost and has come back meanwhile is loaded again.
            if self._owned.get(partition) == _LOADING and partition not in self._interrupted:
                self._owned[partition] = _ACTIVE
        self._active = None
        # What came before in partitions that were active already is not read here.
        self._seen.setdefault(stream, until)
        self._seen[stream] = min(self._seen[stream], until)
        self.became_due(sorted(queues))
        await self._sweep(stream, contents)

    async def _unlisted(self, partition: int, messages: Collection[str], listed: Collection[str]) -> list[str]:
        """Return the messages of a partition that the leader has but did not list, as it listed them in pages."""
        start = self._layout.message(partition, "")
        name = self._layout.stream_of(partition)
        found = []
        for subject in [each for each in messages if each not in listed and each.startswith(start)]:
            if await self._jetstream.last(name, subject) is not None:
                found.append(subject)  # noqa: PERF401 - the body awaits
        return found

    async def _find_missing(self, stream: int, contents: _Contents, present: set[str], until: int) -> None:
        """Read the messages that the leader has and the scan has left out: a server skips what it cannot read."""
        name = self._layout.stream(stream)
        damaged = []
        for subject in present.difference(contents.messages):
            try:
                found = await self._last(name, subject)
            except DamagedError as exc:
                self._note_damage([exc])
                damaged.append(subject)
            else:
                if found is not None and found.sequence < until:
                    contents.messages[subject] = found.sequence, found.headers
        contents.note_ids()
        # They may be readable later: their states and pieces stay.
        contents.ids.update(subject.rpartition(".")[2] for subject in damaged)

    async def _read_states(self, stream: int, contents: _Contents, partitions: Sequence[int]) -> None:
        """Read the states that the scan has not shown: those in payloads, and those that a server skips or damages.

        Without its state, all recipients of a message would get it again: one whose state cannot be read is left out
        until it can be read (`_read_left_out`).
        """
        name = self._layout.stream(stream)
        for partition in partitions:
            self._left_out[partition] = set()
            contents.expect(await self._jetstream.subjects(name, self._layout.state(partition, "*")))
        for message_id, subject in contents.unread.items():
            try:
                found = await self._last(name, subject)
                if found is not None:
                    contents.states[message_id] = found.sequence, read_state(found.headers, found.data)
                    contents.note_time(message_id, found.headers)
            except (DamagedError, LayoutError) as exc:
                self._note_damage([exc if isinstance(exc, DamagedError) else LayoutError(f"{subject}: {exc}")])
                partition = int(subject.split(".")[2])
                self._left_out[partition].add(message_id)
                contents.messages.pop(self._layout.message(partition, message_id), None)

    async def _keep_reading_left_out(self) -> None:
        while True:
            await trio.sleep(_READ_AGAIN)
            try:
                await self._read_left_out()
            except Exception as exc:  # noqa: BLE001 - the cluster may work later
                self._complain(exc)

    async def _read_left_out(self) -> None:
        """Load the partitions again of which a state can be read that could not be read before."""
        for partition in self.owned:
            for message_id in list(self._left_out.get(partition, ())):
                if await self._is_readable(partition, message_id):
                    self._reload(partition)
                    break

    async def _is_readable(self, partition: int, message_id: str) -> bool:
        """Return whether a state can be read. One that is gone cannot: a server may have lost a damaged block."""
        try:
            found = await self._last(self._layout.stream_of(partition), self._layout.state(partition, message_id))
            if found is not None:
                read_state(found.headers, found.data)
        except (DamagedError, LayoutError):
            return False
        return found is not None

    async def _last(self, stream: str, subject: str) -> Stored | None:
        """Return the message of a subject, as the leader has it; None if it is gone. Raise DamagedError.

        The leader answers the same for what it does not have and for what it cannot read, but still lists the latter.
        """
        found = await self._jetstream.last(stream, subject)
        if found is None and await self._jetstream.subjects(stream, subject):
            found = await self._jetstream.last(stream, subject)  # it may have been published meanwhile
            if found is None:
                raise DamagedError(f"{subject} is damaged in the cluster: it cannot be read")
        return found

    def _note_damage(self, errors: Sequence[Exception]) -> None:
        """Count and journal what cannot be read."""
        for error in errors:
            self.damaged += 1
            self._journal.error(0, "cluster", error)

    async def _load_messages(self, contents: _Contents, partitions: Sequence[int]) -> set[str]:
        """Write what was found into the index: some messages at a time, which the thread of the index reads as well.

        Return the domain queues.
        """
        is_new = await self._committer.do(lambda _: self._index.is_empty(partitions))
        queues: set[str] = set()
        subjects = list(contents.messages)

        async def load(some: Sequence[str]) -> None:
            queues.update(await self._load_slice(contents, some, is_new=is_new))

        async with _Beside.opened(_WRITES) as beside:
            for start in range(0, len(subjects), _SLICE):
                await beside.start(partial(load, subjects[start : start + _SLICE]))
                if beside.failures:
                    break
        return queues

    async def _load_slice(self, contents: _Contents, subjects: Sequence[str], *, is_new: bool) -> set[str]:
        """Write some messages into the index. Return their domain queues."""
        if self._pending:
            for subject in subjects:
                self._note_found(subject.rpartition(".")[2])
        numbers = [self._store.new_number() for _ in subjects]
        now = self._clock()

        def act() -> tuple[set[str], list[StoredMessage], list[LayoutError]]:
            queues: set[str] = set()
            unread: list[StoredMessage] = []
            errors: list[LayoutError] = []

            def loaded() -> Iterator[Loaded]:
                # One after the other: garbage collection would cost as much as the rest if all were there at once.
                for number, message in zip(numbers, contents.read(subjects, errors), strict=False):
                    if message.envelope is None:
                        unread.append(message)
                        continue
                    each = self._load_message(message, message.envelope, contents.states.get(message.id), number)
                    queues.update(each.put.queues)
                    yield each

            self._index.load(loaded(), now, restores=True, is_new=is_new)
            return queues, unread, errors

        queues, unread, errors = await self._committer.do(lambda _: act(), whole=True)
        self._note_damage(errors)
        for message in unread:
            envelope = await self._read_envelope(message)
            if envelope is not None:
                each = self._load_message(message, envelope, contents.states.get(message.id), self._store.new_number())
                await self._add([each], restores=True, is_new=is_new)
                queues.update(each.put.queues)
        return queues

    async def _read_envelope(self, stored: StoredMessage) -> Envelope | None:
        """Return an envelope that is in the payload; None if the message is gone or cannot be read."""
        place = stored.place
        subject = self._layout.message(place.partition, stored.id)
        try:
            name = self._layout.stream_of(place.partition)
            found = await self._last(name, subject)
            if found is None or found.sequence != place.sequence:
                return None
            data = found.data[: place.envelope_octets]
            count = 0
            while len(data) < place.envelope_octets:  # it has pieces of its own
                piece = await self._last(name, self._layout.piece(place.partition, stored.id, f"e{count}"))
                if piece is None or not piece.data:
                    break
                data += piece.data
                count += 1
            return read_envelope(data)
        except DamagedError as exc:
            self._note_damage([exc])
        except LayoutError as exc:
            self._note_damage([LayoutError(f"{subject} at sequence {place.sequence}: {exc}")])
        return None

    def _note_found(self, message_id: str) -> None:
        """Note that a message is in the stream, if it waits for its acknowledgment."""
        if message_id in self._pending:
            self._pending[message_id] = True

    def _load_message(
        self, stored: StoredMessage, envelope: Envelope, state: tuple[int, list[RecipientState]] | None, number: int
    ) -> Loaded:
        """Return a message for the index. Called in the thread of the index as well."""
        place = stored.place
        if state is not None:
            place = place._replace(state_sequence=state[0])
        message = Message(stored.id, envelope, pack(place), CountedBody(stored.size), stored.received_at)
        domain_of = self.domain_of
        queues = [domain_of(recipient) for recipient in envelope.recipients]
        put = Put(number, message, None if place.pieces else b"", queues)
        return Loaded(put, place, None if state is None else state[1])

    async def _sweep(self, stream: int, contents: _Contents) -> None:
        """Delete states without a message, and pieces that have waited for one for a day."""
        before = self._clock() - PIECES_WAIT
        strays = [sequence for message_id, (sequence, _) in contents.states.items() if message_id not in contents.ids]
        strays += [
            stored.sequence
            for message_id, pieces in contents.pieces.items()
            if message_id not in contents.ids
            for stored in pieces
            if stored.stored_at < before
        ]
        name = self._layout.stream(stream)
        requests = [_deletion(name, sequence) for sequence in strays]
        await self._jetstream.client.request_many(requests, timeout=_TIMEOUT)

    async def _follow(self) -> int:
        """Add new messages of our partitions that are not in the index. Return how many."""
        added = 0
        for stream in range(self._layout.streams):
            mine = [partition for partition in self.owned if partition % self._layout.streams == stream]
            if not mine:
                self._seen.pop(stream, None)
                self._known.pop(stream, None)
                continue
            subjects = [self._layout.message(partition, "*") for partition in mine]
            until = await self._mark(stream)
            await trio.lowlevel.checkpoint()  # tasks whose messages were acknowledged before the marker note that now
            start = self._seen.get(stream, 0) + 1
            known = self._known[stream]
            if until < start:
                start = 1  # the stream was made again, or restored from a backup
                known.clear()
            here = sum(start <= sequence < until for sequence in known)
            if here < until - start:  # otherwise nothing has come but what this node has written
                async with aclosing(self._read(stream, subjects, start, until)) as batches:
                    async for batch in batches:
                        contents = _Contents(self._layout)
                        contents.add([stored for stored in batch if stored.sequence not in known])
                        errors: list[LayoutError] = []
                        messages = list(contents.read(contents.messages, errors))
                        self._note_damage(errors)
                        added += await self._add_found(stream, messages)
            self._seen[stream] = until
            known.difference_update([sequence for sequence in known if sequence <= until])
        return added

    async def _add_found(self, stream: int, messages: Sequence[StoredMessage]) -> int:
        places = [message.place for message in messages]
        unknown = await self._committer.do(lambda _: self._index.unknown(places)) if places else set()
        added = 0
        for message in messages:
            partition = message.place.partition
            if message.place.sequence not in unknown or message.id in self._left_out.get(partition, ()):
                continue
            # A server that lags may show what was relayed and deleted: only the leader knows.
            subject = self._layout.message(message.place.partition, message.id)
            with suppress(DamagedError):  # the one that has shown it can read it: that is tried, and reported, later
                found = await self._last(self._layout.stream(stream), subject)
                if found is None or found.sequence != message.place.sequence:
                    continue
            envelope = message.envelope or await self._read_envelope(message)
            if envelope is not None and self._owned.get(message.place.partition) == _ACTIVE:
                self._note_found(message.id)
                each = self._load_message(message, envelope, None, self._store.new_number())
                # Not later: it may be finished by then, and a server that lags would show it once more.
                await self._add([each])
                self.became_due(each.put.queues)
                added += 1
        return added

    # ---- out

    async def take(
        self,
        queue: str,
        now: float,
        limit: int,
        octets: int,
        until: float = 0.0,
        same_route: Callable[[str], bool] | None = None,
    ) -> list[Entry]:
        """Take what a queue has due, with its bodies. See `Spool.take`."""
        taken = await super().take(queue, now, limit, octets, until, same_route)
        complete = await self._with_texts(taken)
        if len(complete) < len(taken):  # the relay must not believe that nothing else is due
            self.became_due([queue])
        return complete

    async def take_rows(self, rows: Sequence[int]) -> list[Entry]:
        """Take recipients that wait or are held. See `Spool.take_rows`."""
        return await self._with_texts(await super().take_rows(rows))

    async def _with_texts(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return entries with the header fields and bodies that the cluster has for them."""
        complete: list[Entry] = []
        lost: list[int] = []
        later: list[Entry] = []
        is_silent = False
        """The cluster has not answered: it is not asked for each of the others."""
        with self._ending.shielded():
            direct = await self._read_directly(entries)
            for entry, text in zip(entries, direct, strict=True):
                place = unpack(entry.prefix)
                if place.partition not in self._owned:
                    lost += [row.number for row in entry.rows]
                    continue
                if is_silent and (text is None or place.pieces):
                    later.append(entry)
                    continue
                try:
                    found = await self._text(entry, place, text)
                except DamagedError as exc:
                    self.damaged += 1
                    self._journal.error(0, "cluster", exc)
                    rows = [row.number for row in entry.rows]
                    await self._keep_trying(partial(self._do, partial(self._index.hold, rows, str(exc))))
                except Exception as exc:  # noqa: BLE001 - the cluster or the disk may work later
                    self._complain(exc)
                    later.append(entry)
                    is_silent = is_silent or isinstance(exc, NatsError)
                else:
                    if found is None:
                        lost += [row.number for row in entry.rows]
                    else:
                        complete.append(found)
            if lost:
                await self._keep_trying(partial(self._forget, partial(self._index.forget_rows, lost)))
            if later:
                when = self._clock() + _TRY_LATER
                records = [
                    AttemptRecord(row.number, row.queue, Outcome.RETURNED, "", when)
                    for entry in later
                    for row in entry.rows
                ]
                await self._keep_trying(partial(super().record, records))
        return complete

    async def _keep_trying(self, write: Callable[[], Awaitable[None]]) -> None:
        """Write what becomes of recipients that were taken; otherwise they stay marked as being attempted."""
        while True:
            try:
                await write()
            except Exception as exc:  # noqa: BLE001 - the disk may work later
                self._complain(exc)
                await trio.sleep(_DROP_AGAIN)
            else:
                return

    async def _read_directly(self, entries: Sequence[Entry]) -> list[bytes | None]:
        """Return the payloads of messages from whichever server answers; None where none does."""
        by_stream: dict[str, list[int]] = {}
        for number, entry in enumerate(entries):
            by_stream.setdefault(self._layout.stream_of(unpack(entry.prefix).partition), []).append(number)
        texts: list[bytes | None] = [None] * len(entries)
        for stream, numbers in by_stream.items():
            sequences = [unpack(entries[number].prefix).sequence for number in numbers]
            for number, answer in zip(numbers, await self._jetstream.direct(stream, sequences), strict=True):
                if isinstance(answer, NatsMessage):
                    texts[number] = answer.data
        return texts

    async def _text(self, entry: Entry, place: Place, payload: bytes | None) -> Entry | None:
        """Return an entry with its text; None if the message is gone. Raise NatsError or DamagedError."""
        if place.pieces:
            return await self._collect(entry, place)
        stream = self._layout.stream_of(place.partition)
        for _ in range(_READS):
            if payload is not None:
                text = payload[place.envelope_octets :]
                if crc32c(text) == place.crc:
                    body = StoredBody(text[place.prefix_octets :])
                    return entry._replace(prefix=text[: place.prefix_octets], body=body)
            (answer,) = await self._jetstream.direct(stream, [place.sequence])
            if isinstance(answer, NatsError):
                raise answer
            payload = None if answer is None else answer.data
        found = await self._last(stream, self._layout.message(place.partition, entry.id))
        if found is None or found.sequence != place.sequence:
            return None  # the leader does not have it: it was relayed, or dropped by an operator
        text = found.data[place.envelope_octets :]
        if crc32c(text) != place.crc:
            raise DamagedError(f"{entry.id} is damaged in the cluster: its checksum is wrong")
        return entry._replace(prefix=text[: place.prefix_octets], body=StoredBody(text[place.prefix_octets :]))

    async def _collect(self, entry: Entry, place: Place) -> Entry | None:
        """Write the pieces of a large message into a file of the index. Return and raise what `_text` does, or OSError.

        An attempt for other recipients may be reading the file: a new one with the same content takes its place.
        """
        stream = self._layout.stream_of(place.partition)
        final = self._store.files.path(entry.number)
        path = final.with_name(f"{final.name}-{next(self._collections)}")
        prefix = b""
        crc, left = 0, place.prefix_octets
        file = await trio.to_thread.run_sync(lambda: open(path, "wb", opener=open_private))  # noqa: SIM115
        try:
            for number in range(place.pieces):
                piece = await self._jetstream.last(stream, self._layout.piece(place.partition, entry.id, number))
                if piece is None:
                    found = await self._last(stream, self._layout.message(place.partition, entry.id))
                    if found is None or found.sequence != place.sequence:
                        return None
                    raise DamagedError(f"{entry.id} is damaged in the cluster: piece {number} is missing")
                crc = crc32c(piece.data, crc)
                prefix += piece.data[:left]
                await trio.to_thread.run_sync(file.write, piece.data[left:])
                left = max(0, left - len(piece.data))
            await trio.to_thread.run_sync(file.close)
            if crc != place.crc:
                raise DamagedError(f"{entry.id} is damaged in the cluster: its checksum is wrong")
            await trio.to_thread.run_sync(path.replace, final)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_discard, file, path)
        return entry._replace(prefix=prefix)

    # ---- ends

    async def record(
        self, records: Sequence[AttemptRecord], messages: Sequence[tuple[Message, Sequence[str]]] = ()
    ) -> None:
        """Write the ends of attempts and the reports on them. Raise NatsError and others: then call it again.

        Cannot be cancelled once it has begun, but ends with `end`.

        The reports are in the stream before the messages they are about leave it: after a crash there may be two.
        """
        deadline = trio.current_time() + _RECORDING
        with self._ending.shielded():  # the sooner it is written, the less is tried again by the next owner
            while True:
                try:
                    await self._record(records, messages)
                except (NatsError, UnavailableError):
                    if trio.current_time() >= deadline:
                        raise
                    await trio.sleep(_RECORD_PAUSE)
                else:
                    return
        raise UnavailableError("the node ends, and the cluster does not answer")

    async def _record(
        self, records: Sequence[AttemptRecord], messages: Sequence[tuple[Message, Sequence[str]]]
    ) -> None:
        async with self._writing:
            changes = {record.row: _change_of(record) for record in records if record.outcome is not Outcome.RETURNED}
            planned = await self._committer.do(lambda _: self._index.plan(changes)) if changes else []
            for message, queues in messages:
                partition = planned[0].place.partition if planned else self.choose()
                written = await self._write(partition, message, _REPORT_PATIENCE)
                await self._written(partition, message, queues, written)
            places = await self._write_states(planned)
            strangers = [each.number for each in planned if each.place.partition not in self._owned]

            def act() -> list[int]:
                gone = self._index.record(records)
                self._index.set_places(places)
                return gone + self._index.forget_idle(strangers)

            await self._forget(act)

    async def carry_out(self, action: str, withdrawn: Sequence[int], at_rest: Sequence[int]) -> None:
        """Hold, release, drop or retry recipients. See `Spool.carry_out`."""
        async with self._writing:
            now = self._clock()
            idle = await self._committer.do(lambda _: self._index.idle(at_rest))
            rows = [*withdrawn, *idle]

            def change(state: RecipientState) -> RecipientState | None:
                if action == "drop":
                    return None
                return state._replace(state=HELD) if action == "hold" else state._replace(state=DUE, due_at=now)

            planned = await self._committer.do(lambda _: self._index.plan(dict.fromkeys(rows, change)))
            places = await self._write_states(planned)
            await self._committer.do(lambda _: self._index.set_places(places), whole=True)
            await super().carry_out(action, withdrawn, idle)

    async def _write_states(self, planned: Sequence[Planned]) -> list[tuple[int, Place]]:
        """Write into the stream what becomes of messages. Return places that have changed. Raise NatsError."""
        places: list[tuple[int, Place]] = []
        waiting = list(planned)
        for _ in range(_CONFLICTS):
            requests: list[tuple[Planned, Request]] = []
            for each in waiting:
                requests += [(each, request) for request in self._requests(each)]
            client = self._jetstream.client
            answers = await client.request_many([request for _, request in requests], timeout=_TIMEOUT)
            waiting = []
            failed: NatsError | None = None
            for (each, request), answer in zip(requests, answers, strict=True):
                try:
                    sequence = acknowledged(answer, request.subject)
                except NatsError as error:
                    if isinstance(error, ApiError) and (error.number == WRONG_LAST_SEQUENCE or is_gone(error)):
                        if each.states:
                            merged = await self._merge(each)
                            waiting += [] if merged is None else [merged]
                    else:
                        failed = error
                    continue
                if sequence:  # 0 is that of a deletion
                    self._note_known(each.place.partition, sequence)
                if each.states:
                    places.append((each.number, each.place._replace(state_sequence=sequence)))
            if failed is not None:
                raise failed
            if not waiting:
                return places
        raise NatsError("the state of a message is changed repeatedly by other nodes")

    def _requests(self, each: Planned) -> list[Request]:
        """Return the requests that write what becomes of a message."""
        place, layout = each.place, self._layout
        stream = layout.stream_of(place.partition)
        if each.states:
            sequence, most = place.state_sequence, self._writer.most_octets
            record = state_record(each.states, sequence, received_at=each.received_at, most=most)
            return [Request(layout.state(place.partition, each.id), *record)]
        if place.is_uncertain:
            subject = layout.message(place.partition, each.id)
            requests = [Request(subject, b"", tombstone_headers(place.sequence))]
        else:
            requests = [_deletion(stream, place.sequence)]
        if place.state_sequence:
            requests.append(_deletion(stream, place.state_sequence))
        if place.pieces:
            subject = layout.piece(place.partition, each.id, "*")
            requests.append(Request(f"$JS.API.STREAM.PURGE.{stream}", b'{"filter":"%s"}' % subject.encode()))
        return requests

    async def _merge(self, each: Planned) -> Planned | None:
        """Return a state that follows the one another node has written; None if the message is not ours any more."""
        place = each.place
        if place.partition not in self._owned:
            return None
        stream = self._layout.stream_of(place.partition)
        found = await self._jetstream.last(stream, self._layout.state(place.partition, each.id))
        if found is None:
            return each._replace(place=place._replace(state_sequence=0))
        try:
            places = {state.place for state in read_state(found.headers, found.data)}
        except LayoutError as exc:  # ours takes its place: it would never be written otherwise
            self._note_damage([exc])
            return each._replace(place=place._replace(state_sequence=found.sequence))
        left = [state for state in each.states if state.place in places]
        return each._replace(place=place._replace(state_sequence=found.sequence), states=left)


class _Contents:
    """What was found of some partitions. Headers are read late: a hundred thousand envelopes would take a gigabyte."""

    def __init__(self, layout: Layout) -> None:
        self.messages: dict[str, tuple[int, bytes]] = {}
        """Subject -> sequence and headers."""
        self.states: dict[str, tuple[int, list[RecipientState]]] = {}
        self.unread: dict[str, str] = {}
        """Message id -> subject of a state that is still to be read from the leader."""
        self.received_at: dict[str, float] = {}
        """Message id -> when it was received, as its state says: the clock of its node may have been set since."""
        self.pieces: dict[str, list[Stored]] = {}
        self.ids: set[str] = set()
        """The messages that are not finished, after `note_ids`."""
        self._start = len(layout.name) + 1

    def add(self, found: Sequence[Stored]) -> None:
        """Add messages, states and pieces."""
        start = self._start
        for stored in found:
            subject = stored.subject
            kind = subject[start]
            if kind == "m":
                self.messages[subject] = stored.sequence, stored.headers
                continue
            message_id = subject.split(".")[-1 if kind == "s" else -2]
            if kind == "b":
                self.pieces.setdefault(message_id, []).append(stored)
                continue
            self.note_time(message_id, stored.headers)
            self.states.pop(message_id, None)  # an older one
            self.unread[message_id] = subject
            if not has_state_in_payload(stored.headers):
                with suppress(LayoutError):
                    self.states[message_id] = stored.sequence, read_state(stored.headers)
                    del self.unread[message_id]

    def note_time(self, message_id: str, headers: bytes) -> None:
        """Note when a message was received, if the headers of its state say so."""
        received_at = read_received_at(headers)
        if received_at is not None:
            self.received_at[message_id] = received_at

    def expect(self, subjects: Iterable[str]) -> None:
        """Have those of the states read that are not known."""
        for subject in subjects:
            message_id = subject.rpartition(".")[2]
            if message_id not in self.states:
                self.unread[message_id] = subject

    def keep(self, present: Collection[str]) -> None:
        """Forget the messages that the leader does not have."""
        for subject in [subject for subject in self.messages if subject not in present]:
            del self.messages[subject]

    def note_ids(self) -> None:
        """Note the messages that are not finished."""
        self.ids = {
            subject.rpartition(".")[2] for subject, (_, headers) in self.messages.items() if not is_marker(headers)
        }

    def read(self, subjects: Iterable[str], errors: list[LayoutError]) -> Iterator[StoredMessage]:
        """Yield some of the messages; add what is wrong with those that cannot be read to `errors`."""
        for subject in subjects:
            try:
                message = read_message(subject, *self.messages[subject])
            except LayoutError as exc:
                errors.append(exc)
                continue
            if message is not None:
                if message.id in self.received_at:
                    message = message._replace(received_at=self.received_at[message.id])
                yield message


def _change_of(record: AttemptRecord) -> Change:
    """Return what an attempt makes of a recipient."""

    def change(state: RecipientState) -> RecipientState | None:
        if record.outcome is not Outcome.DEFERRED:
            return None
        return state._replace(state=DUE, due_at=record.next_try, last_reply=record.reply, delay_told=record.delay_told)

    return change


def _discard(file: BinaryIO, path: Path) -> None:
    """Close and remove a file, if it was not closed and renamed."""
    try:
        with suppress(OSError):  # on a full disk, what is still buffered cannot be written
            file.close()
    finally:
        path.unlink(missing_ok=True)


def _deletion(stream: str, sequence: int) -> Request:
    return Request(f"$JS.API.STREAM.MSG.DELETE.{stream}", b'{"seq":%d,"no_erase":true}' % sequence)


def _no_domain(_: Recipient) -> str:
    raise RuntimeError("the queue is not connected to a relay")


def _withdraw_nothing(_: Collection[int]) -> Sequence[Entry]:
    return ()


def _ignore_names(_: frozenset[str]) -> None:
    """Without a relay."""


def _ignore(_: int) -> None:
    """Without leases."""
