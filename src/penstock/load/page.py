"""A report as one self-contained page: no script, no network, light and dark, narrow and wide."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, Final

from penstock.load.counts import PHASES
from penstock.load.report import failed, milliseconds

_WIDE: Final = 720
_HIGH: Final = 220
_LEFT: Final = 64
_BELOW: Final = 26
_TOP: Final = 10
_MOST_POINTS: Final = 360
_COLUMNS: Final = (("p50", "p50"), ("p90", "p90"), ("p95", "p95"), ("p99", "p99"), ("p99_9", "p99.9"), ("max", "max"))

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #667085; --line: #d9dee7; --paper: #fff; --card: #f6f8fb;
  --a: #2563eb; --b: #d97706; --c: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #98a2b3; --line: #333b49; --paper: #12161d;
  --card: #1a202a; --a: #6ea8fe; --b: #f5b454; --c: #f97066; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 980px; padding: 24px 16px 64px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 36px 0 8px; }
p, .dim { color: var(--dim); } p { margin: 4px 0; }
code { font: 0.85em/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 10px; margin: 20px 0; }
.tile { background: var(--card); border-radius: 10px; padding: 12px; font-size: 0.9rem; white-space: nowrap; }
.tile b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.tile small { font-size: 0.9rem; }
.bad b { color: var(--c); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--dim); font-size: 0.85rem; }
th:first-child, td:first-child { text-align: left; } td.text { text-align: left; white-space: normal; }
tr.whole td { font-weight: 600; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--dim); font-size: 12px; }
.grid { stroke: var(--line); } .a { stroke: var(--a); } .b { stroke: var(--b); } .c { stroke: var(--c); }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; } .bar { fill: var(--a); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; color: var(--dim); font-size: 0.85rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 560px) { svg text { font-size: 20px; } }
.key { display: flex; gap: 18px; flex-wrap: wrap; color: var(--dim); font-size: 0.85rem; }
.key i { display: inline-block; width: 14px; height: 3px; vertical-align: middle; margin-right: 6px; }
"""


def page(report: dict[str, Any]) -> str:
    """Return the page of a report."""
    when = datetime.datetime.fromtimestamp(report["started"], datetime.UTC)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>penstock load: {escape(", ".join(report["targets"]))}</title><style>{_STYLE}</style>
<h1>penstock load <span class="dim">{escape(", ".join(report["targets"]))}</span></h1>
<p>{when:%Y-%m-%d %H:%M:%S} UTC, {escape(report["machine"])}</p>
<p><code>{escape(report["command"])}</code></p>
{_tiles(report)}
<h2>Latency of a message, second by second</h2>{_latency_chart(report)}
<h2>Messages a second</h2>{_rate_chart(report)}
<h2>Latencies of a message</h2>{_histogram_chart(report)}
<h2>Phases, in milliseconds</h2>{_phase_table(report)}{_legend(report)}
<h2>Replies</h2>{_reply_table(report)}
{_error_table(report)}
</html>
"""


def _tiles(report: dict[str, Any]) -> str:
    failures = failed(report)
    message = report["phases"].get("message")
    tiles = [
        (f"{report['accepted']:,}", "accepted", ""),
        (f"{failures:,}", "failed", " bad" if failures else ""),
        (f"{report['rate']:,.0f}", "a second", ""),
        (f"{milliseconds(message['p50'])} <small>ms</small>" if message else "-", "median", ""),
        (f"{milliseconds(message['p99'])} <small>ms</small>" if message else "-", "p99", ""),
        (f"{report['octets'] / 1e6:,.1f} <small>MB</small>", "of messages", ""),
        (f"{report['connections']:,}", "connections", ""),
    ]
    return '<div class="tiles">{}</div>'.format(
        "".join(f'<div class="tile{kind}"><b>{value}</b>{name}</div>' for value, name, kind in tiles)
    )


# ---- charts


def _seconds(report: dict[str, Any]) -> list[list[float]]:
    """Return the seconds of a run, but not what is left of a last one: it would look like the end of everything."""
    timeline: list[list[float]] = report["timeline"]
    return timeline[: int(report["seconds"])] or timeline


def _thinned(rows: Sequence[Sequence[float]], worst: bool) -> list[list[float]]:
    """Join seconds, so that a long run has no more points than can be seen: the worst of them, or the mean."""
    step = math.ceil(len(rows) / _MOST_POINTS) or 1
    join: Callable[[Sequence[float]], float] = max if worst else _mean
    return [
        [rows[i][0], *(join([row[column] for row in rows[i : i + step]]) for column in range(1, len(rows[0])))]
        for i in range(0, len(rows), step)
    ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _frame(ticks: Sequence[tuple[float, str]], below: Sequence[tuple[float, str]], inside: str, name: str) -> str:
    """Return an SVG with lines at heights (0 to 1) and words below at places (0 to 1)."""
    lines = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDE}" y1="{_y(at):.1f}" y2="{_y(at):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{_y(at) + 4:.1f}" text-anchor="end">{text}</text>'
        for at, text in ticks
    )
    words = "".join(f'<text x="{_x(at):.1f}" y="{_HIGH - 6}" text-anchor="middle">{text}</text>' for at, text in below)
    return (
        f'<svg viewBox="0 0 {_WIDE + 12} {_HIGH}" role="img" aria-label="{escape(name)}">{lines}{words}{inside}</svg>'
    )


def _x(part: float) -> float:
    return _LEFT + part * (_WIDE - _LEFT)


def _y(part: float) -> float:
    return _TOP + (1 - part) * (_HIGH - _BELOW - _TOP)


def _nice(most: float) -> float:
    """Return a round number that is not less."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= most)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"


