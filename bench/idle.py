"""Resident memory of an idle connection, beside other servers, while mail flows.

Each server holds N connections that have sent EHLO and nothing else, while smtp-source sends mail, which must not stop.

    python -m bench.idle [--connections 10000] [--messages 5000]
"""

from __future__ import annotations

import argparse
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
    raise_file_limit,
    rss_of,
    running,
    smtp_source,
)
from bench.other_servers import GO_SMTP, HARAKA, NODEMAILER


@contextmanager
def idle_connections(server: Running, count: int) -> Iterator[list[socket.socket]]:
    """Open connections and send EHLO on each. Raise OSError if one is not answered."""
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            sockets.append(sock)
            if not _read_reply(sock).startswith(b"220"):
                raise OSError(f"connection {len(sockets)} is refused")
            sock.sendall(b"EHLO idle.example\r\n")
            if not _read_reply(sock).startswith(b"250"):
                raise OSError(f"connection {len(sockets)} is closed")
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def _read_reply(sock: socket.socket) -> bytes:
    """Return a complete reply, or its part before the connection was closed."""
    data = b""
    while True:
        piece = sock.recv(4096)
        if not piece:
            return data
        data += piece
        last = data.rstrip(b"\r\n").rpartition(b"\r\n")[2]
        if data.endswith(b"\r\n") and last[3:4] == b" ":
            return data


def octets_per_connection(server: Running, count: int) -> float:
    """Return the resident octets of an idle connection."""
    before = rss_of(server.pid)
    with idle_connections(server, count):
        return (rss_of(server.pid) - before) / count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--messages", type=int, default=5_000)
    arguments = parser.parse_args()
    count = min(arguments.connections, raise_file_limit() - 200)
    print(machine())
    print(f"{count} idle connections; meanwhile {arguments.messages} messages of 4 KB from smtp-source -s 100\n")
    print(f"{'server':<16} {'octets per connection':>22} {'still open':>15} {'messages/s meanwhile':>21}")
    for peer in (PENSTOCK_SINK, PENSTOCK_SERVE, SMTP_SINK, GO_SMTP, NODEMAILER, HARAKA, AIOSMTPD, POSTFIX):
        if not peer.is_installed:
            print(f"{peer.name:<16} not installed")
            continue
        print(_measure(peer, min(count, peer.most_connections or count), arguments.messages), flush=True)


def _measure(peer: Peer, count: int, messages: int) -> str:
    """Return the line of a server."""
    sessions = 100 if peer.most_connections is None else peer.most_connections // 10
    with running(peer) as server:
        warm_up(server, sessions)
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


def warm_up(server: Running, sessions: int = 100) -> None:
    """Send mail, so that memory which a server allocates once is not counted as that of connections."""
    smtp_source(server, messages=500, sessions=sessions, size=4096)


def _is_alive(sock: socket.socket) -> bool:
    sock.sendall(b"NOOP\r\n")
    return _read_reply(sock).startswith(b"250")


if __name__ == "__main__":
    main()
