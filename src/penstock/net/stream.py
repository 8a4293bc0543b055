"""A plaintext stream on a socket: a trio stream, with two short cuts for the hot path.

trio's own SocketStream receives into a new bytes object, and yields to the scheduler around each send. A session needs
neither: its wire has a buffer to receive into, and most replies fit into the socket's send buffer at once
(`send_nowait`). Everything else follows the contract of `trio.abc.HalfCloseableStream`, so that
`trio.SSLStream` can use it.

A stream waits in one of two ways. With the `Poller` of its worker the socket is registered once, and the task parks
until `watch_sockets` wakes it (the theory is at the top of ext/poller.pyx); without one, which is wherever there is no
epoll, it waits with `trio.lowlevel.wait_readable`. The tests run both.
"""

from __future__ import annotations

import socket
import ssl
from typing import Any, NoReturn

import trio
from trio.lowlevel import (
    Abort,
    RaiseCancelT,
    checkpoint,
    current_task,
    wait_readable,
    wait_task_rescheduled,
    wait_writable,
)

from penstock.net import _poller
from penstock.net._poller import Poller, Socket

_RECEIVE_OCTETS = 65_536


async def watch_sockets(poller: Poller) -> None:
    """Wake the tasks whose sockets become ready, until cancelled. Run one of these for each poller."""
    while True:
        await wait_readable(poller.fd)
        while poller.poll():
            await checkpoint()  # all tasks run, including those that were woken


