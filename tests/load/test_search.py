"""The search for the highest sustainable rate."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.load.search import Trial, find_rate, judge
from penstock.load.thresholds import Threshold

CONDITION = Threshold.parse("dot.p99<50ms")


def report(seconds: float, **changed: Any) -> dict[str, Any]:
    phases = {"connect": {"p99": 0.2}, "dot": {"p99": 0.01}, "late_start": {"p99": 9.0}}
    return {"seconds": seconds, "accepted": 100, **dict.fromkeys(("refused", "lost", "unsent", "dropped"), 0),
            "phases": phases, **changed}  # fmt: skip


@pytest.mark.parametrize(
    ("intended", "ended", "reason"),
    [
        (1.0, 1.3, "dot.p99<50ms: 10.0 ms"),
        (1.0, 1.32, "the server fell behind"),
        (10.0, 10.7, "dot.p99<50ms: 10.0 ms"),
        (10.0, 10.72, "the server fell behind"),
    ],
)
def test_a_trial_that_ends_late_has_fallen_behind(intended: float, ended: float, reason: str) -> None:
    """A message takes 0.21 s, and the trial may be late by 5 %, or 0.1 s."""
    found = judge(report(ended), 100, intended, CONDITION)
    assert (found.passed, found.reason) == (reason != "the server fell behind", reason)


@pytest.mark.parametrize(("name", "reason"), [("refused", "3 failed"), ("dropped", "the server fell behind")])
def test_a_trial_without_all_its_messages_fails(name: str, reason: str) -> None:
    assert judge(report(1.0, **{name: 3}), 100, 1.0, CONDITION)[1:3] == (False, reason)


@pytest.mark.parametrize("capacity", [0.5, 1, 7, 100, 1234, 999_999, 10**7])
def test_the_search_ends_within_five_percent_below_the_capacity(capacity: float) -> None:
    found = find_rate(lambda rate: Trial(rate, rate <= capacity, "", {}), 100.0)
    assert (found is None) == (capacity < 1)
    assert found is None or min(capacity, 1e6) / 1.05 <= found.rate <= capacity
