"""Durations and stages as people write them: "250us", "50ms", "10s", "5m", "2h"."""

from __future__ import annotations

import re
from typing import Final

_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION: Final = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)(us|ms|s|m|h)?", re.ASCII)
MAX_SECONDS: Final = 30 * 24 * 3600.0
"""The longest duration that is accepted: 30 days."""


def parse_duration(text: str, *, needs_unit: bool = False) -> float:
    """Return a duration in seconds; a number without a unit is seconds. Raise ValueError.

    >>> parse_duration("50ms"), parse_duration("1.5m"), parse_duration("60")
    (0.05, 90.0, 60.0)
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None or (needs_unit and found[2] is None):
        raise ValueError(f"a duration looks like 250us, 50ms, 10s, 5m or 2h, not {text!r}")
    seconds = float(found[1]) * _UNITS[found[2] or "s"]
    if seconds > MAX_SECONDS:
        raise ValueError(f"{text} is longer than 30 days")
    return seconds


def milliseconds(seconds: float) -> str:
    """Return a duration in milliseconds with three significant digits, without the unit: "0.31", "12.4", "1,250"."""
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"
