"""Thresholds: their form, and what passes."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.load.counts import PHASES
from penstock.load.plan import PlanError
from penstock.load.thresholds import Threshold

REPORT: dict[str, Any] = {
    "rate": 1000.0,
    "error_rate": 0.001,
    "phases": {"dot": {"p50": 0.001, "p90": 0.01, "p95": 0.02, "p99": 0.05, "p99_9": 0.1, "max": 2.0, "mean": 0.002}},
}


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("dot.p99<50ms", False),
        ("dot.p99<=50ms", True),
        ("dot.p99 < 51 ms".replace(" ms", "ms"), True),
        ("dot.p50<1000us", False),
        ("dot.p50<1001us", True),
        ("dot.p99.9<=0.1s", True),
        ("dot.max>1s", True),
        ("dot.mean<1ms", False),
        ("rate>=1000", True),
        ("rate>1000/s", False),
        ("error_rate<0.1%", False),
        ("error_rate<=0.1%", True),
        ("error_rate<0.01", True),
        ("tls.p99<10s", False),
    ],
)
def test_a_threshold_compares_the_measured_value(text: str, passed: bool) -> None:
    assert Threshold.parse(text).check(REPORT).passed is passed


def test_what_was_not_measured_says_so() -> None:
    assert Threshold.parse("tls.p99<10s").check(REPORT).shown == "not measured"
    assert not Threshold.parse("error_rate<1%").check({**REPORT, "error_rate": None}).passed


@pytest.mark.parametrize("metric", PHASES)
@pytest.mark.parametrize("statistic", ["p50", "p90", "p99", "p99.9", "max", "mean"])
def test_every_phase_has_its_statistics(metric: str, statistic: str) -> None:
    assert Threshold.parse(f"{metric}.{statistic}<=1s").metric == metric


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "a threshold looks like"),
        ("dot.p99=50ms", "a threshold looks like"),
        ("dot.p99<", "a threshold looks like"),
        ("dot<50ms", "dot needs one of its statistics: dot.p50"),
        ("dot.p98<50ms", "dot needs one of its statistics"),
        ("banana.p99<50ms", "unknown metric banana; expected one of: connect, greeting"),
        ("dot.p99<50", "a duration looks like"),
        ("dot.p99<50%", "a duration looks like"),
        ("rate>=5ms", "is not a bound of rate"),
        ("rate.p99>5", "rate has no statistics"),
        ("error_rate<1/s", "is not a bound of error_rate"),
    ],
)
def test_a_wrong_threshold_is_refused_with_the_right_form(text: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason.replace(".", r"\.")):
        Threshold.parse(text)
