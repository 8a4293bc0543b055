"""Starts each message of an open loop at its own time.

trio's clock has steps of a millisecond, in which ten messages may be due: the server would be measured with bursts that
the schedule does not have. Therefore a kernel timer is registered with the poller, beside the sockets, and fires when
the next message is due. The price is one wake-up per message, paid only by a generator that has nothing else to do;
above ten thousand messages per second several start at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Final

from penstock.load.schedule import Schedule
from penstock.net._poller import Poller, Protocol, Timer

_MIN_PAUSE: Final = 100_000
"""Nanoseconds between two checks of what is due."""


class Pace(Protocol):
    """Calls `start` with the intended start of each message, in nanoseconds of the clock, when it is due."""

    def __init__(
        self,
        poller: Poller,
        schedule: Schedule,
        most: int | None,
        start: Callable[[int], None],
        *,
        first: int = 0,
        step: int = 1,
    ) -> None:
        """Start the messages `first`, `first + step`, ... of the schedule, `most` of them. Raise OSError."""
        self._schedule = schedule
        self._most = most
        self._start = start
        self._first = first
        self._step = step
        self._count = 0
        """Messages that were due so far."""
        self._is_closed = False
        self._poller = poller
        self._timer = Timer()
        self._watch = poller.watch(self._timer.fd)
        self._watch.protocol = self
        self._begun = perf_counter_ns()
        self._next = self._due()
        self._timer.set(self._begun)

    @property
    def is_over(self) -> bool:
        """The last message was due."""
        return self._count == self._most

    def start_due(self) -> None:
        """Start the messages that are due."""
        start = self._start
        now = perf_counter_ns()
        while not self._is_closed and not self.is_over and self._next <= now:
            at = self._next
            self._count += 1
            self._next = self._due()
            start(at)

    def close(self) -> None:
        """Start no more messages."""
        self._is_closed = True
        self._watch.protocol = None
        self._poller.forget(self._watch)
        self._timer.close()

    # ---- called by the poller

    def recv(self, fd: int, _: int = 8, /) -> int:
        """Read the expiry of the timer."""
        return self._timer.recv(fd)

    def connection_lost(self, _: int, failure: BaseException | None) -> None:
        """Let an exception of `start` end the run."""
        assert failure is not None
        raise failure

    def data_received(self, _: int) -> bytes:
        """Start what is due, and set the timer for the next message."""
        self.start_due()
        if not self.is_over and not self._is_closed:
            self._timer.set(max(self._next, perf_counter_ns() + _MIN_PAUSE))
        return b""

    def _due(self) -> int:
        """Return when the next message is due; after the last one, any time."""
        if self.is_over:
            return 0
        return self._begun + int(self._schedule.due(self._first + self._count * self._step) * 1e9)
