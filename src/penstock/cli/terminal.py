"""What several commands write to a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import msgspec

_BARS: Final = " ▁▂▃▄▅▆▇█"


def bars(values: Sequence[float], width: int = 60) -> str:
    """Return a line of bars, scaled to the greatest value; the newest is at the right."""
    values = values[-width:]
    most = max(values, default=0)
    shown = "".join(_BARS[-(-int(value * 800 / most) // 100) if most else 0] for value in values)
    return shown.rjust(width)


def json_text(value: Any) -> str:
    r"""Return a value as JSON in which everything that is not printable is written as \uXXXX.

    Addresses and replies come from clients and servers. Some characters that JSON allows control a terminal (C1
    controls), hide text or change its direction, and U+2028 ends a line for some readers.
    """
    text = msgspec.json.encode(value).decode()
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "\\u007f" if c == "\x7f" else json.dumps(c)[1:-1] for c in text)
