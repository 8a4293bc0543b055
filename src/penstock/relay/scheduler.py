"""Decides which message goes where, and when: from the spool, or from the clients, to next hops or into mailboxes.

    SpoolDelivery --offer--> DomainQueue --round robin--> RouteQueue --dispatch--> Pool --done--> AttemptRecorder
                      Spool --take--^

A `DomainQueue` is the mail of a domain. A `RouteQueue` is the set of next hops it goes to: domains with the same next
hops share it, and the recipients of a message that have the same next hops are offered to them together, at every try.
No message has a task of its own: an offer begins an attempt, the reply of the hop ends it and begins the next one.

Rules
-----
1. An attempt is recorded before it is made: whatever is in a domain queue here is written in the spool as being
   attempted. After a crash it is due again.
2. Fair: the domain queues of a route take turns, one message each; within one, fresh mail and old mail take turns; no
   route waits for another one.
3. What is in memory is bounded, in messages and octets. Beyond half of it, or of the share of its queue, a new message
   is left in the spool, and taken when there is space: the other half is for those.
4. What a hop defers, and has certainly not accepted, is offered to the next one in the same attempt (RFC 5321 5.1).
5. Hops that are down cost nothing: their mail is put off in batches, a few of them per minute, each message by its own
   schedule, so that delays, notices and bounces are the same as for any other. If an operator asks for a try, one is
   made.
6. A bug in one delivery costs that message a delay and a line in the journal, and does not affect any other.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from functools import partial
from typing import Annotated, Final, Literal, Protocol

import msgspec
import outcome
import trio

from penstock.dns.exchangers import ResolveError
from penstock.journal import Journal
from penstock.message import Body, Message, Recipient
from penstock.relay.attempt import Attempt
from penstock.relay.backoff import RetrySettings
from penstock.relay.bounce import ReportSettings
from penstock.relay.hop import Hop, NextHopUnavailable, Outcome, Result
from penstock.relay.pool import Pool, PoolSettings
from penstock.relay.queues import FIRST_WINDOW, DomainQueue, RouteQueue
from penstock.relay.recorder import PLACES, AttemptRecorder
from penstock.relay.route import Route, Routes, domain_of_queue
from penstock.relay.tlspolicy import RelayTlsSettings
from penstock.reply import Reply
from penstock.spool.bodies import StoredBody
from penstock.spool.clock import PUT_OFF, Ages, ClockGuard, steady_time
from penstock.spool.entry import ClockJump, Entry, HopState
from penstock.spool.queue import DurableQueue

_TAKERS: Final = 4
"""Tasks that take mail from the spool."""
_RESOLVING: Final = 50
"""Concurrent DNS look-ups."""
_CLAIM: Final = 600.0
"""Seconds for which a queue in memory is not found due again: the scheduler knows what it has."""
_ROUTE_LIFETIME: Final = 60.0
"""Seconds after which the route of a queue is looked up again; the resolver caches by TTL."""
_DNS_PAUSE: Final = 60.0
"""Seconds for which a queue rests after its look-up failed temporarily."""
_SWEEP: Final = 500
"""Messages of a queue whose hops are down that are put off at a time..."""
_SWEEP_PAUSE: Final = 5.0
"""...and the seconds between two such batches."""
_STALL: Final = 0.1
"""Seconds after which a route that has to wait for its rate limit is dispatched again."""
_LONGEST_SLEEP: Final = 5.0
"""Seconds after which the spool is searched in any case: another process may have changed what is due."""
_SHORTEST_SLEEP: Final = 0.02
_BUG_PAUSE: Final = 300.0
"""Seconds until a message is tried again whose result could not be recorded."""
_OURS: Final = Result(Outcome.DEFERRED, "internal error", "4.3.0", "", is_said=False)
_DOWN: Final = Result(Outcome.DEFERRED, "the next hop is down", "4.4.1", "", is_said=False)
_IDLE: Final = 30.0
"""Seconds after which a queue with nothing to do is forgotten."""
_QUEUES_AT_A_TIME: Final = 100
_MAX_QUEUES: Final = 20_000
"""Domain queues in memory. Those beyond wait in the spool; the one that has been due for longest is next."""
_MAX_HOPS_SHOWN: Final = 1000
"""Next hops that are backing off and are shown to operators."""


class RelaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The relay: delivery from the spool to next hops."""

    memory_messages: Annotated[
        int,
        msgspec.Meta(
            ge=10, le=1_000_000, description="Messages in memory that are being delivered; the others wait on disk"
        ),
    ] = 4000
    memory_octets: Annotated[
        int, msgspec.Meta(ge=1 << 20, le=1 << 40, description="Octets of messages in memory that are being delivered")
    ] = 67_108_864
    local_writers: Annotated[
        int, msgspec.Meta(ge=1, le=1024, description='Messages that a route to "maildir" delivers at a time')
    ] = 512
    smtputf8_downgrade: Annotated[
        Literal["refuse", "send"],
        msgspec.Meta(
            description="For a header that needs SMTPUTF8 and a next hop that does not offer it. "
            "refuse: return with 5.6.7 (RFC 6531 3.2); send: send it unchanged"
        ),
    ] = "refuse"
    retry: RetrySettings = RetrySettings()
    reports: ReportSettings = ReportSettings()
    pool: PoolSettings = PoolSettings()
    tls: RelayTlsSettings = RelayTlsSettings()


