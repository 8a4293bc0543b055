"""Limits: who may come in, how long it may take, and how often a password may be wrong.

Every counter here is bounded: what is remembered of networks is forgotten after its window, and at most
`_MOST_NETWORKS` are remembered at all.
"""

from __future__ import annotations

import functools
import ipaddress
import math
from collections.abc import Callable
from typing import Annotated, Any, Final, Protocol

import msgspec
import trio

from penstock import reply as replies
from penstock.reply import Reply

_MOST_NETWORKS: Final = 100_000
_MINUTE: Final = 60.0


class LimitSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client may do on a connection of a listener."""

    recipients: Annotated[
        int, msgspec.Meta(ge=100, description="Recipients of a message; at least 100 (RFC 5321 4.5.3.1.8)")
    ] = 1000
    messages: Annotated[int, msgspec.Meta(ge=0, description="Messages of a connection (RFC 9422); 0 is no limit")] = 0
    errors: Annotated[int, msgspec.Meta(ge=1, description="Commands answered with 5yz before 421 4.7.0")] = 20
    unknown_recipients: Annotated[
        int, msgspec.Meta(ge=1, description="Recipients refused with 5yz before 421 4.7.0")
    ] = 50
    auth_failures: Annotated[
        int, msgspec.Meta(ge=1, description="Wrong passwords on a connection before 421 4.7.0")
    ] = 3
    command_timeout: Annotated[
        float, msgspec.Meta(gt=0, le=86_400, description="Seconds between two commands (RFC 5321 4.5.3.2.7)")
    ] = 300.0
    data_timeout: Annotated[
        float,
        msgspec.Meta(gt=0, le=86_400, description="Seconds from the 354, or the first BDAT, to the end"),
    ] = 600.0
    session_timeout: Annotated[float, msgspec.Meta(gt=0, le=604_800, description="Seconds of a connection")] = 3600.0

    @property
    def shortest_clock(self) -> float:
        """Seconds of the shortest of the three clocks."""
        return min(self.command_timeout, self.data_timeout, self.session_timeout)


class AdmissionSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may come in. A network is an IPv4 address or an IPv6 /64."""

    connections: Annotated[int, msgspec.Meta(ge=1, description="Connections of a worker")] = 20_000
    per_network: Annotated[int, msgspec.Meta(ge=1, description="Connections of a network")] = 200
    per_network_per_minute: Annotated[
        int, msgspec.Meta(ge=1, description="New connections of a network in a minute")
    ] = 3_000
    auth_failures: Annotated[
        int, msgspec.Meta(ge=1, description="Wrong passwords of a network in auth_window before 454 4.7.0")
    ] = 30
    auth_window: Annotated[float, msgspec.Meta(gt=0, le=86_400, description="Seconds")] = 600.0
    exempt: Annotated[tuple[str, ...], msgspec.Meta(description="Networks that only the total counts for")] = (
        "127.0.0.0/8",
        "::1/128",
    )


