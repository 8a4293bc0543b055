"""`penstock sink --workers N`: several processes on the same address, and one report of all of them.

The parent binds the sockets, forks the workers, and adds up what they report (penstock.sink.merging). They talk over a
socket pair: frames of msgpack to the parent, single octets to the worker. A worker ends when the parent is gone.
"""

from __future__ import annotations

import multiprocessing
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Final

import click
import msgspec
import trio

from penstock.app import Server, bind_listener
from penstock.cli.running import innermost, survive_signals
from penstock.config import ConfigError, Settings, check
from penstock.net.listen import close_listener, name_of, share
from penstock.sink.merging import Second, WorkerReport

_STOP, _ABORT = b"s", b"a"
_SIZE: Final = 4
"""Octets of the size before each frame."""
_MAX_FRAME: Final = 256 << 20
"""Octets of a frame: the bitmaps of the sequence tags of a worker have at most 64 MiB."""
_READ: Final = 1 << 20
_PAUSE: Final = 0.1
"""Seconds between two reports of progress."""
_PATIENCE: Final = 5.0
"""Seconds that a worker has to end before it is killed."""

Sockets = Sequence[Sequence[socket.socket]]
"""The listening sockets of each listener."""


class Progress(msgspec.Struct, array_like=True):
    """How far a worker is."""

    messages: int
    sessions: int
    open: int


class Frame(msgspec.Struct, omit_defaults=True):
    """What a worker tells the parent."""

    is_ready: bool = False
    progress: Progress | None = None
    second: Second | None = None
    report: WorkerReport | None = None
    error: str = ""
    is_usage: bool = False
    """The error is one of usage."""


