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
5. A server that has not answered FAILURES queries in a row is left out until it answers a probe. No query waits for
   that: the probe is a task of its own.
6. A query has no timer: a cancel scope costs as much as the query. `expire` ends those whose time is over; the resolver
   calls it from time to time while queries are under way.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from typing import Final, NamedTuple

import trio
from trio.lowlevel import notify_closing, wait_readable

from penstock.dns import _codec as codec

FAILURES: Final = 20
"""Queries without an answer, one after the other, that open the breaker."""
_LEAST_SOCKETS: Final = 4
"""Sockets that queries are spread over at least."""
_MAX_IDLE: Final = 64
_MAX_SOCKETS: Final = 1024
"""Queries under way to one server."""
_MAX_DATAGRAM: Final = 4096
_MAX_TCP: Final = 64
_RANDOM_OCTETS: Final = 2048
NS: Final = 2


class Response(NamedTuple):
    """What a server answered. See `codec.decode_response`."""

    rcode: int
    truncated: bool
    authentic: bool
    recursive: bool
    name: str
    records: tuple[object, ...]
    ttl: int | None


class NoResponseError(Exception):
    """A server did not answer, or with something unreadable. The text is the cause."""


def _decode(wire: bytes, query: bytes) -> Response | None:
    """Return a response; None for one that is truncated or unreadable."""
    try:
        response = Response._make(codec.decode_response(wire, query))
    except codec.MalformedMessageError:
        return None
    return None if response.truncated else response


class _Random:
    """Random numbers of 16 bits from the operating system, which is asked for many at a time."""

    def __init__(self) -> None:
        self._octets = b""
        self._at = 0

    def next(self) -> int:
        """Return a number below 65,536."""
        at = self._at
        if at == len(self._octets):
            self._octets, at = os.urandom(_RANDOM_OCTETS), 0
        self._at = at + 2
        return self._octets[at] << 8 | self._octets[at + 1]


class _UdpSocket:
    """A connected UDP socket, for one query at a time."""

    __slots__ = ("deadline", "is_expired", "remaining", "socket")

    def __init__(self, family: int, address: tuple[str, int], remaining: int) -> None:
        """`remaining` is the number of queries until it is replaced. Raise OSError."""
        self.remaining = remaining
        self.deadline = 0.0
        """When its query ends, in the clock of trio."""
        self.is_expired = False
        self.socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self.socket.connect(address)
        except BaseException:
            self.socket.close()
            raise

    def expire(self) -> None:
        """Wake the task that waits: its time is over."""
        self.is_expired = True
        notify_closing(self.socket)


