"""The milter protocol, version 6: packets of the mail server's side, and what a filter answers. No I/O.

There is no RFC; this follows libmilter of sendmail 8.18 and its mfdef.h, whose names the constants have.
"""

from __future__ import annotations

import re
import struct
from collections import deque
from typing import Final, NamedTuple

from penstock.mailauth._header import (
    milter_headers,
    milter_macros,
    milter_packet,
    milter_split,
    milter_text,
)
from penstock.policy.filters import FilterError
from penstock.reply import Reply

VERSION: Final = 6
ACTIONS: Final = 0x1FF
"""SMFIF_: all changes of version 6, among them quarantine, CHGFROM, ADDRCPT_PAR and SETSYMLIST."""

# SMFIP_: what a filter does not want to see (NO), or does not reply to (NR).
NO_CONNECT, NO_HELO, NO_MAIL, NO_RCPT, NO_BODY, NO_HEADERS, NO_EOH = (1 << bit for bit in range(7))
NR_HEADER, NO_UNKNOWN, NO_DATA, SKIP = 0x80, 0x100, 0x200, 0x400
NR_CONNECT, NR_HELO, NR_MAIL, NR_RCPT, NR_DATA, NR_UNKNOWN, NR_EOH, NR_BODY = (0x1000 << bit for bit in range(8))
LEADING_SPACE: Final = 0x100000
"""Values of header fields keep the blank after the colon, in both directions."""
STEPS: Final = 0x1FF7FF
"""All of these. RCPT_REJ (0x800) is not offered: filters are not asked about recipients that were refused."""

BODY_CHUNK: Final = 65_535
"""MILTER_CHUNK_SIZE."""
MOST_OCTETS: Final = 1 << 21
"""Of a packet."""

_NEGOTIATION: Final = struct.Struct("!III")


_STATUS: Final = re.compile(r"([245]\.[0-9]{1,3}\.[0-9]{1,3})(?: |\Z)")


class MilterError(FilterError):
    """A filter does not follow the protocol, or is not available."""


class Packet(NamedTuple):
    """What a filter sends: a code, SMFIR_, and its data."""

    code: bytes
    data: bytes


# ---- to the filter

packet: Final = milter_packet
text: Final = milter_text
macros: Final = milter_macros


def negotiation(steps: int = STEPS) -> bytes:
    """Return the first packet of a connection. `steps` are offered."""
    return packet(b"O", _NEGOTIATION.pack(VERSION, ACTIONS, steps))


def connect(name: str, address: str, port: int) -> bytes:
    """Return SMFIC_CONNECT. An address of "" is a unix socket."""
    if not address:
        return packet(b"C", text(name), b"L", struct.pack("!H", 0), text(""))
    return packet(b"C", text(name), b"6" if ":" in address else b"4", struct.pack("!H", port), text(address))


def headers(octets: bytes, steps: int) -> list[bytes]:
    """Return a packet for each field of a header that ends in CRLF."""
    return milter_headers(octets, bool(steps & LEADING_SPACE))


# ---- from the filter


class Reader:
    """Splits the input from a filter into packets. Those about its progress are left out."""

    def __init__(self) -> None:
        self._rest = bytearray()
        """The beginning of a packet."""
        self._wanted = 0
        """How many octets that needs before it is worth a look: a packet may arrive octet by octet."""
        self._packets: deque[Packet] = deque()
        self._invalid = -1
        """The length of an invalid packet after those."""

    def feed(self, octets: bytes) -> None:
        """Take octets from the connection."""
        if self._rest:
            self._rest += octets
            if len(self._rest) < self._wanted:
                return
            octets = bytes(self._rest)
        found, end, self._invalid = milter_split(octets, Packet, MOST_OCTETS)
        self._packets += found
        self._rest = bytearray(octets[end:])
        if self._rest:
            self._wanted = 4 + (int.from_bytes(self._rest[:4], "big") if len(self._rest) >= 4 else 0)

    @property
    def is_empty(self) -> bool:
        """Nothing waits."""
        return not (self._packets or self._rest)

    def next(self) -> Packet | None:
        """Return the next packet, None while it is not complete. Raise MilterError."""
        if self._packets:
            return self._packets.popleft()
        if self._invalid >= 0:
            raise MilterError(f"the filter sends a packet of {self._invalid} octets")
        return None


def parse_negotiation(found: Packet) -> int:
    """Return the steps that a filter wants. Raise MilterError."""
    if found.code != b"O" or len(found.data) < _NEGOTIATION.size:
        raise MilterError(f"the filter answers the negotiation with {found.code!r}")
    version, actions, steps = _NEGOTIATION.unpack_from(found.data)
    # libmilter since 8.14 speaks version 6; versions 2 to 5 lack steps, which they do not ask for then.
    if not 2 <= version <= VERSION or actions & ~ACTIONS or steps & 0xFFFFFF & ~STEPS:
        raise MilterError(f"the filter asks for version {version}, actions {actions:#x} and steps {steps:#x}")
    return int(steps)


def strings(data: bytes, start: int = 0) -> tuple[bytes, bytes]:
    """Return the first two strings of a packet, b"" for those that it does not have. They begin at `start`."""
    found = (data[start:] if start else data).split(b"\0", 2)
    return found[0], found[1] if len(found) > 1 else b""


def parse_reply(data: bytes) -> Reply:
    """Return the reply of SMFIR_REPLYCODE: "550 5.7.1 text", or several lines. Raise MilterError."""
    lines = strings(data)[0].decode("utf-8", "replace").replace("%%", "%").splitlines()
    code = lines[0][:3] if lines else ""
    if not code.isdecimal() or not code.isascii() or code[:1] not in "45" or any(line[:3] != code for line in lines):
        raise MilterError(f"the filter sends the reply {data[:100]!r}")
    found = [_STATUS.match(line[4:]) for line in lines]
    texts = [
        line[4:] if status is None else line[4 + status.end() :] for line, status in zip(lines, found, strict=True)
    ]
    statuses = {None if status is None else status[1] for status in found}
    status = statuses.pop() if len(statuses) == 1 else None
    if status is None or status[0] != code[0]:
        status = f"{code[0]}.7.1"
    return Reply(int(code), status, "\n".join(texts) or "Refused by a mail filter", closes=code == "421")
