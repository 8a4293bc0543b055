"""Forward-confirmed reverse DNS."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from penstock.dns import Answer
from penstock.journal import Journal, JournalSettings
from penstock.policy.evidence import Evidence, Lookup, Pending
from penstock.policy.fcrdns import _Lookup, make_checks
from tests.dns.lying import Lying, zone_of
from tests.policy.harness import judging

PTR = "1.2.0.192.in-addr.arpa PTR"
CASES = {
    "pass": [f"{PTR} mail.example.", "mail.example A 192.0.2.1"],
    "pass by the second name": [f"{PTR} a.example.", f"{PTR} b.example.", "b.example A 192.0.2.1"],
    "fail": [f"{PTR} mail.example.", "mail.example A 192.0.2.2"],
    "permerror": [],
    "temperror": [f"{PTR} broken.example."],
}


@pytest.mark.parametrize("name", CASES)
async def test_the_result_is_whether_a_name_resolves_to_the_address(name: str) -> None:
    lying = Lying(zone_of(*CASES[name], failures={"broken.example": "SERVFAIL"}))
    async with judging(make_checks, lying, {"fcrdns": {"score": 2.5}}, timeout=0.05, lifetime=0.1) as judged:
        transaction, _ = await judged.connect()
        assert await judged.rcpt(transaction) is None
        assert await judged.rcpt(transaction) is None
        found = transaction.results.iprev
        assert found is not None
        assert found.result == name.partition(" ")[0]
        assert transaction.results.scores == ({"fcrdns": 2.5} if name in ("fail", "permerror") else {})


async def test_an_ipv6_client_has_a_name_too() -> None:
    pointer = "1." + "0." * 23 + "8.b.d.0.1.0.0.2.ip6.arpa"
    lying = Lying(zone_of(f"{pointer} PTR six.example.", "six.example AAAA 2001:db8::1"))
    async with judging(make_checks, lying, {"fcrdns": {}}) as judged:
        transaction, _ = await judged.connect("2001:db8::1")
        await judged.rcpt(transaction)
        assert transaction.results.iprev == ("pass", "six.example", "")


async def test_in_monitor_mode_no_score_is_added() -> None:
    async with judging(make_checks, Lying(), {"fcrdns": {"score": 2.5, "mode": "monitor"}}) as judged:
        transaction, _ = await judged.connect()
        await judged.rcpt(transaction)
        assert transaction.results.scores == {}
        assert transaction.results.monitored_scores == {"fcrdns": 2.5}


class Slow(Lookup[str]):
    """A lookup that takes longer than that of the names may."""

    name = "slow"

    async def finish(self, *, are_due: bool) -> None:
        await trio.sleep(9)
        self.pending.set("done")


class Known:
    """A resolver that has asked for everything when it is asked, and notes how many seconds a question has."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def cached(self, name: str, kind: str) -> None:
        return None

    def begin_all(self, questions: list[tuple[str, str]], seconds: float) -> Known:
        assert questions == [("1.2.0.192.in-addr.arpa", "PTR")]
        return self

    async def answers(self, *, are_due: bool) -> list[Answer]:
        assert are_due, "its answer has come while the other lookup was waited for"
        return [Answer("found", ("mail.example",))]

    async def query(self, name: str, kind: str, seconds: float, *, most: int) -> Answer:
        self.seconds.append(seconds)
        return Answer("found", (bytes((192, 0, 2, 1)),))

    def abandon(self) -> None:
        pass


async def test_slow_lists_take_no_time_from_the_names(autojump_clock: trio.testing.MockClock) -> None:
    evidence, journal = Evidence(), Journal(JournalSettings())
    resolver: Any = Known()
    slow, names = Pending[str](), Pending[Any]()
    async with trio.open_nursery() as nursery:
        evidence.look_up(Slow(slow), nursery, journal)
        evidence.look_up(_Lookup(resolver, "192.0.2.1", names), nursery, journal)
        await evidence.wait()
    assert (slow.value, names.value) == ("done", ("pass", "mail.example", ""))
    assert resolver.seconds == [3.0], "the time starts with the question about the name"
