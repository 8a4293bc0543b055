"""The compiled lines of the journal; see ext/journal.pyx."""

from typing import Any

def line(when: float, event: str, session: int, peer: tuple[Any, ...] | None, values: tuple[Any, ...]) -> bytes | None:
    """Return the JSON line of a frequent event with plain values, None for any other. `peer` is a `Peer`."""
