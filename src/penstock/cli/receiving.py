"""Receiving side of `penstock sink`: counting, keeping and showing messages, and the report on exit."""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import click
import trio
from rich.console import Console, Group
from rich.table import Table

from penstock.cli import reports
from penstock.delivery.base import Delivery
from penstock.forked import shared_numbers
from penstock.metrics._session import Metrics
from penstock.sink.kept import HeaderMarks, KeepingDelivery, KeepSettings, KeptMessage, make_keeping
from penstock.sink.merging import Second
from penstock.sink.messageids import MessageIdOutbox, MessageIdTracker
from penstock.sink.report import MessageIdCounts, Report, Sample, json_schema
from penstock.sink.statistics import Expectation, FaultControl, FaultCounters, RecipientMarks, Statistics, Traffic
from penstock.sink.stores import Store

F = TypeVar("F", bound=Callable[..., Any])


def _show_schema(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked:
        click.echo(json_schema(), nl=False)
        context.exit()


_OPTIONS: Final = (
    click.option(
        "--report",
        "report_file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Write the statistics as JSON on exit; - is standard output.",
    ),
    click.option(
        "--describe-report",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_show_schema,
        help="Print the JSON Schema of the report, then exit.",
    ),
    click.option(
        "--expect",
        type=click.IntRange(min=1),
        metavar="N",
        help="Expect N messages in each numbered run: exit code 1 if one is missing or duplicated.",
    ),
    click.option(
        "--sequence-header",
        metavar="NAME",
        help="Read sequence numbers from this header field instead of the sender.",
    ),
    click.option(
        "--sequence-recipient",
        metavar="REGEX",
        help="Read sequence numbers from a recipient: group `number` or 1, the run from group `run`.",
    ),
    click.option(
        "--keep",
        multiple=True,
        metavar="STORE",
        help="Keep messages: last:N in memory (128 MiB in all), maildir:DIR, mbox:FILE or jsonl:FILE (up to 64 MiB "
        "each). May be repeated.",
    ),
    click.option(
        "--web", metavar="HOST:PORT", help="Serve a live web page and an HTTP API, for example on 127.0.0.1:8025."
    ),
    click.option(
        "--web-token",
        envvar="PENSTOCK_WEB_TOKEN",
        metavar="TOKEN",
        help="Password of the web page and the API; required on addresses that other machines can reach "
        "[PENSTOCK_WEB_TOKEN].",
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
    click.option("-c", "--counters", is_flag=True, help="Print counters every second [default on a terminal]."),
    click.option("--receipts/--no-receipts", "counts", default=True, help="Collect statistics [default: yes]."),
)


def receipt_options(command: F) -> F:
    """Add the options to a command, which passes them to `ReceivingOptions`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class ReceivingOptions(NamedTuple):
    """The values of the options."""

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


class Receiving:
    """Statistics and kept messages of one run of a sink. Made before the worker, which counts into it."""

    def __init__(self, options: ReceivingOptions, stores: Sequence[Store] = (), workers: int = 1) -> None:
        """Bind the socket of the web page; `stores` get all messages. Raise click.UsageError for wrong options.

        With several workers, this is made before they are: the parent counts and serves the page, each worker becomes
        one with `become_worker`.
        """
        self._workers = workers
        self._options = options
        self._stores = stores
        self._statistics: Statistics | None = None
        self._sockets: list[socket.socket] = []
        self._origin: Any = None
        self._hop: Any = None
        self._make_app: Any = None
        self._keeping: KeepingDelivery | None = None
        self.message_ids: MessageIdTracker | None = None
        self.metrics: Metrics | None = None
        """None if nothing is counted."""
        try:
            self._prepare()
        except ValueError as exc:
            raise click.UsageError(str(exc)) from exc
        except OSError as exc:
            raise click.ClickException(f"{options.web}: {exc.strerror}") from exc

    def _prepare(self) -> None:
        options = self._options
        if options.report_file is not None:
            reports.check_place(options.report_file)
        if not options.counts:
            if options != ReceivingOptions(counts=False, web_token=options.web_token):
                raise ValueError("--no-receipts cannot be combined with options that need statistics")
            if self._stores:
                raise ValueError("--no-receipts cannot be combined with -d or -D")
            return
        if options.sequence_header is not None and options.sequence_recipient is not None:
            raise ValueError("--sequence-header and --sequence-recipient are mutually exclusive")
        header, pattern = options.sequence_header, options.sequence_recipient
        source = None if pattern is None else RecipientMarks(pattern)
        shared = shared_numbers(2) if self._workers > 1 else None
        metrics = self.metrics = Metrics(source=source, reads_marks=header is None, shared=shared)
        marks = None if header is None else HeaderMarks(header, lambda: metrics.sequences)
        if (options.keep or self._stores) and source is None and marks is None:
            self.message_ids = MessageIdTracker()
        if options.keep or marks is not None or self._stores:
            self._keeping = make_keeping(
                [KeepSettings.parse(each) for each in options.keep], marks, self._stores, self.message_ids
            )
        if options.web is None and (options.web_origin is not None or options.release is not None):
            raise ValueError("--web-origin and --release need --web")
        if options.web is not None:
            web = _web()
            from penstock.sink.web.app import make_app  # noqa: PLC0415 - needs the extra `web`

            self._make_app = make_app  # imported as the first user: --user need not be able to read it
            self._origin, self._hop = web.web_settings(options.web_origin, options.release)
            self._sockets = web.bind_web(options.web, options.web_token)

    @property
    def has_page(self) -> bool:
        """A web page is served."""
        return self._options.web is not None

    def become_worker(self) -> None:
        """Be one of several workers, whose parent serves the page and counts the Message-IDs."""
        for sock in self._sockets:
            sock.close()
        self._sockets = []
        if self._keeping is not None and self._keeping.message_ids is not None:
            self.message_ids = self._keeping.message_ids = MessageIdOutbox()

    def second(self, faults: FaultCounters) -> Second:
        """Take the sample of a second. Return it with what else a worker tells its parent."""
        metrics, statistics = self.metrics, self._statistics
        assert metrics is not None
        assert statistics is not None
        messages, replies = metrics.recent_messages.to_dict(), metrics.recent_replies.to_dict()
        made = Second(statistics.take_sample(), messages, replies, statistics.generation)
        made.under_way = statistics.received - metrics.received
        if isinstance(self.message_ids, MessageIdOutbox):
            made.message_ids, made.further_ids = self.message_ids.take()
        if self.has_page:
            made.metrics = metrics.state()
            made.tags = metrics.sequences.take_changes()
            made.faults = list(faults.counted())
        return made

    def reset(self, generation: int) -> None:
        """Reset the counters of a worker, which are of this generation then."""
        assert self._statistics is not None
        self._statistics.reset()
        self._statistics.generation = generation

    def take_kept(self) -> list[KeptMessage]:
        """Return the messages that a worker has kept for the page since the last time."""
        shelf = None if self._keeping is None or not self.has_page else self._keeping.shelf
        return [] if shelf is None else shelf.take()

    def add_kept(self, message: KeptMessage) -> None:
        """Keep a message that a worker has received."""
        assert self._keeping is not None
        assert self._keeping.shelf is not None
        self._keeping.shelf.put(message)

    def add_samples(self, samples: Sequence[Sample], metrics: Metrics) -> None:
        """Note what several workers have counted."""
        assert self._statistics is not None
        self._statistics.metrics = metrics
        for sample in samples:
            self._statistics.add_sample(sample)

    @property
    def delivery(self) -> Delivery | None:
        """The delivery that keeps messages; None if they are discarded."""
        return self._keeping

    def begin(self, traffic: Traffic, addresses: Sequence[str], faults: FaultCounters | None = None) -> None:
        """Start counting a server, or all workers of a sink, that listens on these addresses."""
        if self.metrics is None:
            return
        options = self._options
        places = {
            "sender": options.sequence_header is options.sequence_recipient is None,
            f"header {options.sequence_header}": options.sequence_header is not None,
            f"recipient {options.sequence_recipient}": options.sequence_recipient is not None,
        }
        expectation = Expectation(next(name for name, is_it in places.items() if is_it), options.expect)
        self._statistics = Statistics(
            self.metrics,
            traffic,
            faults=faults,
            expectation=expectation,
            listen=addresses,
            message_ids=self.message_ids,
        )

    def announce(self) -> None:
        """Print the URL of the web page."""
        for sock in self._sockets[:1]:
            click.echo(f"penstock: live page at {_web().url_of(sock)}", err=True)

    async def run(self, faults: FaultControl | None = None) -> None:
        """Take a sample each second, print counters and serve the web page until cancelled."""
        if self._statistics is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._count)
            nursery.start_soon(self.serve_page, faults)

    async def serve_page(self, faults: FaultControl | None = None) -> None:
        """Serve the web page until cancelled; return at once without a page."""
        if not self._sockets:
            return
        assert self._statistics is not None
        shelf = None if self._keeping is None else self._keeping.shelf
        app = self._make_app(
            self._statistics,
            shelf=shelf,
            faults=faults,
            token=self._options.web_token,
            origin=self._origin,
            hop=self._hop,
        )
        await _web().serve_web(app, self._sockets)

    async def _count(self) -> None:
        assert self._statistics is not None
        metrics = self._statistics.metrics
        due = trio.current_time()
        while True:
            due += 1
            await trio.sleep_until(due)
            await self.show(self._statistics.take_sample(), metrics.accepted + metrics.unheard)

    async def show(self, sample: Sample, messages: int) -> None:
        """Print the counters of a second, if they are wanted; `messages` is the number of all messages so far."""
        rewrites = sys.stderr.isatty()
        if not (self._options.counters or rewrites):
            return
        with suppress(OSError, ValueError):  # standard error has no reader any more
            columns = os.get_terminal_size(sys.stderr.fileno()).columns if rewrites else 0
            line = counter_line(messages, sample, columns - 1 if columns else None)
            text = f"\r\x1b[2K{line}" if rewrites else f"{line}\n"
            # In a thread: a full pipe without a reader must not block the sessions.
            await trio.to_thread.run_sync(_print, text, abandon_on_cancel=True)

    def report_failures(self) -> None:
        """Print how many messages could not be kept, if there are any."""
        if self._keeping is not None and self._keeping.failures:
            reason = f"{self._keeping.failures} messages could not be kept: {self._keeping.last_failure}"
            click.echo(f"penstock: {reason}", err=True)

    def end(self) -> Report | None:
        """Print the tables and return the report; None if nothing was counted."""
        if self._statistics is None:
            return None
        if self._workers == 1:  # else they have reported the rest of the last second
            self._statistics.take_sample()
        report = self._statistics.report()
        with suppress(OSError):  # a terminal may be closed, and the report is still to be written
            if sys.stderr.isatty():
                sys.stderr.write("\r\x1b[2K")
            self.report_failures()
            if sys.stdout.isatty() and self._options.report_file != reports.STDOUT:
                Console().print(table_of(report))
        return report


def _print(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _web() -> Any:
    """Return the module that serves the web page. Raise click.UsageError if the extra is not installed."""
    try:
        from penstock.sink.web import serve  # noqa: PLC0415 - needs the extra `web`
    except ImportError as exc:
        raise click.UsageError(f"--web needs the extra `web`: pip install 'penstock[web]' ({exc})") from exc
    return serve


def as_expected(report: Report) -> bool:
    """Return True if every run has all its messages and no duplicates, or if nothing was expected."""
    sequences = report.sequences
    if sequences.expected is None:
        return True
    return bool(sequences.runs) and all(not run.missing and not run.duplicates for run in sequences.runs)


# ---- output for people


def counter_line(messages: int, sample: Sample, width: int | None = None) -> str:
    """Return one line about the last second and all messages: the most important fields that fit into the width."""
    fields = [
        (0, f"{sample.at:4.0f} s"),
        (0, f"{sample.messages:5,}/s"),
        (1, f"{messages:7,} messages"),
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
    """Return a duration, or "-" for 0: nothing was measured."""
    return duration(ns) if ns else "-"


def duration(ns: int) -> str:
    """Return a duration as the page shows it: "< 1 µs", "31 µs", "2.75 ms", "12.4 ms", "1.25 s"."""
    if ns < 999_500:
        return f"{round(ns / 1e3)} µs" if ns >= 1000 else "< 1 µs"
    value, unit = (ns / 1e6, "ms") if ns < 999.5e6 else (ns / 1e9, "s")
    return f"{value:.2f} {unit}" if value < 9.995 else f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def octets(count: float) -> str:
    """Return a number of octets: "4.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def table_of(report: Report) -> Group:
    """Return a report as tables for a terminal."""
    tables = [_head(report), latency_table(report), reply_table(report)]
    tables += [*_sequence_tables(report), *_fault_tables(report)]
    return Group(*(part for table in tables for part in (table, "")))


def _head(report: Report) -> Table:
    messages, sessions = report.messages, report.sessions
    received = messages.accepted + messages.unheard
    head = plain_table(f"{received:,} messages in {report.seconds:,.1f} s", "", "")
    head.show_header = False
    head.columns[0].style = "dim"
    for name, value in (
        ("accepted", f"{messages.accepted:,}"),
        ("unheard", f"{messages.unheard:,} accepted without a readable 250" if messages.unheard else ""),
        ("recipients", f"{messages.recipients:,}"),
        ("refused (5xx)", refusals(report, "5")),
        ("deferred (4xx)", refusals(report, "4")),
        ("refused after their text", f"{messages.refused:,}" if messages.refused else ""),
        ("lost", f"{messages.lost:,}"),
        ("sessions", f"{sessions.total:,} in all, peak {sessions.peak:,}"),
        ("handshakes", f"{sessions.tls:,}, {sessions.tls_failed:,} failed"),
        ("octets", f"{octets(report.octets.received)} received, {octets(report.octets.sent)} sent"),
        ("rate", f"{received / max(report.seconds, 1e-3):,.0f} messages per second"),
    ):
        if value:
            head.add_row(name, value)
    return head


def refusals(report: Report, digit: str) -> str:
    """Return how many replies have a code with this first digit, in all and by phase: "3: MAIL 1, RCPT 2"."""
    phases: Counter[str] = Counter()
    for each in report.replies:
        if str(each.code).startswith(digit):
            phases[each.phase] += each.count
    found = ", ".join(f"{phase} {phases[phase]:,}" for phase in sorted(phases, key=place_of))
    return f"{phases.total():,}: {found}" if found else "0"


def plain_table(title: str, *columns: str) -> Table:
    """Return a table without lines. A column whose name begins with > is aligned to the right."""
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
        table.add_row(phase, *count, *(duration(value) for value in shown))
    return table


_ORDER: Final = (
    "banner", "tls", "HELO", "EHLO", "LHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "BDAT", "text", "message",
    "RSET", "NOOP", "QUIT", "think",
)  # fmt: skip
"""Phases in the order of a session."""


def place_of(phase: str) -> int:
    """Return the position of a phase in a table."""
    return _ORDER.index(phase) if phase in _ORDER else len(_ORDER)


def reply_table(report: Report, most: int | None = None) -> Table:
    """Return the replies by phase and code, with refusals and corrupted replies in colour.

    With `most`, only that many rows: refusals and corrupted replies before the others.
    """
    table = plain_table("Replies", "phase", "code", "status", ">count")
    shown = sorted(report.replies, key=lambda each: place_of(each.phase))
    hidden = 0 if most is None else len(shown) - most
    if hidden > 0:
        shown = sorted(report.replies, key=lambda each: (each.code < 400 and not each.garbled, -each.count))
        shown = sorted(shown[: len(shown) - hidden - 1], key=lambda each: place_of(each.phase))
    for each in shown:
        style = "red" if each.code >= 500 else "yellow" if each.code >= 400 else "magenta" if each.garbled else None
        status = " ".join(word for word in (each.status, each.garbled) if word)
        table.add_row(each.phase, str(each.code) if each.code else "-", status, f"{each.count:,}", style=style)
    if hidden > 0:
        table.add_row(f"{hidden + 1} more", style="dim")
    return table


def _sequence_tables(report: Report) -> list[Table]:
    tables = [_message_id_table(report.sequences.message_ids)] if report.sequences.message_ids is not None else []
    if not report.sequences.runs:
        return tables
    table = plain_table("Sequences", "run", ">distinct", ">missing", ">duplicates", ">out of order", ">highest")
    for run in report.sequences.runs:
        counts = (run.distinct, run.missing, run.duplicates, run.out_of_order, run.highest)
        style = "red" if run.missing or run.duplicates else None
        table.add_row(run.run or "(no name)", *(f"{count:,}" for count in counts), style=style)
    return [table, *tables]


def _message_id_table(ids: MessageIdCounts) -> Table:
    table = plain_table("Message-IDs", ">distinct", ">duplicates", ">without")
    counts = (ids.distinct, ids.duplicates, ids.missing_id)
    table.add_row(*(f"{count:,}" for count in counts), style="red" if ids.duplicates else None)
    return table


def duplicates_of(report: Report) -> int:
    """Return the duplicate messages, by sequence tag or by Message-ID."""
    ids = report.sequences.message_ids
    return sum(run.duplicates for run in report.sequences.runs) + (0 if ids is None else ids.duplicates)


def _fault_tables(report: Report) -> list[Table]:
    if not report.faults:
        return []
    table = plain_table("Faults", "rule", "phase", "action", ">count")
    for each in report.faults:
        table.add_row(each.rule, each.phase, each.action, f"{each.count:,}")
    return [table]
