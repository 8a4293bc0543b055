"""The `[resolver]` table, and the servers of resolv.conf."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

MAX_SERVERS: Final = 16
_SERVER: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)|([0-9A-Fa-f:.]+))(?::([0-9]{1,5}))?")
_RESOLV_CONF: Final = Path("/etc/resolv.conf")


class ResolverSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The DNS resolver."""

    servers: Annotated[
        tuple[str, ...],
        msgspec.Meta(
            max_length=MAX_SERVERS,
            description="Recursive servers: 192.0.2.53, 127.0.0.1:5353, [::1]:53; those of resolv.conf if empty",
        ),
    ] = ()
    timeout: Annotated[
        float, msgspec.Meta(gt=0, le=60, description="Seconds to wait for one server before the next one is asked")
    ] = 5.0
    lifetime: Annotated[
        float, msgspec.Meta(gt=0, le=120, description="Seconds to wait for an answer from all servers together")
    ] = 20.0
    families: Annotated[
        tuple[Literal["ipv4", "ipv6"], ...],
        msgspec.Meta(min_length=1, max_length=2, description="Address families to use, in this order"),
    ] = ("ipv4", "ipv6")
    cache_entries: Annotated[int, msgspec.Meta(ge=0, le=10_000_000, description="Number of cached answers")] = 50_000
    ttl_least: Annotated[
        float, msgspec.Meta(ge=0, le=3600, description="Seconds to cache an answer at least, whatever its TTL")
    ] = 5.0
    ttl_most: Annotated[float, msgspec.Meta(ge=1, le=604_800, description="Seconds to cache an answer at most")] = (
        86_400.0
    )
    ttl_negative: Annotated[
        float,
        msgspec.Meta(ge=0, le=86_400, description="Seconds to cache at most that a name or record does not exist"),
    ] = 900.0
    stale: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=604_800,
            description="Seconds an expired answer is still used while no server answers (RFC 8767)",
        ),
    ] = 3600.0
    trust_ad: Annotated[
        bool,
        msgspec.Meta(description="Trust the AD bit of all servers; otherwise only that of servers on this machine"),
    ] = False


def parse_server(text: str) -> tuple[str, int]:
    """Read "192.0.2.53", "192.0.2.53:5353", "[::1]:53" or "::1". Raise ValueError."""
    match = _SERVER.fullmatch(text)
    if match is not None:
        address, port = match[1] or match[2] or match[3], int(match[4] or 53)
        try:
            ipaddress.ip_address(address)
        except ValueError:
            pass
        else:
            if 0 < port < 65_536:
                return address, port
    raise ValueError(f"{text!r} is not a DNS server; expected 192.0.2.53, 127.0.0.1:5353 or [::1]:53")


def system_servers(path: Path = _RESOLV_CONF) -> list[tuple[str, int]]:
    """Return the servers of resolv.conf; 127.0.0.1 when it names none, as resolv.conf(5) says."""
    found: list[tuple[str, int]] = []
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                ipaddress.ip_address(words[1])
            except ValueError:
                continue
            found.append((words[1], 53))
    return found[:MAX_SERVERS] or [("127.0.0.1", 53)]
