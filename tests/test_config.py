"""Configuration: strict, and telling."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from penstock.config import ConfigError, Settings, describe, load, parse, to_toml


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("hostnam = 'x'", "hostnam: there is no such key; here may stand: admission, body"),
        ("[listener]", "listener: Expected `array`"),
        ("[[listener]]\nmax_size = 'big'", "listener[0].max_size: Expected `int`"),
        ("[[listener]]\n[listener.tls]\nmode = 'maybe'", "listener[0].tls.mode: there is no 'maybe'; here may stand: "),
        ("[[listener]]\n[listener.limits]\nrecipients = 10", "listener[0].limits.recipients: Expected `int` >= 100"),
        ("[[listener]]\n[listener.wire]\nbare_lf = 'maybe'", "listener[0].wire.bare_lf"),
        ("listener = []", "listener: Expected `array` of length >= 1"),
        ("hostname = 'a b'", "hostname: 'a b' is not a host name"),
        ("domains = ['*.example.org']", "domains: '*.example.org'"),
        ("[[listener]]\naddress = '0.0.0.0:25'", "open relay"),
        ("[[listener]]\naddress = ':25'", "open relay"),
        ("[[listener]]\naddress = '127.0.0.1'", "listener[0].address: a listen address looks like"),
        ("[[listener]]\n[[listener]]", "is the name of another listener"),
        ("[[listener]]\nproxy_networks = ['1.2.3.4/8']", "listener[0].proxy_networks: 1.2.3.4/8 has host bits set"),
        ("[[listener]]\ntls.mode = 'none'\nauth.mechanisms = ['PLAIN']", "no mechanism is left without TLS"),
        ("[[check]]\ndeadline = 1.0", "check[0]: Object missing required field `hook`"),
        ("[delivery]\nkind = 'maildir'\n[recipients]\nverify = 'next-hop'", "recipients.verify: delivery.kind"),
        ("[recipients]\nverify = 'next-hop'\nfile = 'x'", "recipients.verify: recipients.file is there already"),
        ("[delivery]\npassthrough.buffer = 1", "delivery.passthrough.buffer: Expected `int` >= 4096"),
        ("[[route]]\ndomains = ['a.org']\nnext_hop = 'mx'", "route: no default route"),
        ("[[route]]\nnext_hop = 'smtp:/a'", "route[0].next_hop: 'smtp:/a' is not a next hop; expected smtp://host:25"),
        (
            "[[route]]\nnext_hop = 'mx'\n[route.tls]\nmode = 'maybe'",
            "route[0].tls.mode: there is no 'maybe'; here may stand: ",
        ),
        (
            "[[route]]\nnext_hop = 'mx'\n[route.limits]\nconnections = 0",
            "route[0].limits.connections: Expected `int` >=",
        ),
        (
            "[[route]]\n[[route.next_hops]]\nurl = 'smtp://a'\nweight = 0",
            "route[0].next_hops[0].weight: Expected `int`",
        ),
        ("[relay.retry]\nschedule = [0.5]", "relay.retry.schedule[0]: Expected `float` >= 1"),
        ("[resolver]\nservers = ['dns.example.org']", "resolver.servers[0]: 'dns.example.org' is not a DNS server"),
        (
            "[[listener]]\nauth.mechanisms = ['CRAM-MD5']",
            "no 'CRAM-MD5'; here may stand: SCRAM-SHA-256-PLUS, SCRAM-SHA",
        ),
        ("[[listener]]\nauth.mechanisms = ['PLAIN', 'PLAIN']", "listener[0].auth.mechanisms: 'PLAIN' is there twice"),
        ("[[listener]]\nauth = { mechanisms = [], required = true }", "listener[0].auth.mechanisms: auth.required"),
        ("[[listener]]\nauth.users = ''", "listener[0].auth.users: Expected `str` of length >= 1"),
        ("[[listener]]\ntls = { mode = 'none', required = true }", "listener[0].tls.required: tls.mode"),
        ("[[listener]]\ntls.key = 'key.pem'", "listener[0].tls.key: tls.certificate is missing"),
        (
            "[[listener]]\ntls.ciphers = 'ROT13'",
            "listener[0].tls.ciphers: OpenSSL has no cipher that is called 'ROT13'",
        ),
        ("[relay]\npool.source = 'eth0'", "relay.pool.source: 'eth0' does not appear to be an IPv4 or IPv6 address"),
        ("[delivery]\nmaildir.path = '{user}/mail'", "delivery.maildir.path: {local} and {domain} may stand in it"),
        ("[delivery]\nmaildir.path = 'mail/{local'", "delivery.maildir.path: {local} and {domain} may stand in it"),
        ("[resolver]\nttl_least = 60\nttl_most = 30", "resolver.ttl_least: it is more than resolver.ttl_most = 30"),
        ("[admission]\nexempt = ['x']", "admission.exempt: 'x' does not appear to be an IPv4 or IPv6 network"),
        ("x = ", "this is not TOML"),
    ],
)
def test_a_mistake_is_told_by_its_key(toml: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(toml)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "toml",
    [
        "",
        "domains = ['example.org', '.example.org']\n[[listener]]\naddress = ':25'",
        "[[listener]]\naddress = '[::]:587'\nauth.required = true",
        "[[listener]]\naddress = 'unix:/run/lmtp'\nkind = 'lmtp'",
        "[[listener]]\naddress = '[::1]:25'\ntls.mode = 'none'\nauth.mechanisms = ['SCRAM-SHA-256']",
        "[[listener]]\ntls.ciphers = 'ECDHE+AESGCM'",
        "[delivery]\nmaildir.path = '{domain}/{local}/Maildir'",
        "[relay]\npool.source = '::1'",
        "[[route]]\nnext_hop = 'smtps://a'",
    ],
)
def test_these_are_fine(toml: str) -> None:
    parse(toml)


def test_a_file_names_itself_in_errors_and_anchors_the_data(tmp_path: Path) -> None:
    file = tmp_path / "penstock.toml"
    file.write_text("x = 1")
    with pytest.raises(ConfigError, match=r"penstock\.toml: x"):
        load(file)
    file.write_text("data_dir = 'mail'")
    assert load(file).data_dir == str(tmp_path / "mail")


def test_the_description_is_a_file_that_means_the_defaults() -> None:
    text = describe()
    assert parse(text) == Settings()
    assert "#[listener.auth]" in text
    assert "#[[check]]" in text
    assert all(len(line) < 200 for line in text.splitlines())


def test_every_key_is_described() -> None:
    lines = describe().splitlines()
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith("#"):
            assert lines[number - 1].startswith("# "), line
            assert len(lines[number - 1]) > 6, line


def test_shown_settings_read_back() -> None:
    assert parse(to_toml(Settings())) == Settings()
    assert tomllib.loads(to_toml(Settings(), only_changed=True)) == {}
