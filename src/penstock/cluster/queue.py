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
3. It was accepted by another node, or its acknowledgment was lost: `_follow` reads what has come since the last marker.

A message of the kinds 2 and 3 may be published again by the node that waits for its acknowledgment, even when it was
relayed long since: for an hour a marker takes its place, and refuses that.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import trio
from crc32c import crc32c

from penstock.cluster.index import Change, IndexStore, Loaded, Planned, pack, unpack
from penstock.cluster.jetstream import ApiError, JetStream, Stored, acknowledged, is_gone, refusal
from penstock.cluster.layout import (
    FULL,
    PIECES_WAIT,
    WRONG_LAST_SEQUENCE,
    Layout,
    LayoutError,
    Place,
    RecipientState,
    StoredMessage,
    read_envelope,
    read_message,
    read_state,
    state_headers,
    tombstone_headers,
)
from penstock.cluster.writer import UnavailableError, Writer, Written
from penstock.journal import Journal
from penstock.message import CountedBody, Message, MessageId, Recipient
from penstock.net.nats import Message as NatsMessage
from penstock.net.nats import NatsError, Request
from penstock.spool.bodies import StoredBody
from penstock.spool.entry import DUE, HELD, AttemptRecord, Entry, Outcome, Put, Recovered
from penstock.spool.spool import Spool, SpoolSettings, without_duplicates

_TIMEOUT: Final = 5.0
_READS: Final = 3
"""Times that a damaged message is read from other servers, before it is read from the leader."""
_TRY_LATER: Final = 5.0
"""Seconds until a message is tried again that the cluster did not return."""
_REPORT_PATIENCE: Final = 5.0
_RECORDING: Final = 10.0
"""Seconds for which the ends of attempts are written again and again while there is no leader..."""
_RECORD_PAUSE: Final = 0.2
"""...and the seconds in between."""
_GROUP: Final = 100_000
"""Messages of partitions that are read together: they are in memory until the end."""
_SLICE: Final = 1000
"""Messages added to the index in one transaction."""
_LEAVING_POLL: Final = 0.1
_SHORTEST_INTERVAL: Final = 0.1
_LONGEST_INTERVAL: Final = 15.0
"""Seconds between two looks at what others have accepted."""
_CONFLICTS: Final = 5
"""Times that a state is written again that others have changed."""
_LOADING, _ACTIVE = 1, 2


