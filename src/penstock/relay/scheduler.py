"""Which message goes where, and when: from the spool, or from the clients, to next hops or into mailboxes.

    SpoolDelivery --offer--> Lane --ring--> Outlet --pump--> Pool.deliver_later --done--> Ledger
                    Spool --take--^

A *lane* is the mail of a domain. An *outlet* is where its way leads: domains with the same next hops share it, and the
recipients of a message that have the same way are offered to it together at first. Nobody keeps a task for a message:
an offer begins an attempt, the answer of the hop ends it and begins the next one.

Rules
-----
1. An attempt is recorded before it is made: whatever is in a lane here is written in the spool as being attempted.
   After a crash it is due again.
2. Fair: the lanes of an outlet take turns, one message each; a lane takes its fresh mail and its old mail in turns; no
   outlet waits for another one.
3. What is in memory is bounded, in messages and octets. Beyond half of it, or of the share of its lane, a message that
   comes in is left in the spool, and taken out when there is room: the other half is for those.
4. Hops that are down cost nothing: their mail is put off in batches, a few of them a minute, each message by its own
   schedule, so that it is late, told and returned like any other. When the operator asks for a try, one is made.
5. A bug in one delivery costs that message a delay and a line in the journal, and nobody else anything.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Annotated, Final, Literal, Protocol

import msgspec
import trio

from penstock.journal import Journal
from penstock.message import Message, Recipient
from penstock.net.resolver import ResolveError
from penstock.relay.backoff import RetrySettings
from penstock.relay.bounce import ReportSettings
from penstock.relay.hop import Delivered, Hop, NextHopUnavailable, Outcome, Result
from penstock.relay.lane import FIRST_WINDOW, Lane, Outlet
from penstock.relay.ledger import Ledger
from penstock.relay.pool import Pool, PoolSettings
from penstock.relay.route import Routes, Way
from penstock.reply import Reply
from penstock.spool.entry import Entry
from penstock.spool.spool import Spool

_TAKERS: Final = 4
"""Tasks that take mail out of the spool."""
_ASKING: Final = 50
"""Questions to the DNS at a time."""
_CLAIM: Final = 600.0
"""Seconds in which a lane that is in memory is not found due again: it knows itself what it has."""
_WAY_LIFE: Final = 60.0
"""Seconds after which the DNS is asked again for the way of a lane; the resolver knows how long it holds."""
_DNS_PAUSE: Final = 60.0
"""Seconds in which a lane rests whose way the DNS could not tell."""
_SWEEP: Final = 500
"""Messages of a lane that is down which are put off at a time..."""
_SWEEP_PAUSE: Final = 5.0
"""...and the seconds between two such times."""
_STALL: Final = 0.1
"""Seconds after which an outlet that has to wait for its rate is looked at again."""
_LONGEST_SLEEP: Final = 5.0
"""Seconds after which the spool is looked at in any case: another process may have changed what is due."""
_SHORTEST_SLEEP: Final = 0.02
_BUG_PAUSE: Final = 300.0
"""Seconds until a message is tried again that could not be accounted for."""
_OURS: Final = Result(Outcome.DEFERRED, "an error on our side", "4.3.0", "", is_said=False)
_DOWN: Final = Result(Outcome.DEFERRED, "the next hop is down", "4.4.1", "", is_said=False)
_IDLE: Final = 30.0
"""Seconds after which a lane with nothing to do is forgotten."""
_LANES_AT_A_TIME: Final = 100
_MOST_LANES: Final = 20_000
"""Lanes in memory. Those beyond wait in the spool, the one that has been due for longest first."""


class RelaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From the spool to next hops."""

    memory_messages: Annotated[
        int,
        msgspec.Meta(ge=10, le=1_000_000, description="Messages in memory on their way out; the others wait on disk"),
    ] = 4000
    memory_octets: Annotated[
        int, msgspec.Meta(ge=1 << 20, le=1 << 40, description="Octets of messages in memory on their way out")
    ] = 67_108_864
    local_writers: Annotated[
        int, msgspec.Meta(ge=1, le=1024, description='Messages that a route to "maildir" delivers at a time')
    ] = 32
    smtputf8_downgrade: Annotated[
        Literal["refuse", "send"],
        msgspec.Meta(
            description="A header that needs SMTPUTF8, and a next hop that does not offer it. "
            "refuse: 5.6.7 (RFC 6531 3.2); send: as it is"
        ),
    ] = "refuse"
    retry: RetrySettings = RetrySettings()
    reports: ReportSettings = ReportSettings()
    pool: PoolSettings = PoolSettings()


