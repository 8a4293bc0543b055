"""The compiled histogram. ext/histogram.pyx begins with its theory.

Compiled modules count with a few instructions: `from penstock.metrics._histogram cimport Histogram` and
`histogram.add(ns, 1)`; see _histogram.pxd.
"""

from collections.abc import Mapping
from typing import Any, Final, Self

LOWEST: Final[int]
"""One microsecond in nanoseconds: shorter durations count as this."""
HIGHEST: Final[int]
"""One hour in nanoseconds: longer durations count as this."""

class Histogram:
    """Counts of durations in nanoseconds, in buckets of at most 1 % relative error. Uses 17 KB."""

    def __init__(self) -> None:
        """Make an empty histogram."""
    def record(self, ns: int) -> None:
        """Count a duration."""
    def record_n(self, ns: int, n: int) -> None:
        """Count a duration n times."""
    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
    def reset(self) -> None:
        """Reset all counts."""
    @property
    def count(self) -> int:
        """Number of durations."""
    @property
    def min(self) -> int:
        """The exact minimum; 0 for an empty histogram."""
    @property
    def max(self) -> int:
        """The exact maximum; 0 for an empty histogram."""
    @property
    def mean(self) -> float:
        """The mean; 0.0 for an empty histogram."""
    def percentile(self, p: float) -> int:
        """Return the duration that p percent do not exceed; 0 for an empty histogram.

        0 and 100 give the exact minimum and maximum; between them, the error is at most 1 %. Raise ValueError unless p
        is between 0 and 100.
        """
    def buckets(self) -> list[tuple[int, int, int]]:
        """Return the non-empty buckets as (lower bound, upper bound, count); the upper bound is exclusive."""
    def to_dict(self) -> dict[str, Any]:
        """Return a form for JSON, with the non-empty buckets as [lower bound, count]."""
    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the histogram of a `to_dict`. Raise KeyError or ValueError for anything else."""
