"""Statistics of a sink: the metrics of its sessions, a sample every second, and the report.

Sessions count in compiled code (ext/metrics.pyx). A task reads the counters once a second, which takes less than a
millisecond at any rate; web page, terminal and report use its samples.
"""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple, Protocol

import trio

from penstock import __version__
from penstock.metrics._session import PHASES, Metrics
from penstock.metrics._session import Sequence as Run
from penstock.sequence import Mark, parse_counter
from penstock.sink.messageids import MessageIdTracker
from penstock.sink.report import (
    FaultCount,
    Latency,
    MessageCounts,
    MessageIdCounts,
    OctetCounts,
    ReplyCount,
    Report,
    RunCounts,
    Sample,
    SequenceCounts,
    SessionCounts,
    latency_of,
    percentiles_of,
)
from penstock.transaction import Transaction

_SAMPLES: Final = 600
"""Number of samples to keep: one per second."""
_MAX_EXAMPLES: Final = 100
_MAX_MATCHED: Final = 1024
"""Characters of a recipient that the user's pattern is applied to."""


class FaultCounters(Protocol):
    """Counts of injected faults."""

    def counted(self) -> Sequence[FaultCount]:
        """Return the counts by rule, phase and action."""

    def reset(self) -> None:
        """Reset the counts and the state of the plan."""


class FaultControl(Protocol):
    """Control of the fault plan at run time."""

    @property
    def fails_next(self) -> bool:
        """The next commands can be let fail."""

    def check(self, text: str) -> list[str]:
        """Return the names of the rules of a plan. Raise ValueError, with the key, if `replace` would refuse it."""

    def plan(self) -> str:
        """Return the active plan as TOML."""

    def replace(self, text: str) -> None:
        """Activate another plan. Raise ValueError, with the key, if it cannot be used."""

    def fail_next(self, phase: str, reply: str, count: int) -> None:
        """Answer the next `count` commands of a phase with this reply. Raise ValueError."""

    def pending(self) -> dict[str, int]:
        """Return how many commands of each phase are still to be answered so."""


class Traffic(Protocol):
    """Counters of the worker that are not in the metrics."""

    @property
    def octets_under_way(self) -> int:
        """Octets received by the connections that are open."""


class RecipientMarks:
    """Finds the sequence tag of a message with a pattern for its recipients: one search for each recipient."""

    def __init__(self, pattern: str) -> None:
        """Group `number` of the pattern, or else its first group, is the number; group `run` is the run.

        Raise ValueError if the pattern cannot be used.
        """
        try:
            self._pattern = re.compile(pattern)
        except re.error as exc:
            raise ValueError(f"{pattern!r} is not a regular expression: {exc}") from exc
        groups = self._pattern.groupindex
        if self._pattern.groups == 0:
            raise ValueError(f"{pattern!r} needs a group for the number, such as 'msg-([0-9]+)@'")
        self._run = groups.get("run")
        numbered = next((group for group in range(1, self._pattern.groups + 1) if group != self._run), None)
        if numbered is None:
            raise ValueError(f"{pattern!r} needs a group for the number in addition to the one for the run")
        self._number = groups.get("number", numbered)

    def __call__(self, transaction: Transaction) -> Mark | None:
        """Return the tag of the first recipient that matches."""
        for recipient in transaction.recipients:
            found = self._pattern.search(recipient.path.text[:_MAX_MATCHED])
            if found is not None and (counter := parse_counter(found[self._number] or "")) is not None:
                run = (found[self._run] or "")[:64] if self._run is not None else ""
                return Mark(run, counter.number)
        return None


class Expectation(NamedTuple):
    """Options about sequence tags."""

    source: str = "sender"
    """Where tags are read from, for the report."""
    messages: int | None = None
    """Expected messages of each run."""


NOTHING_EXPECTED: Final = Expectation()


class _Before(NamedTuple):
    """The counts at the last sample."""

    at: float
    messages: int = 0
    replies: int = 0
    connected: int = 0
    received: int = 0
    octets: int = 0
    faults: int = 0
    codes: Counter[str] = Counter()  # noqa: RUF012 - never modified


