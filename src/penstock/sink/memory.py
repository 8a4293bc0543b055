"""State of the conditions of a fault plan: occurrences, token buckets, triplets, mailboxes. All of it is bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Memory(Generic[V]):
    """A table with a bounded number of keys: the oldest key makes room for a new one."""

    __slots__ = ("_limit", "_table")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._table: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, default: V) -> V:
        """Return the value of a key."""
        return self._table.get(key, default)

    def put(self, key: Hashable, value: V) -> None:
        """Set the value of a key."""
        if key not in self._table and len(self._table) >= self._limit:
            self._table.popitem(last=False)
        self._table[key] = value

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._table


class Counters(Memory[int]):
    """Counts occurrences of keys."""

    __slots__ = ()

    def next(self, key: Hashable) -> int:
        """Count one more, and return the count: 1 for the first."""
        number = self.get(key, 0) + 1
        self.put(key, number)
        return number


class Buckets:
    """Token buckets, one per key. `rate` is in tokens per second; a bucket holds `burst` tokens, and starts full."""

    __slots__ = ("_buckets", "_burst", "_rate")

    def __init__(self, rate: float, burst: float, limit: int) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: Memory[tuple[float, float]] = Memory(limit)

    def take(self, key: Hashable, now: float) -> bool:
        """Take a token. Return False when the bucket is empty."""
        tokens, at = self._buckets.get(key, (self._burst, now))
        tokens = min(self._burst, tokens + (now - at) * self._rate)
        has_one = tokens >= 1
        self._buckets.put(key, (tokens - 1 if has_one else tokens, now))
        return has_one


class Triplets:
    """When a network, a sender and a recipient were first seen together (greylisting)."""

    __slots__ = ("_forget", "_seen", "_wait")

    def __init__(self, wait: float, forget: float, limit: int) -> None:
        self._wait = wait
        self._forget = forget
        self._seen: Memory[float] = Memory(limit)

    def is_new(self, key: Hashable, now: float) -> bool:
        """Return whether a triplet is new, or was first seen less than `wait` seconds ago, and remember it."""
        first = self._seen.get(key, -1.0)
        if first < 0 or now - first > self._forget:
            self._seen.put(key, now)
            return True
        return now - first < self._wait


class Mailboxes:
    """The number of messages and octets in each mailbox."""

    __slots__ = ("_held", "_messages", "_octets")

    def __init__(self, octets: int, messages: int, limit: int) -> None:
        """0 means no limit."""
        self._octets = octets
        self._messages = messages
        self._held: Memory[tuple[int, int]] = Memory(limit)

    def is_full(self, key: Hashable, octets: int) -> bool:
        """Return whether a message of this size does not fit; a size of 0 is unknown."""
        messages, held = self._held.get(key, (0, 0))
        if self._messages and messages >= self._messages:
            return True
        return bool(self._octets) and (held + octets > self._octets or held >= self._octets)

    def add(self, key: Hashable, octets: int) -> None:
        """Add a message."""
        messages, held = self._held.get(key, (0, 0))
        self._held.put(key, (messages + 1, held + octets))
