"""Reports as one self-contained HTML page: no script, no network, light and dark, from a phone to a wide screen."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

from penstock.load import plot
from penstock.load.compare import VERDICTS, Change, failed, overall, seconds_of
from penstock.load.counts import PHASES
from penstock.load.report import failure_text, notes_of, rows_of
from penstock.load.units import milliseconds

Report = Mapping[str, Any]
_COLUMNS: Final = (("p50", "p50"), ("p90", "p90"), ("p95", "p95"), ("p99", "p99"), ("p99_9", "p99.9"), ("max", "max"))
_MAX_KINDS: Final = 6
"""Kinds of errors that are distinguished in the plot over time."""
_CLASSES: Final = {2: "c", 3: "a", 4: "b", 5: "d"}
"""Colours of replies, by their first digit."""

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #566073; --line: #d9dee7; --paper: #fff; --card: #f6f8fb;
  --a: #2563eb; --b: #c2710c; --c: #15803d; --d: #b42318; --e: #7c3aed; --f: #0e7490; --g: #be185d; --h: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #a3adbd; --line: #333b49; --paper: #12161d;
  --card: #1a202a; --a: #6ea8fe; --b: #f5b454; --c: #4ade80; --d: #f97066; --e: #b794f6; --f: #67d4e8; --g: #f687b3;
  --h: #9ca3af; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 980px; padding: 24px 16px 64px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 36px 0 8px; }
p, .dim { color: var(--dim); } p { margin: 4px 0; }
code { font: 0.85em/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(112px, 1fr)); gap: 10px; margin: 20px 0; }
.tile { background: var(--card); border-radius: 10px; padding: 12px; font-size: 0.9rem; white-space: nowrap; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile small { font-size: 0.9rem; }
.bad b, .worse, .violated { color: var(--d); } .better, .passed { color: var(--c); } .same { color: var(--dim); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.95rem; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--dim); font-size: 0.85rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 110px; }
tr.whole td { font-weight: 600; }
figure { margin: 0; }
.plot { position: relative; height: 230px; margin: 10px 12px 26px 62px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot span { position: absolute; color: var(--dim); font-size: 12px; line-height: 1; white-space: nowrap; }
.plot .y { right: calc(100% + 8px); transform: translateY(50%); }
.plot .x { top: calc(100% + 8px); transform: translateX(-50%); }
.grid { stroke: var(--line); } .grid, .line { vector-effect: non-scaling-stroke; }
.line { fill: none; stroke-width: 1.75; stroke-linejoin: round; }
line.dashed, polyline.dashed { stroke-dasharray: 5 4; }
figcaption { display: flex; gap: 4px 18px; flex-wrap: wrap; color: var(--dim); font-size: 0.85rem; }
figcaption i { display: inline-block; width: 14px; height: 4px; border-radius: 2px; vertical-align: middle;
  margin-right: 6px; }
figcaption i.dashed { opacity: 0.55; }
.share { width: 100%; min-width: 110px; height: 12px; display: block; border-radius: 3px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; color: var(--dim); font-size: 0.85rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 560px) { .minor { display: none; } th, td { padding: 5px 6px; } table { font-size: 0.85rem; }
  .plot { margin-left: 52px; } }
""" + "".join(
    f".line.{name} {{ stroke: var(--{name}); }} .bar.{name} {{ fill: var(--{name}); }} "
    f"i.{name} {{ background: var(--{name}); }}\n"
    for name in plot.COLOURS
)


def page(report: Report) -> str:
    """Return the page of a run."""
    targets = escape(", ".join(report["targets"]))
    latencies = [_line(*names, report) for names in (("longest", "d", "max"), ("p99", "b", "p99"), ("p50", "a", "p50"))]
    rates = [_line(name, colour, name, report, is_rate=True) for name, colour in (("accepted", "a"), ("failed", "d"))]
    when = datetime.datetime.fromtimestamp(report["started"], datetime.UTC)
    return _page(
        f"penstock load: {targets}",
        f"""<h1>penstock load <span class="dim">{targets}</span></h1>
<p>{when:%Y-%m-%d %H:%M:%S} UTC, {escape(report["machine"])}</p>
<p><code>{escape(report["command"])}</code></p>
{_tiles(report)}
{_notes(report)}
{_threshold_table(report)}{_search_table(report)}
<h2>Latency of a message, by second</h2>{_latency_plot(latencies, report)}
<h2>Messages per second</h2>{_rate_plot(rates, report)}
<h2>Errors over time</h2>{_error_plot(report)}
<h2>Latency by percentile</h2>{_spectrum([("", report)])}
<h2>Phases, in milliseconds</h2>{_phase_table(report)}{_legend(report)}
<h2>Replies by phase</h2>{_reply_table(report)}
{_error_table(report)}""",
    )


