"""Start programs, and stop all of them: at the end, after an error, at Ctrl-C and at SIGTERM.

SIGTERM and SIGHUP would end Python without running any `finally`; while a program runs, they raise SystemExit instead,
and no signal can come between the start of a program and the block that stops it. Children that a program leaves
behind are stopped, too: the script that starts Postfix does not stop it.
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
    with handling_signals(), log.open("ab") as output, (errors or log).open("ab") as error_output:
        process = None
        try:
            with _deferring_signals():  # one that comes while the program starts must not lose it
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=error_output, env=environment, cwd=folder
                )
            yield process
        finally:
            if process is not None:
                with _deferring_signals():
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


class _Signals:
    """The signals that end a benchmark. While `deferrals` is not 0 they are kept in `pending`."""

    numbers: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    defaults: Final = (signal.SIG_DFL, signal.default_int_handler)
    deferrals = 0
    pending = 0

    @classmethod
    def handle(cls, number: int, _: FrameType | None = None) -> None:
        """Raise KeyboardInterrupt or SystemExit, now or later."""
        if cls.deferrals:
            cls.pending = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)


@contextmanager
def _deferring_signals() -> Iterator[None]:
    _Signals.deferrals += 1
    try:
        yield
    finally:
        _Signals.deferrals -= 1
    if _Signals.pending and not _Signals.deferrals:
        number, _Signals.pending = _Signals.pending, 0
        _Signals.handle(number)


@contextmanager
def handling_signals() -> Iterator[None]:
    """Handle the signals, unless something else does already, such as an outer block or trio."""
    replaced = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _Signals.numbers}
        replaced = {number: handler for number, handler in handlers.items() if handler in _Signals.defaults}
    for number in replaced:
        signal.signal(number, _Signals.handle)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
