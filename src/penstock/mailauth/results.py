"""Authentication-Results (RFC 8601): the field we write, and those that only pretend to be ours."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from penstock.mailauth.header import Field, Header

NAME: Final = b"authentication-results"
_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+\-.^_`{|}~]+(?:@[A-Za-z0-9.\-_]+)?")  # RFC 2045 5.1, RFC 8601 2.2
_MAX_VALUE: Final = 320
_LINE: Final = 78
_VERSION: Final = re.compile(r"[ \t\r\n;/(]")


class MethodResult(NamedTuple):
    """One result: `dkim=pass header.d=example.org header.s=s1`."""

    method: str
    result: str
    properties: tuple[tuple[str, str], ...] = ()
    """("header.d", "example.org"): values may be text of the client, and are quoted as needed."""


def authentication_results(authserv_id: str, results: Iterable[MethodResult]) -> bytes:
    """Return the field with its CRLF, folded; "none" stands for no results (RFC 8601 2.2)."""
    pieces = [f"Authentication-Results: {authserv_id}"]
    column = len(pieces[0])
    words: list[str] = []
    for method, result, properties in results:
        words.append(f";{method}={result}")
        words += [f" {name}={quote(value)}" for name, value in properties if value]
    for word in words or [";none"]:
        if word[0] == ";":  # it ends the method before
            pieces.append(";")
            column += 1
        if column + len(word) >= _LINE:
            pieces.append("\r\n\t")
            column = 0
        else:
            pieces.append(" ")
        pieces.append(word[1:])
        column += len(word)
    pieces.append("\r\n")
    return "".join(pieces).encode("ascii")


def quote(text: str) -> str:
    """Return a value as a token or a quoted string (RFC 8601 2.2); octets that are not printable ASCII become "?"."""
    if _TOKEN.fullmatch(text) and len(text) <= _MAX_VALUE:
        return text
    text = "".join(char if " " <= char <= "~" else "?" for char in text[:_MAX_VALUE])
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


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
