"""The interface of the shared state. Every operation is atomic, also among workers."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import NamedTuple, Protocol


class StateUnavailableError(Exception):
    """The process that has the state did not answer in time. Checks are left out then (fail open)."""


class Charge(NamedTuple):
    """What something costs under a rate limit: `cost` of the `limit` units that `key` may use within `period`.

    A limit is a bucket of `limit` units which is full at first and is refilled evenly, `limit` units per period. So at
    most `limit` units can be used at once, and a cost above the limit is never available.
    Limits up to a million are exact, larger ones to a millionth.
    """

    key: str
    """The name of the rule and what it counts by."""
    period: int
    """Nanoseconds, at least 1."""
    limit: int
    """At least 1."""
    cost: int = 1


class GreylistTimes(NamedTuple):
    """The times of greylisting, in nanoseconds."""

    delay: int
    """An attempt this long after the first one passes."""
    window: int
    """A first attempt is forgotten after this time without an attempt that passes."""
    remember: int
    """What has passed is forgotten this long after the last attempt."""


class Learned(NamedTuple):
    """What another server has noted of an attempt. Times are nanoseconds since the epoch."""

    key: str
    first: int
    """The first attempt."""
    expires: int
    has_passed: bool


Later = int | Awaitable[int]
"""A result, or an awaitable of it: most results are available at once, without waiting."""


class State(Protocol):
    """Rate limits and greylisting, shared by all sessions.

    The operations raise StateUnavailableError, at once or when awaited.
    """

    def available(self, charges: Sequence[Charge]) -> Later:
        """Return the index of the first charge that is not available now, -1 if all are. Takes nothing."""

    def take(self, charges: Sequence[Charge]) -> Later:
        """Take all charges if all are available, and return -1.

        Otherwise take none, and return the index of the first that is not available.
        """

    def greylist(self, key: str, times: GreylistTimes) -> Later:
        """Note an attempt. Return 0 if it passes, otherwise the nanoseconds after which another attempt would."""

    def give_back(self, charges: Sequence[Charge]) -> None:
        """Undo a `take`. Does not wait, and does not raise: without the state nothing has been taken either."""

    def note(self, charges: Sequence[Charge]) -> None:
        """Take charges as far as they are available. Does not wait, and does not raise."""

    def learn(self, entries: Sequence[Learned]) -> None:
        """Take over what other servers have noted of attempts. Does not wait, and does not raise."""
