"""The comparison of two reports."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.load.compare import compare, overall, regressions
from penstock.load.counts import Counts


def report(latency: float, *, spread: float = 0.1, seconds: int = 10, jitter: float = 0.0) -> dict[str, Any]:
    """Return the report of a closed loop whose latencies lie around a value."""
    counts = Counts()
    for number in range(seconds):
        drift = 1 + jitter * (1 if number % 2 else -1)
        for place in range(100):
            ns = int(latency * drift * (1 + spread * (place - 50) / 50) * 1e9)
            for histogram in (counts.phases["dot"], counts.phases["message"], counts.current):
                histogram.record(ns)
        counts.accepted += int(100 / drift)
        counts._second_begun, counts.ended = counts.begun + number, counts.begun + number + 1
        counts.tick(1, is_last=True)
    counts.accepted = int(seconds * 0.2 / latency)
    return counts.as_report()


def verdicts(first: dict[str, Any], second: dict[str, Any]) -> dict[str, str]:
    return {each.metric: each.verdict for each in compare(first, second) if each.verdict is not None}


def test_latency_of_dot_and_message_and_the_rate_are_judged() -> None:
    assert set(verdicts(report(0.002), report(0.002))) == {
        "rate", "dot.p50", "dot.p99", "message.p50", "message.p99"
    }  # fmt: skip


def test_equal_runs_are_the_same() -> None:
    changes = compare(report(0.002), report(0.002))
    assert overall(changes) == "same"
    assert not regressions(changes, 0.0)


def test_a_slower_run_is_worse_and_a_faster_one_better() -> None:
    slow, fast = report(0.003), report(0.002)
    assert set(verdicts(fast, slow).values()) == {"worse"}
    assert set(verdicts(slow, fast).values()) == {"better"}
    assert len(regressions(compare(fast, slow), 0.1)) == 5
    assert not regressions(compare(slow, fast), 0.1)
    assert not regressions(compare(fast, slow), 0.6), "it is not that much worse"


def test_a_change_within_the_noise_is_no_regression() -> None:
    quiet = compare(report(0.002), report(0.0024))
    noisy = compare(report(0.002, jitter=0.5), report(0.0024, jitter=0.5))
    assert "dot.p50" in {each.metric for each in regressions(quiet, 0.1)}
    assert "message.p50" not in {each.metric for each in regressions(noisy, 0.1)}


def test_a_short_run_has_more_noise_than_a_long_one() -> None:
    noise = [
        next(
            each.noise for each in compare(report(0.002, seconds=n), report(0.002, seconds=n)) if each.metric == "rate"
        )
        for n in (1, 4, 16)
    ]
    assert noise == sorted(noise, reverse=True)  # type: ignore[type-var]
    assert noise[0] == pytest.approx(0.1 * 2**0.5, rel=0.01)


def test_reports_of_earlier_versions_are_compared() -> None:
    old = report(0.002)
    old["timeline"] = [
        [row["second"], row["accepted"], 0, 1, row["p50"], row["p99"], row["max"]] for row in old["timeline"]
    ]
    del old["unsent"]
    assert overall(compare(old, report(0.002))) == "same"
