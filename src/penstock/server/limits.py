"""Limits of connections, and admission before the greeting.

The counters are in shared memory of all workers, and bounded (ext/shared.pyx).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from penstock import reply as replies
from penstock.addresses import parse_address, parse_network
from penstock.metrics._shared import SharedTable
from penstock.metrics.families import REFUSED_BY
from penstock.metrics.segment import private_table
from penstock.reply import Reply

_REFUSALS: Final = (replies.TOO_BUSY, replies.TOO_MANY_FROM_HERE, replies.TOO_FAST_FROM_HERE)
"""In the order of REFUSED_BY."""


class LimitSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client may do on a connection of a listener."""

    recipients: Annotated[
        int, msgspec.Meta(ge=100, description="Maximum recipients of a message; at least 100 (RFC 5321 4.5.3.1.8)")
    ] = 1000
    messages: Annotated[
        int, msgspec.Meta(ge=0, description="Maximum messages of a connection (RFC 9422); 0: no limit")
    ] = 0
    errors: Annotated[
        int, msgspec.Meta(ge=1, description="Commands answered with 5xx after which the client receives 421 4.7.0")
    ] = 20
    unknown_recipients: Annotated[
        int, msgspec.Meta(ge=1, description="Recipients refused with 5xx after which the client receives 421 4.7.0")
    ] = 50
    auth_failures: Annotated[
        int,
        msgspec.Meta(
            ge=1, description="Failed authentications on a connection after which the client receives 421 4.7.0"
        ),
    ] = 3
    command_timeout: Annotated[
        float,
        msgspec.Meta(gt=0, le=86_400, description="Idle timeout: seconds to wait for a command (RFC 5321 4.5.3.2.7)"),
    ] = 300.0
    data_timeout: Annotated[
        float,
        msgspec.Meta(
            gt=0, le=86_400, description="Data timeout: seconds without an octet of a message (RFC 5321 4.5.3.2.5)"
        ),
    ] = 180.0
    data_rate: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            description="Minimum average octets per second of a message, checked after data_timeout; 0: no limit",
        ),
    ] = 100.0
    junk_commands: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            description="NOOP, RSET, VRFY, EXPN, HELP and EHLO between messages; more of them count as errors",
        ),
    ] = 100
    session_timeout: Annotated[
        float, msgspec.Meta(gt=0, le=604_800, description="Maximum duration of a connection in seconds")
    ] = 3600.0

    @property
    def shortest_timeout(self) -> float:
        """Seconds of the shortest of the three timeouts."""
        return min(self.command_timeout, self.data_timeout, self.session_timeout)


class AdmissionSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of connections. A network is an IPv4 address or an IPv6 /64."""

    shared: Annotated[
        bool,
        msgspec.Meta(
            description="The limits of this table, and those of next hops, apply to all workers together; otherwise to "
            "each of them"
        ),
    ] = True
    connections: Annotated[int, msgspec.Meta(ge=1, description="Maximum open connections")] = 20_000
    per_network: Annotated[int, msgspec.Meta(ge=1, description="Maximum open connections of a network")] = 200
    per_network_per_minute: Annotated[
        int, msgspec.Meta(ge=1, description="Maximum new connections of a network per minute")
    ] = 3_000
    auth_failures: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            description="Failed authentications of a network within auth_window before 454 4.7.0",
        ),
    ] = 30
    auth_window: Annotated[float, msgspec.Meta(gt=0, le=86_400, description="Period of auth_failures in seconds")] = (
        600.0
    )
    exempt: Annotated[tuple[str, ...], msgspec.Meta(description="Networks to which only `connections` applies")] = (
        "127.0.0.0/8",
        "::1/128",
    )


class Admission:
    """Counts connections: in total, per network, and per network and minute. Called before the greeting.

    The counts are those of all workers that share the table. Each checks before it counts: if
    connections arrive at the same time, a limit can be exceeded by the number of workers minus one.
    """

    def __init__(
        self,
        settings: AdmissionSettings,
        clock: Callable[[], float] = time.monotonic,
        *,
        table: SharedTable | None = None,
        note_refusal: Callable[[str], None] | None = None,
    ) -> None:
        """`table` is shared by all workers, by default a private one; all of them use the same `clock`.

        `note_refusal` is called with one of REFUSED_BY for each refusal.
        """
        self._settings = settings
        self._clock = clock
        self._table = private_table() if table is None else table
        self._note_refusal = note_refusal
        self._exempt = [parse_network(network) for network in settings.exempt]
        self._is_exempt = functools.lru_cache(maxsize=65_536)(self._find_exempt)
        self.total = 0
        """Connections that this worker has open."""

    def use(self, settings: AdmissionSettings) -> None:
        """Use other limits for new connections; `shared` and `exempt` must be the same."""
        self._settings = settings

    def admit(self, network: str) -> Reply | None:
        """Count a new connection and return None, or return the refusal."""
        settings, table = self._settings, self._table
        if table.total >= settings.connections:
            return self._refuse(0)
        if not self._is_exempt(network):
            refused = table.enter(network, settings.per_network, settings.per_network_per_minute, self._clock())
            if refused:
                return self._refuse(refused)
        table.count_total(1)
        self.total += 1
        return None

    def _refuse(self, place: int) -> Reply:
        if self._note_refusal is not None:
            self._note_refusal(REFUSED_BY[place])
        return _REFUSALS[place]

    def release(self, network: str) -> None:
        """Count the end of an admitted connection."""
        self.total -= 1
        self._table.count_total(-1)
        if not self._is_exempt(network):
            self._table.leave(network)

    def _find_exempt(self, network: str) -> bool:
        if not network:
            return True  # a unix socket
        address = parse_address(network.partition("/")[0])
        return any(address in exempt for exempt in self._exempt)
