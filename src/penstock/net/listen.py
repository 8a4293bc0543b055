"""Listening sockets: bind, accept in batches, pause when file descriptors run out."""

from __future__ import annotations

import errno
import grp
import os
import re
import socket
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from penstock.addresses import canonical_address, parse_address
from penstock.net._poller import SHORTAGES, Poller, accept

BACKLOG = 4096
"""Connections in the kernel's queue; the kernel limits this to net.core.somaxconn."""
_BATCH = 64
"""Connections accepted before other tasks run."""
_FIRST_FREE = 1024
"""The first port that needs no privileges."""
_ANYWHERE = {"": (4, 6), "0.0.0.0": (4,), "::": (6,)}  # noqa: S104 - nothing is bound
"""The versions of IP in which a wildcard is reached: `_bind_tcp` binds "::" for IPv6 only."""
_PAUSE = 0.1
"""Seconds without accepting when descriptors run out: new connections stay in the kernel's queue."""
SOCKET_MODE = 0o660
"""Permissions of unix sockets: connecting needs write permission, which the owner and the group have."""


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where to listen: "127.0.0.1:2525", "[::1]:2525", "localhost:2525", ":2525" (everywhere) or "unix:/run/lmtp"."""

    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> ListenAddress:
        """Raise ValueError when the text has none of these forms."""
        if text.startswith("unix:"):
            if text == "unix:":
                raise ValueError("a unix socket needs a path: unix:/run/penstock/lmtp")
            return cls("", 0, text.removeprefix("unix:"))
        host, colon, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host and "[" not in host and "]" not in host:
            raise ValueError(f"an IPv6 address needs brackets: [{host}]:{port}")
        if not colon or "[" in host or "]" in host or not port.isdecimal() or int(port) > 65_535:
            raise ValueError(f"a listen address looks like 127.0.0.1:2525, [::1]:2525 or unix:/path, not {text!r}")
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.path or self.host == "localhost":
            return True
        try:
            return parse_address(self.host).is_loopback
        except ValueError:
            return False

    def is_reached_by(self, host: str, port: int, is_local_address: Callable[[str], bool]) -> bool:
        """Return whether a connection of this machine to an IP address, or to "localhost", reaches this listener.

        `is_local_address` recognizes the addresses of network interfaces.
        """
        if self.path or port != self.port:
            return False
        try:
            address = parse_address("127.0.0.1" if host == "localhost" else host)
            if self.host in _ANYWHERE:
                if host != "localhost" and address.version not in _ANYWHERE[self.host]:
                    return False
                return address.is_loopback or address.is_unspecified or is_local_address(str(address))
            own = parse_address("127.0.0.1" if self.host == "localhost" else self.host)
        except ValueError:  # another host name
            return host == self.host
        if self.host == "localhost":
            return address.is_loopback or address.is_unspecified
        if address.is_unspecified:
            return own.is_loopback and own.version == address.version
        return address == own

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_mode(text: str) -> int:
    """Return the permissions of a unix socket, "0660" for example. Raise ValueError."""
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise ValueError(f'permissions are three octal digits, such as "0660", not {text!r}')
    return int(text, 8)


def find_group(name: str) -> int:
    """Return the number of a group given by its name or number. Raise ValueError."""
    if name.isascii() and name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as exc:
        raise ValueError(f"there is no group {name!r}") from exc


def _bind_unix(path: str, mode: int, group: int | None) -> socket.socket:
    """Bind a unix socket, replacing one that nothing listens on any more.

    Nothing can connect before `listen`, so the permissions are set in time.
    """
    place = Path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if place.exists() and stat.S_ISSOCK(place.stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) != 0:
                    place.unlink()
        sock.bind(path)
        if group is not None:
            os.chown(path, -1, group)
        place.chmod(mode)
    except OSError:
        sock.close()
        raise
    return sock


def bind(address: ListenAddress, *, mode: int = SOCKET_MODE, group: int | None = None) -> list[socket.socket]:
    """Return the listening sockets of an address: one for each IP address of a host name.

    `mode` and `group` are the permissions and the group number of a unix socket; without a group it has that of the
    process. Port 0 takes a free port. Raise OSError, which names the address, when one cannot be bound.
    """
    sockets: list[socket.socket] = []
    try:
        if address.path:
            sockets.append(_bind_unix(address.path, mode, group))
        else:
            found = socket.getaddrinfo(
                address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            sockets += [_bind_tcp(family, place) for family, _, _, _, place in dict.fromkeys(found)]
        for sock in sockets:
            sock.listen(BACKLOG)
            sock.setblocking(False)
    except OSError as exc:
        for sock in sockets:
            sock.close()
        said = f"cannot listen on {address}: {exc.strerror or exc}"
        if exc.errno == errno.EACCES and 0 < address.port < _FIRST_FREE:
            said += " (ports below 1024 need root with server.user, or CAP_NET_BIND_SERVICE)"
        raise (OSError(said) if exc.errno is None else OSError(exc.errno, said)) from exc
    return sockets


def _bind_tcp(family: int, place: Any, *, is_shared: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Accepted sockets inherit it: the replies of a batch leave in one send, waiting for more only delays them.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(place)
    except OSError:
        sock.close()
        raise
    return sock


def share(sockets: Sequence[socket.socket], count: int) -> list[list[socket.socket]]:
    """Return `count` sets of listening sockets, the given one first; the kernel spreads connections over them.

    A path has only one unix socket, which is in every set. Raise OSError.
    """
    sets = [list(sockets)]
    for sock in sockets:
        if sock.family != socket.AF_UNIX:
            # Not before: a second server that is started by mistake must fail with "address already in use".
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    while len(sets) < count:
        sets.append([sock if sock.family == socket.AF_UNIX else _another(sock) for sock in sockets])
    return sets


def _another(sock: socket.socket) -> socket.socket:
    made = _bind_tcp(sock.family, sock.getsockname(), is_shared=True)
    made.listen(BACKLOG)
    made.setblocking(False)
    return made


def name_of(sock: socket.socket) -> str:
    """Return the address a socket listens on, in the form that `ListenAddress.parse` reads."""
    place = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return str(ListenAddress("", 0, str(place)))
    return str(ListenAddress(place[0], place[1]))


Accepted = Callable[[int, str, int], None]
"""Takes the descriptor over; gets the client's IP address ("" on a unix socket) and port. Must not raise."""


