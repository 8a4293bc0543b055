"""Worker processes of one command, such as `penstock sink --workers`: forked, followed, and ended with their parent.

A worker sends frames of msgpack to its parent over a socket pair. To the workers go numbers in memory that all share,
and an octet that says that one has changed. A worker ends when the parent is gone.
"""

from __future__ import annotations

import mmap
import multiprocessing
import multiprocessing.connection  # at the first use, it could not be read after a change of user
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Final, Generic, TypeVar

import msgspec
import trio

END: Final = 0
"""Place of the number that ends a worker: STOP or ABORT. Further numbers are those of the command."""
STOP, ABORT = 1, 2
_SIZE: Final = 4
"""Octets of the size before each frame."""
_MAX_FRAME: Final = 256 << 20
"""Octets of a frame: the sequence tags of a worker of a sink have at most 64 MiB."""
_READ: Final = 1 << 20
_PAUSE: Final = 0.1
"""Seconds after which a worker looks at the numbers: the octet may be lost."""
_PATIENCE: Final = 5.0
"""Seconds that a worker has to end before it is killed."""


class Frame(msgspec.Struct, omit_defaults=True):
    """What a worker tells the parent."""

    is_ready: bool = False
    is_last: bool = False
    """The worker has reported everything."""
    error: str = ""
    """Why it has failed."""
    is_usage: bool = False
    """The error is one of usage."""


F = TypeVar("F", bound=Frame)


class WorkerError(Exception):
    """A worker has failed."""

    def __init__(self, text: str, *, is_usage: bool = False) -> None:
        super().__init__(text)
        self.is_usage = is_usage


def shared_numbers(count: int) -> memoryview:
    """Return numbers of 64 bits, all 0, in memory that processes forked from this one share."""
    return memoryview(mmap.mmap(-1, count * 8)).cast("Q")


