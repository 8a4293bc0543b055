"""Terminal output of a sink: a line every second, and tables on exit."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio
from rich.console import Console

from penstock.app import Overrides, assemble
from penstock.cli import receiving
from penstock.cli.receiving import counters, reply_table, table_of
from penstock.config import parse
from penstock.journal import Journal, JournalSettings
from penstock.metrics._session import Metrics
from tests.sink.test_statistics import receipts


@pytest.mark.parametrize(
    ("width", "last"), [(None, "B/s"), (119, "B/s"), (79, "0 faults/s"), (60, "-"), (20, "0/s"), (10, " ")]
)
def test_counters_drop_fields_that_do_not_fit(width: int | None, last: str) -> None:
    made, clock, _, _ = receipts(Metrics())
    clock.now += 1
    line = counters(made, made.take_sample(), width)
    assert line.startswith("   1 s")
    assert line.endswith(last)
    assert width is None or len(line) <= width


def test_large_counters_fit_into_80_columns() -> None:
    metrics = Metrics()
    made, clock, faults, traffic = receipts(metrics)
    clock.now += 3600
    faults.count, traffic.octets_under_way = 3_000_000, 10**12
    for _ in range(200_000):
        metrics.turned_away(b"421 4.3.2 Too many\r\n")
    assert len(counters(made, made.take_sample(), 79)) <= 79


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_into_the_terminal(width: int) -> None:
    metrics = Metrics()
    made, clock, faults, _ = receipts(metrics)
    faults.count = 1_234_567
    metrics.sequences.note("k3", 2)
    metrics.turned_away(b"421 4.3.2 Too many\r\n")
    clock.now += 1
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(table_of(made.report()))
    text = capture.get()
    assert "0 messages in 1.0 s" in text
    assert "421" in text
    assert "1,234,567" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_an_unreadable_reply_has_no_code() -> None:
    metrics = Metrics()
    metrics.new_session().says([(b"", "none")])
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
    statistics.begin(parts)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(statistics.run)
        assert await trio.to_thread.run_sync(has_begun.wait, 20)
        nursery.cancel_scope.cancel()
    is_free.set()
    parts.listeners[0].socket.close()
    assert threads[0] != threading.get_ident()
