"""A client of NATS: one connection to one of several servers, requests, and subscriptions.

What is sent within one turn of the loop is one system call. A request waits for its answer without a scope or a task of
its own; requests and answers are compiled (penstock.net.natswire).

Rules
-----
1. A request ends: with the answer, `NoRespondersError`, `RequestTimeoutError`, or `DisconnectedError` when its
   connection was lost. Whether the server has acted on a request that failed is then unknown: requests that are
   repeated must be idempotent.
2. What waits is bounded, in requests and octets; beyond that, `OverloadedError` at once.
3. A connection on which nothing comes for two intervals of PING is closed: a server that hangs looks like one that
   is slow.
4. A server in lame duck mode is left before it closes: the next server gets what is new, the old one answers what it
   was asked.
5. Subscriptions are made again on each new connection. What was published in between is lost (core NATS is at most
   once); a subscriber that does not keep up loses messages, too, and can see how many (`Subscription.dropped`).
"""

from __future__ import annotations

import itertools
import os
import random
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import msgspec
import trio
from trio.lowlevel import current_task, wait_task_rescheduled

from penstock.net.natswire import (
    Answer,
    DisconnectedError,
    Done,
    Info,
    Message,
    NatsError,
    Nkey,
    NoRespondersError,
    OverloadedError,
    Parser,
    ProtocolError,
    Requests,
    RequestTimeoutError,
    decode_info,
)

__all__ = [
    "DisconnectedError",
    "Message",
    "NatsClient",
    "NatsError",
    "Nkey",
    "NoRespondersError",
    "OverloadedError",
    "RequestTimeoutError",
]

_PORT: Final = 4222
_RECEIVE_OCTETS: Final = 256 * 1024
_OPENING: Final = 3.0
"""Seconds to connect to a server, with TLS and authentication."""
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0
"""Seconds between two rounds over all servers."""
_SHORT_LIFE: Final = 5.0
"""Seconds that a connection has at least, unless something is wrong with its server."""
_PING_INTERVAL: Final = 2.0
_SWEEP: Final = 0.1
"""Seconds between two looks for requests that have waited too long."""
_DRAINING: Final = 10.0
"""Seconds for which a server in lame duck mode may answer what it was asked."""
_MAX_SERVERS: Final = 100


