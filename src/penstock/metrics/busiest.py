"""Counts by destination with a bounded number of names: the busiest have one, the others are counted together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from penstock.metrics.families import OTHER

_CANDIDATES: Final = 10
"""Destinations whose activity is remembered, for each one that has a name."""
_HALF_LIFE: Final = 300.0
"""Seconds after which an attempt counts half in the choice of the busiest."""

Counts = list[int]


class Busiest:
    """Sums of several counters by name, for at most `most` names and OTHER.

    No sum ever decreases while it has a name. A destination that is replaced by a busier one leaves its counts to
    OTHER, so that the sum of all is exact.
    """

    def __init__(self, most: int, width: int, clock: Callable[[], float]) -> None:
        """Each name has `width` counters."""
        self._most = most
        self._width = width
        self._clock = clock
        self._named: dict[str, Counts] = {}
        self._other = [0] * width
        self._activity: dict[str, float] = {}
        self._halved_at = clock()

    def use(self, most: int) -> None:
        """Change the maximum number of names; the least busy ones lose theirs."""
        self._most = most
        while len(self._named) > most:
            self._drop(self._least())

    def add(self, name: str, counts: Counts) -> None:
        """Add to the counters of a destination. A name of "other" is counted as that."""
        self._decay()
        if name != OTHER and self._most:
            self._activity[name] = activity = self._activity.get(name, 0.0) + sum(counts)
            if name not in self._named:
                self._admit(name, activity)
            if len(self._activity) > self._most * _CANDIDATES:
                self._prune()
        total = self._named.get(name, self._other)
        for place, count in enumerate(counts):
            total[place] += count

    def _admit(self, name: str, activity: float) -> None:
        """Give a destination a name of its own if there is space, or if it is twice as busy as the least busy one."""
        if len(self._named) >= self._most:
            least = self._least()
            if activity < 2 * self._activity.get(least, 0.0):
                return
            self._drop(least)
        self._named[name] = [0] * self._width

    def _least(self) -> str:
        return min(self._named, key=lambda each: self._activity.get(each, 0.0))

    def _drop(self, name: str) -> None:
        """Count a destination as OTHER from now on."""
        left = self._named.pop(name)
        self._other = [before + more for before, more in zip(self._other, left, strict=True)]

    def _decay(self) -> None:
        if self._clock() - self._halved_at >= _HALF_LIFE:
            self._halved_at = self._clock()
            self._activity = {name: value / 2 for name, value in self._activity.items()}

    def _prune(self) -> None:
        """Forget the less busy half of the candidates."""
        kept = sorted(self._activity, key=lambda each: self._activity[each], reverse=True)
        kept = kept[: self._most * _CANDIDATES // 2]
        self._activity = {name: self._activity[name] for name in {*kept, *self._named} if name in self._activity}

    def sums(self) -> dict[str, Counts]:
        """Return the counters by name; those of OTHER are always there."""
        return {**self._named, OTHER: self._other}
