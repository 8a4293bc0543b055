"""TLSA records against the certificates that a server sends."""

from __future__ import annotations

import datetime
import hashlib
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

import penstock.relay.dane
from penstock.relay.dane import DanePolicy, Tlsa, policy_of
from tests.relay.outbound import der_of, tlsa

ROOT = trustme.CA()
INTERMEDIATE = ROOT.create_child_ca()
LEAF = INTERMEDIATE.issue_cert("mx.example.org")
OWN = LEAF.cert_chain_pems[0]
CHAIN = [der_of(each) for each in LEAF.cert_chain_pems]
OTHER = trustme.CA()


def record(usage: int, selector: int, matching: int, blob: trustme.Blob) -> tuple[int, int, int, bytes]:
    *numbers, data = tlsa(usage, selector, matching, blob).split()
    return (*map(int, numbers), bytes.fromhex(data))  # type: ignore[return-value]


def check(*records: tuple[int, int, int, bytes], name: str = "mx.example.org", chain: list[bytes] = CHAIN) -> str:
    return policy_of(records, (name,)).check(chain)


@pytest.mark.parametrize("matching", [0, 1, 2])
@pytest.mark.parametrize("selector", [0, 1])
def test_the_certificate_of_the_host_is_compared(selector: int, matching: int) -> None:
    assert check(record(3, selector, matching, OWN), name="any.example") == "", "names do not matter"
    wrong = record(3, selector, matching, OTHER.cert_pem)
    assert check(wrong) == "DANE: the certificate matches no TLSA record"
    assert check(wrong, record(3, selector, matching, OWN)) == "", "one of several is enough"


def test_the_strongest_digest_of_a_usage_and_selector_counts() -> None:
    right, wrong = record(3, 1, 1, OWN), record(3, 1, 2, OTHER.cert_pem)
    assert check(right, wrong) != "", "SHA-256 does not count beside SHA-512 (RFC 7671 9)"
    assert check(record(3, 1, 2, OWN), record(3, 1, 1, OTHER.cert_pem)) == ""
    assert check(right, record(3, 0, 2, OTHER.cert_pem)) == "", "another selector"
    assert check(right, record(2, 1, 2, OTHER.cert_pem)) == "", "another usage"
    assert check(record(3, 1, 0, OWN), wrong) == "", "what has no digest always counts"
    assert check(right, (3, 1, 2, b"short")) == "", "unusable records are not compared"


@pytest.mark.parametrize("matching", [0, 1, 2])
@pytest.mark.parametrize("selector", [0, 1])
def test_the_certificate_of_an_authority_signs_that_of_the_host(selector: int, matching: int) -> None:
    anchor = record(2, selector, matching, INTERMEDIATE.cert_pem)
    assert check(anchor) == ""
    assert "no matching subjectAltName" in check(anchor, name="other.example")
    assert check(record(2, selector, matching, OTHER.cert_pem)) != ""


def test_the_root_is_taken_from_the_chain_or_from_the_record() -> None:
    assert check(record(2, 1, 1, ROOT.cert_pem), chain=[*CHAIN, der_of(ROOT.cert_pem)]) == ""
    assert check(record(2, 1, 1, ROOT.cert_pem)) == "DANE: the certificate matches no TLSA record"
    assert check(record(2, 0, 0, ROOT.cert_pem)) == ""


def test_an_authority_does_not_vouch_for_what_it_has_not_signed() -> None:
    foreign = der_of(OTHER.issue_cert("mx.example.org").cert_chain_pems[0])
    chain = [foreign, *CHAIN[1:]]
    assert "DANE: " in check(record(2, 0, 1, INTERMEDIATE.cert_pem), chain=chain)


def test_a_certificate_that_has_expired_counts_only_for_itself() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    day = datetime.datetime.now(datetime.UTC)
    name = x509.Name([])
    ago = datetime.timedelta(days=9), datetime.timedelta(days=2)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 7, day - ago[0], day - ago[1])
    names = x509.SubjectAlternativeName([x509.DNSName("mx.example.org")])
    builder = builder.add_extension(names, critical=True)
    old = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    digest = hashlib.sha256(old).digest()
    assert check((3, 0, 1, digest), chain=[old]) == ""
    assert check((2, 0, 1, digest), chain=[old, old]) != ""