async def accept_forever(
    listener: socket.socket,
    handle: Accepted,
    report_shortage: Callable[[OSError], None],
    poller: Poller | None = None,
) -> None:
    """Accept connections in batches until cancelled, in the turns of a poller when there is one.

    Clients have canonical addresses, also on an IPv6 socket that accepts IPv4 (one that another process has bound).
    """
    handle = _with_canonical_address(listener, handle)
    descriptor = listener.fileno()
    while poller is not None:
        await _until_shortage(poller, descriptor, handle, report_shortage)
        await trio.sleep(_PAUSE)
    while True:
        await trio.lowlevel.wait_readable(descriptor)
        await trio.lowlevel.checkpoint_if_cancelled()  # by now others may serve the clients that are in the queue
        for _ in range(_BATCH):
            try:
                accepted = accept(descriptor)
            except OSError as exc:
                if exc.errno in SHORTAGES:
                    report_shortage(exc)
                    await trio.sleep(_PAUSE)
                    break
                # Any other error concerns only the connection that was to be accepted (accept(2)).
                continue
            if accepted is None:
                break
            handle(*accepted)


def _with_canonical_address(listener: socket.socket, handle: Accepted) -> Accepted:
    """Return a handler for clients whose addresses may be IPv4-mapped; the same one where none can be."""
    if listener.family != socket.AF_INET6 or listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return handle
    return lambda descriptor, address, port: handle(descriptor, canonical_address(address), port)


async def _until_shortage(
    poller: Poller,
    descriptor: int,
    handle: Accepted,
    report_shortage: Callable[[OSError], None],
) -> None:
    """Let the poller accept until descriptors run out."""
    is_short = trio.Event()

    def note(exc: OSError) -> None:
        report_shortage(exc)
        is_short.set()

    poller.listen(descriptor, handle, note)
    try:
        await is_short.wait()
    finally:
        poller.ignore(descriptor)


def close_listener(listener: socket.socket, *, unlinks: bool = True) -> None:
    """Stop listening. `unlinks`: also remove the file of a unix socket, which no other process listens on."""
    if listener.fileno() < 0:
        return
    path = listener.getsockname() if unlinks and listener.family == socket.AF_UNIX else ""
    if trio.lowlevel.in_trio_run():  # else no task waits for it
        trio.lowlevel.notify_closing(listener)
    listener.close()
    if path:
        with suppress(OSError):
            Path(path).unlink()
