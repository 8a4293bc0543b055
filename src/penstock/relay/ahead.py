"""What a session wants of next hops before a message is ours: whether they know a recipient, and passing it on.

Both return replies (penstock.reply), so that policies and deliveries do not depend on the relay.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, Protocol

import msgspec

from penstock.message import NULL_PATH, Envelope, Message, Recipient
from penstock.relay.hop import Delivered, Hop, NextHopUnavailable, Outcome, Result
from penstock.relay.pool import Pool
from penstock.relay.recorder import PLACES
from penstock.relay.route import Route
from penstock.reply import Reply

_MOST_WORDS: Final = 300
"""Characters of a hop's words in a reply of ours."""


class Map(Protocol):
    """What knows where mail goes (penstock.relay.route)."""

    def domain_of(self, recipient: Recipient) -> str:
        """Return the domain of a recipient."""

    def static_route(self, domain: str) -> Route | None:
        """Return the route of a domain if it is known without a DNS query."""

    async def find_route(self, domain: str) -> Route:
        """Return the route of a domain. Raise an exception if the domain has no route."""


class Callahead:
    """Asks next hops about recipients, and passes messages on while they are received."""

    def __init__(
        self,
        pool: Pool,
        routes: Map,
        *,
        connections: int = 5,
        suspended: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        """Questions use `connections` separate connections to each hop, so that they delay no mail.

        `suspended` returns the domains and hops that an operator suspended: nothing is passed on to them.
        """
        self._suspended = suspended
        self.on_result: Callable[[str, int, int, float], None] | None = None
        """Gets the results of what was passed on, as that of AttemptRecorder does."""
        self._pool = pool
        self._routes = routes
        self._connections = connections
        self._random = random.Random()  # noqa: S311 - it spreads load

    async def ask(self, recipient: Recipient) -> Reply | None:
        """Ask whether a recipient is known. None: it is, or its mail stays here. 5xx: it is not. 4xx: not known now.

        A 452 4.2.2 is a mailbox that exists and is full. A hop that cannot say it is not the last one to be asked (RFC
        5321 5.1). Raise ResolveError if the next hop cannot be found.
        """
        route = await self._routes.find_route(self._routes.domain_of(recipient))
        if route.is_local:
            return None
        path = recipient.path
        envelope = Envelope(NULL_PATH, (Recipient(path),), smtputf8=not path.text.isascii())
        not_known: Reply | None = None
        for hop in route.order(self._random):
            try:
                (result,) = await self._pool.ask(self._aside(hop), envelope)
            except NextHopUnavailable as exc:
                not_known = not_known or unknown(str(exc))
                continue
            if result.kind is Outcome.DELIVERED:
                return None
            verdict = _verdict(result)
            if verdict.code != _NOT_KNOWN:
                return verdict
            not_known = verdict
        return not_known or unknown("there is no next hop")

    def _aside(self, hop: Hop) -> Hop:
        """Return a hop whose connections are for questions."""
        limits = msgspec.structs.replace(
            hop.limits, connections=min(self._connections, hop.limits.connections), queue=100, wait=30.0
        )
        return msgspec.structs.replace(hop, limits=limits)

    def begin(
        self,
        envelope: Envelope,
        size: int,
        coming: AsyncIterator[bytes],
        done: Callable[[Sequence[Reply] | None], None],
    ) -> Callable[[], None] | None:
        """Pass on a message while it is received, if all its recipients have the same next hop, which has capacity.

        A message whose sender requests NOTIFY=SUCCESS goes to the spool, which can report it if the hop does not.

        `done` is called with a reply for each recipient, or with None if nothing was delivered. Return a function after
        which it is not called any more, or None if the message cannot be passed on: then it is never called.
        """
        if any(recipient.wants("SUCCESS") for recipient in envelope.recipients):
            return None
        domains = {self._routes.domain_of(recipient) for recipient in envelope.recipients}
        suspended = self._suspended()
        if not suspended.isdisjoint(domains):
            return None
        routes = [self._routes.static_route(domain) for domain in domains]
        first = routes[0]
        if first is None or first.is_local or any(route is None or route.key != first.key for route in routes):
            return None
        hops = (hop for hop in first.order(self._random) if suspended.isdisjoint((hop.name.lower(), hop.host.lower())))
        hop = next((hop for hop in hops if self._pool.room(hop)), None)
        if hop is None:
            return None

        begun = time.monotonic()

        def heard(outcome: Delivered | NextHopUnavailable) -> None:
            if self.on_result is not None and not isinstance(outcome, NextHopUnavailable):
                age = time.monotonic() - begun
                for recipient, result in zip(envelope.recipients, outcome, strict=True):
                    self.on_result(self._routes.domain_of(recipient), PLACES[result.kind], 1, age)
            done(None if isinstance(outcome, NextHopUnavailable) else [as_reply(result) for result in outcome])

        try:
            return self._pool.stream(hop, envelope, size, coming, heard)
        except NextHopUnavailable:
            return None

    def note_delivered(self, message: Message, to: Recipient, reply: Reply) -> None:
        """Journal that a hop has accepted a message for a recipient, with the reply that `done` received."""
        if self._pool.journal is not None:
            hop, _, said = reply.cause.partition(": ")  # as `as_reply` has made it
            self._pool.journal.delivered(message.id, (to,), hop, said, 1, time.time() - message.received_at)


_NOT_KNOWN: Final = 451


def unknown(cause: str) -> Reply:
    """Return the reply if a hop does not say whether a recipient exists."""
    return Reply(_NOT_KNOWN, "4.4.3", "The next hop cannot be asked now", cause=cause)


_ABOUT_THE_SENDER: Final = ("5.1.7", "5.1.8")
"""Statuses of addresses that are not about the recipient (RFC 3463 3.2)."""


def _verdict(result: Result) -> Reply:
    """Return the meaning of a refusal of RCPT for the recipient.

    Only an address status (RFC 3463 3.2), or 550, 551 and 553 without a status (RFC 5321 4.2.2), mean that it does not
    exist. Everything else that is permanent for the hop is about us, or about now: it is no reason to bounce mail.
    """
    if not result.is_said:
        return unknown(result.text)
    code, status = result.text[:3], result.status
    if code == "552" or status.endswith(".2.2"):
        return Reply(452, "4.2.2", "The mailbox is full", cause=f"{result.hop}: {result.text}")
    has_status = status in result.text
    is_about_address = status.startswith("5.1.") and status not in _ABOUT_THE_SENDER
    is_unknown = is_about_address if has_status else code in ("550", "551", "553")
    if result.kind is Outcome.FAILED and is_unknown:
        return as_reply(result)
    return unknown(result.text)


def as_reply(result: Result) -> Reply:
    """Return a result as a reply, in the hop's words; where they are ours, they are the cause."""
    code = _CODES[result.kind]
    status = result.status if result.status[0] == str(code)[0] else f"{code // 100}.0.0"
    if not result.is_said:
        return Reply(code, status, "The next hop did not take it", cause=result.text)
    words = result.text[3:].strip().removeprefix(result.status).strip()
    return Reply(code, status, words[:_MOST_WORDS] or "The next hop said so", cause=f"{result.hop}: {result.text}")


_CODES: Final = {Outcome.DELIVERED: 250, Outcome.DEFERRED: 451, Outcome.FAILED: 550}
