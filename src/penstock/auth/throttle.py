"""Limits password guessing, over all connections of all workers.

Rules
-----
1. An attempt counts as a failure *before* anything is verified, and is taken back when it succeeds. So attempts that
   run at the same time cannot pass the limit together.
2. Attempts are counted by network and by user name. A success takes back its own attempt and forgets the failures of
   its own name, but nothing else: an attacker with one valid account must not clear the failures of its network.
3. Exempt networks and unix sockets are limited by name only: a webmail on the same machine connects for all its users.
4. Every exchange that does not succeed counts, also one with malformed messages or one that the client cancels.
5. What other servers have counted is kept apart: a worker that is started again receives all of these counts again.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from penstock.addresses import parse_address, parse_network
from penstock.metrics._shared import SharedTable
from penstock.metrics.segment import private_table

_CACHE: Final = 65_536
"""Networks for which it is remembered whether they are exempt."""
_NETWORK: Final = ord("f")
_NAME: Final = ord("u")
"""What is counted in the table."""
_LEARNED: Final = {_NETWORK: ord("F"), _NAME: ord("U")}
"""The same at other servers."""


class ThrottleSettings(Protocol):
    """The settings of the throttle, which are a part of those of admission."""

    @property
    def auth_failures(self) -> int:
        """Failures of a network or of a user name within the window before further attempts are refused."""

    @property
    def auth_window(self) -> float:
        """Seconds."""

    @property
    def exempt(self) -> Sequence[str]:
        """Networks that are limited by name only."""


class AuthThrottle:
    """Counts failed authentications by network and by user name."""

    def __init__(
        self,
        settings: ThrottleSettings,
        clock: Callable[[], float] = time.monotonic,
        *,
        table: SharedTable | None = None,
    ) -> None:
        """`table` is that of all workers, by default one of its own; `clock` is the same one for all of them."""
        self.on_change: Callable[[int, str, int, float], None] = _ignore
        """Gets what is counted, its key, how many more failures it has (0: none any more), and the window."""
        self._limit = settings.auth_failures
        self._window = settings.auth_window
        self._clock = clock
        self._table = private_table() if table is None else table
        self._exempt = [parse_network(network) for network in settings.exempt]
        self._is_exempt = functools.lru_cache(maxsize=_CACHE)(self._find_exempt)

    def use(self, settings: ThrottleSettings) -> None:
        """Use another `auth_failures`; the rest must be the same."""
        self._limit = settings.auth_failures

    def begin(self, network: str) -> Attempt | None:
        """Count an attempt from a network (`Peer.network`, "" for a unix socket) as a failure.

        Return None, and count nothing, when the network has had too many failures.
        """
        if self._is_exempt(network):
            return Attempt(self, "")
        return Attempt(self, network) if self.add(_NETWORK, network) else None

    def _find_exempt(self, network: str) -> bool:
        if not network:
            return True  # a unix socket
        address = parse_address(network.partition("/")[0])
        return any(address in exempt for exempt in self._exempt)

    def learn(self, kind: int, key: str, more: int, *, is_first: bool = False) -> None:
        """Count failures at other servers, or fewer of them if negative; 0 forgets those of a user name.

        With `is_first` what was learned before is forgotten: a worker that ran before this one has learned it.
        """
        learned = _LEARNED.get(kind)
        if learned is None:
            return  # of another version
        now = self._clock()
        if is_first:
            self._table.forget(learned, key, self._window, now)
        if more:
            self._table.happen(learned, key, more, self._window, now)
        elif kind == _NAME:
            self.forget(key, is_ours=False)

    def add(self, kind: int, key: str) -> bool:
        """Count a failure; return False, and count nothing, when there were too many."""
        now = self._clock()
        table, window = self._table, self._window
        if table.count(kind, key, window, now) + table.count(_LEARNED[kind], key, window, now) >= self._limit:
            return False
        table.happen(kind, key, 1, window, now)
        self.on_change(kind, key, 1, window)
        return True

    def take_back(self, kind: int, key: str) -> None:
        """Count one failure less."""
        self._table.happen(kind, key, -1, self._window, self._clock())
        self.on_change(kind, key, -1, self._window)

    def forget(self, name: str, *, is_ours: bool = True) -> None:
        """Forget the failures of a user name, after a success here or at another server."""
        now = self._clock()
        self._table.forget(_NAME, name, self._window, now)
        self._table.forget(_LEARNED[_NAME], name, self._window, now)
        if is_ours:
            self.on_change(_NAME, name, 0, self._window)


class Attempt:
    """One authentication that is under way, counted as a failure until it is taken back."""

    def __init__(self, throttle: AuthThrottle, network: str) -> None:
        """`network` is "" when the attempt is not counted by network."""
        self._throttle = throttle
        self._network = network
        self._name: str | None = None

    def claim(self, name: str) -> bool:
        """Count the attempt by user name as well, once, before anything is verified.

        Return False, and count nothing, when the name has had too many failures. Names are compared without case.
        """
        name = name.casefold()
        if self._name is None:
            if not self._throttle.add(_NAME, name):
                return False
            self._name = name
        return True

    def succeeded(self) -> None:
        """Take the attempt back, and forget the failures of the name."""
        if self._network:
            self._throttle.take_back(_NETWORK, self._network)
        if self._name is not None:
            self._throttle.forget(self._name)
        self._network, self._name = "", None

    def withdrawn(self) -> None:
        """Take the attempt back: nothing was verified because the server could not."""
        if self._network:
            self._throttle.take_back(_NETWORK, self._network)
        if self._name is not None:
            self._throttle.take_back(_NAME, self._name)
        self._network, self._name = "", None


def _ignore(_kind: int, _key: str, _more: int, _window: float) -> None:
    """Without other servers."""
