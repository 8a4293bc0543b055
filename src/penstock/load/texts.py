"""The messages to send: made once, read once from files, or cut out of one buffer; only the sequence tag differs."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from statistics import NormalDist
from typing import Final, NamedTuple

from penstock import sequence
from penstock.load.plan import PlanError
from penstock.smtp.client import stuffed

_LINE: Final = b"x" * 78 + b"\r\n"
_MAX_OCTETS: Final = 1 << 30
"""The largest message; a size that a distribution draws larger is reduced to this."""
_ONE_IN_THOUSAND: Final = 3.09
"""Standard deviations above the mean that one message in a thousand exceeds: this size must not be above the limit."""
_HEAD: Final = b"From: load <load@load.invalid>\r\nTo: load <load@load.invalid>\r\nSubject: penstock load\r\n\r\n"


class Text(NamedTuple):
    """A message as it is sent, but for its sequence tag."""

    pieces: tuple[bytes | memoryview, ...]
    size: int
    """Octets of the message itself, before dot-stuffing."""

    def sent(self, tag: str | None) -> bytes:
        """Return the octets to send; without a copy if the message is in one piece and has no tag."""
        pieces = self.pieces
        if tag is not None:
            return b"".join((sequence.HEADER.encode(), b": ", tag.encode(), b"\r\n", *pieces))
        first = pieces[0]
        return first if len(pieces) == 1 and isinstance(first, bytes) else b"".join(pieces)


TextOf = Callable[[int], Text]
"""Returns a message by its number."""


class _Cuts:
    """Messages of any size, cut out of one buffer that is as long as the longest so far."""

    def __init__(self, *, chunking: bool) -> None:
        self._end = b"" if chunking else b".\r\n"
        """No line begins with a dot, so that nothing has to be stuffed."""
        self._buffer = memoryview(_HEAD)

    def of(self, octets: int) -> Text:
        """Return a message of about this size."""
        lines, rest = divmod(max(0, octets - len(_HEAD)), len(_LINE))
        length = len(_HEAD) + lines * len(_LINE)
        if length > len(self._buffer):
            self._buffer = memoryview(_HEAD + _LINE * min(2 * lines, _MAX_OCTETS // len(_LINE)))
        last = _LINE[-rest:] if rest > 1 else b""
        return Text((self._buffer[:length], last + self._end), length + len(last))


def made(octets: int, *, chunking: bool) -> Text:
    """Return a message of about this size, in one piece."""
    cut = _Cuts(chunking=chunking).of(octets)
    return Text((cut.sent(None),), cut.size)


def read_folder(folder: Path, *, chunking: bool) -> list[Text]:
    """Return the *.eml files of a directory, with CR LF line ends. Raise PlanError if it has no such file."""
    texts = []
    for path in sorted(folder.glob("*.eml")):
        data = path.read_bytes()
        if b"\r\n" not in data:
            data = data.replace(b"\n", b"\r\n")
        texts.append(Text((data if chunking else b"".join(stuffed([data])),), len(data)))
    if not texts:
        raise PlanError(f"{folder} contains no .eml files")
    return texts


def size_of(spec: str, seed: int) -> Callable[[int], int]:
    """Return a function from the number of a message to its size; the same seed gives the same sizes.

    "1000-50000" (uniform); "lognormal:MEDIAN:SIGMA"; "table:1000=70,50000=25,5000000=5" (sizes and weights).
    "4096" is the same for all. Raise PlanError.
    """
    try:
        if spec.startswith("lognormal:"):
            drawn, largest = _lognormal(*map(float, spec.split(":")[1:]))
        elif spec.startswith("table:"):
            rows = [row.split("=") for row in spec.removeprefix("table:").split(",")]
            drawn, largest = _table([int(size) for size, _ in rows], [float(weight) for _, weight in rows])
        elif re.fullmatch(r"\d+-\d+", spec):
            drawn, largest = _uniform(*map(int, spec.split("-")))
        else:
            drawn, largest = _uniform(int(spec), int(spec))
    except (ValueError, TypeError, OverflowError) as exc:
        raise PlanError(
            f"--size is 4096, 1000-50000, lognormal:MEDIAN:SIGMA or table:SIZE=WEIGHT,..., not {spec!r}"
        ) from exc
    if largest > _MAX_OCTETS:
        raise PlanError(f"--size {spec}: a message has at most {_MAX_OCTETS:,} octets")
    return lambda number: min(drawn(_part(seed, number)), _MAX_OCTETS)


def _part(seed: int, number: int) -> float:
    """Return a number above 0 and below 1 that depends on nothing else."""
    octets = blake2b(b"%d %d" % (seed, number), digest_size=8).digest()
    return ((int.from_bytes(octets, "big") >> 12) + 0.5) / (1 << 52)


def _lognormal(median: float, sigma: float) -> tuple[Callable[[float], int], float]:
    if not (median > 0 and sigma >= 0 and math.isfinite(median * sigma)):
        raise ValueError(median, sigma)
    inverse = NormalDist().inv_cdf
    most = math.log(2 * _MAX_OCTETS)
    return lambda part: round(math.exp(min(math.log(median) + sigma * inverse(part), most))), median * math.exp(
        min(sigma * _ONE_IN_THOUSAND, 100)
    )


def _table(sizes: list[int], weights: list[float]) -> tuple[Callable[[float], int], float]:
    bounds = list(accumulate(weights))
    if min(sizes) < 0 or min(weights) < 0 or not (0 < bounds[-1] < math.inf):
        raise ValueError(sizes, weights)
    return lambda part: sizes[bisect_right(bounds, part * bounds[-1])], max(sizes)


def _uniform(low: int, high: int) -> tuple[Callable[[float], int], float]:
    if not 0 <= low <= high:
        raise ValueError(low, high)
    return lambda part: low + int(part * (high - low + 1)), high


def text_of(spec: str, folder: Path | None, seed: int, *, chunking: bool) -> TextOf:
    """Return the messages of a run. Raise PlanError."""
    if folder is not None:
        texts = read_folder(folder, chunking=chunking)
        return lambda number: texts[number % len(texts)]
    size = size_of(spec, seed)
    if spec.isdecimal():
        text = made(int(spec), chunking=chunking)
        return lambda _: text
    cut = _Cuts(chunking=chunking).of
    return lambda number: cut(size(number))
