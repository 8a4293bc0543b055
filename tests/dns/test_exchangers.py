"""Mail exchangers, against a DNS server on the loopback."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio

from penstock.dns import MailExchangers, ResolveError, Resolver, ResolverSettings, parse_server
from penstock.dns.exchangers import is_local_address
from tests.dns.lying import Clock, Lying, running, zone_of
from tests.dns.lying import resolving as resolving_by
from tests.net.nameserver import Zone, nameserver


@asynccontextmanager
async def resolving(zone: Zone, **settings: Any) -> AsyncIterator[MailExchangers]:
    own_names, clock = settings.pop("own_names", ()), settings.pop("clock", Clock())
    interfaces = settings.pop("interfaces", ())
    async with nameserver(zone) as server:
        given = msgspec.structs.replace(ResolverSettings(servers=(server,)), **settings)
        async with running(Resolver(given, clock=clock)) as resolver:
            yield MailExchangers(
                resolver,
                families=given.families,
                own_names=own_names,
                random_source=random.Random(1),
                is_local_address=interfaces.__contains__,
            )


async def failure(zone: Zone, domain: str = "example.org", **settings: Any) -> ResolveError:
    async with resolving(zone, **settings) as resolver:
        with pytest.raises(ResolveError) as error:
            await resolver.exchangers(domain)
        return error.value


async def test_mx_hosts_come_best_first_with_their_addresses() -> None:
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


async def test_a_domain_without_mx_is_its_own_host() -> None:
    async with resolving(zone_of("example.org A 192.0.2.7")) as resolver:
        assert await resolver.exchangers("example.org") == [(0, "example.org", ("192.0.2.7",))]


@pytest.mark.parametrize("follows", [True, False], ids=["followed for us", "followed by us"])
@pytest.mark.parametrize("record", ["MX 10 mx.example.net.", "A 192.0.2.9"])
async def test_an_alias_is_replaced_by_its_target(record: str, *, follows: bool) -> None:
    zone = zone_of("example.org CNAME example.net.", f"example.net {record}", "mx.example.net A 192.0.2.9")
    zone.follows = follows
    async with resolving(zone) as resolver:
        (exchanger,) = await resolver.exchangers("example.org")
    assert exchanger.addresses == ("192.0.2.9",)
    assert exchanger.host in ("mx.example.net", "example.net")


async def test_dangling_and_circular_aliases() -> None:
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
async def test_names_that_do_not_exist_are_permanent_errors(lines: list[str], status: str) -> None:
    error = await failure(zone_of(*lines))
    assert (error.status, error.is_permanent) == (status, True)
    assert "example.org" in error.text


@pytest.mark.parametrize("failure_kind", ["SERVFAIL", "REFUSED", "silence", "garbage"])
@pytest.mark.parametrize("name", ["example.org", "mx.example.org"])
async def test_a_server_that_does_not_answer_is_temporary(failure_kind: str, name: str) -> None:
    zone = zone_of("example.org MX 10 mx.example.org.", failures={name: failure_kind})
    error = await failure(zone, timeout=0.05, lifetime=0.15)
    assert (error.status, error.is_permanent) == ("4.4.3", False)


async def test_one_mx_host_without_an_answer_does_not_hide_others() -> None:
    zone = zone_of(
        "example.org MX 10 first.example.org.",
        "example.org MX 20 second.example.org.",
        "second.example.org A 192.0.2.2",
        failures={"first.example.org": "SERVFAIL"},
    )
    async with resolving(zone) as resolver:
        assert [each.host for each in await resolver.exchangers("example.org")] == ["second.example.org"]


async def test_hosts_not_better_than_our_name_are_dropped() -> None:
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
        with pytest.raises(ResolveError, match="loops back to this server") as error:
            await resolver.exchangers("us.example.org")
        assert error.value.status == "5.4.6"
    to_our_address = await failure(zone, "[192.0.2.9]", own_names=["192.0.2.9"])
    assert to_our_address.status == "5.4.6"
    error_when_best = await failure(zone, own_names=["first.example.org"])
    assert (error_when_best.status, error_when_best.is_permanent) == ("5.4.6", True)


async def test_answers_are_cached_for_their_ttl_within_bounds() -> None:
    clock, zone = Clock(), zone_of("example.org A 192.0.2.1", ttl=300)
    async with resolving(zone, clock=clock, families=("ipv4",), ttl_least=10, ttl_most=1000) as resolver:
        await resolver.addresses("example.org")
        clock.now += 299
        await resolver.addresses("example.org")
        assert len(zone.asked) == 1
        clock.now += 2
        zone.ttl = 0
        await resolver.addresses("example.org")
        clock.now += 9
        await resolver.addresses("example.org")
        assert len(zone.asked) == 2
        clock.now += 2
        zone.ttl = 1_000_000
        await resolver.addresses("example.org")
        clock.now += 1001
        await resolver.addresses("example.org")
        assert len(zone.asked) == 4


async def test_negative_answers_are_cached() -> None:
    clock, zone = Clock(), zone_of("other.org A 192.0.2.1", negative_ttl=60)
    async with resolving(zone, clock=clock) as resolver:
        for _ in range(3):
            with pytest.raises(ResolveError):
                await resolver.exchangers("example.org")
        assert zone.asked == [("example.org", "MX")]
        clock.now += 61
        zone.add("example.org", "A", "192.0.2.1")
        assert await resolver.exchangers("example.org")


async def test_a_failure_is_remembered_for_a_second() -> None:
    clock, zone = Clock(), zone_of("example.org A 192.0.2.1", failures={"example.org": "SERVFAIL"})
    async with resolving(zone, clock=clock) as resolver:
        with pytest.raises(ResolveError):
            await resolver.exchangers("example.org")
        zone.failures.clear()
        with pytest.raises(ResolveError):
            await resolver.exchangers("example.org")
        clock.now += 1.1
        assert await resolver.exchangers("example.org")


async def test_the_cache_keeps_no_more_than_it_may() -> None:
    zone = zone_of(*(f"d{n}.org A 192.0.2.1" for n in range(5)))
    async with resolving(zone, families=("ipv4",), cache_entries=2) as resolver:
        for n in (0, 1, 0, 2, 0, 1):
            await resolver.addresses(f"d{n}.org")
    assert [name for name, _ in zone.asked] == ["d0.org", "d1.org", "d2.org", "d1.org"]


async def test_concurrent_lookups_share_one_query() -> None:
    zone = zone_of("example.org A 192.0.2.1")
    async with resolving(zone, families=("ipv4",)) as resolver, trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(resolver.addresses, "example.org")
    assert len(zone.asked) == 1


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


async def test_unreachable_servers_are_temporary() -> None:
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    resolver = Resolver(ResolverSettings(servers=(f"127.0.0.1:{port}",), timeout=0.05, lifetime=0.1))
    async with running(resolver):
        with pytest.raises(ResolveError) as error:
            await MailExchangers(resolver).exchangers("example.org")
    assert not error.value.is_permanent


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.53", ("192.0.2.53", 53)),
        ("127.0.0.1:5353", ("127.0.0.1", 5353)),
        ("[::1]:53", ("::1", 53)),
        ("::1", ("::1", 53)),
        ("2001:db8::1", ("2001:db8::1", 53)),
    ],
)
def test_servers_are_addresses_with_or_without_a_port(text: str, expected: tuple[str, int]) -> None:
    assert parse_server(text) == expected


@pytest.mark.parametrize("text", ["", "localhost", "192.0.2.1:0", "192.0.2.1:99999", "1.2.3", "[192.0.2.1"])
def test_a_malformed_server_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected 192\.0\.2\.53"):
        Resolver(ResolverSettings(servers=(text,)))


# ---- mail that would loop back to this server (RFC 5321 5.1)

LOOPS = ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1", "192.0.2.9", "198.51.100.9"]
"""Loopback, unspecified, a listener's address, an interface's address."""


@pytest.mark.parametrize("address", LOOPS)
async def test_an_mx_with_an_address_of_ours_is_a_loop(address: str) -> None:
    kind = "AAAA" if ":" in address else "A"
    zone = zone_of("example.org MX 10 mx.example.org.", f"mx.example.org {kind} {address}")
    error = await failure(zone, own_names=("192.0.2.9",), interfaces=("198.51.100.9",))
    assert (error.status, error.is_permanent) == ("5.4.6", True)
    literal = f"[IPv6:{address}]" if ":" in address else f"[{address}]"
    error = await failure(zone, literal, own_names=("192.0.2.9",), interfaces=("198.51.100.9",))
    assert error.status == "5.4.6"


async def test_hosts_not_better_than_ourselves_are_dropped() -> None:
    zone = zone_of(
        "example.org MX 10 best.example.org.",
        "example.org MX 20 ours.example.org.",
        "example.org MX 20 equal.example.org.",
        "example.org MX 30 worse.example.org.",
        "best.example.org A 192.0.2.1",
        "ours.example.org A 192.0.2.2",
        "ours.example.org A 127.0.0.1",
        "equal.example.org A 192.0.2.3",
        "worse.example.org A 192.0.2.4",
    )
    async with resolving(zone) as resolver:
        assert [each.host for each in await resolver.exchangers("example.org")] == ["best.example.org"]


async def test_a_better_host_that_may_exist_is_waited_for() -> None:
    zone = zone_of(
        "example.org MX 10 best.example.org.",
        "example.org MX 20 ours.example.org.",
        "ours.example.org A 127.0.0.1",
        failures={"best.example.org": "SERVFAIL"},
    )
    error = await failure(zone)
    assert (error.status, error.is_permanent) == ("4.4.3", False)


async def test_a_domain_without_mx_at_our_address_is_a_loop() -> None:
    assert (await failure(zone_of("example.org A 127.0.0.1"))).status == "5.4.6"


def test_addresses_of_interfaces_are_recognized() -> None:
    assert is_local_address("127.0.0.1")
    assert not is_local_address("203.0.113.77")
    assert not is_local_address("2001:db8::1")


async def test_tlsa_names_are_those_that_dnssec_has_proved() -> None:
    lines = [
        "example.org MX 10 mx.example.org.",
        "mx.example.org CNAME real.example.org.",
        "real.example.org A 192.0.2.1",
        "real.example.org AAAA 2001:db8::1",
        "example.net MX 10 mx.example.net.",
        "mx.example.net A 192.0.2.2",
    ]
    lying = Lying(zone_of(*lines))
    unsigned: set[str] = set()

    def answer(wire: bytes) -> list[bytes]:
        octets = bytearray(lying.zone.answer(wire) or b"")
        if lying.zone.asked[-1][0] not in unsigned and lying.zone.asked[-1][1] not in unsigned:
            octets[3] |= 0x20
        return [bytes(octets)]

    lying.udp = answer
    async with resolving_by(lying) as resolver:
        exchangers = MailExchangers(resolver)
        assert await exchangers.tlsa_names("example.org", "mx.example.org") == ("real.example.org", "mx.example.org")
        assert await exchangers.tlsa_names("example.net", "mx.example.net") == ("mx.example.net",)
        assert await exchangers.tlsa_names("[192.0.2.1]", "192.0.2.1") == ()
        for name in ("example.org", "mx.example.org", "MX", "AAAA"):
            resolver._cache.clear()
            unsigned = {name}
            assert await exchangers.tlsa_names("example.org", "mx.example.org") == (), name
