"""Authentication-Results (RFC 8601): the field we write, and those that only pretend to be ours."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from penstock.mailauth._header import authentication_results, quote
from penstock.mailauth.header import Field, Header

__all__ = ["NAME", "Method", "MethodResult", "authentication_results", "forged_fields", "quote"]

NAME: Final = b"authentication-results"
_VERSION: Final = re.compile(r"[ \t\r\n;/(]")


Method = tuple[str, str, tuple[tuple[str, str], ...]]
"""What a `MethodResult` is: where many are made, a plain tuple costs less."""


class MethodResult(NamedTuple):
    """One result: `dkim=pass header.d=example.org header.s=s1`."""

    method: str
    result: str
    properties: tuple[tuple[str, str], ...] = ()
    """("header.d", "example.org"): values may be text of the client, and are quoted as needed."""


def forged_fields(header: Header, authserv_id: str) -> list[Field]:
    """Return the Authentication-Results fields that claim our name, in any spelling (RFC 8601 5).

    A field whose name cannot be read is one of them when our name stands in it anywhere: another reader may find it.
    """
    own = authserv_id.lower().rstrip(".")
    found: list[Field] = []
    for field in header.by_name.get(NAME, ()):
        value = header.value(field).decode("latin-1").lower()
        claimed = _authserv_id(value)
        if claimed == own or (not claimed and own in value):
            found.append(field)
    return found


def _authserv_id(value: str) -> str:
    """Return the name a field begins with, without comments, quotes, a version and a final dot; "" if it has none."""
    text: list[str] = []
    comment = 0
    quoted = False
    at = 0
    while at < len(value):
        char = value[at]
        if char == "\\" and (quoted or comment):
            if quoted:
                text.append(value[at + 1 : at + 2])
            at += 2
            continue
        if comment or (char == "(" and not quoted):
            comment += (char == "(") - (char == ")")
        elif quoted and char in "\r\n":
            pass  # a fold
        elif char == '"':
            quoted = not quoted
        elif not quoted and _VERSION.match(char):
            if text or char == ";":
                break
        else:
            text.append(char)
        at += 1
    if comment or quoted:
        return ""
    return "".join(text).strip(" \t").rstrip(".")
