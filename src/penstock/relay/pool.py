"""Connections to next hops: kept, reused, limited.

Each hop has a `HostPool`: its queue, its connections, its breaker, its rates. Nothing that a hop does or does not do is
waited for by another one. A connection is opened when a job finds none that rests, as long as the limits allow; it is
closed when it has rested for long enough, has had its share of messages, or is lost.

Rules
-----
1. `done` of a job is always called, once: with a result for each recipient, or with NextHopUnavailable if the
   hop could not be used and nothing of the message was sent.
2. A job waits only for connections that are open or being opened. When the last of them fails, all that wait fail.
3. A connection that ends before the hop has answered anything to a job costs the job nothing; it goes on with another
   one. The third time this happens to a job, it is deferred.
4. Everything is counted and bounded: connections of a hop and of all hops, jobs that wait, how long they wait.
5. If all connections of the pool are in use, a hop that has none goes before hops with several: a resting connection
   is closed for it, or one that is not opened: it was not greeted, or waits for another reply before its first mail.
6. TLS that fails is skipped for one attempt only (RFC 7435 3): the next connection tries it again.
"""

from __future__ import annotations

import math
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Final, Literal

import msgspec
import trio

from penstock.breaker import Breaker
from penstock.journal import Journal
from penstock.message import Body, Envelope
from penstock.metrics._shared import SharedTable
from penstock.net._poller import HAS_EPOLL, Poller
from penstock.net.connect import connect_tcp, connect_unix, source_address
from penstock.net.stream import SocketStream, watch_sockets
from penstock.net.tls import client_context
from penstock.relay.connection import ClientSettings, ClockSettings, HandshakeError, HopConnection, LostError
from penstock.relay.hop import Delivered, Hop, NextHopUnavailable, Outcome, Result
from penstock.relay.job import Done, Job
from penstock.relay.share import HopShare
from penstock.relay.tlsreport import Failure
from penstock.smtp.client_session import BodyError, ClosingError

