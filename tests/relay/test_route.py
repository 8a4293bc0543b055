"""Routes: which are refused, and what they lead to."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from penstock.dns import MailExchangers, ResolveError, Resolver, ResolverSettings
from penstock.message import Path as MailPath
from penstock.message import Recipient
from penstock.relay.hop import Hop
from penstock.relay.route import LOCAL, Choice, Route, Routes, RouteSettings, check_routes, parse_hop
from tests.dns.lying import running
from tests.net.nameserver import Zone, nameserver

MX = {"next_hop": "mx"}


def settings_of(*routes: dict[str, Any]) -> tuple[RouteSettings, ...]:
    return msgspec.convert(routes, tuple[RouteSettings, ...])


async def lookup(host: str) -> list[str]:
    if host == "unknown":
        raise OSError("no such host")
    return ["192.0.2.1", "2001:db8::1"] if host == "two" else ["192.0.2.9"]


def routes_of(
    *routes: dict[str, Any], folder: Path = Path("/nonexistent"), dns: Resolver | None = None, **more: Any
) -> Routes:
    settings = settings_of(*routes)
    check_routes(settings)
    resolver = MailExchangers(dns or Resolver(), is_local_address=lambda _: False)
    return Routes(settings, data_dir=folder, resolver=resolver, own_domain="MX.example.org", lookup=lookup, **more)


@asynccontextmanager
async def resolving(zone: Zone) -> AsyncIterator[Resolver]:
    """Run a resolver that asks a name server with this zone."""
    async with nameserver(zone) as server, running(Resolver(ResolverSettings(servers=(server,)))) as resolver:
        yield resolver


def to(domain: str) -> Recipient:
    return Recipient(MailPath(f"bob@{domain}" if domain else "Postmaster", "bob", domain))


def hosts(route: Route | None) -> list[str]:
    assert route is not None
    return [hop.host for hop in route.order(random.Random(1))]


# ---- errors name the key


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        ([{"domains": ["*.example.org"], **MX}], r"route\[0\]\.domains: '\*\.example\.org' is not a domain"),
        ([{"domains": ["bü_cher.example"], **MX}], r"is not a domain; expected \"example.org\""),
        (
            [{"domains": ["xn--bcher-kva.example"], **MX}, {"domains": ["BÜCHER.example."], **MX}],
            r"route\[1\]\.domains: 'BÜCHER\.example\.' is already in route\[0\]",
        ),
        ([{"domains": ["a.org"], **MX}, {"domains": ["A.org"], **MX}], r"route\[1\]\.domains: 'A\.org' is already in"),
        ([MX, MX], r"route\[1\]\.domains: route\[0\] has no domains either"),
        ([{"domains": ["example.org"], **MX}], "route: no default route.*add a route without domains"),
        ([{}], r'route\[0\]\.next_hop: missing; expected "mx"'),
        ([{"next_hop": "mx", "next_hops": [{"url": "smtp://a"}]}], r"route\[0\]\.next_hops: cannot be combined"),
        ([{"next_hop": "http://a"}], r"route\[0\]\.next_hop: 'http://a' is not a next hop; expected smtp://host:25"),
        ([{"next_hops": [{"url": "smtp://a"}, {"url": "mx"}]}], r"route\[0\]\.next_hops\[1\]\.url: 'mx' is not"),
        ([{**MX, "auth": {"user": "a", "password_file": "b"}}], r"route\[0\]\.auth: only for a smart host"),
        ([{"next_hop": "smtp://a", "auth": {"user": "a", "password_file": "b"}}], r"route\[0\]\.tls\.mode: with auth"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_route_is_reported_by_its_key(routes: list[dict[str, Any]], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_routes(settings_of(*routes))


@pytest.mark.parametrize(
    "url",
    [
        "smtp://", "smtp://a:0", "smtp://a:99999", "smtp://a:b", "smtp://u:p@a", "smtp://a/b", "smtp://a?b", "a:25",
        "lmtp+unix://relative", "lmtp+unix://host/path", "smtp://a b", "smtp://[::1", "",
    ],
)  # fmt: skip
def test_a_malformed_next_hop_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected smtp://host:25"):
        parse_hop(url)


@pytest.mark.parametrize(
    ("url", "name", "kind", "implicit"),
    [
        ("smtp://mx.example.org", "mx.example.org:25", "smtp", False),
        ("smtp://192.0.2.1:2525", "192.0.2.1:2525", "smtp", False),
        ("smtp://[2001:db8::1]:26", "2001:db8::1:26", "smtp", False),
        ("smtp://Bücher.example", "xn--bcher-kva.example:25", "smtp", False),
        ("smtp://mail_server.:25", "mail_server:25", "smtp", False),
        ("smtps://mx.example.org", "mx.example.org:465", "smtp", True),
        ("lmtp://mail.example.org", "mail.example.org:24", "lmtp", False),
        ("lmtp+unix:///run/lmtp", "unix:/run/lmtp", "lmtp", False),
    ],
)
def test_next_hops_are_urls(url: str, name: str, kind: str, implicit: bool) -> None:
    hop = parse_hop(url)
    assert (hop.name, hop.kind, hop.tls.implicit) == (name, kind, implicit)


# ---- which route


async def test_the_longest_matching_domain_decides() -> None:
    routes = routes_of(
        {"domains": ["example.org"], "next_hop": "smtp://exact"},
        {"domains": [".example.org"], "next_hop": "smtp://below"},
        {"domains": [".mail.example.org", "deep.sub.example.org"], "next_hop": "smtp://deeper"},
        {"next_hop": "smtp://others"},
    )
    expected = {
        "example.org": "exact",
        "a.example.org": "below",
        "mail.example.org": "below",
        "a.b.mail.example.org": "deeper",
        "deep.sub.example.org": "deeper",
        "notexample.org": "others",
        "org": "others",
        "[192.0.2.1]": "others",
    }
    found = {domain: hosts(await routes.find_route(domain))[0] for domain in expected}
    assert found == expected


def test_the_queue_of_reports_has_the_route_of_the_domain() -> None:
    routes = routes_of({"domains": [".example.org"], "next_hop": "smtp://192.0.2.1"}, {"next_hop": "maildir"})
    assert routes.static_route("clear:a.example.org") is routes.static_route("b.example.org")
    assert routes.static_key("clear:a.example.org") == routes.static_key("a.example.org") == ("route", 0)
    assert routes.static_route("clear:example.com") is LOCAL


def test_without_routes_mail_is_delivered_locally() -> None:
    assert routes_of().static_route("example.org") is LOCAL
    assert LOCAL.is_local


def test_lanes_are_domains_in_ascii_and_postmaster_is_ours() -> None:
    routes = routes_of()
    assert routes.domain_of(to("example.org")) == "example.org"
    assert routes.domain_of(to("bücher.example")) == "xn--bcher-kva.example"
    assert routes.domain_of(to("")) == "mx.example.org"


# ---- routes


async def test_next_hops_are_tried_by_priority_and_weight() -> None:
    route = await routes_of(
        {
            "next_hops": [
                {"url": "smtp://backup", "priority": 20},
                {"url": "smtp://large", "priority": 10, "weight": 3},
                {"url": "smtp://small", "priority": 10},
            ]
        }
    ).find_route("example.org")
    source = random.Random(1)
    orders = Counter(tuple(hop.host for hop in route.order(source)) for _ in range(4000))
    assert set(orders) == {("large", "small", "backup"), ("small", "large", "backup")}
    assert 2800 < orders["large", "small", "backup"] < 3200
    assert route.only is None
    assert {hop.host for hop in route.first} == {"large", "small"}


async def test_a_route_without_a_choice_has_one_order() -> None:
    hops = [{"url": "smtp://b", "priority": 2}, {"url": "smtp://a", "priority": 1}]
    route = await routes_of({"next_hops": hops}).find_route("x")
    assert route.only == route.order(random.Random())
    assert [hop.host for hop in route.only or ()] == ["a", "b"]


async def test_a_hop_has_the_settings_of_its_route(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\nnot this\n")
    routes = routes_of(
        {
            "next_hop": "smtps://smart.example.net:466",
            "tls": {"mode": "verify", "ca_file": "ca.pem", "name": "other.example.net"},
            "auth": {"user": "alice", "password_file": "password"},
            "limits": {"connections": 3, "message_rate": 7.5},
        },
        folder=tmp_path,
    )
    (hop,) = (await routes.find_route("example.org")).only or ()
    assert (hop.host, hop.port, hop.user, hop.password) == ("smart.example.net", 466, "alice", "secret")
    assert (hop.tls.mode, hop.tls.implicit, hop.tls.name) == ("verify", True, "other.example.net")
    assert hop.tls.ca_file == str(tmp_path / "ca.pem")
    assert (hop.limits.connections, hop.limits.message_rate) == (3, 7.5)
    assert "secret" not in repr(hop)


def test_a_missing_password_file_is_an_error_with_its_path(tmp_path: Path) -> None:
    auth = {"user": "alice", "password_file": "missing"}
    with pytest.raises(OSError, match="missing"):
        routes_of({"next_hop": "smtp://a", "tls": {"mode": "require"}, "auth": auth}, folder=tmp_path)


async def test_the_route_of_mx_comes_from_the_dns() -> None:
    zone = Zone()
    zone.add("example.org", "MX", "10 a.example.net.", "10 b.example.net.", "20 c.example.net.")
    zone.add("other.org", "MX", "10 b.example.net.", "10 a.example.net.", "20 c.example.net.")
    zone.add("third.org", "MX", "10 a.example.net.")
    for number, host in enumerate("abc"):
        zone.add(f"{host}.example.net", "A", f"192.0.2.{number}")
    zone.add("a.example.net", "AAAA", "2001:db8::1")
    async with resolving(zone) as resolver:
        routes = routes_of({**MX, "limits": {"connections": 2}}, dns=resolver)
        assert routes.static_route("example.org") is None
        route = await routes.find_route("example.org")
        assert (await routes.find_route("other.org")).key == route.key  # the same hosts: the same connections
        assert (await routes.find_route("third.org")).key != route.key
        with pytest.raises(ResolveError):
            await routes.find_route("gone.org")
    assert [len(rank) for rank in route.ranks] == [2, 1]
    by_host = {choice.hops[0].host: choice.hops for rank in route.ranks for choice in rank}
    assert by_host["a.example.net"] == tuple(
        Hop(host="a.example.net", address=address, limits=by_host["c.example.net"][0].limits)
        for address in ("192.0.2.0", "2001:db8::1")
    )
    assert by_host["c.example.net"][0].limits.connections == 2
    assert route.order(random.Random(1))[-1].host == "c.example.net"


# ---- names become hops by address


async def test_a_static_name_becomes_a_hop_for_each_address() -> None:
    routes = routes_of({"next_hops": [{"url": "smtp://two:26", "priority": 1}, {"url": "smtp://192.0.2.7"}]})
    assert routes.static_route("x") is None, "not looked up yet"
    assert routes.static_key("x") == ("route", 0), "but known to be the same for all domains"
    route = await routes.find_route("x")
    assert [hop.name for hop in route.only or ()] == ["two[192.0.2.1]:26", "two[2001:db8::1]:26", "192.0.2.7:25"]
    assert routes.static_route("x") is route


async def test_a_name_that_is_this_server_gets_no_mail() -> None:
    urls = [{"url": "smtp://better:26", "priority": 1}, {"url": "smtp://two:25", "priority": 2}]
    routes = routes_of({"next_hops": [*urls, {"url": "smtp://worse:25", "priority": 3}]}, listeners=["192.0.2.1:25"])
    assert [hop.host for hop in (await routes.find_route("x")).only or ()] == ["better"]
    routes = routes_of({"next_hop": "smtp://two:25"}, listeners=["[2001:db8::1]:25"])
    with pytest.raises(ResolveError, match="is this server itself") as error:
        await routes.find_route("x")
    assert (error.value.status, error.value.is_permanent) == ("4.4.6", False), "the DNS may say something else later"


async def test_a_name_without_an_answer_is_waited_for_beside_our_own() -> None:
    urls = [{"url": "smtp://unknown:25", "priority": 10}, {"url": "smtp://two:25", "priority": 20}]
    async with resolving(Zone(failures={"unknown": "SERVFAIL"})) as resolver:
        routes = routes_of({"next_hops": urls}, dns=resolver, listeners=["192.0.2.1:25"])
        with pytest.raises(ResolveError, match="the next hop unknown could not be found") as error:
            await routes.find_route("x")
    assert (error.value.status, error.value.is_permanent) == ("4.4.3", False)


async def test_hosts_of_the_same_priority_as_this_server_get_mail() -> None:
    urls = [{"url": "smtp://backend:25"}, {"url": "smtp://two:25"}, {"url": "smtp://worse:25", "priority": 20}]
    routes = routes_of({"next_hops": urls}, listeners=["192.0.2.1:25"])
    assert [hop.host for hop in (await routes.find_route("x")).hops()] == ["backend"]


async def test_a_name_is_looked_up_again_and_survives_a_failure() -> None:
    now = 0.0
    answers: list[list[str] | OSError] = [["192.0.2.1"], OSError("down"), ["192.0.2.2"]]
    asked = 0

    async def answer(_: str) -> list[str]:
        nonlocal asked
        found = answers[asked]
        asked += 1
        await trio.lowlevel.checkpoint()
        if isinstance(found, OSError):
            raise found
        return found

    zone = Zone(failures={"hop": "SERVFAIL"})
    async with resolving(zone) as resolver:
        settings = settings_of({"next_hop": "smtp://hop"})
        exchangers = MailExchangers(resolver)
        routes = Routes(
            settings, data_dir=Path(), resolver=exchangers, own_domain="x", lookup=answer, clock=lambda: now
        )
        async with trio.open_nursery() as nursery:
            for domain in "abc":
                nursery.start_soon(routes.find_route, domain)
        assert asked == 1, "one lookup for all domains"
        seen = []
        for moment in (59.0, 60.0, 120.0):
            now = moment
            route = await routes.find_route("a")
            seen += [[hop.address for hop in route.hops()]]
    assert seen == [["192.0.2.1"], ["192.0.2.1"], ["192.0.2.2"]]


async def test_a_name_only_the_configured_servers_know_is_found() -> None:
    zone = Zone()
    zone.add("unknown", "A", "192.0.2.33")
    async with resolving(zone) as resolver:
        route = await routes_of({"next_hop": "smtp://unknown"}, dns=resolver).find_route("x")
        assert [hop.address for hop in route.hops()] == ["192.0.2.33"]
    async with resolving(Zone()) as resolver:
        with pytest.raises(ResolveError, match="address of the next hop unknown could not be found") as error:
            await routes_of({"next_hop": "smtp://unknown"}, dns=resolver).find_route("x")
    assert (error.value.status, error.value.is_permanent) == ("4.4.3", False)


def test_a_host_with_many_addresses_does_not_hide_the_next() -> None:
    many = Choice(1, tuple(Hop(host="mx1", address=f"192.0.2.{number}") for number in range(26)))
    route = Route("mx", ((many,), (Choice(1, (Hop(host="mx2", address="198.51.100.1"),)),)))
    assert [hop.host for hop in route.only or ()] == ["mx1"] * 11 + ["mx2"]


def test_postmaster_without_a_domain_is_qualified() -> None:
    routes = routes_of()
    assert routes.qualified(to("")).path == MailPath("Postmaster@mx.example.org", "bob", "mx.example.org")
    assert routes.qualified(to("example.org")) == to("example.org")


def test_domains_of_routes_may_be_written_as_u_labels() -> None:
    routes = routes_of({"domains": ["Bücher.example", ".grün.example"], "next_hop": "maildir"}, MX)
    for domain in ("xn--bcher-kva.example", "a.xn--grn-ioa.example"):
        assert routes.static_route(domain) is LOCAL