class WorkerLine:
    """The worker's end."""

    def __init__(self, sock: socket.socket, numbers: memoryview) -> None:
        """`numbers` are shared with the parent, which changes them."""
        self._socket = sock
        self._numbers = numbers
        self._seen = [0] * len(numbers)
        self._sending = trio.Lock()
        self._stream: trio.SocketStream | None = None
        self.commands: dict[int, Callable[[int], None]] = {}
        """What to do with a number that has changed, by its place."""

    async def tell(self, frame: Frame) -> bool:
        """Send a frame, even if cancelled meanwhile. Return False after the end of the line."""
        assert self._stream is not None
        with suppress(trio.BrokenResourceError), trio.CancelScope(shield=True):
            async with self._sending:  # one frame after the other
                await self._stream.send_all(_encoded(frame))
                return True
        return False

    def tell_at_end(self, frame: Frame) -> None:
        """Send a frame once the loop has ended."""
        self._socket.setblocking(True)
        with suppress(OSError):
            self._socket.sendall(_encoded(frame))

    def look(self) -> None:
        """Do what the parent wants."""
        for place, do in self.commands.items():
            number = self._numbers[place]
            if number != self._seen[place]:
                self._seen[place] = number
                do(number)

    async def follow(
        self, on_end: Callable[[], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Say that the worker is ready, then do what the parent wants until cancelled.

        If the parent has ended, call `on_end` and return. `tell` can be called once this has started.
        """
        self._socket.setblocking(False)
        # Never closed: other tasks may still tell something, and the last frame is sent after the loop.
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(self._socket))
        await self.tell(Frame(is_ready=True))
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_often)
            with suppress(trio.BrokenResourceError):
                while await self._stream.receive_some(16):
                    self.look()
            nursery.cancel_scope.cancel()
        on_end()

    async def _look_often(self) -> None:
        while True:
            self.look()
            await trio.sleep(_PAUSE)


def _encoded(frame: Frame) -> bytes:
    data = msgspec.msgpack.encode(frame)
    return len(data).to_bytes(_SIZE, "big") + data


class Workers(Generic[F]):
    """The parent's side."""

    def __init__(
        self, count: int, work: Callable[[int, WorkerLine], Frame], frame: type[F], *, numbers: int = 1
    ) -> None:
        """Start the workers, before trio runs, because that forks. Raise OSError.

        `work` is called in each with its number, and returns its last frame; all frames are of the type `frame`.
        """
        self.numbers = shared_numbers(numbers)
        self._frame = frame
        self._unready = set(range(count))
        self._running = set(range(count))
        self._failure: WorkerError | None = None
        self._sockets: list[socket.socket] = []
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context("fork")
        try:
            for index in range(count):
                ours, theirs = socket.socketpair()
                self._sockets.append(ours)
                line = WorkerLine(theirs, self.numbers)
                process = context.Process(target=_run_worker, args=(work, index, line, list(self._sockets)))
                process.start()
                self._processes.append(process)
                theirs.close()
        except BaseException:
            self.close()
            raise

    def tell(self, place: int, number: int) -> None:
        """Tell all workers that a number has changed. A slow one sees the last number once it can."""
        self.numbers[place] = number
        for sock in self._sockets:
            with suppress(OSError):  # it has ended, or has not looked yet
                sock.send(b"\n")

    def stop(self) -> None:
        """Stop gracefully."""
        self.tell(END, max(STOP, self.numbers[END]))

    def abort(self) -> None:
        """Stop without waiting for what is under way."""
        self.tell(END, ABORT)

    def close(self) -> None:
        """End the workers that still run, and wait for their processes."""
        self.stop()
        for sock in self._sockets:
            sock.close()
        for process in self._processes:
            process.join(_PATIENCE)
            if process.exitcode is None:
                process.kill()
                process.join()

    async def follow(self, take: Callable[[int, F], None], on_ready: Callable[[], None]) -> None:
        """Follow the workers until all have ended. Raise WorkerError if one has failed: that ends the others.

        `on_ready` is called when all are ready, `take` with the number of a worker and a frame.
        """
        async with trio.open_nursery() as nursery:
            for index, sock in enumerate(self._sockets):
                sock.setblocking(False)
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock.dup()))
                nursery.start_soon(self._follow, index, stream, take, on_ready)
        if self._failure is not None:
            raise self._failure

    async def _follow(
        self, index: int, stream: trio.SocketStream, take: Callable[[int, F], None], on_ready: Callable[[], None]
    ) -> None:
        with suppress(trio.BrokenResourceError):  # the same as its end
            async for frame in frames(stream, self._frame):
                if frame.is_ready:
                    self._unready.discard(index)
                    if not self._unready:
                        on_ready()
                if frame.is_last or frame.error:
                    self._running.discard(index)
                if frame.error:
                    self._fail(WorkerError(frame.error, is_usage=frame.is_usage))
                elif not frame.is_ready:
                    take(index, frame)
        if index in self._running:
            self._fail(WorkerError(f"worker {index} ended without a report"))

    def _fail(self, failure: WorkerError) -> None:
        if self._failure is None:
            self._failure = failure
            self.abort()


async def frames(stream: trio.SocketStream, kind: type[F]) -> AsyncIterator[F]:
    """Yield frames until the end of a stream. Raise BrokenResourceError for one that is too large or no frame."""
    decoder = msgspec.msgpack.Decoder(kind)
    buffer = bytearray()
    async with stream:
        while data := await stream.receive_some(_READ):
            buffer += data
            while len(buffer) >= _SIZE:
                size = int.from_bytes(buffer[:_SIZE], "big")
                if size > _MAX_FRAME:
                    raise trio.BrokenResourceError("a worker sends a frame that is too large")
                if len(buffer) < _SIZE + size:
                    break
                frame = bytes(memoryview(buffer)[_SIZE : _SIZE + size])
                del buffer[: _SIZE + size]
                try:
                    decoded = decoder.decode(frame)
                except msgspec.DecodeError as exc:
                    raise trio.BrokenResourceError("a worker sends what is no frame") from exc
                yield decoded


def _run_worker(
    work: Callable[[int, WorkerLine], Frame], index: int, line: WorkerLine, others: Sequence[socket.socket]
) -> None:
    """Be a worker."""
    for other in others:
        other.close()
    line.tell_at_end(work(index, line))
