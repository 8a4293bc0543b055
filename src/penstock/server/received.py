"""The Received field that every server adds above the body (RFC 5321 4.4), and the separation of the two."""

from __future__ import annotations

import re
from email.utils import formatdate
from typing import Final, NamedTuple

from penstock.message import MessageId, Path
from penstock.transaction import Transaction

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9!#$%&'*+/=?^_`{|}~.:\[\]@-]")
"""What must not be in an EHLO name in a header field: blanks, controls, non-ASCII, and the specials of RFC 5322 3.2.3
except those of address literals. A quote or parenthesis would open a string or comment, a semicolon end the field."""
_MAX_FOR: Final = 900
"""Octets of a recipient in the `for` clause: a line of a header has at most 998 (RFC 5322 2.1.1)."""
_FIELD_NAME: Final = re.compile(rb"[\x21-\x39\x3b-\x7e]+[ \t]*:")
_FIELD_NAME_SO_FAR: Final = re.compile(rb"[\x21-\x39\x3b-\x7e]*[ \t]*")
_MBOX_LINE: Final = re.compile(rb">*From (?![ \t]*:)")  # `From :` is a field (RFC 5322 4.5)
_MBOX_LINE_SO_FAR: Final = re.compile(rb">*(F|Fr|Fro|From)?")
MAX_START: Final = 1000
"""Octets of a body that `seam` looks at: a line of a header with its CR LF (RFC 5322 2.1.1)."""

_dates: dict[int, str] = {}


def _date(when: float) -> str:
    """Return the date in the format of RFC 5322 3.3, in UTC; formatted once per second."""
    second = int(when)
    date = _dates.get(second)
    if date is None:
        _dates.clear()
        date = _dates[second] = formatdate(second).replace("-0000", "+0000")
    return date


def received_field(
    transaction: Transaction, message_id: MessageId, hostname: str, when: float, recipient: Path | None
) -> bytes:
    """Return the Received field of a message, folded, with its CR LF.

    `recipient` is the only recipient of the message, None when there are several: naming them would disclose each to
    the others (RFC 5321 7.2).
    """
    tls = transaction.tls
    tls_line = f"\r\n\t(using {tls.version} with cipher {tls.cipher} ({tls.bits} bits))" if tls is not None else ""
    # A hop without SMTPUTF8 gets the message, and this field, if its addresses are ASCII with A-labels.
    address = "" if recipient is None else recipient.ascii_text
    for_line = f"\r\n\tfor <{address}>" if address and len(address.encode()) <= _MAX_FOR else ""
    return (
        f"Received: from {_UNSAFE.sub('?', transaction.hello)} ({transaction.peer.literal})"
        f"{tls_line}\r\n\tby {hostname} (Penstock) with {transaction.protocol} id {message_id}"
        f"{for_line};\r\n\t{_date(when)}\r\n"
    ).encode()


class Seam(NamedTuple):
    """How a body is joined to the trace fields above it."""

    skip: int
    """Octets of the body that are left out: a first line of mbox format."""
    separator: bytes
    """The octets between the trace fields and the body: b"" or an empty line."""


_SEPARATED: Final = Seam(0, b"\r\n")


def seam(start: bytes, *, is_whole: bool) -> Seam | None:
    """Return how a body that begins with these octets is joined to the trace fields above it.

    The body must not continue them. As in Postfix, an empty line is put before a body that begins with white space or
    with anything that is not a header field; a first `From ` line (mbox format) is left out. Everything else of the
    body stays as it is.

    `is_whole`: there are no octets after `start`. Return None if more octets are needed, which never happens
    with twice `MAX_START` octets or more.
    """
    was_whole, skip = is_whole, 0
    is_whole = was_whole or len(start) >= MAX_START
    if _MBOX_LINE.match(start):
        end = start.find(b"\n", 0, MAX_START)
        if end < 0:
            return _SEPARATED if is_whole else None  # too long for a line of mbox format
        skip = end + 1
        is_whole = was_whole or len(start) - skip >= MAX_START
    elif not is_whole and _MBOX_LINE_SO_FAR.fullmatch(start):
        return None
    rest = start[skip : skip + MAX_START]
    if not rest:
        return Seam(skip, b"") if is_whole else None
    if rest.startswith((b"\r\n", b"\n")) or _FIELD_NAME.match(rest):
        return Seam(skip, b"")  # an empty line ends the header: it is separate already
    if not is_whole and (rest == b"\r" or (rest[:1] not in b" \t" and _FIELD_NAME_SO_FAR.fullmatch(rest))):
        return None
    return Seam(skip, b"\r\n")
