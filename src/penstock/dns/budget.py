"""A bound for what one client can make the resolver do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import trio

from penstock.dns.resolver import MAX_QUESTIONS_OF_CHECKS, Answer, Kind, Resolver

MAX_QUESTIONS: Final = 40


class Budget:
    """A number of questions and a deadline that the checks of one session, or of one message, share.

    What is beyond them is answered "failed" at once: a temporary state, as when the DNS is silent. Answers from the
    cache are free.
    """

    def __init__(self, resolver: Resolver, *, seconds: float, questions: int = MAX_QUESTIONS) -> None:
        """The `seconds` start now."""
        self._resolver = resolver
        self._deadline = trio.current_time() + seconds
        self._questions = questions

    def restart(self, seconds: float) -> None:
        """Begin another step: the `seconds` start now. The number of questions is left as it is."""
        self._deadline = trio.current_time() + seconds

    async def query(self, name: str, kind: Kind) -> Answer:
        """Return the answer to a question. It never raises."""
        answer = self._resolver.cached(name, kind)
        if answer is not None:
            return answer
        if self._questions <= 0:
            return Answer("failed", name=name, cause="too many DNS questions for one client")
        seconds = self._deadline - trio.current_time()
        if seconds <= 0:
            return Answer("failed", name=name, cause="the DNS took too long")
        self._questions -= 1
        return await self._resolver.query(name, kind, seconds, most=MAX_QUESTIONS_OF_CHECKS)

    async def ask_ahead(self, questions: Sequence[tuple[str, Kind]]) -> None:
        """Ask questions at once, as far as the budget goes, so that `query` finds their answers in the cache."""
        asked = [each for each in questions if self._resolver.cached(*each) is None][: self._questions]
        seconds = self._deadline - trio.current_time()
        if asked and seconds > 0:
            self._questions -= len(asked)
            await self._resolver.query_all(asked, seconds)
