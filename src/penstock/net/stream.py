"""A plaintext stream on a socket of our own: a lawful trio stream, with two short cuts for the hot path.

trio's own SocketStream receives into a new bytes object, and yields to the scheduler around each send. A session needs
neither: its wire has a buffer to receive into (`fill`), and most replies fit into the socket's send buffer at once
(`send_nowait`). Everything else here keeps the contract of `trio.abc.HalfCloseableStream`, so that `trio.SSLStream`
can stand on it.

A stream waits in one of two ways. With the `Poller` of its worker the socket is registered once, and the task parks
until `watch_sockets` wakes it (the theory stands in ext/poll.pyx); without one, which is wherever there is no epoll, it
waits with `trio.lowlevel.wait_readable`. The tests run both.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

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
from penstock.net._poller import Poller, SocketCore, TurnsOfTask, Watch

if TYPE_CHECKING:
    from penstock.net._poller import Receiver

Turn = Callable[[int], bytes | None]
"""Answers the octets that came: what is to be sent, b"" for nothing, None when the task has to see to it itself."""
_RECEIVE_OCTETS = 65_536
_SHORT = 4096
"""A receive of fewer octets has emptied the socket: there always was room for as many."""
_TURNS = 16
"""Receives in a row that a socket gets without waiting, before the other sessions have their turn."""


async def watch_sockets(poller: Poller) -> None:
    """Wake the tasks whose sockets become ready, until cancelled. Run one of these for each poller."""
    while True:
        await wait_readable(poller.fd)
        while poller.poll():
            await checkpoint()  # the tasks that were woken have their turn, and so have all others


class SocketStream(SocketCore, trio.abc.HalfCloseableStream):
    """A connected stream socket, TCP or unix. Takes the descriptor over, and closes it.

    What does not wait is compiled: `SocketCore`.
    """

    __slots__ = ()

    @classmethod
    def of(cls, sock: socket.socket, poller: Poller | None = None) -> SocketStream:
        """Return a stream that takes over a Python socket."""
        sock.setblocking(False)
        return cls(sock.detach(), poller)

    # ---- waiting

    async def _wait_readable(self) -> None:
        watch = self._watch
        if watch is None:
            await wait_readable(self._fd)
            return
        watch.reader = current_task()
        await wait_task_rescheduled(self._stop_reading)

    def _stop_reading(self, _: RaiseCancelT) -> Abort:
        assert self._watch is not None
        self._watch.reader = self._watch.taker = None
        return Abort.SUCCEEDED

    async def _wait_writable(self) -> None:
        watch = self._watch
        if watch is None:
            await wait_writable(self._fd)
        elif watch.is_writable:
            await checkpoint()
        else:
            assert self._poller is not None
            self._poller.look_for_room(watch)
            watch.writer = current_task()
            await wait_task_rescheduled(self._stop_writing)

    def _stop_writing(self, _: RaiseCancelT) -> Abort:
        assert self._watch is not None
        self._watch.writer = None
        return Abort.SUCCEEDED

    # ---- receiving

    async def fill(self, receiver: Receiver) -> int:
        """Wait for octets and receive them straight into a wire. Return how many; 0 is the end of the stream.

        Yields at the latest every 16 calls. Raise BrokenResourceError when the connection is lost,
        ClosedResourceError when it was closed here.
        """
        if self._receiving:
            self._conflict("receiving")
        self._receiving = True
        try:
            while True:
                if self._watch is None or not self._watch.is_readable:
                    self._turns = 0
                    await self._wait_readable()
                elif self._turns >= _TURNS:
                    self._turns = 0
                    await checkpoint()
                received = self._fill_nowait(receiver)
                if received >= 0:
                    return received
        finally:
            self._receiving = False

    def _fill_nowait(self, receiver: Receiver) -> int:
        """Receive what there is; -1 for nothing."""
        self._check_open()
        self._turns += 1
        try:
            received = receiver.recv(self._fd)
        except OSError as exc:
            raise trio.BrokenResourceError(f"receiving failed: {exc}") from exc
        watch = self._watch
        if watch is not None and (received < 0 or (received < _SHORT and not watch.has_hung_up)):
            watch.is_readable = False
        return received

    async def attend(self, receiver: Receiver, turn: Turn) -> int:
        """Receive into a wire and let `turn` answer, again and again, until it returns None or the stream ends.

        With a poller this task sleeps meanwhile. Return the octets received last, 0 at the end of the stream, -1 when
        it was nudged or resumed. Raise what `fill` and `send_now` raise, and what the turn raises.
        """
        watch = self._watch
        answer: bytes | None
        while True:
            if watch is not None and watch.is_resumed:
                watch.is_resumed = False
                received, answer = -1, turn(0)
            elif watch is None or (watch.is_readable and not watch.is_held):
                if self._turns >= _TURNS:
                    self._turns = 0
                    await checkpoint()
                received = await self.fill(receiver) if watch is None else self._fill_nowait(receiver)
                if received < 0:
                    continue
                answer = turn(received) if received else None
            else:
                received = await self._sleep_through_turns(watch, receiver, turn)
                answer, watch.unsent = watch.unsent, None
            if answer is None:
                return received
            if answer:
                await self.send_now(answer)

    async def _sleep_through_turns(self, watch: Watch, receiver: Receiver, turn: Turn) -> int:
        """Leave the turns to the poller until it wakes this task. Return what `attend` does."""
        self._turns = 0
        if self._receiving:
            self._conflict("receiving")
        self._receiving = True
        watch.taker = TurnsOfTask(receiver, turn)
        watch.reader = current_task()
        try:
            received = int(await wait_task_rescheduled(self._stop_reading))
        except OSError as exc:
            raise trio.BrokenResourceError(f"receiving failed: {exc}") from exc
        finally:
            self._receiving = False
        self._check_open()
        return received

    async def run_protocol(self, protocol: Any) -> int:
        """Park this task while a protocol (the pump of a server connection) takes the turns.

        Return when a turn has left something to the task: 0 at the end of the stream, otherwise the octets received
        last, or -1; then `take_unsent` may have something to send. Raise BrokenResourceError when the connection is
        lost, and whatever a turn raises.
        """
        watch = self._watch
        if watch is None:
            raise RuntimeError("a protocol needs a stream on a poller")
        while watch.is_readable:
            if self._turns >= _TURNS:
                self._turns = 0
                await checkpoint()
            received = self._fill_nowait(protocol)
            if received < 0:
                continue
            output = protocol.turn(received) if received else None
            if output is None:
                return received
            if output:
                await self.send_now(output)
            if protocol.wants_turn:
                await checkpoint()
                return -1
        self._turns = 0
        if self._receiving:
            self._conflict("receiving")
        self._receiving = True
        protocol.wants_turn = False
        watch.taker = protocol
        watch.reader = current_task()
        try:
            received = int(await wait_task_rescheduled(self._stop_reading))
        except OSError as exc:
            raise trio.BrokenResourceError(f"receiving failed: {exc}") from exc
        finally:
            self._receiving = False
        self._check_open()
        return received

    def when_connected(self, connected: Callable[[], object]) -> None:
        """Have a function called once the connection is made, for a socket of which connect(2) said EINPROGRESS.

        For a stream on a poller. One that fails is readable instead. Raise OSError.
        """
        assert self._watch is not None
        assert self._poller is not None
        self._watch.connected = connected
        self._poller.look_for_room(self._watch)

    def take_unsent(self) -> bytes:
        """Return what the socket did not take of the last answer of a turn."""
        assert self._watch is not None
        unsent, self._watch.unsent = self._watch.unsent, None
        return unsent or b""

    @property
    def has_poller(self) -> bool:
        """A poller watches this stream, so that `run_protocol` can be used."""
        return self._watch is not None

    @property
    def can_be_nudged(self) -> bool:
        """A task in `attend` can be woken with `nudge`, and a turn can `hold` the stream."""
        return self._watch is not None

    @property
    def has_hung_up(self) -> bool:
        """The peer is known to have closed its side; without a poller that is found out by receiving only."""
        return self._watch is not None and self._watch.has_hung_up

    def set_option(self, level: int, name: int, value: int | bytes) -> None:
        """Set an option of the socket. Raise OSError, ClosedResourceError when it was closed here."""
        self._check_open()
        sock = socket.socket(fileno=self._fd)
        try:
            sock.setsockopt(level, name, value)
        finally:
            sock.detach()

    @property
    def is_held(self) -> bool:
        """A turn has held the stream, and it was not resumed."""
        return self._watch is not None and self._watch.is_held

    def resume(self) -> None:
        """Have a turn without octets taken soon, together with those of all that are resumed now, and receive again."""
        assert self._watch is not None
        assert self._poller is not None
        self._poller.resume(self._watch)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive up to `max_bytes` (65,536 by default); b"" is the end of the stream."""
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes is at least 1")
        self._check_open()
        await checkpoint()
        return await self.receive_now(max_bytes or _RECEIVE_OCTETS)

    async def receive_now(self, max_bytes: int) -> bytes:
        """Receive like `receive_some`, but without yielding when there is something to receive."""
        if self._receiving:
            self._conflict("receiving")
        self._receiving = True
        try:
            watch = self._watch
            while True:
                self._check_open()
                if watch is None or watch.is_readable:
                    data = _poller.recv(self._fd, max_bytes)
                    if data is not None:
                        return data
                    if watch is not None:
                        watch.is_readable = False
                await self._wait_readable()
        except OSError as exc:
            raise trio.BrokenResourceError(f"receiving failed: {exc}") from exc
        finally:
            self._receiving = False

    # ---- sending

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it, waiting for the socket as long as it takes."""
        self._check_sendable()
        await checkpoint()
        await self.send_now(data)

    async def send_now(self, data: bytes | bytearray | memoryview) -> None:
        """Send like `send_all`, but without yielding when the socket takes everything."""
        if self._sending:
            self._conflict("sending")
        self._sending = True
        try:
            sent = self._send(data, 0)
            while sent < len(data):
                await self._wait_writable()
                sent += self._send(data, sent)
        finally:
            self._sending = False

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the socket takes at least one octet."""
        if self._sending:
            self._conflict("sending")
        self._check_sendable()
        self._sending = True
        try:
            await self._wait_writable()
            self._check_sendable()
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """Tell the peer that nothing more comes; it may still send."""
        if self._sending:
            self._conflict("sending")
        self._check_open()
        await checkpoint()
        if self._eof_sent:
            return
        self._eof_sent = True
        try:
            _poller.shutdown(self._fd)
        except OSError as exc:
            raise trio.BrokenResourceError(f"the connection is lost: {exc}") from exc

    # ---- conduct

    def _conflict(self, what: str) -> NoReturn:
        raise trio.BusyResourceError(f"another task is {what} on this stream")

    def _check_open(self) -> None:
        if self._fd < 0:
            raise trio.ClosedResourceError("this stream was closed")

    def _check_sendable(self) -> None:
        self._check_open()
        if self._eof_sent:
            raise trio.ClosedResourceError("the end of this stream was sent")

    # ---- closing

    async def aclose(self) -> None:
        """Close the socket, and yield once."""
        self.close_nowait()
        await checkpoint()


class AheadStream(trio.abc.Stream):
    """A stream some of whose input was read already: it comes first."""

    def __init__(self, ahead: bytes, stream: trio.abc.Stream) -> None:
        self._ahead = ahead
        self._stream = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Receive what was read ahead, then from the stream."""
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
