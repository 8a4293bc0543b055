"""`penstock top`: addresses, bars, and a screen of what a sink has said."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from rich.console import Console

from penstock._tally import Tally
from penstock.cli.main import main
from penstock.cli.top import Answer, Place, Seconds, bars, screen
from tests.sink.test_receipts import receipts


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("http://127.0.0.1:8025/", Place("127.0.0.1", 8025, None)),
        ("127.0.0.1:1", Place("127.0.0.1", 1, None)),
        ("localhost", Place("localhost", 8025, None)),
        ("http://[::1]:9", Place("::1", 9, None)),
    ],
)
def test_addresses_are_read_as_people_write_them(url: str, place: Place) -> None:
    assert Place.parse(url, None) == place


@pytest.mark.parametrize("url", ["https://localhost", "http://", "http://localhost/x", "localhost:99999", ""])
def test_an_address_that_can_not_be_is_refused(url: str) -> None:
    result = CliRunner().invoke(main, ["top", url])
    assert result.exit_code == 2


def test_nobody_there_is_one_line() -> None:
    result = CliRunner().invoke(main, ["top", "127.0.0.1:1", "--once"])
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.output


def test_bars_are_as_high_as_their_values() -> None:
    assert bars([0, 1, 4, 8]).lstrip() == "▁▄█"
    assert len(bars([0, 1, 4, 8])) == 60
    assert bars([]) == bars([0, 0]) == " " * 60


def test_the_screen_shows_rates_latencies_replies_and_faults() -> None:
    tally = Tally()
    made, clock, faults, _ = receipts(tally)
    tally.turned_away(b"421 4.3.2 Too many\r\n")
    tally.sequences.note("k3", 2)
    faults.count = 5
    clock.now += 1
    sample = made.take_sample()
    seconds = Seconds()
    report = made.report(is_full=False)
    seconds.answer = Answer(0, report, [sample], 1, report.faults)
    seconds.samples.append(sample)
    console = Console(width=160, record=True, file=None, force_terminal=False, quiet=False)
    with console.capture() as capture:
        console.print(screen(Place("127.0.0.1", 8025, None), seconds, "gone"))
    shown = capture.get()
    for words in (
        "gone",
        "last minute",
        "sink on 127.0.0.1:25",
        "421",
        "k3: missing",
        "busy: rcpt reply 450 4.2.1",
        "5",
    ):
        assert words in shown
