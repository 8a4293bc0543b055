"""`penstock load`: exit codes, reports, comparison."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.testing import SmtpServer
from tests.e2e.running import Server, serving


@pytest.fixture(scope="module")
def sink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("sink"), "", "sink") as server:
        yield server


def load(*words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "load", *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_run_ends_with_a_table_and_a_json_report(sink: Server, tmp_path: Path) -> None:
    report = tmp_path / "a.json"
    out = load(sink.address, "--messages", "50", "--reuse", "--auth", "a:secret", "--report", str(report), code=1)
    assert "not as it should be" in out, "AUTH is not offered there"
    assert "secret" not in report.read_text()
    out = load(sink.address, "--messages", "50", "--reuse", "--report", str(report))
    assert "50 accepted" in out
    told = json.loads(report.read_bytes())
    assert (told["report"], told["schema"], told["accepted"]) == ("penstock load", 1, 50)
    assert told["phases"]["message"]["count"] == 50
    assert sum(count for phase, code, count in told["replies"] if phase == "dot" and code == 250) == 50


def test_a_page_needs_nothing_but_itself(sink: Server, tmp_path: Path) -> None:
    report = tmp_path / "run.html"
    load(sink.address, "--messages", "20", "--report", str(report), "--helo", "a<b>&c.example")
    page = report.read_text()
    assert "<svg" in page
    assert "<dt>message</dt><dd>from the intended start (open loop) or the MAIL (closed loop)" in page
    assert "<dt>auth</dt>" not in page, "only what was timed is explained"
    assert "a&lt;b&gt;&amp;c.example" in page
    assert not re.search(r"<script|<link|src=|@import|url\(|https?://", page)


def test_two_reports_are_compared(sink: Server, tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        load(sink.address, "--messages", "20", "--report", str(tmp_path / name))
    out = load("--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert "message p99 ms" in out
    (tmp_path / "c.json").write_text("{}")
    assert "no report" in load("--compare", str(tmp_path / "a.json"), str(tmp_path / "c.json"), code=2)


def test_wrong_words_are_named() -> None:
    assert "HOST:PORT" in load(code=2)
    assert "a target looks like" in load("127.0.0.1:x", code=2)
    assert "a..b has no address" in load("a..b:25", code=2)
    assert "--size is" in load("127.0.0.1:1", "--size", "much", code=2)
    assert "--to 'a@b\\r\\nRSET': this can not stand in a command" in load("127.0.0.1:1", "--to", "a@b\r\nRSET", code=2)
    assert "--run: a run must be" in load("127.0.0.1:1", "--run", "A b", code=2)
    assert "--source: 'abc'" in load("127.0.0.1:1", "--source", "abc", code=2)
    assert "before the @" in load("127.0.0.1:1", "--to", "postmaster", "--recipients", "2", code=2)
    assert ".html or .json" in load("127.0.0.1:1", "--report", "x.txt", code=2)


def test_a_dead_target_is_an_error(tmp_path: Path) -> None:
    out = load(f"unix:{tmp_path}/nobody", "--messages", "1", "--sessions", "1", code=1)
    assert "enoent" in out


def test_the_words_of_smtp_source_have_their_counterparts() -> None:
    """smtp-source -s 3 -m 6 -l 2000 -d -r 2 -f a@x.org -t b@y.org -M me.example, and -L."""
    words = ["--sessions", "3", "--messages", "6", "--size", "2000", "--reuse", "--recipients", "2"]
    words += ["--from", "a@x.org", "--to", "b@y.org", "--helo", "me.example"]
    with SmtpServer() as server:
        load(f"127.0.0.1:{server.port}", *words)
        assert len(server.inbox) == 6
        for message in server.inbox:
            assert message.sender == "a@x.org"
            assert message.recipients == ("b0@y.org", "b1@y.org")
            assert message.hello == "me.example"
            assert abs(len(message.raw) - 2000) < 300
    with SmtpServer(lmtp=True) as server:
        load(f"127.0.0.1:{server.port}", "--lmtp", "--messages", "2")
        assert len(server.inbox) == 2


def test_messages_take_recipients_in_turn() -> None:
    with SmtpServer() as server:
        load(f"127.0.0.1:{server.port}", "--messages", "5", "--to", "a@x.org", "--to", "b@y.org", "--sessions", "1")
        assert [message.recipients for message in server.inbox] == [("a@x.org",), ("b@y.org",)] * 2 + [("a@x.org",)]


def test_a_report_that_can_not_be_written_costs_nothing_else(sink: Server, tmp_path: Path) -> None:
    assert "can not be written" in load(sink.address, "--report", str(tmp_path / "none" / "a.json"), code=2)
    full = tmp_path / "full.json"
    full.symlink_to("/dev/full")
    out = load(sink.address, "--messages", "5", "--report", str(full), code=1)
    assert "5 accepted" in out
    assert "No space left on device" in out


def test_a_message_is_sent_when_the_last_of_its_recipients_is_refused() -> None:
    plan = {"rule": [{"phase": "rcpt", "reply": "550 5.1.1 No", "match": {"recipient": ["load1@*"]}}]}
    with SmtpServer(faults=plan) as server:
        for words in ((), ("--bdat",), ("--pipeline",), ("--pipeline", "--bdat")):
            assert "4 accepted" in load(f"127.0.0.1:{server.port}", "--recipients", "2", "--messages", "4", *words)


def test_a_greeting_that_comes_with_the_end_of_the_handshake_is_heard() -> None:
    plan = {"rule": [{"phase": "connect", "tls": "tls-1.2"}]}
    with SmtpServer(tls="implicit", faults=plan) as server:
        words = ("--tls", "implicit", "--no-resumption", "--messages", "200", "--sessions", "20", "--timeout", "20")
        assert "200 accepted" in load(f"127.0.0.1:{server.port}", *words)


def test_a_second_signal_ends_the_run_with_all_that_is_known(tmp_path: Path) -> None:
    report = tmp_path / "a.json"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-m", "penstock", "load", address, "--sessions", "1", "--report", str(report)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            client, _ = listener.accept()  # who hears nothing
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)  # a second one of the same kind could melt into the first
            process.wait(60)
            assert process.stdout is not None
            out = process.stdout.read()
            client.close()
    assert process.returncode == 1, out
    assert "1,000 never begun" in out
    assert json.loads(report.read_bytes())["unsent"] == 1000


def test_the_sink_takes_bdat_in_lmtp(tmp_path: Path) -> None:
    with serving(tmp_path, "", "sink", "-L") as server:
        words = ["--lmtp", "--bdat", "--recipients", "3", "--messages", "6", "--reuse"]
        assert "6 accepted" in load(server.address, *words)
        assert "6 accepted" in load(server.address, *words, "--pipeline")