class LocalDelivery(Protocol):
    """What delivers into mailboxes on this machine; see penstock.delivery.base."""

    async def deliver(self, message: Message) -> Reply:
        """Deliver to all recipients, or to none of them."""


class _Attempt:
    """A message that is offered to next hops, one after the other."""

    __slots__ = ("entry", "hop", "hops", "outlet", "scheduler")

    def __init__(self, scheduler: Scheduler, outlet: Outlet, entry: Entry, hops: Sequence[Hop]) -> None:
        self.scheduler = scheduler
        self.outlet = outlet
        self.entry = entry
        self.hops = hops
        self.hop = -1
        """The place of the hop that has it."""

    def offer(self, reason: NextHopUnavailable | None = None) -> None:
        """Extensions the message to the next hop. `reason` is why the one before it could not be used."""
        entry, hops = self.entry, self.hops
        while self.hop + 1 < len(hops):
            self.hop += 1
            try:
                self.scheduler.pool.deliver_later(
                    hops[self.hop], entry.envelope, entry.prefix, entry.body, entry.size, self.done
                )
            except NextHopUnavailable as exc:
                reason = reason or exc
            except Exception as exc:  # noqa: BLE001 - rule 5
                self.scheduler.broke(self.outlet, entry, exc)
                return
            else:
                return
        assert reason is not None
        self.scheduler.not_sent(self.outlet, entry, reason)

    def done(self, outcome: Delivered | NextHopUnavailable) -> None:
        """Hear what a hop has made of it."""
        if isinstance(outcome, NextHopUnavailable):
            self.offer(outcome)
        else:
            self.scheduler.sent(self.outlet, self.entry, outcome, is_final=self.hops[self.hop].kind == "lmtp")