class Statistics:
    """Statistics of a sink."""

    def __init__(
        self,
        metrics: Metrics,
        traffic: Traffic,
        *,
        faults: FaultCounters | None = None,
        expectation: Expectation = NOTHING_EXPECTED,
        listen: Sequence[str] = (),
        message_ids: MessageIdTracker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = metrics
        self._traffic = traffic
        self._faults = faults
        self._expectation = expectation
        self._listen = list(listen)
        self._message_ids = message_ids
        self._clock = clock
        self.samples: deque[Sample] = deque(maxlen=_SAMPLES)
        """The last seconds, newest last."""
        self.taken = 0
        """Number of samples taken, including dropped ones."""
        self.generation = 0
        """Increased by every reset of the counters."""
        self._news = trio.Event()
        self._start()

    def _start(self) -> None:
        self._began = self._clock()
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._received_before = self._traffic.octets_under_way
        self._before = _Before(self._began)

    # ---- time

    def take_sample(self) -> Sample:
        """Take a sample: the difference to the previous one."""
        metrics, before, now = self.metrics, self._before, self._clock()
        codes: Counter[str] = Counter()
        for _, code, _, _, count in metrics.counted():
            codes[str(code)] += count
        after = _Before(
            now,
            metrics.accepted + metrics.unheard,
            metrics.replies,
            metrics.sessions,
            self.received,
            metrics.text_octets,
            sum(each.count for each in self._fault_counts()),
            codes,
        )
        sample = Sample(
            at=round(now - self._began, 3),
            seconds=round(now - before.at, 3),
            messages=after.messages - before.messages,
            replies=after.replies - before.replies,
            sessions=metrics.open_sessions,
            connected=after.connected - before.connected,
            received=after.received - before.received,
            octets=after.octets - before.octets,
            faults=after.faults - before.faults,
            codes=dict(after.codes - before.codes),
            **percentiles_of(metrics.recent_messages, metrics.recent_replies),
        )
        metrics.forget_recent()
        self._before = after
        self.add_sample(sample)
        return sample

    def add_sample(self, sample: Sample) -> None:
        """Note a sample: one taken here, or the sum of those of several processes."""
        self.samples.append(sample)
        self.taken += 1
        self._notify()

    async def wait_for_news(self) -> None:
        """Wait for the next sample or reset."""
        await self._news.wait()

    def _notify(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def reset(self) -> None:
        """Reset all counters. Open sessions continue."""
        self.metrics.reset()
        self.metrics.forget_recent()
        if self._faults is not None:
            self._faults.reset()
        if self._message_ids is not None:
            self._message_ids.reset()
        self.samples.clear()
        self.generation += 1
        self._start()
        self._notify()

    # ---- reading

    @property
    def received(self) -> int:
        """Octets received from the sockets."""
        return self.metrics.received + self._traffic.octets_under_way - self._received_before

    def report(self, *, is_full: bool = True) -> Report:
        """Return the report; buckets and samples only with `is_full`."""
        metrics = self.metrics
        counted = [
            ReplyCount(phase=phase, code=code, status=status, garbled=garbled, count=count)
            for phase, code, status, garbled, count in metrics.counted()
        ]
        return Report(
            made_by=f"penstock {__version__}",
            listen=self._listen,
            started_at=self._started_at,
            seconds=round(self._clock() - self._began, 3),
            sessions=SessionCounts(
                total=metrics.sessions,
                open=metrics.open_sessions,
                peak=metrics.peak_sessions,
                tls=metrics.latency("tls").count,
                tls_failed=metrics.tls_failed,
                ends=dict(metrics.ends),
            ),
            messages=MessageCounts(
                accepted=metrics.accepted,
                unheard=metrics.unheard,
                refused=metrics.refused,
                lost=sum(metrics.lost.values()),
                lost_by=dict(metrics.lost),
                recipients=metrics.recipients,
                octets=metrics.text_octets,
            ),
            octets=OctetCounts(received=self.received, sent=metrics.sent),
            replies=counted,
            further_replies=metrics.further,
            latencies=self._latencies(with_buckets=is_full),
            sequences=self._sequences(),
            faults=self._fault_counts(),
            samples=list(self.samples) if is_full else [],
        )

    def _fault_counts(self) -> list[FaultCount]:
        return [] if self._faults is None else list(self._faults.counted())

    def _latencies(self, *, with_buckets: bool) -> dict[str, Latency]:
        found = ((phase, self.metrics.latency(phase)) for phase in PHASES)
        return {phase: latency_of(each, with_buckets=with_buckets) for phase, each in found if each.count}

    def _sequences(self) -> SequenceCounts:
        sequences, expected = self.metrics.sequences, self._expectation.messages
        return SequenceCounts(
            source=self._expectation.source,
            expected=expected,
            unmarked=sequences.unmarked,
            further=sequences.further,
            runs=[_counts_of(run, expected) for run in sequences.runs.values()],
            message_ids=_counts_of_ids(self._message_ids),
        )


def _counts_of_ids(ids: MessageIdTracker | None) -> MessageIdCounts | None:
    """Return the counts of Message-IDs; None if no message was counted by it."""
    if ids is None or not ids.distinct + ids.missing_id:
        return None
    return MessageIdCounts(
        distinct=ids.distinct,
        duplicates=ids.duplicates,
        duplicate_examples=list(ids.examples),
        missing_id=ids.missing_id,
        further=ids.further,
    )


def _counts_of(run: Run, expected: int | None) -> RunCounts:
    """Return the counts of a run."""
    first = 0 if 0 in run else 1
    last = run.highest if expected is None else first + expected - 1
    missing, examples = run.missing(first, last, _MAX_EXAMPLES) if last >= first else (0, [])
    return RunCounts(
        run=run.run,
        received=run.received,
        distinct=run.distinct,
        duplicates=run.duplicates,
        duplicate_examples=list(run.examples),
        out_of_order=run.out_of_order,
        first=first,
        highest=run.highest,
        missing=missing,
        missing_examples=examples,
    )
