"""Connections to next hops: kept, used again, limited.

Each hop has a `_Station` of its own: its queue, its connections, its breaker, its rates. Nothing that a hop does or
does not do is waited for by another one. A connection comes when a job finds none that rests, and as long as the hop's
limit allows; it goes when it has rested for long enough, has had its share of messages, or is lost.

Rules
-----
1. `done` of a job is called once, whatever happens: a result for each recipient, or NextHopUnavailable when the hop
   could not be used and nothing of the message was sent.
2. A job waits only for connections that are there or on their way. When the last of them fails, all that wait hear so.
3. A connection that ends before it has said anything to a job costs the job nothing; it goes on with another one. A
   job that this happens to for the third time is deferred.
4. Everything is counted and bounded: connections of a hop and of all hops, jobs that wait, how long they wait.
"""

from __future__ import annotations

import math
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Final

import msgspec
import trio

from penstock.journal import Journal
from penstock.message import Body, Envelope
from penstock.net._poller import HAS_EPOLL, Poller
from penstock.net.connect import connect_tcp, connect_unix
from penstock.net.stream import SocketStream, watch_sockets
from penstock.net.tls import client_context
from penstock.relay.brakes import Breaker, Bucket
from penstock.relay.conversation import (
    ClockSettings,
    Conversation,
    HandshakeError,
    LostError,
    Manner,
)
from penstock.relay.exchange import BodyError, Closing
from penstock.relay.hop import Delivered, Hop, NextHopUnavailable, Outcome, Result
from penstock.relay.job import Done, Job

