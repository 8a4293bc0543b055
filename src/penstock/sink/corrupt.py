"""Corrupted replies."""

from __future__ import annotations

import hashlib
import re
from typing import Final

from penstock.sink.plan import Corruption

_LONG: Final = 2000
"""Octets of a line longer than the 512 of RFC 5321 4.5.3.1.5."""
_MANY: Final = 1000
_GARBAGE: Final = 64
_NOT_ASCII: Final = b" Gr\xfc\xdfe \xe2\x82"
"""Latin-1, then a truncated UTF-8 sequence."""
_OUT_OF_PLACE: Final = {b"2": b"354", b"3": b"250", b"4": b"250", b"5": b"334"}
"""Unexpected codes, by the class of the right one."""
_LAST_LINE: Final = re.compile(rb"[2-5][0-9]{2}(?: |\r?\Z)")


def complete_replies(octets: bytes) -> list[bytes]:
    """Return the replies that a client can read in the octets sent; b"" for octets that are not a complete reply.

    A reply is complete when its last line ends, also in a bare LF, which most clients accept.
    """
    found: list[bytes] = []
    begun = b""
    *lines, rest = octets.split(b"\n")
    for line in lines:
        begun += line + b"\n"
        if _LAST_LINE.match(line):
            found.append(begun)
            begun = b""
    return [*found, b""] if begun or rest else found


def corrupt(replies: bytes, how: Corruption, random_bits: int = 0) -> bytes:
    """Return encoded replies with a fault. `random_bits` are those of garbage."""
    if how == "bare-lf":
        return replies.replace(b"\r\n", b"\n")
    if how == "no-line-end":
        return replies.removesuffix(b"\r\n")
    if how == "garbage":
        return hashlib.shake_128(random_bits.to_bytes(8, "big")).digest(_GARBAGE) + b"\r\n"
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
