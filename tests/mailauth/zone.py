"""A DNS that is a table, for pure checks."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from penstock.dns import Answer


@dataclass
class Table:
    """(name, type) -> records; names in `failing` do not answer."""

    records: dict[tuple[str, str], list[Any]] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, kind: str, *records: Any) -> Table:
        self.records.setdefault((name.lower(), kind), []).extend(records)
        return self

    async def query(self, name: str, kind: str) -> Answer:
        name = name.lower().rstrip(".")
        self.asked.append((name, kind))
        if name in self.failing:
            return Answer("failed", cause="it does not answer")
        found = self.records.get((name, kind))
        if found is not None:
            return Answer("found", tuple(found), name)
        exists = any(known == name or known.endswith("." + name) for known, _ in self.records)
        return Answer("empty" if exists else "missing", name=name)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run what never waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")
