"""Journal lines on their way to standard error: a full disk, or a pipe that nobody reads, costs lines and not the mail.

A write may wait for ever, and nothing in the loop can take it back. So a thread of its own writes; what is not written
when the process ends, it takes along.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable
from typing import Final

_MOST_WAITING: Final = 8 << 20
"""Octets that may wait; what comes on top of them is dropped. One hand-over may be larger than that."""
_PATIENCE: Final = 2.0
"""Seconds that the last lines have, at the end."""
_PIECE: Final = select.PIPE_BUF
"""Octets that a pipe takes without letting another writer come between (POSIX): the room of some lines."""


def stderr() -> int:
    """Return the descriptor of standard error; -1 when it is closed, or is no file."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # Python has None for a stream that was closed before it began
        return -1


class JournalWriter:
    """Writes lines in a thread, in their order: call it with whole lines. A call neither waits nor raises.

    Lines that find no room, or can not be written, are counted; how many is said in a line, where they are missing, as
    soon as lines can be written again.
    """

    def __init__(self, descriptor: int, tell_dropped: Callable[[int], bytes], *, is_shared: bool = False) -> None:
        """`tell_dropped` makes the line that says how many are missing; it is called in the thread.

        `is_shared`: other processes write there, too, and no line is to be torn by theirs.
        """
        self._descriptor = descriptor
        self._tell_dropped = tell_dropped
        self._is_shared = is_shared
        self._changed = threading.Condition()
        self._waiting: list[bytes] = []
        self._octets = 0
        """Of what waits."""
        self._dropped = 0
        """Lines that came when there was no room, behind those that wait."""
        self._is_over = False
        self._rest = b""
        """What is left to write of a line that was begun."""
        # A daemon: the interpreter does not wait for a write that does not end.
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def __call__(self, lines: bytes) -> None:
        """Take lines over."""
        if not lines:
            return
        with self._changed:
            # Once lines are missing, those that follow are, too, until the thread comes: the gap has one place.
            if self._dropped or self._octets >= _MOST_WAITING:
                self._dropped += lines.count(b"\n")
                return
            self._waiting.append(lines)
            self._octets += len(lines)
            self._changed.notify()

    def close(self, patience: float = _PATIENCE) -> None:
        """Write what waits, within so many seconds; then give it up."""
        with self._changed:
            self._is_over = True
            self._changed.notify()
        self._thread.join(patience)

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
            missing = self._tell(missing)
            missing += self._put(b"".join(waiting))
            missing = self._tell(missing + dropped)

    def _tell(self, missing: int) -> int:
        """Write how many lines are missing, if any are. Return how many are still to be told."""
        return missing if missing and self._put(self._tell_dropped(missing)) else 0

    def _put(self, lines: bytes) -> int:
        """Write lines, behind what is left of one that was begun. Return how many could not even be begun."""
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
        """Write some of a text. Return how many octets. Raise OSError."""
        end = len(text)
        if self._is_shared:
            end = text.rfind(b"\n", start, start + _PIECE) + 1 or text.find(b"\n", start) + 1 or end
        try:
            return os.write(self._descriptor, memoryview(text)[start:end])
        except BlockingIOError:  # whoever has started us does not block
            select.select([], [self._descriptor], [])
            return 0
