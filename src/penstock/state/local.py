"""The state of a server that is one process."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import trio

from penstock.state.base import Charge, GreylistTimes, Learned
from penstock.state.snapshot import Snapshot
from penstock.state.tables import Tables

SAVE_INTERVAL: Final = 10.0
"""Seconds after which changes are saved. What has passed greylisting is saved at once."""
PAUSE: Final = 0.25
"""Seconds between two saves."""
SWEEP: Final = 2000
"""Entries of each table that are looked at between two saves."""


class LocalState:
    """The tables, in this process (penstock.state.base.State). An operation neither waits nor fails."""

    def __init__(
        self,
        path: Path,
        report: Callable[[str], None],
        *,
        tables: Tables | None = None,
        interval: float = SAVE_INTERVAL,
    ) -> None:
        """`path` is the snapshot. `report` is called with an error of it, in one line."""
        self.tables = Tables() if tables is None else tables
        self._snapshot = Snapshot(path)
        self._report = report
        self._interval = interval
        self._has_passes = trio.Event()
        self._is_failing = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Load the snapshot, then `started`; save changes until cancelled, and at the end.

        Raise OSError or sqlite3.Error if the snapshot can be neither used nor put aside.
        """
        problem = await trio.to_thread.run_sync(self._snapshot.load, self.tables)
        if problem:
            self._report(problem)
        task_status.started()
        try:
            while True:
                with trio.move_on_after(self._interval):
                    await self._has_passes.wait()
                self._has_passes = trio.Event()
                await self._save()
                self.tables.sweep(SWEEP)
                await trio.sleep(PAUSE)
        finally:
            with trio.CancelScope(shield=True):
                await self._save()

    async def _save(self) -> None:
        changes = self.tables.take_changes()
        if not changes:
            return
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(partial(self._snapshot.save, self.tables, changes))
            self._is_failing = False
        except (OSError, sqlite3.Error) as exc:
            self.tables.mark_changed(changes)
            if not self._is_failing:  # once, until it works again
                self._report(f"greylisting and rates cannot be saved: {exc}")
            self._is_failing = True

    def available(self, charges: Sequence[Charge]) -> int:
        """Return the index of the first charge that is not available now, -1 if all are."""
        return self.tables.available(charges)

    def take(self, charges: Sequence[Charge]) -> int:
        """Take all charges and return -1, or take none and return the index of the first that is not available."""
        return self.tables.take(charges)

    def greylist(self, key: str, times: GreylistTimes) -> int:
        """Note an attempt. Return 0 if it passes, otherwise the nanoseconds after which another one would."""
        passes = self.tables.passes
        wait = self.tables.greylist(key, times)
        if self.tables.passes != passes:
            self._has_passes.set()
        return wait

    def give_back(self, charges: Sequence[Charge]) -> None:
        """Undo a take."""
        self.tables.give_back(charges)

    def note(self, charges: Sequence[Charge]) -> None:
        """Take charges as far as they are available."""
        self.tables.note(charges)

    def learn(self, entries: Sequence[Learned]) -> None:
        """Take over what other servers have noted."""
        self.tables.learn(entries)
