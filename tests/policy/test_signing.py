"""DKIM signatures on mail of our users, verified by dkimpy and by our own verifier."""

from __future__ import annotations

import base64
from pathlib import Path

import dkim  # type: ignore[import-untyped]
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from penstock.dns import Answer
from penstock.mailauth.dkim import DkimVerifier
from penstock.mailauth.header import Header
from penstock.message import Message
from penstock.policy.overlay import Edit, EditedBody
from penstock.policy.settings import SignSettings
from penstock.policy.signing import SigningCheck, SigningError
from penstock.transaction import Transaction
from tests.policy.judging import HEADER, TEXT, judge, make_message, make_transaction, octets_of

RSA = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
ED25519 = ed25519.Ed25519PrivateKey.generate()
PEM = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()


def record(selector: str) -> bytes:
    if selector == "ed":
        return b"v=DKIM1; k=ed25519; p=" + base64.b64encode(ED25519.public_key().public_bytes_raw())
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return b"v=DKIM1; p=" + base64.b64encode(RSA.public_key().public_bytes(serialization.Encoding.DER, form))


def check_for(folder: Path, *domains: str) -> SigningCheck:
    (folder / "rsa.pem").write_bytes(RSA.private_bytes(*PEM))
    (folder / "ed.pem").write_bytes(ED25519.private_bytes(*PEM))
    settings = [
        SignSettings(domain=domain, selector=selector, key=f"{selector}.pem")
        for domain in domains or ("example.com",)
        for selector in ("rsa", "ed")
    ]
    return SigningCheck(settings, ["10.0.0.0/8"], folder)


async def signed(check: SigningCheck, transaction: Transaction, message: Message) -> bytes:
    reply, message = await judge(check, transaction, message)
    assert reply is None
    return octets_of(message)


def results(octets: bytes) -> list[tuple[str, str, str]]:
    header, _, body = octets.partition(b"\r\n\r\n")
    verifier = DkimVerifier(Header(header + b"\r\n"), now=2_000_000_000, author="example.com")
    verifier.hashes.feed(body)
    verifier.hashes.finish()
    answers = {name: Answer("found", (record(name.partition(".")[0]),)) for name in verifier.questions}
    return [(each.result, each.domain, each.selector) for each in verifier.finish(answers)]


@pytest.mark.parametrize("body", [TEXT, b"", b"text without end", b"x  \t y\r\n\r\n\r\n" * 50_000])
async def test_mail_of_users_is_signed_with_every_key(tmp_path: Path, body: bytes) -> None:
    transaction = make_transaction(identity="alice")
    message = make_message(transaction, HEADER + b"\r\n" + body, piece=1000)
    octets = await signed(check_for(tmp_path), transaction, message)
    assert octets.endswith(HEADER + b"\r\n" + body)
    assert results(octets) == [("pass", "example.com", "rsa"), ("pass", "example.com", "ed")]
    assert dkim.DKIM(octets).verify(idx=0, dnsfunc=lambda *_, **__: record("rsa"))


async def test_what_filters_have_changed_is_signed(tmp_path: Path) -> None:
    transaction = make_transaction(address="10.1.2.3")
    message = make_message(transaction)
    at = len(HEADER)
    message = message._replace(body=EditedBody(message.body, [Edit(at, at, b"X-New: x\r\n"), Edit(at + 2, at + 7)]))
    octets = await signed(check_for(tmp_path), transaction, message)
    assert b"X-New: x\r\n\r\n\r\n\r\nand goodbye" in octets
    assert {result for result, _, _ in results(octets)} == {"pass"}


async def test_nothing_else_is_signed(tmp_path: Path) -> None:
    check = check_for(tmp_path)
    stranger = make_transaction()
    assert b"DKIM" not in await signed(check, stranger, make_message(stranger))
    user = make_transaction(identity="alice")
    for author in (b"a@other.example", b"a@example.com, b@other.example", b"a@notexample.com", b""):
        message = make_message(user, b"From: " + author + b"\r\n\r\ntext\r\n")
        assert b"DKIM" not in await signed(check, user, message), author


async def test_the_nearest_domain_signs(tmp_path: Path) -> None:
    check = check_for(tmp_path, "example.com", "sub.example.com")
    user = make_transaction(identity="alice")
    for author, domain in ((b"a.sub.example.com", "sub.example.com"), (b"x.example.com", "example.com")):
        octets = await signed(check, user, make_message(user, b"From: a@" + author + b"\r\n\r\ntext\r\n"))
        assert [found for _, found, _ in results(octets)] == [domain, domain]


def test_a_key_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("no key")
    with pytest.raises(SigningError, match=r"x\.pem"):
        SigningCheck([SignSettings(domain="example.com", selector="s", key="x.pem")], [], tmp_path)
