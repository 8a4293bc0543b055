"""Forward-confirmed reverse DNS."""

from __future__ import annotations

import pytest

from penstock.policy.fcrdns import make_checks
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
async def test_the_result_says_whether_a_name_leads_back(name: str) -> None:
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
