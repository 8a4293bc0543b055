"""Clients that connect, send, break off, reset and are cancelled at random: nothing may leak.

A whole worker runs in this process, with its poller, TLS, timeouts and spool, and delivers into a Maildir. Descriptors,
trio tasks, watched sockets and wire buffers are counted before and after. More than before is a leak.

    python -m bench.stress [--seconds 60] [--clients 100] [--seed N]
"""

from __future__ import annotations

import argparse
import random
import socket
import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trio

from penstock.app import Server, assemble
from penstock.config import ListenerSettings, Settings
from penstock.journal import Journal, JournalSettings
from penstock.server.limits import LimitSettings
from penstock.smtp import _wire


@dataclass
class Report:
    """Counts of a run, and its leaks."""

    connections: int = 0
    delivered: int = 0
    reset: int = 0
    leaks: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Counts that have grown, before and after."""


_TRANSACTION = [
    b"EHLO client.example\r\n",
    b"MAIL FROM:<a@example.com>\r\n",
    b"RCPT TO:<b@example.org>\r\n",
    b"DATA\r\n",
]


async def _client(port: int, rng: random.Random, tls: ssl.SSLContext, report: Report) -> None:
    """Run one client: send a message, or a part of one, and end in one of several ways."""
    report.connections += 1
    plain = await trio.open_tcp_stream("127.0.0.1", port)
    stream: trio.abc.Stream = plain
    kind = rng.choice(["whole", "whole", "cut", "reset", "silent", "garbage", "tls", "pipelined"])
    try:
        if kind == "silent":
            await trio.sleep(rng.random() * 0.2)
        elif kind == "garbage":
            await stream.send_all(rng.randbytes(rng.randrange(1, 5000)))
        else:
            await stream.receive_some(4096)
            if kind == "tls":
                await stream.send_all(_TRANSACTION[0])
                await stream.receive_some(4096)
                await stream.send_all(b"STARTTLS\r\n")
                await stream.receive_some(4096)
                stream = trio.SSLStream(stream, tls, server_hostname="localhost")
            await _send_message(stream, rng, kind)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # the server has closed the connection
    finally:
        if kind in ("cut", "reset") or rng.random() < 0.3:
            report.reset += 1
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await trio.aclose_forcefully(plain)


async def _send_message(stream: trio.abc.Stream, rng: random.Random, kind: str) -> None:
    """Send a message, only up to a random place if the connection is to be cut."""
    body = b"Subject: stress\r\n\r\n" + b"x" * 70 + b"\r\n" * rng.randrange(1, 50)
    if rng.random() < 0.1:
        body += (b"y" * 900 + b"\r\n") * 1000
    if kind == "pipelined":
        await stream.send_all(b"".join(_TRANSACTION))
        await stream.send_all(body + b".\r\nQUIT\r\n")
        while await stream.receive_some(4096):
            pass
        return
    for line in _TRANSACTION:
        await stream.send_all(line)
        await stream.receive_some(4096)
        if kind in ("cut", "reset") and rng.random() < 0.2:
            return
    if kind in ("cut", "reset"):
        await stream.send_all(body[: rng.randrange(len(body))])
        return
    await stream.send_all(body + b"\r\n.\r\n")
    await stream.receive_some(4096)
    await stream.send_all(b"QUIT\r\n")
    await stream.receive_some(4096)


def _counts() -> dict[str, int]:
    """Count what could leak."""
    return {
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "tasks": trio.lowlevel.current_statistics().tasks_living,
        "wire buffers": _wire.blocks_in_use(),
    }


async def stress(folder: Path, seconds: float, clients: int, seed: int) -> Report:
    """Run the stress and return its report."""
    limits = LimitSettings(command_timeout=2.0, data_timeout=5.0)
    listener = ListenerSettings(address="127.0.0.1:0", limits=limits)
    settings = Settings(hostname="localhost", data_dir=str(folder), listener=(listener,))
    settings = msgspec.structs.replace(settings, journal=JournalSettings(events="errors"))
    errors: list[bytes] = []
    report = Report()
    parts = assemble(settings, Journal(settings.journal), errors.append)
    assert parts.gateway is not None
    tls = ssl.create_default_context(cafile=str(parts.ca_file))
    rng = random.Random(seed)
    async with trio.open_nursery() as nursery:
        await nursery.start(parts.gateway.run)
        await nursery.start(parts.worker.run)
        port = parts.listeners[0].socket.getsockname()[1]
        await _one_by_one(port, tls, report)  # what is allocated once is no leak
        await _wait_until_idle(parts)
        before = _counts()
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as crowd:
                for _ in range(clients):
                    crowd.start_soon(_again_and_again, port, random.Random(rng.random()), tls, report)
        await _wait_until_idle(parts)
        after = _counts()
        report.leaks = {what: (before[what], count) for what, count in after.items() if count > before[what]}
        if parts.worker.watched:
            report.leaks["watched sockets"] = (0, parts.worker.watched)
        if parts.worker.admitted:
            report.leaks["admitted connections"] = (0, parts.worker.admitted)
        parts.worker.stop()
        parts.gateway.stop()
    report.delivered = len(list((folder / "maildir" / "new").iterdir()))
    if b"".join(errors):
        report.leaks["errors in the journal"] = (0, len(errors))
        print(b"".join(errors).decode()[:2000])
    return report


async def _one_by_one(port: int, tls: ssl.SSLContext, report: Report) -> None:
    for seed in range(30):
        await _client(port, random.Random(seed), tls, report)


async def _again_and_again(port: int, rng: random.Random, tls: ssl.SSLContext, report: Report) -> None:
    while True:
        with trio.move_on_after(rng.choice([0.05, 0.5, 3.0])):  # cancelled anywhere
            await _client(port, rng, tls, report)


async def _wait_until_idle(parts: Server) -> None:
    """Wait until the timeouts have ended the last connection and the last message is delivered."""
    assert parts.gateway is not None
    with trio.fail_after(60):
        while parts.worker.open_connections or parts.gateway.scheduler.held:  # noqa: ASYNC110 - there is no event
            await trio.sleep(0.05)
    await trio.sleep(0.3)  # threads of the last deliveries


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="penstock-stress-") as name:
        report = trio.run(stress, Path(name), arguments.seconds, arguments.clients, arguments.seed)
    print(
        f"{report.connections} connections in {arguments.seconds:.0f} s, {report.reset} of them reset, "
        f"{report.delivered} messages delivered; leaked: {report.leaks or 'nothing'}"
    )
    raise SystemExit(1 if report.leaks else 0)


if __name__ == "__main__":
    main()
