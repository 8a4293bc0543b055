"""`python -m bench.idle`: resident memory of an idle connection, for Penstock and each peer, while mail flows.

Each server holds N connections that have said EHLO and then nothing; smtp-source sends mail meanwhile, which has to go
on. Prints the octets of resident memory that each connection costs, and the ratio to Penstock's.
"""

from __future__ import annotations

import argparse
import resource
import selectors
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from bench.measure import (
    AIOSMTPD,
    PENSTOCK_SERVE,
    PENSTOCK_SINK,
    POSTFIX,
    SMTP_SINK,
    Peer,
    Running,
    Stalled,
    machine,
    rss_of,
    running,
    smtp_source,
)
from bench.other_servers import GO_SMTP, HARAKA, NODEMAILER


@contextmanager
def idle_connections(server: Running, count: int) -> Iterator[list[socket.socket]]:
    """Open connections, say EHLO on each, and read the answers. Raise OSError when one is not answered."""
    sockets: list[socket.socket] = []
    selector = selectors.DefaultSelector()
    try:
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            sock.sendall(b"EHLO idle.example\r\n") if _answer(sock).startswith(b"220") else None
            if b"250" not in _answer(sock):
                raise OSError(f"it hangs up on connection {len(sockets) + 1}")
            sockets.append(sock)
        yield sockets
    finally:
        selector.close()
        for sock in sockets:
            sock.close()


def _answer(sock: socket.socket) -> bytes:
    """Read a whole reply."""
    data = b""
    while True:
        piece = sock.recv(4096)
        if not piece:
            return data
        data += piece
        last = data.rstrip(b"\r\n").rpartition(b"\r\n")[2]
        if data.endswith(b"\r\n") and last[3:4] == b" ":
            return data


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--messages", type=int, default=5_000)
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(arguments.connections, hard - 200)
    print(machine())
    print(f"{count} idle connections; meanwhile {arguments.messages} messages of 4 KB from smtp-source -s 100\n")
    print(f"{'server':<16} {'octets per connection':>22} {'still open':>15} {'messages/s meanwhile':>21}")
    for peer in (PENSTOCK_SINK, PENSTOCK_SERVE, SMTP_SINK, GO_SMTP, NODEMAILER, HARAKA, AIOSMTPD, POSTFIX):
        if not peer.is_installed:
            print(f"{peer.name:<16} not installed")
            continue
        print(_measure(peer, min(count, peer.most_connections or count), arguments.messages), flush=True)


def _measure(peer: Peer, count: int, messages: int) -> str:
    """Return the line of a peer."""
    sessions = min(100, 100 if peer.most_connections is None else peer.most_connections // 10)
    with running(peer) as server:
        smtp_source(server, messages=500, sessions=sessions, size=4096)  # warm: what mail costs once is no connection's
        before = rss_of(server.pid)
        try:
            with idle_connections(server, count) as sockets:
                each = (rss_of(server.pid) - before) / len(sockets)
                messages = int(messages * peer.share)
                flow = smtp_source(server, messages=messages, sessions=sessions, size=4096, timeout=90)
                alive = f"{sum(_is_alive(sock) for sock in sockets)} of {count}"
        except (Stalled, OSError) as exc:
            return f"{peer.name:<16} {exc}"
    return f"{peer.name:<16} {each:>22.0f} {alive:>15} {flow.rate:>21.0f}"


def _is_alive(sock: socket.socket) -> bool:
    sock.sendall(b"NOOP\r\n")
    return _answer(sock).startswith(b"250")


if __name__ == "__main__":
    main()
