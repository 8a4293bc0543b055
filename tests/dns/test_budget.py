"""What one client can make the resolver do."""

from __future__ import annotations

from penstock.dns import Budget
from tests.dns.lying import Lying, resolving, zone_of


async def test_questions_are_counted_and_cached_answers_are_free() -> None:
    lying = Lying(zone_of("a.example A 192.0.2.1", "b.example A 192.0.2.1"))
    async with resolving(lying) as resolver:
        budget = Budget(resolver, seconds=60, questions=1)
        assert (await budget.query("a.example", "A")).status == "found"
        assert (await budget.query("A.example.", "A")).status == "found"
        answer = await budget.query("b.example", "A")
        assert (answer.status, answer.cause) == ("failed", "too many DNS questions for one client")


async def test_a_deadline_is_an_answer_and_not_an_exception() -> None:
    lying = Lying(udp=lambda _: [])
    async with resolving(lying, timeout=30.0) as resolver:
        budget = Budget(resolver, seconds=0.02)
        assert (await budget.query("a.example", "A")).cause.endswith(": no answer")
        assert (await budget.query("b.example", "A")).cause == "the DNS took too long"
        assert resolver._pending == {}
