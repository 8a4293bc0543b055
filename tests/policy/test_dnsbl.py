"""DNS lists: what their answers mean, and what can never condemn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio.testing

from penstock.breaker import Breaker
from penstock.journal import Journal, JournalSettings
from penstock.policy.dnsbl import _Lookup, is_error, make_checks, parse_pattern, reversed_name
from penstock.policy.evidence import Evidence, Lookup, Pending
from penstock.results import Listing
from tests.dns.lying import Clock, Lying, zone_of
from tests.policy.harness import judging

TEST_POINT = "2.0.0.127.bl.example A 127.0.0.2"


def listed(*answers: str, text: str = "") -> Lying:
    """Return a server with a list that has 192.0.2.1."""
    lines = [TEST_POINT, *(f"1.2.0.192.bl.example A {answer}" for answer in answers)]
    return Lying(zone_of(*lines, *([f'1.2.0.192.bl.example TXT "{text}"'] if text else [])))


def lists(*more: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"dnsbl": [{"zone": "bl.example", **keys}, *more]}


def number(address: str) -> int:
    return int.from_bytes(bytes(map(int, address.split("."))), "big")


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("127.0.0.2", ["127.0.0.2"], ["127.0.0.3", "127.0.1.2"]),
        ("127.0.0.2-127.0.0.9", ["127.0.0.2", "127.0.0.9"], ["127.0.0.1", "127.0.0.10"]),
        ("127.0.*.1-3", ["127.0.0.1", "127.0.255.3"], ["127.0.5.4", "127.1.0.1"]),
        ("127.0.0.*", ["127.0.0.0", "127.0.0.255"], ["127.0.1.0"]),
        ("127.0.0.2-9", ["127.0.0.2", "127.0.0.9"], ["127.0.0.10"]),
    ],
)
def test_a_pattern_is_an_address_a_range_or_ranges_of_numbers(
    pattern: str, inside: list[str], outside: list[str]
) -> None:
    found = parse_pattern(pattern)
    assert all(found.matches(number(each)) for each in inside)
    assert not any(found.matches(number(each)) for each in outside)


@pytest.mark.parametrize("text", ["", "127", "10.0.0.1", "127.0.0.9-127.0.0.2", "127.0.0.256", "127.0.*", "127.*.x.1"])
def test_a_malformed_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not 127"):
        parse_pattern(text)


def test_an_address_is_asked_for_in_reverse() -> None:
    assert reversed_name("192.0.2.1") == "1.2.0.192"
    assert reversed_name("2001:db8::1") == "1." + "0." * 23 + "8.b.d.0.1.0.0.2"


async def test_a_listed_client_is_refused_at_rcpt_with_the_text_of_the_list() -> None:
    async with judging(make_checks, listed("127.0.0.2", text="see https://bl.example/?q"), lists()) as judged:
        transaction, verdict = await judged.connect()
        assert verdict is None
        assert await judged.mail(transaction) is None
        refusal = await judged.rcpt(transaction)
        assert refusal is not None
        assert (refusal.code, refusal.status) == (554, "5.7.1")
        assert refusal.text == "Client host [192.0.2.1] blocked using bl.example; see https://bl.example/?q"
        assert refusal.cause == "bl.example=127.0.0.2 (10)"
        for exempt in ("postmaster@example.org", "Abuse@example.org"):
            assert await judged.rcpt(transaction, exempt) is None
        assert transaction.results.scores == {}, "mail for postmaster is not refused at its end either"
        other, _ = await judged.connect("192.0.2.9")
        assert await judged.rcpt(other) is None


async def test_a_listed_client_is_refused_at_the_connection_if_wanted() -> None:
    policy = lists() | {"dnsbl_at": {"reject": "connect"}}
    async with judging(make_checks, listed("127.0.0.2"), policy) as judged:
        _, refusal = await judged.connect()
        assert refusal is not None
        assert refusal.code == 554


@pytest.mark.parametrize(
    ("keys", "answers", "score"),
    [
        ({"answers": {"127.0.0.2-127.0.0.9": 4.0}}, ["127.0.0.2", "127.0.0.3"], 4.0),
        ({"answers": {"127.0.0.2": 4.0, "127.0.0.10": 1.5}}, ["127.0.0.2", "127.0.0.10"], 5.5),
        ({"answers": {"127.0.*.1-3": -4.0}}, ["127.0.9.2"], -4.0),
        ({"answers": {"127.0.0.9": 4.0}}, ["127.0.0.2"], None),
        ({"answers": {"127.0.0.2": 4.0}, "mode": "monitor"}, ["127.0.0.2"], None),
    ],
)
async def test_answers_add_their_scores_once(keys: dict[str, Any], answers: list[str], score: float | None) -> None:
    async with judging(make_checks, listed(*answers), lists(**keys)) as judged:
        transaction, _ = await judged.connect()
        for recipient in ("a@example.org", "b@example.org"):
            assert await judged.rcpt(transaction, recipient) is None
        assert transaction.results.scores == ({} if score is None else {"dnsbl": score})


async def test_lists_of_good_senders_outweigh_others() -> None:
    good = {"zone": "wl.example", "answers": {"127.0.*.1-3": -8.0}}
    lying = listed("127.0.0.2")
    lying.zone.add("2.0.0.127.wl.example", "A", "127.0.0.2")
    lying.zone.add("1.2.0.192.wl.example", "A", "127.0.3.2")
    async with judging(make_checks, lying, lists(good)) as judged:
        transaction, _ = await judged.connect()
        assert await judged.rcpt(transaction) is None
        assert transaction.results.score == 2.0
        assert transaction.results.dnsbl is not None
        assert transaction.results.dnsbl.listings == (
            Listing("bl.example", ("127.0.0.2",), 10.0),
            Listing("wl.example", ("127.0.3.2",), -8.0),
        )


async def test_a_list_in_monitor_mode_refuses_no_client() -> None:
    async with judging(make_checks, listed("127.0.0.2"), lists(mode="monitor")) as judged:
        transaction, _ = await judged.connect()
        assert await judged.rcpt(transaction) is None
        assert '"event":"monitored"' in judged.events()
        assert transaction.results.monitored_scores == {"dnsbl": 10.0}


ERRORS = ["127.255.255.254", "127.255.255.1", "127.0.0.1", "192.0.2.66", "0.0.0.0"]


@pytest.mark.parametrize("answer", ERRORS)
async def test_an_error_answer_never_condemns(answer: str) -> None:
    assert is_error(number(answer))
    async with judging(make_checks, listed("127.0.0.2", answer), lists(answers={"127.*.*.*": 10.0})) as judged:
        transaction, _ = await judged.connect()
        assert await judged.rcpt(transaction) is None
        assert transaction.results.dnsbl is not None
        assert transaction.results.dnsbl.listings == ()
        assert f"the list has answered {answer}" in judged.events()
        lists_check = judged.judge.checks[0]
        assert not lists_check._lists[0].is_usable, "until the next self-test"  # type: ignore[attr-defined]


@pytest.mark.parametrize("trouble", ["everything listed", "nothing listed", "errors", "SERVFAIL"])
async def test_a_list_that_fails_its_self_test_is_not_used(trouble: str) -> None:
    lying = listed("127.0.0.2")
    if trouble == "everything listed":
        lying.zone.add("1.0.0.127.bl.example", "A", "127.0.0.2")
    elif trouble == "SERVFAIL":
        lying.zone.failures["2.0.0.127.bl.example"] = "SERVFAIL"
    else:
        lying.zone.records.pop(("2.0.0.127.bl.example", "A"))
        if trouble == "errors":
            lying.zone.add("2.0.0.127.bl.example", "A", "127.255.255.254")
    async with judging(make_checks, lying, lists(), timeout=0.05, lifetime=0.1) as judged:
        transaction, _ = await judged.connect()
        assert await judged.rcpt(transaction) is None
        assert '"event":"list-failed","zone":"bl.example"' in judged.events()


async def test_a_list_is_used_once_its_self_test_succeeds(autojump_clock: trio.testing.MockClock) -> None:
    lying = listed("127.0.0.2")
    clock = Clock()
    lying.zone.failures["2.0.0.127.bl.example"] = "SERVFAIL"
    async with judging(make_checks, lying, lists(), clock=clock) as judged:
        transaction, _ = await judged.connect()
        assert await judged.rcpt(transaction) is None
        lying.zone.failures.clear()
        clock.now += 10
        await trio.sleep(10)
        transaction, _ = await judged.connect()
        assert await judged.rcpt(transaction) is not None


async def test_a_list_without_an_answer_is_left_out() -> None:
    lying = listed("127.0.0.2")
    async with judging(make_checks, lying, lists(), timeout=0.05, lifetime=0.1) as judged:
        lying.zone.failures["1.2.0.192.bl.example"] = "SERVFAIL"
        transaction, _ = await judged.connect()
        assert await judged.rcpt(transaction) is None
        assert transaction.results.scores == {}


class Noted(Lookup[str]):
    """A lookup that notes when it is finished."""

    def __init__(self, name: str, evidence: Evidence, finished: list[str], *, asks_more: bool) -> None:
        super().__init__(evidence.begin(name))
        self.name, self.asks_more = name, asks_more  # type: ignore[misc]
        self._finished = finished

    async def finish(self, *, are_due: bool) -> None:
        await trio.lowlevel.checkpoint()
        self._finished.append(self.name)


async def test_the_name_servers_of_the_client_delay_no_list() -> None:
    evidence, journal = Evidence(), Journal(JournalSettings())
    finished: list[str] = []
    async with trio.open_nursery() as nursery:
        evidence.look_up(Noted("fcrdns", evidence, finished, asks_more=True), nursery, journal)
        evidence.look_up(Noted("dnsbl", evidence, finished, asks_more=False), nursery, journal)
    assert finished == ["dnsbl", "fcrdns"]


def test_a_list_is_asked_again_after_a_client_has_left_before_the_answer() -> None:
    breaker = Breaker(1, 1.0, 1.0)
    breaker.failed(0.0)
    asked = SimpleNamespace(breaker=breaker)
    check = SimpleNamespace(
        ask=lambda lists, _: [each.breaker.probe() for each in lists] and SimpleNamespace(abandon=list)
    )
    lookup = _Lookup(check, [asked], "1.2.0.192", Pending())  # type: ignore[arg-type, list-item]
    lookup.begin()
    assert breaker.blocks(2.0), "while it is asked"
    lookup.close()
    assert not breaker.blocks(2.0)
