"""One recursive DNS server: queries over UDP and TCP, and a breaker.

Rules
-----
1. A response is believed only when it comes from the address of the server (the sockets are connected), to the port
   and with the id of the query, and repeats its question (RFC 5452). Ids are random, ports are chosen by the kernel.
2. Each query has a socket of its own while it waits, so that its task waits for the response itself: a task that reads
   for all would cost a second switch of tasks. Sockets are used again, at random, for a random number of queries; one
   whose query was not answered is closed, and with it goes whatever still comes.
3. Anything else that arrives is ignored, and the query goes on waiting: an attacker must not be able to end it.
4. A truncated or unreadable response is asked for again by TCP (RFC 7766 5).
5. A server that has not answered FAILURES queries in a row, about several names, is left out until it answers a probe.
   No query waits for that: the probe is a task of its own. What fails on this machine says nothing about the server.
6. A query has no timer: a cancel scope costs as much as the query. `expire` ends those whose time is over; the resolver
   calls it from time to time while queries are under way.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable
from typing import Any, Final

import trio
from trio.lowlevel import wait_readable

from penstock.dns import _codec as codec

FAILURES: Final = 5
"""Queries without an answer, one after the other and not all about one name, that open the breaker."""
_OUR_ERRORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""Errors of this machine, not of the server."""
_MAX_SOCKETS: Final = 1024
"""Queries under way to one server."""
_MAX_TCP: Final = 64
NS: Final = 2
_UNKNOWN_EDNS: Final = (codec.FORMERR, codec.NOTIMP)


class NoResponseError(Exception):
    """A server did not answer, or with something unreadable. The text is the cause."""