class _Window:
    """Counts events of networks in a sliding window, estimated from two fixed ones."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._turn = -1
        self._now: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def count(self, network: str) -> float:
        """Return how many events a network has had within the last window."""
        part = self._advance()
        return self._now.get(network, 0) + self._before.get(network, 0) * (1 - part)

    def add(self, network: str) -> None:
        """Count an event. A network beyond the bound of memory is not counted."""
        self._advance()
        if network in self._now or len(self._now) < _MOST_NETWORKS:
            self._now[network] = self._now.get(network, 0) + 1

    def forget(self, network: str) -> None:
        """Forget the events of a network."""
        self._now.pop(network, None)
        self._before.pop(network, None)

    def _advance(self) -> float:
        """Change windows when it is time. Return how much of the present one is over, 0 to 1."""
        turn, part = divmod(self._clock() / self._seconds, 1)
        if turn != self._turn:
            self._before = self._now if turn == self._turn + 1 else {}
            self._now = {}
            self._turn = int(turn)
        return part


class Admission:
    """Counts connections: in total, of a network, of a network in a minute. Asked before the greeting."""

    def __init__(self, settings: AdmissionSettings, clock: Callable[[], float] = trio.current_time) -> None:
        self._settings = settings
        self._exempt = [ipaddress.ip_network(network) for network in settings.exempt]
        self._is_exempt = functools.lru_cache(maxsize=65_536)(self._find_exempt)
        self._of_network: dict[str, int] = {}
        self._recent = _Window(_MINUTE, clock)
        self.total = 0
        """Connections that are open."""

    def admit(self, network: str) -> Reply | None:
        """Count a connection in and return None, or return why not."""
        settings = self._settings
        if self.total >= settings.connections:
            return replies.TOO_BUSY
        if not self._is_exempt(network):
            if self._of_network.get(network, 0) >= settings.per_network:
                return replies.TOO_MANY_FROM_HERE
            if self._recent.count(network) >= settings.per_network_per_minute:
                return replies.TOO_FAST_FROM_HERE
            self._recent.add(network)
            self._of_network[network] = self._of_network.get(network, 0) + 1
        self.total += 1
        return None

    def release(self, network: str) -> None:
        """Count a connection out that was admitted."""
        self.total -= 1
        left = self._of_network.get(network, 0) - 1
        if left > 0:
            self._of_network[network] = left
        else:
            self._of_network.pop(network, None)

    def _find_exempt(self, network: str) -> bool:
        if not network:
            return True  # a unix socket
        address = ipaddress.ip_address(network.partition("/")[0])
        return any(address in exempt for exempt in self._exempt)


class AuthThrottle:
    """Counts wrong passwords of networks, over connections."""

    def __init__(self, settings: AdmissionSettings, clock: Callable[[], float] = trio.current_time) -> None:
        self._limit = settings.auth_failures
        self._failures = _Window(settings.auth_window, clock)

    def is_blocked(self, network: str) -> bool:
        """Say whether a network has guessed too often."""
        return self._failures.count(network) >= self._limit

    def failed(self, network: str) -> None:
        """Count a wrong password."""
        self._failures.add(network)

    def succeeded(self, network: str) -> None:
        """Forget the wrong passwords of a network that has got one right."""
        self._failures.forget(network)


class Deadlines:
    """The three clocks of a connection: idle command, whole DATA, whole session (never armed again).

    They are looked at by the sweeper alone: a session counts its commands and messages and spends nothing on time. A
    clock may thus run out up to two rounds of the sweeper late, and never early.
    """

    __slots__ = ("_commands", "_data_at", "_idle_at", "_limits", "_message", "_session_at", "_shortened_to")

    def __init__(self, limits: LimitSettings, now: float) -> None:
        self._limits = limits
        self._commands = 0
        self._message = 0
        self._idle_at = now + limits.command_timeout
        self._data_at = math.inf
        self._shortened_to = math.inf
        self._session_at = now + limits.session_timeout

    def expired(self, now: float, commands: int, message: int) -> Reply | None:
        """Return the last words for a connection whose clock has run out.

        `commands` is how many lines the client has sent whole: one that drips octets is idle. `message` is the number
        of the message that is under way, 0 when there is none.
        """
        if message:
            if message != self._message:
                self._data_at = now + self._limits.data_timeout
            self._idle_at = now + self._limits.command_timeout  # for what comes behind it
            limit, words = min(self._data_at, self._shortened_to), replies.DATA_TIMEOUT
        else:
            if commands != self._commands:
                self._idle_at = now + self._limits.command_timeout
            limit, words = self._idle_at, replies.IDLE_TIMEOUT
        self._message = message
        self._commands = commands
        if now >= self._session_at:
            return replies.SESSION_TIMEOUT
        return words if now >= limit else None

    def stand_still(self, seconds: float) -> None:
        """Let all clocks run out so much later: the client was kept waiting on purpose."""
        self._idle_at += seconds
        self._data_at += seconds
        self._session_at += seconds

    def shorten_data(self, at: float) -> None:
        """Let a message that is under way end at a time, if it would not end before."""
        self._shortened_to = at


class Expires(Protocol):
    """What the sweeper looks after."""

    def check_clocks(self, now: float, /) -> None:
        """End the connection when one of its clocks has run out."""


_AT_A_TIME: Final = 500
"""Connections the sweeper looks at before the sessions have their turn."""


class Sweeper:
    """One task that looks after the clocks of all connections: cheaper than a cancel scope for each wait."""

    def __init__(self, shortest_clock: float) -> None:
        """Look every second, or four times in the shortest clock."""
        self._interval = max(0.05, min(1.0, shortest_clock / 4))
        self.watched: set[Any] = set()
        """The connections it looks after (each an `Expires`): add and remove as they come and go."""

    async def run(self) -> None:
        """Look from time to time, until cancelled."""
        while True:
            await trio.sleep(self._interval)
            now = trio.current_time()
            for number, connection in enumerate(list(self.watched), 1):
                connection.check_clocks(now)
                if number % _AT_A_TIME == 0:
                    await trio.lowlevel.checkpoint()
