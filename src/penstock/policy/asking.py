"""Asks checks and policies at a hook point, in their order: whose answer ends the asking, and what it comes to."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, Protocol

from penstock.policy.base import ACCEPT, Accept
from penstock.reply import Reply
from penstock.transaction import Transaction

Answer = Reply | Literal[Accept.ACCEPT] | None
"""What is left of an answer once its marks are applied, and its mode."""


class Later(enum.Enum):
    """The type of `WAIT`."""

    WAIT = enum.auto()


WAIT: Final = Later.WAIT
"""Instead of an answer: something has to be waited for."""


class Asker(Protocol):
    """A check or a policy, with its deadline and whatever else guards it."""

    async def ask(
        self, method: Callable[..., Any], hook_point: str, transaction: Transaction, *arguments: object
    ) -> Answer:
        """Call a method of it. It never raises but for a cancellation: a failure has a reply, or is left out."""


Asked = tuple[Asker, Callable[..., Any]]


class Verdict:
    """What the answers so far come to."""

    __slots__ = ("reply",)

    def __init__(self) -> None:
        self.reply: Reply | None = None
        """A refusal, or the last reply that accepts."""

    def take(self, answer: Answer) -> bool:
        """Take an answer; return whether it ends the asking: the first refusal does, and ACCEPT."""
        if answer is None:
            return False
        if answer is ACCEPT:
            return True
        if answer.code == 421 and not answer.closes:  # RFC 5321 3.8: a server that sends 421 closes
            answer = Reply(421, answer.status, answer.text, closes=True, cause=answer.cause)
        self.reply = answer
        return not answer.accepts


async def ask_in_order(
    asked: Sequence[Asked], hook_point: str, transaction: Transaction, *arguments: object
) -> Reply | None:
    """Return a refusal, a reply that accepts, or None: no opinion."""
    verdict = Verdict()
    for asker, method in asked:
        if verdict.take(await asker.ask(method, hook_point, transaction, *arguments)):
            break
    return verdict.reply
