"""What the benchmarks start, they stop."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench import processes

PROGRAM = ["sh", "-c", "sleep 600 & echo $!; exec sleep 600"]
"""A program with a child that outlives it."""


def child_of(log: Path) -> int:
    """Return the child that the program reports; its log is empty at first."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if log.exists() and (text := log.read_text()).endswith("\n"):
            return int(text)
    raise AssertionError("the program has not started")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_program_and_its_children_are_stopped_at_the_end(tmp_path: Path) -> None:
    with processes.started(PROGRAM, tmp_path / "log") as process:
        child = child_of(tmp_path / "log")
        assert is_running(child)
        assert processes.family_of(process.pid) == [process.pid, child]
    assert process.returncode == -signal.SIGTERM
    assert not is_running(child)


def test_a_program_is_stopped_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="it failed"), processes.started(PROGRAM, tmp_path / "log") as process:
        child = child_of(tmp_path / "log")
        raise RuntimeError("it failed")
    assert process.returncode is not None
    assert not is_running(child)


def test_a_program_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    with processes.started(
        ["sh", "-c", "trap '' TERM; echo 1; while :; do sleep 1; done"], tmp_path / "log"
    ) as process:
        child_of(tmp_path / "log")
        assert processes.stop(process, grace=0.1) == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_benchmark_stops_what_it_started(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import pathlib, time\nfrom bench.processes import started\n"
        f"with started({PROGRAM}, pathlib.Path({str(log)!r})):\n    time.sleep(600)"
    )
    benchmark = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, cwd=Path(__file__).parent.parent
    )
    child = child_of(log)
    benchmark.send_signal(number)
    assert benchmark.wait() != 0
    assert not is_running(child)
