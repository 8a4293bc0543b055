"""The text format of Prometheus, version 0.0.4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from penstock.metrics._shared import BUCKETS, bucket_bounds
from penstock.metrics.collect import Sums
from penstock.metrics.families import FAMILIES, PREFIX, PROCESS_FAMILIES, Family

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS: Final = {kind: bucket_bounds(kind) for kind in "son"}


def render(sums: Sums, process: dict[str, float]) -> str:
    """Return all metrics as text: each with HELP and TYPE, also those that have no series yet.

    `process` has the values of PROCESS_FAMILIES that are known.
    """
    by_family: dict[str, list[tuple[str, int | list[int]]]] = {name: [] for name in FAMILIES}
    for (_, name), value in sums.items():
        base, brace, labels = name.partition("{")
        by_family.setdefault(base, []).append((brace + labels, value))
    lines: list[str] = []
    for name, family in FAMILIES.items():
        found = sorted(by_family[name], key=lambda each: each[0])
        lines += _head(PREFIX + name, family)
        lines += (_histograms if family.type == "histogram" else _plain)(PREFIX + name, family, found)
    for name, family in PROCESS_FAMILIES.items():
        lines += _head(name, family)
        if name in process:
            lines.append(f"{name} {process[name]!r}")
    return "\n".join(lines) + "\n"


def _head(name: str, family: Family) -> tuple[str, str]:
    return f"# HELP {name} {family.help}", f"# TYPE {name} {family.type}"


def _plain(name: str, _: Family, found: Iterable[tuple[str, int | list[int]]]) -> Iterator[str]:
    for labels, value in found:
        yield f"{name}{labels} {value}"


def _histograms(name: str, family: Family, found: Iterable[tuple[str, int | list[int]]]) -> Iterator[str]:
    # The bounds of Prometheus belong to the buckets below them; those of durations are fine enough without that.
    scale, less = (1e9, 0) if family.unit == "s" else (1, 1)
    for labels, value in found:
        assert isinstance(value, list)
        inside = labels[1:-1] + "," if labels else ""
        total = 0
        for bound, count in zip(_BOUNDS[family.unit], value[: BUCKETS - 1], strict=True):
            total += count
            yield f'{name}_bucket{{{inside}le="{(bound - less) / scale:.10g}"}} {total}'
        total += value[BUCKETS - 1]
        yield f'{name}_bucket{{{inside}le="+Inf"}} {total}'
        yield f"{name}_sum{labels} {value[BUCKETS] / scale:.10g}"
        yield f"{name}_count{labels} {total}"


def percentile(value: list[int], unit: str, rank: float) -> float:
    """Return an upper bound of the value at a rank (0 to 1) of a histogram, in seconds, octets or as a number.

    0 without values; the bound is at most a half above the value.
    """
    total = sum(value[:BUCKETS])
    bounds = _BOUNDS[unit]
    seen = 0
    for place, count in enumerate(value[:BUCKETS]):
        seen += count
        if total and seen >= rank * total:
            return bounds[min(place, len(bounds) - 1)] / (1e9 if unit == "s" else 1)
    return 0.0
