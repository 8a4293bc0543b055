"""Statistics of a sink in its own process: report, missing and duplicate messages, kept messages, terminal."""

from __future__ import annotations

import json
import mailbox
import re
import smtplib
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from penstock.cli.main import main
from penstock.sink.report import decode
from tests.e2e.running import Server, serving

TEXT = "Subject: hello\r\nX-Count: {}\r\n\r\nhi\r\n"


def send(server: Server, *numbers: int, sender: str = "seq-run-{}@example.com", to: str = "u{}@example.org") -> None:
    with smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client:
        for number in numbers:
            client.sendmail(sender.format(number), [to.format(number)], TEXT.format(number))


def test_the_report_accounts_for_every_message(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    with serving(tmp_path / "data", "", "sink", "--report", str(file), "--expect", "5") as server:
        send(server, 1, 2, 3, 4, 5)
        assert server.stop() == 0
    report = decode(file.read_bytes())
    assert (report.messages.accepted, report.sessions.total, report.sessions.ends) == (5, 1, {"QUIT": 1})
    assert report.sequences.runs[0].missing == report.sequences.runs[0].duplicates == 0
    assert report.latencies["message"].count == 5
    assert report.samples
    assert report.octets.received > 5 * len(TEXT)


@pytest.mark.parametrize("numbers", [(1, 2), (1, 2, 3, 3), ()])
def test_missing_or_duplicate_messages_set_the_exit_code(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    with serving(tmp_path / "data", "", "sink", "--expect", "3") as server:
        send(server, *numbers)
        assert server.stop() == 1
        assert "missing or duplicated" in server.journal.read_text()


@pytest.mark.parametrize(
    "options", [("--sequence-header", "x-count"), ("--sequence-recipient", r"^u(\d+)@")], ids=["header", "recipient"]
)
def test_sequence_numbers_are_read_where_requested(tmp_path: Path, options: tuple[str, ...]) -> None:
    with serving(tmp_path / "data", "", "sink", "--report", "-", "--expect", "4", *options) as server:
        send(server, 1, 2, 4, 4, sender="a@example.com")
        assert server.stop() == 1
        report = json.loads(server.out.read_text())
    (run,) = report["sequences"]["runs"]
    assert (run["missing_examples"], run["duplicate_examples"]) == ([3], [4])


def test_keep_writes_to_every_store(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "", "sink", "--keep", f"mbox:{tmp_path / 'box'}", "--keep", "last:1") as server:
        send(server, 1, 2, 3)
        with closing(mailbox.mbox(tmp_path / "box")) as box:
            assert len(box) == 3  # every message answered with 250 is in the file
        assert server.stop() == 0


def test_top_shows_a_running_sink(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "", "sink", "--web", "127.0.0.1:0", "--counters") as server:
        send(server, 1, 2)
        url = re.search(r"live page at (\S+)", server.journal.read_text())
        assert url is not None
        command = [sys.executable, "-m", "penstock", "top", url[1], "--once"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert "2 total" in shown
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--keep", "zip:x"], "last:N"),
        (["--sequence-header", "X Y"], "is not a header field name"),
        (["--sequence-recipient", "("], "not a regular expression"),
        (["--sequence-header", "X", "--sequence-recipient", "(.)"], "mutually exclusive"),
        (["--web", "0.0.0.0:0"], "needs a token"),
        (["--web", "127.0.0.1:0", "--web-token", "short"], "8 to 128"),
        (["--web", "nonsense"], "looks like"),
        (["--no-receipts", "--report", "x"], "cannot be combined with options"),
    ],
)
def test_conflicting_options_are_reported(options: list[str], why: str) -> None:
    result = CliRunner().invoke(main, ["sink", "--listen", "127.0.0.1:0", *options])
    assert result.exit_code == 2
    assert why in result.output


def test_the_schema_of_the_report_is_printed() -> None:
    result = CliRunner().invoke(main, ["sink", "--describe-report"])
    assert result.exit_code == 0
    assert "penstock-receipts" in json.dumps(json.loads(result.output))