class ServerAddress(NamedTuple):
    """A server to connect to."""

    host: str
    port: int
    is_tls: bool = False
    tls_name: str = ""
    """The name its certificate is for, if that is not the host."""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, url: str) -> ServerAddress:
        """Parse nats://host:4222 or tls://host:4222. Raise ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in ("nats", "tls") or not parts.hostname or parts.path.strip("/") or parts.username:
            raise ValueError(f"{url!r} is not the URL of a server; expected nats://host:4222 or tls://host:4222")
        return cls(parts.hostname, parts.port or _PORT, parts.scheme == "tls")


class Credentials(NamedTuple):
    """How the client authenticates: with a password, an nkey, or neither."""

    user: str = ""
    password: str = ""
    nkey: Nkey | None = None


class Request(NamedTuple):
    """A request for `NatsClient.request_many`."""

    subject: str
    data: bytes = b""
    headers: bytes = b""


class Subscription:
    """Messages of a subject, for one task. Iterate over it, or call `receive` or `receive_all`."""

    def __init__(self, subject: str, sid: bytes, limit: int) -> None:
        self.subject = subject
        self.sid = sid
        self.dropped = 0
        """Messages that came while `limit` were waiting already."""
        self._limit = limit
        self._waiting: deque[Message] = deque()
        self._has_some = trio.Event()

    def deliver(self, message: Message) -> None:
        """Take a message from the connection."""
        if len(self._waiting) >= self._limit:
            self.dropped += 1
            return
        self._waiting.append(message)
        if not self._has_some.is_set():
            self._has_some.set()

    async def receive(self) -> Message:
        """Return the next message."""
        while not self._waiting:
            self._has_some = trio.Event()
            await self._has_some.wait()
        return self._waiting.popleft()

    async def receive_all(self) -> Sequence[Message]:
        """Return all messages that wait, at least one. A wake-up for each would cost more than the message."""
        found = deque([await self.receive()])
        found += self._waiting
        self._waiting.clear()
        return found

    async def __aiter__(self) -> AsyncIterator[Message]:
        while True:
            yield await self.receive()


class _Connection:
    """A connection to a server, after CONNECT. Tasks write, read and watch it; requests are plain calls."""

    def __init__(self, client: NatsClient, address: ServerAddress, stream: trio.abc.Stream, info: Info) -> None:
        self.address = address
        self.info = info
        self.left = trio.Event()
        """Set when the client should use another connection: it is lost, or the server leaves."""
        self.reason = "the connection was lost"
        inbox = f"_INBOX.{os.urandom(12).hex()}."
        self.requests = Requests(inbox, most_waiting=client.most_waiting, most_octets=client.most_octets)
        self._client = client
        self._stream = stream
        self._parser = Parser(self, self.requests)
        self.requests.now = trio.current_time() + _SWEEP
        self.has_output = False
        """Something was sent since `_write` has taken what is to be sent."""
        self._wake_writer = trio.Event()
        self._pongs: list[trio.Event] = []
        self._is_alive = True
        """Something was received since the last PING of `_watch`."""
        self.send(f"SUB {inbox}* 1\r\n".encode())

    # ---- sending

    def send(self, data: bytes) -> None:
        """Have octets sent at the end of this turn of the loop."""
        self.requests.send(data)
        self.flush()

    def flush(self) -> None:
        """Send what was added to the requests, at the end of this turn of the loop."""
        if not self.has_output:
            self.has_output = True
            self._wake_writer.set()

    def publish(self, subject: str, reply: str, headers: bytes, data: bytes) -> None:
        """Send a message without waiting for anything. Raise OverloadedError."""
        if self.requests.is_behind:
            raise OverloadedError(f"{self.address} does not read fast enough")
        self.requests.publish(subject, reply, headers, data)
        self.flush()

    def ping(self) -> trio.Event:
        """Send a PING; the event is set at its PONG, or when the connection is lost."""
        event = trio.Event()
        self._pongs.append(event)
        self.send(b"PING\r\n")
        return event

    # ---- the receiver of the parser

    def on_message(self, sid: bytes, subject: bytes, reply: bytes, headers: bytes, data: bytes) -> None:
        """Hand a message to its subscription. Servers do not verify that subjects are UTF-8."""
        # A constructor in Python would cost a microsecond.
        message = tuple.__new__(
            Message, (subject.decode("utf-8", "replace"), reply.decode("utf-8", "replace"), headers, data)
        )
        self._client.deliver(sid, message)

    def on_info(self, info: Info) -> None:
        """Learn of other servers, and of the end of this one."""
        self.info = info
        self._client.learn(info, self.address)
        if info.ldm:
            self.reason = "the server is shutting down"
            self.left.set()

    def on_ping(self) -> None:
        """Answer."""
        self.send(b"PONG\r\n")

    def on_pong(self) -> None:
        """Wake the one who has waited for longest."""
        if self._pongs:
            self._pongs.pop(0).set()

    def on_error(self, text: str) -> None:
        """Keep an error; the server closes the connection if it is fatal."""
        self.reason = text

    # ---- tasks

    async def run(self) -> None:
        """Serve the connection until it is lost, or its server has answered everything before its end."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._read, nursery.cancel_scope)
                nursery.start_soon(self._sweep)
                nursery.start_soon(self._watch, nursery.cancel_scope)
                await self.left.wait()
                with trio.move_on_after(_DRAINING):
                    while len(self.requests):  # noqa: ASYNC110 - it has no event, which each request would cost
                        await trio.sleep(_SWEEP)
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as group:
            self.reason = self.reason or str(group.exceptions[0])
        finally:
            self.left.set()
            self._client.lost(self)
            self._fail_all()
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._stream)

    def _fail_all(self) -> None:
        self.requests.end_all(DisconnectedError(f"{self.address}: {self.reason}"))
        for event in self._pongs:
            event.set()

    async def _write(self) -> None:
        while True:
            await self._wake_writer.wait()
            self._wake_writer = trio.Event()
            self.has_output = False
            unsent = self.requests.unsent
            await self._stream.send_all(self.requests.take_output())
            self.requests.unsent -= unsent

    async def _read(self, scope: trio.CancelScope) -> None:
        while True:
            data = await self._stream.receive_some(_RECEIVE_OCTETS)
            if not data:
                break
            self._is_alive = True
            try:
                self._parser.feed(bytes(data))
            except ProtocolError as exc:
                self.reason = str(exc)
                break
        scope.cancel()

    async def _sweep(self) -> None:
        """End requests that have waited too long."""
        while True:
            await trio.sleep(_SWEEP)
            now = trio.current_time()
            self.requests.end_late(now, str(self.address))
            self.requests.now = now + _SWEEP

    async def _watch(self, scope: trio.CancelScope) -> None:
        """Give the connection up when nothing comes any more."""
        self._is_alive = True
        silent = 0
        while silent < 2:
            if not self._is_alive:
                silent += 1
            else:
                silent = 0
            self._is_alive = False
            self.ping()
            await trio.sleep(_PING_INTERVAL)
        self.reason = "the server does not answer"
        scope.cancel()


