"""The intended starts of an open loop."""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter_ns

import pytest

from penstock.load.pace import Pace
from penstock.load.schedule import Schedule, parse_stages
from penstock.net._poller import Poller


def started(rate: float, ramp: float, most: int) -> list[int]:
    """Return the intended starts, in nanoseconds from the first."""
    starts: list[int] = []

    def start(at: int) -> None:
        assert at <= perf_counter_ns(), "nothing starts early"
        starts.append(at)

    poller = Poller()
    pace = Pace(poller, Schedule.constant(rate, ramp, None), most, start)
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
def test_the_total_is_what_is_due_before_the_end(ramp: float) -> None:
    starts = started(2_000, ramp, 40)
    for end in (0.001, 0.00395, 0.00405, 0.0117):
        assert Schedule.constant(2_000, ramp, end).total == sum(at < end * 1e9 for at in starts)


def test_a_pace_closed_by_its_own_start_starts_no_more() -> None:
    poller = Poller()
    starts: list[int] = []

    def start(at: int) -> None:
        starts.append(at)
        pace.close()

    pace = Pace(poller, Schedule.constant(1000, 0, None), None, start)
    while not starts:
        poller.poll()
    assert len(poller) == 0
    poller.close()


def test_an_exception_of_the_start_reaches_the_poller() -> None:
    def start(at: int) -> None:
        raise ZeroDivisionError(at)

    poller = Poller()
    pace = Pace(poller, Schedule.constant(1000, 0, None), None, start)
    with pytest.raises(ZeroDivisionError):
        while True:
            poller.poll()
    pace.close()
    poller.close()


def test_several_processes_share_the_starts_of_one_schedule() -> None:
    schedule = Schedule.constant(2_000, 0.004, 0.02)
    total = schedule.total
    assert total is not None
    poller = Poller()
    starts: list[int] = []
    paces = [
        Pace(poller, schedule, len(range(first, total, 3)), starts.append, first=first, step=3) for first in range(3)
    ]
    while not all(pace.is_over for pace in paces):
        poller.poll()
    for pace in paces:
        pace.close()
    poller.close()
    assert len(starts) == total


def test_stages_ramp_linearly_from_rate_to_rate() -> None:
    schedule = Schedule(parse_stages("10s:100,60s:1000,10s:0"))
    assert schedule.seconds == 80
    assert schedule.total == 500 + 33_000 + 5_000
    assert schedule.due(0) == 0
    assert schedule.due(500) == pytest.approx(10)
    assert schedule.due(33_500) == pytest.approx(70)
    assert schedule.due(38_499) < 80
    dues = [schedule.due(number) for number in range(0, 38_500, 100)]
    assert dues == sorted(dues)


def test_a_stage_without_time_is_a_jump() -> None:
    schedule = Schedule(parse_stages("0s:100,1s:100,0s:500,1s:500"))
    assert schedule.total == 600
    assert schedule.due(50) == pytest.approx(0.5)
    assert schedule.due(350) == pytest.approx(1.5)


@pytest.mark.parametrize("text", ["", "10s", "10:x", "10s:100,", "10s:-5", "10s:0", "10s:1e3"])
def test_stages_without_a_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="stages"):
        parse_stages(text)
