"""How much waits in a part of the spool, counted in its database by another process than its server's."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple


class Depth(NamedTuple):
    """What waits."""

    messages: int = 0
    recipients: int = 0
    octets: int = 0
    oldest: float = 0.0
    """Seconds since the epoch; 0 for an empty spool."""
    queues: tuple[tuple[str, int], ...] = ()
    """The domains with the most recipients, and how many."""

    def plus(self, other: Depth) -> Depth:
        """Return the depth of two parts together."""
        queues = dict(self.queues)
        for name, count in other.queues:
            queues[name] = queues.get(name, 0) + count
        return Depth(
            self.messages + other.messages,
            self.recipients + other.recipients,
            self.octets + other.octets,
            min(filter(None, (self.oldest, other.oldest)), default=0.0),
            tuple(sorted(queues.items(), key=lambda each: (-each[1], each[0]))),
        )


def count(folder: Path, queues: int) -> Depth:
    """Count what waits in a part of the spool, and name the `queues` domains with the most recipients.

    The database is only read, and its server is not disturbed. Raise sqlite3.Error.
    """
    place = (folder / "spool.db").absolute().as_uri()
    with closing(sqlite3.connect(f"{place}?mode=ro", uri=True, timeout=1.0)) as database:
        messages, octets, oldest = database.execute(
            "SELECT count(*), coalesce(sum(size), 0), min(received_at) FROM message INDEXED BY message_listed"
        ).fetchone()
        (recipients,) = database.execute("SELECT count(*) FROM recipient").fetchone()
        fullest = database.execute(
            "SELECT name, count(*) FROM recipient JOIN queue ON queue.number = recipient.queue"
            " GROUP BY queue.number ORDER BY 2 DESC LIMIT ?",
            (queues,),
        ).fetchall()
    return Depth(messages, recipients, octets, oldest or 0.0, tuple(fullest))
