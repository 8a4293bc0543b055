"""What holds the relay back: a breaker for a hop that is down, and a bucket for a rate."""

from __future__ import annotations

import math


class Breaker:
    """Leaves a hop alone that has failed again and again: for a while, then twice as long, up to a bound.

    When the while is over, one connection is let through to see; what comes of it decides.
    """

    def __init__(self, failures: int, pause: float, longest: float) -> None:
        """`failures` in a row open it, for `pause` seconds at first and for `longest` at most."""
        self._most = failures
        self._pause = pause
        self._longest = longest
        self._failures = 0
        self._openings = 0
        self._until = 0.0
        self._opened_at = -math.inf
        self._is_probing = False

    @property
    def is_open(self) -> bool:
        """The hop has failed, and has not worked since."""
        return self._openings > 0

    @property
    def until(self) -> float:
        """When somebody may try again."""
        return self._until

    def blocks(self, now: float) -> bool:
        """Say whether the hop is to be left alone now."""
        return self.is_open and (self._is_probing or now < self._until)

    def probe(self) -> None:
        """Note that somebody tries."""
        self._is_probing = self.is_open

    def succeeded(self) -> bool:
        """Note that the hop works. Return True when it had been left alone."""
        was_open = self.is_open
        self._failures = self._openings = 0
        self._is_probing = False
        return was_open

    def failed(self, now: float) -> bool:
        """Note a failure. Return True when the hop is left alone from now on."""
        self._failures += 1
        if self._failures < self._most and not self.is_open:
            return False
        if self.is_open and not self._is_probing:
            return False  # it was begun before the others had failed
        self._is_probing = False
        self._opened_at = now
        self._until = now + min(self._longest, self._pause * 2 ** min(self._openings, 32))
        self._openings += 1
        return True

    def try_again(self, asked_at: float, now: float) -> bool:
        """Let one connection through now, if the hop has not failed since somebody asked for that. Return whether."""
        if asked_at <= self._opened_at:
            return False
        self._until = min(self._until, now)
        return True

    def abandon(self) -> None:
        """Note that a probe was given up without having come to anything."""
        self._is_probing = False


class Bucket:
    """So many things a second, and no more than a second's worth at once (or one). A rate of 0 is no limit."""

    def __init__(self, rate: float) -> None:
        self._rate = rate or math.inf
        self._most = max(1.0, self._rate)
        self._tokens = self._most
        self._at = 0.0

    def _fill(self, now: float) -> float:
        if self._rate != math.inf:
            self._tokens = min(self._most, self._tokens + (now - self._at) * self._rate)
            self._at = now
        return self._tokens

    def has_room(self, now: float) -> int:
        """Return how many things may be done now, at most a million."""
        return int(min(self._fill(now), 1e6))

    def take(self, now: float) -> bool:
        """Do one thing, if that is allowed now."""
        if self._fill(now) < 1:
            return False
        self._tokens -= 1
        return True
