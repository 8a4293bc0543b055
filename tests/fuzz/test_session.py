"""The short form of the session's fuzzer: every state, and rounds with fixed seeds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.session import STATES, WORDS, check, one, sing


@pytest.mark.parametrize("seed", range(0, 2000, 100))
def test_the_invariants_hold_for_random_octets(seed: int) -> None:
    for each in range(seed, seed + 100):
        one(each)
        sing(each)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("is_lmtp", [False, True])
def test_the_invariants_hold_for_every_command_in_every_state(state: str, is_lmtp: bool) -> None:
    for word in WORDS:
        check(STATES[state], word + b"NOOP\r\n", [], is_lmtp=is_lmtp)


@given(
    st.sampled_from(sorted(STATES.values())),
    st.lists(st.sampled_from(WORDS) | st.binary(max_size=8), max_size=12).map(b"".join),
    st.lists(st.integers(0, 400), max_size=4),
    st.booleans(),
)
def test_the_invariants_hold_for_what_hypothesis_finds(
    prefix: bytes, data: bytes, cuts: list[int], is_lmtp: bool
) -> None:
    check(prefix, data, cuts, is_lmtp=is_lmtp)
