"""What the scheduler keeps in memory: the lanes that have something to do, and the outlets they lead to."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Final

from penstock.relay.hop import Hop, NextHopUnavailable
from penstock.relay.pool import Pool
from penstock.relay.route import Way
from penstock.spool.entry import Entry

FIRST_WINDOW: Final = 4
"""Messages at a time for next hops that have not taken any yet."""


class Lane:
    """The mail of one domain that is in memory, and whether the spool has more of it."""

    __slots__ = (
        "fresh", "has_due", "is_asking", "is_down", "is_ringed", "is_wanted", "name", "old", "outlet", "resume_at",
        "takes_old", "used_at", "way_until",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.outlet: Outlet | None = None
        """Where its way leads; None before that is known."""
        self.way_until = -math.inf
        """When to ask for the way again, in trio's time."""
        self.fresh: deque[Entry] = deque()
        """Handed over as they came in."""
        self.old: deque[Entry] = deque()
        """Taken out of the spool."""
        self.takes_old = False
        """Whose turn it is: neither keeps the other waiting."""
        self.has_due = False
        """The spool has more of it that is due."""
        self.is_wanted = False
        """More is being taken out of the spool, or is about to be."""
        self.is_asking = False
        """The DNS is being asked."""
        self.is_ringed = False
        """It waits for its turn in the ring of its outlet."""
        self.is_down = False
        """The last that was heard is that its next hops can not be used."""
        self.resume_at = -math.inf
        """Nothing is taken out of the spool before, in trio's time."""
        self.used_at = 0.0

    def __len__(self) -> int:
        return len(self.fresh) + len(self.old)

    def pop(self) -> Entry:
        """Return the next message, one that was fresh and one from the spool in turns."""
        if self.old and (self.takes_old or not self.fresh):
            self.takes_old = False
            return self.old.popleft()
        self.takes_old = True
        return self.fresh.popleft()

    @property
    def is_idle(self) -> bool:
        """Nothing is to be done, and nothing is under way."""
        return not (self.fresh or self.old or self.has_due or self.is_wanted or self.is_asking or self.is_ringed)


class Outlet:
    """Next hops, or the delivery here, and the lanes that wait for them in a ring: each has its turn."""

    __slots__ = ("in_flight", "is_pumping", "limit", "only", "reason", "ring", "way", "window")

    def __init__(self, way: Way, local_limit: int) -> None:
        """`local_limit` is how many messages are delivered here at a time."""
        self.ring: deque[Lane] = deque()
        self.in_flight = 0
        """Messages on their way."""
        self.window = FIRST_WINDOW
        """How many that may be: doubled by each success up to the limit, and small again after a failure."""
        self.is_pumping = False
        self.reason: NextHopUnavailable | None = None
        """Why its hops could not be used, the last time that was tried."""
        self.lead(way, local_limit)

    def lead(self, way: Way, local_limit: int) -> None:
        """Take a way, or a later answer to the question for the same one."""
        self.way = way
        if way.is_local:
            self.only: tuple[Hop, ...] | None = ()
            self.limit = self.window = local_limit
        else:
            self.only = way.only
            self.limit = sum(2 * choice.hops[0].limits.connections for choice in way.ranks[0])

    def room(self, pool: Pool) -> int:
        """Return how many messages can be begun now, as far as is known without trying."""
        room = self.window - self.in_flight
        if room <= 0 or self.way.is_local:
            return room
        if self.only is not None and len(self.only) == 1:
            return min(room, pool.room(self.only[0]))
        # A rank that is busy is no reason to send to the next one; a rank that is down is.
        total = 0
        for rank in self.way.ranks:
            hops = [hop for choice in rank for hop in choice.hops]
            total += sum(map(pool.room, hops))
            if not all(map(pool.down_until, hops)):
                break
        return min(room, total)

    def is_down(self, pool: Pool, now: float) -> bool:
        """Say whether all its hops are left alone."""
        return not self.way.is_local and all(pool.down_until(hop) > now for hop in self._hops())

    def try_again(self, pool: Pool, asked_at: float) -> bool:
        """Let its hops be tried although they are left alone; see `Pool.try_again`. Return whether any may be."""
        allowed = [pool.try_again(hop, asked_at) for hop in self._hops()]
        return any(allowed)

    def _hops(self) -> Iterator[Hop]:
        return (hop for rank in self.way.ranks for choice in rank for hop in choice.hops)

    def succeeded(self) -> None:
        """Note that a message was answered."""
        if self.window < self.limit:
            self.window = min(self.limit, self.window * 2)

    def failed(self, reason: NextHopUnavailable) -> None:
        """Note that no hop could be used."""
        self.reason = reason
        self.window = min(FIRST_WINDOW, self.limit)
