"""The tally by itself: marks and kinds of reply. What sessions tell it stands in tests/inbound/test_receipts.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock._tally import PHASES, Sequence, SequenceBook, Tally
from penstock.sequence import parse
from penstock.smtp._wire import VERBS
from tests.test_sequence import NUMBERS, RUNS

LOCAL_PARTS = st.one_of(
    st.text(max_size=40),
    st.text("seq-+a1", max_size=30),
    st.builds("{}seq-{}-{}".format, st.sampled_from(["", "a+", "x", "a+b+"]), RUNS, NUMBERS),
)


def test_the_phases_begin_with_the_verbs_in_their_order() -> None:
    assert PHASES[: len(VERBS)] == ("unknown", *VERBS[1:])


@given(st.lists(LOCAL_PARTS, max_size=5))
def test_marks_are_read_as_the_format_says(texts: list[str]) -> None:
    book = SequenceBook()
    marks = [parse(text) for text in texts]
    for text, mark in zip(texts, marks, strict=True):
        small = mark is None or mark.number < 1 << 20
        assert book.mark(text) is (mark is not None) or not small
    small_ones = {mark for mark in marks if mark is not None and mark.number < 1 << 20}
    assert book.unmarked == marks.count(None)
    for mark in small_ones:
        assert mark.number in book.runs[mark.run]


@given(st.lists(st.integers(0, 300), max_size=400), st.integers(0, 310))
def test_a_sequence_knows_what_came_twice_late_and_never(numbers: list[int], last: int) -> None:
    book = SequenceBook()
    for number in numbers:
        assert book.note("run", number)
    if not numbers:
        assert book.runs == {}
        return
    found = book.runs["run"]
    firsts = list(dict.fromkeys(numbers))
    assert (found.received, found.distinct) == (len(numbers), len(firsts))
    assert found.duplicates == len(numbers) - len(firsts)
    assert found.out_of_order == sum(number < max(firsts[: i + 1]) for i, number in enumerate(firsts))
    assert (found.lowest, found.highest) == (min(numbers), max(numbers))
    missing = [number for number in range(1, last + 1) if number not in numbers]
    assert found.missing(1, last, 7) == (len(missing), missing[:7])


def test_a_million_marks_take_two_hundred_kilobytes_at_most() -> None:
    book = SequenceBook()
    for number in range(1, 1_000_001):
        book.mark(f"seq-k3-{number}")
    found = book.runs["k3"]
    assert (found.received, found.distinct, found.duplicates, found.out_of_order) == (1_000_000, 1_000_000, 0, 0)
    assert found.missing(1, 1_000_000, 10) == (0, [])
    assert book.octets <= 262_144


def test_marks_that_there_is_no_room_for_are_counted() -> None:
    book = SequenceBook()
    assert not book.note("far", 10**11)
    assert book.runs == {}
    assert book.note("far", (48 << 20) * 8)
    assert not book.note("further", (48 << 20) * 8)
    for run in range(100):
        book.note(f"run{run}", 1)
    assert len(book.runs) == 64
    assert book.further == 2 + 37
    assert book.octets <= 64 << 20


def test_examples_of_duplicates_are_bounded() -> None:
    book = SequenceBook()
    for number in range(200):
        book.note("a", number)
        book.note("a", number)
    assert book.runs["a"].examples == list(range(100))
    assert book.runs["a"].duplicates == 200


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
def test_replies_are_told_apart_by_code_and_status(encoded: bytes, code: int, status: str | None) -> None:
    tally = Tally()
    tally.turned_away(encoded)
    assert tally.counted() == [("banner", code, status, None, 1)]


def test_further_kinds_of_reply_are_counted_as_one_number() -> None:
    tally = Tally()
    for subject in range(2):
        for detail in range(1000):
            tally.turned_away(b"451 4.%d.%d x\r\n" % (subject, detail))
    assert len(tally.counted()) == 1024
    assert tally.further == 2000 - 1024


def test_a_reset_forgets_all_but_the_open_sessions() -> None:
    tally = Tally()
    meter = tally.meter()
    tally.turned_away(b"421 4.3.2 Too many\r\n")
    tally.reset()
    assert (tally.sessions, tally.open_sessions, tally.replies, tally.counted(), tally.ends) == (0, 1, 0, [], {})
    meter.ended("QUIT", 5)
    meter.ended("QUIT", 5)
    assert (tally.open_sessions, tally.received, tally.ends) == (0, 5, {"QUIT": 1})


def test_causes_of_further_kinds_are_counted_together() -> None:
    tally = Tally()
    for number in range(100):
        tally.meter().ended(f"cause {number}", 0)
    assert len(tally.ends) == 65
    assert tally.ends["others"] == 36