class LocalDelivery(Protocol):
    """Delivery into mailboxes on this machine; see penstock.delivery.base."""

    def deliver_later(self, message: Message, done: Callable[[outcome.Outcome[Reply]], None]) -> None:
        """Deliver to all recipients, or to none of them, then call `done` in the trio thread."""


class Scheduler:
    """Runs the relay. `offer` is for those who put messages into the spool."""

    def __init__(
        self,
        settings: RelaySettings,
        spool: DurableQueue,
        pool: Pool,
        routes: Routes,
        recorder: AttemptRecorder,
        journal: Journal,
        *,
        local: LocalDelivery | None = None,
        clock: Callable[[], float] = time.time,
        steady_clock: Callable[[], float] = steady_time,
        random_source: random.Random | None = None,
    ) -> None:
        """`local` is for routes to "maildir". `clock` returns seconds since the epoch, `steady_clock` is never set."""
        self.pool = pool
        self.spool = spool
        self.journal = journal
        self.recorder = recorder
        self.domain_of: Callable[[Recipient], str] = routes.domain_of
        """Returns the domain whose queue a recipient waits in."""
        self.suspended: frozenset[str] = frozenset()
        """Domains and hops that an operator suspended."""
        self._settings = settings
        self._routes = routes
        self._local = local
        self._clock = clock
        self._ages = Ages(spool, ClockGuard(clock, steady_clock))
        self._random = random_source or random.Random()  # noqa: S311 - it spreads load, it hides nothing
        self._queues: dict[str, DomainQueue] = {}
        self._route_queues: dict[Hashable, RouteQueue] = {}
        self._unavailable: dict[Hop, tuple[float, str]] = {}
        """Hops that failed, since when, and why."""
        self.held = 0
        """Messages in memory, waiting or being delivered."""
        self._octets = 0
        self._claimed = 0
        self._claimed_octets = 0
        """Memory reserved for messages that are being put into the spool, or taken from it."""
        self.is_running = False
        self._has_space = trio.Event()
        self._look = trio.Event()
        self._looks_at = 0.0
        """When the spool is searched again, in seconds since the epoch."""
        self._paused: set[DomainQueue] = set()
        """Queues with something due that wait for `resume_at`."""
        self._stalled: set[RouteQueue] = set()
        """Routes whose hops accept nothing now, although nothing is in flight: a rate limit."""
        self._wanted, self._to_take = trio.open_memory_channel[DomainQueue](math.inf)
        self._resolving = trio.CapacityLimiter(_RESOLVING)
        self._nursery: trio.Nursery | None = None
        self._evicted_at = 0.0

    # ---- for those who put messages into the spool

    def reserve(self, queues: Sequence[str], octets: int) -> bool:
        """Return whether a message for these queues would be attempted at once, so that it need not be read back.

        If so, memory is reserved for it: call `release` before `offer`, or when the message could not be put.
        """
        settings = self._settings
        most = settings.memory_messages // 2
        if not self.is_running or self.held >= most or self._octets + octets > settings.memory_octets // 2:
            return False
        if self._is_full(octets):
            return False
        if self.recorder.waiting > settings.memory_messages:
            return False
        share = max(FIRST_WINDOW, most // (2 + len(self._queues) // 16))
        for name in queues:
            queue = self._queues.get(name)
            if queue is not None and (queue.is_down or queue.is_suspended or len(queue.fresh) >= share):
                return False
        if self.suspended and not self.suspended.isdisjoint(queues):
            return False
        self._claim(1, octets)
        return True

    def release(self, octets: int) -> None:
        """Give back what `reserve` has reserved."""
        self._claim(-1, -octets)

    def are_mailboxes(self, queues: Sequence[str]) -> bool:
        """Return whether all mail of these queues is for mailboxes here, which may be written to now."""
        if self.suspended and not self.suspended.isdisjoint(queues):
            return False
        for name in queues:
            route = self._routes.static_route(name)
            if route is None or not route.is_local:
                return False
        return True

    def note_delivered(self, message: Message, queues: Sequence[str], reply: Reply) -> None:
        """Journal and count a message that was written to the mailboxes of its recipients. Does not raise."""
        age = self._clock() - message.received_at
        try:
            if self.recorder.on_result is not None:
                for name in queues:
                    self.recorder.on_result(name, PLACES[Outcome.DELIVERED], 1, age)
            self.journal.delivered(message.id, message.envelope.recipients, "", _text_of(reply), 1, age)
        except Exception as exc:  # noqa: BLE001 - rule 6
            self.journal.error(0, "relay", exc)

    def offer(self, entries: Sequence[Entry]) -> None:
        """Attempt entries that were put as taken; recipients with the same route are attempted together."""
        for entry in entries if len(entries) == 1 else self._by_route(entries):
            queue = self._queue(entry.queue)
            self._hold(queue.fresh, entry)
            self._serve(queue)

    def _by_route(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return the entries of a message, joined where their routes are known to be the same."""
        joined: dict[Hashable, Entry] = {}
        for entry in entries:
            key = self._route_key(entry.queue)
            if key is None:
                key = ("unknown", entry.queue)
            first = joined.get(key)
            if first is None:
                joined[key] = entry
                continue
            recipients = (*first.envelope.recipients, *entry.envelope.recipients)
            envelope = first.envelope._replace(recipients=recipients)
            joined[key] = first._replace(envelope=envelope, rows=(*first.rows, *entry.rows))
            entry.body.close()
        return list(joined.values())

    def _route_key(self, name: str) -> Hashable | None:
        """Return the key of the route of a queue, None if it has to be looked up. Called in any thread."""
        key = self._routes.static_key(name)
        if key is None:
            queue = self._queues.get(name)
            if queue is not None and queue.route_queue is not None:
                return queue.route_queue.route.key
        return key

    def became_due(self, queues: Sequence[str]) -> None:
        """Note queues that have something due in the spool."""
        for name in set(queues):
            if name in self._queues or len(self._queues) < _MAX_QUEUES:
                self._note_due(name)

    # ---- the life of the scheduler

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Relay until cancelled. The spool is open, the pool and the recorder run."""
        self.spool.became_due = self.became_due
        self.recorder.on_put_off = self._expect
        self.recorder.before_expiry = self.notice_clock
        await self._reschedule()  # the clock may have been set while the server did not run
        async with trio.open_nursery() as self._nursery:
            self.is_running = True
            self._nursery.start_soon(self._routes.resolve_all)
            for _ in range(_TAKERS):
                self._nursery.start_soon(self._keep_taking)
            task_status.started()
            await self._keep_looking()

    def stop(self) -> None:
        """Start nothing any more. What is in flight continues."""
        self.is_running = False

    def close(self) -> None:
        """Return entries that were not started to the spool. The pool is closed: no delivery is in progress."""
        self.is_running = False
        for queue in self._queues.values():
            self._give_back(queue)

    def give_back(self, entry: Entry) -> None:
        """Return an entry that was withdrawn to the spool, due now."""
        self.recorder.give_back(entry, self._clock())

    def _give_back(self, queue: DomainQueue) -> None:
        """Return what waits in a queue to the spool, as if it had not been taken."""
        self._leave_round_robin(queue)
        now = self._clock()
        for entry in (*queue.old, *queue.fresh):
            self._release(entry)
            self.recorder.give_back(entry, now)
            queue.has_due = True
        queue.old.clear()
        queue.fresh.clear()

    # ---- domain queues

    def _queue(self, name: str) -> DomainQueue:
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = DomainQueue(name)
            queue.is_suspended = domain_of_queue(name) in self.suspended
        queue.used_at = trio.current_time()
        return queue

    def _hold(self, waiting: deque[Entry], entry: Entry) -> None:
        for recipient in entry.envelope.recipients:
            if not recipient.path.domain:
                entry = self._qualified(entry)
                break
        waiting.append(entry)
        self.held += 1
        self._octets += entry.size

    def _qualified(self, entry: Entry) -> Entry:
        """Return an entry whose recipients all have a domain (RFC 5321 4.1.1.3: <Postmaster> need not have one)."""
        recipients = tuple(map(self._routes.qualified, entry.envelope.recipients))
        return entry._replace(envelope=entry.envelope._replace(recipients=recipients))

    def _release(self, entry: Entry) -> None:
        self.held -= 1
        self._octets -= entry.size
        if not self._has_space.is_set():
            self._has_space.set()

    def _claim(self, messages: int, octets: int) -> None:
        """Reserve memory; release it if the numbers are negative."""
        self._claimed += messages
        self._claimed_octets += octets
        if messages < 0 and not self._has_space.is_set():
            self._has_space.set()

    def _is_full(self, octets: int) -> bool:
        """Return whether there is no space for another message of this size, with what is reserved."""
        settings = self._settings
        return (
            self.held + self._claimed >= settings.memory_messages
            or self._octets + self._claimed_octets + octets > settings.memory_octets
        )

    def _note_due(self, name: str, *, is_asked_for: bool = False) -> None:
        queue = self._queue(name)
        queue.has_due = True
        if is_asked_for:  # an operator wants a try now, whatever the DNS said before
            queue.resume_at = -math.inf
            queue.route_until = -math.inf
            self._paused.discard(queue)
        self._want(queue)

    def _serve(self, queue: DomainQueue) -> None:
        """Make sure that the messages of a queue are dispatched."""
        route_queue = queue.route_queue
        if route_queue is None or trio.current_time() >= queue.route_until:
            route_queue = self._find_route_queue(queue)
            if route_queue is None:
                return
        if queue.is_suspended:
            self._give_back(queue)
            return
        if not queue.in_round_robin and (queue.fresh or queue.old):
            queue.in_round_robin = True
            route_queue.waiting.append(queue)
        if not route_queue.is_dispatching:
            self._dispatch(route_queue)

    def _leave_round_robin(self, queue: DomainQueue) -> None:
        if queue.in_round_robin:
            assert queue.route_queue is not None
            queue.route_queue.waiting.remove(queue)
            queue.in_round_robin = False

    # ---- routes

    def _find_route_queue(self, queue: DomainQueue) -> RouteQueue | None:
        """Return the route of a queue; None while it is being looked up."""
        route = self._routes.static_route(queue.name)
        if route is not None:
            return self._set_route(queue, route)
        if not queue.is_resolving and self._nursery is not None:
            queue.is_resolving = True
            self._nursery.start_soon(self._resolve, queue)
        return None

    def _set_route(self, queue: DomainQueue, route: Route) -> RouteQueue:
        route_queue = self._route_queues.get(route.key)
        if route_queue is None:
            route_queue = RouteQueue(route, self._settings.local_writers, self.suspended)
            self._route_queues[route.key] = route_queue
        elif route_queue.route is not route:
            route_queue.set_route(route, self._settings.local_writers)
        if queue.route_queue is not route_queue:
            self._leave_round_robin(queue)
        queue.route_queue, queue.route_until = route_queue, trio.current_time() + _ROUTE_LIFETIME
        queue.is_suspended = domain_of_queue(queue.name) in self.suspended or route_queue.is_suspended
        return route_queue

    async def _resolve(self, queue: DomainQueue) -> None:
        """Look up the route of a queue."""
        try:
            async with self._resolving:
                route = await self._find_route(queue)
        except ResolveError as exc:
            kind = Outcome.FAILED if exc.is_permanent else Outcome.DEFERRED
            self._fail_queue(queue, Result(kind, exc.text, exc.status, "", is_said=False))
        except Exception as exc:  # noqa: BLE001 - rule 6
            self.journal.error(0, "resolver", exc)
            self._fail_queue(queue, Result(Outcome.DEFERRED, "DNS lookup failed", "4.4.3", "", is_said=False))
        else:
            queue.is_resolving = False
            self._set_route(queue, route)
            self._serve(queue)

    async def _find_route(self, queue: DomainQueue) -> Route:
        """Return the route of a queue. An answer of routes that were replaced meanwhile does not count."""
        while True:
            queue.is_rerouted = False
            try:
                route = await self._routes.find_route(queue.name)
            except Exception:
                if not queue.is_rerouted:
                    raise
            else:
                if not queue.is_rerouted:
                    return route

    def _fail_queue(self, queue: DomainQueue, result: Result) -> None:
        """End all that waits in a queue without a route."""
        queue.is_resolving = False
        if result.kind is Outcome.DEFERRED:
            queue.is_down = True
            queue.resume_at = trio.current_time() + _DNS_PAUSE
        self._end_all(queue, result)

    def _end_all(self, queue: DomainQueue, result: Result, *, is_backing_off: bool = False) -> None:
        """End what waits in a queue with one result for all, and continue with what the spool has of it."""
        self._leave_round_robin(queue)
        for entry in (*queue.old, *queue.fresh):
            self._release(entry)
            self.recorder.record(entry, [result] * len(entry.rows), is_backing_off=is_backing_off)
        queue.old.clear()
        queue.fresh.clear()
        self._want(queue)

    # ---- attempts

    def _dispatch(self, route_queue: RouteQueue) -> None:
        """Start as many attempts as there is capacity for. The domain queues take turns."""
        route_queue.is_dispatching = True
        waiting = route_queue.waiting
        try:
            while waiting and self.is_running:
                capacity = route_queue.capacity(self.pool)
                if capacity <= 0:
                    break
                for _ in range(min(capacity, len(waiting))):
                    queue = waiting.popleft()
                    entry = queue.pop()
                    if queue.fresh or queue.old:
                        waiting.append(queue)
                    else:
                        queue.in_round_robin = False
                    if queue.has_due and not queue.is_wanted:
                        self._want(queue)
                    self._start(route_queue, entry)
        finally:
            route_queue.is_dispatching = False
        if waiting and not route_queue.in_flight and self.is_running:
            if route_queue.is_down(self.pool, trio.current_time()) and not self._is_asked_to_try(route_queue):
                self._put_off(route_queue)
            else:
                self._stalled.add(route_queue)
                self._expect(self._clock() + _STALL)

    def _is_asked_to_try(self, route_queue: RouteQueue) -> bool:
        """Return whether hops that are backing off are tried now: they have not failed since an operator asked.

        So a request for a hundred thousand messages costs a dead hop one connection.
        """
        asked_at = max((entry.asked_at for queue in route_queue.waiting for entry in queue.old), default=0.0)
        age = self._clock() - asked_at
        return asked_at > 0 and route_queue.try_again(self.pool, trio.current_time() - age)

    def _start(self, route_queue: RouteQueue, entry: Entry) -> None:
        route_queue.in_flight += 1
        route = route_queue.route
        if entry.rows[0].attempts > 1 and self.journal.logs_mail:
            name = "maildir" if route.is_local else (route_queue.only or route.first)[0].name
            self.journal.attempted(entry.id, entry.envelope.recipients, name, entry.rows[0].attempts)
        if route.is_local:
            self._deliver_locally(route_queue, entry)
            return
        hops: Sequence[Hop] = route_queue.only or route.order(self._random)
        if route_queue.suspended:
            hops = [hop for hop in hops if not route_queue.is_hop_suspended(hop)]
        Attempt(self, route_queue, entry, hops).offer()

    def note_available(self, hop: Hop) -> None:
        """Note that a hop has answered a message."""
        if self._unavailable:
            self._unavailable.pop(hop, None)

    def note_unavailable(self, hop: Hop, reason: NextHopUnavailable) -> None:
        """Note why a hop could not be used."""
        if hop in self._unavailable:
            since, _ = self._unavailable[hop]
            self._unavailable[hop] = (since, reason.text)
        elif len(self._unavailable) < _MAX_HOPS_SHOWN:
            self._unavailable[hop] = (self._clock(), reason.text)

    def hops_down(self) -> Iterator[HopState]:
        """Yield the next hops that are backing off, at most `_MAX_HOPS_SHOWN`.

        Nothing changes from one call to the next while nothing happens: what has changed is written to the spool.
        """
        offset = self._clock() - trio.current_time()
        for hop, (since, reason) in list(self._unavailable.items()):
            until = self.pool.down_until(hop)
            if until:
                yield HopState(hop.name, since, round(offset + until), reason)
            else:
                del self._unavailable[hop]
        left = _MAX_HOPS_SHOWN - len(self._unavailable)
        for hop, since, reason in self.pool.hops_down():  # those that no attempt has found unavailable
            if left <= 0:
                break
            if hop not in self._unavailable:
                left -= 1
                yield HopState(hop.name, since, round(offset + self.pool.down_until(hop)), reason)

    def sent(self, route_queue: RouteQueue, entry: Entry, results: Sequence[Result], *, is_final: bool) -> None:
        """Record the results of a message that a hop has answered."""
        route_queue.note_success()
        queue = self._queues.get(entry.queue)
        if queue is not None:
            queue.is_down = False
        self._end(route_queue, entry, results, is_final=is_final)

    def not_sent(self, route_queue: RouteQueue, entry: Entry, reason: NextHopUnavailable) -> None:
        """Record that no hop was available for a message."""
        if self.is_running:
            route_queue.note_failure(reason)
            self._end(route_queue, entry, [reason.as_result()] * len(entry.rows))
        else:
            route_queue.in_flight -= 1
            self._release(entry)
            self.recorder.give_back(entry, self._clock())  # we are stopping; the hop is not to blame

    def broke(self, route_queue: RouteQueue, entry: Entry, exc: Exception) -> None:
        """Record a bug in an attempt: it counts as one, and is made again."""
        self.journal.error(0, "relay", exc)
        self._end(route_queue, entry, [_OURS] * len(entry.rows))

    def _end(self, route_queue: RouteQueue, entry: Entry, results: Sequence[Result], *, is_final: bool = False) -> None:
        route_queue.in_flight -= 1
        self._release(entry)
        try:
            self.recorder.record(entry, results, is_final=is_final, is_stopping=not self.is_running)
        except Exception as exc:  # noqa: BLE001 - rule 6
            self.journal.error(0, "relay", exc)
            self.recorder.defer(entry, self._clock() + _BUG_PAUSE)
        if not route_queue.is_dispatching and route_queue.waiting:
            self._dispatch(route_queue)

    def _put_off(self, route_queue: RouteQueue) -> None:
        """Put off all that waits for hops that are down, each message as if it had been tried."""
        result = _DOWN if route_queue.reason is None else route_queue.reason.as_result()
        resume_at = trio.current_time() + _SWEEP_PAUSE
        for queue in list(route_queue.waiting):
            queue.is_down = True
            queue.resume_at = resume_at
            self._end_all(queue, result, is_backing_off=route_queue.reason is not None)

    def _deliver_locally(self, route_queue: RouteQueue, entry: Entry) -> None:
        """Deliver a message into mailboxes. What has been begun is finished, also when the relay is cancelled."""
        assert self._local is not None
        message = Message(entry.id, entry.envelope, entry.prefix, entry.body, entry.received_at)
        done = partial(self._delivered_locally, route_queue, entry)
        try:
            self._local.deliver_later(message, done)
        except Exception as exc:  # noqa: BLE001 - rule 6
            done(outcome.Error(exc))

    def _delivered_locally(self, route_queue: RouteQueue, entry: Entry, result: outcome.Outcome[Reply]) -> None:
        """Record what became of a message. Does not raise: others of the same batch follow."""
        if isinstance(result, outcome.Error):  # errors of our disk are not reported to senders
            self.journal.error(0, "maildir", result.error)
            ended = Result(Outcome.DEFERRED, "the mailbox cannot be written", "4.2.0", "", is_said=False)
        else:
            reply = result.unwrap()
            kind = Outcome.DELIVERED if reply.accepts else Outcome.FAILED if reply.is_permanent else Outcome.DEFERRED
            status = reply.status or f"{reply.code // 100}.0.0"
            ended = Result(kind, _text_of(reply), status, "", is_said=False)
        try:
            self.sent(route_queue, entry, [ended] * len(entry.rows), is_final=True)
        except Exception as exc:  # noqa: BLE001 - rule 6
            self.journal.error(0, "relay", exc)

    # ---- what operators ask for (see relay/operators.py)

    def withdraw(self, rows: Collection[int]) -> list[Entry]:
        """Remove recipients that only wait in memory. Return them as entries; what is in flight is not touched."""
        found: list[Entry] = []
        for queue in self._queues.values():
            for waiting in (queue.fresh, queue.old):
                for entry in list(waiting):
                    taken = [place for place, row in enumerate(entry.rows) if row.number in rows]
                    if not taken:
                        continue
                    found.append(_part(entry, taken)._replace(body=_copy(entry.body)))
                    index = waiting.index(entry)
                    del waiting[index]
                    left = [place for place, row in enumerate(entry.rows) if row.number not in rows]
                    if left:
                        waiting.insert(index, _part(entry, left))
                    else:
                        self._release(entry)
            if not len(queue):
                self._leave_round_robin(queue)
        return found

    def set_suspended(self, names: frozenset[str]) -> None:
        """Suspend these domains and next hops, and resume all others."""
        self.suspended = names
        for route_queue in self._route_queues.values():
            route_queue.suspended = names
        for queue in list(self._queues.values()):
            was_suspended = queue.is_suspended
            route_queue_of = queue.route_queue
            is_suspended = route_queue_of is not None and route_queue_of.is_suspended
            queue.is_suspended = is_suspended or domain_of_queue(queue.name) in names
            if queue.is_suspended:
                self._give_back(queue)
            elif was_suspended:
                self._want(queue)
        # A message for several domains of one route waits as one entry, in the queue of one of them.
        rows = [row for queue in self._queues.values() for entry in (*queue.old, *queue.fresh) for row in entry.rows]
        for entry in self.withdraw({row.number for row in rows if domain_of_queue(row.queue) in names}):
            for row in entry.rows:
                self._queue(row.queue).has_due = True
            self.give_back(entry)

    def reroute(self) -> None:
        """The routes were replaced: look them up again for all mail whose attempt has not begun.

        It is taken from the spool again, because a message for several domains waits once if they had one route.
        """
        for queue in self._queues.values():
            self._give_back(queue)
            queue.route_queue, queue.route_until, queue.resume_at = None, -math.inf, -math.inf
            queue.is_rerouted, queue.is_down = queue.is_resolving, False
            queue.is_suspended = domain_of_queue(queue.name) in self.suspended
            self._paused.discard(queue)
        self._route_queues.clear()
        self._stalled.clear()
        if self._nursery is not None:
            self._nursery.start_soon(self._routes.resolve_all)
        for queue in self._queues.values():
            self._want(queue)

    def use_settings(self, settings: RelaySettings) -> None:
        """Use other limits of memory and mailboxes from now on."""
        self._settings = settings
        for each in self._route_queues.values():
            if each.route.is_local:
                each.set_route(each.route, settings.local_writers)

    async def leads_to(self, domain: str, hop: str) -> bool:
        """Return whether mail for a domain may go to a next hop, named by its host or its full name."""
        route = self._routes.static_route(domain)
        if route is None:
            try:
                route = await self._routes.find_route(domain)
            except ResolveError:
                return False
        return any(hop in (each.host.lower(), each.name.lower()) for each in route.hops())

    def notice_clock(self) -> None:
        """Notice when the clock was set. Nothing expires before the ages are right; called before anything does."""
        jump = self._ages.notice()
        if jump is not None:
            if jump.seconds > 0:
                self.journal.clock_jumped(jump.seconds, 0)
            self._look.set()
        if self._ages.are_wrong:
            self.recorder.backoff.put_off(self._clock() + PUT_OFF)

    async def check_clock(self) -> None:
        """Notice when the clock was set, and correct the spool: nothing waits for days, and nothing gets older.

        Raise OSError or sqlite3.Error; then the next call continues.
        """
        self.notice_clock()
        await self._ages.correct(self._after_jump_back)

    async def _after_jump_back(self, jump: ClockJump) -> None:
        self.journal.clock_jumped(jump.seconds, await self._reschedule())
        self._look.set()

    async def _reschedule(self) -> int:
        """Let what is due later than any schedule allows follow its schedule again. Return the recipients."""
        backoff = self.recorder.backoff
        return await self.spool.reschedule(self._clock(), backoff.waits, backoff.longest_wait)

    # ---- out of the spool

    def _want(self, queue: DomainQueue) -> None:
        """Have more of a queue taken from the spool, now or when that is allowed again."""
        if not queue.has_due or queue.is_wanted or queue.is_suspended or not self.is_running:
            return
        if queue.resume_at > trio.current_time():
            self._paused.add(queue)
            return
        if len(queue.old) >= self._batch_of(queue) // 2:
            return  # repeated when some are gone
        queue.is_wanted = True
        self._wanted.send_nowait(queue)

    def _batch_of(self, queue: DomainQueue) -> int:
        """Return how many messages of a queue are taken at a time: as many as can be started soon."""
        if queue.is_down:
            return _SWEEP
        return 2 * (FIRST_WINDOW if queue.route_queue is None else queue.route_queue.window)

    async def _keep_taking(self) -> None:
        """Take mail of the queues that want it, in their order."""
        async for queue in self._to_take:
            while self._is_full(1):
                if self._has_space.is_set():  # otherwise another taker waits for it
                    self._has_space = trio.Event()
                await self._has_space.wait()
            try:
                await self._take(queue)
            except Exception as exc:  # noqa: BLE001 - a disk that fails now may work later
                self.journal.error(0, "spool", exc)
                queue.has_due = True
                queue.resume_at = trio.current_time() + _SWEEP_PAUSE
            queue.is_wanted = False
            if len(queue):
                self._serve(queue)
            self._want(queue)

    async def _take(self, queue: DomainQueue) -> None:
        """Take some mail of a queue. Raise what keeps the spool from returning it."""
        settings = self._settings
        limit = min(self._batch_of(queue), settings.memory_messages - self.held - self._claimed)
        # A share of what is left: the other takers need some, too.
        octets = max(1, (settings.memory_octets - self._octets - self._claimed_octets) // _TAKERS)
        claimed = limit, octets
        now = self._clock()
        queue.has_due = False  # set again by what comes meanwhile
        key, generation = self._route_key(queue.name), self._routes.generation

        def same_route(name: str) -> bool:
            return name not in self.suspended and self._route_key(name) == key

        self._claim(*claimed)
        try:
            entries = await self.spool.take(
                queue.name, now, limit, octets, now + _CLAIM, None if key is None else same_route
            )
        finally:
            self._claim(-claimed[0], -claimed[1])
        if generation != self._routes.generation:  # domains that were taken together may not have one route any more
            for entry in entries:
                self.recorder.give_back(entry, now)
            queue.has_due = True
            return
        rows = 0
        for entry in entries:
            rows += len(entry.rows)
            octets -= entry.size
            self._hold(queue.old, entry)
        if rows >= limit or octets <= 0:
            queue.has_due = True

    async def _keep_looking(self) -> None:
        """Look for what becomes due with time, and for queues whose pause is over."""
        while True:
            wait = _LONGEST_SLEEP
            try:
                wait = await self._find_due()
            except Exception as exc:  # noqa: BLE001 - a disk that fails now may work later
                self.journal.error(0, "spool", exc)
            now = trio.current_time()
            self._resume(now)
            self._evict(now)
            if self._stalled:
                wait = min(wait, _STALL)
            if self._paused:
                wait = min(wait, min(queue.resume_at for queue in self._paused) - now)
            wait = max(wait, _SHORTEST_SLEEP)
            self._looks_at = self._clock() + wait
            with trio.move_on_after(wait):
                await self._look.wait()
            self._look = trio.Event()

    def look(self) -> None:
        """Search the spool now."""
        self._look.set()

    def _expect(self, when: float) -> None:
        """Search the spool at a time, if not before."""
        if when < self._looks_at:
            self._look.set()

    async def _find_due(self) -> float:
        """Note the queues that are due; return the seconds until the next one is."""
        while (space := min(_QUEUES_AT_A_TIME, _MAX_QUEUES - len(self._queues))) > 0:
            now = self._clock()
            found = await self.spool.due_queues(now, space, now + _CLAIM)
            for queue in found:
                self._note_due(queue.queue, is_asked_for=queue.is_asked_for)
            if len(found) < space:
                due_at = await self.spool.next_due()
                return _LONGEST_SLEEP if due_at is None else min(due_at - now, _LONGEST_SLEEP)
        return _STALL

    def _resume(self, now: float) -> None:
        """Continue with those whose pause is over."""
        for queue in [queue for queue in self._paused if queue.resume_at <= now]:
            self._paused.discard(queue)
            self._want(queue)
        stalled, self._stalled = self._stalled, set()
        for route_queue in stalled:
            self._dispatch(route_queue)

    def _evict(self, now: float) -> None:
        """Forget queues and routes that have been idle for a while."""
        if now - self._evicted_at < _IDLE / 2:
            return
        self._evicted_at = now
        self._queues = {
            name: queue for name, queue in self._queues.items() if not queue.is_idle or now - queue.used_at < _IDLE
        }
        used = {queue.route_queue for queue in self._queues.values()}
        self._route_queues = {key: each for key, each in self._route_queues.items() if each.in_flight or each in used}


def _text_of(reply: Reply) -> str:
    """Return what mailboxes say of a message, as the journal has it."""
    return f"{reply.code} {reply.status or ''} {reply.text}"


def _copy(body: Body) -> Body:
    """Return a body that can be closed separately."""
    return StoredBody(b"".join(body.chunks())) if getattr(body, "in_memory", False) else body


def _part(entry: Entry, places: Sequence[int]) -> Entry:
    """Return an entry with some of its recipients."""
    recipients = tuple(entry.envelope.recipients[place] for place in places)
    rows = tuple(entry.rows[place] for place in places)
    return entry._replace(envelope=entry.envelope._replace(recipients=recipients), rows=rows)
