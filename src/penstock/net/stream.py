"""A plaintext stream on a socket of our own: a lawful trio stream, with two short cuts for the hot path.

trio's own SocketStream receives into a new bytes object, and yields to the scheduler around each send. A session needs
neither: its wire has a buffer to receive into (`fill`), and most replies fit into the socket's send buffer at once
(`send_nowait`). Everything else here keeps the contract of `trio.abc.HalfCloseableStream`, so that `trio.SSLStream`
can stand on it.
"""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Protocol

import trio


class Receiver(Protocol):
    """What `fill` receives into: the compiled wire."""

    def recv(self, fd: int, octets: int = ..., /) -> int:
        """Return the octets received, 0 at the end of the stream, -1 when there is nothing to receive."""


_RECEIVE_OCTETS = 65_536


class _OneAtATime:
    """Detects two tasks in one direction of a stream: a bug of the caller, not something to wait for."""

    def __init__(self, message: str) -> None:
        self._message = message
        self._held = False

    def __enter__(self) -> None:
        if self._held:
            raise trio.BusyResourceError(self._message)
        self._held = True

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._held = False


class SocketStream(trio.abc.HalfCloseableStream):
    """A connected stream socket, TCP or unix. Takes the socket over, and closes it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            # Replies leave in one send a batch: waiting for more of them (RFC 896) could only delay them.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._sending = _OneAtATime("another task is sending on this stream")
        self._receiving = _OneAtATime("another task is receiving on this stream")
        self._eof_sent = False

    def _check_open(self) -> None:
        if self._socket.fileno() < 0:
            raise trio.ClosedResourceError("this stream was closed")

    # ---- receiving

    async def fill(self, receiver: Receiver) -> int:
        """Wait for octets and receive them straight into a wire. Return how many; 0 is the end of the stream.

        Raise BrokenResourceError when the connection is lost, ClosedResourceError when it was closed here.
        """
        with self._receiving:
            while True:
                self._check_open()
                await trio.lowlevel.wait_readable(self._socket)
                try:
                    received = receiver.recv(self._socket.fileno())
                except OSError as exc:
                    raise trio.BrokenResourceError(f"receiving failed: {exc}") from exc
                if received >= 0:
                    return received

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive up to `max_bytes` (65,536 by default); b"" is the end of the stream."""
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes is at least 1")
        with self._receiving:
            self._check_open()
            await trio.lowlevel.checkpoint()
            while True:
                self._check_open()
                try:
                    return self._socket.recv(max_bytes or _RECEIVE_OCTETS)
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self._socket)
                except OSError as exc:
                    raise trio.BrokenResourceError(f"receiving failed: {exc}") from exc

    # ---- sending

    def send_nowait(self, data: bytes) -> int:
        """Send what the socket takes at once. Return how many octets that were, perhaps none.

        Raise BrokenResourceError when the connection is lost.
        """
        with self._sending:
            self._check_sendable()
            try:
                return self._socket.send(data)
            except BlockingIOError:
                return 0
            except OSError as exc:
                raise trio.BrokenResourceError(f"sending failed: {exc}") from exc

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it, waiting for the socket as long as it takes."""
        with self._sending:
            self._check_sendable()
            await trio.lowlevel.checkpoint()
            with memoryview(data) as view:
                sent = 0
                while sent < len(view):
                    self._check_sendable()
                    try:
                        sent += self._socket.send(view[sent:])
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(self._socket)
                    except OSError as exc:
                        raise trio.BrokenResourceError(f"sending failed: {exc}") from exc

    def _check_sendable(self) -> None:
        self._check_open()
        if self._eof_sent:
            raise trio.ClosedResourceError("the end of this stream was sent")

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the socket takes at least one octet."""
        with self._sending:
            self._check_sendable()
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.wait_writable(self._socket)

    async def send_eof(self) -> None:
        """Tell the peer that nothing more comes; it may still send."""
        with self._sending:
            self._check_open()
            await trio.lowlevel.checkpoint()
            if self._eof_sent:
                return
            self._eof_sent = True
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError as exc:
                raise trio.BrokenResourceError(f"the connection is lost: {exc}") from exc

    # ---- closing

    def close_nowait(self) -> None:
        """Close the socket; whoever waits on it gets ClosedResourceError."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    async def aclose(self) -> None:
        """Close the socket, and yield once."""
        self.close_nowait()
        await trio.lowlevel.checkpoint()


class AheadStream(trio.abc.Stream):
    """A stream some of whose input was read already: it comes first."""

    def __init__(self, ahead: bytes, stream: trio.abc.Stream) -> None:
        self._ahead = ahead
        self._stream = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Receive what was read ahead, then from the stream."""
        if not self._ahead:
            return await self._stream.receive_some(max_bytes)
        await trio.lowlevel.checkpoint()
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
