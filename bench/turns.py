"""How long one client waits for its replies while others pipeline a megabyte of commands each.

Many clients each send 1 MB of commands at once, without reading a reply before all is sent, while another client sends
one `NOOP` after another. Printed is how long it waits for its replies. Two kinds of load: `NOOP`, the cheapest
command, and `MAIL` with an internationalized domain, the dearest that needs no disk.

    python -m bench.turns [--clients 100] [--seconds 10] [--python PATH]
"""

from __future__ import annotations

import argparse
import multiprocessing
import selectors
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Final

from bench.measure import Peer, Running, machine, running, verdict

BOUND: Final = 0.1
"""Seconds: the 99th percentile of the other client's waits."""
_CONFIG = """hostname = "bench.example"
data_dir = "data"
delivery.kind = "discard"
journal.events = "errors"
[[listener]]
address = "127.0.0.1:{port}"
limits.errors = 1_000_000
"""


def _names() -> bytes:
    """Return MAIL commands with a new internationalized domain each: no cache helps."""
    return b"".join(f"MAIL FROM:<a@bücher{n}.example> SMTPUTF8\r\nRSET\r\n".encode() for n in range(20_000))


LOADS: Final = {"NOOP": b"NOOP\r\n" * 170_000, "MAIL with IDNA names": _names()}
_OCTETS: Final = 1_000_000
_SEGMENT: Final = 65_536


def serve(python: str = sys.executable) -> Peer:
    """Return a `penstock serve` without a budget of errors."""

    def command(port: int, folder: Path) -> Sequence[str]:
        (folder / "penstock.toml").write_text(_CONFIG.format(port=port))
        return [python, "-m", "penstock", "serve", "--config", str(folder / "penstock.toml")]

    return Peer("penstock serve", command, python)


@dataclass(frozen=True)
class Waits:
    """How long the other client waited for its replies, in seconds."""

    waits: Sequence[float]
    rate: float
    """Octets a second that the server read from the other clients meanwhile."""

    def percentile(self, share: float) -> float:
        """Return a percentile, such as 0.99."""
        return sorted(self.waits)[min(len(self.waits) - 1, int(len(self.waits) * share))]


def _load(port: int, commands: bytes, clients: int, taken: Synchronized[int]) -> None:
    """Keep clients busy until the process is ended: each sends the commands, reads the replies and connects again."""
    selector = selectors.DefaultSelector()

    def connect() -> None:
        sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        sock.sendall(b"EHLO load.example\r\n")
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, memoryview(commands))

    for _ in range(clients):
        connect()
    while True:
        for key, events in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            sock, left = key.fileobj, key.data
            try:
                if events & selectors.EVENT_WRITE:
                    sent = sock.send(left[:_SEGMENT])
                    taken.value += sent
                    left = left[sent:]
                    if not left:
                        sock.shutdown(socket.SHUT_WR)
                    selector.modify(sock, selectors.EVENT_READ | (selectors.EVENT_WRITE if left else 0), left)
                is_open = not events & selectors.EVENT_READ or bool(sock.recv(1 << 20))
            except BlockingIOError:
                continue
            except OSError:
                is_open = False  # the server may end a connection that only wastes its time
            if not is_open:
                selector.unregister(sock)
                sock.close()
                connect()


@contextmanager
def loading(server: Running, commands: bytes, clients: int) -> Iterator[Synchronized[int]]:
    """Load a server from another process until the end of the block. Yield the count of the octets sent so far."""
    commands = commands[: commands.rindex(b"\r\n", 0, _OCTETS) + 2]
    context = multiprocessing.get_context("spawn")
    taken = context.Value("q", 0)
    process = context.Process(target=_load, args=(server.port, commands, clients, taken), daemon=True)
    process.start()
    try:
        while taken.value < clients * _SEGMENT:  # until every client is at work
            if not process.is_alive():
                raise RuntimeError("the clients could not connect")
            time.sleep(0.01)
        yield taken
    finally:
        process.kill()
        process.join()


def measure(server: Running, commands: bytes, clients: int, seconds: float) -> Waits:
    """Return how long another client waits for its replies, greetings among them, while clients load the server."""
    waits: list[float] = []
    with loading(server, commands, clients) as taken:
        before, started = taken.value, time.monotonic()
        while time.monotonic() < started + seconds:
            waits += _probe(server.port, started + seconds)
        if not waits:
            raise RuntimeError("the server has not even greeted another client")
        return Waits(waits, (taken.value - before) / (time.monotonic() - started))


def _probe(port: int, end: float) -> Iterator[float]:
    """Connect and send `NOOP` until the end, or until the server has had enough of them. Yield each wait in seconds."""
    sent = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock, sock.makefile("rb") as replies:
        while replies.readline().startswith(b"2"):
            yield time.perf_counter() - sent
            if time.monotonic() > end:
                return
            time.sleep(0.005)
            sent = time.perf_counter()
            sock.sendall(b"NOOP\r\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--python", default=sys.executable)
    arguments = parser.parse_args()
    print(machine())
    print(f"{arguments.clients} clients, each pipelining 1 MB of commands; the waits of another client's NOOP")
    is_missed = False
    for name, commands in LOADS.items():
        with running(serve(arguments.python)) as server:
            found = measure(server, commands, arguments.clients, arguments.seconds)
        p50, p99 = found.percentile(0.5), found.percentile(0.99)
        is_missed |= p99 > BOUND
        print(
            f"  {name:<21} p50 {p50 * 1e3:8.1f} ms, p99 {p99 * 1e3:8.1f} ms, max {max(found.waits) * 1e3:8.1f} ms, "
            f"{len(found.waits)} replies; bound p99 {BOUND * 1e3:.0f} ms: {verdict(p99 <= BOUND)}; "
            f"the server read {found.rate / 1e6:.1f} MB/s",
            flush=True,
        )
    raise SystemExit(is_missed)


if __name__ == "__main__":
    main()
