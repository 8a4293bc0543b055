"""`penstock top`: addresses, bars, and the screen."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from penstock.cli.main import main
from penstock.cli.servertop import take_sample
from penstock.cli.status import Series
from penstock.cli.terminal import bars
from penstock.cli.top import Api, Display, LiveResponse, Seconds
from penstock.metrics._session import Metrics
from penstock.metrics._shared import BUCKETS
from tests.sink.test_statistics import receipts


@pytest.mark.parametrize(
    ("url", "api"),
    [
        ("http://127.0.0.1:8025/", Api("127.0.0.1", 8025, None)),
        ("127.0.0.1:1", Api("127.0.0.1", 1, None)),
        ("localhost", Api("localhost", 8025, None)),
        ("http://[::1]:9", Api("::1", 9, None)),
    ],
)
def test_addresses_are_read_in_all_forms(url: str, api: Api) -> None:
    assert Api.parse(url, None) == api


@pytest.mark.parametrize("url", ["https://localhost", "http://", "http://localhost/x", "localhost:99999", ""])
def test_a_wrong_address_is_refused(url: str) -> None:
    result = CliRunner().invoke(main, ["top", url])
    assert result.exit_code == 2


def test_a_missing_sink_is_reported_in_one_line() -> None:
    result = CliRunner().invoke(main, ["top", "127.0.0.1:1", "--once"])
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.output


def shown_at(width: int, height: int | None = None) -> list[str]:
    """Return the lines of a screen of a busy sink."""
    metrics = Metrics()
    made, clock, faults, _ = receipts(metrics)
    for code in (*range(421, 460), 550):
        metrics.count_refused_connection(b"%d 4.3.2 x\r\n" % code)
    for number in (1, 2, 2, 9):
        metrics.sequences.note("k3", number)
    faults.count = 1234
    seconds = Seconds()
    for _ in range(70):
        clock.now += 1
        seconds.samples.append(made.take_sample())
    report = made.report(is_full=False)
    seconds.response = LiveResponse(0, report, [], 70, report.faults)
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(Display(Api("127.0.0.1", 8025, None), seconds, height=height))
    return capture.get().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (200, 50), (60, 30)])
def test_the_screen_fits_the_terminal(width: int, height: int) -> None:
    lines = shown_at(width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    text = "\n".join(lines[1:])  # the addresses may be cut
    for words in ("messages", "p99", "k3: missing", "k3: duplicates", "1,234", "banner"):
        assert words in text
    assert "…" not in text


def test_without_a_height_every_reply_is_shown() -> None:
    text = "\n".join(shown_at(80))
    assert "421" in text
    assert "459" in text
    assert " more" not in text


def test_rows_that_do_not_fit_are_counted_and_refusals_stay() -> None:
    text = "\n".join(shown_at(80, 24))
    assert " more" in text
    assert "421" in text


def test_bars_are_as_high_as_their_values() -> None:
    assert bars([0, 1, 4, 8]).lstrip() == "▁▄█"
    assert len(bars([0, 1, 4, 8])) == 60
    assert bars([9, 9, 9, 1], 2) == "█▁"
    assert bars([]) == bars([0, 0]) == " " * 60


def test_the_screen_shows_rates_latencies_replies_and_faults() -> None:
    metrics = Metrics()
    made, clock, faults, _ = receipts(metrics)
    metrics.count_refused_connection(b"421 4.3.2 Too many\r\n")
    metrics.sequences.note("k3", 2)
    faults.count = 5
    clock.now += 1
    sample = made.take_sample()
    seconds = Seconds()
    report = made.report(is_full=False)
    seconds.response = LiveResponse(0, report, [sample], 1, report.faults)
    seconds.samples.append(sample)
    console = Console(width=160, record=True, file=None, force_terminal=False, quiet=False)
    with console.capture() as capture:
        console.print(Display(Api("127.0.0.1", 8025, None), seconds, "gone"))
    shown = capture.get()
    for words in (
        "gone",
        "last 60 s",
        "sink on 127.0.0.1:25",
        "421",
        "k3: missing",
        "busy: rcpt reply 450 4.2.1",
        "5",
    ):
        assert words in shown


def test_a_server_is_asked_by_its_options_and_a_sink_by_its_url(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["top", "--data", str(tmp_path), "--once"])
    assert result.exit_code == 1 and "no server is running" in result.output
    assert CliRunner().invoke(main, ["top", "localhost", "--data", str(tmp_path)]).exit_code == 2


def test_rates_are_those_between_two_looks() -> None:
    histogram = [0] * (BUCKETS + 1)
    before = Series([("c", 'messages_accepted_total{a="x"}', 10), ("s", "accept_seconds", histogram)])
    later = [*histogram]
    later[4] = 20
    after = Series(
        [
            ("c", 'messages_accepted_total{a="x"}', 20),
            ("c", 'messages_accepted_total{a="y"}', 10),
            ("g", 'sessions{a="x"}', 3),
            ("s", "accept_seconds", later),
        ]
    )
    sample = take_sample(before, after, 2.0)
    assert (sample.rates["accepted"], sample.gauges["sessions"]) == (10.0, 3)
    assert 0.00003 < sample.p99 < 0.00006
