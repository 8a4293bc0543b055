"""Replies that go out wrong."""

from __future__ import annotations

import hashlib
import re
from typing import Final

from penstock.sink.plan import Dress

_LONG: Final = 2000
"""Octets of a line that is too long; RFC 5321 4.5.3.1.5 allows 512."""
_MANY: Final = 1000
_GARBAGE: Final = 64
_NOT_ASCII: Final = b" Gr\xfc\xdfe \xe2\x82"
"""Latin-1, then UTF-8 that breaks off."""
_OUT_OF_PLACE: Final = {b"2": b"354", b"3": b"250", b"4": b"250", b"5": b"334"}
"""For a code of a class, one that says something else, or that nothing has asked for."""
_LAST_LINE: Final = re.compile(rb"[2-5][0-9]{2}(?: |\r?\Z)")


def readable(said: bytes) -> list[bytes]:
    """Return the replies that a client can read in what is sent; an empty one for what is none, or not whole.

    A reply is whole when its last line has come to an end, be it a bare LF: clients that mind it are few.
    """
    found: list[bytes] = []
    begun = b""
    *lines, rest = said.split(b"\n")
    for line in lines:
        begun += line + b"\n"
        if _LAST_LINE.match(line):
            found.append(begun)
            begun = b""
    return [*found, b""] if begun or rest else found


def dress(replies: bytes, how: Dress, drawn: int = 0) -> bytes:
    """Return encoded replies as they go out. `drawn` are bits for the garbage."""
    if how == "bare-lf":
        return replies.replace(b"\r\n", b"\n")
    if how == "no-line-end":
        return replies.removesuffix(b"\r\n")
    if how == "garbage":
        return hashlib.shake_128(drawn.to_bytes(8, "big")).digest(_GARBAGE) + b"\r\n"
    lines = replies.split(b"\r\n")[:-1]
    if not lines:
        return replies
    if how == "wrong-code":
        lines = [_OUT_OF_PLACE.get(line[:1], b"250") + line[3:] for line in lines]
    last = lines.pop()
    if how == "many-lines":
        lines += [last[:3] + b"-" + last[4:]] * (_MANY - 1)
    elif how == "unfinished":
        last = last[:3] + b"-" + last[4:]
    elif how == "too-long":
        last += b" " + b"x" * (_LONG - len(last) - 3)
    elif how == "non-ascii":
        last += _NOT_ASCII
    return b"".join(line + b"\r\n" for line in (*lines, last))
