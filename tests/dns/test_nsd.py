"""The resolver against NSD: an authoritative server that says nothing of recursion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.dns import Resolver, ResolverSettings
from tests.dns.lying import running
from tests.dns.nsd import running_nsd

ZONE = """\
@ NS ns
ns A 192.0.2.53
@ MX 10 mx
@ MX 20 mx2.other.test.
@ TXT "v=spf1 " "mx -all"
mx A 192.0.2.1
mx AAAA 2001:db8::1
www CNAME mx
*.wild TXT "anything"
_25._tcp.mx TLSA 3 1 1 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f
"""


@pytest.fixture
def nsd(tmp_path: Path) -> Iterator[str]:
    """Run NSD; yield its address."""
    big = "".join(f'big TXT "{number:03}{"x" * 200}"\n' for number in range(60))
    with running_nsd(tmp_path, {"example": ZONE + big}) as address:
        yield address


async def test_nsd_answers_as_its_zone_says(nsd: str) -> None:
    resolver = Resolver(ResolverSettings(servers=(nsd,)), probe_interval=0.01)
    async with running(resolver):
        assert (await resolver.query("example", "MX")).records == ((10, "mx.example"), (20, "mx2.other.test"))
        assert (await resolver.query("example", "TXT")).records == (b"v=spf1 mx -all",)
        answer = await resolver.query("www.example", "AAAA")
        assert (answer.name, answer.records) == ("mx.example", (bytes.fromhex("20010db8" + "00" * 11 + "01"),))
        assert (await resolver.query("a.b.wild.example", "TXT")).records == (b"anything",)
        assert (await resolver.query("_25._tcp.mx.example", "TLSA")).records == ((3, 1, 1, bytes(range(32))),)
        assert (await resolver.query("www.example", "MX")).status == "empty"
        assert (await resolver.query("nothing.example", "MX")).status == "missing"
        assert len((await resolver.query("big.example", "TXT")).records) == 60
        answer = await resolver.query("other.test", "MX")
        assert "REFUSED" in answer.cause