class Scheduler:
    """Runs the relay. `offer` is for those who put messages into the spool."""

    def __init__(
        self,
        settings: RelaySettings,
        spool: Spool,
        pool: Pool,
        routes: Routes,
        ledger: Ledger,
        journal: Journal,
        *,
        local: LocalDelivery | None = None,
        clock: Callable[[], float] = time.time,
        random_source: random.Random | None = None,
    ) -> None:
        """`local` is for ways that end here. `clock` tells seconds since the epoch."""
        self.pool = pool
        self.lane_of: Callable[[Recipient], str] = routes.lane_of
        """Says in which lane a recipient waits."""
        self._settings = settings
        self._spool = spool
        self._routes = routes
        self._ledger = ledger
        self._journal = journal
        self._local = local
        self._clock = clock
        self._random = random_source or random.Random()  # noqa: S311 - it spreads load, it hides nothing
        self._lanes: dict[str, Lane] = {}
        self._outlets: dict[Hashable, Outlet] = {}
        self.held = 0
        """Messages in memory, waiting or on their way."""
        self._octets = 0
        self._is_running = False
        self._has_room = trio.Event()
        self._look = trio.Event()
        self._looks_at = 0.0
        """When the spool is looked at again, in seconds since the epoch."""
        self._paused: set[Lane] = set()
        """Lanes with something due that have to wait for `resume_at`."""
        self._stalled: set[Outlet] = set()
        """Outlets whose hops take nothing now, although nothing is under way to them: a rate."""
        self._wanted, self._to_take = trio.open_memory_channel[Lane](math.inf)
        self._asking = trio.CapacityLimiter(_ASKING)
        self._nursery: trio.Nursery | None = None
        self._evicted_at = 0.0

    # ---- for those who put messages into the spool

    def takes(self, lanes: Sequence[str], octets: int) -> bool:
        """Say whether a message for these lanes would be attempted at once, so that it need not be read back."""
        settings = self._settings
        most = settings.memory_messages // 2
        if not self._is_running or self.held >= most or self._octets + octets > settings.memory_octets // 2:
            return False
        if self._ledger.waiting > settings.memory_messages:
            return False
        share = max(FIRST_WINDOW, most // (2 + len(self._lanes) // 16))
        for name in lanes:
            lane = self._lanes.get(name)
            if lane is not None and (lane.is_down or len(lane.fresh) >= share):
                return False
        return True

    def offer(self, entries: Sequence[Entry]) -> None:
        """Attempt what was put as taken, those recipients of a message together that have the same way."""
        for entry in entries if len(entries) == 1 else self._by_way(entries):
            lane = self._lane(entry.lane)
            self._hold(lane.fresh, entry)
            self._serve(lane)

    def _by_way(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return the entries of a message with those joined whose ways lead to the same place, as far as is known.

        A next hop then gets its text once. What has to be tried again is tried by its domain, as a domain may be at
        fault.
        """
        joined: dict[Hashable, Entry] = {}
        for entry in entries:
            way = self._routes.way_now(entry.lane)
            key: Hashable = ("unknown", entry.lane) if way is None else way.key
            first = joined.get(key)
            if first is None:
                joined[key] = entry
                continue
            recipients = (*first.envelope.recipients, *entry.envelope.recipients)
            envelope = first.envelope._replace(recipients=recipients)
            joined[key] = first._replace(envelope=envelope, rows=(*first.rows, *entry.rows))
            entry.body.close()
        return list(joined.values())

    def became_due(self, lanes: Sequence[str]) -> None:
        """Hear of lanes that have something due in the spool."""
        for name in set(lanes):
            if name in self._lanes or len(self._lanes) < _MOST_LANES:
                self._note_due(name)

    # ---- the life of the scheduler

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Relay until cancelled. The spool is open, the pool and the ledger run."""
        self._spool.became_due = self.became_due
        self._ledger.put_off_until = self._expect
        async with trio.open_nursery() as self._nursery:
            self._is_running = True
            for _ in range(_TAKERS):
                self._nursery.start_soon(self._keep_taking)
            task_status.started()
            await self._keep_looking()

    def stop(self) -> None:
        """Begin nothing any more. What is under way goes on."""
        self._is_running = False

    def close(self) -> None:
        """Give back what was not begun. The pool is closed: nothing is under way any more."""
        self._is_running = False
        now = self._clock()
        for lane in self._lanes.values():
            for entry in (*lane.fresh, *lane.old):
                self._ledger.give_back(entry, now)
            lane.fresh.clear()
            lane.old.clear()

    # ---- lanes

    def _lane(self, name: str) -> Lane:
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = Lane(name)
        lane.used_at = trio.current_time()
        return lane

    def _hold(self, queue: deque[Entry], entry: Entry) -> None:
        queue.append(entry)
        self.held += 1
        self._octets += entry.size

    def _drop(self, entry: Entry) -> None:
        self.held -= 1
        self._octets -= entry.size
        if not self._has_room.is_set():
            self._has_room.set()

    def _note_due(self, name: str) -> None:
        lane = self._lane(name)
        lane.has_due = True
        self._want(lane)

    def _serve(self, lane: Lane) -> None:
        """See to it that the messages of a lane go out."""
        outlet = lane.outlet
        if outlet is None or trio.current_time() >= lane.way_until:
            outlet = self._find_outlet(lane)
            if outlet is None:
                return
        if not lane.is_ringed and (lane.fresh or lane.old):
            lane.is_ringed = True
            outlet.ring.append(lane)
        if not outlet.is_pumping:
            self._pump(outlet)

    # ---- ways

    def _find_outlet(self, lane: Lane) -> Outlet | None:
        """Return the outlet of a lane; None while the DNS is asked for it."""
        way = self._routes.way_now(lane.name)
        if way is not None:
            return self._lead(lane, way, math.inf)
        if not lane.is_asking and self._nursery is not None:
            lane.is_asking = True
            self._nursery.start_soon(self._ask, lane)
        return None

    def _lead(self, lane: Lane, way: Way, until: float) -> Outlet:
        outlet = self._outlets.get(way.key)
        if outlet is None:
            outlet = self._outlets[way.key] = Outlet(way, self._settings.local_writers)
        elif outlet.way is not way:
            outlet.lead(way, self._settings.local_writers)
        if lane.outlet is not outlet and lane.is_ringed and lane.outlet is not None:
            lane.outlet.ring.remove(lane)
            lane.is_ringed = False
        lane.outlet, lane.way_until = outlet, until
        return outlet

    async def _ask(self, lane: Lane) -> None:
        """Ask the DNS for the way of a lane."""
        try:
            async with self._asking:
                way = await self._routes.way_of(lane.name)
        except ResolveError as exc:
            kind = Outcome.FAILED if exc.is_permanent else Outcome.DEFERRED
            self._refuse(lane, Result(kind, exc.text, exc.status, "", is_said=False))
        except Exception as exc:  # noqa: BLE001 - rule 5
            self._journal.error(0, "resolver", exc)
            self._refuse(lane, Result(Outcome.DEFERRED, "looking up the domain failed", "4.4.3", "", is_said=False))
        else:
            lane.is_asking = False
            self._lead(lane, way, trio.current_time() + _WAY_LIFE)
            self._serve(lane)

    def _refuse(self, lane: Lane, result: Result) -> None:
        """End all that waits in a lane that has no way."""
        lane.is_asking = False
        if result.kind is Outcome.DEFERRED:
            lane.is_down = True
            lane.resume_at = trio.current_time() + _DNS_PAUSE
        self._end_all(lane, result)

    def _end_all(self, lane: Lane, result: Result) -> None:
        """End what waits in a lane with one result for everybody, and go on with what the spool has of it."""
        if lane.is_ringed:
            assert lane.outlet is not None
            lane.outlet.ring.remove(lane)
            lane.is_ringed = False
        for entry in (*lane.old, *lane.fresh):
            self._drop(entry)
            self._ledger.finish(entry, [result] * len(entry.rows))
        lane.old.clear()
        lane.fresh.clear()
        self._want(lane)

    # ---- attempts

    def _pump(self, outlet: Outlet) -> None:
        """Begin as many attempts as there is room for. The lanes take turns."""
        outlet.is_pumping = True
        ring = outlet.ring
        try:
            while ring and self._is_running:
                room = outlet.room(self.pool)
                if room <= 0:
                    break
                for _ in range(min(room, len(ring))):
                    lane = ring.popleft()
                    entry = lane.pop()
                    if lane.fresh or lane.old:
                        ring.append(lane)
                    else:
                        lane.is_ringed = False
                    if lane.has_due and not lane.is_wanted:
                        self._want(lane)
                    self._begin(outlet, entry)
        finally:
            outlet.is_pumping = False
        if ring and not outlet.in_flight and self._is_running:
            if outlet.is_down(self.pool, trio.current_time()) and not self._is_asked_to_try(outlet):
                self._sweep(outlet)
            else:
                self._stalled.add(outlet)
                self._look.set()

    def _is_asked_to_try(self, outlet: Outlet) -> bool:
        """Say whether hops that are left alone are to be tried now: they have not failed since the operator asked.

        So what was asked for of a hundred thousand messages costs a dead hop one connection.
        """
        asked_at = max((entry.asked_at for lane in outlet.ring for entry in lane.old), default=0.0)
        age = self._clock() - asked_at
        return asked_at > 0 and outlet.try_again(self.pool, trio.current_time() - age)

    def _begin(self, outlet: Outlet, entry: Entry) -> None:
        outlet.in_flight += 1
        if entry.rows[0].attempts > 1 and self._journal.logs_mail:
            name = "maildir" if outlet.way.is_local else (outlet.only or outlet.way.first)[0].name
            self._journal.attempted(entry.id, entry.envelope.recipients, name, entry.rows[0].attempts)
        if outlet.way.is_local:
            assert self._nursery is not None
            self._nursery.start_soon(self._deliver_here, outlet, entry)
        else:
            hops = outlet.only or outlet.way.order(self._random)
            _Attempt(self, outlet, entry, hops).offer()

    def sent(self, outlet: Outlet, entry: Entry, results: Sequence[Result], *, is_final: bool) -> None:
        """Note what has become of a message that a hop has answered."""
        outlet.succeeded()
        lane = self._lanes.get(entry.lane)
        if lane is not None:
            lane.is_down = False
        self._end(outlet, entry, results, is_final=is_final)

    def not_sent(self, outlet: Outlet, entry: Entry, reason: NextHopUnavailable) -> None:
        """Note that a message found no hop that could be used."""
        if self._is_running:
            outlet.failed(reason)
            self._end(outlet, entry, [reason.as_result()] * len(entry.rows))
        else:
            outlet.in_flight -= 1
            self._drop(entry)
            self._ledger.give_back(entry, self._clock())  # it is we who are down

    def broke(self, outlet: Outlet, entry: Entry, exc: Exception) -> None:
        """Note a bug in an attempt: it counts as one that is to be made again."""
        self._journal.error(0, "relay", exc)
        self._end(outlet, entry, [_OURS] * len(entry.rows))

    def _end(self, outlet: Outlet, entry: Entry, results: Sequence[Result], *, is_final: bool = False) -> None:
        outlet.in_flight -= 1
        self._drop(entry)
        try:
            self._ledger.finish(entry, results, is_final=is_final)
        except Exception as exc:  # noqa: BLE001 - rule 5
            self._journal.error(0, "relay", exc)
            self._ledger.put_off(entry, self._clock() + _BUG_PAUSE)
        if not outlet.is_pumping and outlet.ring:
            self._pump(outlet)

    def _sweep(self, outlet: Outlet) -> None:
        """Put off all that waits for hops that are down, each message as if it had been tried."""
        result = _DOWN
        if outlet.reason is not None:
            result = outlet.reason.as_result()._replace(text=f"{_DOWN.text}: {outlet.reason.text}")
        resume_at = trio.current_time() + _SWEEP_PAUSE
        for lane in list(outlet.ring):
            lane.is_down = True
            lane.resume_at = resume_at
            self._end_all(lane, result)

    async def _deliver_here(self, outlet: Outlet, entry: Entry) -> None:
        """Deliver a message into mailboxes."""
        assert self._local is not None
        message = Message(entry.id, entry.envelope, entry.prefix, entry.body, entry.received_at)
        try:
            with trio.CancelScope(shield=True):  # it is the disk that is waited for, and half a delivery is none
                reply = await self._local.deliver(message)
            kind = Outcome.DELIVERED if reply.accepts else Outcome.FAILED if reply.is_permanent else Outcome.DEFERRED
            text, status = f"{reply.code} {reply.status or ''} {reply.text}", reply.status or f"{reply.code // 100}.0.0"
        except Exception as exc:  # noqa: BLE001 - rule 5; what went wrong with our disk is nobody else's business
            self._journal.error(0, "maildir", exc)
            kind, text, status = Outcome.DEFERRED, "the mailbox can not be written", "4.2.0"
        result = Result(kind, text, status, "", is_said=False)
        self.sent(outlet, entry, [result] * len(entry.rows), is_final=True)

    # ---- out of the spool

    def _want(self, lane: Lane) -> None:
        """Have more of a lane taken out of the spool, now or when that is allowed again."""
        if not lane.has_due or lane.is_wanted or not self._is_running:
            return
        if lane.resume_at > trio.current_time():
            self._paused.add(lane)
            return
        if len(lane.old) >= self._batch_of(lane) // 2:
            return  # asked for again when some have gone
        lane.is_wanted = True
        self._wanted.send_nowait(lane)

    def _batch_of(self, lane: Lane) -> int:
        """Return how many messages of a lane are taken out at a time: as many as can be begun soon."""
        if lane.is_down:
            return _SWEEP
        return 2 * (FIRST_WINDOW if lane.outlet is None else lane.outlet.window)

    async def _keep_taking(self) -> None:
        """Take mail of the lanes that want it, in their order."""
        async for lane in self._to_take:
            settings = self._settings
            while self.held >= settings.memory_messages or self._octets >= settings.memory_octets:
                self._has_room = trio.Event()
                await self._has_room.wait()
            try:
                await self._take(lane)
            except Exception as exc:  # noqa: BLE001 - a disk that fails now may work later
                self._journal.error(0, "spool", exc)
                lane.has_due = True
                lane.resume_at = trio.current_time() + _SWEEP_PAUSE
            lane.is_wanted = False
            if len(lane):
                self._serve(lane)
            self._want(lane)

    async def _take(self, lane: Lane) -> None:
        """Take some mail of a lane. Raise what keeps the spool from giving it out."""
        settings = self._settings
        limit = max(1, min(self._batch_of(lane), settings.memory_messages - self.held))
        octets = max(1, settings.memory_octets - self._octets)
        now = self._clock()
        lane.has_due = False  # what comes while we ask sets it again
        entries = await self._spool.take(lane.name, now, limit, octets, now + _CLAIM)
        rows = 0
        for entry in entries:
            rows += len(entry.rows)
            octets -= entry.size
            self._hold(lane.old, entry)
        if rows >= limit or octets <= 0:
            lane.has_due = True

    async def _keep_looking(self) -> None:
        """Look for what becomes due with time, and for whom a wait is over."""
        while True:
            wait = _LONGEST_SLEEP
            try:
                wait = await self._find_due()
            except Exception as exc:  # noqa: BLE001 - a disk that fails now may work later
                self._journal.error(0, "spool", exc)
            now = trio.current_time()
            self._resume(now)
            self._evict(now)
            if self._stalled:
                wait = min(wait, _STALL)
            if self._paused:
                wait = min(wait, min(lane.resume_at for lane in self._paused) - now)
            wait = max(wait, _SHORTEST_SLEEP)
            self._looks_at = self._clock() + wait
            with trio.move_on_after(wait):
                await self._look.wait()
            self._look = trio.Event()

    def _expect(self, when: float) -> None:
        """Hear that something is due at a time; look then, if not before."""
        if when < self._looks_at:
            self._look.set()

    async def _find_due(self) -> float:
        """Note the lanes that are due; return the seconds until the next one is."""
        while (room := min(_LANES_AT_A_TIME, _MOST_LANES - len(self._lanes))) > 0:
            now = self._clock()
            found = await self._spool.due_lanes(now, room, now + _CLAIM)
            for lane in found:
                self._note_due(lane.lane)
            if len(found) < room:
                due_at = await self._spool.next_due()
                return _LONGEST_SLEEP if due_at is None else min(due_at - now, _LONGEST_SLEEP)
        return _STALL

    def _resume(self, now: float) -> None:
        """Go on with those whose wait is over."""
        for lane in [lane for lane in self._paused if lane.resume_at <= now]:
            self._paused.discard(lane)
            self._want(lane)
        stalled, self._stalled = self._stalled, set()
        for outlet in stalled:
            self._pump(outlet)

    def _evict(self, now: float) -> None:
        """Forget lanes and outlets that nothing was wanted of for a while."""
        if now - self._evicted_at < _IDLE / 2:
            return
        self._evicted_at = now
        self._lanes = {
            name: lane for name, lane in self._lanes.items() if not lane.is_idle or now - lane.used_at < _IDLE
        }
        used = {lane.outlet for lane in self._lanes.values()}
        self._outlets = {key: outlet for key, outlet in self._outlets.items() if outlet.in_flight or outlet in used}
