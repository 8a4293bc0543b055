"""`penstock top`: live statistics of a running sink or server in the terminal."""

from __future__ import annotations

import http.client
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import click
import msgspec
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from penstock.cli.controlclient import server_options, socket_path
from penstock.cli.once import OnceCommand
from penstock.cli.receiving import duration, latency_table, octets, plain_table, reply_table
from penstock.cli.servertop import show
from penstock.cli.terminal import bars
from penstock.sink.report import FaultCount, Report, Sample

_SINK: Final = "http://127.0.0.1:8025"
_TIMEOUT: Final = 5.0
_MOST_OCTETS: Final = 8 << 20
"""Octets of a response; that of a sink has less than a tenth of it."""
_WIDTH: Final = 60
"""Most seconds that a line of bars shows."""
_LEAST_BARS: Final = 10
_VALUE: Final = 10
"""Columns of a value: "1,234.5 ms"."""
_BESIDE_BARS: Final = 46
"""Columns beside the bars: the frame, a name, a value, a note, and the gaps."""
_ABOVE_TABLES: Final = 10
"""Lines of the address and of the frame with the bars."""
_ABOVE_ROWS: Final = 2
"""Lines of a table's title and of the names of its columns."""
_GAP: Final = 3
_ROWS_OF_FAULTS: Final = 16


class LiveResponse(msgspec.Struct):
    """The response of `/api/live`, as far as it is shown here."""

    generation: int
    report: Report
    samples: list[Sample]
    last: int
    faults: list[FaultCount]


class Api(NamedTuple):
    """The HTTP API of a sink."""

    host: str
    port: int
    token: str | None

    @classmethod
    def parse(cls, url: str, token: str | None) -> Api:
        """Read "http://127.0.0.1:8025/" or "127.0.0.1:8025". Raise ValueError."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme != "http" or parts.hostname is None or parts.path not in ("", "/") or parts.query:
            raise ValueError(f"the address of a sink's web page looks like http://127.0.0.1:8025, not {url!r}")
        return cls(parts.hostname, parts.port or 8025, token)

    def live(self, after: int) -> LiveResponse:
        """Request the samples after one. Raise OSError, or ValueError for a wrong response."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_TIMEOUT)
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        try:
            connection.request("GET", f"/api/live?after={after}", headers=headers)
            response = connection.getresponse()
            data = response.read(_MOST_OCTETS)
        except http.client.HTTPException as exc:
            raise ValueError(f"not the web page of a sink: {exc}") from exc
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(f"the sink replied {response.status}: {data[:200].decode(errors='replace')}")
        try:
            return msgspec.json.decode(data, type=LiveResponse)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise ValueError(f"not the web page of a sink: {exc}") from exc


class Seconds:
    """The samples that are shown, and the last response."""

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque(maxlen=_WIDTH)
        self.response: LiveResponse | None = None
        self._last = 0

    def update(self, api: Api) -> None:
        """Request the latest samples. Raise as `Api.live` does."""
        response = api.live(self._last)
        if self.response is not None and (
            response.generation != self.response.generation or response.last < self._last
        ):
            self.samples.clear()  # its counters were reset, or the sink was restarted
            response = api.live(0)
        self.samples.extend(response.samples)
        self._last, self.response = response.last, response


