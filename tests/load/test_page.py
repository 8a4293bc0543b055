"""The HTML page of a report, and of a comparison."""

from __future__ import annotations

import re
from typing import Any

import pytest

from penstock.load.compare import compare
from penstock.load.counts import Counts
from penstock.load.page import comparison_page, page
from penstock.load.plot import latency_axis, percentile_axis

ABOUT = {
    "targets": ["[::1]:25"], "machine": "a <machine>", "command": "penstock load", "workers": 1, "interrupted": False
}  # fmt: skip


def report(seconds: int, rest: float, latency: float = 0.002) -> dict[str, Any]:
    """Return the report of a run with 100 messages in each second, and in the rest of one at its end."""
    counts = Counts()
    lengths = [1.0] * seconds + [rest]
    for number, length in enumerate(lengths):
        counts.accepted += int(100 * length)
        for phase in ("message", "dot"):
            counts.phases[phase].record_n(int(latency * 1e9), int(100 * length))
        counts.current.record_n(int(latency * 1e9), int(100 * length))
        counts.replies["dot", 250] = counts.accepted
        counts.replies["rcpt", 450] = counts.replies.get(("rcpt", 450), 0) + 1
        counts.refused += 1
        counts.ended = counts.begun + sum(lengths[: number + 1])
        counts._second_begun = counts.ended - length
        counts.tick(1, is_last=True)
    return {**ABOUT, **counts.as_report()}


def lines(html: str, colour: str) -> list[list[tuple[float, float]]]:
    """Return the points of the lines of a colour."""
    found = re.findall(rf'<polyline class="line {colour}[^"]*" points="([^"]*)"', html)
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in line.split())] for line in found]


def test_every_second_is_drawn_and_the_rest_at_its_own_rate() -> None:
    html = page(report(5, 0.5))
    accepted = lines(html, "a")[1]
    assert len(accepted) == 12, "two ends of each step"
    assert accepted[-1][0] == 1000, "the last second ends where the plot ends"
    assert len({y for _, y in accepted}) == 1, "half of a second with half of the messages has the same rate"


def test_a_rest_too_short_for_a_rate_joins_the_last_second() -> None:
    found = report(5, 0.05)
    assert [row["length"] for row in found["timeline"]] == [1, 1, 1, 1, 1.05]
    assert sum(row["accepted"] for row in found["timeline"]) == found["accepted"]


def test_a_long_run_keeps_all_its_seconds() -> None:
    assert len(lines(page(report(1000, 0.5)), "a")[1]) == 2 * 1001


def test_a_run_of_less_than_a_second_is_drawn() -> None:
    assert len(lines(page(report(0, 0.5)), "a")[1]) == 2


def test_a_second_without_messages_interrupts_the_latency() -> None:
    found = report(3, 0.5)
    found["timeline"][1] |= {"p50": 0.0, "p99": 0.0, "max": 0.0, "accepted": 0}
    assert [len(line) for line in lines(page(found), "b")] == [2, 4]


def test_latency_axes_are_logarithmic() -> None:
    axis = latency_axis([0.0004, 2.0])
    assert [tick.text for tick in axis.ticks] == ["100 us", "1 ms", "10 ms", "100 ms", "1 s", "10 s"]
    assert axis.at(0.01) - axis.at(0.001) == pytest.approx(axis.at(0.1) - axis.at(0.01))


def test_each_nine_of_the_percentile_spectrum_has_the_same_room() -> None:
    axis = percentile_axis(5000)
    assert [tick.text for tick in axis.ticks] == ["0%", "50%", "90%", "99%", "99.9%", "99.99%"]
    assert [tick.at for tick in axis.ticks[2:]] == [0.25, 0.5, 0.75, 1.0]
    spectrum = lines(page(report(5, 0.5)), "c dashed")
    assert spectrum[0][-1][0] < 1000


def test_errors_are_drawn_by_second_and_replies_by_phase() -> None:
    html = page(report(3, 0.5))
    errors = html[html.index("Errors over time") : html.index("Latency by percentile")]
    assert errors.count("<rect") == 4
    assert "rcpt 450" in errors
    assert "<td>dot</td>" in html[html.index("Replies by phase") :]


def test_a_comparison_lays_one_run_over_the_other() -> None:
    first, second = report(5, 0.5), report(5, 0.5, latency=0.02)
    html = comparison_page(first, second, compare(first, second), ["a.json", "b<.json"])
    assert "b&lt;.json: message" in html
    assert "The second run is worse." in html
    assert len(lines(html, "a")) == len(lines(html, "b")) == 3


def test_texts_are_escaped() -> None:
    assert "a &lt;machine&gt;" in page(report(1, 0))


def test_notes_name_what_limits_the_meaning_of_the_figures() -> None:
    html = page({**report(2, 0.5), "late": 7, "interrupted": True, "aborted_by": "rate>1", "warm_up": {"seconds": 3.0}})
    assert "3 failed: 3 refused, 0 without a reply, 0 dropped, 0 not started" in html
    for note in ("stopped: rate&gt;1 was violated", "7 messages waited for a free session", "warm-up of 3 s"):
        assert note in html
    assert "<p></p>" not in page({**report(2, 0.5), "refused": 0})
