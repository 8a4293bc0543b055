"""Connections to mail filters: milters, rspamd, policy servers.

A connection is used by one dialog at a time and kept afterwards, if the filter keeps it: most cost more to open than to
use. The addresses of a filter are tried in turn; one that fails again and again is skipped for a while.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Final, TypeVar

import trio

from penstock.breaker import Breaker
from penstock.message import Body
from penstock.net.connect import connect_tcp, connect_unix
from penstock.net.stream import SocketStream
from penstock.policy.units import Address

_FAILURES: Final = 5
_PAUSE: Final = 30.0
_MOST_IDLE: Final = 32
"""Connections that are kept to one address."""
_IDLE_SECONDS: Final = 60.0
_MOST_BUSY: Final = 200
"""Dialogs with one filter at the same time; further ones wait for their turn."""
_MOST_LENT: Final = 200
"""Connections to one filter that clients have for as long as theirs lasts."""
_RECEIVE: Final = 16_384
"""Octets of a filter that are read before other tasks run."""
T = TypeVar("T")


class FilterError(Exception):
    """A filter is not available, takes too long, or does not follow its protocol."""


class StaleError(FilterError):
    """A kept connection was closed by the filter before it has answered anything: another one may be tried."""


class FilterConnection:
    """A connection to a filter."""

    def __init__(self, stream: SocketStream, address: Address) -> None:
        self._stream = stream
        self.address = address
        self.is_reused = False
        self.is_lent = False
        """Its dialog goes on after `FilterPool.lend`: `take_back` must follow."""
        self.has_answered = False
        """Something has come since the dialog began."""
        self.can_be_kept = False
        """Set at the end of a dialog, when another one may follow on this connection."""
        self.idle_since = 0.0
        self.state: object = None
        """What the protocol keeps about the connection."""
        self._octets = 0
        """Octets that were received since other tasks ran."""

    async def send(self, data: bytes) -> None:
        """Send octets. Raise FilterError."""
        try:
            sent = self._stream.send_nowait(data)
            if sent < len(data):
                await self._stream.send_all(memoryview(data)[sent:])
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise self._lost(exc) from exc

    async def receive(self) -> bytes:
        """Return the next octets. Raise FilterError, also at the end of the stream.

        A filter that sends without end must neither stop the other tasks nor miss its deadline, which takes a
        checkpoint to be noticed.
        """
        try:
            data = await self._stream.receive_now(_RECEIVE)
            self._octets += len(data)
            if self._octets >= _RECEIVE:
                self._octets = 0
                await trio.lowlevel.checkpoint()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise self._lost(exc) from exc
        if not data:
            raise self._lost(None)
        self.has_answered = True
        return bytes(data)

    def _lost(self, exc: Exception | None) -> FilterError:
        cause = f"connection lost: {exc.__cause__ or exc}" if exc is not None else "the filter closed the connection"
        return FilterError(cause) if self.has_answered or not self.is_reused else StaleError(cause)

    def close(self) -> None:
        """Close the connection, without a wait."""
        self._stream.close_nowait()


class FilterPool:
    """The addresses of one filter, and the connections that are kept to them."""

    def __init__(self, addresses: Sequence[Address], *, connect: float, deadline: float) -> None:
        """`connect` is the time for a connection, `deadline` that for a dialog; both in seconds."""
        self.addresses = tuple(addresses)
        self.reusable = set(addresses)
        """Those whose connections are kept."""
        self._connect_time = connect
        self._deadline = deadline
        self._idle: dict[Address, list[FilterConnection]] = {address: [] for address in addresses}
        self._breakers = {address: Breaker(_FAILURES, _PAUSE, _PAUSE) for address in addresses}
        self._places = trio.Semaphore(_MOST_BUSY)
        self._lent = 0

    async def talk(self, dialog: Callable[[FilterConnection], Awaitable[T]]) -> T:
        """Return the result of a dialog with the first address that works.

        The dialog changes nothing outside before it returns, so it may be begun again with another address. Raise
        FilterError if there is no result within the deadline.
        """
        cause = "not available"
        with trio.move_on_after(self._deadline):
            try:
                self._places.acquire_nowait()
            except trio.WouldBlock:
                await self._places.acquire()
            try:
                for address in self.addresses:
                    try:
                        return await self._talk(address, dialog)
                    except FilterError as exc:
                        cause = f"{address}: {exc}"
            finally:
                self._places.release()
            raise FilterError(cause)
        raise FilterError(f"no answer within {self._deadline:g} s")

    async def _talk(self, address: Address, dialog: Callable[[FilterConnection], Awaitable[T]]) -> T:
        breaker, now = self._breakers[address], trio.current_time()
        if breaker.blocks(now):
            raise FilterError("it has failed repeatedly and is not asked for a while")
        breaker.probe()
        is_decided = False
        try:
            while True:
                connection = self._take_idle(address, now) or await self.connect(address)
                connection.has_answered = connection.can_be_kept = False
                try:
                    result = await dialog(connection)
                except StaleError:
                    continue  # at most once for each kept connection
                finally:
                    if not connection.is_lent:
                        self._put_back(connection)
                is_decided = True
                if connection.is_lent:
                    breaker.abandon()  # the filter has not decided anything yet
                else:
                    breaker.succeeded()
                return result
        except FilterError:
            is_decided = True
            breaker.failed(trio.current_time())
            raise
        finally:
            if not is_decided:  # cancelled: by the deadline, or by the end of the server
                breaker.failed(trio.current_time())

    async def lend(self, dialog: Callable[[FilterConnection], Awaitable[T]]) -> T | None:
        """Return the result of the beginning of a dialog, which keeps its connection: `take_back` must follow.

        Return None if too many connections are lent. Raise FilterError as `talk` does; then nothing is lent. What
        comes of the dialog is to be reported with `note_success` and `note_failure`.
        """
        if self._lent >= _MOST_LENT:
            return None

        async def keep(connection: FilterConnection) -> T:
            result = await dialog(connection)
            connection.is_lent = True
            return result

        self._lent += 1  # before the first wait: others ask meanwhile
        try:
            return await self.talk(keep)
        except BaseException:
            self._lent -= 1
            raise

    def note_success(self, connection: FilterConnection) -> None:
        """Note that a lent connection has led to a decision."""
        self._breakers[connection.address].succeeded()

    def note_failure(self, connection: FilterConnection) -> None:
        """Note that the dialog on a lent connection has failed."""
        breaker, now = self._breakers[connection.address], trio.current_time()
        if not breaker.blocks(now):
            breaker.probe()
            breaker.failed(now)

    def take_back(self, connection: FilterConnection) -> None:
        """End a dialog that went on after `lend`."""
        self._lent -= 1
        connection.is_lent = False
        self._put_back(connection)

    def _put_back(self, connection: FilterConnection) -> None:
        """Keep a connection that is free, or close it."""
        idle = self._idle[connection.address]
        if connection.can_be_kept and connection.address in self.reusable and len(idle) < _MOST_IDLE:
            connection.is_reused = True
            connection.idle_since = trio.current_time()
            idle.append(connection)
        else:
            connection.close()

    def _take_idle(self, address: Address, now: float) -> FilterConnection | None:
        idle = self._idle[address]
        oldest = now - _IDLE_SECONDS
        while idle and idle[0].idle_since < oldest:
            idle.pop(0).close()
        return idle.pop() if idle else None

    async def connect(self, address: Address) -> FilterConnection:
        """Return a new connection. Raise FilterError."""
        try:
            with trio.move_on_after(self._connect_time):
                if address.path:
                    return FilterConnection(await connect_unix(address.path), address)
                return FilterConnection(await connect_tcp(address.host, address.port), address)
        except (OSError, socket.gaierror) as exc:
            raise FilterError(f"cannot connect: {exc}") from exc
        raise FilterError(f"no connection within {self._connect_time:g} s")

    def close(self) -> None:
        """Close all connections that are kept."""
        for idle in self._idle.values():
            while idle:
                idle.pop().close()


async def next_chunk(chunks: Iterator[bytes], body: Body) -> bytes | None:
    """Return the next chunk of a body, None at the end; one from a file is read in a thread."""
    if getattr(body, "in_memory", False):
        return next(chunks, None)
    return await trio.to_thread.run_sync(partial(next, chunks, None))
