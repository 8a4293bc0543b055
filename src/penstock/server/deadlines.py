"""The timeouts of connections, and the one task that checks all of them."""

from __future__ import annotations

import math
from typing import Any, Final, Protocol

import trio

from penstock import reply as replies
from penstock.reply import Reply
from penstock.server.limits import LimitSettings


class Deadlines:
    """The timeouts of one connection: idle, text without progress, slow text, whole session (never armed again).

    Only the sweeper checks them: a session counts its commands and octets and spends nothing on time. A
    timeout may thus be up to two rounds of the sweeper late, and is never early.
    """

    __slots__ = (
        "_commands", "_idle_at", "_limits", "_octets", "_progress_at", "_session_at", "_shortened_to", "_text",
        "_text_began_at", "_text_octets",
    )  # fmt: skip

    def __init__(self, limits: LimitSettings, now: float) -> None:
        self._limits = limits
        self._commands = 0
        self._text = 0
        self._octets = 0
        self._text_octets = 0
        """Octets received on the connection before the text."""
        self._text_began_at = math.inf
        self._progress_at = math.inf
        """When more of the text must have been received."""
        self._idle_at = now + limits.command_timeout
        self._shortened_to = math.inf
        self._session_at = now + limits.session_timeout

    def expired(self, now: float, commands: int, text: int, octets: int) -> Reply | None:
        """Return the final reply for a connection that has taken too long.

        `commands` counts the lines that are complete: a client that sends an octet from time to time is idle. `text`
        is the number of the text that is being received, 0 without one; `octets` are those received so far.
        """
        is_late = False
        if text:
            if text != self._text:
                self._text_began_at, self._text_octets = now, octets
                self._progress_at = now + self._limits.data_timeout
            elif octets != self._octets:
                self._progress_at = now + self._limits.data_timeout
            self._idle_at = now + self._limits.command_timeout  # for the commands after it
            is_late = now >= min(self._progress_at, self._shortened_to) or self._is_slow(now, octets)
            reply = replies.DATA_TIMEOUT
        else:
            if commands != self._commands:
                self._idle_at = now + self._limits.command_timeout
            is_late, reply = now >= self._idle_at, replies.IDLE_TIMEOUT
        self._text, self._commands, self._octets = text, commands, octets
        if now >= self._session_at and not (text and octets):
            return replies.SESSION_TIMEOUT
        return reply if is_late else None

    def _is_slow(self, now: float, octets: int) -> bool:
        """Return whether the average rate of the text is below `data_rate`, after the first `data_timeout`."""
        seconds = now - self._text_began_at
        return seconds > self._limits.data_timeout and octets - self._text_octets < seconds * self._limits.data_rate

    def stand_still(self, seconds: float) -> None:
        """Extend all timeouts: the server kept the client waiting on purpose."""
        self._idle_at += seconds
        self._progress_at += seconds
        self._text_began_at += seconds
        self._session_at += seconds

    def shorten_data(self, at: float) -> None:
        """Expire the text that is being received at this time, unless it expires earlier."""
        self._shortened_to = at


class HasDeadlines(Protocol):
    """What the sweeper checks."""

    def check_deadlines(self, now: float, /) -> None:
        """End the connection when one of its timeouts is over."""


_AT_A_TIME: Final = 500
"""Connections that the sweeper checks before it yields to the sessions."""


class Sweeper:
    """One task that checks the timeouts of all connections: cheaper than a cancel scope for each wait."""

    def __init__(self, shortest_timeout: float) -> None:
        """Check every second, or four times in the shortest timeout."""
        self.look_for(shortest_timeout)
        self.watched: set[Any] = set()
        """The connections to check (each a `HasDeadlines`); connections add and remove themselves."""

    def look_for(self, shortest_timeout: float) -> None:
        """Check every second, or four times in the shortest timeout."""
        self._interval = max(0.05, min(1.0, shortest_timeout / 4))

    async def run(self) -> None:
        """Check periodically, until cancelled."""
        while True:
            await trio.sleep(self._interval)
            now = trio.current_time()
            for number, connection in enumerate(list(self.watched), 1):
                connection.check_deadlines(now)
                if number % _AT_A_TIME == 0:
                    await trio.lowlevel.checkpoint()
