"""What is shown of a run on a terminal, and of two runs side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from penstock.load.counts import PHASES

Report = dict[str, Any]
_COLUMNS: Final = ("p50", "p90", "p99", "p99_9", "max")
_MILLI: Final = 1e3


def milliseconds(seconds: float) -> str:
    """Return a time with three figures, in milliseconds."""
    ms = seconds * _MILLI
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def summary_table(report: Report) -> Group:
    """Return the result of a run."""
    failures = failed(report)
    head = Text(f"{report['accepted']:,} accepted in {report['seconds']:.1f} s: {report['rate']:,.0f}/s", style="bold")
    head.append(f", {report['octets'] / 1e6:,.1f} MB, {report['connections']:,} connections", style="not bold")
    if failures:
        head.append(f"\n{failures:,} failed", style="bold red")
        head.append(
            f": {report['refused']:,} refused, {report['lost']:,} without an answer, {report['dropped']:,} dropped, "
            f"{report['unsent']:,} never begun"
        )
    if report["has_given_up"]:
        head.append("\ngiven up: too many connections in a row came to nothing", style="bold red")
    if report["late"]:
        head.append(f"\n{report['late']:,} starts waited for a free session", style="yellow")
    latencies = Table("phase", box=None, pad_edge=False, title="milliseconds", title_justify="left", title_style="dim")
    for column in ("count", *_COLUMNS):
        latencies.add_column(column.replace("_", "."), justify="right")
    for phase in PHASES:
        told = report["phases"].get(phase)
        if told is not None:
            cells = [milliseconds(told[column]) for column in _COLUMNS]
            latencies.add_row(phase, f"{told['count']:,}", *cells, style="bold" if phase == "message" else "")
    return Group(head, "", latencies, *_troubles(report))


def _troubles(report: Report) -> Iterator[Table]:
    """Yield tables of refusals and errors, when there are any."""
    rows = [(f"{phase} {code}", count) for phase, code, count in report["replies"] if code >= 400]
    rows += sorted(report["errors"].items())
    if not rows:
        return
    table = Table(
        "", "count", "for example", box=None, pad_edge=False, title="not as it should be", title_justify="left"
    )
    for what, count in rows:
        table.add_row(what, f"{count:,}", Text("\n".join(report["examples"].get(what, [])[:2])))
    yield table


def comparison(first: Report, second: Report) -> Table:
    """Return a table of two runs, and of how the second differs."""
    table = Table("", box=None, pad_edge=False)
    for column in ("first", "second", "change"):
        table.add_column(column, justify="right")
    rows: list[tuple[str, float, float, str]] = [
        ("accepted", first["accepted"], second["accepted"], "{:,.0f}"),
        ("failed", failed(first), failed(second), "{:,.0f}"),
        ("a second", first["rate"], second["rate"], "{:,.0f}"),
    ]
    for phase in PHASES:
        a, b = first["phases"].get(phase), second["phases"].get(phase)
        if a is not None and b is not None:
            rows += [(f"{phase} {p} ms", a[p] * _MILLI, b[p] * _MILLI, "{:,.2f}") for p in ("p50", "p99")]
    for name, a, b, form in rows:
        change = f"{(b - a) / a:+.1%}" if a else ""
        table.add_row(name, form.format(a), form.format(b), change)
    return table


def failed(report: Report) -> int:
    """Return how many messages were not accepted; reports of earlier versions know of none that were not begun."""
    count: int = report["refused"] + report["lost"] + report["dropped"] + report.get("unsent", 0)
    return count
