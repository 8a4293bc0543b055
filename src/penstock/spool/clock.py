"""Notices when the clock of the machine is set.

Due times, expiry and delay notices are seconds since the epoch, as they outlive the process. When CLOCK_REALTIME jumps
(a wrong RTC, an operator, NTP after hours without network), a message must not be returned days too early, nor wait for
days. So it is compared with CLOCK_BOOTTIME, which goes on while the machine is suspended and cannot be set.

After a jump, the times at which the messages of the spool were received are corrected by it, and their ages stay the
same. A message that is older than a jump back gets younger by it: it is returned later, never earlier. Until all of
them are corrected, and for an hour after that, no mail is returned and no notice is sent.

A jump while the server does not run is not noticed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from penstock.spool.entry import ClockJump
from penstock.spool.queue import DurableQueue

FORWARD: Final = 600.0
"""A jump forward of more seconds than this is corrected."""
BACK: Final = 60.0
"""A jump back of more seconds than this is corrected, and reschedules what is due later than any schedule allows."""
PUT_OFF: Final = 3600.0
"""Seconds for which a jump puts off expiry and notices: time for an operator, or NTP, to correct the clock."""


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

    def jump(self, newest: int) -> ClockJump | None:
        """Return the jump of the clock since the last call; None without one that matters.

        `newest` is the number of the newest message. Small corrections, as NTP makes them, do not add up.
        """
        now = self._clock()
        offset = now - self._steady()
        seconds, self._offset = 0.0 if self._offset is None else offset - self._offset, offset
        return ClockJump(seconds, now, newest) if seconds > FORWARD or seconds < -BACK else None


class Ages:
    """Corrects the times of the messages of a queue when the clock is set."""

    def __init__(self, queue: DurableQueue, guard: ClockGuard) -> None:
        self._queue = queue
        self._guard = guard
        self._jumps: deque[ClockJump] = deque()
        """Jumps that the queue is to be corrected by."""
        self._corrected = 0
        """The number of the last message that is corrected by the first of them."""
        self._correcting = trio.Lock()

    @property
    def are_wrong(self) -> bool:
        """Some messages are not corrected yet."""
        return bool(self._jumps)

    def notice(self) -> ClockJump | None:
        """Return the jump of the clock since the last call; None without one that matters."""
        jump = self._guard.jump(self._queue.newest)
        if jump is not None:
            self._jumps.append(jump)
        return jump

    async def correct(self, jumped_back: Callable[[ClockJump], Awaitable[None]] | None = None) -> None:
        """Correct the queue by the jumps that were noticed. `jumped_back` is called after each jump back.

        Raise OSError or sqlite3.Error; then the next call continues.
        """
        async with self._correcting:
            while self._jumps:
                jump = self._jumps[0]
                while self._corrected < jump.newest:
                    self._corrected = await self._queue.shift_received(jump, self._corrected)
                if jump.seconds < 0 and jumped_back is not None:
                    await jumped_back(jump)
                self._jumps.popleft()
                self._corrected = 0
