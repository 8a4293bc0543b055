"""The tables of the state: plain dictionaries, changed by one thread.

Rules
-----
1. A bucket is one integer: the time at which it is full again (the "theoretical arrival time" of GCRA). A bucket that
   is full is the same as none, so it can be forgotten.
2. Times are integers, nanoseconds since the epoch, from a clock that is set once at the start and runs steadily then:
   setting the clock of the machine changes nothing. Only a restart sees it; times that lie too far in the future are
   cut then, so that no client is refused for longer than the period of its limit.
3. Tables are bounded. When one is full, the oldest entry goes; entries that still matter get a second chance.
4. What has changed since the last snapshot is remembered by key. Another thread may read single entries (`bucket`,
   `greylisted`), because that is one step of the interpreter; it calls nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from penstock.state.base import Charge, GreylistTimes, Learned

MOST_ENTRIES: Final = 500_000
"""Entries of each table. One takes about 200 octets."""
_SECOND_CHANCES: Final = 8
_REFRESH: Final = 16
"""What has passed is noted again after a 16th of the time for which it is remembered, not at each attempt."""


class Greylisted(NamedTuple):
    """A deferred attempt, or a triplet that has passed."""

    first: int
    """The first attempt."""
    expires: int
    has_passed: bool


class Changes(NamedTuple):
    """The keys of entries that have changed."""

    buckets: list[str]
    greylist: list[str]

    def __bool__(self) -> bool:
        return bool(self.buckets or self.greylist)


def steady_clock() -> Callable[[], int]:
    """Return a clock: nanoseconds since the epoch when it was made, running steadily from then on."""
    offset = time.time_ns() - time.monotonic_ns()
    return lambda: time.monotonic_ns() + offset


class Tables:
    """Rate limits and greylisting in memory."""

    def __init__(self, clock: Callable[[], int] | None = None, *, most: int = MOST_ENTRIES) -> None:
        """`clock` returns nanoseconds since the epoch; each table has at most `most` entries."""
        self._clock = clock or steady_clock()
        self._most = most
        self._buckets: dict[str, int] = {}
        """Key -> when the bucket is full again."""
        self._greylist: dict[str, Greylisted] = {}
        self._changed_buckets: dict[str, None] = {}
        self._changed_greylist: dict[str, None] = {}
        self.passes = 0
        """Attempts that have passed greylisting for the first time."""

    def __len__(self) -> int:
        return len(self._buckets) + len(self._greylist)

    # ---- rates

    def available(self, charges: Sequence[Charge]) -> int:
        """Return the index of the first charge that is not available, -1 if all are."""
        now = self._clock()
        buckets = self._buckets
        for index, (key, period, limit, cost) in enumerate(charges):
            full_at = buckets.get(key, now)
            # Integers: `limit` units are exactly one period, whatever they add up from.
            if max(full_at, now) + cost * period // limit > now + period:
                return index
        return -1

    def take(self, charges: Sequence[Charge]) -> int:
        """Take all charges and return -1, or return the index of the first that is not available and take none."""
        refused = self.available(charges)
        if refused >= 0 or not charges:
            return refused
        now = self._clock()
        buckets = self._buckets
        for key, period, limit, cost in charges:
            full_at = max(buckets.get(key, now), now)
            buckets[key] = full_at + cost * period // limit
            self._changed_buckets[key] = None
        if len(buckets) > self._most:
            self._shrink_buckets(now)
        return -1

    def give_back(self, charges: Sequence[Charge]) -> None:
        """Undo a take."""
        buckets = self._buckets
        for key, period, limit, cost in charges:
            full_at = buckets.get(key)
            if full_at is not None:
                buckets[key] = full_at - cost * period // limit
                self._changed_buckets[key] = None

    def note(self, charges: Sequence[Charge]) -> None:
        """Take charges as far as they are available."""
        now = self._clock()
        buckets = self._buckets
        for key, period, limit, cost in charges:
            full_at = max(buckets.get(key, now), now) + cost * period // limit
            buckets[key] = min(full_at, now + period)
            self._changed_buckets[key] = None
        if len(buckets) > self._most:
            self._shrink_buckets(now)

    # ---- greylisting

    def greylist(self, key: str, times: GreylistTimes) -> int:
        """Note an attempt. Return 0 if it passes, otherwise the nanoseconds after which another one would."""
        now = self._clock()
        entry = self._greylist.get(key)
        if entry is None or entry.expires <= now:
            self._note(key, Greylisted(now, now + times.window, has_passed=False))
            if len(self._greylist) > self._most:
                self._shrink_greylist(now)
            return times.delay
        if entry.has_passed:
            if entry.expires - now < times.remember - times.remember // _REFRESH:
                self._note(key, Greylisted(entry.first, now + times.remember, has_passed=True))
            return 0
        wait = entry.first + times.delay - now
        if wait > 0:
            return min(wait, times.delay)
        self._note(key, Greylisted(entry.first, now + times.remember, has_passed=True))
        self.passes += 1
        return 0

    def learn(self, entries: Iterable[Learned]) -> None:
        """Take over what other servers have noted: the earlier first attempt, and what has passed anywhere."""
        now = self._clock()
        for key, first, expires, has_passed in entries:
            mine = self._greylist.get(key)
            entry = Greylisted(min(first, now), expires, has_passed)  # their clock may be ahead
            if expires <= now:
                continue
            if mine is not None and mine.expires > now:
                has_passed_once = has_passed or mine.has_passed
                longest = max(each.expires for each in (entry, mine) if each.has_passed == has_passed_once)
                entry = Greylisted(min(entry.first, mine.first), longest, has_passed_once)
            if entry != mine:
                self._note(key, entry)
                if len(self._greylist) > self._most:
                    self._shrink_greylist(now)

    def _note(self, key: str, entry: Greylisted) -> None:
        self._greylist[key] = entry
        self._changed_greylist[key] = None

    # ---- bounds

    def _shrink_buckets(self, now: int) -> None:
        buckets = self._buckets
        for chances in range(_SECOND_CHANCES, -1, -1):
            key = next(iter(buckets))
            full_at = buckets.pop(key)
            self._changed_buckets[key] = None
            if full_at <= now or not chances:
                return
            buckets[key] = full_at

    def _shrink_greylist(self, now: int) -> None:
        greylist = self._greylist
        for chances in range(_SECOND_CHANCES, -1, -1):
            key = next(iter(greylist))
            entry = greylist.pop(key)
            self._changed_greylist[key] = None
            if entry.expires <= now or not entry.has_passed or not chances:
                return
            greylist[key] = entry

    def sweep(self, entries: int) -> None:
        """Forget what no longer matters, among the `entries` of each table that were looked at longest ago."""
        now = self._clock()
        for _ in range(min(entries, len(self._buckets))):
            key = next(iter(self._buckets))
            full_at = self._buckets.pop(key)
            if full_at <= now:
                self._changed_buckets[key] = None
            else:
                self._buckets[key] = full_at
        for _ in range(min(entries, len(self._greylist))):
            key = next(iter(self._greylist))
            entry = self._greylist.pop(key)
            if entry.expires <= now:
                self._changed_greylist[key] = None
            else:
                self._greylist[key] = entry

    # ---- snapshots

    def take_changes(self) -> Changes:
        """Return the keys that have changed since the last call."""
        changes = Changes(list(self._changed_buckets), list(self._changed_greylist))
        self._changed_buckets, self._changed_greylist = {}, {}
        return changes

    def mark_changed(self, changes: Changes) -> None:
        """Undo `take_changes`: these changes could not be saved."""
        self._changed_buckets.update(dict.fromkeys(changes.buckets))
        self._changed_greylist.update(dict.fromkeys(changes.greylist))

    def bucket(self, key: str) -> int | None:
        """Return when a bucket is full again; None if it is full. Any thread may call it."""
        return self._buckets.get(key)

    def greylisted(self, key: str) -> Greylisted | None:
        """Return what is known of a key. Any thread may call it."""
        return self._greylist.get(key)

    def now(self) -> int:
        """Return the time, in nanoseconds since the epoch. Any thread may call it."""
        return self._clock()

    def load(self, buckets: Iterable[tuple[str, int]], greylist: Iterable[tuple[str, Greylisted]]) -> None:
        """Fill the tables from a snapshot, as far as its entries still matter."""
        now = self._clock()
        self._buckets.update((key, full_at) for key, full_at in buckets if full_at > now)
        self._greylist.update((key, entry) for key, entry in greylist if entry.expires > now)
