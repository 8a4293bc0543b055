"""Search for the highest rate that a server sustains under a threshold.

The rate is doubled until a trial fails (or halved until one passes), then the gap is bisected. A trial sustains its
rate when its threshold holds, every message was accepted, and the run did not fall behind its schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from penstock.load.plan import Plan
from penstock.load.schedule import MAX_RATE
from penstock.load.thresholds import Threshold

_PRECISION: Final = 1.05
"""The search ends when the lowest failed rate is at most this multiple of the highest sustained one."""
_MIN_RATE: Final = 1.0
_BEHIND: Final = 0.1
_BEHIND_PART: Final = 0.05
"""Seconds, or part of a trial, by which it may end late. Beyond that, and the time that a message takes, messages have
piled up: the end of a trial of 10 s that is 1 s late shows a server that takes 10 messages for 11 that are due."""
_OF_CONNECTION: Final = ("connect", "greeting", "starttls", "tls", "hello", "auth")
"""Phases before the first message of a connection."""


class Trial(NamedTuple):
    """One run of the search."""

    rate: float
    passed: bool
    reason: str
    """Why it failed, or the measured value."""
    report: dict[str, Any]


def judge(report: dict[str, Any], plan: Plan, threshold: Threshold) -> Trial:
    """Return whether a run of this plan has sustained its rate."""
    assert plan.rate is not None
    assert plan.duration is not None
    result = threshold.check(report)
    failed = report["refused"] + report["lost"] + report["unsent"]
    if failed or not report["accepted"]:
        return Trial(plan.rate, False, f"{failed:,} failed", report)
    seconds = plan.duration - plan.warm_up
    late = report["seconds"] - seconds - _time_of_last(report, plan)
    if report["dropped"] or late > max(_BEHIND, _BEHIND_PART * seconds):
        return Trial(plan.rate, False, "the server fell behind", report)
    return Trial(plan.rate, result.passed, f"{result.threshold}: {result.shown}", report)


def _time_of_last(report: dict[str, Any], plan: Plan) -> float:
    """Return the seconds from the start of the last message to the end of the run, if nothing has piled up."""

    def p99(phase: str) -> float:
        value: float = report["phases"].get(phase, {}).get("p99", 0.0)
        return value

    commands = p99("mail"), p99("rcpt") * (1 if plan.pipelining else plan.recipients), p99("data")
    # The replies to a pipelined group are measured from the same moment.
    found = (max(commands) if plan.pipelining else sum(commands)) + p99("dot") + p99("quit")
    if plan.per_connection:  # otherwise the sessions have connected at the start of the run
        counts = {phase: report["phases"].get(phase, {}).get("count", 0) for phase in _OF_CONNECTION}
        found += sum(p99(phase) * count for phase, count in counts.items()) / max(1, counts["connect"])
    return found


def find_rate(trial: Callable[[float], Trial | None], first: float) -> Trial | None:
    """Return the trial with the highest sustained rate; None if no rate was sustained.

    `trial` runs a rate; it returns None when the user has stopped the search.
    """
    best: Trial | None = None
    limit: float | None = None
    rate = min(max(first, _MIN_RATE), MAX_RATE)
    while limit is None or best is None or limit / best.rate > _PRECISION:
        done = trial(rate)
        if done is None:
            return best
        if done.passed:
            best = done
            if rate >= MAX_RATE:
                return best
        else:
            limit = rate
            if rate <= _MIN_RATE:
                return None
        if best is None:
            rate = max(rate / 2, _MIN_RATE)
        elif limit is None:
            rate = min(rate * 2, MAX_RATE)
        else:
            rate = (best.rate + limit) / 2
    return best