_MAX_RETURNS: Final = 3
"""How often a job may find its connection closed before it is deferred."""
_HOLD: Final = 5.0
"""Seconds without another connection to a hop that has refused one and works with others."""
_SLOW_START: Final = 5
"""Connections being opened at a time, beyond as many as are open: a hop is not to be overrun."""
_FORGOTTEN: Final = 3600.0
"""Seconds after which an unused hop and its learned limits are forgotten."""
_YIELD: Final = 1.0
"""Seconds between two connections that are closed for another worker."""
_PATIENCE: Final = 10.0
"""Seconds that a connection may take up to its first mail while another hop has no connection at all."""


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All connections to next hops."""

    connections: Annotated[
        int, msgspec.Meta(ge=1, le=100_000, description="Connections of a worker to all next hops together")
    ] = 500
    source: Annotated[str, msgspec.Meta(description="Source IP address; default: chosen by the system")] = ""
    clocks: ClockSettings = ClockSettings()


_DEFAULTS: Final = PoolSettings()
NoteConnection = Callable[[Hop, str, Failure | None], None]
"""Gets a hop, the domain whose mail a connection was made for, and how TLS has failed; None for a success."""


class Pool:
    """The connections of a worker to all its next hops. `run` it, then give it messages."""

    def __init__(
        self,
        settings: PoolSettings = _DEFAULTS,
        *,
        hostname: str = "localhost",
        journal: Journal | None = None,
        poller: Poller | None = None,
        smtputf8_downgrade: Literal["refuse", "send"] = "refuse",
        table: SharedTable | None = None,
        note_connection: NoteConnection | None = None,
    ) -> None:
        """`hostname` is the argument of EHLO. `poller` is one whose `watch_sockets` runs; by default it has its own.

        `smtputf8_downgrade`: what to do with a header that needs SMTPUTF8 if a hop does not offer it. With a `table`,
        the limits of a hop are for all workers that share it. `note_connection` gets the result of TLS, for reports.
        """
        self.note_connection: Final = note_connection
        self.settings = settings
        self.hostname = hostname
        self.journal = journal
        self.poller = poller
        self.connections = 0
        """Connections that are open or being opened."""
        self.is_closing = False
        self.smtputf8_downgrade: Final = smtputf8_downgrade
        self.table: Final = table
        self._host_pools: dict[Hop, HostPool] = {}
        self._starved: dict[HostPool, None] = {}
        """Hops that have no connection because all of the pool are in use, the one that waits for longest first."""
        self._contexts: dict[tuple[bool, str], ssl.SSLContext] = {}
        self._nursery: trio.Nursery | None = None
        self._closed = trio.Event()
        self._gone = trio.Event()

    # ---- what the scheduler uses

    async def deliver(self, hop: Hop, envelope: Envelope, prefix: bytes, body: Body, size: int) -> Delivered:
        """Hand a message of `size` octets to a hop. Return a result for each recipient, in order.

        Raise NextHopUnavailable if the hop cannot be used and nothing of the message was sent. The caller closes the
        body. If this is cancelled, a transaction that has begun goes on, and its outcome is dropped.
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
        """Do what `deliver` does without a task that waits: `done` gets the outcome, perhaps before this returns.

        A tenth of the cost of `deliver`. Raise NextHopUnavailable if that is known at once; then `done` is not called.
        """
        self._submit(hop, Job(envelope, prefix, body, size, done))

    def stream(
        self, hop: Hop, envelope: Envelope, size: int, coming: AsyncIterator[bytes], done: Done
    ) -> Callable[[], None]:
        """Send a message that is still being received; `size` is the size its sender announced, 0 without one.

        The text is sent as it comes. If `coming` raises OSError, the connection is closed before the end of the text,
        and nothing is delivered. Return a function after which `done` is not called any more; a message that has not
        got a connection is then not sent. Raise NextHopUnavailable if that is known at once.
        """
        job = Job(envelope, b"", None, size, done, coming=coming)
        self._submit(hop, job)

        def forget() -> None:
            job.is_abandoned = True

        return forget

    async def ask(self, hop: Hop, envelope: Envelope) -> Delivered:
        """Ask a hop whether it would accept mail for the recipients, and send none.

        A recipient that is refused is FAILED or DEFERRED, one that is accepted is DELIVERED. Raise NextHopUnavailable.
        """
        return await self._wait_for(hop, Job(envelope, b"", None, 0, _ignore, is_question=True))

    def _submit(self, hop: Hop, job: Job) -> None:
        if self._nursery is None or self.is_closing:
            raise NextHopUnavailable(hop.name, "the relay is stopping", "4.3.2")
        host_pool = self._host_pools.get(hop)
        if host_pool is None:
            host_pool = self._host_pools[hop] = HostPool(self, hop)
        host_pool.submit(job)

    def room(self, hop: Hop) -> int:
        """Return how many messages a hop could be given now without much of a wait.

        Two for each connection it may have, less those under way; 0 while its breaker is open.
        """
        host_pool = self._host_pools.get(hop)
        if self.is_closing:
            return 0
        return hop.limits.connections * 2 if host_pool is None else host_pool.room(trio.current_time())

    def hop_states(self) -> dict[str, tuple[int, int]]:
        """Return the next hops in use: 1, or 0 for one that is backing off; and its open connections."""
        return {
            host_pool.hop.name: (0 if host_pool.breaker.is_open else 1, host_pool.connections)
            for host_pool in self._host_pools.values()
        }

    def hops_down(self) -> Iterator[tuple[Hop, float, str]]:
        """Yield the hops whose breaker is open, since when (seconds since the epoch), and why."""
        for hop, host_pool in self._host_pools.items():
            if host_pool.breaker.is_open:
                yield hop, host_pool.down_since, host_pool.down_reason

    def down_until(self, hop: Hop) -> float:
        """Return when a hop whose breaker is open may be tried again, in trio's time; 0 if it is not open."""
        host_pool = self._host_pools.get(hop)
        return host_pool.breaker.until if host_pool is not None and host_pool.breaker.is_open else 0.0

    def try_again(self, hop: Hop, asked_at: float) -> bool:
        """Let a hop whose breaker is open be tried now by one connection, unless it has failed since `asked_at`.

        `asked_at` is in trio's time. Return whether it may be tried.
        """
        host_pool = self._host_pools.get(hop)
        return host_pool is not None and host_pool.breaker.try_again(asked_at, trio.current_time())

    # ---- the life of a pool

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until `aclose`, or until cancelled: then transactions under way are deferred, in doubt."""
        own = Poller() if self.poller is None and HAS_EPOLL else None
        if own is not None:  # an empty poller is false
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
            for host_pool in self._host_pools.values():
                host_pool.give_up(NextHopUnavailable(host_pool.hop.name, "the relay is stopping", "4.3.2"))
            if own is not None:
                own.close()
            self._gone.set()

    async def aclose(self, grace: float = 30.0) -> None:
        """Take no more jobs, let transactions under way end within `grace` seconds, and send QUIT to all hops."""
        if self._nursery is None:
            self.is_closing = True
            return
        self.is_closing = True
        for host_pool in self._host_pools.values():
            host_pool.close()
        self._nursery.cancel_scope.deadline = trio.current_time() + grace
        self._closed.set()
        await self._gone.wait()

    async def _sweep(self) -> None:
        """Check timeouts and rates, and close connections that have rested for too long."""
        interval = max(0.02, min(0.5, self.settings.clocks.shortest / 4))
        while True:
            await trio.sleep(interval)
            now = trio.current_time()
            for hop, host_pool in list(self._host_pools.items()):
                if host_pool.sweep(now):
                    del self._host_pools[hop]

    # ---- what host_pools use

    def start_connection(self, host_pool: HostPool, opening: _Opening) -> None:
        """Start a task for a connection."""
        assert self._nursery is not None
        self._nursery.start_soon(host_pool.run_connection, opening)

    def may_connect(self, host_pool: HostPool) -> bool:
        """Return whether a hop may have another connection now (rule 5)."""
        most = self.settings.connections
        if self.connections >= most:
            if not host_pool.has_connections:
                self._starved[host_pool] = None
            self._make_room(trio.current_time())
            return False
        waiting = len(self._starved) - (host_pool in self._starved)
        if host_pool.has_connections and self.connections + waiting >= most:
            return False
        self._starved.pop(host_pool, None)
        return True

    def _make_room(self, now: float) -> None:
        """Close a connection that rests, or one that is not opened, for a hop that has none."""
        if any(host_pool.retire_one() for host_pool in self._host_pools.values()) or not self._starved:
            return
        if sum(host_pool.cut for host_pool in self._host_pools.values()) >= len(self._starved):
            return
        slowest = max(self._host_pools.values(), key=HostPool.ungreeted)
        if slowest.ungreeted() <= 1:  # a hop that greets, and then says nothing, is as slow
            slowest = max(self._host_pools.values(), key=lambda host_pool: host_pool.longest_wait(now))
            if slowest.longest_wait(now) < _PATIENCE:
                return
        slowest.cut_oldest()

    def connection_ended(self) -> None:
        """Give the place of a closed connection to hops that have no connection."""
        self.connections -= 1
        starved, self._starved = self._starved, {}
        for host_pool in starved:
            if not self.is_closing:
                host_pool.dispatch(trio.current_time())

    async def context_for(self, hop: Hop, *, verify: bool) -> ssl.SSLContext | None:
        """Return the context for TLS with a hop; None if its policy is "none". Raise OSError."""
        if hop.tls.mode == "none" and not hop.tls.implicit:
            return None
        key = (verify, hop.tls.ca_file)
        context = self._contexts.get(key)
        if context is None:
            context = await trio.to_thread.run_sync(lambda: client_context(verify=key[0], ca_file=key[1]))
            self._contexts[key] = context
        return context


class _Opening:
    """A connection that is being opened."""

    def __init__(self, now: float, domain: str) -> None:
        self.since = now
        self.domain: Final = domain
        """The domain whose mail it is for, if connections are counted for reports."""
        self.scope = trio.CancelScope()
        self.connection: HopConnection | None = None
        """None until the socket is connected."""
        self.is_cut = False

    @property
    def has_greeted(self) -> bool:
        return self.connection is not None and self.connection.has_greeted


class HostPool:
    """The connections to one hop, and the jobs that wait for them."""

    def __init__(self, pool: Pool, hop: Hop) -> None:
        self.hop = hop
        self._pool = pool
        limits = self._limits = hop.limits
        self.breaker = Breaker(limits.breaker_failures, limits.breaker_pause, limits.breaker_longest)
        self.down_since = 0.0
        """Since when the breaker is open, in seconds since the epoch."""
        self.down_reason = ""
        self._lost_with = b""
        """Our header fields of the last message with which a connection was lost."""
        self._share = HopShare(pool.table, hop.name)
        self._messages = self._share.bucket("messages", limits.message_rate)
        self._connects = self._share.bucket("connections", limits.connection_rate)
        self._yielded_at = -math.inf
        self._queue: deque[Job] = deque()
        self._open: set[HopConnection] = set()
        """All connections with a socket, also those being opened."""
        self._resting: dict[HopConnection, None] = {}
        """Connections with nothing to do, the one that worked last at the end."""
        self._openings: dict[_Opening, None] = {}
        self._freeing = 0
        """Connections whose last job is being released, and which ask for the next one then."""
        self._resetting: set[HopConnection] = set()
        """Connections that ask for the next job when RSET is answered."""
        self._hold_until = -math.inf
        """Until when no further connection is tried."""
        self._used_at = trio.current_time()
        self._settings = self._configured = ClientSettings(
            hostname=pool.hostname,
            clocks=pool.settings.clocks,
            messages=limits.messages,
            recipients=limits.recipients,
            chunking=limits.chunking,
            smtputf8_downgrade=pool.smtputf8_downgrade,
        )
        self._learned_at = -math.inf

    # ---- jobs

    def submit(self, job: Job) -> None:
        """Queue a job. Raise NextHopUnavailable if the breaker is open, or too much is waiting already."""
        now = trio.current_time()
        if self.breaker.blocks(now):
            raise NextHopUnavailable(
                self.hop.name, "the hop has failed repeatedly and is not tried for a while", "4.4.1"
            )
        if len(self._queue) >= self._limits.queue:
            raise NextHopUnavailable(
                self.hop.name, f"{self._limits.queue} messages are waiting for it already", "4.3.2"
            )
        job.since = self._used_at = now
        self._queue.append(job)
        self.dispatch(now)

    def room(self, now: float) -> int:
        """See `Pool.room`."""
        if self.breaker.blocks(now):
            return 0
        busy = len(self._open) - len(self._resting)
        if self.breaker.is_open:
            return max(0, 1 - busy - len(self._queue))
        room = self._limits.connections * 2 - busy * 2 - len(self._queue)
        return max(0, min(room, self._messages.available(now)))

    def dispatch(self, now: float, spared: int = 0) -> None:
        """Give jobs to resting connections, and open others for the jobs that are left, except for `spared` ones."""
        resting = self._resting
        while self._queue and resting:
            connection, _ = resting.popitem()
            if not connection.begin():
                return  # the rate is used up; the connection rests again
        spared += self._freeing + len(self._resetting)
        while len(self._queue) - spared > len(self._openings) and self._may_connect(now):
            opening = _Opening(now, "" if self._pool.note_connection is None else self._next_domain())
            self._openings[opening] = None
            self._pool.connections += 1
            self._share.count(1)
            self.breaker.probe()
            self._pool.start_connection(self, opening)

    def _next_domain(self) -> str:
        """Return the domain of the job that another connection is for."""
        job = self._queue[min(len(self._openings), len(self._queue) - 1)]
        return job.envelope.recipients[0].path.domain if job.envelope.recipients else ""

    def _may_connect(self, now: float) -> bool:
        openings = len(self._openings)
        ready = len(self._open) - sum(each.connection is not None for each in self._openings)
        if self._pool.is_closing or ready + openings >= self._limits.connections:
            return False
        # `sweep` tells the other workers when there is no place, and leaves them the last one that it has freed.
        places = self._limits.connections - (now - self._yielded_at < _YIELD)
        if ready + openings + self._share.elsewhere >= places:
            return False
        if openings >= _SLOW_START + ready:
            return False
        if now < self._hold_until or self.breaker.blocks(now) or not self._messages.available(now):
            return False
        return self._pool.may_connect(self) and self._connects.take(now)

    def next_job(self) -> Job | None:
        """Return the next job, None if no job waits, or not yet."""
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
        if job.waiting and job.coming is not None:  # such a text can be read once only
            text = "the hop accepts these recipients in another transaction only"
            job.record_rest(Result(Outcome.DEFERRED, text, "4.5.3", self.hop.name, is_said=False))
        if job.waiting:
            self._queue.appendleft(job)  # it has waited for longest
            return
        self._freeing = 1  # `done` may submit another job, which the connection that has done this one takes
        try:
            job.finish()
        finally:
            self._freeing = 0

    def give_back(self, job: Job) -> None:
        """Take a job back that did not begin after all."""
        job.returns += 1
        if job.returns >= _MAX_RETURNS:
            text = "the hop closes each connection before it replies"
            job.record_rest(Result(Outcome.DEFERRED, text, "4.4.2", self.hop.name, is_said=False))
            job.finish()
        else:
            self._queue.appendleft(job)

    def reset(self, connection: HopConnection, *, is_done: bool) -> None:
        """Note that a connection waits for the reply to RSET, or that it has got it."""
        if is_done:
            self._resetting.discard(connection)
        else:
            self._resetting.add(connection)

    def rest(self, connection: HopConnection) -> None:
        """Note that a connection has nothing to do."""
        self._resting[connection] = None

    def give_up(self, reason: NextHopUnavailable) -> None:
        """Fail all jobs that wait."""
        while self._queue:
            self._queue.popleft().give_up(reason)

    def learned(self, *, recipients: int | None = None, no_chunking: bool = False) -> None:
        """Remember a limit of the hop for an hour."""
        if recipients is None and not no_chunking:
            return
        self._learned_at = trio.current_time()
        known = self._settings
        self._settings = msgspec.structs.replace(
            known, recipients=recipients or known.recipients, chunking=known.chunking and not no_chunking
        )

    # ---- connections

    @property
    def has_connections(self) -> bool:
        """A connection is open or being opened."""
        return bool(self._open or self._openings)

    @property
    def connections(self) -> int:
        """Connections that are open or being opened."""
        return len(self._open) + sum(each.connection is None for each in self._openings)

    def ungreeted(self) -> int:
        """Return how many connections wait for the socket or the greeting."""
        return sum(not each.has_greeted and not each.is_cut for each in self._openings)

    @property
    def cut(self) -> int:
        """Connections that are being closed for other hops."""
        return sum(each.is_cut for each in self._openings)

    def longest_wait(self, now: float) -> float:
        """Return how many seconds the oldest connection has been opening; -1 if none is."""
        return max((now - each.since for each in self._openings if not each.is_cut), default=-1.0)

    def cut_oldest(self) -> None:
        """Give up the connection that has been waiting for its greeting for longest, or else for another reply."""
        left = [opening for opening in self._openings if not opening.is_cut]
        oldest = next((opening for opening in left if not opening.has_greeted), left[0])
        oldest.is_cut = True
        oldest.scope.cancel()

    async def run_connection(self, opening: _Opening) -> None:
        """Be the task of one connection: connect, do jobs, close. A bug costs this connection and no other."""
        try:
            connection: HopConnection | None = None
            try:
                with opening.scope:
                    connection = await self._connect(opening)
            finally:
                del self._openings[opening]
            if connection is None:
                self._fail(NextHopUnavailable(self.hop.name, "it is slow, and other hops are waiting for a connection"))
            else:
                await self._serve(connection)
        except NextHopUnavailable as exc:
            self._fail(exc)
        except Exception as exc:  # noqa: BLE001 - whatever it is
            if self._pool.journal is not None:
                self._pool.journal.error(0, "relay", exc)
            self._fail(NextHopUnavailable(self.hop.name, "an internal error", "4.3.0"))
        finally:
            self.breaker.abandon()
            self._share.count(-1)
            self._pool.connection_ended()
            self._go_on()

    def _go_on(self) -> None:
        """Serve the jobs that wait when a connection has ended."""
        if not self._pool.is_closing:
            self.dispatch(trio.current_time())
        elif not self._open and not self._openings:
            self.give_up(NextHopUnavailable(self.hop.name, "the relay is stopping", "4.3.2"))

    async def _connect(self, opening: _Opening) -> HopConnection:
        """Return a connection that is ready for its first transaction. Raise NextHopUnavailable.

        If TLS fails where it is optional, one attempt is made without it. If the certificate of a hop is verified on
        trial only, one attempt is made before with any certificate.
        """
        verify = self.hop.tls.mode == "verify"
        try:
            connection = await self._open_tls(opening, verify=verify or self.hop.is_testing)
        except NextHopUnavailable as exc:
            self._note_connection(opening, exc.tls_failure, exc.text)
            if not isinstance(exc, HandshakeError):
                raise
            failure = exc
        else:
            self._note_connection(opening, "" if connection.is_encrypted else "starttls-not-supported", "")
            return connection
        if self.hop.is_testing:
            try:
                return await self._open_tls(opening, verify=False)
            except HandshakeError as exc:
                failure = exc
        if self.hop.tls.mode != "opportunistic" or self.hop.tls.implicit:
            raise failure
        text = failure.text
        try:
            stream = await self._open_socket()
            return await self._open_session(stream, opening, None, is_fallback=True)
        except NextHopUnavailable as exc:
            raise NextHopUnavailable(
                self.hop.name, f"{exc.text} (without TLS, after: {text})", _temporary(exc.status)
            ) from exc

    async def _open_tls(self, opening: _Opening, *, verify: bool) -> HopConnection:
        """Connect, with TLS as the policy of the hop says. Raise NextHopUnavailable."""
        try:
            context = await self._pool.context_for(self.hop, verify=verify)
        except OSError as exc:
            raise NextHopUnavailable(self.hop.name, _why(exc)) from exc
        return await self._open_session(await self._open_socket(), opening, context)

    def _note_connection(self, opening: _Opening, failure: str, reason: str) -> None:
        """Count a connection for reports; one that failed for another reason than TLS is not counted."""
        note, hop = self._pool.note_connection, self.hop
        if note is None or hop.path or not hop.is_reported or (reason and not failure):
            return
        if not failure:
            note(hop, opening.domain, None)
            return
        source = self._pool.settings.source or source_address(hop.address)
        note(hop, opening.domain, Failure(failure, source, hop.host, hop.address, reason))

    async def _open_session(
        self, stream: SocketStream, opening: _Opening, context: ssl.SSLContext | None, *, is_fallback: bool = False
    ) -> HopConnection:
        connection = HopConnection(self.hop, stream, self, self._settings, is_fallback=is_fallback)
        opening.connection = connection
        self._open.add(connection)
        is_ready = False
        try:
            await connection.open(context)
            is_ready = True
        finally:
            if not is_ready:
                opening.connection = None
                self._open.discard(connection)
                connection.end("it was not opened")
        return connection

    async def _open_socket(self) -> SocketStream:
        """Connect. Raise NextHopUnavailable."""
        hop, poller, source = self.hop, self._pool.poller, self._pool.settings.source
        try:
            with trio.fail_after(self._pool.settings.clocks.connect):
                if hop.path:
                    return await connect_unix(hop.path, poller)
                return await connect_tcp(hop.address or hop.host, hop.port, poller, source=source)
        except trio.TooSlowError as exc:
            raise NextHopUnavailable(hop.name, "connecting took too long") from exc
        except OSError as exc:
            raise NextHopUnavailable(hop.name, _why(exc)) from exc

    async def _serve(self, connection: HopConnection) -> None:
        cause: BaseException | str = "the relay is stopping"
        if self._pool.is_closing:
            connection.retire()
        else:
            self.dispatch(trio.current_time(), spared=1)  # the first job is for this connection
        try:
            await connection.serve()
        except (LostError, ClosingError) as exc:
            cause = exc
            # A connection lost during a text counts against the message: it may be the reason. So does one that is lost
            # with the same message again, before its text; but once the breaker is open, the hop has failed others too.
            if connection.is_busy and not connection.transactions and not connection.is_sending_text:
                lost_with = connection.current_prefix
                if not lost_with or lost_with != self._lost_with or self.breaker.is_open:
                    self._lost_with = lost_with
                    self._count_failure(str(exc))
        except BodyError as exc:
            cause = exc
        finally:
            self._open.discard(connection)
            self._resting.pop(connection, None)
            self._resetting.discard(connection)
            connection.end(cause)

    def worked(self) -> None:
        """Note that the hop has answered a whole transaction."""
        if self.breaker.succeeded() and self._pool.journal is not None:
            self._pool.journal.hop_up(self.hop.name)

    def _fail(self, reason: NextHopUnavailable) -> None:
        """Note that a connection could not be opened."""
        if self._open:
            self._hold_until = trio.current_time() + _HOLD  # it works with those it has, and wants no more
            return
        self._count_failure(reason.text)
        if not self._openings:
            self.give_up(reason)  # rule 2

    def _count_failure(self, text: str) -> None:
        now = trio.current_time()
        if not self.breaker.is_open:
            self.down_since = round(time.time(), 3)  # once: operators see the same time until the hop works again
        if not self.breaker.failed(now):
            return
        self.down_reason = text
        if self._pool.journal is not None:
            self._pool.journal.hop_down(self.hop.name, text, round(self.breaker.until - now, 1))

    def retire_one(self) -> bool:
        """Close a connection that rests. Return False if no connection rests."""
        for connection in self._resting:
            del self._resting[connection]
            connection.retire()
            return True
        return False

    def _yield(self, now: float) -> None:
        """Close a connection, after its transaction, for a worker that has none, if the hop allows no more."""
        if len(self._open) + self._share.elsewhere < self._limits.connections:
            return
        self._yielded_at = now
        if not self.retire_one():
            for connection in self._open:
                connection.retire()
                return

    def close(self) -> None:
        """Close all connections, each after its transaction."""
        self.give_up(NextHopUnavailable(self.hop.name, "the relay is stopping", "4.3.2"))
        for connection in list(self._open):
            connection.retire()
        self._resting.clear()

    def sweep(self, now: float) -> bool:
        """Check timeouts and the queue. Return True if the hop can be forgotten."""
        for connection in list(self._open):
            connection.check_clock(now)
        while self._resting:
            connection = next(iter(self._resting))  # the one that has rested for longest
            if now - connection.resting_since < self._limits.idle:
                break
            self.retire_one()
        while self._queue and now - self._queue[0].since > self._limits.wait:
            text = f"no connection was free for {self._limits.wait:.0f} s"
            self._queue.popleft().give_up(NextHopUnavailable(self.hop.name, text, "4.4.5"))
        self._share.want(bool(self._queue) and not self.has_connections and not self._pool.is_closing)
        if self._share.is_wanted and now - self._yielded_at >= _YIELD:
            self._yield(now)
        if now - self._learned_at > _FORGOTTEN:
            self._settings = self._configured
        if self._queue and not self._pool.is_closing:
            self.dispatch(now)
        if self._open or self._openings or self._queue:
            self._used_at = now
            return False
        return now - self._used_at > _FORGOTTEN and now >= self.breaker.until


def _ignore(_: Delivered | NextHopUnavailable) -> None:
    """Take an outcome that is read from the job."""


def _temporary(status: str) -> str:
    return status if status.startswith("4") else "4.7.5"


def _why(exc: OSError) -> str:
    """Return why connecting failed, in a few words; if several addresses were tried, why the first failed."""
    cause = exc.__cause__
    if isinstance(cause, BaseExceptionGroup) and isinstance(cause.exceptions[0], OSError):
        exc = cause.exceptions[0]
    return exc.strerror or str(exc) or type(exc).__name__
