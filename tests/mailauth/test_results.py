"""Authentication-Results, and the reading of headers."""

from __future__ import annotations

import email.utils

import authres  # type: ignore[import-untyped]
import idna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.mailauth._header import simple_mailbox
from penstock.mailauth.header import Header, author_domains, mailboxes
from penstock.mailauth.results import MethodResult, authentication_results, forged_fields

OWN = "mx.example.org"


def test_the_field_is_folded_and_read_by_another() -> None:
    field = authentication_results(
        OWN,
        [
            MethodResult("iprev", "pass", (("smtp.remote-ip", "192.0.2.1"),)),
            MethodResult("spf", "fail", (("smtp.mailfrom", "joe@example.com"),)),
            MethodResult("dkim", "pass", (("header.d", "example.com"), ("header.s", "s1"))),
            MethodResult("dkim", "permerror", (("header.d", ""), ("header.s", ""))),
            MethodResult("dmarc", "pass", (("header.from", "example.com"),)),
        ],
    )
    assert max(map(len, field.split(b"\r\n"))) <= 78
    parsed = authres.AuthenticationResultsHeader.parse(field.decode().replace("\r\n", "").replace("\t", " "))
    assert parsed.authserv_id == OWN
    assert [str(each) for each in parsed.results] == [
        "iprev=pass smtp.remote-ip=192.0.2.1",
        "spf=fail smtp.mailfrom=joe@example.com",
        "dkim=pass header.d=example.com header.s=s1",
        "dkim=permerror",
        "dmarc=pass header.from=example.com",
    ]
    assert authentication_results(OWN, []) == b"Authentication-Results: mx.example.org; none\r\n"


@given(st.text(max_size=400))
def test_text_of_the_client_cannot_add_a_result(text: str) -> None:
    field = authentication_results(OWN, [MethodResult("spf", "fail", (("smtp.mailfrom", text),))])
    assert field.count(b"\r\n") == field.count(b"\n") == field.count(b"\r") == len(field.splitlines())
    assert all(line.startswith((b"Authentication-Results:", b"\t")) for line in field.splitlines())
    parsed = authres.AuthenticationResultsHeader.parse(field.decode().replace("\r\n", "").replace("\t", " "))
    assert [(each.method, each.result) for each in parsed.results] == [("spf", "fail")]


@pytest.mark.parametrize(
    "field",
    [
        "Authentication-Results: mx.example.org; spf=pass",
        "AUTHENTICATION-RESULTS:MX.Example.ORG;spf=pass",
        "Authentication-Results : mx.example.org; spf=pass",
        "Authentication-Results:\r\n mx.example.org;\r\n spf=pass",
        "Authentication-Results: mx.example.org 1; spf=pass",
        "Authentication-Results: mx.example.org/1; spf=pass",
        "Authentication-Results: (a (nested) comment; here) mx.example.org (b); spf=pass",
        "Authentication-Results: mx.example.org(b); spf=pass",
        'Authentication-Results: "mx.example.org"; spf=pass',
        'Authentication-Results: "mx\\.example.org" 1; spf=pass',
        'Authentication-Results: "mx.exam"(c)"ple.org"; spf=pass',
        "Authentication-Results: mx.example.org.; spf=pass",
        "Authentication-Results: mx.example.org",
        "Authentication-Results: (never closed mx.example.org; spf=pass",
        'Authentication-Results: "never closed mx.example.org; spf=pass',
        "Authentication-Results: ; mx.example.org; spf=pass",
        "Authentication-Results: (\\)) mx.example.org; spf=pass",
    ],
)
def test_a_field_that_claims_our_name_is_found_in_any_spelling(field: str) -> None:
    octets = f"Received: x\r\n{field}\r\nSubject: y\r\n".encode()
    (found,) = forged_fields(Header(octets), OWN)
    assert octets[: found.start] + octets[found.stop :] == b"Received: x\r\nSubject: y\r\n"


