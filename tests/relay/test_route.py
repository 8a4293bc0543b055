"""Routes: which are refused and how that is told, and the ways they lead."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.message import Path as MailPath
from penstock.message import Recipient
from penstock.net.resolver import ResolveError, Resolver, ResolverSettings
from penstock.relay.hop import Hop
from penstock.relay.route import LOCAL, Routes, RouteSettings, Way, check_routes, parse_hop
from tests.net.nameserver import Zone, nameserver

MX = {"next_hop": "mx"}


def settings_of(*routes: dict[str, Any]) -> tuple[RouteSettings, ...]:
    return msgspec.convert(routes, tuple[RouteSettings, ...])


def routes_of(*routes: dict[str, Any], folder: Path = Path("/nonexistent"), server: str = "") -> Routes:
    settings = settings_of(*routes)
    check_routes(settings)
    resolver = Resolver(ResolverSettings(servers=(server,) if server else ()))
    return Routes(settings, data_dir=folder, resolver=resolver, own_name="MX.example.org")


def to(domain: str) -> Recipient:
    return Recipient(MailPath(f"bob@{domain}" if domain else "Postmaster", "bob", domain))


def hosts(way: Way | None) -> list[str]:
    assert way is not None
    return [hop.host for hop in way.order(random.Random(1))]


# ---- what is wrong is told by its key


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        ([{"domains": ["*.example.org"], **MX}], r"route\[0\]\.domains: '\*\.example\.org' is not a domain"),
        ([{"domains": ["bü_cher.example"], **MX}], r"is not a domain; expected \"example.org\""),
        (
            [{"domains": ["xn--bcher-kva.example"], **MX}, {"domains": ["BÜCHER.example."], **MX}],
            r"route\[1\]\.domains: 'BÜCHER\.example\.' is in route\[0\]",
        ),
        ([{"domains": ["a.org"], **MX}, {"domains": ["A.org"], **MX}], r"route\[1\]\.domains: 'A\.org' is in"),
        ([MX, MX], r"route\[1\]\.domains: route\[0\] has no domains either"),
        ([{"domains": ["example.org"], **MX}], "route: reports have to go to the senders.*add a route without domains"),
        ([{}], r'route\[0\]\.next_hop: it is missing; write "mx"'),
        ([{"next_hop": "mx", "next_hops": [{"url": "smtp://a"}]}], r"route\[0\]\.next_hops: next_hop is there already"),
        ([{"next_hop": "http://a"}], r"route\[0\]\.next_hop: a next hop looks like smtp://host:25.*'http://a'"),
        ([{"next_hops": [{"url": "smtp://a"}, {"url": "mx"}]}], r"route\[0\]\.next_hops\[1\]\.url: a next hop looks"),
        ([{**MX, "auth": {"user": "a", "password_file": "b"}}], r"route\[0\]\.auth: a password is for a smart host"),
        ([{"next_hop": "smtp://a", "auth": {"user": "a", "password_file": "b"}}], r"route\[0\]\.tls\.mode: say what"),
    ],
    ids=str,
)  # fmt: skip
def test_a_route_that_leads_nowhere_is_told_by_its_key(routes: list[dict[str, Any]], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_routes(settings_of(*routes))


@pytest.mark.parametrize(
    "url",
    [
        "smtp://", "smtp://a:0", "smtp://a:99999", "smtp://a:b", "smtp://u:p@a", "smtp://a/b", "smtp://a?b", "a:25",
        "lmtp+unix://relative", "lmtp+unix://host/path", "smtp://a b", "smtp://[::1", "",
    ],
)  # fmt: skip
def test_what_is_no_next_hop_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="a next hop looks like"):
        parse_hop(url)


@pytest.mark.parametrize(
    ("url", "name", "kind", "implicit"),
    [
        ("smtp://mx.example.org", "mx.example.org:25", "smtp", False),
        ("smtp://192.0.2.1:2525", "192.0.2.1:2525", "smtp", False),
        ("smtp://[2001:db8::1]:26", "2001:db8::1:26", "smtp", False),
        ("smtps://mx.example.org", "mx.example.org:465", "smtp", True),
        ("lmtp://mail.example.org", "mail.example.org:24", "lmtp", False),
        ("lmtp+unix:///run/lmtp", "unix:/run/lmtp", "lmtp", False),
    ],
)
def test_next_hops_are_urls(url: str, name: str, kind: str, implicit: bool) -> None:
    hop = parse_hop(url)
    assert (hop.name, hop.kind, hop.tls.implicit) == (name, kind, implicit)


# ---- which route


def test_the_longest_domain_that_matches_decides() -> None:
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
    assert {lane: hosts(routes.way_now(lane))[0] for lane in expected} == expected


def test_a_server_without_routes_delivers_here() -> None:
    assert routes_of().way_now("example.org") is LOCAL
    assert LOCAL.is_local


def test_lanes_are_domains_in_ascii_and_postmaster_is_ours() -> None:
    routes = routes_of()
    assert routes.lane_of(to("example.org")) == "example.org"
    assert routes.lane_of(to("bücher.example")) == "xn--bcher-kva.example"
    assert routes.lane_of(to("")) == "mx.example.org"


# ---- ways


def test_next_hops_are_tried_by_priority_and_share_by_weight() -> None:
    way = routes_of(
        {
            "next_hops": [
                {"url": "smtp://backup", "priority": 20},
                {"url": "smtp://large", "priority": 10, "weight": 3},
                {"url": "smtp://small", "priority": 10},
            ]
        }
    ).way_now("example.org")
    assert way is not None
    source = random.Random(1)
    orders = Counter(tuple(hop.host for hop in way.order(source)) for _ in range(4000))
    assert set(orders) == {("large", "small", "backup"), ("small", "large", "backup")}
    assert 2800 < orders["large", "small", "backup"] < 3200
    assert way.only is None
    assert {hop.host for hop in way.first} == {"large", "small"}


def test_a_way_without_a_choice_is_known_at_once() -> None:
    way = routes_of({"next_hops": [{"url": "smtp://b", "priority": 2}, {"url": "smtp://a", "priority": 1}]}).way_now(
        "x"
    )
    assert way is not None
    assert way.only == way.order(random.Random())
    assert [hop.host for hop in way.only or ()] == ["a", "b"]


def test_a_hop_has_the_policy_the_limits_and_the_password_of_its_route(tmp_path: Path) -> None:
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
    (hop,) = (routes.way_now("example.org") or LOCAL).only or ()
    assert (hop.host, hop.port, hop.user, hop.password) == ("smart.example.net", 466, "alice", "secret")
    assert (hop.tls.mode, hop.tls.implicit, hop.tls.name) == ("verify", True, "other.example.net")
    assert hop.tls.ca_file == str(tmp_path / "ca.pem")
    assert (hop.limits.connections, hop.limits.message_rate) == (3, 7.5)
    assert "secret" not in repr(hop)


def test_a_password_file_that_is_not_there_is_an_error_with_its_path(tmp_path: Path) -> None:
    auth = {"user": "alice", "password_file": "missing"}
    with pytest.raises(OSError, match="missing"):
        routes_of({"next_hop": "smtp://a", "tls": {"mode": "require"}, "auth": auth}, folder=tmp_path)


async def test_the_dns_says_the_way_of_mx() -> None:
    zone = Zone()
    zone.add("example.org", "MX", "10 a.example.net.", "10 b.example.net.", "20 c.example.net.")
    zone.add("other.org", "MX", "10 b.example.net.", "10 a.example.net.", "20 c.example.net.")
    zone.add("third.org", "MX", "10 a.example.net.")
    for number, host in enumerate("abc"):
        zone.add(f"{host}.example.net", "A", f"192.0.2.{number}")
    zone.add("a.example.net", "AAAA", "2001:db8::1")
    async with nameserver(zone) as server:
        routes = routes_of({**MX, "limits": {"connections": 2}}, server=server)
        assert routes.way_now("example.org") is None
        way = await routes.way_of("example.org")
        assert (await routes.way_of("other.org")).key == way.key  # the same hosts: the same connections
        assert (await routes.way_of("third.org")).key != way.key
        with pytest.raises(ResolveError):
            await routes.way_of("gone.org")
    assert [len(rank) for rank in way.ranks] == [2, 1]
    by_host = {choice.hops[0].host: choice.hops for rank in way.ranks for choice in rank}
    assert by_host["a.example.net"] == tuple(
        Hop(host="a.example.net", address=address, limits=by_host["c.example.net"][0].limits)
        for address in ("192.0.2.0", "2001:db8::1")
    )
    assert by_host["c.example.net"][0].limits.connections == 2
    assert way.order(random.Random(1))[-1].host == "c.example.net"
