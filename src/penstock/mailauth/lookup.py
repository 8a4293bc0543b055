"""What the checks need of the DNS: a function that answers questions and never raises."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")
Kind = Literal["A", "AAAA", "MX", "PTR", "TXT"]


class Answer(Protocol):
    """The answer to a question; `penstock.dns.Answer` is one."""

    @property
    def status(self) -> str:
        """Return "found", "empty" (no such records), "missing" (no such name) or "failed" (not known now)."""

    @property
    def records(self) -> tuple[Any, ...]:
        """Return A and AAAA as octets, TXT as joined octets, PTR as names, MX as (preference, name)."""


Query = Callable[[str, Kind], Awaitable[Answer]]


Cached = Callable[[str, Kind], Answer | None]
"""Returns an answer that is known without asking."""


class UnknownAnswerError(Exception):
    """An answer would have to be asked for."""


def known_query(cached: Cached) -> Query:
    """Return a function for `run_now`, which raises UnknownAnswerError."""

    async def query(name: str, kind: Kind) -> Answer:
        answer = cached(name, kind)
        if answer is None:
            raise UnknownAnswerError
        return answer

    return query


def run_now(check: Coroutine[Any, Any, T]) -> T | None:
    """Run a check whose `query` does not wait, but raises UnknownAnswerError; return its result, None if it has.

    What needs no wait needs no task, no deadline and no checkpoint.
    """
    try:
        check.send(None)
    except StopIteration as exc:
        found: T = exc.value
        return found
    except UnknownAnswerError:
        return None
    check.close()
    raise RuntimeError("a check waits for something else than the DNS")
