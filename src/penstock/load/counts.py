"""What a run counts: latencies by phase, answers by phase and code, errors by kind, and all of it second by second."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from penstock.metrics._histogram import Histogram

PHASES: Final = {
    "connect": "from connect(2) to the connection",
    "banner": "from the connection to the greeting",
    "starttls": "from STARTTLS to its answer",
    "tls": "the handshake",
    "ehlo": "from EHLO or LHLO to its answer",
    "auth": "from AUTH, or what was said next, to its answer",
    "mail": "from MAIL, or the group it was sent in, to its answer",
    "rcpt": "from RCPT, or the group it was sent in, to its answer",
    "data": "from DATA, or the group it was sent in, to its answer",
    "dot": "from the first octet of the text, or the group it was sent in, to its answer",
    "rset": "from RSET, behind a refused message, to its answer",
    "quit": "from QUIT to its answer",
    "late_start": "from the intended start of a message to its MAIL (open loop)",
    "message": "from the intended start (open loop) or the MAIL (closed loop) of a message to the answer to its text",
    "session": "from connect(2) to the answer to QUIT",
}
"""What is timed, and from when to when."""
_MOST_SECONDS: Final = 24 * 3600
_MOST_EXAMPLES: Final = 5


class Second(NamedTuple):
    """One second of a run."""

    second: int
    accepted: int
    failed: int
    sessions: int
    """Connections that were open at its end."""
    p50: float
    p99: float
    longest: float
    """Seconds a message took."""


@dataclass(slots=True)
class Counts:
    """What was counted so far."""

    started: float = field(default_factory=time.time)
    begun: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    phases: dict[str, Histogram] = field(default_factory=lambda: {phase: Histogram() for phase in PHASES})
    replies: Counter[tuple[str, int]] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    """Connections that ended otherwise than they should, by kind."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """What was heard with errors and refusals, the first few of each."""
    attempted: int = 0
    """Messages whose MAIL was sent."""
    accepted: int = 0
    """Messages that were answered with a 2yz, by all recipients in LMTP."""
    refused: int = 0
    """Messages that were answered otherwise."""
    lost: int = 0
    """Messages without an answer."""
    late: int = 0
    """Intended starts that waited for a free session (open loop)."""
    dropped: int = 0
    """Intended starts that nobody was free for, beyond the bound of those that may wait."""
    unsent: int = 0
    """Messages that were to be sent, and were not even begun, because the run was stopped or given up."""
    has_given_up: bool = False
    """Too many connections in a row came to nothing."""
    octets: int = 0
    """Of the texts that were sent whole."""
    connections: int = 0
    seconds: list[Second] = field(default_factory=list)
    current: Histogram = field(default_factory=Histogram)
    """The messages of the second that runs."""
    _before: tuple[int, int] = (0, 0)

    @property
    def failed(self) -> int:
        """Messages that were not accepted."""
        return self.refused + self.lost + self.dropped + self.unsent

    @property
    def elapsed(self) -> float:
        """Seconds so far, or of the whole run."""
        return (self.ended or time.perf_counter()) - self.begun

    def error(self, kind: str, example: str) -> None:
        """Count an error."""
        self.errors[kind] += 1
        self.remember(kind, example)

    def remember(self, kind: str, example: str) -> None:
        """Keep an example, when there are few."""
        kept = self.examples.setdefault(kind, [])
        if len(kept) < _MOST_EXAMPLES and example not in kept:
            kept.append(example)

    def tick(self, sessions: int) -> None:
        """End a second."""
        accepted, failed = self.accepted, self.failed
        before = self._before
        self._before = (accepted, failed)
        current = self.current
        if len(self.seconds) < _MOST_SECONDS:
            self.seconds.append(
                Second(
                    len(self.seconds),
                    accepted - before[0],
                    failed - before[1],
                    sessions,
                    current.percentile(50) / 1e9,
                    current.percentile(99) / 1e9,
                    current.max / 1e9,
                )
            )
        current.reset()

    def as_report(self) -> dict[str, Any]:
        """Return all of it as JSON can keep it; times are in seconds."""
        return {
            "started": self.started,
            "seconds": self.elapsed,
            "attempted": self.attempted,
            "accepted": self.accepted,
            "refused": self.refused,
            "lost": self.lost,
            "late": self.late,
            "dropped": self.dropped,
            "unsent": self.unsent,
            "has_given_up": self.has_given_up,
            "octets": self.octets,
            "connections": self.connections,
            "rate": self.accepted / self.elapsed if self.elapsed else 0.0,
            "replies": [[phase, code, count] for (phase, code), count in sorted(self.replies.items())],
            "errors": dict(self.errors),
            "examples": self.examples,
            "phases": {phase: _told(histogram) for phase, histogram in self.phases.items() if histogram.count},
            "timeline": [list(second) for second in self.seconds],
        }


def _told(histogram: Histogram) -> dict[str, Any]:
    told: dict[str, Any] = {f"p{p:g}".replace(".", "_"): histogram.percentile(p) / 1e9 for p in (50, 90, 95, 99, 99.9)}
    return told | {
        "count": histogram.count,
        "min": histogram.min / 1e9,
        "mean": histogram.mean / 1e9,
        "max": histogram.max / 1e9,
        "histogram": histogram.to_dict(),
    }
