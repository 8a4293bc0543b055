"""Free space and inodes of the file system with the spool, checked once a second."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import trio

_INTERVAL: Final = 1.0
"""Seconds between two checks."""


class DiskSpace:
    """How many octets and files the file system can take before the reserve is touched."""

    def __init__(self, folder: Path, *, reserve_octets: int, reserve_inodes: int) -> None:
        self._folder = folder
        self._reserve_octets = reserve_octets
        self._reserve_inodes = reserve_inodes
        self.octets = 0
        """Octets free above the reserve, possibly negative; what is written before the next check is subtracted."""
        self.has_inodes = True
        """Files can be created."""
        self.check()

    def has_capacity(self, octets: int) -> bool:
        """Return whether a message of this size fits."""
        return self.has_inodes and self.octets >= octets

    def count(self, octets: int) -> None:
        """Count octets written since the last check."""
        self.octets -= octets

    def check(self) -> None:
        """Query the file system. If that fails, assume that there is space: the write will fail if not."""
        try:
            found = os.statvfs(self._folder)
        except OSError:
            return
        self.octets = found.f_bavail * found.f_frsize - self._reserve_octets
        # A file system without a fixed number of inodes reports 0.
        self.has_inodes = found.f_files == 0 or found.f_favail >= self._reserve_inodes

    async def run(self) -> None:
        """Check periodically until cancelled. A file system that hangs blocks only this task."""
        while True:
            await trio.sleep(_INTERVAL)
            await trio.to_thread.run_sync(self.check, abandon_on_cancel=True)
