"""Plots for reports: an SVG that is stretched to the width there is, and labels as HTML, which keep their size.

So a plot is as readable on a phone as on a desktop. There is no script; every value that is given is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Final, NamedTuple

COLOURS: Final = "abcdefgh"
"""Classes of the lines and bars."""
_SIZE: Final = 1000
"""Units of the SVG in both directions."""
_MAX_DECADE_TICKS: Final = 3
"""Decades up to which a logarithmic axis also has ticks at 2 and 5."""


class Series(NamedTuple):
    """A line: runs of points, between which it is interrupted."""

    name: str
    colour: str
    runs: Sequence[Sequence[tuple[float, float]]]
    is_dashed: bool = False


class Tick(NamedTuple):
    """A label of an axis; minor ones are left out where there is little room."""

    at: float
    """0 to 1."""
    text: str
    is_minor: bool = False


class Axis(NamedTuple):
    """A scale from values to 0...1."""

    low: float
    high: float
    is_log: bool
    ticks: Sequence[Tick]

    def at(self, value: float) -> float:
        """Return where a value stands."""
        if self.is_log:
            value = min(max(value, self.low), self.high)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear(top: float, unit: str = "") -> Axis:
    """Return a linear axis from 0 to a round number that is not less than `top`."""
    high = _round_up(top)
    ticks = [Tick(part / 4, number(high * part / 4) + unit) for part in range(5)]
    return Axis(0.0, high, False, ticks)


def time_axis(seconds: float) -> Axis:
    """Return a linear axis of seconds that ends where the run ends."""
    seconds = max(seconds, 1e-3)
    step = _round_up(seconds / 6)
    count = int(seconds / step + 1e-9)
    ticks = [Tick(n * step / seconds, f"{number(n * step)} s", n % 2 == 1) for n in range(count + 1)]
    return Axis(0.0, seconds, False, ticks)


def latency_axis(values: Iterable[float]) -> Axis:
    """Return a logarithmic axis of latencies in seconds."""
    found = [value for value in values if value > 0] or [1e-3]
    low, high = math.floor(math.log10(min(found)) + 1e-9), math.ceil(math.log10(max(found)) - 1e-9)
    high = max(high, low + 1)
    steps = (1, 2, 5) if high - low <= _MAX_DECADE_TICKS else (1,)
    axis = Axis(10.0**low, 10.0**high, True, [])
    ticks = [
        Tick(axis.at(value), _latency(value), step != 1)
        for exponent in range(low, high + 1)
        for step in steps
        if (value := step * 10.0**exponent) <= axis.high * (1 + 1e-9)
    ]
    return axis._replace(ticks=ticks)


def percentile_axis(count: int) -> Axis:
    """Return the axis of a percentile spectrum: 1 / (1 - part), logarithmic, so that each nine has the same room."""
    nines = max(2, math.ceil(math.log10(max(count, 2))))
    ticks = [Tick(0.0, "0%"), Tick(math.log10(2) / nines, "50%", is_minor=True)]
    ticks += [
        Tick(n / nines, f"{100 - 100 / 10**n:.{max(0, n - 2)}f}%", n % 2 == 0 and n > 2) for n in range(1, nines + 1)
    ]
    return Axis(1.0, 10.0**nines, True, ticks)


def lines(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Return a plot of lines."""
    inside = "".join(
        f'<polyline class="line {each.colour}{" dashed" if each.is_dashed else ""}" points="{_points(run, x, y)}"/>'
        for each in series
        for run in each.runs
    )
    return _figure(title, [(each.name, each.colour, each.is_dashed) for each in series], inside, x, y)


def bars(
    title: str,
    kinds: Sequence[tuple[str, str]],
    columns: Sequence[tuple[float, float, Sequence[float]]],
    x: Axis,
    y: Axis,
) -> str:
    """Return a plot of stacked bars: `kinds` are names and colours; each column has its bounds and a value of each."""
    inside = ""
    for begin, end, values in columns:
        below = 0.0
        for (_, colour), value in zip(kinds, values, strict=True):
            if value:
                left, right = (x.at(each) * _SIZE for each in (begin, end))
                top, bottom = (_SIZE * (1 - y.at(each)) for each in (below + value, below))
                inside += (
                    f'<rect class="bar {colour}" x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0.5):.1f}" '
                    f'height="{bottom - top:.1f}"/>'
                )
                below += value
    return _figure(title, [(name, colour, False) for name, colour in kinds], inside, x, y)


def share_bar(parts: Sequence[tuple[str, float]]) -> str:
    """Return a horizontal bar of coloured parts, whose sum is 1."""
    inside, left = "", 0.0
    for colour, part in parts:
        inside += f'<rect class="bar {colour}" x="{left * _SIZE:.1f}" y="0" width="{part * _SIZE:.1f}" height="10"/>'
        left += part
    return f'<svg class="share" viewBox="0 0 {_SIZE} 10" preserveAspectRatio="none" aria-hidden="true">{inside}</svg>'


def number(value: float) -> str:
    """Return a number of an axis."""
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"


def _latency(seconds: float) -> str:
    if seconds >= 0.9999:
        return f"{seconds:,.4g} s"
    return f"{seconds * 1e3:.4g} ms" if seconds >= 0.99e-3 else f"{seconds * 1e6:.4g} us"


def _points(run: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    return " ".join(f"{x.at(a) * _SIZE:.1f},{(1 - y.at(b)) * _SIZE:.1f}" for a, b in run)


def _figure(title: str, key: Sequence[tuple[str, str, bool]], inside: str, x: Axis, y: Axis) -> str:
    grid = "".join(
        f'<line class="grid" x1="0" x2="{_SIZE}" y1="{(1 - tick.at) * _SIZE:.1f}" y2="{(1 - tick.at) * _SIZE:.1f}"/>'
        for tick in y.ticks
    )
    labels = "".join(_labels("y", "bottom", y.ticks)) + "".join(_labels("x", "left", x.ticks))
    names = "".join(
        f'<span><i class="{colour}{" dashed" if is_dashed else ""}"></i>{escape(name)}</span>'
        for name, colour, is_dashed in key
    )
    return (
        f'<figure><div class="plot"><svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">{grid}{inside}</svg>{labels}</div><figcaption>{names}</figcaption></figure>'
    )


def _labels(kind: str, side: str, ticks: Sequence[Tick]) -> Iterator[str]:
    for tick in ticks:
        minor = " minor" if tick.is_minor else ""
        yield f'<span class="{kind}{minor}" style="{side}:{tick.at * 100:.2f}%">{tick.text}</span>'


def _round_up(value: float) -> float:
    """Return the next round number that is not less."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))