class DamagedError(Exception):
    """A message in the cluster is not what was accepted."""


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
        self.domain_of: Callable[[Recipient], str] = _no_domain
        """Returns the domain whose queue a recipient waits in."""
        self.withdraw: Callable[[Collection[int]], Sequence[Entry]] = _withdraw_nothing
        """Takes recipients that only wait in memory from the relay."""
        self.released: Callable[[int], None] = _ignore
        """Gets a partition of which nothing is under way any more, after `leave`."""
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
        """The sequence of the last marker by stream: what comes before it is in the index."""
        self._pending: dict[str, bool] = {}
        """Messages that wait for their acknowledgment, and whether they were found in the stream meanwhile."""
        self._turn = 0
        self._writing = trio.Lock()
        """Of states: two at a time would be in each other's way."""
        self._wake = trio.Event()
        self._dropping: dict[int, bool] = {}
        """Partitions that are to be removed from the index, and whether `released` is to be called."""
        self._drop_now = trio.Event()
        self._complaint = ""

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
            nursery.start_soon(self._keep_measuring)
            nursery.start_soon(self._keep_dropping, nursery)
            nursery.start_soon(self._keep_listening)
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
            await trio.sleep(1)

    # ---- partitions

    def gain(self, partition: int) -> None:
        """Relay a partition from now on."""
        self._owned[partition] = _LOADING
        self._active = None
        self._wake.set()

    def lose(self, partition: int) -> None:
        """Begin no attempt of a partition any more: others may relay it."""
        self._give_up(partition, is_leaving=False)

    def leave(self, partition: int) -> None:
        """Begin no attempt of a partition any more, and call `released` when none is under way."""
        self._give_up(partition, is_leaving=True)

    def _give_up(self, partition: int, *, is_leaving: bool) -> None:
        self._owned.pop(partition, None)
        self._active = None
        self._dropping[partition] = is_leaving
        self._drop_now.set()

    async def _keep_dropping(self, nursery: trio.Nursery) -> None:
        while True:
            await self._drop_now.wait()
            self._drop_now = trio.Event()
            while self._dropping:
                partition, is_leaving = next(iter(self._dropping.items()))
                await self._drop(partition)
                del self._dropping[partition]
                if is_leaving and partition not in self._owned:
                    nursery.start_soon(self._leave, partition)
            self._wake.set()

    async def _drop(self, partition: int) -> None:
        """Remove a partition from the index and from the memory of the relay; what is in flight is not touched."""
        rows = set(await self._committer.do(lambda _: self._index.attempting(partition)))
        withdrawn = self.withdraw(rows)
        for entry in withdrawn:
            entry.body.close()
        gone = {row.number for entry in withdrawn for row in entry.rows}
        await self._committer.do(lambda _: self._index.drop_partition(partition, gone), whole=True)

    async def _leave(self, partition: int) -> None:
        while await self._committer.do(lambda _: self._index.count(partition)):  # noqa: ASYNC110 - it is in a database
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
            return await self._written(partition, message, queues, Written(place, text))
        return self._add_accepted(place, text, message, queues, is_taken=is_taken)

    def _announce(self, partition: int) -> None:
        """Tell the node that relays a partition of new mail. If it does not hear, it looks for itself sometimes."""
        with suppress(NatsError):
            self._jetstream.client.publish(self._layout.announcement(partition))

    def _add_accepted(
        self, place: Place, text: bytes, message: Message, queues: Sequence[str], *, is_taken: bool
    ) -> list[Entry]:
        """Write a message that was acknowledged just now into the index; return its entries if it is taken."""
        number = self._store.new_number()
        put = Put(number, self._indexed(message, place), None if place.pieces else b"", queues, is_taken)
        self._committer.put_later(put, partial(self._after_put, place.partition))
        if is_taken:
            return self._entries(Put(number, message, text[len(message.prefix) :], queues, is_taken))
        self.became_due(queues)
        return []

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
            await self._add([self._loaded(message, queues, place)])
            self.became_due(queues)
            return []
        return self._add_accepted(place, text, message, queues, is_taken=False)

    async def forward(self, message: Message, partition: int, *, patience: float) -> None:
        """Put a message that was accepted before, unless it is in the stream already. Raise what `put` does."""
        written = await self._write(partition, message, patience)
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

    def _after_put(self, partition: int, result: object) -> None:
        """Read a partition again if a message could not be written into the index."""
        error = getattr(result, "error", None)
        if error is not None:
            self._journal.error(0, "index", error)
            if self._owned.get(partition) == _ACTIVE:
                self.lose(partition)
                self.gain(partition)

    def _indexed(self, message: Message, place: Place) -> Message:
        """Return a message as it is in the index."""
        return Message(message.id, message.envelope, pack(place), CountedBody(message.body.size), message.received_at)

    def _loaded(
        self,
        message: Message,
        queues: Sequence[str],
        place: Place,
        states: Sequence[RecipientState] | None = None,
    ) -> Loaded:
        put = Put(self._store.new_number(), self._indexed(message, place), None if place.pieces else b"", queues)
        return Loaded(put, place, states)

    async def _add(self, loaded: Sequence[Loaded], *, restores: bool = False) -> None:
        for start in range(0, len(loaded), _SLICE):
            load = partial(self._index.load, loaded[start : start + _SLICE], self._clock(), restores=restores)
            await self._do(load)

    async def _do(self, act: Callable[[], object]) -> None:
        """Do something with the index, in a transaction."""
        await self._committer.do(lambda _: act(), whole=True)

    # ---- what is in the stream

    async def _mark(self, stream: int) -> int:
        """Write our marker into a stream, and return its sequence."""
        return await self._jetstream.publish(self._layout.marker(stream, self._node), b"", b"NATS/1.0\r\n\r\n")

    async def _read(self, stream: int, subjects: Iterable[str], start: int) -> tuple[int, list[Stored]]:
        """Return what is in a stream from a sequence on, at least up to now, and the sequence of the marker."""
        marker = self._layout.marker(stream, self._node)
        until = await self._mark(stream)
        found: list[Stored] = []
        scan = self._jetstream.scan(self._layout.stream(stream), [*subjects, marker], start=start)
        try:
            async for batch in scan:
                for stored in batch:
                    if stored.subject != marker:
                        found.append(stored)
                    elif stored.sequence >= until:
                        return until, found
        finally:
            await scan.aclose()  # type: ignore[attr-defined]
        raise NatsError("the scan has ended")

    async def _load(self) -> None:
        """Load the partitions that this node has got."""
        loading = [
            partition
            for partition, state in self._owned.items()
            if state == _LOADING and partition not in self._dropping
        ]
        for stream in range(self._layout.streams):
            mine = [partition for partition in loading if partition % self._layout.streams == stream]
            if not mine:
                continue
            info = await self._jetstream.api(f"STREAM.INFO.{self._layout.stream(stream)}")
            share = info["state"].get("num_subjects", 0) * self._layout.streams / self._layout.partitions
            size = max(1, int(_GROUP // max(1.0, share)))
            for start in range(0, len(mine), size):
                await self._load_group(stream, mine[start : start + size])

    async def _load_group(self, stream: int, partitions: Sequence[int]) -> None:
        layout = self._layout
        subjects = [
            subject
            for each in partitions
            for subject in (layout.message(each, "*"), layout.state(each, "*"), layout.piece(each, "*", "*"))
        ]
        until, found = await self._read(stream, subjects, 1)
        present: set[str] = set()
        for partition in partitions:
            present.update(await self._jetstream.subjects(layout.stream(stream), layout.message(partition, "*")))
        contents = _Contents(layout, present)
        for stored in found:
            try:
                contents.add(stored)
            except LayoutError as exc:
                self.damaged += 1
                self._journal.error(0, "cluster", exc)
        loaded: list[Loaded] = []
        queues: set[str] = set()
        for message in contents.messages.values():
            each = await self._load_message(message, contents.states.get(message.id))
            if each is not None:
                loaded.append(each)
                queues.update(each.put.queues)
        await self._add(loaded, restores=True)
        for partition in partitions:
            if self._owned.get(partition) == _LOADING:
                self._owned[partition] = _ACTIVE
        self._active = None
        # What came before in partitions that were active already is not read here.
        self._seen.setdefault(stream, until)
        self._seen[stream] = min(self._seen[stream], until)
        self.became_due(sorted(queues))
        await self._sweep(stream, contents)

    async def _load_message(
        self, stored: StoredMessage, state: tuple[int, list[RecipientState]] | None
    ) -> Loaded | None:
        """Return a message for the index; None if it cannot be read."""
        place = stored.place
        envelope = stored.envelope
        if envelope is None:
            found = await self._jetstream.get(self._layout.stream_of(place.partition), place.sequence)
            if found is None:
                return None
            envelope = read_envelope(found.data[: place.envelope_octets])
        if state is not None:
            place = place._replace(state_sequence=state[0])
        message = Message(stored.id, envelope, b"", CountedBody(stored.size), stored.received_at)
        if message.id in self._pending:
            self._pending[message.id] = True
        queues = [self.domain_of(recipient) for recipient in envelope.recipients]
        return self._loaded(message, queues, place, None if state is None else state[1])

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
        """Add what has come into our partitions since the last look, and is not in the index. Return how much."""
        added = 0
        for stream in range(self._layout.streams):
            mine = [partition for partition in self.owned if partition % self._layout.streams == stream]
            if not mine:
                self._seen.pop(stream, None)
                continue
            subjects = [self._layout.message(partition, "*") for partition in mine]
            until, found = await self._read(stream, subjects, self._seen.get(stream, 0) + 1)
            messages: list[StoredMessage] = []
            for stored in found:
                message = read_message(stored.subject, stored.sequence, stored.headers)
                if message is not None:
                    messages.append(message)
            added += await self._add_found(stream, messages)
            self._seen[stream] = until
        return added

    async def _add_found(self, stream: int, messages: Sequence[StoredMessage]) -> int:
        places = [message.place for message in messages]
        unknown = await self._committer.do(lambda _: self._index.unknown(places)) if places else set()
        loaded: list[Loaded] = []
        queues: set[str] = set()
        for message in messages:
            if message.place.sequence not in unknown:
                continue
            # A server that lags may show what was relayed and deleted: only the leader knows.
            if await self._jetstream.get(self._layout.stream(stream), message.place.sequence) is None:
                continue
            each = await self._load_message(message, None)
            if each is not None and self._owned.get(message.place.partition) == _ACTIVE:
                loaded.append(each)
                queues.update(each.put.queues)
        await self._add(loaded)
        self.became_due(sorted(queues))
        return len(loaded)

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
        with trio.CancelScope(shield=True):
            direct = await self._read_directly(entries)
            for entry, text in zip(entries, direct, strict=True):
                place = unpack(entry.prefix)
                if place.partition not in self._owned:
                    lost += [row.number for row in entry.rows]
                    continue
                try:
                    found = await self._text(entry, place, text)
                except DamagedError as exc:
                    self.damaged += 1
                    self._journal.error(0, "cluster", exc)
                    rows = [row.number for row in entry.rows]
                    await self._do(partial(self._index.hold, rows, str(exc)))
                except Exception as exc:  # noqa: BLE001 - the cluster or the disk may work later
                    self._complain(exc)
                    later.append(entry)
                else:
                    if found is None:
                        lost += [row.number for row in entry.rows]
                    else:
                        complete.append(found)
            if lost:
                await self._do(partial(self._index.forget_rows, lost))
            if later:
                when = self._clock() + _TRY_LATER
                records = [
                    AttemptRecord(row.number, row.queue, Outcome.RETURNED, "", when)
                    for entry in later
                    for row in entry.rows
                ]
                await super().record(records)
        return complete

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
            payload = answer.data if isinstance(answer, NatsMessage) else None
        found = await self._jetstream.get(stream, place.sequence)
        if found is None:
            return None  # the leader does not have it: it was relayed, or dropped by an operator
        text = found.data[place.envelope_octets :]
        if crc32c(text) != place.crc:
            raise DamagedError(f"{entry.id} is damaged in the cluster: its checksum is wrong")
        return entry._replace(prefix=text[: place.prefix_octets], body=StoredBody(text[place.prefix_octets :]))

    async def _collect(self, entry: Entry, place: Place) -> Entry:
        """Write the pieces of a large message into a file of the index. Raise NatsError, DamagedError or OSError."""
        stream = self._layout.stream_of(place.partition)
        path = self._store.files.path(entry.number)
        prefix = b""
        crc, left = 0, place.prefix_octets
        file = await trio.to_thread.run_sync(lambda: path.open("wb"))
        try:
            for number in range(place.pieces):
                found = await self._jetstream.last(stream, self._layout.piece(place.partition, entry.id, number))
                if found is None:
                    raise DamagedError(f"{entry.id} is damaged in the cluster: piece {number} is missing")
                crc = crc32c(found.data, crc)
                prefix += found.data[:left]
                await trio.to_thread.run_sync(file.write, found.data[left:])
                left = max(0, left - len(found.data))
        finally:
            await trio.to_thread.run_sync(file.close)
        if crc != place.crc:
            raise DamagedError(f"{entry.id} is damaged in the cluster: its checksum is wrong")
        return entry._replace(prefix=prefix)

    # ---- ends

    async def record(
        self, records: Sequence[AttemptRecord], messages: Sequence[tuple[Message, Sequence[str]]] = ()
    ) -> None:
        """Write the ends of attempts and the reports on them. Raise NatsError and others: then call it again.

        The reports are in the stream before the messages they are about leave it: after a crash there may be two.
        """
        deadline = trio.current_time() + _RECORDING
        while True:  # the sooner it is written, the less is tried again by the next owner
            try:
                await self._record(records, messages)
            except (NatsError, UnavailableError):
                if trio.current_time() >= deadline:
                    raise
                await trio.sleep(_RECORD_PAUSE)
            else:
                return

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

            def act(_: object) -> list[int]:
                gone = self._index.record(records)
                self._index.set_places(places)
                self._index.forget_idle(strangers)
                return gone

            for number in await self._committer.do(act, whole=True):
                self._threads.remove_later(number)

    async def obey(self, action: str, withdrawn: Sequence[int], at_rest: Sequence[int]) -> None:
        """Hold, release, drop or retry recipients. See `Spool.obey`."""
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
            await super().obey(action, withdrawn, idle)

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
                error = refusal(answer, request.subject)
                is_state = bool(each.states)
                if error is None:
                    if is_state and isinstance(answer, NatsMessage):
                        places.append((each.number, each.place._replace(state_sequence=_sequence(answer))))
                elif isinstance(error, ApiError) and (error.number == WRONG_LAST_SEQUENCE or is_gone(error)):
                    if is_state:
                        merged = await self._merge(each)
                        waiting += [] if merged is None else [merged]
                else:
                    failed = error
            if failed is not None:
                raise failed
            if not waiting:
                return places
        raise NatsError("the state of a message is changed by others again and again")

    def _requests(self, each: Planned) -> list[Request]:
        """Return the requests that write what becomes of a message."""
        place, layout = each.place, self._layout
        stream = layout.stream_of(place.partition)
        if each.states:
            return [
                Request(layout.state(place.partition, each.id), b"", state_headers(each.states, place.state_sequence))
            ]
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
        places = {state.place for state in read_state(found.headers)}
        left = [state for state in each.states if state.place in places]
        return each._replace(place=place._replace(state_sequence=found.sequence), states=left)


class _Contents:
    """What was found of some partitions."""

    def __init__(self, layout: Layout, present: set[str]) -> None:
        self.messages: dict[str, StoredMessage] = {}
        self.states: dict[str, tuple[int, list[RecipientState]]] = {}
        self.pieces: dict[str, list[Stored]] = {}
        self._start = len(layout.name) + 1
        self._present = present

    @property
    def ids(self) -> Collection[str]:
        """The messages."""
        return self.messages.keys()

    def add(self, stored: Stored) -> None:
        """Add a message, a state or a piece. Raise LayoutError."""
        kind, _, message_id, *_ = stored.subject[self._start :].split(".")
        if kind == "m":
            if stored.subject in self._present:
                message = read_message(stored.subject, stored.sequence, stored.headers)
                if message is not None:
                    self.messages[message_id] = message
                else:
                    self.messages.pop(message_id, None)
        elif kind == "s":
            self.states[message_id] = (stored.sequence, read_state(stored.headers))
        else:
            self.pieces.setdefault(message_id, []).append(stored)


def _change_of(record: AttemptRecord) -> Change:
    """Return what an attempt makes of a recipient."""

    def change(state: RecipientState) -> RecipientState | None:
        if record.outcome is not Outcome.DEFERRED:
            return None
        return state._replace(state=DUE, due_at=record.next_try, last_reply=record.reply, delay_told=record.delay_told)

    return change


def _deletion(stream: str, sequence: int) -> Request:
    return Request(f"$JS.API.STREAM.MSG.DELETE.{stream}", b'{"seq":%d,"no_erase":true}' % sequence)


def _sequence(answer: NatsMessage) -> int:
    return acknowledged(answer, "state")


def _no_domain(_: Recipient) -> str:
    raise RuntimeError("the queue is not connected to a relay")


def _withdraw_nothing(_: Collection[int]) -> Sequence[Entry]:
    return ()


def _ignore(_: int) -> None:
    """Without leases."""
