"""Terminal output of a sink: a line every second, and tables on exit."""

from __future__ import annotations

import errno
import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import trio
from click.testing import CliRunner
from rich.console import Console

from penstock.app import Overrides, assemble
from penstock.cli import receiving, sink
from penstock.cli.main import main
from penstock.cli.receiving import counter_line, reply_table, table_of
from penstock.cli.sinkworkers import SinkFrame
from penstock.config import parse
from penstock.journal import Journal, JournalSettings
from penstock.metrics._session import Metrics
from penstock.sink.merging import Second, WorkerReport
from tests.sink.test_statistics import receipts


@pytest.mark.parametrize(
    ("width", "last"), [(None, "B/s"), (119, "B/s"), (79, "0 faults/s"), (60, "-"), (20, "0/s"), (10, " ")]
)
def test_counters_drop_fields_that_do_not_fit(width: int | None, last: str) -> None:
    made, clock, _, _ = receipts(Metrics())
    clock.now += 1
    line = counter_line(0, made.take_sample(), width)
    assert line.startswith("   1 s")
    assert line.endswith(last)
    assert width is None or len(line) <= width


def test_large_counters_fit_into_80_columns() -> None:
    metrics = Metrics()
    made, clock, faults, traffic = receipts(metrics)
    clock.now += 3600
    faults.count, traffic.octets_under_way = 3_000_000, 10**12
    for _ in range(200_000):
        metrics.count_refused_connection(b"421 4.3.2 Too many\r\n")
    assert len(counter_line(200_000_000, made.take_sample(), 79)) <= 79


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_into_the_terminal(width: int) -> None:
    metrics = Metrics()
    made, clock, faults, _ = receipts(metrics)
    faults.count = 1_234_567
    metrics.sequences.note("k3", 2)
    metrics.count_refused_connection(b"421 4.3.2 Too many\r\n")
    clock.now += 1
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(table_of(made.report()))
    text = capture.get()
    assert "0 messages in 1.0 s" in text
    assert "421" in text
    assert re.search(r"^deferred \(4xx\)\s+1: banner 1\s*$", text, re.MULTILINE)
    assert re.search(r"^refused \(5xx\)\s+0\s*$", text, re.MULTILINE)
    assert "1,234,567" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_an_unreadable_reply_has_no_code() -> None:
    metrics = Metrics()
    metrics.new_session().count_replies([(b"", "none")])
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(reply_table(receipts(metrics)[0].report()))
    assert capture.get().splitlines()[-1].split() == ["banner", "-", "none", "1"]


async def test_unread_counters_do_not_block_the_sink(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: object, tmp_path: Path
) -> None:
    """A full pipe blocks the writing thread only: the loop continues and can be cancelled."""
    has_begun, is_free, threads = threading.Event(), threading.Event(), list[int]()

    def write(text: str) -> None:
        threads.append(threading.get_ident())
        has_begun.set()
        is_free.wait(20)

    monkeypatch.setattr(receiving, "_print", write)
    statistics = receiving.Receiving(receiving.ReceivingOptions(counters=True))
    settings = parse(f'data_dir = "{tmp_path}"\n[[listener]]\naddress = "127.0.0.1:0"\ntls.mode = "none"\n')
    parts = assemble(
        settings, Journal(JournalSettings()), lambda _: None, overrides=Overrides(metrics=statistics.metrics)
    )
    statistics.begin(parts.worker, parts.addresses)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(statistics.run)
        assert await trio.to_thread.run_sync(has_begun.wait, 20)
        nursery.cancel_scope.cancel()
    is_free.set()
    parts.listeners[0].socket.close()
    assert threads[0] != threading.get_ident()


def test_octets_received_before_all_workers_are_ready_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Workers:
        """Two workers. A connection of the first is open before the other one is ready."""

        addresses: ClassVar = ["127.0.0.1:25"]

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def run(
            self, announce: Callable[[], None], take: Callable[[int, SinkFrame], None], *_: object, **__: object
        ) -> None:
            metrics = Metrics()
            empty = metrics.recent_messages.to_dict()
            now = receipts(metrics)[0].take_sample()
            take(0, SinkFrame(second=Second(now, empty, empty, under_way=100)))
            announce()
            take(1, SinkFrame(report=WorkerReport({})))
            metrics.new_session().ended("QUIT", 100)
            take(0, SinkFrame(report=WorkerReport({}, metrics.state(), rest=Second(now, empty, empty))))

    monkeypatch.setattr(sink, "SinkWorkers", Workers)
    file = tmp_path / "report.json"
    result = CliRunner().invoke(main, ["sink", "--workers", "2", "--report", str(file)])
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_bytes())["octets"]["received"] == 100


def test_the_report_is_written_although_the_terminal_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(Console, "print", fail)
    metrics = Metrics()
    made = receiving.Receiving(receiving.ReceivingOptions())
    made._statistics = receipts(metrics)[0]
    assert made.end() is not None


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (999, "< 1 µs"),
        (31_400, "31 µs"),
        (999_499, "999 µs"),
        (999_500, "1.00 ms"),
        (9_994_999, "9.99 ms"),
        (12_340_000, "12.3 ms"),
        (250_400_000, "250 ms"),
        (999_500_000, "1.00 s"),
        (75_000_000_000, "75.0 s"),
    ],
)
def test_a_duration_has_the_units_of_the_page(ns: int, text: str) -> None:
    assert receiving.duration(ns) == text
