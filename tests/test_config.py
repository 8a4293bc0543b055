"""Configuration: every mistake is reported with its key and the right form."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from penstock.config import ConfigError, Settings, describe, load, parse, to_toml


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("hostnam = 'x'", "hostnam: unknown key (did you mean hostname?); expected one of: admission, body"),
        ("[[listener]]\nadress = ':25'", "listener[0].adress: unknown key (did you mean address?); expected one of: "),
        ("[listener]", "listener: expected an array of tables; write [[listener]] instead of [listener]"),
        ("[[delivery]]", "delivery: expected one table; write [delivery] instead of [[delivery]]"),
        ("domains = 'a.org'", "domains: expected an array, not 'a.org'; write ['a.org']"),
        ("[relay.retry]\nexpire_after = '5d'", "relay.retry.expire_after: expected a number, not '5d'; write 432000"),
        ("[relay.retry]\nschedule = ['5m']", "relay.retry.schedule[0]: expected a number, not '5m'; write 300"),
        ("[[listener]]\nmax_size = '25M'", "listener[0].max_size: expected an integer, not '25M'; write 26214400"),
        (
            "[spool]\nreserve_octets = '1 GiB'",
            "spool.reserve_octets: expected an integer, not '1 GiB'; write 1073741824",
        ),
        ("[server]\nworkers = 1.5", "server.workers: expected an integer, not 1.5; write a number such as 1"),
        ("[[listener]]\ntls = 'none'", "listener[0].tls: expected a table, not 'none'"),
        ("[[listener]]\ntls.required = 'yes'", "listener[0].tls.required: expected true or false, not 'yes'"),
        (
            "[[listener]]\nmax_size = 'big'",
            "listener[0].max_size: expected an integer, not 'big'; write a number such as 26214400",
        ),
        (
            "[[listener]]\n[listener.tls]\nmode = 'maybe'",
            "listener[0].tls.mode: unknown value 'maybe'; expected one of: ",
        ),
        (
            "[[listener]]\n[listener.limits]\nrecipients = 10",
            "listener[0].limits.recipients: expected an integer >= 100, not 10",
        ),
        ("[[listener]]\n[listener.wire]\nbare_lf = 'maybe'", "listener[0].wire.bare_lf"),
        ("listener = []", "listener: expected an array that is not empty"),
        ("hostname = 'a b'", "hostname: 'a b' is not a host name"),
        ("domains = ['*.example.org']", "domains: '*.example.org'"),
        ("[[listener]]\naddress = '0.0.0.0:25'", "open relay"),
        ("[[listener]]\naddress = ':25'", "open relay"),
        ("[[listener]]\naddress = '127.0.0.1'", "listener[0].address: a listen address looks like"),
        ("[[listener]]\n[[listener]]", "listener[1].address: '127.0.0.1:2525' is used by listener[0]"),
        (
            "domains = []\n[[listener]]\naddress = ':2525'\n[[listener]]",
            "listener[1].address: '127.0.0.1:2525' is already bound by listener[0], ':2525'",
        ),
        (
            "domains = []\n[[listener]]\naddress = '[::1]:25'\n[[listener]]\naddress = '[::]:25'",
            "listener[1].address: '[::]:25' is already bound by listener[0], '[::1]:25'",
        ),
        (
            "[[listener]]\nname = 'a'\n[[listener]]\naddress = '[::1]:25'\nname = 'a'",
            "listener[1].name: 'a' is the name of listener[0]",
        ),
        ("[[listener]]\nproxy_networks = ['1.2.3.4/8']", "listener[0].proxy_networks: 1.2.3.4/8 has host bits set"),
        (
            "[[listener]]\ntls.mode = 'none'\nauth.mechanisms = ['PLAIN']",
            "listener[0].auth: none of the mechanisms is allowed without TLS",
        ),
        ("[[check]]\ndeadline = 1.0", "check[0].hook: required key is missing"),
        ("[delivery]\nkind = 'maildir'\n[recipients]\nverify = 'next-hop'", "recipients.verify: delivery.kind"),
        ("[recipients]\nverify = 'next-hop'\nfile = 'x'", "recipients.verify: cannot be combined with recipients.file"),
        ("[delivery]\npassthrough.buffer = 1", "delivery.passthrough.buffer: expected an integer >= 4096, not 1"),
        ("[[route]]\ndomains = ['a.org']\nnext_hop = 'mx'", "route: no default route: bounces go to senders"),
        ("[[route]]\nnext_hop = 'smtp:/a'", "route[0].next_hop: 'smtp:/a' is not a next hop; expected smtp://host:25"),
        (
            "[[route]]\nnext_hop = 'mx'\n[route.tls]\nmode = 'maybe'",
            "route[0].tls.mode: unknown value 'maybe'; expected one of: ",
        ),
        (
            "[[route]]\nnext_hop = 'mx'\n[route.limits]\nconnections = 0",
            "route[0].limits.connections: expected an integer >= 1, not 0",
        ),
        (
            "[[route]]\n[[route.next_hops]]\nurl = 'smtp://a'\nweight = 0",
            "route[0].next_hops[0].weight: expected an integer >= 1, not 0",
        ),
        ("[relay.retry]\nschedule = [0.5]", "relay.retry.schedule[0]: expected a number >= 1, not 0.5"),
        ("[resolver]\nservers = ['dns.example.org']", "resolver.servers[0]: 'dns.example.org' is not a DNS server"),
        (
            "[[listener]]\nauth.mechanisms = ['CRAM-MD5']",
            "listener[0].auth.mechanisms[0]: unknown value 'CRAM-MD5'; expected one of: SCRAM-SHA-256-PLUS, SCRAM-SHA",
        ),
        ("[[listener]]\nauth.mechanisms = ['PLAIN', 'PLAIN']", "listener[0].auth.mechanisms: 'PLAIN' is listed twice"),
        ("[[listener]]\nauth = { mechanisms = [], required = true }", "listener[0].auth.mechanisms: auth.required"),
        ("[[listener]]\nauth.users = ''", "listener[0].auth.users: expected a string that is not empty"),
        ("[[listener]]\ntls = { mode = 'none', required = true }", "listener[0].tls.required: tls.mode"),
        ("[[listener]]\ntls.key = 'key.pem'", "listener[0].tls.key: requires tls.certificate"),
        (
            "[[listener]]\ntls.ciphers = 'ROT13'",
            "listener[0].tls.ciphers: OpenSSL knows no cipher 'ROT13'",
        ),
        ("[spool]\npath = 'spool-1'", "spool.path: 'spool-1' must not end in a hyphen and digits"),
        ("[relay.tls]\ndane = true", "relay.tls.dane: the resolver must validate DNSSEC"),
        (
            "[relay.tls]\ndane = true\n[resolver]\nservers = ['192.0.2.53']",
            "relay.tls.dane: the resolver must validate",
        ),
        ("[relay.tls]\nreports = 'daily'", 'relay.tls.contact: reports = "daily" needs an address'),
        (
            "[relay.tls]\nreports = 'daily'\ncontact = 'tls@out.example'",
            "relay.tls.contact: recipients ignore reports without a DKIM signature (RFC 8460 3); add a [[policy.sign]]",
        ),
        (
            "[relay.tls]\nreports = 'daily'\ncontact = 'tls@example'\n"
            "[[policy.sign]]\ndomain = 'out.example'\nselector = 's'\nkey = 'k'",
            "relay.tls.contact: recipients ignore reports",
        ),
        ("[relay]\npool.source = 'eth0'", "relay.pool.source: 'eth0' does not appear to be an IPv4 or IPv6 address"),
        ("[delivery]\nmaildir.path = '{user}/mail'", "delivery.maildir.path: only {local} and {domain} are replaced"),
        ("[delivery]\nmaildir.path = 'mail/{local'", "delivery.maildir.path: only {local} and {domain} are replaced"),
        ("[resolver]\nttl_least = 60\nttl_most = 30", "resolver.ttl_least: greater than resolver.ttl_most = 30"),
        ("[admission]\nexempt = ['x']", "admission.exempt: 'x' does not appear to be an IPv4 or IPv6 network"),
        ("x = ", "invalid TOML"),
        (
            "[[route]]\nnext_hop = 'mx'\n[[listener]]\nwire.bare_lf = 'accept'",
            'listener[0].wire.bare_lf: "accept" cannot be combined with a next hop',
        ),
        (
            "delivery.kind = 'passthrough'\n[[route]]\nnext_hop = 'smtp://a'\n[[listener]]\nwire.bare_cr = 'accept'",
            'listener[0].wire.bare_cr: "accept" cannot be combined with a next hop',
        ),
    ],
)
def test_a_mistake_is_reported_with_its_key(toml: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(toml)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("listener", "hop"),
    [
        ("127.0.0.1:2525", "smtp://127.0.0.1:2525"),
        ("127.0.0.1:2525", "smtp://localhost:2525"),
        ("127.0.0.1:2525", "lmtp://[::ffff:127.0.0.1]:2525"),
        ("127.0.0.1:2525", "smtp://0.0.0.0:2525"),
        ("localhost:2525", "smtp://[::1]:2525"),
        (":2525", "smtp://127.0.0.9:2525"),
        ("[::]:25", "smtp://[::1]"),
        ("192.0.2.1:465", "smtps://192.0.2.1"),
        ("mx.example.org:25", "smtp://mx.example.org"),
        ("unix:/run/lmtp", "lmtp+unix:///run/lmtp"),
    ],
)
def test_a_next_hop_that_is_a_listener_is_refused(listener: str, hop: str) -> None:
    toml = f"domains = ['a.example']\n[[listener]]\naddress = '{listener}'\n[[route]]\n"
    for route in (f"next_hop = '{hop}'", f"next_hops = [{{ url = 'smtp://192.0.2.9' }}, {{ url = '{hop}' }}]"):
        with pytest.raises(ConfigError, match=r"is listener\[0\] of this server: mail would loop back"):
            parse(toml + route)


def test_next_hops_beside_a_listener_are_allowed() -> None:
    for hop in ("smtp://127.0.0.1:25", "smtp://127.0.0.2:2525", "smtp://localhost:10025", "lmtp+unix:///run/other"):
        parse(f"[[listener]]\naddress = '127.0.0.1:2525'\n[[route]]\nnext_hop = '{hop}'")
    for listener, hop in (("[::]:2525", "smtp://127.0.0.1:2525"), ("0.0.0.0:2525", "smtp://[::1]:2525")):
        parse(f"domains = ['a.example']\n[[listener]]\naddress = '{listener}'\n[[route]]\nnext_hop = '{hop}'")


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
        "[relay.tls]\ndane = true\n[resolver]\nservers = ['127.0.0.1:5353', '[::1]:53']",
        "[relay.tls]\ndane = true\n[resolver]\nservers = ['192.0.2.53']\ntrust_ad = true",
        "[relay.tls]\nreports = 'daily'\ncontact = 'tls@Mx.Out.example'\n"
        "[[policy.sign]]\ndomain = 'OUT.example'\nselector = 's'\nkey = 'k'",
        "[relay]\npool.source = '::1'",
        "[[route]]\nnext_hop = 'smtps://a'",
        "[[listener]]\naddress = '127.0.0.1:0'\n[[listener]]\naddress = '127.0.0.1:0'\nname = 'second'",
        "[[listener]]\nwire = { bare_lf = 'accept', bare_cr = 'accept' }",
        "delivery.kind = 'discard'\n[[route]]\nnext_hop = 'mx'\n[[listener]]\nwire.bare_lf = 'accept'",
    ],
)
def test_these_settings_are_accepted(toml: str) -> None:
    parse(toml)


def test_load_names_the_file_and_resolves_data_dir_against_it(tmp_path: Path) -> None:
    file = tmp_path / "penstock.toml"
    file.write_text("x = 1")
    with pytest.raises(ConfigError, match=r"penstock\.toml: x"):
        load(file)
    file.write_text("data_dir = 'mail'")
    assert load(file).data_dir == str(tmp_path / "mail")


def test_the_description_reads_back_as_the_defaults() -> None:
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
