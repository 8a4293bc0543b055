"""What `penstock sink` does about what it receives: count, keep, show, and report at the end."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import click
import trio
from rich.console import Console, Group
from rich.table import Table

from penstock.app import Server
from penstock.cli import reports
from penstock.delivery.base import Delivery
from penstock.metrics._session import Metrics
from penstock.sink.kept import HeaderMarks, KeepingDelivery, KeepSettings, make_keeping
from penstock.sink.report import Report, Sample, json_schema
from penstock.sink.statistics import Expectation, FaultBook, FaultControl, RecipientMarks, Statistics
from penstock.sink.stores import Store

F = TypeVar("F", bound=Callable[..., Any])

_MS: Final = 1e6


def _show_schema(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked:
        click.echo(json_schema(), nl=False)
        context.exit()


_OPTIONS: Final = (
    click.option(
        "--report",
        "report_file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Write all receipts to this file at the end, as JSON; - is standard output.",
    ),
    click.option(
        "--describe-report",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_show_schema,
        help="Print the JSON Schema of the report, and end.",
    ),
    click.option(
        "--expect",
        type=click.IntRange(min=1),
        metavar="N",
        help="Each run of marked messages has N of them: exit code 1 when one is missing or came twice.",
    ),
    click.option(
        "--sequence-header",
        metavar="NAME",
        help="The number of a message is in this header field, not in its sender.",
    ),
    click.option(
        "--sequence-recipient",
        metavar="REGEX",
        help="The number of a message is in a recipient: group `number` or 1, the run in group `run`.",
    ),
    click.option(
        "--keep",
        multiple=True,
        metavar="WHAT",
        help="Keep messages: last:N in memory (128 MiB in all), maildir:DIR, mbox:FILE or jsonl:FILE (64 MiB each). "
        "Can be repeated.",
    ),
    click.option("--web", metavar="HOST:PORT", help="Show a live page and an HTTP API there, such as 127.0.0.1:8025."),
    click.option(
        "--web-token",
        envvar="PENSTOCK_WEB_TOKEN",
        metavar="TOKEN",
        help="What the page and the API ask for; needed where other machines reach them [PENSTOCK_WEB_TOKEN].",
    ),
    click.option(
        "--web-origin",
        metavar="URL",
        help="URL of the page behind a reverse proxy, such as https://mail.example.org/sink/.",
    ),
    click.option(
        "--release",
        metavar="HOST:PORT",
        help="Let users of the page send kept messages on through this server.",
    ),
    click.option("-c", "--counters", is_flag=True, help="Show the counters each second [always on a terminal]."),
    click.option("--receipts/--no-receipts", "counts", default=True, help="Count what can be counted [default: yes]."),
)


def receipt_options(command: F) -> F:
    """Add the options to a command, which gets them as keywords for `Wishes`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class Wishes(NamedTuple):
    """What the options say."""

    report_file: Path | None = None
    expect: int | None = None
    sequence_header: str | None = None
    sequence_recipient: str | None = None
    keep: tuple[str, ...] = ()
    web: str | None = None
    web_token: str | None = None
    web_origin: str | None = None
    release: str | None = None
    counters: bool = False
    counts: bool = True


