"""Connecting to a server."""

from __future__ import annotations

import errno
import math
import os
import socket
from typing import Final

import trio

from penstock.net import _poller
from penstock.net._poller import Poller
from penstock.net.stream import SocketStream

Address = tuple[str | int | bytes, ...] | str
"""An IP address and a port as the socket module has them, or the path of a unix socket."""
_UNDER_WAY: Final = (errno.EINPROGRESS, errno.EALREADY)


async def connect(
    family: int,
    address: Address,
    poller: Poller | None = None,
    *,
    source: str = "",
    timeout: float = math.inf,  # noqa: ASYNC109 - a scope costs more than a connection that is made at once
) -> SocketStream:
    """Connect to an address within `timeout` seconds. `source` is the IP address to connect from.

    Raise OSError, TimeoutError among them.

    Does not yield if the connection is made at once, as over loopback. connect(2) reports any TCP connection as being
    under way; asking a second time costs one system call, and only a connection that is not made then costs a wait.
    """
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if source:
                sock.bind((source, 0))
        code = sock.connect_ex(address)
        if code == errno.EINPROGRESS:
            code = sock.connect_ex(address)
    except BaseException:
        sock.close()
        raise
    return await finish_connect(sock, code, poller, timeout=timeout)


async def finish_connect(
    sock: socket.socket,
    code: int,
    poller: Poller | None = None,
    *,
    timeout: float = math.inf,  # noqa: ASYNC109 - as connect
) -> SocketStream:
    """Wait until a connection is established; `code` is the result of connect(2). Raise OSError."""
    try:
        if code in _UNDER_WAY:
            with trio.move_on_after(timeout):
                await trio.lowlevel.wait_writable(sock)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code in _UNDER_WAY:
                code = errno.ETIMEDOUT
        if code in (0, errno.EISCONN):
            return SocketStream.of(sock, poller)
    except BaseException:
        sock.close()
        raise
    sock.close()
    raise OSError(code, os.strerror(code))


async def connect_tcp(host: str, port: int, poller: Poller | None = None, *, source: str = "") -> SocketStream:
    """Connect to a host by its name or address, to whichever of its addresses answers first (RFC 8305).

    `source` is the IP address to connect from. Raise OSError.
    """
    stream = await trio.open_tcp_stream(host, port, local_address=source or None)
    descriptor = stream.socket.detach()
    try:
        return SocketStream(descriptor, poller)
    except BaseException:
        _poller.close(descriptor)
        raise


async def connect_unix(path: str, poller: Poller | None = None) -> SocketStream:
    """Connect to a unix socket. Raise OSError."""
    return await connect(socket.AF_UNIX, path, poller)


def source_address(address: str) -> str:
    """Return the IP address from which the system sends to another one; "" if there is no route. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((address, 25))
            return str(sock.getsockname()[0]).partition("%")[0]
    except OSError:
        return ""
