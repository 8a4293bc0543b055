"""Counts of a run: latencies by phase, replies by phase and code, errors by kind, and a timeline of seconds.

A run of several processes has the counts of each added up: histograms bucket by bucket, seconds by their number. The
result is that of one process that had done everything (`Counts.add`, `Timeline`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, NamedTuple

from penstock.metrics._histogram import Histogram

PHASES: Final = {
    "connect": "from connect(2) to the established connection",
    "greeting": "from the established connection to the greeting",
    "starttls": "from STARTTLS to its reply",
    "tls": "the TLS handshake",
    "hello": "from EHLO or LHLO to its reply",
    "auth": "from AUTH, or a response to a challenge, to its reply",
    "mail": "from MAIL, or the group it was pipelined in, to its reply",
    "rcpt": "from RCPT, or the group it was pipelined in, to its reply",
    "data": "from DATA, or the group it was pipelined in, to its reply",
    "dot": "from the first octet of the message, or the group it was pipelined in, to the reply to it",
    "rset": "from RSET, after a refused message, to its reply",
    "quit": "from QUIT to its reply",
    "late_start": "from the intended start of a message to its MAIL (open loop)",
    "message": "from the intended start (open loop) or the MAIL (closed loop) of a message to the reply to it",
    "session": "from connect(2) to the reply to QUIT",
}
"""What is timed, in the order of a session, and from when to when."""
_QUANTILES: Final = (50, 90, 95, 99, 99.9)
_MAX_SECONDS: Final = 24 * 3600
"""Seconds that a timeline keeps."""
_MAX_EXAMPLES: Final = 5
_SHORT: Final = 0.1
"""Seconds: a shorter rest at the end of a run is too short to have a rate, and is counted with the second before it."""
_SUMS: Final = ("attempted", "accepted", "refused", "lost", "late", "dropped", "unsent", "octets", "connections")


class Second(NamedTuple):
    """One second of a run, or the rest of one at its end; latencies are in seconds."""

    second: int
    length: float
    """How long it was: 1.0 but for the rest at the end."""
    accepted: int
    failed: int
    sessions: int
    """Open connections at its end."""
    p50: float
    p99: float
    max: float
    """Latency of the messages that ended in it."""
    dot_p50: float
    dot_p99: float
    """Latency of the replies to messages."""
    errors: dict[str, int]
    """Refusals as "PHASE CODE", and connection errors by kind."""


@dataclass(slots=True)
class Interval:
    """What was counted in one second, before its percentiles are taken: those of several processes can be added."""

    length: float
    accepted: int
    failed: int
    sessions: int
    message: Histogram
    dot: Histogram
    errors: Counter[str]

    def add(self, other: Interval) -> None:
        """Add what another process counted in the same second."""
        self.length = max(self.length, other.length)
        self.accepted += other.accepted
        self.failed += other.failed
        self.sessions += other.sessions
        self.message.merge(other.message)
        self.dot.merge(other.dot)
        self.errors.update(other.errors)

    def extend(self, rest: Interval) -> None:
        """Add what the same process counted afterwards."""
        length, sessions = self.length + rest.length, rest.sessions
        self.add(rest)
        self.length, self.sessions = length, sessions

    def second(self, number: int) -> Second:
        """Return it with its percentiles."""
        message, dot = self.message, self.dot
        return Second(
            number,
            round(self.length, 3),
            self.accepted,
            self.failed,
            self.sessions,
            message.percentile(50) / 1e9,
            message.percentile(99) / 1e9,
            message.max / 1e9,
            dot.percentile(50) / 1e9,
            dot.percentile(99) / 1e9,
            dict(self.errors),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can keep it."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        return plain | {"message": self.message.to_dict(), "dot": self.dot.to_dict(), "errors": dict(self.errors)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Interval:
        """Return the interval that `to_dict` described."""
        histograms = {name: Histogram.from_dict(found[name]) for name in ("message", "dot")}
        return cls(**{**found, **histograms, "errors": Counter(found["errors"])})


class Timeline:
    """The seconds of a run."""

    def __init__(self) -> None:
        self.seconds: list[Second] = []
        self._last: Interval | None = None

    def append(self, interval: Interval, *, is_last: bool = False) -> None:
        """Append a second. The last one of a run may be shorter; a very short one is joined to the one before it."""
        if is_last and interval.length < _SHORT and self._last is not None:
            self._last.extend(interval)
            self.seconds[-1] = self._last.second(len(self.seconds) - 1)
        elif len(self.seconds) < _MAX_SECONDS:
            self.seconds.append(interval.second(len(self.seconds)))
            self._last = interval


@dataclass(slots=True)
class Counts:
    """What was counted so far."""

    started: float = field(default_factory=time.time)
    begun: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    phases: dict[str, Histogram] = field(default_factory=lambda: {phase: Histogram() for phase in PHASES})
    replies: dict[tuple[str, int], int] = field(default_factory=dict)
    """Replies by phase and code. A Counter would cost as much as everything else that a reply costs."""
    errors: Counter[str] = field(default_factory=Counter)
    """Connections that ended with an error, by kind."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few texts of each kind of error and refusal."""
    attempted: int = 0
    """Messages whose MAIL was sent."""
    accepted: int = 0
    """Messages with a 2xx reply, in LMTP from all recipients."""
    refused: int = 0
    """Messages with any other reply."""
    lost: int = 0
    """Messages without a reply."""
    late: int = 0
    """Messages that waited for a free session (open loop)."""
    dropped: int = 0
    """Messages that were due and never got a session, because too many were waiting or the run was stopped."""
    unsent: int = 0
    """Messages that the run should have sent and did not start, because it was stopped or given up."""
    has_given_up: bool = False
    """Too many connections in a row failed."""
    octets: int = 0
    """Octets of the accepted messages."""
    connections: int = 0
    cpu: float = 0.0
    """Seconds of CPU that the generator used."""
    timeline: Timeline = field(default_factory=Timeline)
    current: Histogram = field(default_factory=Histogram)
    """Latencies of the messages of the current second."""
    _second_begun: float = 0.0
    _before: tuple[int, int] = (0, 0)
    _dot_before: dict[int, int] = field(default_factory=dict)
    _errors_before: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._second_begun = self.begun

    @property
    def seconds(self) -> list[Second]:
        """The timeline so far."""
        return self.timeline.seconds

    @property
    def failed(self) -> int:
        """Messages that were not accepted."""
        return self.refused + self.lost + self.dropped + self.unsent

    @property
    def in_flight(self) -> int:
        """Messages whose MAIL was sent and whose end is not known yet."""
        return self.attempted - self.accepted - self.refused - self.lost

    @property
    def elapsed(self) -> float:
        """Seconds so far, or of the whole run."""
        return (self.ended or time.perf_counter()) - self.begun

    def error(self, kind: str, example: str) -> None:
        """Count an error."""
        self.errors[kind] += 1
        self.remember(kind, example)

    def remember(self, kind: str, example: str) -> None:
        """Keep an example, if there are few."""
        kept = self.examples.setdefault(kind, [])
        if len(kept) < _MAX_EXAMPLES and example not in kept:
            kept.append(example)

    def tick(self, sessions: int, *, is_last: bool = False) -> Interval:
        """End a second, and return what was counted in it."""
        now = self.ended if is_last and self.ended else time.perf_counter()
        accepted, failed = self.accepted, self.failed - self.unsent
        dot = {low: count for low, _, count in self.phases["dot"].buckets()}
        errors = self._errors_so_far()
        interval = Interval(
            now - self._second_begun,
            accepted - self._before[0],
            failed - self._before[1],
            sessions,
            self.current,
            _difference(dot, self._dot_before),
            errors - self._errors_before,
        )
        self._second_begun, self._before = now, (accepted, failed)
        self._dot_before, self._errors_before = dot, errors
        self.current = Histogram()
        self.timeline.append(interval, is_last=is_last)
        return interval

    def _errors_so_far(self) -> Counter[str]:
        refused = {f"{phase} {code}": count for (phase, code), count in self.replies.items() if code >= 400}
        return Counter({**self.errors, **refused, **({"dropped": self.dropped} if self.dropped else {})})

    def as_report(self) -> dict[str, Any]:
        """Return everything as JSON can keep it; times are in seconds."""
        return {
            "started": self.started,
            "seconds": self.elapsed,
            **{name: getattr(self, name) for name in _SUMS},
            "has_given_up": self.has_given_up,
            "cpu": self.cpu,
            "rate": self.accepted / self.elapsed if self.elapsed else 0.0,
            "error_rate": self.failed / (self.accepted + self.failed) if self.accepted + self.failed else None,
            "replies": [[phase, code, count] for (phase, code), count in sorted(self.replies.items())],
            "errors": dict(self.errors),
            "examples": self.examples,
            "phases": {phase: summary_of(histogram) for phase, histogram in self.phases.items() if histogram.count},
            "timeline": [second._asdict() for second in self.seconds],
        }

    def add(self, report: Mapping[str, Any]) -> None:
        """Add the report of another process that ran at the same time, but for its timeline."""
        self.ended = max(self.ended, self.begun + report["seconds"])
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + report[name])
        self.has_given_up |= report["has_given_up"]
        self.cpu += report["cpu"]
        for phase, code, count in report["replies"]:
            self.replies[phase, code] = self.replies.get((phase, code), 0) + count
        self.errors.update(report["errors"])
        for kind, examples in report["examples"].items():
            for example in examples:
                self.remember(kind, example)
        for phase, summary in report["phases"].items():
            self.phases[phase].merge(Histogram.from_dict(summary["histogram"]))


def summary_of(histogram: Histogram) -> dict[str, Any]:
    """Return the percentiles of a histogram in seconds, and the histogram itself."""
    summary: dict[str, Any] = {f"p{p:g}".replace(".", "_"): histogram.percentile(p) / 1e9 for p in _QUANTILES}
    return summary | {
        "count": histogram.count,
        "min": histogram.min / 1e9,
        "mean": histogram.mean / 1e9,
        "max": histogram.max / 1e9,
        "histogram": histogram.to_dict(),
    }


def _difference(after: Mapping[int, int], before: Mapping[int, int]) -> Histogram:
    """Return the histogram of what was added to the buckets; its bounds and mean are those of the buckets."""
    buckets = [[low, count - before.get(low, 0)] for low, count in after.items() if count > before.get(low, 0)]
    return Histogram.from_dict(
        {
            "unit": "ns",
            "count": sum(count for _, count in buckets),
            "min": buckets[0][0] if buckets else 0,
            "max": buckets[-1][0] if buckets else 0,
            "sum": float(sum(low * count for low, count in buckets)),
            "buckets": buckets,
        }
    )
