"""Pregreet: clients that send data before the greeting are refused (RFC 5321 4.3.1: the client waits for it).

Only strangers wait. Those who have waited in silence once are remembered by their network, and greeted at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import trio

from penstock.policy.check import Check, Mode, Parts
from penstock.policy.settings import PolicySettings, PregreetSettings
from penstock.reply import Reply
from penstock.transaction import Transaction

_MOST: Final = 100_000
"""Networks that are remembered, those seen last."""
REFUSAL: Final = Reply(554, "5.5.1", "Protocol error: data received before the greeting")


def make_checks(policy: PolicySettings, parts: Parts) -> list[Check]:  # noqa: ARG001 - the interface
    """Return the check, if its table is there."""
    mode = policy.mode_of(policy.pregreet)
    return [] if policy.pregreet is None or mode == "off" else [Pregreet(policy.pregreet, mode)]


class Pregreet(Check):
    """The check. The connection waits, because it has the stream (penstock.server.connection)."""

    name = "pregreet"

    def __init__(
        self,
        settings: PregreetSettings,
        mode: Mode,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self.mode = mode
        self._wait = settings.wait
        self._remember = settings.remember
        self._clock = clock
        self._passed: OrderedDict[str, float] = OrderedDict()
        """Network -> until when it is remembered."""

    def seconds(self, transaction: Transaction) -> float:
        """Return how long a client has to wait: 0 for one that is remembered."""
        until = self._passed.get(transaction.peer.network)
        return 0.0 if until is not None and self._clock() < until else self._wait

    def passed(self, transaction: Transaction) -> None:
        """Remember a client that has waited in silence."""
        network = transaction.peer.network
        self._passed[network] = self._clock() + self._remember
        self._passed.move_to_end(network)
        if len(self._passed) > _MOST:
            self._passed.popitem(last=False)
