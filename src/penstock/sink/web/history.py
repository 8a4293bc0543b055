"""The whole run of a sink in a bounded number of samples: neighbours are merged when there are too many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from penstock.sink.report import SUMS, Sample, codes_of
from penstock.sink.statistics import Statistics

_WORST: Final = ("sessions", "p50", "p90", "p99", "max", "reply_p50", "reply_p99")
MAX_POINTS: Final = 720
"""Even, so that pairs can be merged."""


class History:
    """The samples since the start or the last reset."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._points: list[Sample] = []
        self._group: list[Sample] = []
        self.span = 1
        """Samples per point."""
        self._generation = statistics.generation
        self._taken = 0

    @property
    def points(self) -> list[Sample]:
        """All samples so far, oldest first; the last point may cover less time than the others."""
        return [*self._points, merge(self._group)] if self._group else list(self._points)

    async def follow(self) -> None:
        """Collect samples until cancelled."""
        while True:
            self.update()
            await self._statistics.wait_for_news()

    def update(self) -> None:
        """Collect the samples that were taken since the last call."""
        statistics = self._statistics
        if statistics.generation != self._generation:
            self._points, self._group, self.span, self._taken = [], [], 1, statistics.taken - len(statistics.samples)
            self._generation = statistics.generation
        count = min(statistics.taken - self._taken, len(statistics.samples))
        for sample in list(statistics.samples)[len(statistics.samples) - count :]:
            self._add(sample)
        self._taken = statistics.taken

    def _add(self, sample: Sample) -> None:
        self._group.append(sample)
        if len(self._group) < self.span:
            return
        self._points.append(merge(self._group))
        self._group = []
        if len(self._points) >= MAX_POINTS:
            self._points = [merge(self._points[at : at + 2]) for at in range(0, MAX_POINTS, 2)]
            self.span *= 2


def merge(samples: Sequence[Sample]) -> Sample:
    """Return samples as one. Counts are added; latencies and sessions are those of the worst sample."""
    return Sample(
        at=samples[-1].at,
        seconds=round(sum(each.seconds for each in samples), 3),
        codes=dict(codes_of(samples)),
        **{name: sum(getattr(each, name) for each in samples) for name in SUMS},
        **{name: max(getattr(each, name) for each in samples) for name in _WORST},
    )
