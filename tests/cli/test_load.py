"""`penstock load`: exit codes, reports, thresholds, comparison, profiles, workers."""

from __future__ import annotations

import errno
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from click.testing import CliRunner
from rich.console import Console
from rich.text import Text

from penstock.cli import load as module
from penstock.cli.main import main
from penstock.load.generator import Generator
from penstock.testing import SmtpServer
from tests.e2e.running import Server, serving
from tests.load.test_compare import report as compared


@pytest.fixture(scope="module")
def sink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("sink"), "", "sink") as server:
        yield server


def load(*arguments: str, code: int = 0) -> str:
    """Run the command; in this process if it sends nothing."""
    if code == 2 or "--compare" in arguments:
        result = CliRunner().invoke(main, ["load", *arguments])
        assert result.exit_code == code, result.output
        return result.output
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "load", *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_run_ends_with_a_table_and_a_json_report(sink: Server, tmp_path: Path) -> None:
    report = tmp_path / "a.json"
    out = load(sink.address, "--messages", "50", "--reuse", "--auth", "a:secret", "--report", str(report), code=1)
    assert "Refusals and errors" in out, "AUTH is not offered there"
    assert "secret" not in report.read_text()
    out = load(sink.address, "--messages", "50", "--reuse", "--report", str(report))
    assert "50 accepted" in out
    found = json.loads(report.read_bytes())
    assert (found["report"], found["schema"], found["accepted"]) == ("penstock load", 1, 50)
    assert found["phases"]["message"]["count"] == 50
    assert sum(count for phase, code, count in found["replies"] if phase == "dot" and code == 250) == 50


def test_reports_of_one_run_agree_and_are_self_contained(sink: Server, tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "a.html", tmp_path / "b.json"]
    options = [word for file in files for word in ("--report", str(file))]
    load(sink.address, "--messages", "20", "--helo", "a<b>&c.example", *options)
    assert files[0].read_bytes() == files[2].read_bytes()
    page = files[1].read_text()
    assert "<svg" in page
    assert "<dt>message</dt><dd>from the intended start (open loop) or the MAIL (closed loop)" in page
    assert "<dt>auth</dt>" not in page, "only measured phases are explained"
    assert "a&lt;b&gt;&amp;c.example" in page
    assert not re.search(r"<script|<link|src=|@import|url\(|https?://", page)
    out = load("--compare", str(files[0]), str(files[2]))
    assert "message.p99 ms" in out
    assert "No difference beyond the noise." in out
    (tmp_path / "c.json").write_text("{}")
    assert "is not a report" in load("--compare", str(files[0]), str(tmp_path / "c.json"), code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "missing target: penstock load HOST:PORT"),
        ("127.0.0.1:x", "a target looks like"),
        ("a..b:25", "a..b has no address"),
        ("T --size much", "--size is"),
        ("T --size 1 --size 2", "--size is given 2 times"),
        ("T --folder . --size 5", "--folder and --size are mutually exclusive"),
        ("T --reuse --per-connection 5", "--reuse and --per-connection are mutually exclusive"),
        ("T --to a\r\nRSET", "--to 'a\\r\\nRSET': not allowed in a command"),
        ("T --to postmaster --recipients 2", "before the @"),
        ("T --run A", "--run: a run must be"),
        ("T --source abc", "--source: 'abc'"),
        ("T --auth x", "--auth must be USER:PASSWORD"),
        ("T --ca-file . ", "--ca-file needs --tls"),
        ("T --no-resumption", "--no-resumption needs --tls"),
        ("T --rate nan", "--rate must be more than 0"),
        ("T --rate inf", "--rate"),
        ("T --duration 0", "--duration must be more than 0"),
        ("T --duration 5x", "a duration looks like 250us, 50ms, 10s, 5m or 2h"),
        ("T --warm-up 5s --duration 2s", "--warm-up must be shorter than"),
        ("T --rate 5 --think 1s", "--think is for a closed loop"),
        ("T --stages 10s", "stages look like 10s:100,60s:1000,10s:0"),
        ("T --stages 10s:-5", "stages look like"),
        ("T --stages 10s:5,", "stages look like"),
        ("T --stages :5", "a duration looks like"),
        ("T --stages 10s:0", "these stages start no message"),
        ("T --stages 10s:9999999", "the highest rate is 1,000,000/s"),
        ("T --stages 10s:5 --rate 5", "--stages replaces --rate, --ramp and --duration"),
        ("T --stages 10s:5 --duration 5s", "--stages replaces"),
        ("T --stages 10s:5 --ramp 5s", "--stages replaces"),
        ("T --threshold dot.p99<50", "a duration looks like"),
        ("T --threshold error_rate<5", "an error rate is at most 100%"),
        ("T --find-rate dot<5ms", "dot needs one of its statistics: dot.p50"),
        ("T --find-rate dot.p99<5ms --stages 1s:5", "--find-rate runs trials of --duration at a constant rate"),
        ("T --find-rate dot.p99<5ms --messages 5", "--find-rate runs trials"),
        ("T --workers 2 --sessions 1", "--workers 2 needs as many --sessions and --messages"),
        ("T --workers 2 --messages 1", "--workers 2 needs as many"),
        ("T --workers 0", "--workers"),
        ("T --report x.txt", "the name must end with .html or .json"),
        ("T --report /nowhere/x.json", "/nowhere/x.json cannot be written"),
        ("T --fail-on-regression 10%", "needs --compare"),
    ],
)
def test_usage_errors_name_the_option_and_the_right_form(words: str, said: str) -> None:
    arguments = ["127.0.0.1:1" if word == "T" else word for word in words.split(" ") if word]
    assert said in " ".join(load(*arguments, code=2).split())