def comparison_page(first: Report, second: Report, changes: Sequence[Change], names: Sequence[str]) -> str:
    """Return the page of two runs, one laid over the other."""
    runs = list(zip(names, (first, second), strict=True))
    latencies = [
        _line(f"{name}: {column}", colour, column, report, is_dashed=column == "p50")
        for (name, report), colours in zip(runs, ("ac", "bd"), strict=True)
        for column, colour in zip(("p99", "p50"), colours, strict=True)
    ]
    rates = [_line(run[0], colour, "accepted", run[1], is_rate=True) for run, colour in zip(runs, "ab", strict=True)]
    verdict = overall(changes)
    rows = [
        [*map(escape, cells), f'<span class="{verdict}">{verdict}</span>' if verdict else "", noise]
        for *cells, noise, verdict in rows_of(changes)  # a phone shows the first five columns
    ]
    commands = "".join(
        f"<dt>{escape(name)}</dt><dd><code>{escape(report['command'])}</code></dd>" for name, report in runs
    )
    return _page(
        "penstock load: comparison",
        f"""<h1>penstock load <span class="dim">comparison</span></h1>
<dl>{commands}</dl>
<p><b class="{verdict}">{VERDICTS[verdict]}</b> A change counts when it exceeds the noise.</p>
{_table(["", "first", "second", "change", "verdict", "noise"], rows)}
<h2>Latency by percentile</h2>{_spectrum(runs)}
<h2>Latency of a message, by second</h2>{_latency_plot(latencies, first, second)}
<h2>Messages per second</h2>{_rate_plot(rates, first, second)}""",
    )


