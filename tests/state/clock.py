"""A clock that tests set."""

from __future__ import annotations

SECOND = 1_000_000_000


class Clock:
    """Nanoseconds since the epoch; starts at a time of the year 2026."""

    def __init__(self, seconds: float = 1_790_000_000) -> None:
        self.now = round(seconds * SECOND)

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)
