"""The relay and Postfix's smtp-sink with its faults."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from penstock.relay.hop import Hop, NextHopUnavailable
from penstock.relay.pool import Pool
from tests.e2e.running import ENVIRONMENT
from tests.ports import free_port
from tests.relay.fake import PLAIN, PREFIX, TEXT, Text, envelope, send, told


@contextmanager
def sink(*arguments: str) -> Iterator[Hop]:
    """Run smtp-sink."""
    port = free_port()
    command = ["smtp-sink", "-u", "nobody", *arguments, f"127.0.0.1:{port}", "100"]
    process = subprocess.Popen(command, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.01)
        yield Hop(host="127.0.0.1", port=port, tls=PLAIN)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "outcome"),
    [
        (["-8"], "delivered 250"),
        (["-p"], "delivered 250"),
        (["-e"], "delivered 250"),
        (["-a"], "delivered 250"),
        (["-r", "MAIL"], "deferred"),
        (["-r", "RCPT"], "deferred"),
        (["-r", "DATA"], "deferred"),
        (["-r", "."], "deferred"),
        (["-f", "MAIL"], "failed"),
        (["-f", "RCPT"], "failed"),
        (["-f", "DATA"], "failed"),
        (["-f", "."], "failed"),
        (["-q", "MAIL"], "deferred"),
        (["-q", "RCPT"], "deferred"),
        (["-q", "DATA"], "deferred"),
        (["-q", "."], "deferred"),
        (["-q", "CONNECT"], "down"),
        (["-r", "CONNECT"], "down"),
        (["-f", "EHLO"], "delivered 250"),
        (["-q", "EHLO"], "down"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
async def test_smtp_sink(pool: Pool, arguments: Sequence[str], outcome: str) -> None:
    with sink(*arguments) as hop:
        for _ in range(2):
            try:
                said = told(await send(pool, hop))
            except NextHopUnavailable:
                said = "down"
            assert said.startswith(outcome), said


async def test_smtp_sink_speaks_lmtp(pool: Pool) -> None:
    with sink("-L") as hop:
        lmtp = Hop(host=hop.host, port=hop.port, kind="lmtp", tls=PLAIN)
        results = await pool.deliver(lmtp, envelope("a@x.org", "b@x.org"), PREFIX, Text(TEXT), len(PREFIX + TEXT))
        assert told(results) == "delivered 250, delivered 250"
