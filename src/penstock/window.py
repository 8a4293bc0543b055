"""Counting events per key in a sliding window of time, with bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

MAX_KEYS: Final = 100_000
"""Keys that are counted in a fixed window. Events of further keys are not counted."""


class SlidingWindow:
    """Counts events per key within the last `seconds`, estimated from two fixed windows."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._turn = -1
        self._now: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def count(self, key: str) -> float:
        """Return how many events a key has had within the last window."""
        part = self._advance()
        return self._now.get(key, 0) + self._before.get(key, 0) * (1 - part)

    def add(self, key: str) -> None:
        """Count an event."""
        self._advance()
        if key in self._now or len(self._now) < MAX_KEYS:
            self._now[key] = self._now.get(key, 0) + 1

    def remove(self, key: str) -> None:
        """Take back one event that was added."""
        self._advance()
        for counts in (self._now, self._before):
            if key in counts:
                counts[key] -= 1
                if counts[key] == 0:
                    del counts[key]
                return

    def forget(self, key: str) -> None:
        """Forget all events of a key."""
        self._now.pop(key, None)
        self._before.pop(key, None)

    def _advance(self) -> float:
        """Change the fixed windows when it is time. Return how much of the present one is over, 0 to 1."""
        turn, part = divmod(self._clock() / self._seconds, 1)
        if turn != self._turn:
            self._before = self._now if turn == self._turn + 1 else {}
            self._now = {}
            self._turn = int(turn)
        return part
