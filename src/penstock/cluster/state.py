"""The state of checks on a node: that of the machine, with what other nodes have found (penstock.cluster.exchange)."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import trio

from penstock.cluster.exchange import Exchange
from penstock.state import Charge, GreylistTimes, Later, Learned, State

_REFRESH: Final = 16
"""What has passed is shared again after a 16th of the time for which it is remembered (penstock.state.tables)."""
_MOST_SHARED: Final = 100_000
_LARGEST: Final = 1 << 62
"""Of the numbers of a charge: a time to which a period is added is still an integer of 64 bits."""


class RunningState(State, Protocol):
    """A state with a task of its own."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled."""


class SharedState:
    """Answers from the state of the machine, and shares what was found (penstock.state.base.State)."""

    def __init__(
        self,
        inner: RunningState,
        exchange: Exchange,
        clock: Callable[[], int] = time.time_ns,
        *,
        learns: bool = True,
    ) -> None:
        """`clock` returns nanoseconds since the epoch. With `learns`, what other nodes have found is added to `inner`.

        One of the workers that share `inner` learns: with more of them everything would be counted several times.
        """
        self._inner = inner
        self._exchange = exchange
        self._clock = clock
        self._shared: dict[str, int] = {}
        """What has passed, and when it is shared again; the oldest first."""
        if learns:
            exchange.on_greylist = inner.learn
            exchange.on_rates = self._take_over

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the state of the machine."""
        await self._inner.run(task_status=task_status)

    def _take_over(self, charges: Sequence[Charge]) -> None:
        """Count what was taken at other nodes. What they give back stays counted here, until it is refilled.

        A return may be more than was counted here: it would raise the limit.
        """
        valid = [charge for charge in charges if all(0 < number < _LARGEST for number in charge[1:])]
        if valid:
            self._inner.note(valid)

    def available(self, charges: Sequence[Charge]) -> Later:
        """Return the index of the first charge that is not available now, -1 if all are."""
        return self._inner.available(charges)

    def take(self, charges: Sequence[Charge]) -> Later:
        """Take all charges and return -1, or take none and return the index of the first that is not available."""
        return self._then(self._inner.take(charges), lambda refused: self._taken(refused, charges))

    def _taken(self, refused: int, charges: Sequence[Charge]) -> None:
        if refused < 0:
            self._exchange.note_rates(charges)

    def greylist(self, key: str, times: GreylistTimes) -> Later:
        """Note an attempt. Return 0 if it passes, otherwise the nanoseconds after which another one would."""
        return self._then(self._inner.greylist(key, times), lambda wait: self._greylisted(wait, key, times))

    def _greylisted(self, wait: int, key: str, times: GreylistTimes) -> None:
        now = self._clock()
        if wait == times.delay:
            self._exchange.note_greylist(Learned(key, now, now + times.window, has_passed=False))
        elif not wait and self._shared.get(key, 0) <= now:
            self._shared.pop(key, None)
            self._shared[key] = now + times.remember // _REFRESH
            while len(self._shared) > _MOST_SHARED:
                del self._shared[next(iter(self._shared))]
            self._exchange.note_greylist(Learned(key, now, now + times.remember, has_passed=True))

    def give_back(self, charges: Sequence[Charge]) -> None:
        """Undo a take."""
        self._inner.give_back(charges)
        self._exchange.note_rates(charges, -1)

    def note(self, charges: Sequence[Charge]) -> None:
        """Take charges as far as they are available."""
        self._inner.note(charges)
        self._exchange.note_rates(charges)

    def learn(self, entries: Sequence[Learned]) -> None:
        """Take over what others have noted."""
        self._inner.learn(entries)

    @staticmethod
    def _then(answer: Later, act: Callable[[int], None]) -> Later:
        """Do something with an answer, at once if it comes at once."""
        if isinstance(answer, int):
            act(answer)
            return answer
        return _later(answer, act)


async def _later(answer: Awaitable[int], act: Callable[[int], None]) -> int:
    found = await answer
    act(found)
    return found
