"""The search for the highest sustainable rate."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.load.plan import Plan
from penstock.load.search import Trial, find_rate, judge
from penstock.load.thresholds import Threshold

CONDITION = Threshold.parse("dot.p99<50ms")


def report(seconds: float, **changed: Any) -> dict[str, Any]:
    p99 = {"connect": 0.1, "hello": 0.05, "rcpt": 0.2, "data": 0.1, "dot": 0.01, "quit": 0.09, "late_start": 9.0}
    phases = {phase: {"p99": value, "count": 200 if phase == "hello" else 100} for phase, value in p99.items()}
    return {"seconds": seconds, "accepted": 100, **dict.fromkeys(("refused", "lost", "unsent", "dropped"), 0),
            "phases": phases, **changed}  # fmt: skip


def plan(duration: float, **words: Any) -> Plan:
    return Plan(targets=[], rate=100.0, duration=duration, **words)


@pytest.mark.parametrize(
    ("tried", "latest"),
    [
        (plan(1.0), 1.7),
        (plan(10.0), 11.1),
        (plan(12.0, warm_up=2.0), 11.1),
        (plan(10.0, recipients=3), 11.5),
        (plan(10.0, recipients=3, pipelining=True), 11.0),
        (plan(10.0, per_connection=0), 10.9),
    ],
    ids=["the least tolerance", "5 %", "warm-up", "recipients", "pipelining", "reuse"],
)
def test_a_trial_may_be_late_by_its_tolerance_and_one_message(tried: Plan, latest: float) -> None:
    """By default, a message takes 0.6 s: 0.1 + 2 * 0.05 to connect, 0.2 + 0.1 + 0.01 to send, and 0.09 to end."""
    assert judge(report(latest - 0.01), tried, CONDITION)[:3] == (100, True, "dot.p99<50ms: 10.0 ms")
    assert judge(report(latest + 0.01), tried, CONDITION)[:3] == (100, False, "the server fell behind")


@pytest.mark.parametrize(("name", "reason"), [("refused", "3 failed"), ("dropped", "the server fell behind")])
def test_a_trial_without_all_its_messages_fails(name: str, reason: str) -> None:
    assert judge(report(1.0, **{name: 3}), plan(1.0), CONDITION)[1:3] == (False, reason)


@pytest.mark.parametrize("capacity", [0.5, 1, 7, 100, 1234, 999_999, 10**7])
def test_the_search_ends_within_five_percent_below_the_capacity(capacity: float) -> None:
    found = find_rate(lambda rate: Trial(rate, rate <= capacity, "", {}), 100.0)
    assert (found is None) == (capacity < 1)
    assert found is None or min(capacity, 1e6) / 1.05 <= found.rate <= capacity
