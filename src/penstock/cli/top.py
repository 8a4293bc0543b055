"""`penstock top`: what a running sink does, in a terminal."""

from __future__ import annotations

import http.client
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import click
import msgspec
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from penstock.cli.receiving import latency_table, milliseconds, octets, reply_table
from penstock.sink.report import FaultCount, Report, Sample

_TIMEOUT: Final = 5.0
_MOST_OCTETS: Final = 8 << 20
"""Octets of an answer; a sink's has less than a tenth of that."""
_BARS: Final = " ▁▂▃▄▅▆▇█"
_WIDTH: Final = 60
"""Seconds that a line of bars shows."""
_MOST_FAULTS: Final = 8


class Answer(msgspec.Struct):
    """What `/api/live` says, as far as it is shown here."""

    generation: int
    report: Report
    samples: list[Sample]
    last: int
    faults: list[FaultCount]


class Place(NamedTuple):
    """Where the HTTP API of a sink is."""

    host: str
    port: int
    token: str | None

    @classmethod
    def parse(cls, url: str, token: str | None) -> Place:
        """Read "http://127.0.0.1:8025/" or "127.0.0.1:8025". Raise ValueError."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme != "http" or parts.hostname is None or parts.path not in ("", "/") or parts.query:
            raise ValueError(f"the address of a sink's page looks like http://127.0.0.1:8025, not {url!r}")
        return cls(parts.hostname, parts.port or 8025, token)

    def live(self, after: int) -> Answer:
        """Ask for what is behind a sample. Raise OSError, or ValueError for an answer that is none."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_TIMEOUT)
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        try:
            connection.request("GET", f"/api/live?after={after}", headers=headers)
            answer = connection.getresponse()
            data = answer.read(_MOST_OCTETS)
        except http.client.HTTPException as exc:
            raise ValueError(f"this is no page of a sink: {exc}") from exc
        finally:
            connection.close()
        if answer.status != 200:
            raise ValueError(f"the sink said {answer.status}: {data[:200].decode(errors='replace')}")
        try:
            return msgspec.json.decode(data, type=Answer)
        except msgspec.DecodeError as exc:
            raise ValueError(f"this is no page of a sink: {exc}") from exc


class Seconds:
    """The samples that are shown, and the last answer."""

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque(maxlen=_WIDTH)
        self.answer: Answer | None = None
        self._last = 0

    def look(self, place: Place) -> None:
        """Ask the sink. Raise as `Place.live` does."""
        answer = place.live(self._last)
        if self.answer is not None and (answer.generation != self.answer.generation or answer.last < self._last):
            self.samples.clear()  # its counters, or the sink itself, were started over
            answer = place.live(0)
        self.samples.extend(answer.samples)
        self._last, self.answer = answer.last, answer


def bars(values: Sequence[float]) -> str:
    """Return a line of bars, the greatest value as high as the line; the newest is at the right."""
    most = max(values, default=0)
    shown = "".join(_BARS[-(-int(value * 800 / most) // 100) if most else 0] for value in values)
    return shown.rjust(_WIDTH)


def screen(place: Place, seconds: Seconds, trouble: str = "") -> RenderableType:
    """Return what is shown."""
    where = Text(f"penstock top  http://{place.host}:{place.port}", style="bold")
    if trouble:
        where.append(f"   {trouble}", style="red")
    if seconds.answer is None:
        return Group(where)
    report = seconds.answer.report
    where.append(f"   sink on {', '.join(report.listen)}   {report.seconds:,.0f} s", style="dim")
    tables = Columns([latency_table(report), reply_table(report), _others(report)], padding=(0, 3))
    return Group(where, Panel(_lines(report, list(seconds.samples)), title="last minute", title_align="left"), tables)


def _lines(report: Report, samples: Sequence[Sample]) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(4):
        table.add_column(no_wrap=True)
    rows: list[tuple[str, list[float], str, str, str]] = [
        (
            "messages",
            [s.messages / s.seconds for s in samples],
            "cyan",
            "/s",
            f"{report.messages.accepted + report.messages.unheard:,} in all",
        ),
        (
            "replies",
            [s.replies / s.seconds for s in samples],
            "blue",
            "/s",
            f"{sum(r.count for r in report.replies if r.garbled != 'none'):,}",
        ),
        ("sessions", [s.sessions for s in samples], "green", "", f"peak {report.sessions.peak:,}"),
        ("octets", [s.received / s.seconds for s in samples], "green", "B/s", octets(report.octets.received)),
        ("p50", [s.p50 for s in samples], "yellow", "ns", "dot to reply"),
        ("p99", [s.p99 for s in samples], "yellow", "ns", "dot to reply"),
        ("faults", [s.faults / s.seconds for s in samples], "magenta", "/s", _trouble(report)),
    ]
    for name, values, style, unit, note in rows:
        now = values[-1] if values else 0
        shown = milliseconds(int(now)) if unit == "ns" else f"{octets(now)}/s" if unit == "B/s" else f"{now:,.0f}{unit}"
        table.add_row(
            name, Text(bars(values), style=style), Text(shown.rjust(12), style="bold"), Text(note, style="dim")
        )
    return table


def _trouble(report: Report) -> str:
    messages = report.messages
    unheard = f", {messages.unheard:,} unheard" if messages.unheard else ""
    return f"{messages.refused:,} refused, {messages.lost:,} lost{unheard}"


def _others(report: Report) -> Table:
    """Return a table of loss, duplicates and faults."""
    table = Table(title="Loss and faults", box=None, title_style="bold", header_style="dim")
    table.add_column("what")
    table.add_column("count", justify="right")
    for run in report.sequences.runs[:_MOST_FAULTS]:
        name = run.run or "(no name)"
        table.add_row(f"{name}: numbers", f"{run.distinct:,}")
        table.add_row(f"{name}: missing", f"{run.missing:,}", style="red" if run.missing else None)
        table.add_row(f"{name}: twice", f"{run.duplicates:,}", style="red" if run.duplicates else None)
    for each in report.faults[:_MOST_FAULTS]:
        table.add_row(f"{each.rule}: {each.phase} {each.action}", f"{each.count:,}", style="magenta")
    if not table.row_count:
        table.add_row("no marked message, no fault", "")
    return table


@click.command()
@click.argument("url", default="http://127.0.0.1:8025")
@click.option("--token", envvar="PENSTOCK_WEB_TOKEN", metavar="TOKEN", help="What the sink asks for, if it does.")
@click.option("--once", is_flag=True, help="Print what there is, and end.")
def top(url: str, token: str | None, once: bool) -> None:
    """Show what a sink with --web does, once a second, in this terminal. Ctrl-C ends it; the sink goes on."""
    try:
        place = Place.parse(url, token)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    seconds, console = Seconds(), Console()
    try:
        seconds.look(place)
    except (OSError, ValueError) as exc:
        raise click.ClickException(f"{url}: {exc}") from exc
    if once:
        console.print(screen(place, seconds))
        return
    try:
        with Live(screen(place, seconds), console=console, screen=True, auto_refresh=False) as live:
            _follow(place, seconds, live)
    except KeyboardInterrupt:
        return


def _follow(place: Place, seconds: Seconds, live: Any) -> None:
    """Look once a second, until interrupted. A sink that is gone may come back."""
    while True:
        time.sleep(1)
        trouble = ""
        try:
            seconds.look(place)
        except (OSError, ValueError) as exc:
            trouble = str(exc)
        live.update(screen(place, seconds, trouble), refresh=True)
