"""Bodies with edits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.policy.overlay import Edit, EditedBody


class Chunks:
    """A body in pieces."""

    def __init__(self, octets: bytes, size: int) -> None:
        self._octets = octets
        self._size = size
        self.size = len(octets)

    def chunks(self) -> Iterator[bytes]:
        return (self._octets[at : at + self._size] for at in range(0, self.size, self._size))

    def close(self) -> None:
        self._octets = b""


@st.composite
def edits(draw: st.DrawFn) -> tuple[bytes, list[Edit]]:
    octets = draw(st.binary(max_size=60))
    places = sorted(draw(st.lists(st.integers(0, len(octets)), max_size=8)))
    pairs = list(zip(places[::2], places[1::2], strict=False))
    return octets, [Edit(start, stop, draw(st.binary(max_size=5))) for start, stop in pairs]


@given(edits(), st.integers(1, 70))
def test_an_edited_body_reads_as_the_edits_say(case: tuple[bytes, list[Edit]], size: int) -> None:
    octets, wanted = case
    expected, at = b"", 0
    for start, stop, new in wanted:
        expected += octets[at:start] + new
        at = stop
    expected += octets[at:]
    body = EditedBody(Chunks(octets, size), wanted)
    assert b"".join(body.chunks()) == expected
    assert b"".join(body.chunks()) == expected, "it can be read again"
    assert body.size == len(expected)


@pytest.mark.parametrize("wrong", [[Edit(2, 1)], [Edit(0, 2), Edit(1, 3)], [Edit(0, 9)]])
def test_edits_that_do_not_fit_are_refused(wrong: list[Edit]) -> None:
    with pytest.raises(ValueError, match="overlap or are not within"):
        EditedBody(Chunks(b"12345678", 3), wrong)
