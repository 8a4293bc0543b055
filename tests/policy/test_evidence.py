"""Lookups about a client: the order in which they are begun, finished and given up."""

from __future__ import annotations

import pytest
import trio

from penstock.journal import Journal, JournalSettings
from penstock.policy.evidence import Evidence, Lookup

JOURNAL = Journal(JournalSettings())


class Noted(Lookup[str]):
    """A lookup that notes what is called, and finishes when it may."""

    def __init__(self, name: str, evidence: Evidence, calls: list[str], *, asks_more: bool = False) -> None:
        super().__init__(evidence.begin(name))
        self.name, self.asks_more = name, asks_more  # type: ignore[misc]
        self.calls = calls
        self.may_finish = trio.Event()
        self.is_finishing = trio.Event()

    def begin(self) -> None:
        self.calls.append(f"begin {self.name}")

    async def finish(self, *, are_due: bool) -> None:
        self.is_finishing.set()
        await self.may_finish.wait()
        self.calls.append(f"finish {self.name}{' at once' if are_due else ''}")
        self.pending.set(self.name)

    def close(self) -> None:
        self.calls.append(f"close {self.name}")


async def test_all_questions_are_sent_before_one_is_waited_for() -> None:
    evidence, calls = Evidence(), list[str]()
    async with trio.open_nursery() as nursery:
        lookups = [
            Noted("names", evidence, calls, asks_more=True),
            Noted("lists", evidence, calls),
            Noted("others", evidence, calls),
        ]
        for each in lookups:
            evidence.look_up(each, nursery, JOURNAL)
        await lookups[1].is_finishing.wait()
        assert calls == ["begin names", "begin lists", "begin others"]
        for each in lookups:
            each.may_finish.set()
        await evidence.wait()
    # Those that ask more come last; the answers to the others have come while the first was waited for.
    assert calls[3:6] == ["finish lists", "finish others at once", "finish names at once"]
    assert sorted(calls[6:]) == ["close lists", "close names", "close others"]


async def test_a_lookup_that_comes_later_is_made_by_the_same_task() -> None:
    evidence, calls = Evidence(), list[str]()
    async with trio.open_nursery() as nursery:
        first, second = Noted("first", evidence, calls), Noted("second", evidence, calls)
        evidence.look_up(first, nursery, JOURNAL)
        await first.is_finishing.wait()
        evidence.look_up(second, nursery, JOURNAL)
        assert len(nursery.child_tasks) == 1
        first.may_finish.set()
        second.may_finish.set()
        await evidence.wait()
    assert calls[:4] == ["begin first", "finish first", "begin second", "finish second"]


@pytest.mark.parametrize("has_begun", [True, False])
async def test_nobody_waits_for_lookups_of_a_closed_connection(has_begun: bool) -> None:
    evidence, calls = Evidence(), list[str]()
    async with trio.open_nursery() as nursery:
        lookup, late = Noted("lookup", evidence, calls), Noted("late", evidence, calls)
        evidence.look_up(lookup, nursery, JOURNAL)
        if has_begun:
            await lookup.is_finishing.wait()
            evidence.look_up(late, nursery, JOURNAL)
        evidence.close()
        assert await lookup.pending.get() is None
        assert not has_begun or await late.pending.get() is None
    assert "close lookup" in calls
    assert ("close late" in calls) == has_begun
