"""What nodes share beside mail: greylisting, known and unknown recipients, failed passwords, and rates.

Every node keeps its own state, and all questions are answered from that: no session waits for the cluster, and without
the cluster everything goes on with what the node knows itself (fail open). The exchange adds what others have found.

    bucket NAME-state       one entry for each attempt that greylisting has deferred or passed, for each answer of a
                            next hop about a recipient, and for the failed passwords of a network or a name at a node;
                            all nodes read what comes, and a node that starts reads all of it
    NAME.rates              what was taken from rate limits within the last second (core NATS)

Rules
-----
1. Changes are sent once a second, each entry once however often it has changed.
2. An entry that comes twice, or late, changes nothing more: entries are states, not events.
3. Everything is bounded. When more changes in a second than `_MOST_CHANGES`, the oldest stay on this node.
4. Workers of one machine share their state already: what comes from our own machine is not counted again, and what
   comes from other machines is counted by one worker, where the state is shared (penstock.cluster.node).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from hashlib import blake2b
from typing import Any, Final, Protocol

import msgspec
import trio

from penstock.cluster.jetstream import JetStream, Stored, refusal
from penstock.cluster.layout import Layout
from penstock.net.nats import Message, NatsError, Request
from penstock.net.natswire import parse_headers
from penstock.state import Charge, Learned

_INTERVAL: Final = 1.0
"""Seconds between two exchanges."""
_PAUSE: Final = 2.0
"""Seconds after which the bucket is read again when that was interrupted."""
_TIMEOUT: Final = 2.0
_MOST_CHANGES: Final = 10_000
"""Entries, and rates, that wait for the next exchange."""
_AT_A_TIME: Final = 1000
_MOST_COUNTS: Final = 100_000
"""Networks and names whose failed passwords at other nodes are remembered."""
_MOST_FAILURES: Final = 1_000_000
"""Failed passwords of an entry."""
_LATEST: Final = 1 << 62
"""Of times in nanoseconds: with a period added, they are still integers of 64 bits."""
_LONGEST: Final = 30 * 24 * 3600.0
"""Seconds for which an answer of another node is used."""
_MOST_MESSAGE: Final = 500
"""Charges of one message."""
_NANO: Final = 10**9
_encode = msgspec.json.encode


class Failures(msgspec.Struct, frozen=True, array_like=True):
    """The failed passwords of a network or a name at one node."""

    machine: str
    kind: int
    key: str
    since: float
    """Unix time of the first one: another time is another count."""
    count: int
    until: float
    """Unix time at which they are forgotten."""
    forget: bool = False
    """A success at `since` has cleared the failures of the name at all nodes."""


class RecipientAnswer(msgspec.Struct, frozen=True, array_like=True):
    """What a next hop has said about a recipient."""

    key: str
    until: float
    """Unix time at which it is forgotten."""
    cause: str | None
    """Why it is unknown; None if it is known."""


class _Rates(msgspec.Struct, frozen=True, array_like=True):
    machine: str
    charges: tuple[Charge, ...]


_decode_failures = msgspec.json.Decoder(Failures).decode
_decode_recipient = msgspec.json.Decoder(RecipientAnswer).decode
_decode_learned = msgspec.json.Decoder(Learned).decode
_decode_rates = msgspec.json.Decoder(_Rates).decode


class Learns(Protocol):
    """What gets failed passwords of other nodes."""

    def __call__(self, kind: int, key: str, more: int, /, *, is_first: bool = False) -> None:
        """Count some more."""


class Exchange:
    """Sends what this node has found, and hands on what others have. Called in the trio thread."""

    def __init__(
        self,
        jetstream: JetStream,
        layout: Layout,
        *,
        node: str,
        machine: str,
        report: Callable[[Exception], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`node` is unique, `machine` the same for all workers of a server. `clock` returns Unix time."""
        self.on_greylist: Callable[[Sequence[Learned]], None] = _ignore
        self.on_rates: Callable[[Sequence[Charge]], None] = _ignore
        self.on_failures: Learns = _ignore
        """Gets what is counted, a network or a name, and how many more failures it has (fewer if negative).

        0: forget all failures of a name. With `is_first` all that other nodes have counted comes again, and follows.
        """
        self.on_recipient: Callable[[str, float, str | None], None] = _ignore
        """Gets an address, for how many seconds the answer is known, and why it is unknown, None if it is known."""
        self._jetstream = jetstream
        self._layout = layout
        self._node = node
        self._machine = machine
        self._report = report
        self._clock = clock
        self._changed: dict[str, tuple[bytes, int]] = {}
        """Subject -> value and seconds to live."""
        self._rates: dict[tuple[str, int, int], int] = {}
        self._failures: dict[tuple[int, str], Failures] = {}
        self._counts: dict[str, Failures] = {}
        """Those of other machines, as they were counted here."""
        self._counted: dict[tuple[int, str], None] = {}
        """The networks and names that were handed on: what an earlier process has learned of them is forgotten."""
        self._next = 1
        """Sequence in the bucket from which on it was not read yet."""

    # ---- what this node finds

    def note_greylist(self, entry: Learned) -> None:
        """Share an attempt that was deferred or has passed."""
        seconds = entry.expires // _NANO - int(self._clock())
        self._change(f"g.{_digest(entry.key)}", _encode(entry), seconds)

    def note_rates(self, charges: Sequence[Charge], sign: int = 1) -> None:
        """Share what was taken from rate limits. What was given back (`sign` -1) is taken off, down to 0."""
        for charge in charges:
            name = (charge.key, charge.period, charge.limit)
            self._rates[name] = self._rates.get(name, 0) + sign * charge.cost
        _shrink(self._rates, _MOST_CHANGES)

    def note_failures(self, kind: int, key: str, more: int, window: float) -> None:
        """Share that a network or a name has more failures (or less), or that those of a name are forgotten (0)."""
        now = self._clock()
        found = self._failures.pop((kind, key), None)
        if found is None or found.until <= now or not more:
            # Failures that come within the same second as a success belong to the count that the success begins.
            found = Failures(self._machine, kind, key, now, 0, 0.0, forget=not more)
        count = max(0, found.count + more)
        self._failures[kind, key] = found = msgspec.structs.replace(found, count=count, until=now + window)
        _shrink(self._failures, _MOST_COUNTS)
        self._change(f"f.{self._node}.{_digest(f'{kind} {key}')}", _encode(found), int(window))

    def note_recipient(self, key: str, seconds: float, cause: str | None) -> None:
        """Share what a next hop has said about a recipient."""
        self._change(f"r.{_digest(key)}", _encode(RecipientAnswer(key, self._clock() + seconds, cause)), int(seconds))

    def _change(self, name: str, value: bytes, seconds: int) -> None:
        self._changed.pop(name, None)
        self._changed[name] = value, max(1, seconds)
        _shrink(self._changed, _MOST_CHANGES)

    # ---- tasks

    async def run(self) -> None:
        """Exchange until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_reading)
            nursery.start_soon(self._keep_listening)
            while True:
                await trio.sleep(_INTERVAL)
                try:
                    await self.send()
                except Exception as exc:  # noqa: BLE001 - the cluster may work later
                    self._report(exc)

    async def send(self) -> None:
        """Send what has changed. Raise NatsError: then it is sent later."""
        self._send_rates()
        names = list(self._changed)[:_AT_A_TIME]
        if not names:
            return
        changed = {name: self._changed.pop(name) for name in names}
        requests = [self._request(name, *value) for name, value in changed.items()]
        failure: NatsError | None = None
        answers: Sequence[Message | NatsError] = [NatsError("cancelled")] * len(requests)
        try:
            answers = await self._jetstream.client.request_many(requests, timeout=_TIMEOUT)
        finally:
            for (name, value), request, answer in zip(changed.items(), requests, answers, strict=True):
                error = refusal(answer, request.subject)
                if error is not None:
                    failure = error
                    self._changed.setdefault(name, value)
        if failure is not None:
            raise failure

    def _request(self, name: str, value: bytes, seconds: int) -> Request:
        headers = b"NATS/1.0\r\nNats-TTL: %ds\r\nP-Value: %s\r\n\r\n" % (seconds, value)
        return Request(f"$KV.{self._layout.state_bucket}.{name}", b"", headers)

    def _send_rates(self) -> None:
        charges = [Charge(*name, cost) for name, cost in self._rates.items() if cost > 0]
        self._rates.clear()  # what cannot be sent now stays on this node
        for start in range(0, len(charges), _MOST_MESSAGE):
            rates = _Rates(self._machine, tuple(charges[start : start + _MOST_MESSAGE]))
            self._jetstream.client.publish(self._layout.rates, _encode(rates))

    async def _keep_listening(self) -> None:
        async with self._jetstream.client.subscribed(self._layout.rates, limit=1000) as messages:
            async for message in messages:
                try:
                    rates = _decode_rates(message.data)
                except (msgspec.MsgspecError, RecursionError):
                    continue  # of another version
                if rates.machine != self._machine:
                    self.on_rates(rates.charges)

    async def _keep_reading(self) -> None:
        """Read what others write, and all there is at first."""
        bucket = f"KV_{self._layout.state_bucket}"
        while True:
            try:
                info = await self._jetstream.api(f"STREAM.INFO.{bucket}")
                if info["state"]["last_seq"] + 1 < self._next:
                    self._next = 1  # the bucket was made again, or restored from a backup
                scan = self._jetstream.scan(bucket, [f"$KV.{self._layout.state_bucket}.>"], start=self._next)
                async with aclosing(scan):
                    async for batch in scan:
                        self._take(batch)
            except Exception as exc:  # noqa: BLE001 - the cluster may work later
                self._report(exc)
            await trio.sleep(_PAUSE)

    def _take(self, batch: Sequence[Stored]) -> None:
        """Hand on what others have written. What is malformed, or of another version, is left out."""
        learned = []
        for stored in batch:
            self._next = stored.sequence + 1
            value = parse_headers(stored.headers).get("P-Value", "").encode()
            kind = stored.subject.split(".")[2]
            try:
                if kind == "g":
                    entry = _decode_learned(value)
                    if max(abs(entry.first), abs(entry.expires)) < _LATEST:
                        learned.append(entry)
                elif kind == "r":
                    answer = _decode_recipient(value)
                    seconds = min(answer.until - self._clock(), _LONGEST)
                    if seconds > 0:
                        self.on_recipient(answer.key, seconds, answer.cause)
                elif kind == "f":
                    self._count(stored.subject, _decode_failures(value))
            except (msgspec.MsgspecError, RecursionError):
                continue
        if learned:
            self.on_greylist(learned)

    def _count(self, subject: str, failures: Failures) -> None:
        """Count the failures that were not counted yet."""
        if failures.machine == self._machine or failures.until <= self._clock():
            return
        if not 0 <= failures.count <= _MOST_FAILURES:
            return
        name = (failures.kind, failures.key)
        before = self._counts.pop(subject, None)
        self._counts[subject] = failures
        _shrink(self._counts, _MOST_COUNTS)
        known = 0
        if before is not None and before.since == failures.since:
            known = before.count
        elif failures.forget:
            self._hand_on(*name, 0)
        if more := failures.count - known:
            self._hand_on(*name, more)

    def _hand_on(self, kind: int, key: str, more: int) -> None:
        """Call `on_failures`. Only this makes a name known: `is_first` must come with its first call."""
        name = kind, key
        is_first = name not in self._counted
        self._counted.pop(name, None)
        self._counted[name] = None
        _shrink(self._counted, _MOST_COUNTS)
        self.on_failures(kind, key, more, is_first=is_first)


def _digest(key: str) -> str:
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _shrink(table: dict[Any, Any], most: int) -> None:
    while len(table) > most:
        del table[next(iter(table))]


def _ignore(*_: object, is_first: bool = False) -> None:
    """Without such checks."""
