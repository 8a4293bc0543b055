"""Writing the journal to standard error: a full disk or a pipe without a reader costs lines, never mail.

A blocking write may never return and cannot be cancelled, so a separate thread writes. Lines that it has not written
when the process ends are lost.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from typing import Final

_MOST_WAITING: Final = 8 << 20
"""Octets that may wait to be written; lines beyond that are dropped. A single call may exceed it."""
_CLOSE_TIMEOUT: Final = 2.0
"""Seconds that the last lines have to be written."""
_ATOMIC: Final = select.PIPE_BUF
"""Octets that POSIX writes to a pipe without interleaving them with those of another process."""


class JournalWriter:
    """Writes lines in a thread, in order. Call it with whole lines; a call neither blocks nor raises.

    Lines that do not fit or cannot be written are counted, and a line with their number takes their place as soon as
    lines can be written again.
    """

    def __init__(self, descriptor: int, tell_dropped: Callable[[int], bytes], *, is_shared: bool = False) -> None:
        """`tell_dropped` makes the line about dropped lines; it is called in the thread.

        `is_shared`: other processes write to the same descriptor, so lines must be written atomically.
        """
        self._descriptor = descriptor
        self._tell_dropped = tell_dropped
        self._is_shared = is_shared
        self._changed = threading.Condition()
        self._waiting: list[bytes] = []
        self._octets = 0
        """Octets of `_waiting`."""
        self._dropped = 0
        """Lines dropped after those in `_waiting`."""
        self._is_over = False
        self._rest = b""
        """The unwritten part of a line that was begun."""
        # A daemon thread: the interpreter does not wait for a write that never returns.
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def __call__(self, lines: bytes) -> None:
        """Queue lines for writing."""
        if not lines:
            return
        with self._changed:
            # Once a line is dropped, so are all others until the thread has caught up: there is one gap, not many.
            if self._dropped or self._octets >= _MOST_WAITING:
                self._dropped += lines.count(b"\n")
                return
            self._waiting.append(lines)
            self._octets += len(lines)
            self._changed.notify()

    def close(self, timeout: float = _CLOSE_TIMEOUT) -> None:
        """Write the waiting lines; give up after `timeout` seconds."""
        with self._changed:
            self._is_over = True
            self._changed.notify()
        self._thread.join(timeout)

    # ---- the thread

    def _run(self) -> None:
        missing = 0
        is_over = False
        while not is_over:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_over)
                waiting, dropped, is_over = self._waiting, self._dropped, self._is_over
                self._waiting = []
                self._octets = self._dropped = 0
            missing = self._report(missing)
            missing += self._write_lines(b"".join(waiting))
            missing = self._report(missing + dropped)

    def _report(self, missing: int) -> int:
        """Write the line about missing lines, if any. Return how many remain to be reported."""
        return missing if missing and self._write_lines(self._tell_dropped(missing)) else 0

    def _write_lines(self, lines: bytes) -> int:
        """Write lines, after the rest of one that was begun. Return how many could not be begun."""
        text = self._rest + lines
        written = 0
        try:
            while written < len(text):
                written += self._write(text, written)
        except OSError:
            end = text.find(b"\n", written - 1) + 1 if written else len(self._rest)
            self._rest = text[written:end]
            return text.count(b"\n", end)
        self._rest = b""
        return 0

    def _write(self, text: bytes, start: int) -> int:
        """Write the beginning of a text. Return the number of octets written. Raise OSError."""
        end = len(text)
        if self._is_shared:
            end = text.rfind(b"\n", start, start + _ATOMIC) + 1 or text.find(b"\n", start) + 1 or end
        try:
            return os.write(self._descriptor, memoryview(text)[start:end])
        except BlockingIOError:  # the descriptor was inherited in non-blocking mode
            select.select([], [self._descriptor], [])
            return 0