def test_a_dead_target_is_an_error(tmp_path: Path) -> None:
    out = load(f"unix:{tmp_path}/nobody", "--messages", "1", "--sessions", "1", code=1)
    assert "enoent" in out


def test_options_of_smtp_source_have_counterparts() -> None:
    """smtp-source -s 3 -m 6 -l 2000 -d -r 2 -f a@x.org -t b@y.org -M me.example, and -L."""
    options = ["--sessions", "3", "--messages", "6", "--size", "2000", "--reuse", "--recipients", "2"]
    options += ["--from", "a@x.org", "--to", "b@y.org", "--helo", "me.example"]
    with SmtpServer() as server:
        load(f"127.0.0.1:{server.port}", *options)
        assert len(server.inbox) == 6
        for message in server.inbox:
            assert message.sender == "a@x.org"
            assert message.recipients == ("b0@y.org", "b1@y.org")
            assert message.hello == "me.example"
            assert abs(len(message.raw) - 2000) < 300
    with SmtpServer(lmtp=True) as server:
        load(f"127.0.0.1:{server.port}", "--lmtp", "--messages", "2")
        assert len(server.inbox) == 2


def test_messages_use_recipients_round_robin() -> None:
    with SmtpServer() as server:
        load(f"127.0.0.1:{server.port}", "--messages", "5", "--to", "a@x.org", "--to", "b@y.org", "--sessions", "1")
        assert [message.recipients for message in server.inbox] == [("a@x.org",), ("b@y.org",)] * 2 + [("a@x.org",)]


def test_an_unwritable_report_costs_nothing_else(sink: Server, tmp_path: Path) -> None:
    assert "cannot be written" in load(sink.address, "--report", str(tmp_path / "none" / "a.json"), code=2)
    full = tmp_path / "full.json"
    full.symlink_to("/dev/full")
    out = load(sink.address, "--messages", "5", "--report", str(full), code=1)
    assert "5 accepted" in out
    assert "No space left on device" in out


