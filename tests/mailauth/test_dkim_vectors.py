"""The messages of RFC 6376, RFC 8463 and of other implementations."""

from __future__ import annotations

import pytest

from penstock.dns import Answer
from penstock.mailauth.dkim import DkimVerifier
from penstock.mailauth.header import Header
from tests.conftest import SUITES

KEYS = {
    # RFC 8463 A.2
    "brisbane._domainkey.football.example.com": (b"v=DKIM1; k=ed25519; p=11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="),
    "test._domainkey.football.example.com": (
        b"v=DKIM1; k=rsa; p=MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDkHlOQoBTzWRiGs5V6NpP3idY6Wk08a5qhdR6wy5bdOKb2jLQi"
        b"Y/J16JYi0Qvx/byYzCNb3W91y3FutACDfzwQ/BC/e/8uBsCR+yz1Lxj+PL6lHvqMKrM3rG4hstT5QjvHO9PzoxZyVYLzBfO2EeC3Ip3G+2kry"
        b"OTIKT+l/K4w3QIDAQAB"
    ),
    "sed._domainkey.test.ex": b"v=DKIM1; k=ed25519; p=sPs07Vu29FpHT/80UXUcYHFOHifD4o2ZlP2+XUh9g6E=",
}


def results(name: str) -> list[str]:
    octets = (SUITES / "dkim" / name).read_bytes()
    head, _, body = octets.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n").partition(b"\r\n\r\n")
    verifier = DkimVerifier(Header(head + b"\r\n"), now=1_528_000_000)
    verifier.hashes.feed(body)
    verifier.hashes.finish()
    answers = {name: Answer("found", (KEYS[name],)) for name in verifier.questions}
    return [result.result for result in verifier.finish(answers)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rfc6376.signed.msg", ["pass", "pass"]),
        ("rfc6376.signed.rsa.msg", ["pass"]),
        ("rfc6376.signed.no_t.msg", ["fail"]),
        ("ed25519test2.msg", ["pass"]),
        ("ed25519test.msg", []),
        ("rfc6376.msg", []),
        ("rfc6376.w1258.msg", []),
        ("test_nofrom.message", []),
    ],
)
def test_the_vectors_are_verified(name: str, expected: list[str]) -> None:
    assert results(name) == expected
