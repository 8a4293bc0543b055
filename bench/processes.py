"""Start programs, and stop whatever was started: at the end, after an error, at Ctrl-C and at SIGTERM.

SIGTERM and SIGHUP would end Python without running any `finally`; while a program runs, they raise SystemExit instead.
A program that does not end its own children has them ended here: the script that starts Postfix is one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

ENVIRONMENT: Final = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
"""The environment of programs; Debian has mail servers in /usr/sbin."""
_GRACE: Final = 20.0
"""Seconds between SIGTERM and SIGKILL."""


def family_of(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [pid]
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in task.read_text().split():
                found += family_of(int(child))
    return found


@contextmanager
def started(
    command: Sequence[str],
    log: Path,
    *,
    errors: Path | None = None,
    folder: Path | None = None,
    environment: Mapping[str, str] = ENVIRONMENT,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the end of the block. Its output goes to the log, its standard error to `errors` if given."""
    for file in {log, errors or log}:
        file.write_bytes(b"")
    with _stopping_on_signals(), log.open("ab") as output, (errors or log).open("ab") as error_output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=error_output, env=environment, cwd=folder
        )
        try:
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes], grace: float = _GRACE) -> int:
    """Stop a program and its descendants, first with SIGTERM, later with SIGKILL. Return its exit code."""
    family = {pid: _start_of(pid) for pid in family_of(process.pid)}
    if process.poll() is None:
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _living(family):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + grace
        while _living(family) and time.monotonic() < deadline:
            process.poll()
            time.sleep(0.02)
    return process.wait()


def _living(family: Mapping[int, str]) -> list[int]:
    """Return those that still run: the same number with another start time is another process."""
    return [pid for pid, start in family.items() if start and _start_of(pid) == start]


def _start_of(pid: int) -> str:
    """Return the start time of a process, "" for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


@contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit, unless something handles them already."""

    def stop_here(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    changed = []
    if threading.current_thread() is threading.main_thread():
        changed = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    for each in changed:
        signal.signal(each, stop_here)
    try:
        yield
    finally:
        for each in changed:
            signal.signal(each, signal.SIG_DFL)
