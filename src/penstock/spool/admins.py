"""All parts of a spool together: each worker of a server has its own (penstock.spool.spool.shards)."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from penstock.message import Body
from penstock.spool.admin import Ages, Change, Filter, ListedMessage, QueueAdmin, Stats
from penstock.spool.entry import HopState
from penstock.spool.spool import shard_of, shards
from penstock.spool.store import SpoolError

_QUEUES: Final = 10


class QueueAdmins:
    """Does what `QueueAdmin` does with all parts. Use `opened`."""

    def __init__(self, admins: Sequence[tuple[str, QueueAdmin]]) -> None:
        self._named = admins
        self._admins = [admin for _, admin in admins]

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[QueueAdmins]:
        """Open the parts of the spool in a folder. Raise SpoolError if none exists or one has another version."""
        names = [shard_of(folder.name, index) for index in shards(folder)] or [folder.name]
        with ExitStack() as stack:
            yield cls([(name, stack.enter_context(QueueAdmin.opened(folder.parent / name))) for name in names])

    def find(self, what: Filter, limit: int) -> Iterator[ListedMessage]:
        """Yield messages, the oldest first, at most `limit` unless that is 0."""
        found = heapq.merge(*(admin.find(what, limit) for admin in self._admins), key=lambda each: each.received_at)
        for count, message in enumerate(found, 1):
            yield message
            if count == limit:
                return

    def text(self, message_id: str) -> tuple[bytes, Body]:
        """Return the header fields added to a message, and its body. Raise SpoolError if it is not in the spool."""
        *others, last = self._admins
        for admin in others:
            try:
                return admin.text(message_id)
            except SpoolError:
                continue
        return last.text(message_id)

    def stats(self) -> Stats:
        """Count messages and recipients."""
        # A queue that is long in all parts together need not be among the longest of each, but nearly always is.
        found = [admin.stats(_QUEUES * 10) for admin in self._admins]
        queues: Counter[str] = Counter()
        for each in found:
            queues.update(dict(each.queues))
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
            queues.most_common(_QUEUES),
        )

    def ages(self, limit: int = 0) -> list[Ages]:
        """Return the recipients by domain and age, the domain with the most first; at most `limit` unless that is 0."""
        totals: dict[str, list[int]] = {}
        for each in (ages for admin in self._admins for ages in admin.ages()):
            before = totals.get(each.domain, [0] * len(each.counts))
            totals[each.domain] = [one + other for one, other in zip(before, each.counts, strict=True)]
        found = sorted((Ages(*each) for each in totals.items()), key=lambda each: (-sum(each.counts), each.domain))
        return found[:limit] if limit else found

    def hops(self) -> list[HopState]:
        """Return the next hops that are backing off, in any worker."""
        worst: dict[str, HopState] = {}
        for hop in (hop for admin in self._admins for hop in admin.hops()):
            if hop.name not in worst or hop.until > worst[hop.name].until:
                worst[hop.name] = hop
        return sorted(worst.values())

    def suspended(self) -> list[str]:
        """Return the domains and next hops that are suspended."""
        return sorted({name for admin in self._admins for name in admin.suspended()})

    def unknown(self, ids: Sequence[str]) -> list[str]:
        """Return those of the message ids that are in no part of the spool."""
        for admin in self._admins:
            ids = admin.unknown(ids)
        return list(ids)

    def retry(self, what: Filter) -> Change:
        """Let recipients that wait be due now."""
        return self._change("retry", what)

    def hold(self, what: Filter) -> Change:
        """Let recipients wait until they are released."""
        return self._change("hold", what)

    def release(self, what: Filter) -> Change:
        """Let recipients that are held be due now."""
        return self._change("release", what)

    def drop(self, what: Filter) -> Change:
        """Delete recipients, and messages that have none left, without a report to the sender."""
        return self._change("drop", what)

    def bounce(self, what: Filter) -> Change:
        """Have the server return recipients to their sender now. Without a server, it does so when it is started."""
        return self._change("bounce", what)

    def suspend(self, name: str) -> bool:
        """Send nothing to a domain, or to a next hop by host or full name. Return False if that was so already."""
        return sum(admin.suspend(name) for admin in self._admins) > 0

    def resume(self, name: str) -> bool:
        """Undo `suspend`. Return False if the name was not suspended."""
        return sum(admin.resume(name) for admin in self._admins) > 0

    def _change(self, action: str, what: Filter) -> Change:
        done = Change(0)
        for admin in self._admins:
            done = done.plus(getattr(admin, action)(what))
        return done

    def check(self) -> Iterator[str]:
        """Yield a line for each inconsistency, with the part if there are several."""
        for name, admin in self._named:
            for line in admin.check():
                yield f"{name}: {line}" if len(self._named) > 1 else line
