"""DKIM with messages signed here, and with dkimpy as the oracle."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re

import dkim as dkimpy  # type: ignore[import-untyped]
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from penstock.dns import Answer
from penstock.mailauth._header import (
    BodyCanonicalizer,
    decode_base64,
    relaxed_field,
    squeeze,
    without_signature,
)
from penstock.mailauth.dkim import MAX_KEYS, MAX_SIGNATURES, DkimResult, DkimSigner, DkimVerifier, load_private_key
from penstock.mailauth.header import Header

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
SMALL = rsa.generate_private_key(public_exponent=65537, key_size=1024)
ED25519 = ed25519.Ed25519PrivateKey.generate()
NOW = 1_700_000_000
HEAD = b"From: Joe <joe@example.com>\r\nTo: a@example.org\r\nSubject: Is  dinner\r\n\tready?\r\nDate: today\r\n"
BODY = b"Hi.\r\n\r\nWe lost  the game. \r\n\r\n\r\n"


def record(key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey, tags: str = "") -> bytes:
    if isinstance(key, rsa.RSAPrivateKey):
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        public = key.public_key().public_bytes(serialization.Encoding.DER, form)
    else:
        public = key.public_key().public_bytes_raw()
        tags += "; k=ed25519"
    return f"v=DKIM1{tags}; p={base64.b64encode(public).decode()}".encode()


def sign(key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey = RSA, head: bytes = HEAD, body: bytes = BODY) -> bytes:
    hashes = DkimSigner.start()
    hashes.feed(body)
    hashes.finish()
    return DkimSigner("example.com", "s1", key).finish(Header(head), hashes, now=NOW) + head


def sign_with(options: str, *, key: rsa.RSAPrivateKey = RSA, length: int | None = None, **arguments: object) -> bytes:
    """Return a header signed by dkimpy, relaxed/relaxed."""
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    canonicalize = tuple(part.encode() for part in options.split("/"))
    signature = dkimpy.sign(
        HEAD + b"\r\n" + BODY, b"s1", b"example.com", pem, canonicalize=canonicalize, length=length, **arguments
    )
    assert isinstance(signature, bytes)
    return signature + HEAD


def verify(
    head: bytes, body: bytes = BODY, answer: Answer | bytes | None = None, *, now: int = NOW, size: int = 7
) -> list[DkimResult]:
    verifier = DkimVerifier(Header(head), now=now, author="example.com")
    for at in range(0, len(body), size):
        verifier.hashes.feed(body[at : at + size])
    verifier.hashes.finish()
    found = answer if isinstance(answer, Answer) else Answer("found", (record(RSA) if answer is None else answer,))
    return verifier.finish(dict.fromkeys(verifier.questions, found))


def one(*args: object, **kwargs: object) -> tuple[str, str]:
    (result,) = verify(*args, **kwargs)  # type: ignore[arg-type]
    return result.result, result.cause


def test_a_signature_may_name_its_domain_by_u_labels() -> None:
    hashes = DkimSigner.start()
    hashes.feed(BODY)
    hashes.finish()
    head = HEAD.replace(b"example.com", "bücher.example".encode())
    head = DkimSigner("bücher.example", "s1", RSA).finish(Header(head), hashes, now=NOW) + head
    assert DkimVerifier(Header(head), now=NOW, author="x").questions == ["s1._domainkey.xn--bcher-kva.example"]
    assert verify(head) == [DkimResult("pass", "xn--bcher-kva.example", "s1")]


@pytest.mark.parametrize("key", [RSA, ED25519, SMALL], ids=["rsa", "ed25519", "rsa1024"])
def test_what_we_sign_we_verify_and_dkimpy_does(key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> None:
    head = sign(key)
    assert verify(head, answer=record(key)) == [DkimResult("pass", "example.com", "s1")]
    if key is not ED25519:  # dkimpy would need another library for it; the vectors of RFC 8463 are in another file
        assert dkimpy.verify(head + b"\r\n" + BODY, dnsfunc=lambda *_, **__: record(key))
    assert max(map(len, head.split(b"\r\n"))) <= 78


@pytest.mark.parametrize("options", ["simple/simple", "simple/relaxed", "relaxed/simple", "relaxed/relaxed"])
def test_what_dkimpy_signs_is_verified(options: str) -> None:
    assert one(sign_with(options)) == ("pass", "")


@pytest.mark.parametrize(
    ("head", "body", "cause"),
    [
        (sign(), BODY + b"more\r\n", "the body was changed"),
        (sign().replace(b"dinner", b"supper"), BODY, "the signature does not match"),
        (sign() + b"Subject: another\r\n", BODY, "the signature does not match"),
        (b"From: eve@example.net\r\n" + sign(), BODY, "the signature does not match"),
    ],
    ids=["body", "header", "added Subject", "added From"],
)
def test_a_change_fails(head: bytes, body: bytes, cause: str) -> None:
    assert one(head, body) == ("fail", cause)


def test_what_relaxed_allows_to_change_may_change() -> None:
    head = sign().replace(b"Is  dinner\r\n\tready?", b"Is dinner   ready?  ").replace(b"From: Joe", b"FROM :Joe")
    assert one(head, b"Hi.\r\n\r\nWe lost the\t game.\r\n") == ("pass", "")


TEMPLATE = (
    b"v=1; a=rsa-sha256; q=dns/txt; c=relaxed/relaxed; d=example.com; s=s1; i=@example.com; h=from:to; bh=AAAA; b=AAAA"
)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b"v=1", b"v=1", ("fail", "the body was changed")),
        (b"v=1", f"v=1; x={NOW - 1}".encode(), ("fail", "the signature has expired")),
        (b"a=rsa-sha256", b"a=rsa-sha1", ("policy", "SHA-1 is not accepted")),
        (b"a=rsa-sha256", b"a=rsa-md5", ("permerror", "unknown algorithm")),
        (b"v=1", b"v=2", ("permerror", "unknown version")),
        (b"v=1;", b"", ("permerror", "unknown version")),
        (b"v=1;", b"v=1; v=1;", ("permerror", "malformed tags")),
        (b"v=1;", b"v=1; nonsense;", ("permerror", "malformed tags")),
        (b"d=example.com;", b"", ("permerror", "no tag d=")),
        (b"s=s1;", b"s=;", ("permerror", "no tag s=")),
        (b"i=@example.com", b"i=@example.net", ("permerror", "i= is not below d=")),
        (b"i=@example.com", b"i=@xexample.com", ("permerror", "i= is not below d=")),
        (b"q=dns/txt", b"q=pigeon", ("permerror", "unknown query method")),
        (b"c=relaxed/relaxed", b"c=loose", ("permerror", "unknown canonicalization")),
        (b"v=1", b"v=1; t=9; x=8", ("permerror", "it expires before it was made")),
        (b"v=1", b"v=1; l=-1", ("permerror", "l= is not a number")),
        (b"bh=AAAA", b"bh=!", ("permerror", "malformed base64")),
        (b"h=from:to", b"h=to", ("policy", "From is not signed")),
        (b"v=1", b"v=1; z=" + b"x" * 20_000, ("permerror", "the signature is too long")),
    ],
)
def test_the_error_of_a_broken_signature_is_reported(old: bytes, new: bytes, expected: tuple[str, str]) -> None:
    assert TEMPLATE.count(old) == 1
    assert one(b"DKIM-Signature: " + TEMPLATE.replace(old, new) + b"\r\n" + HEAD) == expected


PUBLIC = record(RSA).partition(b"p=")[2]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer("failed"), ("temperror", "the key is temporarily unavailable")),
        (Answer("missing"), ("permerror", "no key")),
        (Answer("empty"), ("permerror", "no key")),
        (b"v=DKIM1; p=", ("permerror", "the key is revoked")),
        (b"v=DKIM1; k=rsa", ("permerror", "no key in the record")),
        (b"v=DKIM1; p=AAAA", ("permerror", "malformed key")),
        (b"v=DKIM1; p=?", ("permerror", "malformed base64")),
        (b"v=DKIM2; p=" + PUBLIC, ("permerror", "not a key of DKIM")),
        (b"k=rsa; v=DKIM1; p=" + PUBLIC, ("permerror", "not a key of DKIM")),
        (b"k=dsa; p=" + PUBLIC, ("permerror", "unknown type of key")),
        (b"h=sha1; p=" + PUBLIC, ("permerror", "the key does not allow SHA-256")),
        (b"h=sha1:sha256; s=email; n=note; p=" + PUBLIC, ("pass", "")),
        (b"s=tls; p=" + PUBLIC, ("permerror", "the key is not for mail")),
        (b"p=" + PUBLIC, ("pass", "")),
        (record(ED25519), ("permerror", "the key is for another algorithm")),
        (record(SMALL), ("fail", "the signature does not match")),
        (b"v=DKIM1; p=" + b"A" * 5000, ("permerror", "the key record is too long")),
        (Answer("found", (b"nonsense", record(RSA))), ("pass", "")),
    ],
    ids=[f"key-{number}" for number in range(18)],  # each process of the test run makes keys of its own
)
def test_a_key_record_is_judged(answer: Answer | bytes, expected: tuple[str, str]) -> None:
    assert one(sign(), answer=answer) == expected


def test_a_testing_key_is_reported() -> None:
    assert verify(sign(), answer=record(RSA, "; t=y"))[0].is_testing


def test_a_strict_key_wants_the_same_domain_in_i() -> None:
    head = sign_with("relaxed/relaxed", identity=b"@sub.example.com")
    assert one(head) == ("pass", "")
    assert one(head, answer=record(RSA, "; t=s"))[0] == "permerror"


def test_a_body_signed_in_part_is_a_matter_of_policy() -> None:
    whole = len(b"Hi.\r\n\r\nWe lost the game.\r\n")
    head = sign_with("relaxed/relaxed", length=True)
    assert one(head) == ("pass", "")
    assert one(head, BODY.rstrip() + b"\r\nBuy!\r\n") == ("policy", "6 octets are not signed")
    short = head.replace(f"l={whole}".encode(), f"l={whole + 1}".encode())
    assert short != head
    assert one(short) == ("fail", "the body was changed")


def test_a_small_key_is_a_matter_of_policy() -> None:
    key = rsa.RSAPublicNumbers(65537, (1 << 767) + 1).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    octets = b"p=" + base64.b64encode(key.public_bytes(serialization.Encoding.DER, form))
    assert one(sign(), answer=octets) == ("policy", "an RSA key of 768 bits")


def test_signatures_are_bounded_and_those_of_the_author_first() -> None:
    others = b"".join(
        sign().partition(b"From:")[0].replace(b"d=example.com; s=s1", f"d=other{n}.net; s=s1".encode())
        for n in range(20)
    )
    verifier = DkimVerifier(Header(others + sign()), now=NOW, author="example.com")
    assert len(verifier.questions) == MAX_KEYS
    assert verifier.questions[0] == "s1._domainkey.example.com"
    results = verify(others + sign())
    assert len(results) == MAX_SIGNATURES
    assert [result.result for result in results] == ["pass"] + ["fail"] * 4 + ["policy"] * 3


BODIES = st.lists(  # the long pieces are for the vectors of ext/canon.h
    st.sampled_from([
        b"a", b"bc ", b" ", b"\t", b"\r\n", b"\r", b"\n", b"\0", b"\r\n\r\n", b"  \r\n", b"x" * 40_000,
        b"one line with several words\r\n", b"words with  two spaces, \xc3\xa9 and\ta tab \r\n ", b"and a line \r",
    ])
).map(lambda parts: b"".join(parts) + b"\r\n")  # fmt: skip


@given(BODIES, st.booleans(), st.booleans(), st.integers(1, 50_000))
def test_the_body_is_canonical_as_with_dkimpy_in_any_pieces(body: bytes, relaxed: bool, wide: bool, size: int) -> None:
    pieces: list[bytes] = []
    canonicalizer = BodyCanonicalizer(lambda piece: pieces.append(bytes(piece)), relaxed, wide)
    for at in range(0, len(body), size):
        canonicalizer.feed(body[at : at + size])
    canonicalizer.finish()
    policy = dkimpy.canonicalization.Relaxed if relaxed else dkimpy.canonicalization.Simple
    expected = policy.canonicalize_body(body)
    assert b"".join(pieces) == expected
    assert max(map(len, pieces), default=0) <= 8192


@given(st.lists(st.sampled_from(["a", " ", "\t", "\r\n ", "\r\n\t", ":", "é"])).map("".join))
def test_a_field_is_relaxed_as_with_dkimpy(value: str) -> None:
    ((name, text),) = dkimpy.canonicalization.Relaxed.canonicalize_headers([(b"Subject", value.encode() + b"\r\n")])
    assert relaxed_field(b"subject", value.encode()) == name + b":" + text


LINES = st.lists(st.sampled_from([b"a", b"bc ", b" ", b"\t", b"\r\n", b"\r\n\r\n"])).map(
    lambda parts: b"".join(parts) + b"\r\n"
)


def dkimpy_verifies(message: bytes) -> bool:
    try:
        return bool(dkimpy.verify(message, dnsfunc=lambda *_, **__: record(SMALL)))
    except dkimpy.DKIMException:
        return False


@settings(max_examples=50)
@given(LINES, st.sampled_from(["simple/simple", "relaxed/relaxed"]), st.integers(0, 200), st.sampled_from(b"aB \t"))
def test_a_damaged_message_is_verified_as_dkimpy_does(body: bytes, options: str, place: int, octet: int) -> None:
    pem = SMALL.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    parts = tuple(part.encode() for part in options.split("/"))
    signature = dkimpy.sign(HEAD + b"\r\n" + body, b"s", b"example.com", pem, canonicalize=parts)
    damaged = bytearray(HEAD + b"\r\n" + body)
    place %= len(damaged)
    if damaged[place] in b"\r\n:":
        return  # the lines stay lines, and the fields fields
    damaged[place] = octet
    head, _, body = bytes(damaged).partition(b"\r\n\r\n")
    head = signature + head + b"\r\n"
    assert (one(head, body, record(SMALL))[0] == "pass") == dkimpy_verifies(head + b"\r\n" + body)


@given(st.binary(max_size=300), st.binary(max_size=60))
def test_any_octets_have_a_result(junk: bytes, key: bytes) -> None:
    head = sign()
    for broken in (b"DKIM-Signature:" + junk + b"\r\n" + HEAD, head.replace(b"bh=", b"bh=" + junk)):
        for result in verify(broken, answer=key):
            assert result.result in {"fail", "policy", "permerror"}


def test_a_private_key_is_read_or_refused() -> None:
    pem = ED25519.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    assert isinstance(load_private_key(pem), ed25519.Ed25519PrivateKey)
    with pytest.raises(ValueError, match="PEM"):
        load_private_key(b"nonsense")


def test_memory_does_not_grow_with_blank_lines() -> None:
    sizes: list[int] = []
    sha = hashlib.sha256()

    def take(piece: memoryview) -> None:
        sizes.append(len(piece))
        sha.update(piece)

    canonicalizer = BodyCanonicalizer(take, True)
    for _ in range(1000):
        canonicalizer.feed(b"\r\n" * 1000)
    assert sizes == []
    canonicalizer.feed(b"a")
    canonicalizer.finish()
    assert max(sizes) <= 8192
    assert sha.digest() == hashlib.sha256(b"\r\n" * 1_000_000 + b"a\r\n").digest()


@given(
    st.lists(st.sampled_from([b"b=abc", b" b = x ", b"\r\n\tb=", b"bh=b=", b"a=b", b"b", b"", b"=b=", b"B=x"])).map(
        b";".join
    )
)
def test_the_value_of_b_is_cut_as_the_rfc_says(value: bytes) -> None:
    expected = re.sub(rb"((?:\A|;)[ \t\r\n]*b[ \t\r\n]*=)[^;]*", rb"\1", value, count=1)
    assert without_signature(value) == expected


@given(st.text(st.sampled_from("ABcd09+/== \t\r\n*\xe9"), max_size=14))
@settings(max_examples=500)
def test_base64_is_read_as_the_strict_decoder_of_python_reads_it(text: str) -> None:
    digits = re.sub("[ \t\r\n]", "", text)
    assert squeeze(text) == digits
    assume(len(digits.rstrip("=")) % 4 or not digits.endswith("="))  # versions of Python differ
    try:
        expected = binascii.a2b_base64(digits, strict_mode=True)
    except ValueError:
        expected = None
    assert decode_base64(text) == expected
