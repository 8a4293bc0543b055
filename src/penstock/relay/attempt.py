"""One attempt: a message is offered to the next hops of its route, one after the other (RFC 5321 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from penstock.message import Envelope
from penstock.relay.hop import Delivered, Hop, NextHopUnavailable, Outcome, Result
from penstock.relay.pool import Pool
from penstock.relay.queues import RouteQueue
from penstock.spool.entry import Entry

_MAX_SESSIONS: Final = 5
"""Hops that may answer and defer in one attempt; cf. Postfix smtp_mx_session_limit. Others are not counted."""


class Dispatcher(Protocol):
    """What an attempt needs of the scheduler."""

    pool: Pool
    is_running: bool

    def note_available(self, hop: Hop) -> None:
        """Note that a hop has answered a message."""

    def note_unavailable(self, hop: Hop, reason: NextHopUnavailable) -> None:
        """Note why a hop could not be used."""

    def sent(self, route_queue: RouteQueue, entry: Entry, results: Sequence[Result], *, is_final: bool) -> None:
        """Record the results."""

    def not_sent(self, route_queue: RouteQueue, entry: Entry, reason: NextHopUnavailable) -> None:
        """Record that no hop was available."""

    def broke(self, route_queue: RouteQueue, entry: Entry, exc: Exception) -> None:
        """Record a bug."""


class Attempt:
    """A message that is offered to next hops until each recipient has an end, or no hop is left.

    A recipient that a hop defers is offered to the next one, at whatever step it was deferred. One in doubt, which the
    hop may have accepted, is not: it would arrive twice.
    """

    __slots__ = (
        "_dispatcher",
        "_entry",
        "_hop",
        "_hops",
        "_pending",
        "_reason",
        "_results",
        "_route_queue",
        "_sessions",
    )

    def __init__(self, dispatcher: Dispatcher, route_queue: RouteQueue, entry: Entry, hops: Sequence[Hop]) -> None:
        self._dispatcher = dispatcher
        self._route_queue = route_queue
        self._entry = entry
        self._hops = hops
        self._hop = -1
        """The index of the hop that has the message."""
        self._sessions = 0
        self._reason: NextHopUnavailable | None = None
        """Why the first hop that could not be used could not."""
        self._results: list[Result] = []
        """The latest result for each recipient; empty before a hop has answered."""
        self._pending: Sequence[int] = range(len(entry.rows))
        """The recipients that the next hop is offered, by their place in the entry."""

    def offer(self) -> None:
        """Offer the message to the next hop that can be used."""
        entry = self._entry
        while self._hop + 1 < len(self._hops):
            self._hop += 1
            hop = self._hops[self._hop]
            if self._route_queue.is_hop_suspended(hop):
                continue  # since the attempt has begun
            try:
                self._dispatcher.pool.deliver_later(
                    hop, self._envelope(), entry.prefix, entry.body, entry.size, self._done
                )
            except NextHopUnavailable as exc:
                self._note_unavailable(hop, exc)
            except Exception as exc:  # noqa: BLE001 - a bug must not affect other messages
                self._dispatcher.broke(self._route_queue, entry, exc)
                return
            else:
                return
        self._end()

    def _envelope(self) -> Envelope:
        envelope = self._entry.envelope
        if len(self._pending) == len(envelope.recipients):
            return envelope
        return envelope._replace(recipients=tuple(envelope.recipients[place] for place in self._pending))

    def _note_unavailable(self, hop: Hop, reason: NextHopUnavailable) -> None:
        self._dispatcher.note_unavailable(hop, reason)
        self._reason = self._reason or reason

    def _done(self, outcome: Delivered | NextHopUnavailable) -> None:
        """Take what became of the message at a hop."""
        if isinstance(outcome, NextHopUnavailable):
            self._note_unavailable(self._hops[self._hop], outcome)
        else:
            self._dispatcher.note_available(self._hops[self._hop])
            self._sessions += 1
            self._merge(outcome)
        if not self._pending or self._sessions >= _MAX_SESSIONS or not self._dispatcher.is_running:
            self._end()
        else:
            self.offer()

    def _merge(self, results: Delivered) -> None:
        if not self._results or len(results) != len(self._pending):
            self._results = list(results)  # a wrong number is a bug, which is noticed when it is recorded
            self._pending = range(len(results)) if len(results) == len(self._entry.rows) else ()
        else:
            for place, result in zip(self._pending, results, strict=True):
                self._results[place] = result
        self._pending = [place for place in self._pending if _may_try_elsewhere(self._results[place])]

    def _end(self) -> None:
        if self._results:
            is_final = self._hops[self._hop].kind == "lmtp"
            self._dispatcher.sent(self._route_queue, self._entry, self._results, is_final=is_final)
        else:
            reason = self._reason or NextHopUnavailable("", "all next hops are suspended", "4.3.2")
            self._dispatcher.not_sent(self._route_queue, self._entry, reason)


def _may_try_elsewhere(result: Result) -> bool:
    """Return whether another hop may accept a recipient: it was deferred, certainly not delivered, and not by us."""
    is_ours = not result.is_said and result.status.startswith("4.3")  # a body that cannot be read, for example
    return result.kind is Outcome.DEFERRED and not result.in_doubt and not is_ours
