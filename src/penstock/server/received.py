"""The trace field that every server adds above the body (RFC 5321 4.4)."""

from __future__ import annotations

import re
from email.utils import formatdate
from typing import Final

from penstock.message import MessageId, Path
from penstock.transaction import Transaction

_UNSAFE: Final = re.compile(r"[^\x21-\x27\x2a-\x5b\x5d-\x7e]")
"""What must not stand in a header as it is: blanks, controls, octets above 126, ( ) and backslash (RFC 5322 3.2.2)."""

_dates: dict[int, str] = {}


def _date(when: float) -> str:
    """Return the date of RFC 5322 3.3, in UTC, made once a second."""
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

    `recipient` is the only one of the message: with several, naming them would show each to the others (RFC 5321 7.2).
    """
    tls = transaction.tls
    tls_line = f"\r\n\t(using {tls.version} with cipher {tls.cipher} ({tls.bits} bits))" if tls is not None else ""
    for_line = f"\r\n\tfor <{recipient.text}>" if recipient is not None else ""
    return (
        f"Received: from {_UNSAFE.sub('?', transaction.hello)} ({transaction.peer.literal})"
        f"{tls_line}\r\n\tby {hostname} (Penstock) with {transaction.protocol} id {message_id}"
        f"{for_line};\r\n\t{_date(when)}\r\n"
    ).encode()
