"""Delivery into the replicated queue: a majority of the servers has the message on stable storage before its 250.

If the cluster does not answer within `patience`, the message goes to the local spool, and into the cluster later; the
reply says which of the two. After some failures in a row, mail goes to the spool at once, and one message a second
tries the cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import trio

from penstock import reply as replies
from penstock.breaker import Breaker
from penstock.cluster.writer import StreamFullError, UnavailableError
from penstock.delivery.base import Delivery
from penstock.delivery.spool import Relay, SpoolDelivery
from penstock.message import Message, Recipient
from penstock.net.nats import NatsError
from penstock.reply import Reply
from penstock.spool.diskspace import DiskSpace
from penstock.spool.entry import Entry
from penstock.spool.queue import DurableQueue
from penstock.transaction import Transaction

_FAILURES: Final = 3
_PAUSE: Final = 1.0
"""Seconds between two tries of a cluster that does not answer."""


class Queue(Protocol):
    """The replicated queue (penstock.cluster.queue)."""

    def choose(self) -> int:
        """Return the partition for a new message."""

    async def put_into(
        self, partition: int, message: Message, queues: Sequence[str], *, is_taken: bool = False
    ) -> list[Entry]:
        """Write a message. Raise UnavailableError, StreamFullError, NatsError or OSError."""


class Cluster(Protocol):
    """The state of the cluster, as used by the delivery."""

    @property
    def is_full(self) -> bool:
        """The stream has no space for mail."""

    @property
    def problem(self) -> str:
        """Why no mail may be given to the cluster; "" if it may."""


class FallbackSpool(SpoolDelivery):
    """Puts messages for the cluster into the local spool."""

    def __init__(self, spool: DurableQueue, space: DiskSpace, queue_of: Callable[[int], str]) -> None:
        """`queue_of` returns the queue of the spool for messages of a partition."""
        super().__init__(spool, _NoRelay(), space)
        self._queue_of = queue_of
        self._partition = 0

    async def accept_for(self, partition: int, message: Message, transaction: Transaction) -> Reply:
        """Do what `accept` does with a message that may be in this partition already."""
        self._partition = partition  # for `_queues`, which is called before anything is awaited
        return await self.accept(message, transaction)

    def _queues(self, message: Message) -> list[str]:
        return [self._queue_of(self._partition)] * len(message.envelope.recipients)


class _NoRelay:
    """What is in the local spool is not relayed from there."""

    def domain_of(self, _recipient: Recipient) -> str:
        """Not asked."""
        return ""

    def reserve(self, _queues: Sequence[str], _octets: int) -> bool:
        """Attempt nothing at once."""
        return False

    def release(self, _octets: int) -> None:
        """Not called."""

    def offer(self, _entries: Sequence[Entry]) -> None:
        """Not called."""

    def are_mailboxes(self, _queues: Sequence[str]) -> bool:
        """Not asked."""
        return False

    def note_delivered(self, _message: Message, _queues: Sequence[str], _reply: Reply) -> None:
        """Not called."""


class JetStreamDelivery(Delivery):
    """Its 250 promises that a majority of the servers, or the local spool, has the message on stable storage."""

    def __init__(
        self,
        queue: Queue,
        relay: Relay,
        cluster: Cluster,
        spool: FallbackSpool | None,
        *,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        """`spool` takes what the cluster does not; None refuses it with 451."""
        self._queue = queue
        self._relay = relay
        self._cluster = cluster
        self._spool = spool
        self._clock = clock
        self._breaker = Breaker(_FAILURES, _PAUSE, _PAUSE)
        self.in_flight = 0
        """Messages that wait for the cluster."""
        self.on_answer: Callable[[str, float], None] = _ignore
        """Gets "stored", "full" or "failed" for each message given to the cluster, and the seconds that took."""
        self.on_fallback: Callable[[], None] = _nothing
        """Called for each message that was written to the local spool instead."""

    def check_capacity(self, octets: int) -> Reply | None:
        """Refuse a MAIL if neither the stream nor the spool has space for its message (RFC 1870 6.1)."""
        if self._cluster.is_full:
            return replies.DISK_FULL.because("the stream is nearly full")
        if not self._cluster.problem and not self._breaker.is_open:
            return None
        if self._spool is not None:
            return self._spool.check_capacity(octets)
        if self._cluster.problem or self._breaker.blocks(self._clock()):
            return replies.TRY_LATER.because(self._cluster.problem or "the cluster does not answer")
        return None

    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        """Give the message to the cluster, or else to the spool: 250, 452 4.3.1 when that is full, 451 4.3.0."""
        partition = self._queue.choose()
        cause = self._cluster.problem
        if not cause and self._breaker.is_open:
            if self._breaker.blocks(self._clock()):
                cause = "the cluster does not answer"
            else:
                self._breaker.probe()
        if not cause:
            try:
                return await self._replicate(partition, message)
            except (UnavailableError, NatsError) as exc:
                self._breaker.failed(self._clock())
                cause = str(exc)
            except (StreamFullError, OSError) as exc:
                self._breaker.abandon()
                is_full = isinstance(exc, StreamFullError)
                return (replies.DISK_FULL if is_full else replies.TRY_LATER).because(f"{type(exc).__name__}: {exc}")
            except BaseException:
                self._breaker.abandon()
                raise
        if self._spool is None:
            return replies.TRY_LATER.because(cause)
        reply = await self._spool.accept_for(partition, message, transaction)
        if reply.accepts:
            self.on_fallback()
        return reply

    async def _replicate(self, partition: int, message: Message) -> Reply:
        domain_of = self._relay.domain_of
        queues = [domain_of(recipient) for recipient in message.envelope.recipients]
        is_taken = self._relay.reserve(queues, message.size)
        begun, answer = time.perf_counter(), "failed"
        self.in_flight += 1
        try:
            entries = await self._queue.put_into(partition, message, queues, is_taken=is_taken)
            answer = "stored"
        except StreamFullError:
            answer = "full"
            raise
        finally:
            self.in_flight -= 1
            self.on_answer(answer, time.perf_counter() - begun)
            if is_taken:
                self._relay.release(message.size)
        self._breaker.succeeded()
        if entries:
            self._relay.offer(entries)
        return Reply(250, "2.0.0", f"Ok: replicated as {message.id}")


def _ignore(_answer: str, _seconds: float) -> None:
    """Without metrics."""


def _nothing() -> None:
    """Without metrics."""
