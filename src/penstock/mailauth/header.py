"""The header of a message: its fields, their positions and their values.

This file is compiled as it stands (header.pxd has the C types).
"""

from __future__ import annotations

import re
from typing import Final

import idna

from penstock.mailauth._header import Field, Header, simple_mailbox

__all__ = ["Field", "Header", "author_domains", "canonical_domain", "mailboxes"]

_SIMPLE: Final = re.compile(
    r"""(?:(?:"[^"\\]*"|[^"(),:;<>\\])*<([^"(),:;<>\\\s]+)>|[ \t\r\n]*([^"(),:;<>\\\s]+))[ \t\r\n]*"""
)
"""One mailbox, as nearly all From fields have it."""
_MAX_AUTHORS: Final = 50
"""Mailboxes of From that are read. Reading more would let one message delay all other clients."""
_MAX_DOMAINS: Final = 5
_MAX_FROM: Final = 1 << 14
"""Octets of all From fields that are read."""


def author_domains(header: Header) -> tuple[str, ...]:
    """Return the domains of all authors in all From fields, as lower-case A-labels, each once.

    A mailbox without a domain, or with one that is none, is "": it belongs to no domain that could vouch for it.
    More than 50 authors, 5 domains or 16 KiB are not read to their end: they are several domains in any case.
    """
    fields = header.by_name.get(b"from", ())
    if len(fields) == 1 and fields[0].stop - fields[0].start <= _MAX_FROM:
        mailbox = simple_mailbox(header.value(fields[0]))
        if mailbox is not None:  # one author, as nearly all messages have
            return (canonical_domain(mailbox.rpartition("@")[2]) if "@" in mailbox else "",)
    found: dict[str, None] = {}
    authors, octets = 0, 0
    for field in fields:
        octets += field.stop - field.start
        text = b"" if octets > _MAX_FROM else header.value(field)
        for mailbox in mailboxes(text.decode("utf-8", "surrogateescape"), _MAX_AUTHORS + 1):
            authors += 1
            if authors > _MAX_AUTHORS or len(found) == _MAX_DOMAINS:
                break
            found[canonical_domain(mailbox.rpartition("@")[2] if "@" in mailbox else "")] = None
        if authors > _MAX_AUTHORS or len(found) == _MAX_DOMAINS or octets > _MAX_FROM:
            return tuple(found) if len(found) > 1 else (*found, "", "")  # several, whatever else the field says
    return tuple(found)


def canonical_domain(domain: str) -> str:
    """Return a domain as lower-case A-labels without a final dot; "" for what is none."""
    domain = domain.strip(" \t\r\n").rstrip(".").lower()
    if len(domain) > 253:  # as A-labels it is longer still
        return ""
    if not domain.isascii():
        try:
            return idna.encode(domain, uts46=True).decode()
        except (idna.IDNAError, UnicodeError):
            return ""
    return domain


def mailboxes(value: str, most: int = 1 << 30) -> list[str]:  # noqa: C901, PLR0912 - one branch for each character with a meaning
    """Return the addr-specs of a list of mailboxes and groups (RFC 5322 3.4), without comments and blanks.

    At most `most` of them are read.
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
            if len(found) >= most:
                return found
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
