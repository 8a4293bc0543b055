from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.sequence import Mark, mark, parse, parse_counter

RUNS = st.text("0123456789abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=16)
NUMBERS = st.integers(0, 10**12 - 1)


@given(RUNS, NUMBERS, st.sampled_from(["", "news+", "a+b+"]))
def test_a_tag_is_parsed_alone_or_after_a_plus(run: str, number: int, before: str) -> None:
    assert parse(before + mark(run, number)) == Mark(run, number)
    assert str(Mark(run, number)) == mark(run, number)


@pytest.mark.parametrize(
    "text", ["", "alice", "seq-", "seq-a", "seq-a-", "seq--1", "seq-A-1", "xseq-a-1", "seq-a-1x", "seq-a-1\n",
             "seq-abcdefghijklmnopq-1", "seq-a-1234567890123", "seq-a-\u0661"],
)  # fmt: skip
def test_other_text_is_no_tag(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(("run", "number"), [("", 1), ("A", 1), ("a" * 17, 1), ("a", -1), ("a", 10**12)])
def test_invalid_tags_are_not_made(run: str, number: int) -> None:
    with pytest.raises(ValueError):
        mark(run, number)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("17", Mark("", 17)),
        (" 17 ", Mark("", 17)),
        ("nightly-0017", Mark("nightly-", 17)),
        ("<a.17@>", Mark("<a.", 17)),
        ("seq-k3-17", Mark("k3", 17)),
        ("no digits", None),
        ("", None),
    ],
)
def test_a_counter_is_parsed_with_the_text_before_it(text: str, found: Mark | None) -> None:
    assert parse_counter(text) == found
