"""The messages of a run: which one is started next, and whether there will be more. No waiting.

This file is compiled as it stands (jobs.pxd has the C types): a session asks for every message and every connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.load.texts import Text, TextOf


class Job:
    """A message to send."""

    def __init__(self, number: int, text: Text, intended: int) -> None:
        self.number = number
        self.text = text
        self.intended = intended
        """When it was to start, in nanoseconds of the clock; 0 in a closed loop."""


class JobSource:
    """Hands out the messages of a run, `total` of them or without end.

    In an open loop a message can be taken once it is due (`intended`).
    """

    def __init__(self, total: int | None, number: Callable[[], int], text_of: TextOf, *, is_open_loop: bool) -> None:
        """`number` returns the number of the next message, `text_of` the text of the message with a number."""
        self._total = -1 if total is None else total
        self._number = number
        self._text_of = text_of
        self._is_open_loop = is_open_loop
        self.started = 0
        """Messages that were given to a session."""
        self.promised = 0
        """Sessions that connect and have not asked for a message yet."""
        self.is_stopping = False
        """No more messages are started."""
        self.is_pacing = is_open_loop
        """There are messages that are not due yet."""
        self.intended: deque[int] = deque()
        """Intended starts of the messages that are due and wait for a session."""

    @property
    def has_more(self) -> bool:
        """Not all messages were started."""
        return not self.is_stopping and self.started != self._total

    def take(self) -> Job | None:
        """Return the next message; None if no message is waiting."""
        if self.is_stopping or self.started == self._total:
            return None
        intended = 0
        if self._is_open_loop:
            if not self.intended:
                return None
            intended = self.intended.popleft()
        self.started += 1
        number = self._number()
        return Job(number, self._text_of(number), intended)

    def has_work(self) -> bool:
        """Return whether a new connection will get a message, now or later."""
        if self.is_stopping:
            return False
        if self.is_pacing:
            return True
        if self._is_open_loop:
            return len(self.intended) > self.promised
        return self._total < 0 or self.started + self.promised < self._total
