"""Session metrics alone: sequence tags and kinds of replies. tests/server/test_statistics.py has them in sessions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.metrics._session import PHASES, Metrics, Sequence, SequenceTracker
from penstock.sequence import parse
from penstock.smtp._wire import VERBS
from tests.test_sequence import NUMBERS, RUNS

LOCAL_PARTS = st.one_of(
    st.text(max_size=40),
    st.text("seq-+a1", max_size=30),
    st.builds("{}seq-{}-{}".format, st.sampled_from(["", "a+", "x", "a+b+"]), RUNS, NUMBERS),
)


def test_phases_begin_with_the_verbs_in_order() -> None:
    assert PHASES[: len(VERBS)] == ("unknown", *VERBS[1:])


@given(st.lists(LOCAL_PARTS, max_size=5))
def test_tags_are_parsed_like_in_python(texts: list[str]) -> None:
    tracker = SequenceTracker()
    marks = [parse(text) for text in texts]
    for text, mark in zip(texts, marks, strict=True):
        small = mark is None or mark.number < 1 << 20
        assert tracker.mark(text) is (mark is not None) or not small
    small_ones = {mark for mark in marks if mark is not None and mark.number < 1 << 20}
    assert tracker.unmarked == marks.count(None)
    for mark in small_ones:
        assert mark.number in tracker.runs[mark.run]


@given(st.lists(st.integers(0, 300), max_size=400), st.integers(0, 310))
def test_a_sequence_counts_duplicate_late_and_missing_numbers(numbers: list[int], last: int) -> None:
    tracker = SequenceTracker()
    for number in numbers:
        assert tracker.note("run", number)
    if not numbers:
        assert tracker.runs == {}
        return
    found = tracker.runs["run"]
    firsts = list(dict.fromkeys(numbers))
    assert (found.received, found.distinct) == (len(numbers), len(firsts))
    assert found.duplicates == len(numbers) - len(firsts)
    assert found.out_of_order == sum(number < max(firsts[: i + 1]) for i, number in enumerate(firsts))
    assert (found.lowest, found.highest) == (min(numbers), max(numbers))
    missing = [number for number in range(1, last + 1) if number not in numbers]
    assert found.missing(1, last, 7) == (len(missing), missing[:7])


def test_a_million_tags_need_at_most_200_kilobytes() -> None:
    tracker = SequenceTracker()
    for number in range(1, 1_000_001):
        tracker.mark(f"seq-k3-{number}")
    found = tracker.runs["k3"]
    assert (found.received, found.distinct, found.duplicates, found.out_of_order) == (1_000_000, 1_000_000, 0, 0)
    assert found.missing(1, 1_000_000, 10) == (0, [])
    assert tracker.octets <= 262_144


def test_tags_beyond_the_limits_are_counted() -> None:
    tracker = SequenceTracker()
    assert not tracker.note("far", 10**11)
    assert tracker.runs == {}
    assert tracker.note("far", (48 << 20) * 8)
    assert not tracker.note("further", (48 << 20) * 8)
    for run in range(100):
        tracker.note(f"run{run}", 1)
    assert len(tracker.runs) == 64
    assert tracker.further == 2 + 37
    assert tracker.octets <= 64 << 20


def test_examples_of_duplicates_are_bounded() -> None:
    tracker = SequenceTracker()
    for number in range(200):
        tracker.note("a", number)
        tracker.note("a", number)
    assert tracker.runs["a"].examples == list(range(100))
    assert tracker.runs["a"].duplicates == 200


def test_a_sequence_has_nothing_before_its_first_number() -> None:
    assert 0 not in Sequence("a")
    assert Sequence("a").missing(1, 10, 3) == (10, [1, 2, 3])


@pytest.mark.parametrize(
    ("encoded", "code", "status"),
    [
        (b"250 2.1.0 Sender ok\r\n", 250, "2.1.0"),
        (b"451 4.7.100 x\r\n", 451, "4.7.100"),
        (b"250-mx.example.org\r\n250 SIZE\r\n", 250, None),
        (b"421 Too many connections\r\n", 421, None),
        (b"250 5.1.0 of another class\r\n", 250, None),
        (b"250 2.1. no detail\r\n", 250, None),
        (b"250 2.1.0\r\n", 250, None),
        (b"xyz\r\n", 0, None),
        (b"25", 0, None),
    ],
)
def test_replies_are_counted_by_code_and_status(encoded: bytes, code: int, status: str | None) -> None:
    totals = Metrics()
    totals.count_refused_connection(encoded)
    assert totals.counted() == [("banner", code, status, None, 1)]


def test_further_kinds_of_replies_are_counted_together() -> None:
    totals = Metrics()
    for subject in range(2):
        for detail in range(1000):
            totals.count_refused_connection(b"451 4.%d.%d x\r\n" % (subject, detail))
    assert len(totals.counted()) == 1024
    assert totals.further == 2000 - 1024


def test_a_reset_clears_all_but_the_open_sessions() -> None:
    totals = Metrics()
    session = totals.new_session()
    totals.count_refused_connection(b"421 4.3.2 Too many\r\n")
    totals.reset()
    assert (totals.sessions, totals.open_sessions, totals.replies, totals.counted(), totals.ends) == (0, 1, 0, [], {})
    session.ended("QUIT", 5)
    session.ended("QUIT", 5)
    assert (totals.open_sessions, totals.received, totals.ends) == (0, 5, {"QUIT": 1})


def test_further_causes_are_counted_together() -> None:
    totals = Metrics()
    for number in range(100):
        totals.new_session().ended(f"cause {number}", 0)
    assert len(totals.ends) == 65
    assert totals.ends["others"] == 36