class Server:
    """A recursive server, asked by one trio loop."""

    def __init__(self, address: str, port: int, *, trust_ad: bool, began: Callable[[], None]) -> None:
        """`trust_ad`: trust its AD bit even if it is not on this machine.

        `began` is called when a query is under way and none was before: `expire` has to be called then.
        """
        found = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[0]
        self._family, self._address = found[0], found[4]
        self.text = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self.trust_ad = trust_ad or ipaddress.ip_address(address).is_loopback
        self.is_open = False
        """The breaker is open: the server is left out."""
        self.needs_probe = False
        """The breaker has just opened: the caller starts `probe`, and resets this."""
        self._failures = 0
        self._failed_name: str | None = None
        """The name that the queries without an answer were about; None if they were about several."""
        self._knows_edns = True
        self._sockets = codec.UdpPool(self._open_socket, _MAX_SOCKETS, began)
        self._tcp = trio.CapacityLimiter(_MAX_TCP)

    @property
    def is_waiting(self) -> bool:
        """Queries are under way."""
        return bool(self._sockets.busy)

    def _open_socket(self) -> socket.socket:
        """Return a new socket that is connected to the server. Raise OSError."""
        return open_socket(self._family, self._address)

    async def ask(self, name: str, kind: int, deadline: float) -> codec.Decoded:
        """Return the response to a question, of any status.

        Raise NoResponseError when there is none before the deadline, in the clock of trio, and ValueError for what is
        not a name of the DNS.
        """
        return await self.finish(self.begin_or_fail(name, kind, deadline), name, kind)

    def begin(self, name: str, kind: int, deadline: float) -> codec.UdpQuery:
        """Send a question without waiting; `finish` must follow, or `abandon` of what is returned.

        Raise OSError, and ValueError for what is not a name of the DNS.
        """
        return self._sockets.send(name, kind, self._knows_edns, deadline)

    def begin_or_fail(self, name: str, kind: int, deadline: float) -> codec.UdpQuery:
        """Send a question as `begin` does. Raise NoResponseError instead of OSError."""
        try:
            return self._sockets.send(name, kind, self._knows_edns, deadline)
        except OSError as exc:
            raise self._failed(name, exc) from exc

    async def finish(self, used: codec.UdpQuery, name: str, kind: int) -> codec.Decoded:
        """Return the response to a question that was begun. Raise NoResponseError."""
        try:
            response = used.receive() if used.is_due else await self._wait_on(used)
            if response is None:
                response = await self._wait_on(used)
            if response[1] or response[0] in _UNKNOWN_EDNS:
                response = await self._ask_again(name, kind, response[0], used.deadline)
        except (OSError, trio.ClosedResourceError, trio.TooSlowError, codec.MalformedMessageError) as exc:
            used.abandon()
            raise self._failed(name, exc) from exc
        except BaseException:
            used.abandon()
            raise
        self.succeeded()
        return response

    def succeeded(self) -> None:
        """Note that a query was answered."""
        self._failures = 0

    async def _wait_on(self, used: codec.UdpQuery) -> codec.Decoded:
        """Return the response to a question; whatever arrived first was none. Raise OSError, ClosedResourceError."""
        while not used.is_expired:
            await wait_readable(used.fd)
            response = used.receive()
            if response is not None:
                return response
        raise TimeoutError

    def _failed(self, name: str, exc: Exception) -> NoResponseError:
        """Return the error of a question without an answer; count it, unless this machine is the reason."""
        cause = "no answer"
        if isinstance(exc, codec.MalformedMessageError):
            cause = f"unreadable answer: {exc}"
        elif isinstance(exc, OSError) and not isinstance(exc, TimeoutError):
            cause = exc.strerror or str(exc)
        if not (isinstance(exc, OSError) and exc.errno in _OUR_ERRORS):
            self._note_failure(name)
        return NoResponseError(f"{self.text}: {cause}")

    def _note_failure(self, name: str) -> None:
        """Count a query without an answer. The silence of the servers of one name does not open the breaker."""
        self._failures += 1
        if self._failures == 1:
            self._failed_name = name
        elif self._failed_name != name:
            self._failed_name = None
        if self._failures >= FAILURES and self._failed_name is None and not self.is_open:
            self.is_open = self.needs_probe = True

    async def probe(self, interval: float, timeout: float) -> None:  # noqa: ASYNC109 - of each probe
        """Ask for the root every `interval` seconds until the server answers, then close the breaker.

        The first probe is sent at once: the silence may have been that of the domains asked about.
        """
        while self.is_open:
            try:
                await self.ask("", NS, trio.current_time() + timeout)
                self.is_open = False
            except NoResponseError:
                await trio.sleep(interval)

    def expire(self, now: float) -> None:
        """End the queries whose time is over."""
        self._sockets.expire(now)

    async def _ask_again(self, name: str, kind: int, rcode: int, deadline: float) -> codec.Decoded:
        """Ask without EDNS what the server could not read, and by TCP what was truncated or unreadable."""
        if rcode in _UNKNOWN_EDNS:
            # RFC 6891 7: it does not know EDNS, or has no use for it.
            used = self._sockets.send(name, kind, False, deadline)
            try:
                response = await self._wait_on(used)
            finally:
                used.abandon()
            if self._knows_edns:
                self._knows_edns = response[0] in _UNKNOWN_EDNS
            if not response[1]:
                return response
        query = codec.encode_query(self._sockets.number(), name, kind, self._knows_edns)
        with trio.fail_at(deadline):
            async with self._tcp:
                wire = await self._exchange_tcp(query)
        response = codec.decode_response(wire, query)
        if response[1]:
            raise codec.MalformedMessageError("truncated by TCP")
        return response

    async def _exchange_tcp(self, query: bytes) -> bytes:
        """Ask over a new connection. Raise OSError."""
        with trio.socket.socket(self._family, socket.SOCK_STREAM) as sock:
            await sock.connect(self._address)
            stream = trio.SocketStream(sock)
            try:
                await stream.send_all(len(query).to_bytes(2, "big") + query)
                size = int.from_bytes(await _receive_exactly(stream, 2), "big")
                return await _receive_exactly(stream, size)
            except trio.BrokenResourceError as exc:
                raise OSError("the TCP connection broke") from exc

    def close(self) -> None:
        """Close the sockets; queries that wait fail, and those that come."""
        self._sockets.close()


def open_socket(family: int, address: Any) -> socket.socket:
    """Return a UDP socket that is connected to a server. Raise OSError."""
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


async def _receive_exactly(stream: trio.SocketStream, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        data = await stream.receive_some(size - len(parts))
        if not data:
            raise OSError("the TCP connection ended early")
        parts += data
    return bytes(parts)
