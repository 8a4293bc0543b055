"""The messages that are sent: made once for each size, or read once from files; only the mark differs."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from penstock import sequence
from penstock.load.plan import PlanError
from penstock.smtp.client import stuffed

_LINE: Final = b"x" * 78 + b"\r\n"
_KINDS: Final = 64
"""Sizes that are drawn of a distribution: as many texts are kept."""
_MOST_OCTETS: Final = 1 << 30
_HEAD: Final = b"From: load <load@load.invalid>\r\nTo: load <load@load.invalid>\r\nSubject: penstock load\r\n"


class Text(NamedTuple):
    """A message as it is sent, in two parts: the mark stands between them, when it does."""

    head: bytes
    tail: bytes
    size: int
    """Octets of the message itself, with a mark of 20."""

    def sent(self, mark: str | None) -> bytes:
        """Return what is sent."""
        if mark is None:
            return self.head + self.tail
        return b"%s%s: %s\r\n%s" % (self.head, sequence.HEADER.encode(), mark.encode(), self.tail)


def _text(message: bytes, *, chunking: bool) -> Text:
    """Prepare a message: dots are stuffed for DATA, and left alone for BDAT."""
    if chunking:
        return Text(b"", message, len(message))
    return Text(b"", b"".join(stuffed([message])), len(message))


def made(octets: int, *, chunking: bool) -> Text:
    """Return a message of about so many octets."""
    whole, rest = divmod(max(0, octets - len(_HEAD) - 2), len(_LINE))
    return _text(_HEAD + b"\r\n" + _LINE * whole + (_LINE[-rest:] if rest > 1 else b""), chunking=chunking)


def read_folder(folder: Path, *, chunking: bool) -> list[Text]:
    """Return the *.eml files of a folder, with CR LF line ends. Raise PlanError when there are none."""
    texts = []
    for path in sorted(folder.glob("*.eml")):
        data = path.read_bytes()
        if b"\r\n" not in data:
            data = data.replace(b"\n", b"\r\n")
        texts.append(_text(data, chunking=chunking))
    if not texts:
        raise PlanError(f"there is no .eml file in {folder}")
    return texts


def sizes(spec: str, rng: random.Random) -> list[int]:
    """Return sizes of a distribution, to be taken in turn.

    "4096"; "1000-50000" (even); "lognormal:MEDIAN:SIGMA"; "table:1000=70,50000=25,5000000=5" (sizes and weights).
    Raise PlanError.
    """
    found: list[int]
    try:
        if spec.startswith("lognormal:"):
            median, sigma = spec.split(":")[1:]
            found = [round(float(median) * math.exp(rng.gauss(0, float(sigma)))) for _ in range(_KINDS)]
        elif spec.startswith("table:"):
            rows = [row.split("=") for row in spec.removeprefix("table:").split(",")]
            values, weights = [int(row[0]) for row in rows], [float(row[1]) for row in rows]
            found = rng.choices(values, weights, k=_KINDS)
        elif re.fullmatch(r"\d+-\d+", spec):
            low, high = map(int, spec.split("-"))
            found = [rng.randint(low, high) for _ in range(_KINDS)]
        else:
            found = [int(spec)]
    except (ValueError, IndexError, OverflowError) as exc:
        raise PlanError(
            f"--size is 4096, 1000-50000, lognormal:MEDIAN:SIGMA or table:SIZE=WEIGHT,..., not {spec!r}"
        ) from exc
    if min(found) < 0 or sum(found) > _MOST_OCTETS:
        raise PlanError(f"--size {spec}: the texts to draw from have more than {_MOST_OCTETS:,} octets together")
    return found


def all_texts(spec: str, folder: Path | None, seed: int, *, chunking: bool) -> Sequence[Text]:
    """Return the texts that messages take in turn, the same for the same seed."""
    if folder is not None:
        return read_folder(folder, chunking=chunking)
    known: dict[int, Text] = {}
    texts = []
    for octets in sizes(spec, random.Random(seed)):  # noqa: S311 - nothing secret
        if octets not in known:
            known[octets] = made(octets, chunking=chunking)
        texts.append(known[octets])
    return texts
