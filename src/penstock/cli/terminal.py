"""What several commands draw on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_BARS: Final = " ▁▂▃▄▅▆▇█"


def bars(values: Sequence[float], width: int = 60) -> str:
    """Return a line of bars, scaled to the greatest value; the newest is at the right."""
    values = values[-width:]
    most = max(values, default=0)
    shown = "".join(_BARS[-(-int(value * 800 / most) // 100) if most else 0] for value in values)
    return shown.rjust(width)
