"""What a name server that lies, or talks nonsense, can do to mail: delay it for a bounded time, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import dns.flags
import dns.message
import dns.rrset
import pytest

from penstock.policy import authentication, fcrdns
from penstock.policy.check import Check, Parts
from penstock.policy.settings import PolicySettings
from tests.dns.lying import Lying, truncated
from tests.policy.harness import judging
from tests.policy.judging import make_message

TEXT = (
    b"DKIM-Signature: v=1; a=rsa-sha256; c=relaxed/relaxed; d=example.com; s=s1; h=from;"
    b" bh=47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=; b=YWJj\r\nFrom: a@example.com\r\n\r\n"
)
"""The hash of the empty body is right, so that the key is what counts."""


def response(query: bytes, *records: tuple[str, str, Sequence[str]]) -> bytes:
    """Return a response with these records; "" is the name that was asked for."""
    asked = dns.message.from_wire(query)
    made = dns.message.make_response(asked)
    made.flags |= dns.flags.RA
    for name, kind, values in records:
        made.answer.append(dns.rrset.from_text(name or asked.question[0].name, 60, "IN", kind, *values))
    return made.to_wire(max_size=65_535)


def wrong_id(query: bytes) -> bytes:
    return response(bytes((query[0] ^ 255,)) + query[1:])


def wrong_question(query: bytes) -> bytes:
    other = dns.message.make_query("evil.example", "TXT", id=int.from_bytes(query[:2], "big"))
    return response(other.to_wire(), ("", "TXT", ['"v=spf1 -all"']))


def huge(query: bytes) -> bytes:
    return response(query, ("", "TXT", [" ".join(['"v=spf1 -all"'] * 4_000)]))[:60_000]


def too_many_records(query: bytes) -> bytes:
    octets = bytearray(response(query, ("", "TXT", ['"v=spf1 -all"'])))
    octets[6:8] = b"\xff\xff"
    return bytes(octets)


def ring_of_aliases(query: bytes) -> bytes:
    asked = dns.message.from_wire(query).question[0].name.to_text()
    return response(query, ("", "CNAME", ["ring.example."]), ("ring.example.", "CNAME", [asked]))


numbers = itertools.count()


def endless_aliases(query: bytes) -> bytes:
    return response(query, ("", "CNAME", [f"n{next(numbers)}.endless.example."]))


def nothing(_: bytes) -> bytes:
    return b""


def junk(query: bytes) -> bytes:
    return query[:12] + b"\xc0\x0c" * 40


LIES: list[Callable[[bytes], bytes]] = [
    wrong_id,
    wrong_question,
    too_many_records,
    huge,
    ring_of_aliases,
    endless_aliases,
    nothing,
    junk,
]


def lying_with(lie: Callable[[bytes], bytes]) -> Lying:
    """Return a server that tells a lie by UDP, and by TCP if it is asked there."""

    def tcp(query: bytes) -> list[bytes]:
        octets = lie(query)
        return [len(octets).to_bytes(2, "big"), octets]

    return Lying(udp=lambda query: [lie(query) if len(lie(query)) < 4_000 else truncated(query)], tcp=tcp)


def checks(settings: PolicySettings, parts: Parts) -> list[Check]:
    return [*fcrdns.make_checks(settings, parts), *authentication.make_checks(settings, parts)]


@pytest.mark.parametrize("mode", ["enforce", "monitor"])
@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_is_no_answer(lie: Callable[[bytes], bytes], mode: str) -> None:
    policy = {"mode": mode, "fcrdns": {}}
    async with judging(checks, lying_with(lie), policy, timeout=0.03, lifetime=0.06) as judged:
        transaction, refusal = await judged.connect()
        assert refusal is None
        assert await judged.mail(transaction) is None
        assert await judged.rcpt(transaction) is None
        watcher = judged.judge.begin(transaction)
        assert watcher is not None
        watcher.feed(TEXT)
        verdict, _ = await judged.judge.on_message(transaction, make_message(transaction, TEXT))
        results = transaction.results
        assert results.spf is not None
        assert results.dmarc is not None
        assert results.iprev is not None
        found = [
            results.spf.result,
            results.dmarc.result,
            results.iprev.result,
            *(each.result for each in results.dkim),
        ]
        assert found == ["temperror"] * 4
        if mode == "enforce":
            assert verdict is not None
            assert (verdict.code, verdict.status) == (451, "4.4.3")
        else:
            assert verdict is None
        assert judged.resolver._pending == {}


def many_records(query: bytes) -> bytes:
    return response(query, ("", "TXT", [f'"v=spf1 ip4:192.0.2.{n % 256} n{n}"' for n in range(900)]))


def many_strings(query: bytes) -> bytes:
    return response(query, ("", "TXT", [" ".join(['"v=spf1 "'] + ['"x"'] * 1_000)]))


@pytest.mark.parametrize(("lie", "spf"), [(many_records, "permerror"), (many_strings, "permerror")])
async def test_answers_with_a_thousand_texts_are_read_and_wrong(lie: Callable[[bytes], bytes], spf: str) -> None:
    async with judging(checks, lying_with(lie), {}, timeout=5.0, lifetime=10.0) as judged:
        transaction, _ = await judged.connect()
        assert await judged.mail(transaction) is None
        assert transaction.results.spf is not None
        assert transaction.results.spf.result == spf
