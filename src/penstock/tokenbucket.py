"""A token bucket: a rate with a burst. The caller passes the time."""

from __future__ import annotations

import math


class TokenBucket:
    """Allows `rate` things per second on average, and `burst` at once; a rate of 0 is no limit.

    It is full at first. Costs no memory beyond three numbers.
    """

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: float | None = None) -> None:
        """`burst` is at least 1; by default what the rate allows in a second."""
        self._rate = rate or math.inf
        self._burst = max(1.0, self._rate if burst is None else burst)
        self._tokens = self._burst
        self._at = -math.inf

    def _fill(self, now: float) -> float:
        if self._rate != math.inf and now > self._at:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
            self._at = now
        return self._tokens

    def available(self, now: float) -> int:
        """Return how many things are allowed now, at most a million."""
        return int(min(self._fill(now), 1e6))

    def take(self, now: float) -> bool:
        """Take one token if there is one. Return whether there was."""
        if self._fill(now) < 1:
            return False
        self._tokens -= 1
        return True

    def is_full(self, now: float) -> bool:
        """Return whether it is full, as if it had never been used."""
        return self._fill(now) >= self._burst
