"""Signals that operators and log rotation send: none but SIGTERM and SIGINT ends a server."""

from __future__ import annotations

import os
import re
import signal
import smtplib
import sys
import time
from pathlib import Path

import pytest
from bench import processes

from tests.e2e.running import serving
from tests.e2e.test_lifetime import wait_for_text

_ENDS: frozenset[int] = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGKILL})
_STOPS: frozenset[int] = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_ERRORS: frozenset[int] = frozenset(
    {signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGSYS}
)
"""Those of errors in a program."""


@pytest.mark.parametrize("command", ["serve", "sink"])
@pytest.mark.parametrize("workers", [1, 2])
def test_other_signals_end_no_session(tmp_path: Path, command: str, workers: int) -> None:
    with (
        serving(tmp_path, "", command, "--workers", str(workers)) as server,
        smtplib.SMTP("127.0.0.1", server.port) as client,
    ):
        client.ehlo("client.example")
        for number in sorted(signal.valid_signals() - _ENDS - _STOPS - _ERRORS):
            for pid in processes.family_of(server.process.pid):
                os.kill(pid, number)
        assert client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\nHello\r\n") == {}
        assert server.process.poll() is None


@pytest.mark.parametrize("workers", [1, 2])
def test_stacks_are_printed_while_threads_come_and_go(tmp_path: Path, workers: int) -> None:
    with serving(tmp_path, "", "serve", "--workers", str(workers)) as server:
        family = processes.family_of(server.process.pid)
        for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGQUIT) * 200:
            for pid in family:
                os.kill(pid, number)
            with smtplib.SMTP("127.0.0.1", server.port):  # takes about as long as a thread lives
                pass
        assert processes.family_of(server.process.pid) == family
        assert "most recent call first" in server.journal.read_text(errors="replace")
        assert server.stop() == 0


def is_blocked(pid: int, number: signal.Signals) -> bool:
    """Return whether a signal waits until the process wants it."""
    found = re.search(r"^SigBlk:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("command", "effect"),
    [(["serve", "--workers", "1"], "reloaded"), (["serve", "--workers", "2"], "reloaded"), (["sink"], "sink on")],
)
def test_signals_during_the_start_wait_for_its_end(tmp_path: Path, command: list[str], effect: str) -> None:
    out = tmp_path / "out"
    place = ["--data", str(tmp_path / "data")] if command[0] == "serve" else []
    words = [sys.executable, "-m", "penstock", *command, "--listen", "127.0.0.1:0", *place]
    with processes.started(words, out) as process:
        deadline = time.monotonic() + 60
        while not is_blocked(process.pid, signal.SIGHUP):
            assert process.poll() is None and time.monotonic() < deadline
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM):
            process.send_signal(number)
        assert out.read_text() == "", "it has not started yet"
        wait_for_text(out, effect)
        assert process.poll() is None
        assert processes.stop(process) == 0