_MOST_RETURNS: Final = 3
_IN_THE_CLEAR: Final = 600.0
"""Seconds in which a hop whose TLS did not work is not asked for it again, where that is allowed."""
_HOLD: Final = 5.0
"""Seconds without another connection to a hop that has refused one and works with others."""
_SLOW_START: Final = 5
"""Connections that are on their way at a time, beyond as many as are open: a hop is not to be overrun."""
_FORGOTTEN: Final = 3600.0
"""Seconds after which a hop that nobody wants anything of is forgotten."""


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Connections to next hops, all together."""

    connections: Annotated[
        int, msgspec.Meta(ge=1, le=100_000, description="Connections of a worker to all next hops together")
    ] = 500
    source: Annotated[
        str, msgspec.Meta(description="The IP address to connect from; the system's choice when empty")
    ] = ""
    clocks: ClockSettings = ClockSettings()


_DEFAULTS: Final = PoolSettings()


class Pool:
    """The connections of a worker to all its next hops. `run` it, then give it messages."""

    def __init__(
        self,
        settings: PoolSettings = _DEFAULTS,
        *,
        hostname: str = "localhost",
        journal: Journal | None = None,
        poller: Poller | None = None,
    ) -> None:
        """`hostname` is what we call ourselves. `poller` is one that somebody looks after; otherwise it has its own."""
        self.settings = settings
        self.hostname = hostname
        self.journal = journal
        self.poller = poller
        self.connections = 0
        """Connections that are open or on their way."""
        self.is_closing = False
        self._stations: dict[Hop, _Station] = {}
        self._contexts: dict[tuple[bool, str], ssl.SSLContext] = {}
        self._nursery: trio.Nursery | None = None
        self._closed = trio.Event()
        self._gone = trio.Event()

    # ---- what the scheduler uses

    async def deliver(self, hop: Hop, envelope: Envelope, prefix: bytes, body: Body, size: int) -> Delivered:
        """Hand a message of `size` octets to a hop. Return a result for each recipient, in order.

        Raise NextHopUnavailable when the hop can not be used and nothing of the message was sent. The body is the
        caller's to close. When this is cancelled, a transaction that has begun goes on, and its outcome is ignored.
        """
        return await self._wait_for(hop, Job(envelope, prefix, body, size, _ignore))

    async def _wait_for(self, hop: Hop, job: Job) -> Delivered:
        answered = trio.Event()
        heard: list[Delivered | NextHopUnavailable] = []

        def done(outcome: Delivered | NextHopUnavailable) -> None:
            heard.append(outcome)
            answered.set()

        job.done = done
        self._submit(hop, job)
        try:
            await answered.wait()
        finally:
            job.is_abandoned = True
        outcome = heard[0]
        if isinstance(outcome, NextHopUnavailable):
            raise outcome
        return outcome

    def deliver_later(self, hop: Hop, envelope: Envelope, prefix: bytes, body: Body, size: int, done: Done) -> None:
        """Do what `deliver` does without a task that waits: `done` hears the outcome, perhaps before this returns.

        A tenth of the cost of `deliver`. Raise NextHopUnavailable if that is known at once; then `done` hears nothing.
        """
        self._submit(hop, Job(envelope, prefix, body, size, done))

    def stream(
        self, hop: Hop, envelope: Envelope, size: int, coming: AsyncIterator[bytes], done: Done
    ) -> Callable[[], None]:
        """Hand on a message that is still being received; `size` is what its sender says, 0 when it does not.

        The text is taken as it comes. When `coming` raises OSError, the connection is closed before the end of the
        text, and nothing is delivered. Return a function that makes `done` hear nothing any more; a message for which
        there was no connection yet is then not begun with. Raise NextHopUnavailable when that is known at once.
        """
        job = Job(envelope, b"", None, size, done, coming=coming)
        self._submit(hop, job)

        def forget() -> None:
            job.is_abandoned = True

        return forget

    async def ask(self, hop: Hop, envelope: Envelope) -> Delivered:
        """Ask a hop whether it would take mail for the recipients, and send none.

        A recipient that is refused is FAILED or DEFERRED, one that is not is "delivered". Raise NextHopUnavailable.
        """
        return await self._wait_for(hop, Job(envelope, b"", None, 0, _ignore, is_question=True))

    def _submit(self, hop: Hop, job: Job) -> None:
        if self._nursery is None or self.is_closing:
            raise NextHopUnavailable(hop.name, "the relay is stopping", "4.3.2")
        station = self._stations.get(hop)
        if station is None:
            station = self._stations[hop] = _Station(self, hop)
        station.submit(job)

    def room(self, hop: Hop) -> int:
        """Return how many messages a hop could be given now without much of a wait.

        One for each connection it may have and one behind it, less those that are there; 0 while the hop is left alone.
        """
        station = self._stations.get(hop)
        if self.is_closing:
            return 0
        return hop.limits.connections * 2 if station is None else station.room(trio.current_time())

    def down_until(self, hop: Hop) -> float:
        """Return when a hop that is left alone may be tried again, in trio's time; 0 when it is not left alone."""
        station = self._stations.get(hop)
        return station.breaker.until if station is not None and station.breaker.is_open else 0.0

    def try_again(self, hop: Hop, asked_at: float) -> bool:
        """Let a hop that is left alone be tried now by one, unless it has failed since a time, in trio's time.

        Return whether it may be.
        """
        station = self._stations.get(hop)
        return station is not None and station.breaker.try_again(asked_at, trio.current_time())

    # ---- the life of a pool

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `aclose`, or until cancelled: then transactions under way are deferred, in doubt."""
        own = Poller() if self.poller is None and HAS_EPOLL else None
        if own is not None:  # an empty one is false
            self.poller = own
        try:
            async with trio.open_nursery() as helpers:
                if own is not None:
                    helpers.start_soon(watch_sockets, own)
                helpers.start_soon(self._sweep)
                async with trio.open_nursery() as self._nursery:
                    task_status.started()
                    try:
                        await self._closed.wait()
                    finally:
                        self.is_closing = True
                helpers.cancel_scope.cancel()
        finally:
            self.is_closing = True
            self._nursery = None
            for station in self._stations.values():
                station.give_up(NextHopUnavailable(station.hop.name, "the relay is stopping", "4.3.2"))
            if own is not None:
                own.close()
            self._gone.set()

    async def aclose(self, grace: float = 30.0) -> None:
        """Take no more jobs, let transactions under way end within `grace` seconds, and say good-bye to all hops."""
        if self._nursery is None:
            self.is_closing = True
            return
        self.is_closing = True
        for station in self._stations.values():
            station.close()
        self._nursery.cancel_scope.deadline = trio.current_time() + grace
        self._closed.set()
        await self._gone.wait()

    async def _sweep(self) -> None:
        """Look after clocks, rates, and connections that have rested for too long."""
        interval = max(0.02, min(0.5, self.settings.clocks.shortest / 4))
        while True:
            await trio.sleep(interval)
            now = trio.current_time()
            for hop, station in list(self._stations.items()):
                if station.sweep(now):
                    del self._stations[hop]

    # ---- what stations use

    def start_connection(self, station: _Station) -> None:
        """Start a task for a connection."""
        assert self._nursery is not None
        self._nursery.start_soon(station.run_connection)

    def make_room(self) -> bool:
        """Say whether there may be another connection; retire one that rests elsewhere when there may not."""
        if self.connections < self.settings.connections:
            return True
        for station in self._stations.values():
            if station.retire_one():
                break
        return False

    async def context_for(self, hop: Hop) -> ssl.SSLContext | None:
        """Return the context for TLS with a hop; None when its policy wants none. Raise OSError."""
        if hop.tls.mode == "none" and not hop.tls.implicit:
            return None
        key = (hop.tls.mode == "verify", hop.tls.ca_file)
        context = self._contexts.get(key)
        if context is None:
            context = await trio.to_thread.run_sync(lambda: client_context(verify=key[0], ca_file=key[1]))
            self._contexts[key] = context
        return context


class _Station:
    """All about one hop."""

    def __init__(self, pool: Pool, hop: Hop) -> None:
        self.hop = hop
        self._pool = pool
        limits = self._limits = hop.limits
        self.breaker = Breaker(limits.breaker_failures, limits.breaker_pause, limits.breaker_longest)
        self._messages = Bucket(limits.message_rate)
        self._connects = Bucket(limits.connection_rate)
        self._queue: deque[Job] = deque()
        self._open: set[Conversation] = set()
        self._resting: dict[Conversation, None] = {}
        """Those with nothing to do, the one that worked last at the end."""
        self._connecting = 0
        self._freeing = 0
        """Connections that are about to ask for the next job."""
        self._plain_until = -math.inf
        """Until when TLS is not asked for, because it did not work."""
        self._hold_until = -math.inf
        """Until when no further connection is tried."""
        self._used_at = trio.current_time()
        self._manner = Manner(
            hostname=pool.hostname,
            clocks=pool.settings.clocks,
            messages=limits.messages,
            recipients=limits.recipients,
            chunking=limits.chunking,
        )

    # ---- jobs

    def submit(self, job: Job) -> None:
        """Queue a job. Raise NextHopUnavailable when the hop is left alone, or too much is waiting already."""
        now = trio.current_time()
        if self.breaker.blocks(now):
            raise NextHopUnavailable(self.hop.name, "the hop has failed before, and is left alone for a while", "4.4.1")
        if len(self._queue) >= self._limits.queue:
            raise NextHopUnavailable(
                self.hop.name, f"{self._limits.queue} messages are waiting for it already", "4.3.2"
            )
        job.since = self._used_at = now
        self._queue.append(job)
        self._dispatch(now)

    def room(self, now: float) -> int:
        """See `Pool.room`."""
        if self.breaker.blocks(now):
            return 0
        busy = len(self._open) - len(self._resting)
        if self.breaker.is_open:
            return max(0, 1 - busy - len(self._queue))
        room = self._limits.connections * 2 - busy * 2 - len(self._queue)
        return max(0, min(room, self._messages.has_room(now)))

    def _dispatch(self, now: float, spared: int = 0) -> None:
        """Give jobs to connections that rest, and open others for those that are left, but for `spared` ones."""
        resting = self._resting
        while self._queue and resting:
            conversation, _ = resting.popitem()
            if not conversation.begin():
                return  # the rate is used up; it rests again
        while len(self._queue) - spared - self._freeing > self._connecting and self._may_connect(now):
            self._connecting += 1
            self._pool.connections += 1
            self.breaker.probe()
            self._pool.start_connection(self)

    def _may_connect(self, now: float) -> bool:
        there = len(self._open) + self._connecting
        if self._pool.is_closing or there >= self._limits.connections:
            return False
        if self._connecting >= _SLOW_START + len(self._open):
            return False
        if now < self._hold_until or self.breaker.blocks(now) or not self._messages.has_room(now):
            return False
        return self._pool.make_room() and self._connects.take(now)

    def next_job(self) -> Job | None:
        """Return the next job, None when there is none, or not yet."""
        while self._queue:
            if self._queue[0].is_abandoned:
                self._queue.popleft()
                continue
            if not self._messages.take(trio.current_time()):
                return None
            return self._queue.popleft()
        return None

    def release(self, job: Job) -> None:
        """Take a job back after a transaction."""
        if job.waiting:
            self._queue.appendleft(job)  # at once, and before the others: it has waited for longest
            return
        self._freeing = (
            1  # whoever hears of it may have another job, which is for the connection that has done this one
        )
        try:
            job.finish()
        finally:
            self._freeing = 0

    def give_back(self, job: Job) -> None:
        """Take a job back that did not begin after all."""
        job.returns += 1
        if job.returns >= _MOST_RETURNS:
            text = "the hop closes each connection before it answers"
            job.settle_rest(Result(Outcome.DEFERRED, text, "4.4.2", self.hop.name, is_said=False))
            job.finish()
        else:
            self._queue.appendleft(job)

    def rest(self, conversation: Conversation) -> None:
        """Note that a conversation has nothing to do."""
        self._resting[conversation] = None

    def give_up(self, reason: NextHopUnavailable) -> None:
        """Tell all jobs that wait."""
        while self._queue:
            self._queue.popleft().give_up(reason)

    # ---- connections

    async def run_connection(self) -> None:
        """Be the task of one connection: connect, do jobs, close. A bug costs this connection and no other."""
        try:
            try:
                conversation = await self._connect()
            finally:
                self._connecting -= 1
            await self._serve(conversation)
        except NextHopUnavailable as exc:
            self._fail(exc)
        except Exception as exc:  # noqa: BLE001 - whatever it is
            if self._pool.journal is not None:
                self._pool.journal.error(0, "relay", exc)
            self._fail(NextHopUnavailable(self.hop.name, "an internal error", "4.3.0"))
        finally:
            self._pool.connections -= 1
            self.breaker.abandon()
            self._go_on()

    def _go_on(self) -> None:
        """See to the jobs that wait when a connection has gone."""
        if not self._pool.is_closing:
            self._dispatch(trio.current_time())
        elif not self._open and not self._connecting:
            self.give_up(NextHopUnavailable(self.hop.name, "the relay is stopping", "4.3.2"))

    async def _connect(self) -> Conversation:
        """Return a conversation that is ready for its first transaction. Raise NextHopUnavailable."""
        stream: SocketStream | None = None
        try:
            context = await self._pool.context_for(self.hop)
            with trio.fail_after(self._pool.settings.clocks.connect):
                stream = await self._open_socket()
        except (OSError, trio.TooSlowError) as exc:
            text = "connecting took too long" if isinstance(exc, trio.TooSlowError) else _why(exc)
            raise NextHopUnavailable(self.hop.name, text) from exc
        conversation = Conversation(self.hop, stream, self, self._manner)
        self._open.add(conversation)
        is_ready = False
        try:
            is_plain = trio.current_time() < self._plain_until
            await conversation.open(None if is_plain else context)
            is_ready = True
        finally:
            if not is_ready:
                self._open.discard(conversation)
                conversation.end("it was not opened")
        return conversation

    async def _open_socket(self) -> SocketStream:
        hop, poller = self.hop, self._pool.poller
        if hop.path:
            return await connect_unix(hop.path, poller)
        return await connect_tcp(hop.address or hop.host, hop.port, poller, source=self._pool.settings.source)

    async def _serve(self, conversation: Conversation) -> None:
        cause: BaseException | str = "the relay is stopping"
        if self._pool.is_closing:
            conversation.retire()
        else:
            self._dispatch(trio.current_time(), spared=1)  # the first of them is for this connection
        try:
            await conversation.serve()
        except (LostError, Closing) as exc:
            cause = exc
            if conversation.is_busy and not conversation.transactions:
                self._count_failure(str(exc))
        except BodyError as exc:
            cause = exc
        finally:
            self._open.discard(conversation)
            self._resting.pop(conversation, None)
            conversation.end(cause)

    def worked(self) -> None:
        """Note that the hop has answered a whole transaction."""
        if self.breaker.succeeded() and self._pool.journal is not None:
            self._pool.journal.hop_up(self.hop.name)

    def _fail(self, reason: NextHopUnavailable) -> None:
        """Note that a connection did not come about."""
        mode, now = self.hop.tls, trio.current_time()
        if isinstance(reason, HandshakeError) and mode.mode == "opportunistic" and not mode.implicit:
            self._plain_until = now + _IN_THE_CLEAR  # the next one does without (RFC 7435 3)
        elif self._open:
            self._hold_until = now + _HOLD  # it works with those that are there, and wants no more of them
        else:
            self._count_failure(reason.text)
            if not self._connecting:
                self.give_up(reason)  # rule 2

    def _count_failure(self, text: str) -> None:
        now = trio.current_time()
        if self.breaker.failed(now) and self._pool.journal is not None:
            self._pool.journal.hop_down(self.hop.name, text, round(self.breaker.until - now, 1))

    def retire_one(self) -> bool:
        """Let a connection go that rests. Return False when there is none."""
        for conversation in self._resting:
            del self._resting[conversation]
            conversation.retire()
            return True
        return False

    def close(self) -> None:
        """Let all connections go, each after its transaction."""
        self.give_up(NextHopUnavailable(self.hop.name, "the relay is stopping", "4.3.2"))
        for conversation in list(self._open):
            conversation.retire()
        self._resting.clear()

    def sweep(self, now: float) -> bool:
        """Look after clocks and queue. Return True when the hop can be forgotten."""
        for conversation in list(self._open):
            conversation.check_clock(now)
        while self._resting:
            conversation = next(iter(self._resting))  # the one that has rested for longest
            if now - conversation.resting_since < self._limits.idle:
                break
            self.retire_one()
        while self._queue and now - self._queue[0].since > self._limits.wait:
            text = f"no connection was free for {self._limits.wait:.0f} s"
            self._queue.popleft().give_up(NextHopUnavailable(self.hop.name, text, "4.4.5"))
        if self._queue and not self._pool.is_closing:
            self._dispatch(now)
        if self._open or self._connecting or self._queue:
            self._used_at = now
            return False
        return now - self._used_at > _FORGOTTEN and now >= self.breaker.until


def _ignore(_: Delivered | NextHopUnavailable) -> None:
    """Take an outcome that nobody waits for."""


def _why(exc: OSError) -> str:
    """Return why connecting failed, in a few words; out of several attempts, why the first did."""
    cause = exc.__cause__
    if isinstance(cause, BaseExceptionGroup) and isinstance(cause.exceptions[0], OSError):
        exc = cause.exceptions[0]
    return exc.strerror or str(exc) or type(exc).__name__
