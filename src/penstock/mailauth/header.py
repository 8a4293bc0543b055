"""The header of a message: its fields, where they stand, and what they say."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

import idna

from penstock.mailauth import _header

_SIMPLE: Final = re.compile(
    r"""(?:(?:"[^"\\]*"|[^"(),:;<>\\])*<([^"(),:;<>\\\s]+)>|[ \t\r\n]*([^"(),:;<>\\\s]+))[ \t\r\n]*"""
)
"""One mailbox, as nearly all From fields have it."""


class Field(NamedTuple):
    """Where a field stands in the header."""

    name: bytes
    """In lower case; empty for a line without a colon."""
    start: int
    colon: int
    stop: int
    """Behind its last line end."""


class Header:
    """A header, split once and read by all checks."""

    def __init__(self, octets: bytes) -> None:
        """`octets` are the lines of the header, without the empty line behind them."""
        self.octets = octets
        self.fields = [Field._make(found) for found in _header.split_header(octets)]
        self._relaxed: dict[int, bytes] = {}
        self.by_name: dict[bytes, list[Field]] = {}
        """The fields of a name, from top to bottom."""
        for field in self.fields:
            self.by_name.setdefault(field.name, []).append(field)

    def value(self, field: Field) -> bytes:
        """Return what follows the colon, without the last line end."""
        return _without_line_end(self.octets[field.colon + 1 : field.stop])

    def raw(self, field: Field) -> bytes:
        """Return the whole field without its last line end."""
        return _without_line_end(self.octets[field.start : field.stop])

    def relaxed(self, field: Field) -> bytes:
        """Return the field in the relaxed form, with CRLF (RFC 6376 3.4.2)."""
        found = self._relaxed.get(field.start)
        if found is None:
            value = self.octets[field.colon + 1 : field.stop]  # the relaxed form drops the last line end as well
            found = self._relaxed[field.start] = _header.relaxed_field(field.name, value)
        return found


def _without_line_end(octets: bytes) -> bytes:
    if octets.endswith(b"\r\n"):
        return octets[:-2]
    return octets.removesuffix(b"\n")


def author_domains(header: Header) -> tuple[str, ...]:
    """Return the domains of all authors in all From fields, as lower-case A-labels, each once.

    A mailbox without a domain, or with one that is none, is "": it belongs to no domain that could vouch for it.
    """
    found: dict[str, None] = {}
    for field in header.by_name.get(b"from", ()):
        for mailbox in mailboxes(header.value(field).decode("utf-8", "surrogateescape")):
            found[canonical_domain(mailbox.rpartition("@")[2] if "@" in mailbox else "")] = None
    return tuple(found)


def canonical_domain(domain: str) -> str:
    """Return a domain as lower-case A-labels without a final dot; "" for what is none."""
    domain = domain.strip(" \t\r\n").rstrip(".").lower()
    if not domain.isascii():
        try:
            return idna.encode(domain, uts46=True).decode()
        except (idna.IDNAError, UnicodeError):
            return ""
    return domain if 0 < len(domain) <= 253 else ""


def mailboxes(value: str) -> list[str]:  # noqa: C901, PLR0912 - one branch for each character with a meaning
    """Return the addr-specs of a list of mailboxes and groups (RFC 5322 3.4), without comments and blanks.

    What does not follow the grammar is read as mail readers do: the address is what stands in the last <>, else all.
    """
    simple = _SIMPLE.fullmatch(value)
    if simple is not None:
        return [simple[1] or simple[2]]
    found: list[str] = []
    plain: list[str] = []
    angle: list[str] | None = None
    closed: str | None = None
    comment = 0
    quoted = False
    at = 0
    while at < len(value):
        char = value[at]
        if char == "\\" and (comment or quoted):
            if not comment:
                (plain if angle is None else angle).append(value[at : at + 2])
            at += 2
            continue
        if comment or (char == "(" and not quoted):
            comment += (char == "(") - (char == ")")
        elif char == '"' or quoted:
            quoted ^= char == '"'
            (plain if angle is None else angle).append(char)
        elif char == "<":
            angle = []
        elif char == ">" and angle is not None:
            closed, angle = "".join(angle), None
        elif angle is not None:
            if char not in " \t\r\n":
                angle.append(char)
        elif char in ",;":
            _close(found, plain, closed)
            plain, closed = [], None
        elif char == ":":
            plain = []  # the name of a group
        elif char not in " \t\r\n":
            plain.append(char)
        at += 1
    _close(found, plain if angle is None else angle, closed)
    return found


def _close(found: list[str], plain: list[str], closed: str | None) -> None:
    text = "".join(plain) if closed is None else closed
    if closed is not None or text:
        found.append(text.rpartition(":")[2] if text.startswith("@") else text)  # without a source route
