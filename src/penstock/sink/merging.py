"""Statistics of a sink of several processes (`penstock sink --workers N`): what each counts, added up.

Counts and histograms are added exactly, bucket by bucket, and sequence tags as sets: a message received by two workers
is a duplicate. Message-IDs are counted here, for all workers. A second of the run is complete once all workers that
still run have reported it. For a page, each second has everything that its worker has counted so far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from penstock.metrics._histogram import Histogram
from penstock.metrics._session import Metrics, SequenceTracker
from penstock.sink.kept import KeptMessage
from penstock.sink.messageids import MessageIdTracker
from penstock.sink.report import SUMS, FaultCount, Sample, codes_of, percentiles_of


class Second(msgspec.Struct):
    """What one worker has counted in one second."""

    sample: Sample
    messages: dict[str, Any]
    """Latencies of messages, as `Histogram.to_dict` has them."""
    replies: dict[str, Any]
    generation: int = 0
    """How often the counters were reset."""
    under_way: int = 0
    """Octets received by the connections that are open."""
    metrics: dict[str, Any] | None = None
    """See `Metrics.state`; only for a page."""
    tags: dict[str, Any] | None = None
    """Sequence tags of the messages of this second (`SequenceTracker.take_changes`); only for a page."""
    faults: list[FaultCount] = []
    """Only for a page."""
    message_ids: list[str] = []
    """Of the messages of this second."""
    further_ids: int = 0


class KeptCopy(msgspec.Struct, array_like=True):
    """A kept message on its way to the parent. Addresses are octets: they need not be UTF-8."""

    id: str
    received_at: float
    sender: bytes
    recipients: list[bytes]
    size: int
    raw: bytes
    is_cut: bool

    @classmethod
    def of(cls, message: KeptMessage) -> KeptCopy:
        """Return a copy of a message."""
        recipients = [_octets(each) for each in message.recipients]
        return cls(
            message.id, message.received_at, _octets(message.sender), recipients, message.size, message.raw,
            message.is_cut,
        )  # fmt: skip

    def message(self) -> KeptMessage:
        """Return the message."""
        recipients = tuple(_text(each) for each in self.recipients)
        return KeptMessage(
            self.id, self.received_at, _text(self.sender), recipients, self.size, self.raw, self.is_cut
        )  # fmt: skip


def _octets(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(octets: bytes) -> str:
    return octets.decode("utf-8", "surrogateescape")


class WorkerReport(msgspec.Struct):
    """What a worker has counted from its start to its end."""

    counts: dict[str, int]
    """Sessions, messages, recipients and octets."""
    metrics: dict[str, Any] | None = None
    """See `Metrics.state`; None without statistics."""
    tags: dict[str, Any] | None = None
    """Sequence tags that no second has reported."""
    faults: list[FaultCount] = []
    rest: Second | None = None
    """What it has counted since its last whole second."""
    trouble: str = ""
    """Why its part of the fault log is incomplete."""


def merged(seconds: Sequence[Second]) -> Sample:
    """Return the sample of all workers together."""
    samples = [each.sample for each in seconds]
    messages, replies = Histogram(), Histogram()
    for each in seconds:
        messages.merge(Histogram.from_dict(each.messages))
        replies.merge(Histogram.from_dict(each.replies))
    return Sample(
        at=max(each.at for each in samples),
        seconds=max(each.seconds for each in samples),
        codes=dict(codes_of(samples)),
        **{name: sum(getattr(each, name) for each in samples) for name in (*SUMS, "sessions")},
        **percentiles_of(messages, replies),
    )


class Merging:
    """Adds up what the workers report. Implements `FaultCounters` and `Traffic` for their statistics."""

    def __init__(
        self,
        workers: int,
        message_ids: MessageIdTracker | None = None,
        on_reset: Callable[[], None] = lambda: None,
    ) -> None:
        """`message_ids` counts the Message-IDs of all workers; `on_reset` lets them reset their counters."""
        self._message_ids = message_ids
        self._on_reset = on_reset
        self.counts: Counter[str] = Counter()
        """Sessions, messages, recipients and octets of the workers that have ended."""
        self.messages = 0
        """Messages in all complete seconds."""
        self.generation = 0
        """How often the counters were reset."""
        self._metrics: dict[int, dict[str, Any]] = {}
        """What each worker has counted so far."""
        self._tags = SequenceTracker()
        """The sequence tags of all workers."""
        self._faults: dict[int, list[FaultCount]] = {}
        self._under_way: dict[int, int] = {}
        self._waiting: dict[int, list[Second]] = {}
        """Seconds that not all workers have reported, by their number."""
        self._reported = dict.fromkeys(range(workers), 0)
        """Seconds that each running worker has reported."""

    def add_second(self, worker: int, second: Second) -> list[Sample]:
        """Add a second of a worker. Return the samples that are complete now."""
        self._note(worker, second)
        return self._complete()

    def add_report(self, worker: int, report: WorkerReport) -> list[Sample]:
        """Add the report of a worker that has ended. Return the samples that are complete now."""
        if report.rest is not None:
            self._note(worker, report.rest)
        del self._reported[worker]
        self.counts.update(report.counts)
        is_current = report.rest is None or report.rest.generation == self.generation
        if is_current:  # else it is from before a reset
            self._faults[worker] = report.faults
        if is_current and report.metrics is not None:
            self._metrics[worker] = report.metrics
        if is_current and report.tags is not None:
            self._tags.add(report.tags)
        return self._complete()

    def _note(self, worker: int, second: Second) -> None:
        number = self._reported[worker]
        self._reported[worker] += 1
        if second.generation != self.generation:
            return  # from before a reset
        self._waiting.setdefault(number, []).append(second)
        self._under_way[worker] = second.under_way
        self._faults[worker] = second.faults
        if second.metrics is not None:
            self._metrics[worker] = second.metrics
        if second.tags is not None:
            self._tags.add(second.tags)
        if self._message_ids is not None:
            self._message_ids.further += second.further_ids
            for each in second.message_ids:
                self._message_ids.add(each)

    def _complete(self) -> list[Sample]:
        found = []
        behind = min(self._reported.values(), default=None)
        while self._waiting and (behind is None or min(self._waiting) < behind):
            found.append(merged(self._waiting.pop(min(self._waiting))))
        self.messages += sum(each.messages for each in found)
        return found

    def metrics(self) -> Metrics:
        """Return what all workers have counted so far."""
        made = Metrics(sequences=self._tags)
        for each in self._metrics.values():
            made.add(each)
        return made

    # ---- as a FaultCounters and a Traffic

    @property
    def octets_under_way(self) -> int:
        """Octets received by the connections that are open."""
        return sum(self._under_way.values())

    def counted(self) -> list[FaultCount]:
        """Return the faults of all workers by rule, phase and action."""
        sums: Counter[tuple[str, str, str]] = Counter()
        for faults in self._faults.values():
            for fault in faults:
                sums[fault.rule, fault.phase, fault.action] += fault.count
        return [FaultCount(rule=r, phase=p, action=a, count=n) for (r, p, a), n in sorted(sums.items())]

    def reset(self) -> None:
        """Forget what was counted, and let the workers do so."""
        self.generation += 1
        self.messages = 0
        self._tags = SequenceTracker()
        for table in (self._metrics, self._faults, self._under_way, self._waiting):
            table.clear()
        self._on_reset()
