"""The milter protocol, version 6: packets of the mail server's side, and what a filter answers. No I/O.

There is no RFC; this follows libmilter of sendmail 8.18 and its mfdef.h, whose names the constants have.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from penstock.mailauth.header import Header
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

_LENGTH: Final = struct.Struct("!I")
_NEGOTIATION: Final = struct.Struct("!III")


_BLANKS: Final = (b" ", b"\t")
_STATUS: Final = re.compile(r"([245]\.[0-9]{1,3}\.[0-9]{1,3})(?: |\Z)")


class MilterError(Exception):
    """A filter does not follow the protocol, or is not available."""


class Packet(NamedTuple):
    """What a filter sends: a code, SMFIR_, and its data."""

    code: bytes
    data: bytes


# ---- to the filter


def packet(code: bytes, *parts: bytes) -> bytes:
    """Return a packet."""
    data = b"".join(parts) if len(parts) != 1 else parts[0]
    return b"%b%b%b" % (_LENGTH.pack(len(data) + 1), code, data)


def text(value: str) -> bytes:
    """Return a string as the protocol has it, ended by NUL."""
    if "\0" in value:
        value = value.replace("\0", "")
    return f"{value}\0".encode("utf-8", "surrogateescape")


def macros(code: bytes, values: Iterable[tuple[str, str]]) -> bytes:
    """Return the macros that belong to the command that follows; those without a value are left out."""
    found = [f"{name}\0{value}\0" for name, value in values if value]
    if not found:
        return b""
    data = "".join(found)
    if data.count("\0") != 2 * len(found):  # the others can be told apart all the same
        data = "".join([f"{name}\0{value.replace(chr(0), '')}\0" for name, value in values if value])
    return packet(b"D", code, data.encode("utf-8", "surrogateescape"))


def negotiation(steps: int = STEPS) -> bytes:
    """Return the first packet of a connection. `steps` are offered."""
    return packet(b"O", _NEGOTIATION.pack(VERSION, ACTIONS, steps))


def connect(name: str, address: str, port: int) -> bytes:
    """Return SMFIC_CONNECT. An address of "" is a unix socket."""
    if not address:
        return packet(b"C", text(name), b"L", struct.pack("!H", 0), text(""))
    return packet(b"C", text(name), b"6" if ":" in address else b"4", struct.pack("!H", port), text(address))


def headers(octets: bytes, steps: int) -> Iterator[bytes]:
    """Yield a packet for each field of a header that ends in CRLF. Lines are separated by LF, as sendmail has them."""
    keeps_blank = bool(steps & LEADING_SPACE)
    pack = _LENGTH.pack
    for field in Header(octets).fields:
        name = octets[field.start : field.colon]
        if not name:  # a line without a colon
            continue
        start = field.colon + 1
        if not keeps_blank and octets[start : start + 1] in _BLANKS:
            start += 1
        value = octets[start : field.stop].rstrip(b"\r\n")
        if b"\r" in value:
            value = value.replace(b"\r\n", b"\n")
        if b"\0" in value:
            value = value.replace(b"\0", b"")
        if name[-1:] in _BLANKS:
            name = name.rstrip(b" \t")
        yield b"%bL%b\0%b\0" % (pack(len(name) + len(value) + 3), name, value)


# ---- from the filter


class Reader:
    """Splits what comes from a filter into packets."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, octets: bytes) -> None:
        """Take octets from the connection."""
        self._buffer += octets

    @property
    def is_empty(self) -> bool:
        """Nothing waits."""
        return not self._buffer

    def next(self) -> Packet | None:
        """Return the next packet, None while it is not complete. Raise MilterError."""
        buffer = self._buffer
        if len(buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(buffer)
        if not 0 < length <= MOST_OCTETS:
            raise MilterError(f"the filter sends a packet of {length} octets")
        if len(buffer) < 4 + length:
            return None
        found = Packet(bytes(buffer[4:5]), bytes(buffer[5 : 4 + length]))
        del buffer[: 4 + length]
        return found


def parse_negotiation(found: Packet) -> int:
    """Return the steps that a filter wants. Raise MilterError."""
    if found.code != b"O" or len(found.data) < _NEGOTIATION.size:
        raise MilterError(f"the filter answers the negotiation with {found.code!r}")
    version, actions, steps = _NEGOTIATION.unpack_from(found.data)
    # libmilter since 8.14 speaks version 6; versions 2 to 5 lack steps, which they do not ask for then.
    if not 2 <= version <= VERSION or actions & ~ACTIONS or steps & 0xFFFFFF & ~STEPS:
        raise MilterError(f"the filter asks for version {version}, actions {actions:#x} and steps {steps:#x}")
    return int(steps)


def strings(data: bytes, count: int) -> list[bytes]:
    """Return the first strings of a packet, b"" for those that it does not have."""
    found = data.split(b"\0")
    return (found + [b""] * count)[:count]


def parse_reply(data: bytes) -> Reply:
    """Return the reply of SMFIR_REPLYCODE: "550 5.7.1 text", or several lines. Raise MilterError."""
    lines = strings(data, 1)[0].decode("utf-8", "replace").replace("%%", "%").splitlines()
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