def _page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style>
{body}
</html>
"""


def _tiles(report: Report) -> str:
    failures = failed(report)
    message = report["phases"].get("message")
    tiles = [
        (f"{report['accepted']:,}", "accepted", ""),
        (f"{failures:,}", "failed", " bad" if failures else ""),
        (f"{report['rate']:,.0f}<small>/s</small>", "rate", ""),
        (f"{milliseconds(message['p50'])} <small>ms</small>" if message else "-", "p50", ""),
        (f"{milliseconds(message['p99'])} <small>ms</small>" if message else "-", "p99", ""),
        (f"{report['octets'] / 1e6:,.1f} <small>MB</small>", "accepted", ""),
        (f"{report['connections']:,}", "connections", ""),
    ]
    if "sustainable_rate" in report:
        tiles.insert(0, (f"{report['sustainable_rate']:,.4g}<small>/s</small>", "sustainable", ""))
    return '<div class="tiles">{}</div>'.format(
        "".join(f'<div class="tile{kind}"><b>{value}</b>{name}</div>' for value, name, kind in tiles)
    )


def _notes(report: Report) -> str:
    notes = [text for text, _ in notes_of(report)]
    if failed(report):
        notes.insert(0, f"{failed(report):,} failed: {failure_text(report)}")
    return "<p>" + "<br>".join(map(escape, notes)) + "</p>" if notes else ""


# ---- plots


def _steps(report: Report) -> Iterator[tuple[float, float, dict[str, Any]]]:
    """Yield the begin and the end of each second, and its row."""
    begin = 0.0
    for row in seconds_of(report):
        end = begin + max(row["length"], 1e-3)
        yield begin, end, row
        begin = end


def _line(
    name: str, colour: str, column: str, report: Report, *, is_rate: bool = False, is_dashed: bool = False
) -> plot.Series:
    """Return a column of the timeline as a line of steps, one for each second."""
    runs: list[list[tuple[float, float]]] = [[]]
    for begin, end, row in _steps(report):
        value = row.get(column, 0) / (row["length"] or 1.0) if is_rate else row.get(column, 0)
        if value or is_rate:
            runs[-1] += [(begin, value), (end, value)]
        elif runs[-1]:
            runs.append([])  # nothing was measured in this second
    return plot.Series(name, colour, [run for run in runs if run], is_dashed)


def _length(*found: Report) -> float:
    return max((end for report in found for _, end, _ in _steps(report)), default=1.0)


def _values(series: Sequence[plot.Series]) -> list[float]:
    return [value for each in series for run in each.runs for _, value in run]


def _latency_plot(series: Sequence[plot.Series], *reports: Report) -> str:
    if not _values(series):
        return "<p>No message was answered.</p>"
    axis = plot.latency_axis(_values(series))
    return plot.lines("Latency of a message by second", series, plot.time_axis(_length(*reports)), axis)


def _rate_plot(series: Sequence[plot.Series], *reports: Report) -> str:
    axis = plot.linear(max(_values(series), default=1.0))
    return plot.lines("Messages per second", series, plot.time_axis(_length(*reports)), axis)


def _error_plot(report: Report) -> str:
    total: Counter[str] = Counter()
    for _, _, row in _steps(report):
        total.update(row["errors"])
    if not total:
        return "<p>There were no refusals and no errors.</p>"
    shown = [kind for kind, _ in total.most_common(_MAX_KINDS)]
    kinds = [(kind, plot.COLOURS[(place + 3) % len(plot.COLOURS)]) for place, kind in enumerate(shown)]
    if len(total) > len(shown):
        kinds.append(("others", "h"))
    columns = []
    for begin, end, row in _steps(report):
        values = [row["errors"].get(kind, 0) / (end - begin) for kind in shown]
        if len(kinds) > len(shown):
            values.append(sum(count for kind, count in row["errors"].items() if kind not in shown) / (end - begin))
        columns.append((begin, end, values))
    axis = plot.linear(max(sum(values) for _, _, values in columns), "/s")
    return plot.bars("Refusals and errors per second", kinds, columns, plot.time_axis(_length(report)), axis)


def _spectrum(runs: Sequence[tuple[str, Report]]) -> str:
    """Return the percentile spectrum of messages and of the replies to them, as HdrHistogram plots it."""
    series = []
    for (name, report), colours in zip(runs, ("ac", "bd"), strict=False):
        for phase, colour in zip(("message", "dot"), colours, strict=True):
            summary = report["phases"].get(phase)
            if summary is not None:
                label = f"{name}: {phase}" if name else phase
                series.append(plot.Series(label, colour, [list(_spectrum_points(summary))], phase == "dot"))
    if not series:
        return "<p>No message was answered.</p>"
    summaries = [report["phases"].get(phase, {}) for _, report in runs for phase in ("message", "dot")]
    count = max(summary.get("count", 0) for summary in summaries)
    axis = plot.latency_axis(_values(series))
    return plot.lines("Latency by percentile", series, plot.percentile_axis(count), axis)


def _spectrum_points(summary: Mapping[str, Any]) -> Iterator[tuple[float, float]]:
    """Yield 1 / (1 - part) and the latency that this part of the durations does not exceed."""
    count, seen = summary["count"], 0
    yield 1.0, summary["min"]
    for low, number in summary["histogram"]["buckets"]:
        seen += number
        if seen < count:
            yield count / (count - seen), min(max(low / 1e9, summary["min"]), summary["max"])
    yield float(max(count, 1)), summary["max"]


# ---- tables


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], whole: str = "", texts: Sequence[int] = ()) -> str:
    """Return a table; cells are HTML. The columns `texts` may wrap."""
    body = "".join(
        f"<tr{' class=whole' if row[0] == whole else ''}>"
        + "".join(f"<td{' class=text' if place in texts else ''}>{cell}</td>" for place, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{"".join(f"<th>{cell}</th>" for cell in head)}</tr>{body}</table></div>'


def _threshold_table(report: Report) -> str:
    rows = [
        [
            f"<code>{escape(each['threshold'])}</code>",
            escape(each["shown"]),
            '<span class="passed">passed</span>' if each["passed"] else '<span class="violated">violated</span>',
        ]
        for each in report.get("thresholds", ())
    ]
    return "<h2>Thresholds</h2>" + _table(["threshold", "measured", "verdict"], rows) if rows else ""


def _search_table(report: Report) -> str:
    rows = [
        [f"{each['rate']:,.4g}/s", "sustained" if each["passed"] else "not sustained", escape(each["reason"])]
        for each in report.get("search", ())
    ]
    return "<h2>Search for the sustainable rate</h2>" + _table(["rate", "verdict", "measured"], rows) if rows else ""


def _phase_table(report: Report) -> str:
    rows = []
    for phase in PHASES:
        summary = report["phases"].get(phase)
        if summary is not None:
            rows.append([phase, f"{summary['count']:,}", *(milliseconds(summary[column]) for column, _ in _COLUMNS)])
    return _table(["phase", "count", *(name for _, name in _COLUMNS)], rows, "message")


def _legend(report: Report) -> str:
    terms = "".join(
        f"<dt>{phase}</dt><dd>{meaning}</dd>" for phase, meaning in PHASES.items() if phase in report["phases"]
    )
    return f"<dl>{terms}</dl>"


def _reply_table(report: Report) -> str:
    """Return the replies of each phase: a bar of their classes, and the codes."""
    rows = []
    for phase in PHASES:
        found = [(code, count) for name, code, count in report["replies"] if name == phase]
        total = sum(count for _, count in found)
        if total:
            parts = [(_CLASSES.get(code // 100, "h"), count / total) for code, count in sorted(found)]
            codes = ", ".join(f"{code}: {count:,}" for code, count in sorted(found))
            examples = [example for code, _ in found for example in report["examples"].get(f"{phase} {code}", [])[:1]]
            rows.append([phase, plot.share_bar(parts), codes, escape("; ".join(examples[:2]))])
    return _table(["phase", "share", "replies by code", "example"], rows, texts=(2, 3))


def _error_table(report: Report) -> str:
    if not report["errors"]:
        return ""
    rows = [
        [escape(kind), f"{count:,}", escape("; ".join(report["examples"].get(kind, [])[:2]))]
        for kind, count in sorted(report["errors"].items())
    ]
    return "<h2>Connections that ended with an error</h2>" + _table(["kind", "count", "example"], rows, texts=(2,))