class Display:
    """The screen, fitted to its terminal."""

    def __init__(self, api: Api, seconds: Seconds, trouble: str = "", *, height: int | None = None) -> None:
        """`height` is the number of lines; None is no limit."""
        self._height = height
        self._api = api
        self._seconds = seconds
        self._trouble = trouble

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the parts; tables have as many rows as fit."""
        yield self._title()
        response = self._seconds.response
        if response is None:
            return
        width, report = options.max_width, response.report
        shown = max(_LEAST_BARS, min(_WIDTH, width - _BESIDE_BARS))
        title = f"last {shown} s"
        lines = _lines(report, list(self._seconds.samples), shown)
        yield Panel(lines, title=title, title_align="left", padding=(0, 1))
        left = None if self._height is None else max(0, self._height - _ABOVE_TABLES)
        yield _tables(report, console, width, left)

    def _title(self) -> Text:
        title = Text(
            f"penstock top  http://{self._api.host}:{self._api.port}",
            style="bold",
            no_wrap=True,
            overflow="ellipsis",
        )
        if self._trouble:
            title.append(f"   {self._trouble}", style="red")
        if self._seconds.response is not None:
            report = self._seconds.response.report
            title.append(f"   sink on {', '.join(report.listen)}   {report.seconds:,.0f} s", style="dim")
        return title


def _tables(report: Report, console: Console, width: int, height: int | None) -> RenderableType:
    """Return the tables, as many side by side as fit."""
    rows = None if height is None else max(0, height - _ABOVE_ROWS)
    failures = _failures(report, _ROWS_OF_FAULTS if rows is None else min(rows, _ROWS_OF_FAULTS))
    three = [latency_table(report), reply_table(report, rows), failures]
    if _width_of(three, console) <= width:
        return _beside(*three)
    three[0] = latency_table(report, is_narrow=True)
    if _width_of(three, console) <= width:
        return _beside(*three)
    if rows is not None:
        rows = max(0, rows - len(failures.rows) - _ABOVE_ROWS - 1)
    below = Group(failures, "", reply_table(report, rows))
    if _width_of([three[0], failures], console) <= width and _width_of(three[:2], console) <= width:
        return _beside(three[0], below)
    return Group(below, "", three[0])


def _width_of(tables: Sequence[Table], console: Console) -> int:
    return sum(console.measure(table).maximum for table in tables) + _GAP * (len(tables) - 1)


def _beside(*parts: RenderableType) -> Table:
    grid = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
    for _ in parts:
        grid.add_column(no_wrap=True)
    grid.add_row(*parts)
    return grid


def _lines(report: Report, samples: Sequence[Sample], width: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    messages = report.messages
    replies = sum(each.count for each in report.replies if each.garbled != "none")
    rows: list[tuple[str, list[float], str, str, str]] = [
        (
            "messages",
            [s.messages / s.seconds for s in samples],
            "cyan",
            "/s",
            f"{messages.accepted + messages.unheard:,} total",
        ),
        ("replies", [s.replies / s.seconds for s in samples], "blue", "/s", f"{replies:,}"),
        ("sessions", [s.sessions for s in samples], "green", "", f"peak {report.sessions.peak:,}"),
        ("octets", [s.received / s.seconds for s in samples], "green", "B/s", octets(report.octets.received)),
        ("p50", [s.p50 for s in samples], "yellow", "ns", "dot to reply"),
        ("p99", [s.p99 for s in samples], "yellow", "ns", "dot to reply"),
        ("faults", [s.faults / s.seconds for s in samples], "magenta", "/s", f"{_faults(report):,}"),
    ]
    for name, values, style, unit, note in rows:
        now = _with_unit(values[-1] if values else 0, unit)
        bar = Text(bars(values, width), style=style)
        table.add_row(name, bar, Text(now.rjust(_VALUE), style="bold"), Text(note, style="dim"))
    return table


def _with_unit(value: float, unit: str) -> str:
    if unit == "ns":
        return duration(int(value)) if value else "-"
    return f"{octets(value)}/s" if unit == "B/s" else f"{value:,.0f}{unit}"


def _faults(report: Report) -> int:
    return sum(each.count for each in report.faults)


def _failures(report: Report, most: int | None = None) -> Table:
    """Return a table of messages that were not accepted, of lost and duplicate ones, and of faults."""
    messages = report.messages
    rows = [
        ("refused after the text", messages.refused, "red"),
        ("lost", messages.lost, "red"),
        ("unheard", messages.unheard, "red"),
    ]
    for run in report.sequences.runs:
        name = run.run or "(no name)"
        rows += [(f"{name}: missing", run.missing, "red"), (f"{name}: duplicates", run.duplicates, "red")]
        if not run.missing and not run.duplicates:
            rows.append((f"{name}: complete", run.distinct, ""))
    rows += [(f"{each.rule}: {each.phase} {each.action}", each.count, "magenta") for each in report.faults]
    table = plain_table("Loss and faults", "what", ">count")
    for name, count, style in [row for row in rows if row[1]][:most]:
        table.add_row(name, f"{count:,}", style=style)
    if not table.row_count and most != 0:
        table.add_row("no numbered message, no fault", "")
    return table


@click.command(cls=OnceCommand)
@click.argument("url", required=False)
@click.option(
    "--token",
    envvar="PENSTOCK_WEB_TOKEN",
    metavar="TOKEN",
    help="Password of the sink's web page [PENSTOCK_WEB_TOKEN].",
)
@click.option("--once", is_flag=True, help="Print once and exit.")
@server_options
def top(url: str | None, token: str | None, once: bool, config_file: Path | None, data_dir: str | None) -> None:
    """Show live statistics of a server or a sink, once a second. Ctrl-C quits; the server keeps running.

    A server (`penstock serve`) is found by --config and --data, a sink by the URL of its web page (`--web`). Without
    any of them: the server of ./penstock-data if there is one, otherwise http://127.0.0.1:8025.
    """
    if url is not None and (config_file is not None or data_dir is not None):
        raise click.UsageError("a URL is that of a sink; --config and --data are for a server")
    if url is None:
        path = socket_path(config_file, data_dir)
        if config_file is not None or data_dir is not None or path.is_socket():
            show(path, once=once)
            return
    url = _SINK if url is None else url
    try:
        api = Api.parse(url, token)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    seconds, console = Seconds(), Console()
    try:
        seconds.update(api)
    except (OSError, ValueError) as exc:
        raise click.ClickException(f"{url}: {exc}") from exc
    if once:
        console.print(Display(api, seconds))
        return
    try:
        with Live(
            Display(api, seconds, height=console.height), console=console, screen=True, auto_refresh=False
        ) as live:
            _follow(api, seconds, live)
    except KeyboardInterrupt:
        return


def _follow(api: Api, seconds: Seconds, live: Live) -> None:
    """Update once a second, until interrupted. A sink that has stopped may come back."""
    while True:
        time.sleep(1)
        trouble = ""
        try:
            seconds.update(api)
        except (OSError, ValueError) as exc:
            trouble = str(exc)
        live.update(Display(api, seconds, trouble, height=live.console.height), refresh=True)
