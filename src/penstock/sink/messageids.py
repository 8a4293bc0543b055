"""Duplicates by Message-ID, for messages that have no sequence tag.

Mail that `penstock load` did not send has no number, but RFC 5322 3.6.4 gives each message an identifier that is unique
in the world: a second message with the same one is the same message, sent again. Missing messages cannot be found so.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from penstock import sequence

MAX_IDS: Final = 500_000
"""Identifiers that are distinguished; each takes about 100 octets."""
_MAX_EXAMPLES: Final = 100
_MAX_SHOWN: Final = 200
_FIELD: Final = re.compile(rb"^Message-ID[ \t]*:(?:[ \t]|\r?\n[ \t])*([^\s]+)", re.IGNORECASE | re.MULTILINE)


def message_id_of(header: bytes) -> str:
    """Return the Message-ID of a header as it stands; "" without one."""
    found = _FIELD.search(header)
    return "" if found is None else found[1].decode("utf-8", "replace")[:_MAX_SHOWN]


class MessageIdTracker:
    """The Message-IDs that have arrived."""

    def __init__(self, max_ids: int = MAX_IDS) -> None:
        self._max_ids = max_ids
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._seen: set[bytes] = set()
        self.duplicates = 0
        """Messages whose Message-ID had arrived before."""
        self.missing_id = 0
        """Messages without a Message-ID."""
        self.further = 0
        """Messages with a Message-ID that could not be tracked, because the table is full."""
        self.examples: list[str] = []
        """The first hundred duplicate Message-IDs."""

    @property
    def distinct(self) -> int:
        """Different Message-IDs."""
        return len(self._seen)

    def note(self, sender: str, header: bytes) -> None:
        """Count an accepted message, unless its sender has a sequence tag."""
        if sequence.parse(sender.rpartition("@")[0]) is not None:
            return
        self.add(message_id_of(header))

    def add(self, found: str) -> None:
        """Count the Message-ID of a message; "" for none."""
        if not found:
            self.missing_id += 1
            return
        digest = hashlib.blake2b(found.encode(), digest_size=12).digest()
        if digest in self._seen:
            self.duplicates += 1
            if len(self.examples) < _MAX_EXAMPLES:
                self.examples.append(found)
        elif len(self._seen) < self._max_ids:
            self._seen.add(digest)
        else:
            self.further += 1


class MessageIdOutbox(MessageIdTracker):
    """Collects Message-IDs for another process, which counts them: the same message may come to several workers."""

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._waiting: list[str] = []

    def add(self, found: str) -> None:
        """Collect a Message-ID; beyond the limit it counts as one that cannot be tracked."""
        if len(self._waiting) < self._max_ids:
            self._waiting.append(found)
        else:
            self.further += 1

    def take(self) -> tuple[list[str], int]:
        """Return what was collected since the last time, and how many were not."""
        found, further = self._waiting, self.further
        self._waiting, self.further = [], 0
        return found, further
