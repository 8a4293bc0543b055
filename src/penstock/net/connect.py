"""Sockets towards a server."""

from __future__ import annotations

import socket

import trio

from penstock.net import _poller
from penstock.net._poller import Poller
from penstock.net.stream import SocketStream


async def connect_tcp(host: str, port: int, poller: Poller | None = None, *, source: str = "") -> SocketStream:
    """Connect to a host by its name or address, to whichever of its addresses answers first (RFC 8305).

    `source` is the address of ours to connect from. Raise OSError.
    """
    stream = await trio.open_tcp_stream(host, port, local_address=source or None)
    return _take_over(stream.socket, poller)


async def connect_unix(path: str, poller: Poller | None = None) -> SocketStream:
    """Connect to a unix socket. Raise OSError."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return _take_over(sock, poller)


def _take_over(sock: trio.socket.SocketType, poller: Poller | None) -> SocketStream:
    """Return a stream that takes over a socket of trio's, which is non-blocking already."""
    descriptor = sock.detach()
    try:
        return SocketStream(descriptor, poller)
    except BaseException:
        _poller.close(descriptor)
        raise
