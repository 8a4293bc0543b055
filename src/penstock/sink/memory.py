"""State of the conditions of a plan, bounded: counters, token buckets, greylist triplets, mailboxes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from penstock.tokenbucket import TokenBucket

V = TypeVar("V")


class Memory(Generic[V]):
    """A bounded table: when it is full, the key that was added first is removed."""

    __slots__ = ("_max_keys", "_table")

    def __init__(self, max_keys: int) -> None:
        self._max_keys = max_keys
        self._table: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, default: V) -> V:
        """Return the value of a key."""
        return self._table.get(key, default)

    def put(self, key: Hashable, value: V) -> None:
        """Set the value of a key."""
        if key not in self._table and len(self._table) >= self._max_keys:
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
        """Increment the count of a key and return it: 1 for the first."""
        number = self.get(key, 0) + 1
        self.put(key, number)
        return number


class Buckets:
    """Token buckets by key: `rate` tokens per second are added, up to `burst`, with which a bucket starts."""

    __slots__ = ("_buckets", "_burst", "_rate")

    def __init__(self, rate: float, burst: float, max_keys: int) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: Memory[TokenBucket | None] = Memory(max_keys)

    def take(self, key: Hashable, now: float) -> bool:
        """Take a token, if there is one."""
        bucket = self._buckets.get(key, None)
        if bucket is None:
            bucket = TokenBucket(self._rate, self._burst)
            self._buckets.put(key, bucket)
        return bucket.take(now)


class Triplets:
    """When a network, a sender and a recipient were first seen together."""

    __slots__ = ("_forget", "_seen", "_wait")

    def __init__(self, wait: float, forget: float, max_keys: int) -> None:
        self._wait = wait
        self._forget = forget
        self._seen: Memory[float] = Memory(max_keys)

    def is_new(self, key: Hashable, now: float) -> bool:
        """Return whether a triplet is new, or was first seen less than `wait` ago, and remember it."""
        first = self._seen.get(key, -1.0)
        if first < 0 or now - first > self._forget:
            self._seen.put(key, now)
            return True
        return now - first < self._wait


class Mailboxes:
    """Messages and octets in each mailbox."""

    __slots__ = ("_held", "_messages", "_octets")

    def __init__(self, octets: int, messages: int, max_keys: int) -> None:
        """0 octets or messages are no limit."""
        self._octets = octets
        self._messages = messages
        self._held: Memory[tuple[int, int]] = Memory(max_keys)

    def is_full(self, key: Hashable, octets: int) -> bool:
        """Return whether a message of this size does not fit; 0 octets if the size is unknown."""
        messages, held = self._held.get(key, (0, 0))
        if self._messages and messages >= self._messages:
            return True
        return bool(self._octets) and (held + octets > self._octets or held >= self._octets)

    def add(self, key: Hashable, octets: int) -> None:
        """Count a message."""
        messages, held = self._held.get(key, (0, 0))
        self._held.put(key, (messages + 1, held + octets))
