"""The PROXY protocol, versions 1 and 2 (HAProxy, proxy-protocol.txt): the address of a proxy's client.

`parse` gets all octets received so far. It returns the header, or asks for more octets, or raises when they are not a
PROXY header. It never looks at more than `MAX_HEADER` octets.

Roads not taken: the library proxy-protocol of PyPI parses both versions, but its reader is written for asyncio, and its
parsers accept a header of unbounded length.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from typing import Final

from penstock.addresses import canonical_address, parse_address

MAX_V1: Final = 107
"""Octets of the longest line of version 1, with its CR LF (section 2.1)."""
MAX_HEADER: Final = 16 + 4096
"""Octets of the longest header of version 2 that is accepted: its addresses have at most 216, the rest is for TLVs."""
_V2_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED: Final = 16


class ProxyError(ValueError):
    """The octets are not a PROXY header."""


@dataclass(frozen=True, slots=True)
class ProxyLine:
    """The contents of a PROXY header. Addresses are in canonical form (penstock.addresses)."""

    consumed: int
    """Octets of the header."""
    is_local: bool
    """LOCAL or UNKNOWN: the proxy has no client, or does not know it. Use the addresses of the socket."""
    source_address: str = ""
    source_port: int = 0
    destination_address: str = ""
    destination_port: int = 0


def parse(buffer: bytes) -> ProxyLine | None:
    """Read the header at the start of the buffer. Return None when more octets are needed. Raise ProxyError."""
    if buffer.startswith(_V2_SIGNATURE[: len(buffer)]):
        return _parse_v2(buffer)
    if buffer.startswith(b"PROXY "[: len(buffer)]):
        return _parse_v1(buffer)
    raise ProxyError("not a PROXY header")


def _parse_v1(buffer: bytes) -> ProxyLine | None:
    end = buffer.find(b"\r\n", 0, MAX_V1)
    if end < 0:
        if len(buffer) >= MAX_V1:
            raise ProxyError(f"a line of version 1 has at most {MAX_V1} octets")
        return None
    words = buffer[:end].decode("ascii", "replace").split(" ")
    consumed = end + 2
    if words[1] == "UNKNOWN":
        return ProxyLine(consumed, is_local=True)
    if len(words) != 6 or words[1] not in ("TCP4", "TCP6"):
        raise ProxyError("a line of version 1 is PROXY TCP4|TCP6 SOURCE DESTINATION PORT PORT, or PROXY UNKNOWN")
    version = 4 if words[1] == "TCP4" else 6
    try:
        source, destination = (ipaddress.ip_address(word) for word in words[2:4])
        addresses = [str(parse_address(word)) for word in words[2:4]]
    except ValueError as exc:
        raise ProxyError(str(exc)) from exc
    if source.version != version or destination.version != version or "%" in words[2] + words[3]:
        raise ProxyError(f"{words[1]} needs two addresses of its own family")
    return ProxyLine(consumed, False, addresses[0], _port(words[4]), addresses[1], _port(words[5]))


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) <= 65_535):
        raise ProxyError(f"{text!r} is not a port")
    return int(text)


def _parse_v2(buffer: bytes) -> ProxyLine | None:
    if len(buffer) < _V2_FIXED:
        return None
    version_command, family, length = struct.unpack_from("!BBH", buffer, len(_V2_SIGNATURE))
    consumed = _V2_FIXED + length
    if version_command >> 4 != 2 or version_command & 0xF > 1:
        raise ProxyError("version 2 has the commands LOCAL and PROXY")
    if consumed > MAX_HEADER:
        raise ProxyError(f"a header of {consumed} octets is longer than {MAX_HEADER}")
    if len(buffer) < consumed:
        return None
    octets = {1: 4, 2: 16}.get(family >> 4)
    if version_command & 0xF == 0 or octets is None:  # LOCAL, UNSPEC or AF_UNIX
        return ProxyLine(consumed, is_local=True)
    if length < octets * 2 + 4:
        raise ProxyError("the header is too short for its addresses")
    source = buffer[_V2_FIXED : _V2_FIXED + octets]
    destination = buffer[_V2_FIXED + octets : _V2_FIXED + 2 * octets]
    source_port, destination_port = struct.unpack_from("!HH", buffer, _V2_FIXED + 2 * octets)
    return ProxyLine(
        consumed,
        False,
        canonical_address(str(ipaddress.ip_address(source))),
        source_port,
        canonical_address(str(ipaddress.ip_address(destination))),
        destination_port,
    )
