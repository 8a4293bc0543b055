"""The compiled lines of the journal: None if one of the values is not plain; see ext/journal.pyx."""

from collections.abc import Sequence

from penstock.message import Path, Recipient
from penstock.reply import Reply

def connected(stamp: str, session: int, address: str, listener: str) -> bytes | None:
    """Return the line of an accepted connection."""

def disconnected(
    stamp: str, session: int, address: str, messages: int, errors: int, octets: int, seconds: float, cause: str
) -> bytes | None:
    """Return the line of a session that has ended."""

def accepted(
    stamp: str,
    session: int,
    address: str,
    message_id: str,
    sender: Path | None,
    recipients: Sequence[Recipient],
    octets: int,
    reply: Reply,
) -> bytes | None:
    """Return the line of an accepted message."""

def delivered(
    stamp: str, message_id: str, recipients: Sequence[Recipient], hop: str, said: str, attempts: int, seconds: float
) -> bytes | None:
    """Return the line of a delivery."""
