"""The limits of a next hop, for all workers together.

Each worker counts its connections in the memory that all share (ext/shared.pyx), and looks at the sum before it opens
another one; rates are drawn from one bucket. Where the other workers have all the connections that a hop allows, a
worker with mail for it says so, and one of them is closed for it after its transaction.
"""

from __future__ import annotations

import time
from typing import Final, Protocol

from penstock.metrics._shared import SharedTable
from penstock.tokenbucket import TokenBucket

_CONNECTIONS: Final = ord("h")
_WANTED: Final = ord("w")
"""What is counted in the table."""


class Bucket(Protocol):
    """A rate; see penstock.tokenbucket."""

    def available(self, now: float) -> int:
        """Return how many things are allowed now, at most a million."""

    def take(self, now: float) -> bool:
        """Take one token if there is one. Return whether there was."""


class SharedBucket:
    """A token bucket of all workers, with its own clock."""

    def __init__(self, table: SharedTable, key: str, rate: float) -> None:
        """Allow `rate` things per second, which is also the burst, but at least 1."""
        self._table = table
        self._key = key
        self._rate = rate
        self._burst = max(1.0, rate)

    def available(self, now: float) -> int:
        """Return how many things are allowed now, at most a million."""
        del now
        return int(min(self._table.available(self._key, self._rate, self._burst), 1e6))

    def take(self, now: float) -> bool:
        """Take one token if there is one. Return whether there was."""
        del now
        return self._table.take(self._key, self._rate, self._burst)


class HopShare:
    """What this worker has of the connections to a hop, and what the others have."""

    def __init__(self, table: SharedTable | None, hop: str) -> None:
        """Without a table, there are no other workers."""
        self._table = table
        self._hop = hop
        self._own = 0
        self._wants = False

    def bucket(self, kind: str, rate: float) -> Bucket:
        """Return the bucket of a rate; 0 is no limit. `kind` distinguishes the buckets of a hop."""
        if self._table is None or not rate:
            return TokenBucket(rate)
        return SharedBucket(self._table, f"{kind} {self._hop}", rate)

    @property
    def elsewhere(self) -> int:
        """Connections that the other workers have."""
        return 0 if self._table is None else max(0, self._table.opened(_CONNECTIONS, self._hop) - self._own)

    def count(self, n: int) -> None:
        """Count connections of this worker in, or out if negative."""
        self._own += n
        if self._table is not None:
            self._table.open_more(_CONNECTIONS, self._hop, n, time.monotonic())

    def want(self, wants: bool) -> None:
        """Say whether this worker has mail for the hop, and no connection."""
        if self._table is not None and wants is not self._wants:
            self._wants = wants
            self._table.open_more(_WANTED, self._hop, 1 if wants else -1, time.monotonic())

    @property
    def is_wanted(self) -> bool:
        """Another worker has mail for the hop, and no connection."""
        return self._table is not None and self._table.opened(_WANTED, self._hop) > self._wants
