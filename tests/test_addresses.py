"""Canonical forms of domains and addresses: one spelling behind every entrance, and a bounded cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import addresses
from penstock.addresses import (
    canonical_address,
    canonical_domain,
    domain_of,
    literal_of,
    network_of,
    parse_address,
    parse_network,
)
from penstock.transaction import Peer
from tests.steps import steps_of

BUECHER = "xn--bcher-kva.example"


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("Example.ORG", "example.org"),
        ("example.org.", "example.org"),
        ("bücher.example", BUECHER),
        ("BÜCHER.Example.", BUECHER),
        ("bu\u0308cher.example", BUECHER),
        ("bücher\u3002example", BUECHER),
        ("XN--BCHER-KVA.example", BUECHER),
        ("ｅｘａｍｐｌｅ.org", "example.org"),
        ("mail_server.bücher.example", f"mail_server.{BUECHER}"),
        ("faß.example", "xn--fa-hia.example"),
        ("例子.example", "xn--fsqu00a.example"),
    ],
)
def test_a_domain_has_one_spelling(text: str, domain: str) -> None:
    assert canonical_domain(text) == domain
    assert canonical_domain(domain) == domain


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "..", "a..b", ".a", "a..", "-a", "a-", "*.example.org", "a b", "a@b", "a/b", "é" * 256, "a\x00b",
        "a." * 128 + "a", "ü" * 64 + ".example", "xn--é.example", "a\u2028.example", "a\ud800.example",
        "\u0627a.example", "[1.2.3.4]",
    ],
)  # fmt: skip
def test_other_text_is_not_a_domain(text: str) -> None:
    with pytest.raises(ValueError, match="is not a domain"):
        canonical_domain(text)


def test_the_cache_of_u_labels_is_bounded() -> None:
    assert addresses._from_u_labels.cache_info().maxsize == 4096


def test_a_name_that_is_too_long_is_not_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(text: str, underscores: bool) -> str:
        raise AssertionError(text)

    monkeypatch.setattr(addresses, "_from_u_labels", convert)
    assert domain_of("é" * 256, utf8=True) is None


@pytest.mark.parametrize(
    "repeated", ["é", "é.", "e\u0301", "\u0627", "\ufdfa", "\u00ad", "é-", "\u200d", "日", "\u3002"]
)
def test_converting_twice_the_name_costs_at_most_about_twice(repeated: str) -> None:
    def steps(length: int) -> int:
        text = (repeated * 255)[:length]
        return steps_of(lambda: addresses._from_u_labels.__wrapped__(text, True))

    steps(10)
    assert steps(240) <= 2 * steps(120) + 1000
    assert steps(100_000) > 0  # the bound of its callers is the length: 255 characters
    assert steps_of(lambda: domain_of(repeated * 100_000, utf8=True)) < 20


@given(st.text(max_size=30))
def test_no_text_raises_or_stays_in_two_spellings(text: str) -> None:
    domain = domain_of(text, utf8=True, underscores=True)
    if domain is not None:
        assert domain.isascii()
        assert domain == domain.lower()
        assert domain_of(domain, utf8=False, underscores=True) == domain


@pytest.mark.parametrize(
    ("text", "literal"),
    [
        ("[192.0.2.1]", "[192.0.2.1]"),
        ("[IPv6:2001:DB8:0:0::1]", "[ipv6:2001:db8::1]"),
        ("[IPv6:::ffff:127.0.0.1]", "[127.0.0.1]"),
        ("[ipv6:0:0:0:0:0:FFFF:7F00:0001]", "[127.0.0.1]"),
        ("[tag:X@y]", "[tag:x@y]"),
        ("[IPv6:1.2.3.4]", None),
        ("[IPv6:fe80::1%eth0]", None),
        ("[1.2.3]", None),
        ("[01.2.3.4]", None),
        ("[]", None),
        ("[", None),
        ("[tag:" + "x" * 260 + "]", None),
    ],
)
def test_an_address_literal_has_one_spelling(text: str, literal: str | None) -> None:
    assert literal_of(text) == literal


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("", ""),
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::FFFF:C000:0201", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
    ],
)
def test_an_ip_address_has_one_spelling(text: str, address: str) -> None:
    assert canonical_address(text) == address


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:192.0.2.1", "192.0.2.1/32"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("::/0", "::/0"),
    ],
)
def test_a_network_of_mapped_addresses_is_one_of_ipv4(text: str, network: str) -> None:
    assert str(parse_network(text)) == network


def test_networks_with_host_bits_are_refused() -> None:
    for text in ("10.0.0.1/8", "::ffff:10.0.0.1/104"):
        with pytest.raises(ValueError, match="has host bits set"):
            parse_network(text)


def test_a_mapped_client_is_in_the_ipv4_network() -> None:
    assert parse_address("::ffff:10.1.2.3") in parse_network("10.0.0.0/8")
    assert parse_address("10.1.2.3") in parse_network("::ffff:10.0.0.0/104")


def test_limits_count_mapped_addresses_as_ipv4_and_ipv6_by_64() -> None:
    assert network_of("::ffff:192.0.2.1") == network_of("192.0.2.1") == "192.0.2.1"
    assert network_of("2001:db8::1") == network_of("2001:db8::2") == "2001:db8::/64"
    assert network_of("::1") == "::1"
    assert network_of("") == ""
    assert Peer("::ffff:192.0.2.1", 1).network == "192.0.2.1"
    assert Peer("::ffff:192.0.2.1", 1).literal == "[192.0.2.1]"
    assert Peer("", 0, "2001:DB8::1").local_literal == "[ipv6:2001:db8::1]"
