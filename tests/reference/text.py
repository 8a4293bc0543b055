"""The slow, obvious reader of message text: the oracle for the compiled wire.

It is given the whole input at once and looks at one octet at a time, with what stood before it; speed and memory do
not matter here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """What becomes of the octets behind a 354."""

    outcome: str
    """ "end": the end of the data was seen; "more": it was not; "broken": only the sender believes in the end."""
    body: bytes
    """The un-stuffed text up to the first violation."""
    violation: str
    rest: bytes
    """What stands behind the end of the data."""


def read_text(
    data: bytes,
    *,
    reject: Collection[str] = (),
    normalize: Collection[str] = (),
    limit: int = 998,
    most: int = 0,
) -> Text:
    """Read the text behind a 354 (RFC 5321 4.1.1.4, 4.5.2)."""
    body = bytearray()
    column = 0
    violation = ""
    at_line_start = True  # the CRLF of the DATA command counts
    i = 0
    octets = 0
    while i < len(data):
        if data.startswith(b".\r\n", i) and at_line_start:
            return Text("end", bytes(body), violation, data[i + 3 :])
        c = data[i : i + 1]
        following = data[i + 1 : i + 2]
        if at_line_start and c == b".":
            if len(data) - i < 2 or (following == b"\r" and len(data) - i < 3):
                return Text("more", bytes(body), violation, b"")
            at_line_start = False
            i += 1
            if violation_here := _first(data, i, column, reject, limit):
                return _after(data, i, b"\r\n.", bytes(body), violation or violation_here, reject)
            continue
        if c == b"\r" and not following:
            return Text("more", bytes(body), violation, b"")
        if data.startswith(b"\r\n", i):
            piece, step, column, at_line_start = b"\r\n", 2, 0, True
        else:
            broken = _first(data, i, column, reject, limit)
            if broken:
                before = b"\r\n" if at_line_start else b""
                return _after(data, i, before, bytes(body), violation or broken, reject)
            mended = _first(data, i, column, normalize, limit)
            piece, step, column = _step(c, column, mended)
            at_line_start = False
        octets += len(piece)
        i += step
        if most and octets > most and not violation:
            violation = "too_big"
        if not violation:
            body += piece
    return Text("more", bytes(body), violation, b"")


def _first(data: bytes, i: int, column: int, rules: Collection[str], limit: int) -> str:
    """Return the rule that the octet at i breaks."""
    c = data[i : i + 1]
    if c == b"\n" and data[i - 1 : i] != b"\r" and "bare_lf" in rules:
        return "bare_lf"
    if c == b"\r":
        return "bare_cr" if data[i + 1 : i + 2] not in (b"\n", b"") and "bare_cr" in rules else ""
    if c == b"\0" and "nul" in rules:
        return "nul"
    if c != b"\n" and column >= limit and "long_line" in rules:
        return "long_line"
    return ""


def _step(c: bytes, column: int, mended: str) -> tuple[bytes, int, int]:
    """Return what an octet becomes, how many octets that uses up, and the column behind it."""
    if mended == "bare_lf":
        return b"\r\n", 1, 0
    if mended == "bare_cr":
        return b" ", 1, column + 1
    if mended == "nul":
        return b"", 1, column
    if mended == "long_line":
        return b"\r\n ", 0, 1
    return c, 1, 0 if c == b"\n" else column + 1


def _after(data: bytes, i: int, before: bytes, body: bytes, violation: str, reject: Collection[str]) -> Text:
    """Look for the end of a refused text: ours, or the one its sender may believe in."""
    tail = before
    while i < len(data):
        tail += data[i : i + 1]
        i += 1
        if tail.endswith(b"\r\n.\r\n"):
            return Text("end", body, violation, data[i:])
        if "bare_lf" in reject and tail.endswith((b"\n.\n", b"\n.\r\n")):
            return Text("broken", body, violation, data[i:])
    return Text("more", body, violation, b"")
