"""Statistics of a sink of several processes (`penstock sink --workers N`): what each counts, added up.

Counts and histograms are added exactly, bucket by bucket, and sequence tags as sets: a message that came to two workers
is a duplicate. A second of the run is complete once all workers that still run have reported it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from penstock.metrics._histogram import Histogram
from penstock.metrics._session import Metrics
from penstock.sink.report import FaultCount, Sample

_SUMS: Final = ("messages", "replies", "sessions", "connected", "received", "octets", "faults")
_MAX_SAMPLES: Final = 600


class Second(msgspec.Struct):
    """What one worker has counted in one second."""

    sample: Sample
    messages: dict[str, Any]
    """Latencies of messages, as `Histogram.to_dict` has them."""
    replies: dict[str, Any]


class WorkerReport(msgspec.Struct):
    """What a worker has counted from its start to its end."""

    counts: dict[str, int]
    """Sessions, messages, recipients and octets."""
    metrics: dict[str, Any] | None = None
    """See `Metrics.state`; None without statistics."""
    faults: list[FaultCount] = []
    rest: Second | None = None
    """What it has counted since its last whole second."""


def merged(seconds: Sequence[Second]) -> Sample:
    """Return the sample of all workers together."""
    samples = [each.sample for each in seconds]
    messages, replies = Histogram(), Histogram()
    codes: Counter[str] = Counter()
    for each in seconds:
        messages.merge(Histogram.from_dict(each.messages))
        replies.merge(Histogram.from_dict(each.replies))
        codes.update(each.sample.codes)
    return Sample(
        at=max(each.at for each in samples),
        seconds=max(each.seconds for each in samples),
        **{name: sum(getattr(each, name) for each in samples) for name in _SUMS},
        codes=dict(codes),
        p50=messages.percentile(50),
        p90=messages.percentile(90),
        p99=messages.percentile(99),
        max=messages.max,
        reply_p50=replies.percentile(50),
        reply_p99=replies.percentile(99),
    )


class Merging:
    """Adds up what the workers report. Is the `FaultBook` and the `Traffic` of the statistics made of it."""

    octets_under_way: Final = 0
    """Workers report when their connections have ended."""

    def __init__(self, workers: int, metrics: Metrics | None) -> None:
        self.metrics = metrics
        self.counts: Counter[str] = Counter()
        """Sessions, messages, recipients and octets of the workers that have ended."""
        self.samples: deque[Sample] = deque(maxlen=_MAX_SAMPLES)
        """The seconds that are complete, newest last."""
        self.messages = 0
        """Messages in all complete seconds."""
        self._faults: Counter[tuple[str, str, str]] = Counter()
        self._waiting: dict[int, list[Second]] = {}
        """Seconds that not all workers have reported, by their number."""
        self._reported = dict.fromkeys(range(workers), 0)
        """Seconds that each running worker has reported."""

    def add_second(self, worker: int, second: Second) -> list[Sample]:
        """Add a second of a worker. Return the samples that are complete now."""
        number = self._reported[worker]
        self._reported[worker] += 1
        self._waiting.setdefault(number, []).append(second)
        return self._complete()

    def add_report(self, worker: int, report: WorkerReport) -> None:
        """Add the report of a worker that has ended."""
        number = self._reported.pop(worker)
        if report.rest is not None:
            self._waiting.setdefault(number, []).append(report.rest)
        self.counts.update(report.counts)
        for fault in report.faults:
            self._faults[fault.rule, fault.phase, fault.action] += fault.count
        if self.metrics is not None and report.metrics is not None:
            self.metrics.add(report.metrics)
        self._complete()

    def _complete(self) -> list[Sample]:
        found = []
        behind = min(self._reported.values(), default=None)
        while self._waiting and (behind is None or min(self._waiting) < behind):
            found.append(merged(self._waiting.pop(min(self._waiting))))
        self.samples += found
        self.messages += sum(each.messages for each in found)
        return found

    # ---- as a FaultBook

    def counted(self) -> list[FaultCount]:
        """Return the faults of all workers by rule, phase and action."""
        return [FaultCount(rule=r, phase=p, action=a, count=n) for (r, p, a), n in sorted(self._faults.items())]

    def reset(self) -> None:
        """Forget the faults."""
        self._faults.clear()
