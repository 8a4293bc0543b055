"""CPU of the checks of a message: SPF, DKIM, DMARC, all of them, and a question to the DNS.

    python -m bench.judge          (bench.judge_peers compares with opendkim and rspamd behind Postfix)

The DNS is a resolver whose cache holds the answers, then NSD on the loopback where it is installed. Every result is
asserted: a check that fails costs less than one that passes.
"""

from __future__ import annotations

import base64
import gc
import hashlib
import shutil
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from tests.dns.nsd import running_nsd

from penstock.dns import Answer, Budget, Resolver, ResolverSettings
from penstock.journal import Journal, JournalSettings
from penstock.mailauth import DecisionSettings, MessageCheck, Told, spf
from penstock.mailauth.dkim import DkimSigner, DkimVerifier, PrivateKey
from penstock.mailauth.header import Header
from penstock.message import Path as MailPath
from penstock.message import Recipient
from penstock.policy import dnsbl, fcrdns
from penstock.policy.check import Parts
from penstock.policy.judge import Judge
from penstock.policy.settings import PolicySettings
from penstock.transaction import Peer, Transaction

ADDRESS, SENDER, NOW = "192.0.2.10", "joe@sender.example", 1_750_000_000
HEAD = (
    b"".join(b"Received: from relay%d.example (relay%d.example [192.0.2.%d])\r\n\tby mx.example with ESMTPS id %d;"
             b"\r\n\tMon, 02 Jun 2025 10:00:00 +0000\r\n" % (n, n, n, n) for n in range(4))
    + b"From: Joe Sender <joe@sender.example>\r\nTo: Ann <ann@example.org>\r\nSubject: The minutes of the meeting\r\n"
    b"Date: Mon, 02 Jun 2025 10:00:00 +0000\r\nMessage-ID: <1@sender.example>\r\nMIME-Version: 1.0\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 7bit\r\n"
)  # fmt: skip
LINE = b"We met on Monday,  and agreed to meet  again on Tuesday of next week.\r\n"
ZONES = {
    "sender.example": '@ TXT "v=spf1 ip4:198.51.100.0/24 ip4:192.0.2.0/24 -all"\n'
    'includes TXT "v=spf1 include:sender.example -all"\n'
    '_dmarc TXT "v=DMARC1; p=reject"\n*.wild TXT "x"\nname A 192.0.2.1\n',
    "in-addr.arpa": "*.10 PTR name.sender.example.\n",
    **{f"list{number}.example": "2.0.0.127 A 127.0.0.2\n" for number in range(5)},
}
LISTS = [{"zone": f"list{number}.example"} for number in range(5)]
SETTINGS = DecisionSettings()


