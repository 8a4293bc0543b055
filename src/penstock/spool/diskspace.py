"""Whether there is room: free space and inodes of the file system that the spool lies on, looked at once a second."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import trio

_INTERVAL: Final = 1.0
"""Seconds between two looks."""


class Room:
    """How many octets and files the file system still takes before the reserve is touched."""

    def __init__(self, folder: Path, *, reserve_octets: int, reserve_inodes: int) -> None:
        self._folder = folder
        self._reserve_octets = reserve_octets
        self._reserve_inodes = reserve_inodes
        self.octets = 0
        """Octets that are left above the reserve, perhaps less than none; what comes before the next look counts."""
        self.has_inodes = True
        """Files may be made."""
        self.look()

    def takes(self, octets: int) -> bool:
        """Say whether there is room for a message of so many octets."""
        return self.has_inodes and self.octets >= octets

    def used(self, octets: int) -> None:
        """Count octets that were written since the last look."""
        self.octets -= octets

    def look(self) -> None:
        """Look at the file system. One that can not be looked at has room: writing will tell."""
        try:
            found = os.statvfs(self._folder)
        except OSError:
            return
        self.octets = found.f_bavail * found.f_frsize - self._reserve_octets
        # A file system without a fixed number of inodes tells none at all.
        self.has_inodes = found.f_files == 0 or found.f_favail >= self._reserve_inodes

    async def keep_looking(self) -> None:
        """Look from time to time, until cancelled. A file system that hangs holds up nobody but this."""
        while True:
            await trio.sleep(_INTERVAL)
            await trio.to_thread.run_sync(self.look, abandon_on_cancel=True)
