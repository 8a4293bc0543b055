"""Reports on a terminal: the result of a run, its thresholds, and the comparison of two runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from penstock.load.compare import VERDICTS, Change, failed, overall
from penstock.load.counts import PHASES
from penstock.load.units import milliseconds

Report = Mapping[str, Any]
_COLUMNS: Final = ("p50", "p90", "p99", "p99_9", "max")
_COLOURS: Final = {"better": "green", "worse": "red", "same": "dim", "mixed": "yellow"}
_BUSY: Final = 0.9
"""Part of a core beyond which the generator itself may be what limits the rate."""


def summary_table(report: Report) -> Group:
    """Return the result of a run."""
    failures = failed(report)
    head = Text(f"{report['accepted']:,} accepted in {report['seconds']:.1f} s: {report['rate']:,.0f}/s", style="bold")
    head.append(f", {report['octets'] / 1e6:,.1f} MB, {report['connections']:,} connections", style="not bold")
    if failures:
        head.append(f"\n{failures:,} failed", style="bold red")
        head.append(f": {failure_text(report)}")
    for text, style in notes_of(report):
        head.append(f"\n{text}", style=style)
    if "sustainable_rate" in report:
        head.append(f"\nhighest sustainable rate: {report['sustainable_rate']:,.4g}/s", style="bold")
    parts: list[RenderableType] = [head]
    if report["phases"]:
        parts += ["", _latency_table(report)]
    parts += _failure_table(report)
    if report.get("thresholds"):
        parts += ["", _threshold_table(report)]
    return Group(*parts)


def failure_text(report: Report) -> str:
    """Return what became of the messages that failed."""
    return (
        f"{report['refused']:,} refused, {report['lost']:,} without a reply, {report['dropped']:,} dropped, "
        f"{report['unsent']:,} not started"
    )


def notes_of(report: Report) -> Iterator[tuple[str, str]]:
    """Yield what limits the meaning of the figures, and the style of each note on a terminal."""
    if report["has_given_up"]:
        yield "run given up: too many connections in a row failed", "bold red"
    if report["interrupted"]:
        threshold = report.get("aborted_by")
        yield "stopped by a signal" if threshold is None else f"stopped: {threshold} was violated", "bold red"
    if report["late"]:
        yield f"{report['late']:,} messages waited for a free session", "yellow"
    if report["seconds"] > 1 and report["cpu"] > _BUSY * report["seconds"] * report["workers"]:
        share = report["cpu"] / report["seconds"] / report["workers"]
        yield f"the generator itself was busy ({share:.0%} of a core): use more --workers", "yellow"
    if report.get("warm_up"):
        yield f"warm-up of {report['warm_up']['seconds']:g} s not counted", "dim"


def _latency_table(report: Report) -> Table:
    table = Table("phase", box=None, pad_edge=False, title="Latency in ms", title_justify="left", title_style="dim")
    for column in ("count", *_COLUMNS):
        table.add_column(column.replace("_", "."), justify="right")
    for phase in PHASES:
        summary = report["phases"].get(phase)
        if summary is not None:
            cells = [milliseconds(summary[column]) for column in _COLUMNS]
            table.add_row(phase, f"{summary['count']:,}", *cells, style="bold" if phase == "message" else "")
    return table


def _failure_table(report: Report) -> Iterator[RenderableType]:
    """Yield a table of refusals and errors, if there are any."""
    rows = [(f"{phase} {code}", count) for phase, code, count in report["replies"] if code >= 400]
    rows += sorted(report["errors"].items())
    if not rows:
        return
    table = Table("", "count", "example", box=None, pad_edge=False, title="Refusals and errors", title_justify="left")
    for kind, count in rows:
        table.add_row(kind, f"{count:,}", Text("\n".join(report["examples"].get(kind, [])[:2])))
    yield ""
    yield table


def _threshold_table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, title="Thresholds", title_justify="left", show_header=False)
    for each in report["thresholds"]:
        verdict = "passed" if each["passed"] else "VIOLATED"
        table.add_row(Text(each["threshold"]), each["shown"], Text(verdict, style="green" if each["passed"] else "red"))
    return table


def comparison_table(changes: Sequence[Change]) -> Group:
    """Return a table of the changes between two runs, with verdicts."""
    table = Table("", box=None, pad_edge=False)
    for column in ("first", "second", "change", "noise"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for name, *cells, verdict in rows_of(changes):
        table.add_row(name, *cells, Text(verdict, style=_COLOURS.get(verdict, "")))
    verdict = overall(changes)
    return Group(table, "", Text(VERDICTS[verdict], style=f"bold {_COLOURS[verdict]}"))


def _precision(part: float) -> str:
    return ",.0" if abs(part) >= 1 else ".1"


def rows_of(changes: Sequence[Change]) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Yield each change as text: name, first, second, change, noise, verdict."""
    for each in changes:
        unit, form = {"s": (" ms", "{:,.2f}"), "messages/s": ("/s", "{:,.1f}")}.get(each.unit, ("", "{:,.0f}"))
        scale = 1e3 if each.unit == "s" else 1
        yield (
            f"{each.metric}{unit}",
            form.format(each.first * scale),
            form.format(each.second * scale),
            "" if each.change is None else f"{each.change:+{_precision(each.change)}%}",
            "" if each.noise is None else f"±{each.noise:{_precision(each.noise)}%}",
            each.verdict or "",
        )
