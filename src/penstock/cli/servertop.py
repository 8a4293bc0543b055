"""`penstock top` for `penstock serve`: rates, latencies, workers and next hops, once a second."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Final, NamedTuple

import click
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from penstock.cli.controlclient import ServerError
from penstock.cli.receiving import octets
from penstock.cli.status import Series, hop_lines, read, worker_table
from penstock.cli.terminal import bars
from penstock.control import ServerState
from penstock.metrics.exposition import percentile

_WIDTH: Final = 60
"""Most seconds that a line of bars shows."""
_LEAST_BARS: Final = 10
_BESIDE_BARS: Final = 46
"""Columns beside the bars: the frame, a name, a value, a note, and the gaps."""

_RATES: Final = (
    ("accepted", "messages_accepted_total", "cyan"),
    ("refused", "messages_refused_total", "red"),
    ("replies", "replies_total", "blue"),
    ("attempts", "relay_attempts_total", "magenta"),
)
_GAUGES: Final = (
    ("sessions", "sessions", "green"),
    ("spool", "spool_messages", "yellow"),
)


class Sample(NamedTuple):
    """What has happened between two looks."""

    rates: dict[str, float]
    """Per second, by the names of _RATES; and "octets"."""
    gauges: dict[str, int]
    p99: float
    """Seconds from the final dot to the 250; 0 without messages."""


class ServerSeconds:
    """The samples that are shown, and the last answers."""

    def __init__(self, path: Path) -> None:
        """`path` is that of the control socket."""
        self._path = path
        self.samples: deque[Sample] = deque(maxlen=_WIDTH)
        self.state: ServerState | None = None
        self.series: Series | None = None
        self._at = 0.0

    def update(self) -> None:
        """Ask for the latest counts. Raise ServerError."""
        state, series = read(self._path)
        now, before = time.monotonic(), self.series
        if self.state is not None and self.state.pid != state.pid:
            self.samples.clear()  # the server was restarted
            before = None
        if before is not None:
            self.samples.append(take_sample(before, series, max(now - self._at, 0.001)))
        self.state, self.series, self._at = state, series, now


def take_sample(before: Series, after: Series, seconds: float) -> Sample:
    """Return what has happened between two answers, `seconds` apart."""
    rates = {}
    for name, metric in [*((each[0], each[1]) for each in _RATES), ("octets", "message_octets_total")]:
        rates[name] = max(0, after.value(metric) - before.value(metric)) / seconds
    pairs = zip(before.histogram("accept_seconds"), after.histogram("accept_seconds"), strict=True)
    accepted = [max(0, new - old) for old, new in pairs]
    gauges = {name: after.value(metric) for name, metric, _ in _GAUGES}
    return Sample(rates, gauges, percentile(accepted, "s", 0.99))


class ServerDisplay:
    """The screen."""

    def __init__(self, path: Path, seconds: ServerSeconds, trouble: str = "") -> None:
        self._path = path
        self._seconds = seconds
        self._trouble = trouble

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the parts."""
        state, series = self._seconds.state, self._seconds.series
        title = Text(f"penstock top  {self._path}", style="bold", no_wrap=True, overflow="ellipsis")
        if self._trouble:
            title.append(f"   {self._trouble}", style="red")
        yield title
        if state is None or series is None:
            return
        shown = max(_LEAST_BARS, min(_WIDTH, options.max_width - _BESIDE_BARS))
        yield Panel(self._lines(series, shown), title=f"last {shown} s", title_align="left", padding=(0, 1))
        yield worker_table(state, series)
        for line in hop_lines(state, series):
            yield Text(line, style="red")

    def _lines(self, series: Series, width: int) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(3):
            table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        samples = list(self._seconds.samples)
        for name, metric, style in _RATES:
            values = [sample.rates[name] for sample in samples]
            _add(table, name, values, width, style, f"{values[-1]:,.0f}/s" if values else "-", series.value(metric))
        moved = [sample.rates["octets"] for sample in samples]
        now = f"{octets(moved[-1])}/s" if moved else "-"
        _add(table, "octets", moved, width, "blue", now, series.value("message_octets_total"))
        for name, metric, style in _GAUGES:
            counts = [float(sample.gauges[name]) for sample in samples]
            _add(table, name, counts, width, style, f"{series.value(metric):,}", None)
        delays = [sample.p99 for sample in samples]
        now = f"{delays[-1] * 1000:,.3g} ms" if delays and delays[-1] else "-"
        _add(table, "p99", delays, width, "yellow", now, None, "dot to 250")
        return table


def _add(
    table: Table, name: str, values: list[float], width: int, style: str, now: str, total: int | None, note: str = ""
) -> None:
    note = note or ("" if total is None else f"{total:,} total")
    bar = Text(bars(values, width), style=style)
    table.add_row(name, bar, Text(now.rjust(10), style="bold"), Text(note, style="dim"))


def show(path: Path, *, once: bool) -> None:
    """Show a server until Ctrl-C. End the process with code 1 if it does not run."""
    seconds, console = ServerSeconds(path), Console()
    try:
        seconds.update()
    except ServerError as exc:
        raise click.ClickException(str(exc)) from exc
    if once:
        console.print(ServerDisplay(path, seconds))
        return
    try:
        with Live(ServerDisplay(path, seconds), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(1)
                trouble = ""
                try:
                    seconds.update()
                except ServerError as exc:  # it may come back
                    trouble = str(exc)
                live.update(ServerDisplay(path, seconds, trouble), refresh=True)
    except KeyboardInterrupt:
        return
