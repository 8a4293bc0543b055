"""Notices when the clock of the machine is set.

Due times, expiry and delay notices are seconds since the epoch, as they outlive the process. When CLOCK_REALTIME jumps
(a wrong RTC, an operator, NTP after hours without network), a message must not be returned days too early, nor wait for
days. So it is compared with CLOCK_BOOTTIME, which goes on while the machine is suspended and cannot be set. After a
jump, the times at which messages were received are corrected by it: their age stays the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

FORWARD: Final = 600.0
"""A jump forward of more seconds than this puts off expiry and notices..."""
PUT_OFF: Final = 3600.0
"""...by this many seconds: time for an operator, or NTP, to correct the clock."""
BACK: Final = 60.0
"""A jump back of more seconds than this reschedules what is due later than any schedule allows."""


def steady_time() -> float:
    """Return the seconds since the start of the machine, including suspension where the system counts that."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)  # Linux
    return time.monotonic() if boottime is None else time.clock_gettime(boottime)


class ClockGuard:
    """Compares the wall clock with one that cannot be set."""

    def __init__(self, clock: Callable[[], float] = time.time, steady: Callable[[], float] = steady_time) -> None:
        self._clock = clock
        self._steady = steady
        self._offset: float | None = None

    def jump(self) -> float:
        """Return by how many seconds the clock was set since the last call; 0 for less than matters.

        Small corrections, as NTP makes them, do not add up.
        """
        offset = self._clock() - self._steady()
        jump, self._offset = 0.0 if self._offset is None else offset - self._offset, offset
        return jump if jump > FORWARD or jump < -BACK else 0.0
