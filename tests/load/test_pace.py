"""The intended starts of an open loop."""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter_ns

import pytest

from penstock.load.pace import Pace, starts_within
from penstock.net._poller import Poller


def started(rate: float, ramp: float, most: int) -> list[int]:
    """Return the intended starts, in nanoseconds from the first."""
    starts: list[int] = []

    def start(at: int) -> None:
        assert at <= perf_counter_ns(), "nothing starts early"
        starts.append(at)

    poller = Poller()
    pace = Pace(poller, rate, ramp, most, start)
    while not pace.is_over:
        poller.poll()
    pace.close()
    assert len(poller) == 0
    poller.close()
    return [at - starts[0] for at in starts]


@pytest.mark.parametrize("rate", [1000.0, 100_000.0], ids=["one at a time", "several at a time"])
def test_starts_are_evenly_apart(rate: float) -> None:
    starts = started(rate, 0, 20)
    assert starts == pytest.approx([number * 1e9 / rate for number in range(20)], abs=2)


def test_starts_come_closer_within_the_ramp() -> None:
    starts = started(10_000, 0.004, 40)
    gaps = [b - a for a, b in pairwise(starts)]
    assert gaps[:20] == sorted(gaps[:20], reverse=True)
    assert gaps[-1] == pytest.approx(100_000, abs=2)


@pytest.mark.parametrize("ramp", [0, 0.004, 0.02])
def test_those_within_a_time_are_those_that_are_due_before_its_end(ramp: float) -> None:
    starts = started(2_000, ramp, 40)
    for end in (0.001, 0.00395, 0.00405, 0.0117):
        assert starts_within(end, 2_000, ramp) == sum(at < end * 1e9 for at in starts)


def test_one_that_was_closed_by_what_it_started_starts_no_more() -> None:
    poller = Poller()
    starts: list[int] = []

    def start(at: int) -> None:
        starts.append(at)
        pace.close()

    pace = Pace(poller, 1000, 0, None, start)
    while not starts:
        poller.poll()
    assert len(poller) == 0
    poller.close()


def test_a_bug_of_what_is_started_is_heard() -> None:
    def start(at: int) -> None:
        raise ZeroDivisionError(at)

    poller = Poller()
    pace = Pace(poller, 1000, 0, None, start)
    with pytest.raises(ZeroDivisionError):
        while True:
            poller.poll()
    pace.close()
    poller.close()
