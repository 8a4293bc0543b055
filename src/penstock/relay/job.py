"""A message on its way over connections, until there is a result for each of its recipients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from penstock.message import Body, Envelope
from penstock.relay.hop import Delivered, NextHopUnavailable, Result

Done = Callable[[Delivered | NextHopUnavailable], None]
"""Called once with the outcome of a message, in the trio thread. Must not block or raise."""


class Job:
    """A message for one hop. It may take several transactions, on several connections."""

    __slots__ = (
        "body", "coming", "done", "envelope", "in_memory", "is_abandoned", "is_question", "left", "prefix", "results",
        "returns", "since", "size", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        envelope: Envelope,
        prefix: bytes,
        body: Body | None,
        size: int,
        done: Done,
        *,
        coming: AsyncIterator[bytes] | None = None,
        is_question: bool = False,
    ) -> None:
        """`coming` is the text of a message that is still being received, in place of `prefix` and `body`.

        If it raises OSError, the connection is closed before the end of the text. `is_question`: there is no text, the
        hop is only asked whether it would accept the recipients.
        """
        self.envelope = envelope
        self.prefix = prefix
        self.body = body
        self.size = size
        self.done = done
        self.coming = coming
        self.is_question = is_question
        self.in_memory = bool(getattr(body, "in_memory", False))
        """Reading the body does not touch a disk."""
        self.results: list[Result | None] = [None] * len(envelope.recipients)
        self.left = len(envelope.recipients)
        """Recipients without a result."""
        self.waiting: list[int] = list(range(self.left))
        """Recipients that no transaction has begun with, by their place in the envelope."""
        self.returns = 0
        """How often a connection turned out to be closed before the hop had answered anything."""
        self.is_abandoned = False
        """The outcome is not wanted any more."""
        self.since = 0.0
        """When it began to wait for a connection."""

    def take(self, most: int) -> list[int]:
        """Take recipients for a transaction, at most `most`."""
        taken, self.waiting = self.waiting[:most], self.waiting[most:]
        return taken

    def put_back(self, places: list[int]) -> None:
        """Let recipients wait for another transaction, before the others."""
        self.waiting = places + self.waiting

    def record(self, place: int, result: Result) -> None:
        """Record the result for a recipient. The first one counts."""
        if self.results[place] is None:
            self.results[place] = result
            self.left -= 1

    def record_rest(self, result: Result) -> None:
        """Record a result for all recipients that have none."""
        for place in range(len(self.results)):
            self.record(place, result)
        self.waiting = []

    def finish(self) -> None:
        """Report the outcome: every recipient has a result."""
        if not self.is_abandoned:
            self.is_abandoned = True
            self.done([result for result in self.results if result is not None])

    def give_up(self, reason: NextHopUnavailable) -> None:
        """Report that the hop cannot be used. Recipients that were tried already keep their results."""
        if self.left < len(self.results):
            self.record_rest(reason.as_result())
            self.finish()
        elif not self.is_abandoned:
            self.is_abandoned = True
            self.done(reason)
