"""What the compiled histogram shows. The theory stands at the top of ext/histogram.pyx.

A compiled module counts at the price of a few instructions with `from penstock.metrics._histogram cimport
Histogram` and `histogram.add(ns, 1)`; see _histogram.pxd.
"""

from collections.abc import Mapping
from typing import Any, Final, Self

LOWEST: Final[int]
"""A microsecond, in nanoseconds: what is shorter counts as this."""
HIGHEST: Final[int]
"""An hour: what is longer counts as this."""

class Histogram:
    """Counts of durations in nanoseconds, in buckets of at most 1 % relative error. Takes 17 KB, whatever it counts."""

    def __init__(self) -> None:
        """Count nothing yet."""
    def record(self, ns: int) -> None:
        """Count a duration."""
    def record_n(self, ns: int, n: int) -> None:
        """Count a duration n times."""
    def merge(self, other: Histogram) -> None:
        """Count all that another one has counted."""
    def reset(self) -> None:
        """Forget everything."""
    @property
    def count(self) -> int:
        """How many durations were counted."""
    @property
    def min(self) -> int:
        """The shortest, exactly; 0 when nothing was counted."""
    @property
    def max(self) -> int:
        """The longest, exactly; 0 when nothing was counted."""
    @property
    def mean(self) -> float:
        """The mean; 0.0 when nothing was counted."""
    def percentile(self, p: float) -> int:
        """Return the duration that p percent (0 to 100) do not exceed; 0 when nothing was counted.

        0 is the shortest and 100 the longest, exactly; what is between is at most 1 % off. Raise ValueError.
        """
    def buckets(self) -> list[tuple[int, int, int]]:
        """Return the buckets that are not empty, as (least duration, first duration beyond it, count)."""
    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can keep: the buckets that are not empty as [least duration, count]."""
    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Self:
        """Return the histogram that `to_dict` told of. Raise KeyError or ValueError when it can not have."""