class WorkerLine:
    """The worker's end."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._stream: trio.SocketStream | None = None

    async def tell(self, frame: Frame) -> None:
        """Send a frame. A parent that has died does not hear it."""
        assert self._stream is not None
        with suppress(trio.BrokenResourceError):
            await self._stream.send_all(_encoded(frame))

    def tell_at_end(self, frame: Frame) -> None:
        """Send a frame once the loop has ended."""
        self._socket.setblocking(True)
        with suppress(OSError):
            self._socket.sendall(_encoded(frame))

    async def follow(self, server: Server, progress: Callable[[Server], Progress]) -> None:
        """Say that the server is ready, then report its progress, and stop it as the parent says, until cancelled."""
        self._socket.setblocking(False)
        copy = self._socket.dup()  # the stream closes its socket, and the last frame is sent after it
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(copy))
        async with self._stream, trio.open_nursery() as nursery:
            await self.tell(Frame(is_ready=True))
            nursery.start_soon(self._report_progress, server, progress)
            with suppress(trio.BrokenResourceError):
                while words := await self._stream.receive_some(16):
                    if _ABORT in words:
                        break
                    server.stop()
            server.abort()

    async def _report_progress(self, server: Server, progress: Callable[[Server], Progress]) -> None:
        last: Progress | None = None
        while True:
            now = progress(server)
            if now != last:
                await self.tell(Frame(progress=now))
                last = now
            await trio.sleep(_PAUSE)


def _encoded(frame: Frame) -> bytes:
    data = msgspec.msgpack.encode(frame)
    return len(data).to_bytes(_SIZE, "big") + data


Work = Callable[[Sockets, WorkerLine], WorkerReport]
"""Runs a sink on the sockets until it is stopped. Raises click.ClickException."""


class SinkWorkers:
    """The parent's side."""

    def __init__(self, settings: Settings, count: int, work: Work, *, allow_open: bool) -> None:
        """Bind the sockets and start the workers, before trio runs, because that forks. Raise click.ClickException."""
        try:
            check(settings, allow_open=allow_open)
            self._sets = [share(bind_listener(listener), count) for listener in settings.listener]
        except ConfigError as exc:
            raise click.UsageError(str(exc)) from exc
        except OSError as exc:
            raise click.ClickException(str(exc)) from exc
        self.addresses = [name_of(sock) for each in self._sets for sock in each[0]]
        """The addresses it listens on."""
        self._progress = dict.fromkeys(range(count), Progress(0, 0, 0))
        self._running = set(range(count))
        self._unready = set(range(count))
        self._failure: click.ClickException | None = None
        self._lines: list[socket.socket] = []
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context("fork")
        try:
            for index in range(count):
                ours, theirs = socket.socketpair()
                self._lines.append(ours)
                sockets = [each[index] for each in self._sets]
                process = context.Process(target=_run_worker, args=(work, sockets, theirs, list(self._lines)))
                process.start()
                self._processes.append(process)
                theirs.close()
        except BaseException:
            self.close()
            raise

    @property
    def progress(self) -> Progress:
        """How far all workers together are."""
        found = self._progress.values()
        return Progress(
            sum(each.messages for each in found), sum(each.sessions for each in found), sum(each.open for each in found)
        )

    def stop(self) -> None:
        """Stop gracefully: nobody waits in a queue from which no worker takes any more."""
        for sock in {sock for each in self._sets for part in each for sock in part}:
            close_listener(sock)
        self._tell(_STOP)

    def abort(self) -> None:
        """Stop without waiting for messages that are being received."""
        self._tell(_ABORT)

    def close(self) -> None:
        """End the workers that still run, and wait for their processes."""
        self.stop()
        for line in self._lines:
            line.close()
        for process in self._processes:
            process.join(_PATIENCE)
            if process.exitcode is None:
                process.kill()
                process.join()

    def _tell(self, word: bytes) -> None:
        for line in self._lines:
            with suppress(OSError):  # it has ended
                line.send(word)

    def run(
        self,
        announce: Callable[[], None],
        take: Callable[[int, Second | WorkerReport], None],
        is_done: Callable[[Progress], bool],
        *,
        beside: Callable[[], Awaitable[None]],
    ) -> None:
        """Run until a signal, until `is_done`, or until a worker has failed. Raise click.ClickException then.

        `announce` is called when all workers are ready, `take` with what each of them has counted; `beside` runs in
        the same loop until all have ended.
        """
        survive_signals()
        try:
            trio.run(self._run, announce, take, is_done, beside)
        except* OSError as group:
            raise click.ClickException(innermost(group)) from group
        finally:
            self.close()
        if self._failure is not None:
            raise self._failure

    async def _run(
        self,
        announce: Callable[[], None],
        take: Callable[[int, Second | WorkerReport], None],
        is_done: Callable[[Progress], bool],
        beside: Callable[[], Awaitable[None]],
    ) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._stop_on_signals)
            nursery.start_soon(beside)
            async with trio.open_nursery() as followers:
                for index, line in enumerate(self._lines):
                    line.setblocking(False)
                    stream = trio.SocketStream(trio.socket.from_stdlib_socket(line.dup()))
                    followers.start_soon(self._follow, index, stream, announce, take, is_done)
            nursery.cancel_scope.cancel()

    async def _follow(
        self,
        index: int,
        stream: trio.SocketStream,
        announce: Callable[[], None],
        take: Callable[[int, Second | WorkerReport], None],
        is_done: Callable[[Progress], bool],
    ) -> None:
        with suppress(trio.BrokenResourceError):  # the same as its end
            async for frame in _frames(stream):
                if frame.is_ready:
                    self._unready.discard(index)
                    if not self._unready:
                        announce()
                if frame.progress is not None:
                    self._progress[index] = frame.progress
                    if is_done(self.progress):
                        self.stop()
                if frame.second is not None:
                    take(index, frame.second)
                if frame.report is not None:
                    self._running.discard(index)
                    take(index, frame.report)
                if frame.error:
                    self._running.discard(index)
                    self._fail(click.UsageError(frame.error) if frame.is_usage else click.ClickException(frame.error))
        if index in self._running:
            self._fail(click.ClickException(f"worker {index} ended without a report"))

    def _fail(self, failure: click.ClickException) -> None:
        if self._failure is None:
            self._failure = failure
            self.abort()

    async def _stop_on_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            is_first = True
            async for _ in signals:
                if is_first:
                    self.stop()
                else:
                    self.abort()
                is_first = False


async def _frames(stream: trio.SocketStream) -> AsyncIterator[Frame]:
    """Yield frames until the end of a stream. Raise BrokenResourceError for a frame that is too large."""
    decoder = msgspec.msgpack.Decoder(Frame)
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
                yield decoder.decode(frame)


# ---- in the worker


def _run_worker(work: Work, sockets: Sockets, sock: socket.socket, others: Sequence[socket.socket]) -> None:
    """Be a worker: run a sink and report to the parent."""
    for other in others:
        other.close()
    line = WorkerLine(sock)
    try:
        frame = Frame(report=work(sockets, line))
    except click.ClickException as exc:
        frame = Frame(error=exc.message, is_usage=isinstance(exc, click.UsageError))
    line.tell_at_end(frame)