def test_a_message_with_a_refused_last_recipient_is_sent() -> None:
    plan = {"rule": [{"phase": "rcpt", "reply": "550 5.1.1 No", "match": {"recipient": ["load1@*"]}}]}
    with SmtpServer(faults=plan) as server:
        for words in ((), ("--bdat",), ("--pipeline",), ("--pipeline", "--bdat")):
            assert "4 accepted" in load(f"127.0.0.1:{server.port}", "--recipients", "2", "--messages", "4", *words)


def test_a_greeting_with_the_end_of_the_handshake_is_read() -> None:
    plan = {"rule": [{"phase": "connect", "tls": "tls-1.2"}]}
    with SmtpServer(tls="implicit", faults=plan) as server:
        words = ("--tls", "implicit", "--no-resumption", "--messages", "200", "--sessions", "20")
        assert "200 accepted" in load(f"127.0.0.1:{server.port}", *words)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_ends_the_run_with_a_report(tmp_path: Path, first: signal.Signals) -> None:
    report = tmp_path / "a.json"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-m", "penstock", "load", address, "--sessions", "1", "--report", str(report)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            client, _ = listener.accept()  # gets no greeting
            process.send_signal(first)
            process.send_signal(signal.SIGTERM)  # a second one of the same kind could merge with the first
            process.wait(60)
            assert process.stdout is not None
            out = process.stdout.read()
            client.close()
    assert process.returncode == 1, out
    assert "1,000 not started" in out
    assert json.loads(report.read_bytes())["unsent"] == 1000


def test_the_sink_takes_bdat_in_lmtp(tmp_path: Path) -> None:
    with serving(tmp_path, "", "sink", "-L") as server:
        words = ["--lmtp", "--bdat", "--recipients", "3", "--messages", "6", "--reuse"]
        assert "6 accepted" in load(server.address, *words)
        assert "6 accepted" in load(server.address, *words, "--pipeline")


def test_the_json_report_has_the_complete_timeline(sink: Server, tmp_path: Path) -> None:
    report = tmp_path / "a.json"
    load(sink.address, "--duration", "1.4s", "--sessions", "2", "--reuse", "--report", str(report))
    found = json.loads(report.read_bytes())
    timeline = found["timeline"]
    assert sum(row["accepted"] for row in timeline) == found["accepted"]
    assert sum(row["length"] for row in timeline) == pytest.approx(found["seconds"], abs=0.01)
    busy = [row for row in timeline if row["accepted"]]
    assert all(row["p99"] >= row["p50"] > 0 and row["dot_p99"] >= row["dot_p50"] > 0 for row in busy)


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("dot.p99<60s", 0),
        ("rate>0", 0),
        ("error_rate<0.1%", 0),
        ("dot.p99<1us", 1),
        ("rate>=1000000000", 1),
        ("tls.p50<1s", 1),
    ],
)
def test_thresholds_decide_the_exit_code(sink: Server, condition: str, code: int) -> None:
    out = load(sink.address, "--messages", "20", "--threshold", "message.max<60s", "--threshold", condition, code=code)
    assert ("VIOLATED" in out) is bool(code)


def test_a_refused_message_fails_the_run_whatever_the_thresholds_say() -> None:
    plan = {"rule": [{"phase": "rcpt", "reply": "550 5.1.1 No", "match": {"recipient": ["bad@*"]}}]}
    with SmtpServer(faults=plan) as server:
        options = ["--messages", "4", "--to", "good@x.org", "--to", "bad@x.org", "--threshold", "error_rate<=50%"]
        out = load(f"127.0.0.1:{server.port}", *options, code=1)
    assert "passed" in out


