"""The keys of the configuration that hold domains, addresses and sockets."""

from __future__ import annotations

import pytest

from penstock.config import ConfigError, parse


def test_domains_and_the_hostname_may_have_u_labels() -> None:
    settings = parse('hostname = "MX.bücher.example"\ndomains = ["bücher.example", ".Example.org", "a_b.example."]')
    assert settings.own_hostname == "mx.xn--bcher-kva.example"


@pytest.mark.parametrize("domain", ["*.example.org", "", ".", "a b", "xn--é", "é" * 300, "[192.0.2.1]"])
def test_other_text_is_refused_as_a_domain(domain: str) -> None:
    with pytest.raises(ConfigError, match=r"^domains: .* is not a domain"):
        parse(f'domains = ["{domain}"]')


def test_networks_may_be_ipv4_mapped() -> None:
    parse('[[listener]]\nrelay_networks = ["::ffff:10.0.0.0/104"]\nproxy_networks = ["::ffff:192.0.2.1"]')
    with pytest.raises(ConfigError, match=r"listener\[0\]\.relay_networks: .*host bits"):
        parse('[[listener]]\nrelay_networks = ["::ffff:10.0.0.1/104"]')


def test_the_modes_of_addresses_are_named_in_the_error() -> None:
    assert parse('[[listener]]\naddresses = "strict"').listener[0].addresses == "strict"
    assert parse("").listener[0].addresses == "tolerant"
    with pytest.raises(ConfigError, match=r"listener\[0\]\.addresses"):
        parse('[[listener]]\naddresses = "lenient"')


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('mode = "0888"', r"listener\[0\]\.mode: permissions are three octal digits"),
        ('group = "no such group"', r"listener\[0\]\.group: there is no group 'no such group'"),
    ],
)
def test_an_error_about_a_socket_names_its_key(line: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse(f"[[listener]]\n{line}")
