"""Sequence tags: a run and a number that identify a test message. `penstock load` writes them, a sink reads them.

    seq-RUN-NUMBER        RUN: 1 to 16 of 0-9 a-z       NUMBER: decimal, at most 12 digits

By default the tag is the local part of the sender, or its end after a "+": `seq-k3f9a2-1041@load.invalid`,
`news+seq-k3f9a2-1041@example.org`. In a header field it is the whole value. The numbers of a run start at 1; every
message has its own, and keeps it when it is sent again.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

HEADER: Final = "X-Penstock-Sequence"
"""Header field that `penstock load` writes on request."""

MAX_DIGITS: Final = 12
MAX_RUN: Final = 16

_MARK: Final = re.compile(r"(?:^|\+)seq-([0-9a-z]{1,16})-([0-9]{1,12})\Z", re.ASCII)
_COUNTER: Final = re.compile(r"(.{0,200}?)([0-9]{1,12})\W{0,8}\Z", re.ASCII | re.DOTALL)
_RUN: Final = re.compile(r"[0-9a-z]{1,16}", re.ASCII)


class Mark(NamedTuple):
    """Identifies one message of one run."""

    run: str
    number: int

    def __str__(self) -> str:
        return f"seq-{self.run}-{self.number}"


def mark(run: str, number: int) -> str:
    """Return the tag of a message as text. Raise ValueError for an invalid run or number.

    >>> mark("k3f9a2", 1041)
    'seq-k3f9a2-1041'
    """
    if not _RUN.fullmatch(run):
        raise ValueError(f"a run must be 1 to {MAX_RUN} characters of 0-9 and a-z, not {run!r}")
    if not 0 <= number < 10**MAX_DIGITS:
        raise ValueError(f"a sequence number must have at most {MAX_DIGITS} digits, not {number}")
    return f"seq-{run}-{number}"


def parse(text: str) -> Mark | None:
    """Parse the tag at the end of a local part or another text; None without a tag.

    >>> parse("news+seq-k3f9a2-1041")
    Mark(run='k3f9a2', number=1041)
    """
    found = _MARK.search(text)
    return Mark(found[1], int(found[2])) if found is not None else None


def parse_counter(text: str) -> Mark | None:
    """Parse a counter: a tag, or the digits at the end of a text with the text before them as the run.

    >>> parse_counter("<nightly-17>")
    Mark(run='<nightly-', number=17)
    """
    found = parse(text)
    if found is not None:
        return found
    counter = _COUNTER.fullmatch(text.strip())
    return Mark(counter[1][-64:], int(counter[2])) if counter is not None else None
