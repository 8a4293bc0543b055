"""A circuit breaker: after repeated failures there are no attempts for a while. The caller passes the time."""

from __future__ import annotations

import math


class Breaker:
    """Opens after some failures in a row: for a pause, then for twice as long each time, up to a bound.

    When the pause is over, one attempt (`probe`) is let through; its outcome closes the breaker or opens it again.
    """

    def __init__(self, failures: int, pause: float, longest: float) -> None:
        """`failures` in a row open it, for `pause` seconds at first and for `longest` at most."""
        self._threshold = failures
        self._pause = pause
        self._longest = longest
        self._failures = 0
        self._openings = 0
        self._until = 0.0
        self._opened_at = -math.inf
        self._is_probing = False

    @property
    def is_open(self) -> bool:
        """There were too many failures, and no success since."""
        return self._openings > 0

    @property
    def until(self) -> float:
        """When the next attempt is let through."""
        return self._until

    def blocks(self, now: float) -> bool:
        """Return whether no attempt may be made now."""
        return self._openings > 0 and (self._is_probing or now < self._until)

    def probe(self) -> None:
        """Note that an attempt is made."""
        self._is_probing = self._openings > 0

    def succeeded(self) -> bool:
        """Note a success. Return True if the breaker was open."""
        was_open = self._openings > 0
        self._failures = self._openings = 0
        self._is_probing = False
        return was_open

    def failed(self, now: float) -> bool:
        """Note a failure. Return True if the breaker opens now."""
        self._failures += 1
        if self._failures < self._threshold and not self.is_open:
            return False
        if self.is_open and not self._is_probing:
            return False  # an attempt that was begun before the breaker opened
        self._is_probing = False
        self._opened_at = now
        self._until = now + min(self._longest, self._pause * 2 ** min(self._openings, 32))
        self._openings += 1
        return True

    def try_again(self, asked_at: float, now: float) -> bool:
        """Let one attempt through now, unless there was a failure since `asked_at`. Return whether it may be made."""
        if asked_at <= self._opened_at:
            return False
        self._until = min(self._until, now)
        return True

    def abandon(self) -> None:
        """Note that a probe ended without success or failure."""
        self._is_probing = False