@pytest.mark.parametrize(
    "field",
    [
        "Authentication-Results: mx.example.com; spf=pass",
        "Authentication-Results: other.net; spf=pass (by mx.example.org)",
        "Authentication-Results: amx.example.org; spf=pass",
        "Authentication-Results: mx.example.org.evil; spf=pass",
        "Authentication-Results: (mx.example.org) other.net; spf=pass",
        "ARC-Authentication-Results: i=1; mx.example.org; spf=pass",
        "X-Authentication-Results: mx.example.org; spf=pass",
        "Subject: Authentication-Results: mx.example.org",
        " Authentication-Results: mx.example.org",
    ],
)
def test_fields_of_others_stay(field: str) -> None:
    assert forged_fields(Header(f"A: b\r\n{field}\r\n".encode()), OWN) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("joe@example.com", ["joe@example.com"]),
        ("Joe <joe@example.com>", ["joe@example.com"]),
        ('"Doe, J. <x@evil.net>" <joe@example.com>', ["joe@example.com"]),
        ("(x@evil.net) joe@example.com (y)", ["joe@example.com"]),
        ("a@one.example, B <b@two.example>", ["a@one.example", "b@two.example"]),
        ("team: a@one.example, b@two.example;", ["a@one.example", "b@two.example"]),
        ("undisclosed:;", []),
        ("<@relay.example:joe@example.com>", ["joe@example.com"]),
        ('"a@b"@example.com', ['"a@b"@example.com']),
        ("joe@ example .com", ["joe@example.com"]),
        ("a@evil.net <joe@example.com>", ["joe@example.com"]),
        ("<joe@example.com", ["joe@example.com"]),
        ("", []),
        ("<>", [""]),
    ],
)
def test_the_mailboxes_of_a_field_are_read(value: str, expected: list[str]) -> None:
    assert mailboxes(value) == expected


@given(st.lists(st.tuples(st.text(max_size=10), st.sampled_from(["a@b.example", "c.d@e.example"])), max_size=3))
def test_a_well_formed_field_is_read_as_by_the_library(pairs: list[tuple[str, str]]) -> None:
    names = ["".join(char for char in name if char.isprintable()) for name, _ in pairs]
    value = ", ".join(email.utils.formataddr((name, address)) for name, (_, address) in zip(names, pairs, strict=True))
    assert mailboxes(value) == [address for _, address in pairs]


@given(st.text(max_size=100))
def test_any_field_has_mailboxes(value: str) -> None:
    assert isinstance(mailboxes(value), list)
    header = Header(b"From:" + value.replace("\n", "").encode("utf-8", "surrogatepass") + b"\r\n")
    assert all(domain == domain.lower() for domain in author_domains(header))


def test_author_domains_have_one_spelling() -> None:
    header = Header("From: a@Example.COM, b@example.com.\r\nFrom: c@b\u00fccher.example\r\nFrom: nobody\r\n".encode())
    assert author_domains(header) == ("example.com", "xn--bcher-kva.example", "")


@given(st.lists(st.sampled_from([b"A: b", b" folded", b"c :d", b"no colon", b"\r\n", b"\n", b":", b"\t", b"e:"])))
def test_the_fields_of_a_header_cover_it(parts: list[bytes]) -> None:
    octets = b"".join(parts)
    fields = Header(octets).fields
    assert b"".join(octets[field.start : field.stop] for field in fields) == octets
    assert all(field.name == octets[field.start : field.colon].rstrip(b" \t").lower() for field in fields)


def test_reading_a_name_of_one_letter_changes_no_shared_octets() -> None:
    assert [field.name for field in Header(b"T: x\r\nTo: y\r\n").fields] == [b"t", b"to"]
    assert bytes([0x54])[0] == 0x54


@pytest.mark.parametrize(
    "value",
    [
        ",".join(f"a@\u00e9{number}.example" for number in range(18_000)),
        ",".join(f"a@\u00e9{number}.example" for number in range(500)),
        ",".join(["a@\u00e9.example"] * 1000),
        "a@\u00e9.example (" + "x" * 100_000 + ")",
        "\u00e9" * 5000 + ".example",
    ],
    ids=["a long field", "many domains", "many authors", "a long comment", "a long domain"],
)
def test_an_endless_list_of_authors_is_not_read_to_its_end(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    original = idna.encode

    def encode(domain: str, **options: bool) -> bytes:
        encoded.append(domain)
        return original(domain, **options)

    monkeypatch.setattr(idna, "encode", encode)
    found = author_domains(Header(f"From: joe@b\u00fccher.example, {value}\r\nFrom: {value}\r\n".encode()))
    assert len(found) > 1
    assert len(encoded) <= 52


@given(
    st.lists(st.sampled_from([*'<>"\\(),:;@ \t', "\r\n ", "a", "b@c.example", "\xe9", "\x1c"]), max_size=12).map(
        "".join
    )
)
def test_a_simple_mailbox_is_what_any_mailbox_is_read_as(value: str) -> None:
    found = simple_mailbox(value.encode())
    assert found is None or [found] == mailboxes(value)


@pytest.mark.parametrize(
    "value",
    ["joe@example.com", " joe@example.com \t", "Joe <joe@example.com>", '"Joe, (x)"" B" <joe@example.com>\r\n '],
)
def test_an_ordinary_mailbox_is_simple(value: str) -> None:
    assert simple_mailbox(value.encode()) == "joe@example.com"
