"""What the sessions of a run share: its generator (penstock.load.generator)."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, NamedTuple, Protocol

from penstock.load.counts import Counts
from penstock.load.plan import Plan, Target
from penstock.load.texts import Text
from penstock.net._poller import Poller

if TYPE_CHECKING:
    from penstock.load.session import Session


class Job(NamedTuple):
    """A message to send."""

    number: int
    text: Text
    intended: int
    """When it was to start, in nanoseconds of the clock; 0 in a closed loop."""


class SessionPool(Protocol):
    """What the sessions of a run share."""

    plan: Plan
    counts: Counts
    poller: Poller
    tls: ssl.SSLContext | None
    tls_sessions: dict[Target, ssl.SSLSession | None]
    """The last TLS session with each target, to be resumed."""

    def next_job(self, session: Session) -> Job | None:
        """Return the next message; None if there is none now."""

    def wait_for_job(self, session: Session) -> bool:
        """Have `begin` called when there is a message. Return False if there will be none."""

    def continue_now(self, session: Session) -> bool:
        """Note that a connection has ended, if the next is due now. Otherwise note nothing, and return False."""

    async def next_connection(self, session: Session) -> bool:
        """Note that a connection has ended, and wait until the next is due. Return False if there is no more work."""
