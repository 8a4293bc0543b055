"""The histogram compared with a sorted list of all values."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.metrics._histogram import HIGHEST, LOWEST, Histogram

DURATIONS = st.integers(min_value=LOWEST, max_value=HIGHEST)
ANY = st.integers(min_value=-(2**40), max_value=2**50)


def counted(durations: list[int]) -> Histogram:
    histogram = Histogram()
    for ns in durations:
        histogram.record(ns)
    return histogram


def told(histogram: Histogram) -> dict[str, object]:
    """All properties except the sum, which depends on the order of additions."""
    return {key: value for key, value in histogram.to_dict().items() if key != "sum"}


@given(st.lists(DURATIONS, min_size=1), st.floats(0, 100))
def test_a_percentile_is_within_1_percent_of_the_value_at_its_rank(durations: list[int], p: float) -> None:
    rank = max(1, math.ceil(round(p / 100 * len(durations), 6)))
    exact = sorted(durations)[rank - 1]
    assert abs(counted(durations).percentile(p) - exact) <= exact * 0.01


@given(st.lists(ANY, min_size=1))
def test_count_least_greatest_and_mean_are_exact(durations: list[int]) -> None:
    histogram = counted(durations)
    assert histogram.count == len(durations)
    assert histogram.min == histogram.percentile(0) == min(durations)
    assert histogram.max == histogram.percentile(100) == max(durations)
    assert histogram.mean == pytest.approx(sum(durations) / len(durations), abs=1, rel=1e-9)


@given(st.lists(ANY, min_size=1), st.floats(0, 100))
def test_percentiles_are_between_minimum_and_maximum(durations: list[int], p: float) -> None:
    histogram = counted(durations)
    assert histogram.min <= histogram.percentile(p) <= histogram.max


@given(st.lists(ANY), st.lists(ANY))
def test_merging_adds_all_values(ones: list[int], others: list[int]) -> None:
    merged = counted(ones)
    merged.merge(counted(others))
    assert told(merged) == told(counted(ones + others))


@given(st.lists(ANY))
def test_a_histogram_survives_json(durations: list[int]) -> None:
    histogram = counted(durations)
    restored = Histogram.from_dict(json.loads(json.dumps(histogram.to_dict())))
    assert restored.to_dict() == histogram.to_dict()
    assert restored.mean == histogram.mean


@given(DURATIONS)
def test_a_bucket_contains_its_values_and_is_narrow(ns: int) -> None:
    ((low, high, count),) = counted([ns]).buckets()
    assert low <= ns < high
    assert high - low <= ns / 64 + 1
    assert count == 1


def test_values_outside_the_range_count_as_the_nearest_bound() -> None:
    histogram = counted([-5, 0, 10**15])
    assert [count for _, _, count in histogram.buckets()] == [2, 1]
    assert (histogram.min, histogram.max) == (-5, 10**15)


def test_record_n_equals_n_times_record() -> None:
    histogram = Histogram()
    histogram.record_n(5_000_000, 3)
    histogram.record_n(7, 0)
    assert told(histogram) == told(counted([5_000_000] * 3))
    with pytest.raises(ValueError, match="n must not be negative"):
        histogram.record_n(5, -1)


def test_an_empty_or_reset_histogram_has_zeros() -> None:
    histogram = counted([1_000_000, 2_000_000])
    histogram.reset()
    assert histogram.to_dict() == Histogram().to_dict()
    assert (histogram.count, histogram.min, histogram.max, histogram.mean) == (0, 0, 0, 0.0)
    assert histogram.percentile(50) == 0
    assert histogram.buckets() == []


@pytest.mark.parametrize("p", [-0.1, 100.1, math.nan])
def test_a_percentile_out_of_bounds_is_an_error(p: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 100"):
        Histogram().percentile(p)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"unit": "s"}, "the unit"),
        ({"count": 7}, "count 1, not 7"),
        ({"buckets": [[1001, 1]]}, "is not a bucket"),
        ({"buckets": [[1000, -1]]}, "is not a bucket"),
    ],
)
def test_an_invalid_dictionary_is_an_error(changed: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Histogram.from_dict({**counted([1000]).to_dict(), **changed})
