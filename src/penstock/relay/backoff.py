"""When a message is tried again, when its sender is notified of the delay, and when it is returned."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec

_STEPS: Final = 1 << 16


class RetrySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Retrying what could not be delivered (RFC 5321 4.5.4.1)."""

    schedule: Annotated[
        tuple[Annotated[float, msgspec.Meta(ge=1, le=604_800)], ...],
        msgspec.Meta(
            min_length=1,
            max_length=100,
            description="Seconds from each try to the next; the last one repeats until expire_after",
        ),
    ] = (60, 300, 900, 1800, 3600, 7200, 14_400)
    jitter: Annotated[
        float, msgspec.Meta(ge=0, le=0.9, description="Random part of each wait, so that retries are spread")
    ] = 0.2
    expire_after: Annotated[
        float, msgspec.Meta(ge=1, le=31_536_000, description="Seconds after which a message is returned to its sender")
    ] = 432_000.0
    delay_notice_after: Annotated[
        float,
        msgspec.Meta(ge=0, description="Seconds after which the sender is notified, once, of the delay; 0: never"),
    ] = 14_400.0


class Backoff:
    """Computes times from the settings. Its only state is `put_off`, after a clock jump."""

    def __init__(self, settings: RetrySettings) -> None:
        self._not_before = -math.inf
        """No message expires and no notice is sent before."""
        self.use(settings)

    def use(self, settings: RetrySettings) -> None:
        """Compute later times by other settings. Mail that waits keeps the time of its next try."""
        self._schedule = settings.schedule
        self._jitter = settings.jitter
        self._expire_after = settings.expire_after
        self._notice_after = settings.delay_notice_after

    @property
    def waits(self) -> Sequence[float]:
        """Seconds after the first try, the second and so on, without jitter."""
        return self._schedule

    @property
    def longest_wait(self) -> float:
        """The longest possible wait, with jitter, in seconds."""
        return max(self._schedule) * (1 + self._jitter / 2)

    def put_off(self, until: float) -> None:
        """Let nothing expire and send no notices before a time: the clock may be wrong, and bounces are final."""
        self._not_before = until

    def next_try(self, number: int, attempts: int, queued_at: float, now: float, *, delay_told: bool = False) -> float:
        """Return when a recipient is tried again after `attempts` attempts.

        Not later than the delay notice if that is still to be sent, nor than the expiry: the last try is at the very
        end. The jitter follows from the number of the message and its attempts: messages that failed together come
        back apart, the recipients of a message together, and the same arguments give the same time.
        """
        wait = self._schedule[min(attempts, len(self._schedule)) - 1] if attempts > 0 else self._schedule[0]
        if self._jitter:
            drawn = zlib.crc32(b"%d %d" % (number, attempts)) % _STEPS / _STEPS
            wait *= 1 + self._jitter * (drawn - 0.5)
        when = min(now + wait, max(self.expires(queued_at), now))
        notice_at = self._notice_at(queued_at)
        return when if delay_told or notice_at <= now else min(when, notice_at)

    def expires(self, queued_at: float) -> float:
        """Return when a message that was queued at a time expires."""
        return max(queued_at + self._expire_after, self._not_before)

    def is_expired(self, queued_at: float, now: float) -> bool:
        """Return whether a message that could not be delivered now has expired."""
        return now >= self.expires(queued_at)

    def is_late(self, queued_at: float, now: float) -> bool:
        """Return whether its sender is notified of the delay."""
        return now >= self._notice_at(queued_at)

    def _notice_at(self, queued_at: float) -> float:
        return max(queued_at + self._notice_after, self._not_before) if self._notice_after else math.inf