class Account:
    """The receipts of one run of a sink. Made before the worker, because the worker counts into it."""

    def __init__(self, wishes: Wishes, stores: Sequence[Store] = ()) -> None:
        """Bind the socket of the page; `stores` get all messages. Raise click.UsageError for what can not be."""
        self._wishes = wishes
        self._stores = stores
        self._receipts: Statistics | None = None
        self._sockets: list[socket.socket] = []
        self._origin: Any = None
        self._hop: Any = None
        self._keeping: KeepingDelivery | None = None
        self.metrics: Metrics | None = None
        """None when nothing is to be counted."""
        try:
            self._prepare()
        except ValueError as exc:
            raise click.UsageError(str(exc)) from exc
        except OSError as exc:
            raise click.ClickException(f"{wishes.web}: {exc.strerror}") from exc

    def _prepare(self) -> None:
        wishes = self._wishes
        if wishes.report_file is not None:
            reports.check_place(wishes.report_file)
        if not wishes.counts:
            if wishes != Wishes(counts=False, web_token=wishes.web_token):
                raise ValueError("--no-receipts goes with no other option about them")
            if self._stores:
                raise ValueError("--no-receipts goes neither with -d nor with -D")
            return
        if wishes.sequence_header is not None and wishes.sequence_recipient is not None:
            raise ValueError("--sequence-header and --sequence-recipient exclude each other")
        header, pattern = wishes.sequence_header, wishes.sequence_recipient
        source = None if pattern is None else RecipientMarks(pattern)
        metrics = self.metrics = Metrics(source=source, reads_marks=header is None)
        marks = None if header is None else HeaderMarks(header, lambda: metrics.sequences)
        if wishes.keep or marks is not None or self._stores:
            self._keeping = make_keeping([KeepSettings.parse(each) for each in wishes.keep], marks, self._stores)
        if wishes.web is None and (wishes.web_origin is not None or wishes.release is not None):
            raise ValueError("--web-origin and --release need --web")
        if wishes.web is not None:
            self._origin, self._hop = _web().web_settings(wishes.web_origin, wishes.release)
            self._sockets = _web().bind_web(wishes.web, wishes.web_token)

    @property
    def delivery(self) -> Delivery | None:
        """What keeps the messages, when they are to be kept."""
        return self._keeping

    def begin(self, parts: Server, faults: FaultBook | None = None) -> None:
        """Start counting for a worker, and say where the page is."""
        if self.metrics is None:
            return
        wishes = self._wishes
        places = {
            "sender": wishes.sequence_header is wishes.sequence_recipient is None,
            f"header {wishes.sequence_header}": wishes.sequence_header is not None,
            f"recipient {wishes.sequence_recipient}": wishes.sequence_recipient is not None,
        }
        expectation = Expectation(next(name for name, is_it in places.items() if is_it), wishes.expect)
        self._receipts = Statistics(
            self.metrics, parts.worker, faults=faults, expectation=expectation, listen=parts.addresses
        )
        for sock in self._sockets[:1]:
            click.echo(f"penstock: live page at {_web().url_of(sock)}", err=True)

    async def run(self, faults: FaultControl | None = None) -> None:
        """Take a sample each second, show the counters, serve the page, until cancelled."""
        if self._receipts is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._count)
            if self._sockets:
                from penstock.sink.web.app import make_app  # noqa: PLC0415 - needs the extra `web`

                shelf = None if self._keeping is None else self._keeping.shelf
                app = make_app(
                    self._receipts,
                    shelf=shelf,
                    faults=faults,
                    token=self._wishes.web_token,
                    origin=self._origin,
                    hop=self._hop,
                )
                nursery.start_soon(_web().serve_web, app, self._sockets)

    async def _count(self) -> None:
        assert self._receipts is not None
        shows, rewrites = self._wishes.counters or sys.stderr.isatty(), sys.stderr.isatty()
        due = trio.current_time()
        while True:
            due += 1
            await trio.sleep_until(due)
            sample = self._receipts.take_sample()
            if shows:
                with suppress(OSError, ValueError):  # nobody reads it any more
                    columns = os.get_terminal_size(sys.stderr.fileno()).columns if rewrites else 0
                    line = counters(self._receipts, sample, columns - 1 if columns else None)
                    text = f"\r\x1b[2K{line}" if rewrites else f"{line}\n"
                    # In a thread: a pipe that is full, and that nobody reads, must not hold up the sessions.
                    await trio.to_thread.run_sync(_print, text, abandon_on_cancel=True)

    def end(self) -> Report | None:
        """Show the table, and return the report; None when nothing was counted."""
        if self._receipts is None:
            return None
        self._receipts.take_sample()
        report = self._receipts.report()
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[2K")
        if self._keeping is not None and self._keeping.failures:
            why = f"{self._keeping.failures} messages could not be kept: {self._keeping.last_failure}"
            click.echo(f"penstock: {why}", err=True)
        if sys.stdout.isatty() and self._wishes.report_file != reports.STDOUT:
            Console().print(table_of(report))
        return report


def _print(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _web() -> Any:
    """Return what serves the page. Raise click.UsageError when the extra is not installed."""
    try:
        from penstock.sink.web import serve  # noqa: PLC0415 - needs the extra `web`
    except ImportError as exc:
        raise click.UsageError(f"--web needs more packages: pip install 'penstock[web]' ({exc})") from exc
    return serve


def as_expected(report: Report) -> bool:
    """Say whether each run has all its messages, and none twice; True when nothing was expected."""
    sequences = report.sequences
    if sequences.expected is None:
        return True
    return bool(sequences.runs) and all(not run.missing and not run.duplicates for run in sequences.runs)


# ---- for people


def counters(receipts: Statistics, sample: Sample, width: int | None = None) -> str:
    """Return one line about the last second and all before it: of what there is to say, the first that has room."""
    taken = receipts.metrics.accepted + receipts.metrics.unheard
    fields = [
        (0, f"{sample.at:4.0f} s"),
        (0, f"{sample.messages:5,}/s"),
        (1, f"{taken:7,} messages"),
        (5, f"{sample.sessions:4,} sessions"),
        (3, f"p50 {_or_none(sample.p50):>8}"),
        (2, f"p99 {_or_none(sample.p99):>8}"),
        (4, f"{sample.faults:2,} faults/s"),
        (6, f"{sample.replies:6,} replies/s"),
        (7, f"{octets(sample.received):>8}/s"),
    ]
    for most in range(7, -1, -1):
        line = "  ".join(field for importance, field in fields if importance <= most)
        if width is None or len(line) <= width:
            return line
    return line[:width]


def _or_none(ns: int) -> str:
    """Return a duration; what is 0 never was."""
    return milliseconds(ns) if ns else "-"


def milliseconds(ns: int) -> str:
    """Return a duration with the digits that matter: "0.031 ms", "12.4 ms", "1.25 s"."""
    if ns >= 1000 * _MS:
        return f"{ns / 1e9:.2f} s"
    value = ns / _MS
    return f"{value:.3f} ms" if value < 1 else f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms"


def octets(count: float) -> str:
    """Return a number of octets: "4.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def table_of(report: Report) -> Group:
    """Return the receipts as tables for a terminal."""
    tables = [_head(report), latency_table(report), reply_table(report)]
    tables += [*_sequence_tables(report), *_fault_tables(report)]
    return Group(*(part for table in tables for part in (table, "")))


def _head(report: Report) -> Table:
    messages, sessions = report.messages, report.sessions
    taken = messages.accepted + messages.unheard
    head = plain_table(f"{taken:,} messages in {report.seconds:,.1f} s", "", "")
    head.show_header = False
    head.columns[0].style = "dim"
    for name, value in (
        ("accepted", f"{messages.accepted:,}"),
        ("unheard", f"{messages.unheard:,} taken, and no 250 that can be read" if messages.unheard else ""),
        ("recipients", f"{messages.recipients:,}"),
        ("refused", f"{messages.refused:,}"),
        ("lost", f"{messages.lost:,}"),
        ("sessions", f"{sessions.total:,}, at most {sessions.peak:,} at a time"),
        ("handshakes", f"{sessions.tls:,}, {sessions.tls_failed:,} failed"),
        ("octets", f"{octets(report.octets.received)} received, {octets(report.octets.sent)} sent"),
        ("a second", f"{taken / max(report.seconds, 1e-3):,.0f} messages"),
    ):
        if value:
            head.add_row(name, value)
    return head


def plain_table(title: str, *columns: str) -> Table:
    """Return a table without lines. A column whose name begins with > has numbers, which stand to the right."""
    table = Table(title=title, box=None, title_style="bold", title_justify="left", header_style="dim", pad_edge=False)
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return table


def latency_table(report: Report, *, is_narrow: bool = False) -> Table:
    """Return the latencies by phase."""
    names = (">p50", ">p99", ">max") if is_narrow else (">count", ">p50", ">p90", ">p99", ">max")
    table = plain_table("Latencies", "phase", *names)
    for phase, each in sorted(report.latencies.items(), key=lambda found: place_of(found[0])):
        shown = [each.p50, each.p99, each.max] if is_narrow else [each.p50, each.p90, each.p99, each.max]
        count = [] if is_narrow else [f"{each.count:,}"]
        table.add_row(phase, *count, *(milliseconds(value) for value in shown))
    return table


_ORDER: Final = (
    "banner", "tls", "HELO", "EHLO", "LHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "BDAT", "text", "message",
    "RSET", "NOOP", "QUIT", "think",
)  # fmt: skip
"""Phases as a session meets them."""


def place_of(phase: str) -> int:
    """Return where a phase stands in a table."""
    return _ORDER.index(phase) if phase in _ORDER else len(_ORDER)


def reply_table(report: Report, most: int | None = None) -> Table:
    """Return the replies by phase and code, refusals and what went out wrong in colour; in a few rows, those first."""
    table = plain_table("Replies", "phase", "code", "status", ">count")
    shown = sorted(report.replies, key=lambda each: place_of(each.phase))
    left = 0 if most is None else len(shown) - most
    if left > 0:
        shown = sorted(report.replies, key=lambda each: (each.code < 400 and not each.garbled, -each.count))
        shown = sorted(shown[: len(shown) - left - 1], key=lambda each: place_of(each.phase))
    for each in shown:
        style = "red" if each.code >= 500 else "yellow" if each.code >= 400 else "magenta" if each.garbled else None
        status = " ".join(word for word in (each.status, each.garbled) if word)
        table.add_row(each.phase, str(each.code) if each.code else "-", status, f"{each.count:,}", style=style)
    if left > 0:
        table.add_row(f"{left + 1} more", style="dim")
    return table


def _sequence_tables(report: Report) -> list[Table]:
    if not report.sequences.runs:
        return []
    table = plain_table("Sequences", "run", ">distinct", ">missing", ">duplicates", ">out of order", ">highest")
    for run in report.sequences.runs:
        counts = (run.distinct, run.missing, run.duplicates, run.out_of_order, run.highest)
        style = "red" if run.missing or run.duplicates else None
        table.add_row(run.run or "(no name)", *(f"{count:,}" for count in counts), style=style)
    return [table]


def _fault_tables(report: Report) -> list[Table]:
    if not report.faults:
        return []
    table = plain_table("Faults", "rule", "phase", "action", ">count")
    for each in report.faults:
        table.add_row(each.rule, each.phase, each.action, f"{each.count:,}")
    return [table]