@pytest.mark.parametrize(
    ("usage", "selector", "matching", "data"),
    [(0, 0, 1, b"x" * 32), (1, 0, 1, b"x" * 32), (3, 2, 1, b"x" * 32), (3, 1, 3, b"x" * 32), (3, 1, 1, b"x" * 31)],
)
def test_a_record_of_no_use_is_left_out(usage: int, selector: int, matching: int, data: bytes) -> None:
    assert not Tlsa(usage, selector, matching, data).is_usable
    policy = policy_of([(usage, selector, matching, data)], ("mx.example.org",))
    assert (policy.authenticates, policy.check(CHAIN)) == (False, "")


def signed(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, number: int, *, is_ca: bool = True) -> bytes:
    """Return a certificate of `key`, signed with the same key."""
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, each)]) for each in (subject, issuer)]
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(names[1], names[0], key.public_key(), number, now - day, now + day)
    builder = builder.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    if not is_ca:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("mx.example.org")]), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def test_certificates_of_one_subject_make_no_search_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    looping = [signed("A", "A", key, number) for number in range(1, 15)]
    chain = [signed("leaf", "A", key, 99, is_ca=False), *looping]
    searched: list[int] = []
    verify = penstock.relay.dane._verify

    def counting(own: x509.Certificate, intermediates: list[x509.Certificate], *rest: Any) -> str:
        searched.append(len(intermediates))
        return verify(own, intermediates, *rest)

    monkeypatch.setattr(penstock.relay.dane, "_verify", counting)
    anchor = record(2, 0, 0, ROOT.cert_pem)
    policy = policy_of([anchor, record(2, 0, 0, OTHER.cert_pem)], ("mx.example.org", "example.org"))
    assert policy.check(chain).startswith("DANE: ")
    assert searched == [1, 1], "one intermediate, once for each name"


def test_the_chain_is_bounded() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    filler = [signed(str(number), "none", key, number) for number in range(1, 8)]
    anchor = record(2, 0, 1, INTERMEDIATE.cert_pem)
    assert check(anchor, chain=[CHAIN[0], *filler[:6], CHAIN[1]]) == ""
    assert check(anchor, chain=[CHAIN[0], *filler, CHAIN[1]]) != ""


def test_an_unreadable_certificate_matters_only_for_the_path() -> None:
    chain = [CHAIN[0], b"no certificate", *CHAIN[1:]]
    assert check(record(3, 1, 1, OWN), chain=chain) == ""
    assert check(record(2, 1, 1, INTERMEDIATE.cert_pem), chain=chain) == "", "it is skipped"
    octets = CHAIN[0].replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x07", 1)  # version 8
    with pytest.raises(x509.InvalidVersion):
        x509.load_der_x509_certificate(octets)
    assert check((3, 0, 1, hashlib.sha256(octets).digest()), chain=[octets]) == ""
    assert check(record(2, 1, 1, INTERMEDIATE.cert_pem), chain=[octets, *CHAIN[1:]]) != ""


def test_other_certificates_are_not_parsed_for_that_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bytes] = []
    load = penstock.relay.dane._load

    def noting(octets: bytes) -> x509.Certificate | None:
        loaded.append(octets)
        return load(octets)

    monkeypatch.setattr(penstock.relay.dane, "_load", noting)
    anchor = record(2, 0, 0, ROOT.cert_pem)
    assert check(anchor, record(3, 1, 1, OWN)) == ""
    assert loaded == CHAIN[:1]


def test_the_identity_of_a_hop_depends_on_what_is_compared() -> None:
    first, second = record(3, 1, 1, OWN), record(3, 1, 2, OWN)
    one = policy_of([first, second], ("mx.example.net", "example.org"))
    assert one == policy_of([second, first, second], ("mx.example.net", "example.com"))
    anchor = record(2, 1, 1, ROOT.cert_pem)
    assert policy_of([first, anchor], ("mx.example.net", "example.org")).names == ("mx.example.net", "example.org")
    unusable = (2, 1, 1, b"short")
    assert policy_of([first, unusable], ("mx.example.net", "example.org")).names == ("mx.example.net",)


@pytest.mark.parametrize("chain", [[], [b"no certificate"]])
def test_a_chain_that_cannot_be_read_does_not_match(chain: list[bytes]) -> None:
    assert check(record(3, 1, 1, OWN), chain=chain).startswith("DANE: ")


def test_a_name_that_is_none_does_not_match() -> None:
    policy = DanePolicy((Tlsa(*record(2, 0, 1, INTERMEDIATE.cert_pem)),), ("mx_1.example.org", "mx.example.org"))
    assert policy.check(CHAIN) == "", "the next name counts"


def test_all_hops_of_a_policy_have_one_hash() -> None:
    one, two = (policy_of([record(3, 1, 1, OWN)], ("mx.example.org",)) for _ in range(2))
    assert one == two and hash(one) == hash(two)