def body_of(size: int) -> bytes:
    """Return a text with runs of spaces."""
    return (LINE * (size // len(LINE) + 1))[: size - 2] + b"\r\n"


def key_record(key: PrivateKey) -> bytes:
    """Return the record of a key."""
    if isinstance(key, rsa.RSAPrivateKey):
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return b"v=DKIM1; p=" + base64.b64encode(key.public_key().public_bytes(serialization.Encoding.DER, form))
    return b"v=DKIM1; k=ed25519; p=" + base64.b64encode(key.public_key().public_bytes_raw())


def text_record(name: str, key: PrivateKey) -> str:
    """Return the record of a key as a line of a zone."""
    text = key_record(key).decode()
    return f"{name} TXT {' '.join(f'{chr(34)}{text[at : at + 250]}{chr(34)}' for at in range(0, len(text), 250))}\n"


def sign(key: PrivateKey, body: bytes) -> bytes:
    """Return the header with a signature."""
    hashes = DkimSigner.start()
    hashes.feed(body)
    hashes.finish()
    return DkimSigner("sender.example", "s1", key).finish(Header(HEAD), hashes, now=NOW) + HEAD


def verify(head: bytes, body: bytes, key: Answer) -> None:
    """Verify a signature; it must pass."""
    verifier = DkimVerifier(Header(head), now=NOW, author="sender.example")
    for at in range(0, len(body), 65_536):
        verifier.hashes.feed(memoryview(body)[at : at + 65_536])
    verifier.hashes.finish()
    (result,) = verifier.finish(dict.fromkeys(verifier.questions, key))
    assert result.result == "pass", result


def microseconds(function: Callable[[], object], count: int) -> float:
    """Return the median CPU of one call, of five rounds."""
    rounds = []
    for _ in range(5):
        gc.collect()
        start = time.process_time()
        for _ in range(count):
            function()
        rounds.append((time.process_time() - start) / count * 1e6)
    return statistics.median(rounds)


async def microseconds_async(function: Callable[[], Awaitable[object]], count: int) -> float:
    """Return the median CPU of one call, of five rounds."""
    rounds = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(count):
            await function()
        rounds.append((time.process_time() - start) / count * 1e6)
    return statistics.median(rounds)


def row(what: str, value: float, bound: float | None = None, unit: str = "us") -> None:
    """Print a line of the table."""
    print(f"{what:<52}{value:>10,.1f} {unit:<4}" + (f" bound {bound:,.0f}" if bound is not None else ""))


def bench_dkim(key: rsa.RSAPrivateKey) -> None:
    """Print what DKIM costs."""
    block = bytes(1_000_000)
    row("SHA-256 of 1 MB (to compare machines and loads)", microseconds(lambda: hashlib.sha256(block), 50))
    answer = Answer("found", (key_record(key),))
    for size, count, bound in ((4_000, 1000, None), (100_000, 200, 200.0), (10_000_000, 3, 15_000.0)):
        body = body_of(size)
        head = sign(key, body)
        row(f"DKIM RSA-2048, {size:,} octets", microseconds(partial(verify, head, body, answer), count), bound)
    tracemalloc.start()
    verify(head, body, answer)
    row("  memory beside the message", tracemalloc.get_traced_memory()[1] / 1024, 2048, "KiB")
    tracemalloc.stop()
    other = ed25519.Ed25519PrivateKey.generate()
    answer = Answer("found", (key_record(other),))
    body = body_of(4_000)
    head = sign(other, body)
    row("DKIM Ed25519, 4,000 octets", microseconds(lambda: verify(head, body, answer), 500))
    row("  signing, RSA-2048", microseconds(lambda: sign(key, body), 200))
    row("  signing, Ed25519", microseconds(lambda: sign(other, body), 500))


async def judge(resolver: Resolver, head: bytes, body: bytes) -> None:
    """Make all checks of a message as the server does; all must pass."""
    party: dict[str, Any] = {
        "address": ADDRESS,
        "sender": SENDER,
        "helo": "mx.sender.example",
        "receiver": "mx.example.org",
    }
    found = spf.check_known(resolver.cached, **party)
    if found is None:
        found = await spf.check(Budget(resolver, seconds=20).query, **party)
    check = MessageCheck(head, SETTINGS, now=NOW)
    check.feed(body)
    told = Told("mx.example.org", found, SENDER, "mx.sender.example")
    judgement = check.finish_known(resolver.cached, told)
    if judgement is None:
        budget = Budget(resolver, seconds=20)
        await budget.ask_ahead(check.hints)
        judgement = check.finish_known(resolver.cached, told)
    assert judgement is not None
    field = judgement.header_field
    assert b"spf=pass" in field and b"dkim=pass" in field and b"dmarc=pass" in field, field


async def bench_client(resolver: Resolver) -> None:
    """Print what is asked about a new client: five lists, and its name."""
    settings = msgspec.convert({"mode": "enforce", "dnsbl": LISTS, "fcrdns": {}}, PolicySettings)
    journal = Journal(JournalSettings(events="none"))
    parts = Parts("mx.example.org", resolver, journal, Path(), lambda _: True)
    judge = Judge(settings, [*dnsbl.make_checks(settings, parts), *fcrdns.make_checks(settings, parts)], journal)
    recipient = Recipient(MailPath("b@example.org", "b", "example.org"))
    numbers = iter(range(10**6))
    async with trio.open_nursery() as nursery:
        await nursery.start(judge.run)

        async def client(number: int | None = None) -> None:
            number = next(numbers) if number is None else number
            address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
            transaction = Transaction(Peer(address, 25), "main")
            await judge.on_connect(transaction)
            assert await judge.on_rcpt(transaction, recipient) is None
            found = transaction.results
            assert found.iprev is not None and found.iprev.result == "fail", found.iprev
            assert found.dnsbl is not None and not found.dnsbl.listings

        row("5 lists and reverse DNS, asked (7 questions)", await microseconds_async(client, 200), 250)

        async def clients() -> None:
            async with trio.open_nursery() as askers:
                for _ in range(10):
                    askers.start_soon(client)

        row("  ten clients at a time", await microseconds_async(clients, 30) / 10, 250)
        await client(77)
        row("5 lists and reverse DNS, DNS cached", await microseconds_async(partial(client, 77), 300))
        nursery.cancel_scope.cancel()


async def bench_all(key: rsa.RSAPrivateKey, server: str) -> None:
    """Print the cost of all checks and of the DNS."""
    servers = (server,)
    body = body_of(4_000)
    head = sign(key, body)
    async with trio.open_nursery() as nursery:
        resolver = Resolver(ResolverSettings(servers=servers))
        await nursery.start(resolver.run)

        async def check_spf() -> None:
            sender = "joe@includes.sender.example"
            result = await spf.check(resolver.query, address=ADDRESS, sender=sender, helo="x.example")
            assert result.result == "pass"

        row("SPF, an include, DNS cached", await microseconds_async(check_spf, 1000))
        row(
            "SPF + DKIM + DMARC, 4,000 octets, DNS cached",
            await microseconds_async(lambda: judge(resolver, head, body), 500),
            150,
        )

        async def asking(resolver: Resolver = resolver) -> None:
            resolver._cache.clear()  # noqa: SLF001 - there is no other use for it
            await judge(resolver, head, body)

        row("SPF + DKIM + DMARC, 3 questions asked", await microseconds_async(asking, 200), 250)
        resolvers = [Resolver(ResolverSettings(servers=servers)) for _ in range(10)]
        for each in resolvers:
            await nursery.start(each.run)

        async def asking_ten() -> None:
            async with trio.open_nursery() as judges:
                for each in resolvers:
                    judges.start_soon(asking, each)

        row("  ten messages at a time", await microseconds_async(asking_ten, 20) / 10, 250)
        row(
            "DNS answer from the cache",
            await microseconds_async(lambda: resolver.query("_dmarc.sender.example", "TXT"), 10_000),
        )
        numbers = iter(range(10**9))
        row(
            "DNS question asked, one at a time",
            await microseconds_async(lambda: resolver.query(f"{next(numbers)}.wild.sender.example", "TXT"), 500),
            35,
        )

        async def many() -> None:
            await resolver.query_all([(f"{next(numbers)}.wild.sender.example", "TXT") for _ in range(10)])

        row("DNS question asked, ten of one check", await microseconds_async(many, 100) / 10, 35)
        await bench_client(resolver)
        nursery.cancel_scope.cancel()


def main() -> None:
    """Print the table."""
    gc.set_threshold(20_000, 20, 100)  # as penstock.cli.running has it
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    bench_dkim(key)
    nsd = shutil.which("nsd", path="/usr/sbin")
    if nsd is None:
        raise SystemExit("the rest needs nsd")
    zones = ZONES | {"sender.example": ZONES["sender.example"] + text_record("s1._domainkey", key)}
    with tempfile.TemporaryDirectory() as folder, running_nsd(Path(folder), zones) as server:
        trio.run(bench_all, key, server)


if __name__ == "__main__":
    main()