def _curves(rows: list[list[float]], columns: Sequence[tuple[int, str, str]], unit: float, name: str) -> str:
    """Return a chart of columns over seconds, each with its class and its name."""
    if not rows:
        return "<p>Nothing was measured.</p>"
    if len(rows) == 1:
        rows = [*rows, [1.0, *rows[0][1:]]]  # a point alone draws nothing
    top = _nice(max(row[column] for row in rows for column, _, _ in columns) * unit)
    last = max(rows[-1][0], 1)
    inside = ""
    for column, kind, _ in columns:
        points = " ".join(f"{_x(row[0] / last):.1f},{_y(row[column] * unit / top):.1f}" for row in rows)
        inside += f'<polyline class="curve {kind}" points="{points}"/>'
    ticks = [(part / 4, _number(top * part / 4)) for part in range(5)]
    step = _nice(last / 5)
    below = [(second * step / last, f"{second * step:g} s") for second in range(1, int(last / step) + 1)]
    key = "".join(f'<span><i style="background:var(--{kind})"></i>{text}</span>' for _, kind, text in columns)
    return _frame(ticks, below, inside, name) + f'<div class="key">{key}</div>'


def _latency_chart(report: dict[str, Any]) -> str:
    rows = _thinned(_seconds(report), worst=True)
    columns = [(6, "c", "longest, ms"), (5, "b", "p99, ms"), (4, "a", "p50, ms")]
    return _curves(rows, columns, 1e3, "Latency of a message by second: median, 99th percentile, longest")


def _rate_chart(report: dict[str, Any]) -> str:
    rows = _thinned(_seconds(report), worst=False)
    return _curves(rows, [(1, "a", "accepted"), (2, "c", "failed")], 1, "Messages accepted and failed by second")


def _histogram_chart(report: dict[str, Any]) -> str:
    """Return the latencies of messages as bars, on a logarithmic scale."""
    message = report["phases"].get("message")
    if message is None:
        return "<p>No message was answered.</p>"
    bars: dict[int, int] = {}
    for least, count in message["histogram"]["buckets"]:
        bars[round(math.log10(max(least, 1000)) * 12)] = bars.get(round(math.log10(max(least, 1000)) * 12), 0) + count
    first, last = min(bars) - 1, max(bars) + 1
    top = _nice(max(bars.values()))
    width = (_WIDE - _LEFT) / (last - first + 1)
    inside = "".join(
        f'<rect class="bar" x="{_LEFT + (bar - first) * width + 1:.1f}" y="{_y(count / top):.1f}" '
        f'width="{max(width - 2, 1):.1f}" height="{_y(0) - _y(count / top):.1f}"/>'
        for bar, count in bars.items()
    )
    below = [
        ((exponent * 12 - first + 0.5) / (last - first + 1), f"{10.0 ** (exponent - 6):g} ms")
        for exponent in range(3, 13)
        if first <= exponent * 12 <= last
    ]
    return _frame([(part / 2, _number(top * part / 2)) for part in range(3)], below, inside, "Messages by latency")


# ---- tables


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], whole: str = "") -> str:
    body = "".join(
        f"<tr{' class=whole' if row[0] == whole else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{"".join(f"<th>{cell}</th>" for cell in head)}</tr>{body}</table></div>'


def _phase_table(report: dict[str, Any]) -> str:
    rows = []
    for phase in PHASES:
        told = report["phases"].get(phase)
        if told is not None:
            rows.append([phase, f"{told['count']:,}", *(milliseconds(told[column]) for column, _ in _COLUMNS)])
    return _table(["phase", "count", *(name for _, name in _COLUMNS)], rows, "message")


def _legend(report: dict[str, Any]) -> str:
    terms = "".join(
        f"<dt>{phase}</dt><dd>{meaning}</dd>" for phase, meaning in PHASES.items() if phase in report["phases"]
    )
    return f"<dl>{terms}</dl>"


def _reply_table(report: dict[str, Any]) -> str:
    rows = []
    for phase, code, count in report["replies"]:
        examples = report["examples"].get(f"{phase} {code}", [])
        rows.append([f"{phase} {code}", f"{count:,}", escape("; ".join(examples[:2]))])
    return _table(["reply", "count", "for example"], rows)


def _error_table(report: dict[str, Any]) -> str:
    if not report["errors"]:
        return ""
    rows = [
        [escape(kind), f"{count:,}", escape("; ".join(report["examples"].get(kind, [])[:2]))]
        for kind, count in sorted(report["errors"].items())
    ]
    return "<h2>Connections that ended otherwise than they should</h2>" + _table(["kind", "count", "for example"], rows)
