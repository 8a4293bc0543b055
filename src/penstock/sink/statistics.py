"""What a sink knows of what arrived: the metrics of its sessions, a sample each second, and the report of both.

The sessions count in C (ext/metrics.pyx). Here a task looks at the metrics once a second, which costs well under a
millisecond whatever the rate; pages, terminals and the report read what it has noted.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple, Protocol

import trio

from penstock.metrics._session import PHASES, Metrics
from penstock.metrics._session import Sequence as Run
from penstock.sequence import Mark, parse_counter
from penstock.sink.report import (
    FaultCount,
    Latency,
    MessageCounts,
    OctetCounts,
    ReplyCount,
    Report,
    RunCounts,
    Sample,
    SequenceCounts,
    SessionCounts,
    latency_of,
)
from penstock.transaction import Transaction

_SAMPLES: Final = 600
"""Seconds that are kept."""
_MOST_EXAMPLES: Final = 100
_MOST_MATCHED: Final = 1024
"""Characters of a recipient that a user's pattern is tried on."""


class FaultBook(Protocol):
    """What is known of the faults that were applied."""

    def counted(self) -> Sequence[FaultCount]:
        """Return how often each rule did what."""

    def reset(self) -> None:
        """Start over, the counters of the plan among it."""


class NoFaults:
    """The book of a sink that has no faults."""

    def counted(self) -> Sequence[FaultCount]:
        """Return nothing."""
        return ()

    def reset(self) -> None:
        """Do nothing."""


class FaultControl(Protocol):
    """The fault plan of a sink at run time."""

    def plan(self) -> str:
        """Return the plan in force, as TOML."""

    def replace(self, text: str) -> None:
        """Put another plan in force. Raise ValueError that names the key when it can not be used."""

    def fail_next(self, phase: str, reply: str, count: int) -> None:
        """Give the next commands of a phase this reply. Raise ValueError."""

    def pending(self) -> dict[str, int]:
        """Return how many commands of each phase are still to fail."""


class Traffic(Protocol):
    """What the worker knows beside the metrics."""

    @property
    def octets_under_way(self) -> int:
        """Octets that have come over the connections that are open."""


class RecipientMarks:
    """Finds the mark of a message by a pattern over its recipients. Costs a search for each message."""

    def __init__(self, pattern: str) -> None:
        """The pattern's group `number` is the number, its group `run` names the run; without a name, the first group.

        Raise ValueError when the pattern can not be used.
        """
        try:
            self._pattern = re.compile(pattern)
        except re.error as exc:
            raise ValueError(f"{pattern!r} is no regular expression: {exc}") from exc
        groups = self._pattern.groupindex
        if self._pattern.groups == 0:
            raise ValueError(f"{pattern!r} needs a group for the number, such as 'msg-([0-9]+)@'")
        self._run = groups.get("run")
        numbered = next((group for group in range(1, self._pattern.groups + 1) if group != self._run), None)
        if numbered is None:
            raise ValueError(f"{pattern!r} needs a group for the number beside the one for the run")
        self._number = groups.get("number", numbered)

    def __call__(self, transaction: Transaction) -> Mark | None:
        """Return the mark of the first recipient that has one."""
        for recipient in transaction.recipients:
            found = self._pattern.search(recipient.path.text[:_MOST_MATCHED])
            if found is not None and (counter := parse_counter(found[self._number] or "")) is not None:
                run = (found[self._run] or "")[:64] if self._run is not None else ""
                return Mark(run, counter.number)
        return None


@functools.cache
def _made_by() -> str:
    return f"penstock {importlib.metadata.version('penstock')}"


class Expectation(NamedTuple):
    """What the user has said of the marks."""

    source: str = "sender"
    """Where they are, in words."""
    messages: int | None = None
    """How many each run has."""


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
    codes: Counter[str] = Counter()  # noqa: RUF012 - of a tuple: nobody changes it


class Statistics:
    """The receipts of a sink."""

    def __init__(
        self,
        metrics: Metrics,
        traffic: Traffic,
        *,
        faults: FaultBook | None = None,
        expectation: Expectation = NOTHING_EXPECTED,
        listen: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = metrics
        self._traffic = traffic
        self._faults: FaultBook = faults or NoFaults()
        self._expectation = expectation
        self._listen = list(listen)
        self._clock = clock
        self.samples: deque[Sample] = deque(maxlen=_SAMPLES)
        """The last seconds, the newest at the end."""
        self.taken = 0
        """Samples so far, those that are kept no longer among them."""
        self.generation = 0
        """Goes up when the counters start over."""
        self._news = trio.Event()
        self._start()

    def _start(self) -> None:
        self._began = self._clock()
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._received_before = self._traffic.octets_under_way
        self._before = _Before(self._began)

    # ---- time

    async def run(self) -> None:
        """Take a sample each second, until cancelled."""
        due = trio.current_time()
        while True:
            due += 1
            await trio.sleep_until(due)
            self.take_sample()

    def take_sample(self) -> Sample:
        """Note what has come since the last sample."""
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
            sum(each.count for each in self._faults.counted()),
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
            p50=metrics.recent_messages.percentile(50),
            p90=metrics.recent_messages.percentile(90),
            p99=metrics.recent_messages.percentile(99),
            max=metrics.recent_messages.max,
            reply_p50=metrics.recent_replies.percentile(50),
            reply_p99=metrics.recent_replies.percentile(99),
        )
        metrics.forget_recent()
        self._before = after
        self.samples.append(sample)
        self.taken += 1
        self._tell()
        return sample

    async def wait_for_news(self) -> None:
        """Wait for the next sample, or until the counters start over."""
        await self._news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def reset(self) -> None:
        """Start all counters over. Sessions that are open stay so."""
        self.metrics.reset()
        self.metrics.forget_recent()
        self._faults.reset()
        self.samples.clear()
        self.generation += 1
        self._start()
        self._tell()

    # ---- what there is to say

    @property
    def received(self) -> int:
        """Octets from the sockets so far."""
        return self.metrics.received + self._traffic.octets_under_way - self._received_before

    def report(self, *, is_full: bool = True) -> Report:
        """Return all that is known; without the buckets and the samples when it is not to be full."""
        metrics = self.metrics
        counted = [
            ReplyCount(phase=phase, code=code, status=status, garbled=garbled, count=count)
            for phase, code, status, garbled, count in metrics.counted()
        ]
        return Report(
            made_by=_made_by(),
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
            faults=list(self._faults.counted()),
            samples=list(self.samples) if is_full else [],
        )

    def _latencies(self, *, with_buckets: bool) -> dict[str, Latency]:
        found = ((phase, self.metrics.latency(phase)) for phase in PHASES)
        return {phase: latency_of(each, with_buckets=with_buckets) for phase, each in found if each.count}

    def _sequences(self) -> SequenceCounts:
        book, expected = self.metrics.sequences, self._expectation.messages
        return SequenceCounts(
            source=self._expectation.source,
            expected=expected,
            unmarked=book.unmarked,
            further=book.further,
            runs=[_counts_of(run, expected) for run in book.runs.values()],
        )


def _counts_of(run: Run, expected: int | None) -> RunCounts:
    """Say what has come of a run, and what has not."""
    first = 0 if 0 in run else 1
    last = run.highest if expected is None else first + expected - 1
    missing, examples = run.missing(first, last, _MOST_EXAMPLES) if last >= first else (0, [])
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
