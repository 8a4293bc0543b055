"""The sliding window: what it counts, and that its memory is bounded."""

from __future__ import annotations

import pytest

from penstock import window
from penstock.window import SlidingWindow


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_events_fade_within_two_windows() -> None:
    clock = Clock()
    counts = SlidingWindow(100, clock)
    for _ in range(10):
        counts.add("a")
    assert (counts.count("a"), counts.count("b")) == (10, 0)
    clock.now = 150
    assert counts.count("a") == 5
    clock.now = 200
    assert counts.count("a") == 0


def test_an_event_can_be_taken_back_in_the_next_window() -> None:
    clock = Clock()
    counts = SlidingWindow(100, clock)
    counts.add("a")
    counts.add("a")
    clock.now = 100
    counts.remove("a")
    assert counts.count("a") == 1
    counts.remove("a")
    counts.remove("a")
    assert counts.count("a") == 0


def test_forgetting_a_key_leaves_the_others() -> None:
    counts = SlidingWindow(100, Clock())
    counts.add("a")
    counts.add("b")
    counts.forget("a")
    assert (counts.count("a"), counts.count("b")) == (0, 1)


def test_keys_above_the_bound_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "MAX_KEYS", 2)
    counts = SlidingWindow(100, Clock())
    for key in ("a", "b", "c", "a"):
        counts.add(key)
    assert [counts.count(key) for key in "abc"] == [2, 1, 0]
