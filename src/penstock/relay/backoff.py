"""When to try again, when to say that it takes long, and when to give up."""

from __future__ import annotations

import zlib
from typing import Annotated, Final

import msgspec

_STEPS: Final = 1 << 16


class RetrySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Trying again what could not be delivered (RFC 5321 4.5.4.1)."""

    schedule: Annotated[
        tuple[Annotated[float, msgspec.Meta(ge=1, le=604_800)], ...],
        msgspec.Meta(
            min_length=1,
            max_length=100,
            description="Seconds from each try to the next; the last one repeats until expire_after",
        ),
    ] = (60, 300, 900, 1800, 3600, 7200, 14_400)
    jitter: Annotated[
        float, msgspec.Meta(ge=0, le=0.9, description="The part of a wait that is random, so that a mass spreads")
    ] = 0.2
    expire_after: Annotated[
        float, msgspec.Meta(ge=1, le=31_536_000, description="Seconds after which a message is returned to its sender")
    ] = 432_000.0
    delay_notice_after: Annotated[
        float,
        msgspec.Meta(ge=0, description="Seconds after which the sender is told, once, that it takes long; 0: never"),
    ] = 14_400.0


class Backoff:
    """The clock of one message after another. Has no state: what it says follows from its arguments."""

    def __init__(self, settings: RetrySettings) -> None:
        self._schedule = settings.schedule
        self._jitter = settings.jitter
        self._expire_after = settings.expire_after
        self._notice_after = settings.delay_notice_after

    def next_try(self, number: int, attempts: int, queued_at: float, now: float) -> float:
        """Return when a recipient is tried again that has been tried `attempts` times.

        The jitter is drawn from the number of the message and its attempts: messages that failed together come back
        apart, its recipients together, and the same question has the same answer. The last try is at the very end.
        """
        wait = self._schedule[min(attempts, len(self._schedule)) - 1] if attempts > 0 else self._schedule[0]
        if self._jitter:
            drawn = zlib.crc32(b"%d %d" % (number, attempts)) % _STEPS / _STEPS
            wait *= 1 + self._jitter * (drawn - 0.5)
        return min(now + wait, max(self.expires(queued_at), now))

    def expires(self, queued_at: float) -> float:
        """Return when a message is given up that was queued at a time."""
        return queued_at + self._expire_after

    def is_expired(self, queued_at: float, now: float) -> bool:
        """Say whether a message that could not be delivered now is to be given up."""
        return now >= queued_at + self._expire_after

    def is_late(self, queued_at: float, now: float) -> bool:
        """Say whether its sender is to hear that it takes long."""
        return 0 < self._notice_after <= now - queued_at