class Server:
    """A recursive server, asked by one trio loop."""

    def __init__(self, address: str, port: int, *, trust_ad: bool, began: Callable[[], None]) -> None:
        """`trust_ad` says whether its AD bit counts although it is not on this machine.

        `began` is called when a query is under way and none was before: `expire` has to be called then.
        """
        found = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[0]
        self._family, self._address = found[0], found[4]
        self.text = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self.trust_ad = trust_ad or ipaddress.ip_address(address).is_loopback
        self.is_open = False
        """The breaker is open: the server is left out."""
        self._began = began
        self._failures = 0
        self._knows_edns = True
        self._random = _Random()
        self._idle: list[_UdpSocket] = []
        self._busy: set[_UdpSocket] = set()
        self._is_closed = False
        self._tcp = trio.CapacityLimiter(_MAX_TCP)

    @property
    def is_waiting(self) -> bool:
        """Queries are under way."""
        return bool(self._busy)

    async def ask(self, name: str, kind: int, deadline: float) -> Response:
        """Return the response to a question, whatever it says.

        Raise NoResponseError when there is none before the deadline, in the clock of trio, and ValueError for what is
        not a name of the DNS.
        """
        cause = "no answer"
        try:
            query = codec.encode_query(self._random.next(), name, kind, self._knows_edns)
            wire = await self._exchange(query, deadline)
            rcode = wire[3] & 15
            response = None
            if rcode not in (codec.FORMERR, codec.NOTIMP):
                response = _decode(wire, query)
            if response is None:
                response = await self._ask_again(name, kind, rcode, deadline)
        except (TimeoutError, trio.TooSlowError):
            pass
        except OSError as exc:
            cause = exc.strerror or str(exc)
        except codec.MalformedMessageError as exc:
            cause = f"unreadable answer: {exc}"
        else:
            self._failures = 0
            return response
        self._failures += 1
        if self._failures == FAILURES:
            self.is_open = True
        raise NoResponseError(f"{self.text}: {cause}")

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
        for each in self._busy:
            if each.deadline <= now and not each.is_expired:
                each.expire()

    async def _ask_again(self, name: str, kind: int, rcode: int, deadline: float) -> Response:
        """Ask without EDNS what the server could not read, and by TCP what was truncated or unreadable."""
        if rcode in (codec.FORMERR, codec.NOTIMP):
            # RFC 6891 7: it does not know EDNS, or has no use for it.
            query = codec.encode_query(self._random.next(), name, kind, False)
            wire = await self._exchange(query, deadline)
            if self._knows_edns:
                self._knows_edns = wire[3] & 15 in (codec.FORMERR, codec.NOTIMP)
            response = _decode(wire, query)
            if response is not None:
                return response
        query = codec.encode_query(self._random.next(), name, kind, self._knows_edns)
        with trio.fail_at(deadline):
            async with self._tcp:
                wire = await self._exchange_tcp(query)
        response = Response._make(codec.decode_response(wire, query))
        if response.truncated:
            raise codec.MalformedMessageError("truncated by TCP")
        return response

    async def _exchange(self, query: bytes, deadline: float) -> bytes:
        """Send a query by UDP; return its response. Raise OSError."""
        used = self._take()
        is_answered = False
        used.deadline = deadline
        if not self._busy:
            self._began()
        self._busy.add(used)
        sock = used.socket
        try:
            # A full send buffer is like a lost datagram: the next server is asked.
            sock.send(query)
            while not used.is_expired:  # it may have been while this task was about to read something else
                await wait_readable(sock)
                try:
                    wire = sock.recv(_MAX_DATAGRAM)
                except BlockingIOError:  # a datagram with a wrong checksum
                    continue
                if codec.is_response_to(wire, query):
                    is_answered = True
                    return wire
        except trio.ClosedResourceError:
            pass
        finally:
            self._busy.discard(used)
            if is_answered and used.remaining and len(self._idle) < _MAX_IDLE and not self._is_closed:
                self._idle.append(used)
            else:
                used.socket.close()
        if self._is_closed:
            raise OSError("the resolver was closed")
        raise TimeoutError

    def _take(self) -> _UdpSocket:
        """Return a socket that no query uses. Raise OSError."""
        if self._is_closed:
            raise OSError("the resolver was closed")
        idle, number = self._idle, self._random.next()
        if not idle or len(idle) + len(self._busy) < _LEAST_SOCKETS:
            if len(self._busy) >= _MAX_SOCKETS:
                raise OSError("too many questions at once")
            return _UdpSocket(self._family, self._address, 128 + (number & 127))  # type: ignore[arg-type]
        place = number % len(idle)
        used, idle[place] = idle[place], idle[-1]
        idle.pop()
        used.remaining -= 1
        return used

    async def _exchange_tcp(self, query: bytes) -> bytes:
        """Ask over a connection of its own. Raise OSError."""
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
        self._is_closed = True
        for each in self._busy:
            each.expire()
        for each in self._idle:
            each.socket.close()
        self._idle.clear()


async def _receive_exactly(stream: trio.SocketStream, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        data = await stream.receive_some(size - len(parts))
        if not data:
            raise OSError("the TCP connection ended early")
        parts += data
    return bytes(parts)
