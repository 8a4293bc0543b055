"""What a sink shows in a terminal: a line a second, and tables at the end."""

from __future__ import annotations

import pytest
from rich.console import Console

from penstock._tally import Tally
from penstock.cli.receiving import counters, reply_table, table_of
from tests.sink.test_receipts import receipts


@pytest.mark.parametrize(
    ("width", "last"), [(None, "B/s"), (119, "B/s"), (79, "0 faults/s"), (60, "-"), (20, "0/s"), (10, " ")]
)
def test_the_counters_say_what_there_is_room_for(width: int | None, last: str) -> None:
    made, clock, _, _ = receipts(Tally())
    clock.now += 1
    line = counters(made, made.take_sample(), width)
    assert line.startswith("   1 s")
    assert line.endswith(last)
    assert width is None or len(line) <= width


def test_the_counters_of_a_busy_hour_fit_eighty_columns() -> None:
    tally = Tally()
    made, clock, faults, traffic = receipts(tally)
    clock.now += 3600
    faults.count, traffic.octets_under_way = 3_000_000, 10**12
    for _ in range(200_000):
        tally.turned_away(b"421 4.3.2 Too many\r\n")
    assert len(counters(made, made.take_sample(), 79)) <= 79


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_the_terminal(width: int) -> None:
    tally = Tally()
    made, clock, faults, _ = receipts(tally)
    faults.count = 1_234_567
    tally.sequences.note("k3", 2)
    tally.turned_away(b"421 4.3.2 Too many\r\n")
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


def test_a_reply_that_was_none_has_no_code() -> None:
    tally = Tally()
    tally.meter().says([(b"", "none")])
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(reply_table(receipts(tally)[0].report()))
    assert capture.get().splitlines()[-1].split() == ["banner", "-", "none", "1"]
