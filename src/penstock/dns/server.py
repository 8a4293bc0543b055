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
import os
import socket
from collections.abc import Callable
from typing import Final, NamedTuple

import trio
from trio.lowlevel import notify_closing, wait_readable

from penstock.dns import _codec as codec

FAILURES: Final = 5
"""Queries without an answer, one after the other and not all about one name, that open the breaker."""
_OUR_ERRORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""What fails on this machine, whatever the server does."""
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


class Question:
    """A question that was sent to a server."""

    __slots__ = ("deadline", "error", "kind", "name", "query", "server", "used")

    def __init__(self, server: Server, name: str, kind: int, deadline: float, query: bytes) -> None:
        self.server = server
        self.name = name
        self.kind = kind
        self.deadline = deadline
        self.query = query
        self.used: _UdpSocket | None = None
        """The socket that waits for the response."""
        self.error: OSError | None = None
        """Why it could not be sent."""


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
        self.needs_probe = False
        """The breaker has just opened: the caller starts `probe`, and resets this."""
        self._began = began
        self._failures = 0
        self._failed_name: str | None = None
        """The name that the queries without an answer were about; None if they were about several."""
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
        return await self.finish(self.begin(name, kind, deadline))

    def begin(self, name: str, kind: int, deadline: float) -> Question:
        """Send a question without waiting; `finish` or `abandon` must follow.

        Raise ValueError for what is not a name of the DNS.
        """
        query = codec.encode_query(self._random.next(), name, kind, self._knows_edns)
        question = Question(self, name, kind, deadline, query)
        try:
            question.used = self._send(query, deadline)
        except OSError as exc:
            question.error = exc
        return question

    async def finish(self, question: Question) -> Response:
        """Return the response to a question, as `ask` does."""
        cause = "no answer"
        try:
            if question.used is None:
                raise question.error or OSError("not sent")
            used, question.used = question.used, None
            wire = await self._receive(used, question.query)
            rcode = wire[3] & 15
            response = None
            if rcode not in (codec.FORMERR, codec.NOTIMP):
                response = _decode(wire, question.query)
            if response is None:
                response = await self._ask_again(question.name, question.kind, rcode, question.deadline)
        except (TimeoutError, trio.TooSlowError):
            pass
        except OSError as exc:
            cause = exc.strerror or str(exc)
            if exc.errno in _OUR_ERRORS:
                raise NoResponseError(f"{self.text}: {cause}") from exc
        except codec.MalformedMessageError as exc:
            cause = f"unreadable answer: {exc}"
        else:
            self._failures = 0
            return response
        self._note_failure(question.name)
        raise NoResponseError(f"{self.text}: {cause}")

    def _note_failure(self, name: str) -> None:
        """Count a query without an answer. The silence of the servers of one name does not open the breaker."""
        self._failures += 1
        if self._failures == 1:
            self._failed_name = name
        elif self._failed_name != name:
            self._failed_name = None
        if self._failures >= FAILURES and self._failed_name is None and not self.is_open:
            self.is_open = self.needs_probe = True

    def abandon(self, question: Question) -> None:
        """Forget a question that was begun; nothing once it was finished."""
        used, question.used = question.used, None
        if used is not None:
            self._busy.discard(used)
            used.socket.close()

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
        return await self._receive(self._send(query, deadline), query)

    def _send(self, query: bytes, deadline: float) -> _UdpSocket:
        """Send a query by UDP. Raise OSError."""
        used = self._take()
        used.deadline = deadline
        if not self._busy:
            self._began()
        self._busy.add(used)
        try:
            # A full send buffer is like a lost datagram: the next server is asked.
            used.socket.send(query)
        except BaseException:
            self._busy.discard(used)
            used.socket.close()
            raise
        return used

    async def _receive(self, used: _UdpSocket, query: bytes) -> bytes:
        """Return the response to a query that was sent. Raise OSError."""
        sock = used.socket
        is_answered = False
        try:
            while True:
                if not used.is_expired:
                    await wait_readable(sock)
                try:
                    wire = sock.recv(_MAX_DATAGRAM)
                except BlockingIOError:
                    if used.is_expired:
                        break
                    continue  # a datagram with a wrong checksum
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
                raise OSError(errno.EMFILE, "too many questions at once")
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
