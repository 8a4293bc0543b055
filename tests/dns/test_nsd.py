"""The resolver against NSD: an authoritative server that says nothing of recursion."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from penstock.dns import Resolver, ResolverSettings
from tests.dns.lying import running

ZONE = """\
$ORIGIN example.
$TTL 300
@ SOA ns hostmaster 1 3600 600 86400 60
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
CONFIG = """\
server:
    ip-address: 127.0.0.1@{port}
    do-ip6: no
    username: ""
    zonesdir: "{folder}"
    database: ""
    pidfile: "{folder}/nsd.pid"
    xfrdfile: "{folder}/xfrd.state"
    zonelistfile: "{folder}/zone.list"
    server-count: 1
    rrl-ratelimit: 0
    rrl-whitelist-ratelimit: 0
    minimal-responses: no
remote-control:
    control-enable: no
zone:
    name: "example"
    zonefile: "{folder}/example.zone"
"""


@pytest.fixture
def nsd(tmp_path: Path) -> Iterator[str]:
    """Run NSD; yield its address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    big = "".join(f'big TXT "{number:03}{"x" * 200}"\n' for number in range(60))
    (tmp_path / "example.zone").write_text(ZONE + big)
    (tmp_path / "nsd.conf").write_text(CONFIG.format(port=port, folder=tmp_path))
    command = ["/usr/sbin/nsd", "-d", "-c", str(tmp_path / "nsd.conf")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


async def test_nsd_answers_as_its_zone_says(nsd: str) -> None:
    resolver = Resolver(ResolverSettings(servers=(nsd,)), probe_interval=0.01)
    async with running(resolver):
        while (await resolver.query("mx.example", "A")).is_failure:  # until it has started
            resolver._cache.clear()
            await trio.lowlevel.checkpoint()
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
