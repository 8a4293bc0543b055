"""What the conditions of a plan remember: occurrences, buckets of tokens, triplets, mailboxes. All of it is bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from penstock.tokenbucket import TokenBucket

V = TypeVar("V")


class Memory(Generic[V]):
    """A table of at most so many keys: the one that was put first is forgotten first."""

    __slots__ = ("_most", "_table")

    def __init__(self, most: int) -> None:
        self._most = most
        self._table: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, default: V) -> V:
        """Return what is known of a key."""
        return self._table.get(key, default)

    def put(self, key: Hashable, value: V) -> None:
        """Know this of a key."""
        if key not in self._table and len(self._table) >= self._most:
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
        """Count one more, and return how many that are: 1 for the first."""
        number = self.get(key, 0) + 1
        self.put(key, number)
        return number


class Buckets:
    """Buckets of tokens, one a key: `rate` tokens come in each second, `burst` is what one holds, and has at first."""

    __slots__ = ("_buckets", "_burst", "_rate")

    def __init__(self, rate: float, burst: float, most: int) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: Memory[TokenBucket | None] = Memory(most)

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

    def __init__(self, wait: float, forget: float, most: int) -> None:
        self._wait = wait
        self._forget = forget
        self._seen: Memory[float] = Memory(most)

    def is_new(self, key: Hashable, now: float) -> bool:
        """Say whether a triplet was not seen before, or too short ago, and remember it."""
        first = self._seen.get(key, -1.0)
        if first < 0 or now - first > self._forget:
            self._seen.put(key, now)
            return True
        return now - first < self._wait


class Mailboxes:
    """What each mailbox holds."""

    __slots__ = ("_held", "_messages", "_octets")

    def __init__(self, octets: int, messages: int, most: int) -> None:
        """0 octets or messages are no limit."""
        self._octets = octets
        self._messages = messages
        self._held: Memory[tuple[int, int]] = Memory(most)

    def is_full(self, key: Hashable, octets: int) -> bool:
        """Say whether there is no room for one more message of so many octets (0 when nobody knows)."""
        messages, held = self._held.get(key, (0, 0))
        if self._messages and messages >= self._messages:
            return True
        return bool(self._octets) and (held + octets > self._octets or held >= self._octets)

    def add(self, key: Hashable, octets: int) -> None:
        """Put a message in."""
        messages, held = self._held.get(key, (0, 0))
        self._held.put(key, (messages + 1, held + octets))
