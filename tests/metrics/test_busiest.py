"""Which destinations have series of their own."""

from __future__ import annotations

from penstock.metrics.busiest import Busiest


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_number_of_names_is_bounded_and_the_sum_exact() -> None:
    busiest = Busiest(100, 3, Clock())
    for number in range(10_000):
        busiest.add(f"d{number}.example", [1, number % 2, 0])
        busiest.add("big.example", [1, 0, 0])
    sums = busiest.sums()
    assert len(sums) == 101
    assert [sum(counts[place] for counts in sums.values()) for place in range(3)] == [20_000, 5000, 0]
    assert sums["big.example"] == [10_000, 0, 0]
    assert len(busiest._activity) <= 1000


def test_fewer_names_leave_the_busiest_and_the_sum() -> None:
    busiest = Busiest(3, 1, Clock())
    for name, count in (("a.example", 1), ("b.example", 5), ("c.example", 3)):
        busiest.add(name, [count])
    busiest.use(1)
    assert busiest.sums() == {"b.example": [5], "other": [4]}
    busiest.use(2)
    busiest.add("a.example", [7])
    assert busiest.sums() == {"b.example": [5], "a.example": [7], "other": [4]}


def test_a_busy_destination_replaces_one_that_is_not_any_more() -> None:
    clock = Clock()
    busiest = Busiest(1, 1, clock)
    busiest.add("old.example", [1000])
    busiest.add("new.example", [100])
    assert set(busiest.sums()) == {"old.example", "other"}
    for _ in range(10):
        clock.now += 301
        busiest.add("new.example", [100])
    sums = busiest.sums()
    assert set(sums) == {"new.example", "other"}
    assert sum(count for (count,) in sums.values()) == 2100
    assert sums["other"][0] >= 1000


def test_without_names_everything_is_other() -> None:
    busiest = Busiest(0, 1, Clock())
    busiest.add("a.example", [2])
    busiest.add("other", [3])
    assert busiest.sums() == {"other": [5]}
