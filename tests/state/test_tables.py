"""The tables of rate limits and greylisting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.state import Charge, GreylistTimes, Learned
from penstock.state.tables import Tables, steady_clock
from tests.state.clock import SECOND, Clock

HOUR = 3600 * SECOND
TIMES = GreylistTimes(60 * SECOND, 48 * HOUR, 35 * 24 * HOUR)


def charge(key: str = "a", limit: int = 7, cost: int = 1) -> Charge:
    return Charge(key, HOUR, limit, cost)


@given(limit=st.integers(1, 10**6), costs=st.lists(st.integers(1, 10**5), min_size=1, max_size=50))
def test_exactly_the_limit_can_be_used_at_once(limit: int, costs: list[int]) -> None:
    tables = Tables(Clock())
    used = 0
    for cost in costs:
        fits = used + cost <= limit
        assert (tables.take([charge(limit=limit, cost=cost)]) == -1) == fits
        used += cost if fits else 0
    rest = limit - used
    assert not rest or tables.take([charge(limit=limit, cost=rest)]) == -1
    assert tables.take([charge(limit=limit)]) == 0


def test_a_bucket_is_refilled_evenly() -> None:
    clock = Clock()
    tables = Tables(clock)
    for _ in range(7):
        assert tables.take([charge()]) == -1
    clock.advance(3600 / 7 - 0.001)
    assert tables.take([charge()]) == 0
    clock.advance(0.002)
    assert tables.take([charge()]) == -1
    assert tables.take([charge()]) == 0


def test_all_charges_are_taken_or_none() -> None:
    tables = Tables(Clock())
    assert tables.take([charge("full", 1)]) == -1
    assert tables.take([charge("other", 1), charge("full", 1)]) == 1
    assert tables.available([charge("other", 1)]) == -1


def test_what_is_given_back_can_be_taken_again() -> None:
    tables = Tables(Clock())
    assert tables.take([charge(limit=1)]) == -1
    tables.give_back([charge(limit=1)])
    assert tables.take([charge(limit=1)]) == -1
    assert tables.take([charge(limit=1)]) == 0


def test_a_cost_above_the_limit_is_never_available() -> None:
    tables = Tables(Clock())
    assert tables.available([charge(limit=5, cost=6)]) == 0
    assert tables.take([charge(limit=5, cost=6)]) == 0
    assert tables.take([charge(limit=5, cost=5)]) == -1


def test_noted_charges_never_exceed_the_bucket() -> None:
    clock = Clock()
    tables = Tables(clock)
    for _ in range(100):
        tables.note([charge(limit=3)])
    clock.advance(1200)
    assert tables.available([charge(limit=3)]) == -1


def test_greylisting_passes_after_the_delay() -> None:
    clock = Clock()
    tables = Tables(clock)
    assert tables.greylist("a", TIMES) == 60 * SECOND
    clock.advance(20)
    assert tables.greylist("a", TIMES) == 40 * SECOND
    clock.advance(40)
    assert tables.greylist("a", TIMES) == 0
    assert tables.greylist("b", TIMES) == 60 * SECOND
    clock.advance(34 * 86_400)
    assert tables.greylist("a", TIMES) == 0  # which is noted again
    clock.advance(34 * 86_400)
    assert tables.greylist("a", TIMES) == 0
    clock.advance(36 * 86_400)
    assert tables.greylist("a", TIMES) == 60 * SECOND


@given(order=st.permutations(range(3)))
def test_what_others_have_noted_is_merged_in_any_order(order: list[int]) -> None:
    clock = Clock()
    now = clock()
    entries = [
        Learned("a", now - 30 * SECOND, now + HOUR, has_passed=False),
        Learned("a", now - 10 * SECOND, now + 9 * HOUR, has_passed=True),
        Learned("a", now - 60 * SECOND, now - SECOND, has_passed=True),  # it has expired
    ]
    tables = Tables(clock)
    for number in order:
        tables.learn([entries[number]])
    assert tables.greylisted("a") == (now - 30 * SECOND, now + 9 * HOUR, True)
    assert tables.greylist("a", TIMES) == 0


def test_a_first_attempt_at_another_server_counts() -> None:
    clock = Clock()
    tables = Tables(clock, most=2)
    tables.learn([Learned("a", clock() - 20 * SECOND, clock() + HOUR, has_passed=False)])
    assert tables.greylist("a", TIMES) == 40 * SECOND
    tables.learn([Learned(str(n), clock() + HOUR, clock() + 2 * HOUR, has_passed=False) for n in range(5)])
    assert len(tables) == 2
    assert tables.greylist("4", TIMES) == TIMES.delay  # however far their clock is ahead


def test_an_attempt_that_is_not_repeated_is_forgotten() -> None:
    clock = Clock()
    tables = Tables(clock)
    tables.greylist("a", TIMES)
    clock.advance(49 * 3600)
    assert tables.greylist("a", TIMES) == 60 * SECOND


def test_full_tables_forget_what_matters_least() -> None:
    clock = Clock()
    tables = Tables(clock, most=10)
    tables.take([charge("idle")])
    tables.greylist("passed", TIMES)
    clock.advance(3600)
    assert tables.greylist("passed", TIMES) == 0
    for number in range(1000):
        tables.take([charge(f"{number}", 1)])
        tables.greylist(f"{number}", TIMES)
    assert len(tables) == 20
    assert tables.greylist("passed", TIMES) == 0
    assert tables.bucket("idle") is None
    assert tables.available([charge("999", 1)]) == 0


def test_sweeping_forgets_what_no_longer_matters() -> None:
    clock = Clock()
    tables = Tables(clock)
    tables.take([charge("a"), charge("b", 1)])
    tables.greylist("a", TIMES)
    tables.take_changes()
    clock.advance(3600 / 7 + 1)
    tables.sweep(100)
    assert tables.take_changes() == (["a"], [])
    clock.advance(49 * 3600)
    tables.sweep(100)
    assert tables.take_changes() == (["b"], ["a"])
    assert len(tables) == 0


def test_the_clock_of_the_machine_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = steady_clock()
    before = clock()
    monkeypatch.setattr("time.time_ns", lambda: 0)
    assert before <= clock() < before + HOUR