class NatsClient:
    """A connection to one of several servers that is made again whenever it is lost. Called in the trio thread."""

    def __init__(
        self,
        servers: Sequence[ServerAddress],
        *,
        name: str = "penstock",
        credentials: Credentials = Credentials(),  # noqa: B008 - immutable
        tls: ssl.SSLContext | None = None,
        most_waiting: int = 20_000,
        most_octets: int = 64 << 20,
    ) -> None:
        """`tls` is used for servers with tls:// and for those that demand it.

        At most `most_waiting` requests of `most_octets` octets wait for answers.
        """
        self.most_waiting = most_waiting
        self.most_octets = most_octets
        self.on_change: Callable[[str, str], None] = _ignore
        """Gets the address of a server and "" when it is connected, or the reason when a connection was lost."""
        self.connections = 0
        """Connections made so far."""
        self._configured = list(servers)
        self._servers = list(servers)
        random.shuffle(self._servers)
        self._name = name
        self._credentials = credentials
        self._tls = tls
        self._current: _Connection | None = None
        self._connected = trio.Event()
        self._last_error = "not connected yet"
        self._subscriptions: dict[bytes, Subscription] = {}
        self._sids = itertools.count(2)

    # ---- the connection

    @property
    def is_connected(self) -> bool:
        """There is a connection."""
        return self._current is not None

    @property
    def info(self) -> Info:
        """The INFO of the connected server. Raise DisconnectedError."""
        return self._connection().info

    @property
    def max_payload(self) -> int:
        """Octets of a payload that the connected server takes; 1 MiB, as most do, without a connection."""
        return 1 << 20 if self._current is None else self._current.info.max_payload

    async def wait_connected(self) -> None:
        """Return once there is a connection."""
        while self._current is None:
            await self._connected.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a connection until cancelled. `started` at once: whether there is a server shows later."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            pause = _FIRST_PAUSE
            while True:
                connection = await self._connect()
                self._adopt(connection)
                began = trio.current_time()
                nursery.start_soon(self._serve, connection)
                await connection.left.wait()
                # A server that lets us in and drops us at once is not asked again without a pause.
                pause = min(pause * 2, _LONGEST_PAUSE) if trio.current_time() - began < _SHORT_LIFE else _FIRST_PAUSE
                await _pause(pause)

    async def _serve(self, connection: _Connection) -> None:
        self.on_change(str(connection.address), "")
        await connection.run()
        self.on_change(str(connection.address), connection.reason)

    def lost(self, connection: _Connection) -> None:
        """Use a connection no more. Called by the connection, before its requests fail."""
        self._last_error = f"{connection.address}: {connection.reason}"
        if self._current is connection:
            self._current = None
            self._connected = trio.Event()

    def _adopt(self, connection: _Connection) -> None:
        """Use a connection from now on; the subscriptions move to it."""
        before, self._current = self._current, connection
        self.connections += 1
        for sid, each in self._subscriptions.items():
            if before is not None:
                before.send(b"UNSUB %s\r\n" % sid)
            connection.send(b"SUB %s %s\r\n" % (each.subject.encode(), sid))
        self._connected.set()

    async def _connect(self) -> _Connection:
        """Connect to whichever server lets us, trying them in turn."""
        pause = _FIRST_PAUSE
        while True:
            for address in list(self._servers):
                # The one that is left, or does not answer, is tried last.
                self._servers.remove(address)
                self._servers.append(address)
                try:
                    with trio.fail_after(_OPENING):
                        return await self._open(address)
                except (OSError, trio.BrokenResourceError, ProtocolError, trio.TooSlowError, ssl.SSLError) as exc:
                    cause: BaseException = exc.__cause__ or exc
                    while isinstance(cause, BaseExceptionGroup):
                        cause = cause.exceptions[0]
                    self._last_error = f"{address}: {str(cause) or type(cause).__name__}"
            self.on_change("", self._last_error)
            await _pause(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
            self._servers = [*dict.fromkeys([*self._servers, *self._configured])]

    async def _open(self, address: ServerAddress) -> _Connection:
        """Connect to a server, with TLS and authentication. Raise what `_connect` catches."""
        stream: trio.abc.Stream = await trio.open_tcp_stream(address.host, address.port)
        try:
            info = await _read_info(stream)
            if address.is_tls or info.tls_required:
                stream = await self._start_tls(stream, address)
            await stream.send_all(self._hello(info))
            await self._wait_for_pong(stream)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)
            raise
        self.learn(info, address)
        return _Connection(self, address, stream, info)

    async def _start_tls(self, stream: trio.abc.Stream, address: ServerAddress) -> trio.abc.Stream:
        if self._tls is None:
            raise ProtocolError("the server demands TLS; use tls://")
        secured = trio.SSLStream(stream, self._tls, server_hostname=address.tls_name or address.host)
        await secured.do_handshake()
        return secured

    def _hello(self, info: Info) -> bytes:
        """Return CONNECT, and a PING whose PONG confirms that the server accepts us."""
        credentials = self._credentials
        hello: dict[str, object] = {
            "verbose": False,
            "pedantic": False,
            "name": self._name,
            "lang": "penstock",
            "version": "1",
            "protocol": 1,  # INFO may come at any time
            "headers": True,
            "no_responders": True,
        }
        if credentials.nkey is not None:
            hello |= {"nkey": credentials.nkey.public, "sig": credentials.nkey.sign(info.nonce)}
        elif credentials.user:
            hello |= {"user": credentials.user, "pass": credentials.password}
        return b"CONNECT %s\r\nPING\r\n" % msgspec.json.encode(hello)

    async def _wait_for_pong(self, stream: trio.abc.Stream) -> None:
        rest = b""
        while True:
            line, rest = await _read_line(stream, rest)
            if line.startswith(b"-ERR"):
                raise ProtocolError(line[4:].strip(b" '").decode("utf-8", "replace"))
            if line == b"PONG":
                return

    def learn(self, info: Info, source: ServerAddress) -> None:
        """Add the servers that a server knows of."""
        known = {(each.host, each.port) for each in self._servers}
        for url in info.connect_urls:
            try:
                found = ServerAddress.parse(f"nats://{url}")
            except ValueError:
                continue
            if (found.host, found.port) not in known and len(self._servers) < _MAX_SERVERS:
                # Servers announce addresses; their certificates have names, as that of the one that knows them.
                self._servers.append(found._replace(is_tls=source.is_tls, tls_name=source.tls_name or source.host))

    # ---- requests

    def _connection(self) -> _Connection:
        if self._current is None:
            raise DisconnectedError(self._last_error)
        return self._current

    async def request(self, subject: str, data: bytes = b"", headers: bytes = b"", *, timeout: float) -> Message:  # noqa: ASYNC109 - a scope costs more than the request
        """Send a request and return the answer. Raise NatsError (see the rules above)."""
        connection = self._current
        if connection is None:
            raise DisconnectedError(self._last_error)
        requests = connection.requests
        answer = Answer(requests, current_task())
        answer.number = requests.add(subject, data, headers, answer, requests.now + timeout)
        if not connection.has_output:
            connection.flush()
        return await wait_task_rescheduled(answer.abort)  # type: ignore[no-any-return]

    async def request_many(self, requests: Sequence[Request], *, timeout: float) -> list[Message | NatsError]:  # noqa: ASYNC109
        """Send requests at once and return the answer to each, or the error."""
        await trio.lowlevel.checkpoint_if_cancelled()
        answers: list[Message | NatsError] = [DisconnectedError(self._last_error)] * len(requests)
        left = 0
        over = trio.Event()
        numbers: list[int] = []
        connection = self._current

        def done_at(place: int) -> Done:
            def done(found: Message | NatsError) -> None:
                nonlocal left
                answers[place] = found
                left -= 1
                if not left:
                    over.set()

            return done

        for place, request in enumerate(requests):
            if connection is None:
                break
            try:
                deadline = connection.requests.now + timeout
                numbers.append(connection.requests.add(*request, done_at(place), deadline))
                left += 1
            except OverloadedError as exc:
                answers[place] = exc
        try:
            if connection is not None and left:
                connection.flush()
                await over.wait()
        finally:
            if connection is not None:
                for number in numbers:
                    connection.requests.forget(number)
        return answers

    def publish(self, subject: str, data: bytes = b"", headers: bytes = b"", *, reply: str = "") -> None:
        """Send a message without waiting for anything. Raise DisconnectedError or OverloadedError."""
        self._connection().publish(subject, reply, headers, data)

    async def flush(self, *, timeout: float) -> None:  # noqa: ASYNC109 - as in `request`
        """Return once the server has handled what was sent. Raise DisconnectedError or RequestTimeoutError."""
        connection = self._connection()
        event = connection.ping()
        with trio.move_on_after(timeout) as scope:
            await event.wait()
        if scope.cancelled_caught:
            raise RequestTimeoutError(f"{connection.address} did not answer in time")
        if connection.left.is_set() and self._current is not connection:
            raise DisconnectedError(self._last_error)

    # ---- subscriptions

    @asynccontextmanager
    async def subscribed(self, subject: str, *, limit: int = 1000) -> AsyncIterator[Subscription]:
        """Subscribe to a subject for the length of an `async with`; at most `limit` messages wait."""
        subscription = Subscription(subject, b"%d" % next(self._sids), limit)
        self._subscriptions[subscription.sid] = subscription
        if self._current is not None:
            self._current.send(b"SUB %s %s\r\n" % (subject.encode(), subscription.sid))
        try:
            yield subscription
        finally:
            del self._subscriptions[subscription.sid]
            if self._current is not None:
                self._current.send(b"UNSUB %s\r\n" % subscription.sid)

    def deliver(self, sid: bytes, message: Message) -> None:
        """Hand a message to its subscription. Called by the connection."""
        subscription = self._subscriptions.get(sid)
        if subscription is not None:
            subscription.deliver(message)


async def _read_info(stream: trio.abc.Stream) -> Info:
    """Return the INFO that a server sends first. Nothing comes after it before the client has sent something."""
    greeting, rest = await _read_line(stream, b"")
    verb, _, data = greeting.partition(b" ")
    if verb != b"INFO" or rest:
        raise ProtocolError(f"expected INFO, got {greeting[:60]!r}")
    return decode_info(data)


async def _read_line(stream: trio.abc.Stream, rest: bytes) -> tuple[bytes, bytes]:
    """Return a line and the octets after it."""
    buffer = bytearray(rest)
    while (end := buffer.find(b"\r\n")) < 0:
        if len(buffer) > 1 << 20:
            raise ProtocolError("the server sent a line without an end")
        data = await stream.receive_some(65_536)
        if not data:
            raise ProtocolError("the server has closed the connection")
        buffer += data
    return bytes(buffer[:end]), bytes(buffer[end + 2 :])


async def _pause(seconds: float) -> None:
    await trio.sleep(seconds * random.uniform(0.5, 1.0))  # noqa: S311 - it spreads load


def _ignore(_address: str, _reason: str) -> None:
    """The default of `on_change`."""
