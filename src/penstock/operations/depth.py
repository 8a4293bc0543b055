"""How much waits in all parts of the spool together. No worker is asked."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from penstock.config import Settings
from penstock.metrics.collect import LONGEST_NAME, Sums
from penstock.metrics.families import OTHER, series
from penstock.privileges import Account, acting_as
from penstock.spool.depth import Depth, count
from penstock.spool.spool import shard_of, shards

_LEAST_PAUSE: Final = 2.0
"""Seconds between two counts."""
_SHARE: Final = 20
"""A count that takes a second is repeated after twenty: counting millions of messages must not load the disk."""


class SpoolDepth:
    """Counts what waits, at most every few seconds."""

    def __init__(
        self, settings: Settings, account: Account | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._account = account
        self._folder = Path(settings.data_dir).absolute() / settings.spool.path
        self._reserve = settings.spool.reserve_octets
        self._is_fallback = settings.delivery.kind == "jetstream"
        self._clock = clock
        self._known = Depth()
        self._next = 0.0
        self._lock = trio.Lock()

    async def count(self, queues: int) -> Depth:
        """Return the depth, counted a moment ago; that of an empty spool if it cannot be read."""
        async with self._lock:
            if trio.current_time() >= self._next:
                began = trio.current_time()
                self._known = await trio.to_thread.run_sync(self._count, queues, abandon_on_cancel=True)
                took = trio.current_time() - began
                self._next = began + max(_LEAST_PAUSE, took * _SHARE)
        return self._known

    async def series(self, queues: int) -> Sums:
        """Return the metrics of the depth, with at most `queues` domains."""
        depth = await self.count(queues)
        age = max(0.0, self._clock() - depth.oldest) if depth.oldest else 0.0
        found: Sums = {
            ("g", "spool_messages"): depth.messages,
            ("g", "spool_recipients"): depth.recipients,
            ("g", "spool_octets"): depth.octets,
            ("g", "spool_oldest_seconds"): round(age),
            ("g", "spool_free_octets"): self._free(),
        }
        if self._is_fallback:
            found["g", "jetstream_forward_waiting"] = depth.messages
        rest = depth.recipients
        for name, recipients in depth.queues:
            rest -= recipients
            found["g", series("relay_queue", {"destination": name}, LONGEST_NAME)] = recipients
        found["g", series("relay_queue", {"destination": OTHER})] = max(0, rest)
        return found

    def _count(self, queues: int) -> Depth:
        """Count all parts. One that cannot be read, such as one that is being made, counts nothing."""
        total = Depth()
        with suppress(OSError), acting_as(self._account):
            for index in shards(self._folder):
                with suppress(sqlite3.Error):
                    total = total.plus(count(self._folder.parent / shard_of(self._folder.name, index), queues))
        return total._replace(queues=total.queues[:queues])

    def _free(self) -> int:
        """Return the free octets of the file system above the reserve."""
        try:
            found = os.statvfs(self._folder)
        except OSError:
            return 0
        return max(0, found.f_bavail * found.f_frsize - self._reserve)
