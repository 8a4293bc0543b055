"""What the checks need of the DNS: a function that answers questions and never raises."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal, Protocol

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
