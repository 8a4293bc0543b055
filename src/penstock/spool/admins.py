"""All parts of a spool as one: each worker of a server has one of its own (penstock.spool.spool.shards)."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from penstock.message import Body
from penstock.spool.admin import Filter, ListedMessage, QueueAdmin, Stats
from penstock.spool.spool import shard_of, shards
from penstock.spool.store import SpoolError

_LANES: Final = 10


class QueueAdmins:
    """What `QueueAdmin` does, with all parts. Use `opened`."""

    def __init__(self, desks: Sequence[tuple[str, QueueAdmin]]) -> None:
        self._named = desks
        self._desks = [desk for _, desk in desks]

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[QueueAdmins]:
        """Open the parts of the spool in a folder. Raise SpoolError when there is none, or one of another version."""
        names = [shard_of(folder.name, index) for index in shards(folder)] or [folder.name]
        with ExitStack() as stack:
            yield cls([(name, stack.enter_context(QueueAdmin.opened(folder.parent / name))) for name in names])

    def find(self, what: Filter, limit: int) -> Iterator[ListedMessage]:
        """Yield messages, the oldest first, at most so many; a limit of 0 is none."""
        found = heapq.merge(*(desk.find(what, limit) for desk in self._desks), key=lambda each: each.received_at)
        for count, message in enumerate(found, 1):
            yield message
            if count == limit:
                return

    def text(self, message_id: str) -> tuple[bytes, Body]:
        """Return the fields that were added to a message, and its body. Raise SpoolError when it is not there."""
        *others, last = self._desks
        for desk in others:
            try:
                return desk.text(message_id)
            except SpoolError:
                continue
        return last.text(message_id)

    def stats(self) -> Stats:
        """Count what waits."""
        # A lane that is full in all parts together need not be among the fullest of each, but nearly always is.
        found = [desk.stats(_LANES * 10) for desk in self._desks]
        lanes: Counter[str] = Counter()
        for each in found:
            lanes.update(dict(each.lanes))
        oldest = [each.oldest for each in found if each.oldest is not None]
        messages, recipients, octets, due, later, attempting, held = (
            sum(values) for values in zip(*(each[:7] for each in found), strict=True)
        )
        return Stats(
            messages,
            recipients,
            octets,
            due,
            later,
            attempting,
            held,
            min(oldest, default=None),
            lanes.most_common(_LANES),
        )

    def retry(self, what: Filter) -> int:
        """Let recipients that wait be due now. Return how many there were."""
        return self._change(QueueAdmin.retry, what)

    def hold(self, what: Filter) -> int:
        """Let recipients wait until they are released. Return how many there were."""
        return self._change(QueueAdmin.hold, what)

    def release(self, what: Filter) -> int:
        """Let recipients that are held be due now. Return how many there were."""
        return self._change(QueueAdmin.release, what)

    def drop(self, what: Filter) -> int:
        """Delete recipients, and messages that have none left; nobody is told. Return how many recipients."""
        return self._change(QueueAdmin.drop, what)

    def _change(self, act: Callable[[QueueAdmin, Filter], int], what: Filter) -> int:
        return sum(act(desk, what) for desk in self._desks)

    def check(self) -> Iterator[str]:
        """Yield what is wrong, a line each, with the part when there are several; nothing when all is well."""
        for name, desk in self._named:
            for line in desk.check():
                yield f"{name}: {line}" if len(self._named) > 1 else line