def test_a_regression_beyond_the_limit_fails_the_comparison(tmp_path: Path) -> None:
    fast, slow = str(tmp_path / "fast.json"), str(tmp_path / "slow.json")
    for path, latency in ((fast, 0.002), (slow, 0.05)):
        made = {"report": "penstock load", "schema": 1, **compared(latency)}
        Path(path).write_text(json.dumps({**made, "command": "penstock load"}))
    page, data = tmp_path / "c.html", tmp_path / "c.json"
    options = ["--fail-on-regression", "10%", "--report", str(page), "--report", str(data)]
    out = load("--compare", fast, slow, *options, code=1)
    assert "regression: dot.p50" in out
    assert "The second run is worse." in page.read_text()
    found = json.loads(data.read_bytes())
    assert found["verdict"] == "worse"
    assert set(found["regressions"]) == {"rate", "dot.p50", "dot.p99", "message.p50", "message.p99"}
    assert json.loads(load("--compare", fast, slow, "--json"))["changes"] == found["changes"]
    assert "better" in load("--compare", slow, fast, "--fail-on-regression", "10%")
    load("--compare", fast, fast, "--fail-on-regression", "10%")


def test_a_comparison_refuses_what_belongs_to_a_run(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    pair = ["--compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]
    assert "remove 127.0.0.1:25" in load(*pair, "127.0.0.1:25", code=2)
    assert "remove --messages" in load(*pair, "--messages", "5", code=2)
    assert "remove --threshold" in load(*pair, "--threshold", "rate>1", code=2)
    assert "remove --workers" in load(*pair, "--workers", "2", code=2)
    for wrong in ("10", "-1%", "%", "x%", ""):
        assert f"a percentage looks like 10%, not {wrong!r}" in load(*pair, "--fail-on-regression", wrong, code=2)
    assert "cannot be written" in load(*pair, "--report", str(tmp_path / "none" / "c.html"), code=2)


def test_stages_and_a_warm_up_shape_the_run(sink: Server, tmp_path: Path) -> None:
    report = tmp_path / "a.json"
    options = ["--stages", "0s:200,400ms:200,200ms:0", "--warm-up", "100ms", "--reuse", "--sessions", "4"]
    load(sink.address, *options, "--report", str(report))
    found = json.loads(report.read_bytes())
    warm_up = found["warm_up"]
    assert found["accepted"] + warm_up["accepted"] == 100
    assert found["phases"]["message"]["count"] == found["accepted"]


def test_several_workers_send_every_number_once(tmp_path: Path) -> None:
    report = tmp_path / "a.json"
    with SmtpServer() as server:
        address = f"127.0.0.1:{server.port}"
        for options, messages in (
            (["--messages", "50"], 50),
            (["--rate", "100", "--duration", "0.5"], 50),
            (["--rate", "5", "--duration", "0.2"], 1),
        ):
            server.inbox.clear()
            load(address, *options, "--workers", "3", "--sessions", "7", "--run", "r", "--report", str(report))
            assert numbers_of(server) == list(range(1, messages + 1))
            found = json.loads(report.read_bytes())
            assert found["accepted"] == found["phases"]["message"]["count"] == messages
            assert sum(count for _, count in found["phases"]["dot"]["histogram"]["buckets"]) == messages
            assert sum(row["accepted"] for row in found["timeline"]) == messages


def test_several_workers_leave_no_gap_when_the_time_decides() -> None:
    with SmtpServer() as server:
        command = [sys.executable, "-m", "penstock", "load", f"127.0.0.1:{server.port}", "--duration", "600"]
        command += ["--workers", "3", "--sessions", "7", "--run", "r"]
        with subprocess.Popen(command) as process:
            try:
                server.inbox.wait(10, timeout=60)
            finally:
                process.send_signal(signal.SIGINT)
        numbers = numbers_of(server)
    assert numbers == list(range(1, len(numbers) + 1))


def numbers_of(server: SmtpServer) -> list[int]:
    return sorted(int(message.sender.removeprefix("seq-r-").partition("@")[0]) for message in server.inbox)


def test_workers_report_errors_and_signals_like_one_process(tmp_path: Path) -> None:
    assert "a..b has no address" in load("a..b:25", "--workers", "2", code=2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-m", "penstock", "load", address, "--sessions", "2", "--workers", "2", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            clients = [listener.accept()[0] for _ in range(2)]
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=60)
            for client in clients:
                client.close()
    found = json.loads(out)
    assert (process.returncode, found["interrupted"], found["unsent"]) == (1, True, 1000)


def test_the_search_finds_a_rate_below_that_of_the_server(tmp_path: Path) -> None:
    report = tmp_path / "a.json"
    with SmtpServer(faults={"rule": [{"phase": "dot", "delay": {"seconds": 0.01}}]}) as server:
        options = ["--find-rate", "dot.p99<2s", "--duration", "0.5", "--sessions", "1", "--reuse", "--rate", "20"]
        out = load(f"127.0.0.1:{server.port}", *options, "--report", str(report))
    found = json.loads(report.read_bytes())
    tags = [each.sender for each in server.inbox]
    assert 0 < found["sustainable_rate"] <= 140, "one session with a delay of 10 ms sends at most 100 per second"
    assert len(tags) == len(set(tags)), "each trial is a run of its own"
    assert not all(each["passed"] for each in found["search"])
    assert "highest sustainable rate" in out


def test_a_condition_that_no_rate_meets_is_a_failure(sink: Server) -> None:
    options = ["--find-rate", "dot.p99<1us", "--duration", "0.1", "--rate", "2"]
    assert "not sustained" in load(sink.address, *options, code=1)


class ClosedTerminal(StringIO):
    """A terminal that was closed while the progress was shown."""

    is_closed = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.is_closed:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("is_terminal", [True, False])
async def test_a_closed_terminal_does_not_end_the_run(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    monkeypatch.setattr(module, "_progress", lambda _: Text("progress"))
    terminal = ClosedTerminal()
    console = Console(file=terminal, force_terminal=is_terminal)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(module._show, cast("module.Runner", None), console, True)
        await trio.sleep(0.05)
        terminal.is_closed = True
        await trio.sleep(3)
        nursery.cancel_scope.cancel()
    assert ("progress" in terminal.getvalue()) is is_terminal


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_violated_threshold_can_stop_the_run(sink: Server, tmp_path: Path, workers: str) -> None:
    file, page = tmp_path / "a.json", tmp_path / "a.html"
    options = ("--duration", "600", "--sessions", "2", "--workers", workers, "--abort-on-threshold")
    thresholds = ("--threshold", "session.p99<1us", "--threshold", "dot.p50<1us", "--threshold", "error_rate<1%")
    out = load(
        sink.address, *options, *thresholds, "--think", "0.1s", "--reuse", "--report", str(file), "--report", str(page),
        code=1,
    )  # fmt: skip
    found = json.loads(file.read_bytes())
    assert (found["aborted_by"], found["interrupted"]) == ("dot.p50<1us", True)
    assert "stopped: dot.p50<1us was violated" in out
    assert "stopped: dot.p50&lt;1us was violated" in page.read_text()


def test_a_run_stopped_by_a_threshold_fails_even_if_it_holds_later(
    sink: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recovering(Generator):
        def so_far(self) -> dict[str, Any] | None:
            return {"rate": 0.0} if self.counts.accepted else None

    monkeypatch.setattr(module, "Generator", Recovering)
    options = ["--duration", "600", "--think", "0.1s", "--threshold", "rate>0", "--abort-on-threshold", "--json"]
    result = CliRunner().invoke(main, ["load", sink.address, *options])
    found = json.loads(result.stdout)
    assert found["rate"] > 0
    assert found["thresholds"] == [{"threshold": "rate>0", "value": 0.0, "passed": False, "shown": "0.0/s"}]
    assert (found["aborted_by"], result.exit_code) == ("rate>0", 1)


@pytest.mark.parametrize("options", [(), ("--threshold", "rate>1", "--find-rate", "dot.p99<1s")])
def test_nothing_can_stop_a_run_without_thresholds(options: tuple[str, ...]) -> None:
    assert "--abort-on-threshold needs --threshold" in load("127.0.0.1:25", "--abort-on-threshold", *options, code=2)
