"""The intended starts of an open loop, each at its own time.

trio's clock has steps of a millisecond, in which ten messages may be due; a server would be measured with bursts that
nobody asked for. So a timer of the kernel stands in the poller's set between the sockets and goes off when the next
message is due. The price is a wake-up for each, which is only paid by a generator that has nothing else to do; beyond
ten thousand a second several start at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter_ns
from typing import Final

from penstock.net._poller import Poller, Taker, Timer

_LEAST_PAUSE: Final = 100_000
"""Nanoseconds between two looks at what is due."""


def starts_within(seconds: float, rate: float, ramp: float) -> int:
    """Return how many messages are due before so many seconds are over."""
    in_ramp = min(seconds, ramp)
    return math.ceil((in_ramp**2 * rate / (2 * ramp) if ramp else 0.0) + (seconds - in_ramp) * rate)


class Pace(Taker):
    """Calls `start` with the intended time of each message, in nanoseconds of the clock, when it has come."""

    def __init__(
        self, poller: Poller, rate: float, ramp: float, most: int | None, start: Callable[[int], None]
    ) -> None:
        """Start `most` messages at a rate, to which it grows evenly within `ramp` seconds. Raise OSError."""
        self._rate = rate
        self._ramp = ramp
        self._most = most
        self._start = start
        self._number = 0
        """Messages that were due so far."""
        self._is_closed = False
        self._poller = poller
        self._timer = Timer()
        self._watch = poller.watch(self._timer.fd)
        self._watch.taker = self
        self._begun = perf_counter_ns()
        self._timer.set(self._begun)

    @property
    def is_over(self) -> bool:
        """The last message was due."""
        return self._number == self._most

    def look(self) -> None:
        """Start what is due."""
        most, start = self._most, self._start
        now = perf_counter_ns()
        while not self._is_closed and self._number != most and (at := self._begun + self._due(self._number)) <= now:
            self._number += 1
            start(at)

    def close(self) -> None:
        """Start nothing any more."""
        self._is_closed = True
        self._watch.taker = None
        self._poller.forget(self._watch)
        self._timer.close()

    # ---- what the poller calls

    def recv(self, fd: int, _: int = 8, /) -> int:
        """Take note that the timer went off."""
        return self._timer.recv(fd)

    def _woken(self, _: int, failure: BaseException | None) -> bool:
        """See a bug of `start` end the run."""
        assert failure is not None
        raise failure

    def _turn(self, _: int) -> bytes:
        self.look()
        if not self.is_over and not self._is_closed:
            self._timer.set(max(self._begun + self._due(self._number), perf_counter_ns() + _LEAST_PAUSE))
        return b""

    def _due(self, number: int) -> int:
        """Return when a message is due, in nanoseconds from the begin."""
        rate, ramp = self._rate, self._ramp
        in_ramp = rate * ramp / 2
        if number < in_ramp:
            return int((2 * number * ramp / rate) ** 0.5 * 1e9)
        return int((ramp + (number - in_ramp) / rate) * 1e9)
