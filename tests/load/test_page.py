"""The page of a report."""

from __future__ import annotations

import re

from penstock.load.counts import Counts
from penstock.load.page import page


def told(seconds: int, left: float) -> str:
    """Return the page of a run of so many seconds with 100 messages each, and of what is left behind them."""
    counts = Counts()
    for _ in range(seconds):
        counts.accepted += 100
        counts.tick(1)
    counts.tick(0)
    counts.ended = counts.begun + seconds + left
    words = {"targets": ["[::1]:25"], "machine": "a <machine>", "command": "penstock load"}
    return page({**words, **counts.as_report()})


def points(of: str) -> list[list[str]]:
    """Return the points of each curve."""
    return [curve.split() for curve in re.findall(r'<polyline class="curve [abc]" points="([^"]*)"', of)]


def test_what_is_left_of_the_last_second_does_not_look_like_the_end_of_everything() -> None:
    accepted = points(told(5, 0.01))[3]
    assert len(accepted) == 5
    assert len({point.partition(",")[2] for point in accepted}) == 1, "the rate is the same to the end"


def test_a_run_of_less_than_a_second_is_shown() -> None:
    assert [len(curve) for curve in points(told(0, 0.5))] == [2] * 5


def test_nothing_is_taken_for_markup() -> None:
    assert "a &lt;machine&gt;" in told(1, 0)
