"""If the process has no descriptor left, new clients receive 421 instead of waiting without a reply.

A descriptor is kept in reserve. It is closed to accept one client, who is refused, and opened again; so waiting
clients are refused one after the other, a batch at a time, without effect on those that are served.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from penstock.journal import Journal
from penstock.net._poller import accept, close

_BATCH: Final = 64
"""Clients that are refused at a time."""
_SILENT: Final = 60.0
"""Seconds after a journal line in which failures to accept are only counted."""

Refuse = Callable[[int, str, int], None]
"""Refuses an accepted client, and closes its descriptor. Must not raise."""


class Shortage:
    """The reserve descriptor of a worker."""

    def __init__(self, journal: Journal, clock: Callable[[], float]) -> None:
        self._journal = journal
        self._clock = clock
        self._spare = -1
        self._told_at = -_SILENT
        self._untold = 0
        self._keep()

    def note(self, exc: OSError) -> None:
        """Count a failure to accept, and journal it at most once a minute."""
        self._untold += 1
        if self._journal.counters is not None:
            self._journal.counters.count("accept_errors_total")
        now = self._clock()
        if now - self._told_at >= _SILENT:
            self._journal.shortage(exc.strerror or str(exc), self._untold)
            self._told_at, self._untold = now, 0

    def refuse(self, listener: socket.socket, refuse: Refuse) -> None:
        """Refuse some of the waiting clients, with the reserve descriptor."""
        for _ in range(_BATCH):
            if self._spare < 0:
                self._keep()
            if self._spare < 0:
                return
            close(self._spare)
            self._spare = -1
            try:
                accepted = accept(listener.fileno())
            except OSError:
                accepted = None
            if accepted is not None:
                if self._journal.counters is not None:
                    self._journal.counters.count("admission_refused_total", reason="descriptors")
                refuse(*accepted)
            self._keep()
            if accepted is None:
                return

    def close(self) -> None:
        """Close the reserve descriptor."""
        if self._spare >= 0:
            close(self._spare)
            self._spare = -1

    def _keep(self) -> None:
        """Open the reserve descriptor, if one is available."""
        with suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
