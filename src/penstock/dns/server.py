"""One recursive DNS server: queries over UDP and TCP, and a breaker.

Rules
-----
1. A response is believed only when it comes from the address of the server (the sockets are connected), to the port
   and with the id of the query, and repeats its question (RFC 5452). Ids are random, ports are chosen by the kernel;
   a few sockets share the queries, and each is replaced after a random number of them.
2. Anything else that arrives is ignored, and the query goes on waiting: an attacker must not be able to end it.
3. A truncated or unreadable response is asked for again by TCP (RFC 7766 5).
4. A server that has not answered FAILURES queries in a row is left out until it answers a probe. No query waits for
   that: the probe is a task of its own.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from typing import Final, NamedTuple

import outcome
import trio

from penstock.dns import _codec as codec

FAILURES: Final = 20
"""Queries without an answer, one after the other, that open the breaker."""
_SOCKETS: Final = 4
_MAX_WAITING: Final = 1024
"""Queries that wait on one socket; ids are drawn until one is free, so that they must stay sparse."""
_MAX_DATAGRAM: Final = 4096
_MAX_TURN: Final = 64
"""Datagrams read before other tasks run."""
_MAX_TCP: Final = 64
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


class _Waiting:
    """A query on its way."""

    __slots__ = ("query", "task")

    def __init__(self, query: bytes, task: trio.lowlevel.Task) -> None:
        self.query = query
        self.task = task


class _UdpSocket:
    """A connected UDP socket and the queries that wait for responses on it."""

    def __init__(self, family: int, address: tuple[str, int]) -> None:
        """Raise OSError."""
        self.waiting: dict[int, _Waiting] = {}
        self.remaining = 128 + secrets.randbelow(128)
        """Queries until the socket is replaced."""
        self.is_retired = False
        self._is_closed = False
        self._socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.connect(address)
        except BaseException:
            self._socket.close()
            raise

    async def exchange(self, name: str, kind: int, *, edns: bool) -> tuple[bytes, bytes]:
        """Send a query; return it and its response. Raise OSError, and ValueError for a name that is none."""
        ident = secrets.randbits(16)
        while ident in self.waiting:
            ident = secrets.randbits(16)
        query = codec.encode_query(ident, name, kind, edns)

        def abort(_: object) -> trio.lowlevel.Abort:
            del self.waiting[ident]  # a response that comes before this task runs must not reschedule it again
            return trio.lowlevel.Abort.SUCCEEDED

        self.waiting[ident] = _Waiting(query, trio.lowlevel.current_task())
        try:
            # A full send buffer is like a lost datagram: the next server is asked.
            self._socket.send(query)
            response: bytes = await trio.lowlevel.wait_task_rescheduled(abort)
        finally:
            self.waiting.pop(ident, None)
            if self.is_retired and not self.waiting:
                self.close()
        return query, response

    async def read(self) -> None:
        """Hand each response to the task that waits for it, until the socket is closed."""
        turn = 0
        while not self._is_closed:
            turn += 1
            if turn % _MAX_TURN == 0:
                await trio.lowlevel.checkpoint()
                continue
            try:
                wire = self._socket.recv(_MAX_DATAGRAM)
            except BlockingIOError:
                turn = 0
                try:
                    await trio.lowlevel.wait_readable(self._socket)
                except trio.ClosedResourceError:
                    return
                continue
            except OSError as exc:  # an ICMP error: no server listens there, or no route leads to it
                self._fail(exc)
                continue
            waiting = self.waiting.get(int.from_bytes(wire[:2], "big"))
            if waiting is not None and codec.is_response_to(wire, waiting.query):
                del self.waiting[int.from_bytes(wire[:2], "big")]
                trio.lowlevel.reschedule(waiting.task, outcome.Value(wire))

    def _fail(self, exc: OSError) -> None:
        for waiting in self.waiting.values():
            trio.lowlevel.reschedule(waiting.task, outcome.Error(exc))
        self.waiting = {}

    def retire(self) -> None:
        """Close the socket as soon as nothing waits on it."""
        self.is_retired = True
        if not self.waiting:
            self.close()

    def close(self) -> None:
        """Close the socket; queries that wait fail."""
        if not self._is_closed:
            self._is_closed = True
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
            self._fail(OSError("the resolver was closed"))


class Server:
    """A recursive server, asked by one trio loop."""

    def __init__(self, address: str, port: int, *, trust_ad: bool) -> None:
        """`trust_ad` says whether its AD bit counts although it is not on this machine."""
        found = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[0]
        self._family, self._address = found[0], found[4]
        self.text = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self.trust_ad = trust_ad or ipaddress.ip_address(address).is_loopback
        self.is_open = False
        """The breaker is open: the server is left out."""
        self._failures = 0
        self._knows_edns = True
        self._sockets: list[_UdpSocket | None] = [None] * _SOCKETS
        self._retired: list[_UdpSocket] = []
        self._is_closed = False
        self._tcp = trio.CapacityLimiter(_MAX_TCP)

    async def ask(self, nursery: trio.Nursery, name: str, kind: int, timeout: float) -> Response:  # noqa: ASYNC109 - it bounds two tries and TCP
        """Return the response to a question, whatever it says; `nursery` runs the readers of the sockets.

        Raise NoResponseError after `timeout` seconds at most, and ValueError for what is not a name of the DNS.
        """
        cause = "no answer"
        with trio.move_on_after(timeout):
            try:
                response = await self._ask(nursery, name, kind)
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

    async def probe(self, nursery: trio.Nursery, interval: float, timeout: float) -> None:  # noqa: ASYNC109 - of each probe
        """Ask for the root every `interval` seconds until the server answers, then close the breaker.

        The first probe is sent at once: the silence may have been that of the domains asked about.
        """
        while self.is_open:
            try:
                await self.ask(nursery, "", NS, timeout)
                self.is_open = False
            except NoResponseError:
                await trio.sleep(interval)

    async def _ask(self, nursery: trio.Nursery, name: str, kind: int) -> Response:
        query, wire = await self._pick(nursery).exchange(name, kind, edns=self._knows_edns)
        if wire[3] & 15 in (codec.FORMERR, codec.NOTIMP) and self._knows_edns:
            # RFC 6891 7: it does not know EDNS, or has no use for it.
            query, wire = await self._pick(nursery).exchange(name, kind, edns=False)
            self._knows_edns = wire[3] & 15 in (codec.FORMERR, codec.NOTIMP)
        try:
            response = Response._make(codec.decode_response(wire, query))
            if not response.truncated:
                return response
        except codec.MalformedMessageError:
            pass
        query = codec.encode_query(secrets.randbits(16), name, kind, self._knows_edns)
        async with self._tcp:
            wire = await self._exchange_tcp(query)
        response = Response._make(codec.decode_response(wire, query))
        if response.truncated:
            raise codec.MalformedMessageError("truncated by TCP")
        return response

    def _pick(self, nursery: trio.Nursery) -> _UdpSocket:
        """Return a socket with room. Raise OSError."""
        if self._is_closed:
            raise OSError("the resolver was closed")
        number = secrets.randbelow(_SOCKETS)
        found = self._sockets[number]
        if found is not None and found.remaining == 0:
            self._retired = [each for each in self._retired if each.waiting]
            self._retired.append(found)
            found.retire()
            found = None
        if found is None:
            found = self._sockets[number] = _UdpSocket(self._family, self._address)  # type: ignore[arg-type]
            nursery.start_soon(found.read)
        if len(found.waiting) >= _MAX_WAITING:
            raise OSError("too many questions at once")
        found.remaining -= 1
        return found

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
        for each in (*self._sockets, *self._retired):
            if each is not None:
                each.close()


async def _receive_exactly(stream: trio.SocketStream, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        data = await stream.receive_some(size - len(parts))
        if not data:
            raise OSError("the TCP connection ended early")
        parts += data
    return bytes(parts)