class SocketStream(trio.abc.HalfCloseableStream):
    """A connected stream socket, TCP or unix. Takes the descriptor over, and closes it."""

    __slots__ = ("_is_receiving", "_is_sending", "_socket", "_watch", "has_cut_output", "is_in_handshake")

    def __init__(self, fd: int, poller: Poller | None = None) -> None:
        """Take over a non-blocking socket. Raise OSError when the poller cannot watch it."""
        self._socket = Socket(fd, poller)
        self._watch = self._socket.watch
        self._is_receiving = False
        self._is_sending = False
        self.has_cut_output = False
        """The last `send_now` was cut short: only part of its octets was sent."""
        self.is_in_handshake = False
        """trio.SSLStream makes a handshake on this stream, and yields: `receive_some` and `send_all` need not."""

    @classmethod
    def of(cls, sock: socket.socket, poller: Poller | None = None) -> SocketStream:
        """Return a stream that takes over a Python socket."""
        sock.setblocking(False)
        return cls(sock.detach(), poller)

    @property
    def has_poller(self) -> bool:
        """A poller watches this stream: a task in `run_protocol` sleeps, and can be interrupted."""
        return self._watch is not None

    @property
    def has_hung_up(self) -> bool:
        """The peer is known to have closed its side; without a poller that is found out by receiving only."""
        return self._watch is not None and self._watch.has_hung_up

    def set_option(self, level: int, name: int, value: int | bytes) -> None:
        """Set an option of the socket. Raise OSError, ClosedResourceError when it was closed here."""
        self._check_open()
        sock = socket.socket(fileno=self._socket.fd)
        try:
            sock.setsockopt(level, name, value)
        finally:
            sock.detach()

    # ---- waiting

    async def _wait_readable(self) -> None:
        watch = self._watch
        if watch is None:
            await wait_readable(self._socket.fd)
            return
        watch.reader = current_task()
        await wait_task_rescheduled(self._stop_reading)

    def _stop_reading(self, _: RaiseCancelT) -> Abort:
        assert self._watch is not None
        self._watch.reader = self._watch.protocol = None
        return Abort.SUCCEEDED

    async def _wait_writable(self) -> None:
        watch = self._watch
        if watch is None:
            await wait_writable(self._socket.fd)
        elif watch.is_writable:
            await checkpoint()
        else:
            assert self._socket.poller is not None
            self._socket.poller.look_for_room(watch)
            watch.writer = current_task()
            await wait_task_rescheduled(self._stop_writing)

    def _stop_writing(self, _: RaiseCancelT) -> Abort:
        assert self._watch is not None
        self._watch.writer = None
        return Abort.SUCCEEDED

    # ---- receiving

    async def run_turns(self, protocol: Any) -> int:
        """Let a protocol (penstock.net._poller) take turns until it leaves something to this task. Needs a poller.

        The task sleeps meanwhile. Return the octets received last, 0 at the end of the stream, and -1 when a turn
        without octets has ended the turns, the socket has not taken all of the output (`take_unsent`), or the wait was
        interrupted. Raise BrokenResourceError when the connection is lost, ClosedResourceError when it was closed here,
        and whatever a turn raises.
        """
        watch, poller = self._watch, self._socket.poller
        assert watch is not None and poller is not None
        if self._is_receiving:
            self._conflict("receiving")
        self._check_open()
        protocol.wants_turn = False
        if watch.is_readable:  # found before, and perhaps not all received: only the poller takes turns
            poller.look_again(watch)
        self._is_receiving = True
        watch.protocol = protocol
        watch.reader = current_task()
        try:
            received = int(await wait_task_rescheduled(self._stop_reading))
        except ssl.SSLError as exc:  # an OSError that a turn raises itself is not wrapped
            raise trio.BrokenResourceError(f"receiving failed: {exc}") from exc
        finally:
            self._is_receiving = False
        self._check_open()
        return received

    def take_unsent(self) -> bytes | None:
        """Return the output of the last turn that the socket has not taken, and forget it."""
        watch = self._watch
        assert watch is not None
        unsent, watch.unsent = watch.unsent, None
        return unsent

    async def run_protocol(self, protocol: Any) -> int:
        """Let a protocol take turns until it leaves something to this task, like `run_turns`; send what is unsent.

        Works without a poller, too. Return the octets received last, 0 at the end of the stream, -1 when a turn
        without octets has ended the turns or the wait was interrupted. Not for protocols that set `wants_turn`.
        """
        while True:
            if self._watch is None:
                received, output = await self._take_turn(protocol)
            else:
                received, output = await self.run_turns(protocol), self.take_unsent()
            if output is None:
                return received
            if output:
                await self.send_now(output)

    async def _take_turn(self, protocol: Any) -> tuple[int, bytes | None]:
        """Wait, receive and take a turn in this task, where no poller does: return the octets received and the output.

        The output is None when the turns have ended.
        """
        if self._is_receiving:
            self._conflict("receiving")
        self._check_open()
        self._is_receiving = True
        try:
            await self._wait_readable()
            self._check_open()
            received = protocol.recv(self._socket.fd)
        except OSError as exc:
            raise trio.BrokenResourceError(f"receiving failed: {exc}") from exc
        finally:
            self._is_receiving = False
        if received < 0:
            return received, b""
        return received, protocol.data_received(received) if received else None

    def interrupt(self) -> None:
        """End the wait of a task in `run_protocol`, with -1; do nothing where none sleeps there. Needs a poller."""
        self._socket.interrupt()

    def replace(self, fd: int) -> None:
        """Close the socket and continue with another one, while a task is in `run_protocol`. Needs a poller."""
        self._socket.replace(fd)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive up to `max_bytes` (65,536 by default); b"" is the end of the stream."""
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes is at least 1")
        self._check_open()
        if not self.is_in_handshake:
            await checkpoint()
        return await self.receive_now(max_bytes or _RECEIVE_OCTETS)

    async def receive_now(self, max_bytes: int) -> bytes:
        """Receive like `receive_some`, but without yielding when there is something to receive."""
        if self._is_receiving:
            self._conflict("receiving")
        self._is_receiving = True
        try:
            watch = self._watch
            while True:
                self._check_open()
                if watch is None or watch.is_readable:
                    data = _poller.recv(self._socket.fd, max_bytes)
                    if data is not None:
                        return data
                    if watch is not None:
                        watch.is_readable = False
                await self._wait_readable()
        except OSError as exc:
            raise trio.BrokenResourceError(f"receiving failed: {exc}") from exc
        finally:
            self._is_receiving = False

    # ---- sending

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """Send what the socket takes at once. Return how many octets that were, perhaps none.

        Raise BrokenResourceError when the connection is lost, ClosedResourceError when it was closed here.
        """
        if self._is_sending:
            self._conflict("sending")
        return self._socket.send_nowait(data)

    def send_and_close_nowait(self, data: bytes) -> int:
        """Send and close: both leave in one packet. Return how many octets were sent; fewer than all: it is open still.

        A lost connection counts as sent: there is no reader.
        """
        return self._socket.send_and_close_nowait(data)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it, waiting for the socket as long as it takes."""
        self._check_sendable()
        if not self.is_in_handshake:
            await checkpoint()
        await self.send_now(data)

    async def send_now(self, data: bytes | bytearray | memoryview) -> None:
        """Send like `send_all`, but without yielding when the socket takes everything."""
        if self._is_sending:
            self._conflict("sending")
        self._is_sending = True
        sent = 0
        try:
            sent = self._socket.send_nowait(data)
            while sent < len(data):
                await self._wait_writable()
                sent += self._socket.send_nowait(data, sent)
        finally:
            self._is_sending = False
            self.has_cut_output = sent < len(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the socket takes at least one octet."""
        if self._is_sending:
            self._conflict("sending")
        self._check_sendable()
        self._is_sending = True
        try:
            await self._wait_writable()
            self._check_sendable()
        finally:
            self._is_sending = False

    async def send_eof(self) -> None:
        """Send the end of the stream; the peer may still send."""
        if self._is_sending:
            self._conflict("sending")
        self._check_open()
        await checkpoint()
        if self._socket.eof_sent:
            return
        self._socket.eof_sent = True
        try:
            _poller.shutdown(self._socket.fd)
        except OSError as exc:
            raise trio.BrokenResourceError(f"the connection is lost: {exc}") from exc

    # ---- checks

    def _conflict(self, what: str) -> NoReturn:
        raise trio.BusyResourceError(f"another task is {what} on this stream")

    def _check_open(self) -> None:
        if self._socket.fd < 0:
            raise trio.ClosedResourceError("this stream was closed")

    def _check_sendable(self) -> None:
        self._check_open()
        if self._socket.eof_sent:
            raise trio.ClosedResourceError("the end of this stream was sent")

    # ---- closing

    def close_nowait(self) -> None:
        """Close the socket; a task that waits on it gets ClosedResourceError."""
        self._socket.close_nowait()

    async def aclose(self) -> None:
        """Close the socket, and yield once."""
        self.close_nowait()
        await checkpoint()


class AheadStream(trio.abc.Stream):
    """A stream with input that was read before, which is returned first."""

    def __init__(self, ahead: bytes, stream: trio.abc.Stream) -> None:
        self._ahead = ahead
        self._stream = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Return the input that was read before, then receive from the stream."""
        if not self._ahead:
            return await self._stream.receive_some(max_bytes)
        await checkpoint()
        size = len(self._ahead) if max_bytes is None else max_bytes
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send on the stream."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait on the stream."""
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Close the stream."""
        await self._stream.aclose()
