"""Does what operators ask for with `penstock spool`, which runs in another process (penstock.spool.admin).

The command changes what waits in the spool itself. What the server may have in memory is asked of the server, by rows
in the tables of operator.sql, which are read once a second: what only waits there is held, dropped, retried or returned
at once; what is being delivered is not changed, and reported to the command. Each change is journaled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import trio

from penstock.relay.hop import Outcome, Result
from penstock.relay.recorder import AttemptRecorder
from penstock.relay.scheduler import Scheduler
from penstock.spool.entry import ATTEMPTING, HopState, Instruction

_INTERVAL: Final = 1.0
"""Seconds between two looks."""
_RETURNED: Final = Result(Outcome.FAILED, "returned to the sender by the administrator", "5.0.0", "", is_said=False)


class Operators:
    """Reads the requests of operators, and writes the state of next hops for them."""

    def __init__(self, scheduler: Scheduler, recorder: AttemptRecorder) -> None:
        self._scheduler = scheduler
        self._recorder = recorder
        self._spool = scheduler.spool
        self._journal = scheduler.journal
        self._hops: Sequence[HopState] = ()

    async def run(self) -> None:
        """Look once a second, until cancelled. A spool that cannot be corrected now does not keep operators waiting."""
        while True:
            for act, source in ((self._scheduler.check_clock, "clock"), (self.look, "operators")):
                try:
                    await act()
                except Exception as exc:  # noqa: BLE001 - a disk that fails now may work later
                    self._journal.error(0, source, exc)
            await trio.sleep(_INTERVAL)

    async def look(self) -> None:
        """Do what has been asked for since the last call. Raise OSError or sqlite3.Error."""
        asked = await self._spool.admin_input()
        for event in asked.events:
            self._journal.operated(event.action, event.id, event.recipients)
        if asked.suspended != self._scheduler.suspended:
            before = self._scheduler.suspended
            for name in sorted(asked.suspended ^ before):
                self._journal.suspended(name, is_over=name in before)
            self._scheduler.set_suspended(asked.suspended)
        by_action: dict[str, list[Instruction]] = {}
        for instruction in asked.instructions:
            by_action.setdefault(instruction.action, []).append(instruction)
        for action, instructions in by_action.items():
            await self._obey(action, instructions)
        hops = sorted(self._scheduler.hops_down())
        if hops != self._hops:
            await self._spool.write_hops(hops)
            self._hops = hops

    async def _obey(self, action: str, instructions: Sequence[Instruction]) -> None:
        numbers = {each.row for each in instructions}
        withdrawn = self._scheduler.withdraw(numbers)
        # Between being withdrawn and being written, a recipient is only here: no cancellation may come in between.
        with trio.CancelScope(shield=True):
            ours = {row.number for entry in withdrawn for row in entry.rows}
            at_rest = [each.row for each in instructions if each.state not in (None, ATTEMPTING)]
            try:
                if action == "bounce":
                    withdrawn += await self._spool.take_rows(at_rest)
                else:
                    await self._spool.carry_out(action, sorted(ours), at_rest)
                    ours.update(at_rest)
            except Exception:
                for entry in withdrawn:
                    self._scheduler.give_back(entry)
                raise
            if action == "bounce":
                ours = {row.number for entry in withdrawn for row in entry.rows}
                for entry in withdrawn:
                    self._recorder.record(entry, [_RETURNED] * len(entry.rows))
                await self._spool.answer(sorted(ours), is_done=True)
            else:
                self._scheduler.look()
            await self._spool.answer(sorted(numbers - ours), is_done=False)
