"""What the scheduler keeps in memory: the domain queues that have something to do, and the routes they share."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator
from typing import Final

from penstock.relay.hop import Hop, NextHopUnavailable
from penstock.relay.pool import Pool
from penstock.relay.route import Route
from penstock.spool.entry import Entry

FIRST_WINDOW: Final = 4
"""Messages at a time for next hops that have not accepted any yet."""


class DomainQueue:
    """The mail of one domain that is in memory, and whether the spool has more of it."""

    __slots__ = (
        "fresh", "has_due", "in_round_robin", "is_down", "is_rerouted", "is_resolving", "is_suspended", "is_wanted",
        "name", "old", "resume_at", "route_queue", "route_until", "takes_old", "used_at",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.route_queue: RouteQueue | None = None
        """The next hops of the domain; None before they are known."""
        self.route_until = -math.inf
        """When the route is looked up again, in trio's time."""
        self.fresh: deque[Entry] = deque()
        """Handed over as they came in."""
        self.old: deque[Entry] = deque()
        """Taken from the spool."""
        self.takes_old = False
        """The next message comes from the spool: fresh and old mail take turns."""
        self.has_due = False
        """The spool has more of it that is due."""
        self.is_wanted = False
        """More is being taken from the spool, or is about to be."""
        self.is_resolving = False
        """The route is being looked up."""
        self.is_rerouted = False
        """Routes were replaced meanwhile: what is found is of the old ones."""
        self.in_round_robin = False
        """It waits for its turn at its next hops."""
        self.is_down = False
        """At the last attempt, its next hops were unavailable."""
        self.is_suspended = False
        """An operator suspended the domain, or all its next hops."""
        self.resume_at = -math.inf
        """Nothing is taken from the spool before, in trio's time."""
        self.used_at = 0.0

    def __len__(self) -> int:
        return len(self.fresh) + len(self.old)

    def pop(self) -> Entry:
        """Return the next message: fresh mail and mail from the spool take turns."""
        if self.old and (self.takes_old or not self.fresh):
            self.takes_old = False
            return self.old.popleft()
        self.takes_old = True
        return self.fresh.popleft()

    @property
    def is_idle(self) -> bool:
        """There is nothing to do, and nothing in progress."""
        return not (
            self.fresh or self.old or self.has_due or self.is_wanted or self.is_resolving or self.in_round_robin
        )


class RouteQueue:
    """Next hops, or the local delivery, and the domain queues that wait for them, served round robin."""

    __slots__ = ("in_flight", "is_dispatching", "limit", "only", "reason", "route", "suspended", "waiting", "window")

    def __init__(self, route: Route, local_limit: int, suspended: Collection[str] = ()) -> None:
        """`local_limit` is how many messages are delivered locally at a time."""
        self.waiting: deque[DomainQueue] = deque()
        self.in_flight = 0
        """Messages being delivered."""
        self.window = FIRST_WINDOW
        """The limit for `in_flight`: doubled by each success up to `limit`, small again after a failure."""
        self.is_dispatching = False
        self.reason: NextHopUnavailable | None = None
        """Why its hops were unavailable at the last attempt."""
        self.suspended = frozenset(suspended)
        """Names of hops to which nothing is sent."""
        self.set_route(route, local_limit)

    def set_route(self, route: Route, local_limit: int) -> None:
        """Use a route, or a later answer to the look-up of the same one."""
        self.route = route
        if route.is_local:
            self.only: tuple[Hop, ...] | None = ()
            self.limit = self.window = local_limit
        else:
            self.only = route.only
            self.limit = sum(2 * choice.hops[0].limits.connections for choice in route.ranks[0])

    def capacity(self, pool: Pool) -> int:
        """Return how many messages can be started now, as far as is known without trying."""
        capacity = self.window - self.in_flight
        if capacity <= 0 or self.route.is_local:
            return capacity
        if self.only is not None and len(self.only) == 1 and not self.suspended:
            return min(capacity, pool.room(self.only[0]))
        # A rank that is busy is no reason to send to the next one; a rank that is unavailable is.
        total = 0
        for rank in self.route.ranks:
            hops = [hop for choice in rank for hop in choice.hops if not self.is_hop_suspended(hop)]
            total += sum(map(pool.room, hops))
            if not all(map(pool.down_until, hops)):
                break
        return min(capacity, total)

    def is_hop_suspended(self, hop: Hop) -> bool:
        """Return whether an operator suspended a hop, by its host or its full name."""
        return bool(self.suspended) and (hop.name.lower() in self.suspended or hop.host.lower() in self.suspended)

    @property
    def is_suspended(self) -> bool:
        """All hops are suspended: mail waits in the spool."""
        return bool(self.suspended) and not self.route.is_local and all(map(self.is_hop_suspended, self.route.hops()))

    def is_down(self, pool: Pool, now: float) -> bool:
        """Return whether all its hops are backing off."""
        return not self.route.is_local and all(pool.down_until(hop) > now for hop in self._usable())

    def try_again(self, pool: Pool, asked_at: float) -> bool:
        """Let its hops be tried although they are backing off; see `Pool.try_again`. Return whether any may be."""
        allowed = [pool.try_again(hop, asked_at) for hop in self._usable()]
        return any(allowed)

    def _usable(self) -> Iterator[Hop]:
        return (hop for hop in self.route.hops() if not self.is_hop_suspended(hop))

    def note_success(self) -> None:
        """Count a message that was answered."""
        if self.window < self.limit:
            self.window = min(self.limit, self.window * 2)

    def note_failure(self, reason: NextHopUnavailable) -> None:
        """Count a message for which no hop was available."""
        self.reason = reason
        self.window = min(FIRST_WINDOW, self.limit)
