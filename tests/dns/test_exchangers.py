"""Exchangers and addresses, from name servers on the loopback."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from penstock.dns.exchangers import Exchangers, ResolveError
from tests.dns.lying import Lying, zone_of
from tests.dns.lying import resolving as resolver_of
from tests.net.nameserver import Zone


@asynccontextmanager
async def resolving(zone: Zone, **settings: Any) -> AsyncIterator[Exchangers]:
    own_names, families = settings.pop("own_names", ()), settings.pop("families", ("ipv4", "ipv6"))
    async with resolver_of(Lying(zone), **settings) as resolver:
        yield Exchangers(resolver, own_names=own_names, families=families, random_source=random.Random(1))


async def failure(zone: Zone, domain: str = "example.org", **settings: Any) -> ResolveError:
    async with resolving(zone, **settings) as exchangers:
        with pytest.raises(ResolveError) as error:
            await exchangers.exchangers(domain)
        return error.value


async def test_exchangers_come_best_first_with_their_addresses() -> None:
    zone = zone_of(
        "example.org MX 20 Second.example.org.",
        "example.org MX 10 first.example.org.",
        "first.example.org A 192.0.2.1",
        "first.example.org AAAA 2001:db8::1",
        "second.example.org A 192.0.2.2",
    )
    async with resolving(zone) as resolver:
        assert await resolver.exchangers("Example.ORG") == [
            (10, "first.example.org", ("192.0.2.1", "2001:db8::1")),
            (20, "second.example.org", ("192.0.2.2",)),
        ]
    async with resolving(zone, families=("ipv6", "ipv4")) as resolver:
        assert (await resolver.addresses("first.example.org")) == ("2001:db8::1", "192.0.2.1")
    async with resolving(zone, families=("ipv6",)) as resolver:
        assert [exchanger.host for exchanger in await resolver.exchangers("example.org")] == ["first.example.org"]


async def test_equal_preferences_take_turns() -> None:
    zone = zone_of(*(f"example.org MX 10 mx{n}.example.org." for n in range(3)), "example.org MX 5 best.example.org.")
    for host in ("mx0", "mx1", "mx2", "best"):
        zone.add(f"{host}.example.org", "A", "192.0.2.1")
    async with resolving(zone) as resolver:
        orders = [tuple(each.host for each in await resolver.exchangers("example.org")) for _ in range(50)]
    assert {order[0] for order in orders} == {"best.example.org"}
    assert len({order[1:] for order in orders}) == 6


async def test_a_domain_without_an_mx_is_its_own_exchanger() -> None:
    async with resolving(zone_of("example.org A 192.0.2.7")) as resolver:
        assert await resolver.exchangers("example.org") == [(0, "example.org", ("192.0.2.7",))]


@pytest.mark.parametrize("follows", [True, False], ids=["followed for us", "followed by us"])
@pytest.mark.parametrize("record", ["MX 10 mx.example.net.", "A 192.0.2.9"])
async def test_an_alias_stands_for_its_target(record: str, *, follows: bool) -> None:
    zone = zone_of("example.org CNAME example.net.", f"example.net {record}", "mx.example.net A 192.0.2.9")
    zone.follows = follows
    async with resolving(zone) as resolver:
        (exchanger,) = await resolver.exchangers("example.org")
    assert exchanger.addresses == ("192.0.2.9",)
    assert exchanger.host in ("mx.example.net", "example.net")


async def test_aliases_that_lead_nowhere_or_in_circles() -> None:
    gone = await failure(zone_of("example.org CNAME gone.example.net."))
    assert (gone.status, gone.is_permanent) == ("5.1.2", True)
    circle = zone_of("example.org CNAME b.example.net.", "b.example.net CNAME example.org.", follows=False)
    assert not (await failure(circle)).is_permanent


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["other.org A 192.0.2.1"], "5.1.2"),
        (["example.org TXT hello"], "5.1.2"),
        (["example.org MX 0 ."], "5.1.10"),
        (["example.org MX 10 gone.example.org."], "5.1.2"),
        (["example.org MX 10 mx.example.org.", "mx.example.org TXT hello"], "5.4.4"),
    ],
    ids=["no such domain", "neither MX nor address", "null MX", "an exchanger that does not exist", "no address"],
)
async def test_what_the_dns_says_is_not_there_is_permanent(lines: list[str], status: str) -> None:
    error = await failure(zone_of(*lines))
    assert (error.status, error.is_permanent) == (status, True)
    assert "example.org" in error.text


@pytest.mark.parametrize("fault", ["SERVFAIL", "REFUSED", "silence", "garbage"])
@pytest.mark.parametrize("name", ["example.org", "mx.example.org"])
async def test_a_server_that_does_not_answer_says_nothing(fault: str, name: str) -> None:
    zone = zone_of("example.org MX 10 mx.example.org.", failures={name: fault})
    error = await failure(zone, timeout=0.05, lifetime=0.15)
    assert (error.status, error.is_permanent) == ("4.4.3", False)


async def test_one_exchanger_without_an_answer_does_not_hide_the_others() -> None:
    zone = zone_of(
        "example.org MX 10 first.example.org.",
        "example.org MX 20 second.example.org.",
        "second.example.org A 192.0.2.2",
        failures={"first.example.org": "SERVFAIL"},
    )
    async with resolving(zone) as resolver:
        assert [each.host for each in await resolver.exchangers("example.org")] == ["second.example.org"]


async def test_we_never_send_to_ourselves_or_to_hosts_behind_us() -> None:
    zone = zone_of(
        "example.org MX 10 first.example.org.",
        "example.org MX 20 us.example.org.",
        "example.org MX 20 equal.example.org.",
        "example.org MX 30 worse.example.org.",
        "first.example.org A 192.0.2.1",
        "us.example.org A 192.0.2.2",
    )
    async with resolving(zone, own_names=["US.example.org"]) as resolver:
        assert [each.host for each in await resolver.exchangers("example.org")] == ["first.example.org"]
        with pytest.raises(ResolveError, match="for this server itself") as error:
            await resolver.exchangers("us.example.org")
        assert error.value.status == "5.4.6"
    to_our_address = await failure(zone, "[192.0.2.9]", own_names=["192.0.2.9"])
    assert to_our_address.status == "5.4.6"
    error_when_best = await failure(zone, own_names=["first.example.org"])
    assert (error_when_best.status, error_when_best.is_permanent) == ("5.4.6", True)


@pytest.mark.parametrize(("domain", "address"), [("[192.0.2.1]", "192.0.2.1"), ("[ipv6:2001:db8::1]", "2001:db8::1")])
async def test_an_address_literal_needs_no_dns(domain: str, address: str) -> None:
    zone = Zone()
    async with resolving(zone) as resolver:
        assert await resolver.exchangers(domain) == [(0, address, (address,))]
    assert zone.asked == []


async def test_domains_that_are_none_are_permanent() -> None:
    for domain in ("[x400:whatever]", "a" * 64 + ".org", "a..org", "\u2024.org"):
        assert (await failure(Zone(), domain)).status == "5.1.2", domain


async def test_a_domain_in_unicode_is_asked_for_in_ascii() -> None:
    zone = zone_of("xn--bcher-kva.example A 192.0.2.1")
    async with resolving(zone) as resolver:
        assert (await resolver.exchangers("Bücher.example"))[0].host == "xn--bcher-kva.example"
