"""`--workers N`: several processes that share one run.

Each process runs every N-th session and every N-th message of the schedule. Message numbers come from one counter, so
they have no gaps, however fast each process is. The parent adds up what the processes count (penstock.load.counts).

Parent and worker talk over a socket pair: JSON lines to the parent, single octets to the worker. A worker ends when the
parent is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from typing import IO, Any, Final

import msgspec
import trio

from penstock.load.counts import Counts, Interval
from penstock.load.generator import Generator
from penstock.load.plan import Plan, PlanError

_GO, _STOP, _ABORT = b"g", b"s", b"a"
_READ: Final = 65_536
_MAX_LINE: Final = 64 << 20
"""Octets of a line of a worker; a report has a fraction of a megabyte."""
_PATIENCE: Final = 5.0
"""Seconds that a worker has to end before it is killed."""


class WorkerError(Exception):
    """A worker process failed."""


class WorkerGroup:
    """A run of several processes. Made before trio runs, because it forks."""

    def __init__(self, plan: Plan) -> None:
        """Start the processes. Raise PlanError, OSError."""
        plan.check()
        self.plan = plan
        self.counts = Counts()
        self.warm_up: Counts | None = None
        self.open_sessions = 0
        self.accepted = 0
        """Accepted messages so far."""
        self.failed = 0
        self._intervals: dict[int, Interval] = {}
        """Seconds that not all workers have reported yet, by number."""
        self._reported = [0] * plan.workers
        """Seconds that each worker has reported."""
        self._running = set(range(plan.workers))
        self._ready = 0
        self._failure: BaseException | None = None
        counter = shared_counter()
        self._sockets: list[socket.socket] = []
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context("fork")
        try:
            for index in range(plan.workers):
                ours, theirs = socket.socketpair()
                own = replace(plan, worker=index)
                process = context.Process(target=_work, args=(own, theirs, counter.fileno(), [*self._sockets, ours]))
                self._sockets.append(ours)
                process.start()
                self._processes.append(process)
                theirs.close()
        except BaseException:
            self.close()
            raise
        finally:
            counter.close()

    def stop(self) -> None:
        """Start no more messages; those in flight may end."""
        self._tell(_STOP)

    def abort(self) -> None:
        """End the run now."""
        self._tell(_ABORT)

    def close(self) -> None:
        """Close the connections to the workers, which ends them, and wait for their processes."""
        for sock in self._sockets:
            sock.close()
        for process in self._processes:
            process.join(_PATIENCE)
            if process.exitcode is None:
                process.kill()
                process.join()

    def _tell(self, word: bytes) -> None:
        for sock in self._sockets:
            with suppress(OSError):  # it has ended
                sock.send(word)

    async def resolve(self) -> None:
        """Do nothing: each worker resolves the targets before it is ready."""
        await trio.lowlevel.checkpoint()

    async def run(self) -> Counts:
        """Run until all workers have ended, and return the sum of their counts. Raise PlanError, WorkerError."""
        async with trio.open_nursery() as nursery:
            for index, sock in enumerate(self._sockets):
                sock.setblocking(False)
                nursery.start_soon(self._follow, index, trio.socket.from_stdlib_socket(sock))
        if self._failure is not None:
            raise self._failure
        rest = [self._intervals[number] for number in sorted(self._intervals)]
        for interval in rest:
            self.counts.timeline.append(interval, is_last=interval is rest[-1])
        return self.counts

    async def _follow(self, index: int, sock: trio.socket.SocketType) -> None:
        """Take what a worker reports."""
        try:
            async for line in _lines(sock):
                self._take(index, msgspec.json.decode(line))
        except OSError:
            pass  # the same as its end
        if index in self._running:
            self._fail(WorkerError(f"worker {index} ended without a report"))

    def _take(self, index: int, message: dict[str, Any]) -> None:
        if message["kind"] == "ready":
            self._ready += 1
            if self._ready == self.plan.workers:
                self.counts = Counts()
                self._tell(_GO)
        elif message["kind"] == "interval":
            self._add(index, Interval.from_dict(message["interval"]))
        elif message["kind"] == "error":
            self._running.discard(index)
            self._fail(PlanError(message["text"]))
        else:
            self._end(index, message)

    def _add(self, index: int, interval: Interval) -> None:
        """Add a second of a worker; one that all running workers have reported goes to the timeline."""
        number = self._reported[index]
        self._reported[index] += 1
        self.accepted += interval.accepted
        self.failed += interval.failed
        counts = self.counts
        if number in self._intervals:
            self._intervals[number].add(interval)
        elif number >= len(counts.timeline.seconds):
            self._intervals[number] = interval
        self._complete()

    def _complete(self) -> None:
        behind = min((self._reported[index] for index in self._running), default=0)
        while self._intervals and (first := min(self._intervals)) < behind:
            interval = self._intervals.pop(first)
            self.counts.timeline.append(interval)
            self.open_sessions = interval.sessions

    def _end(self, index: int, message: dict[str, Any]) -> None:
        self._running.discard(index)
        self.counts.add(message["report"])
        if message["warm_up"] is not None:
            self.warm_up = self.warm_up or Counts()
            self.warm_up.add(message["warm_up"])
        self._add(index, Interval.from_dict(message["interval"]))

    def _fail(self, failure: BaseException) -> None:
        if self._failure is None:
            self._failure = failure
            self.abort()


async def _lines(sock: trio.socket.SocketType) -> AsyncIterator[bytes]:
    """Yield lines until the end of a stream. Raise OSError, ValueError for a line that is too long."""
    buffer = bytearray()
    while data := await sock.recv(_READ):
        buffer += data
        *lines, rest = bytes(buffer).split(b"\n") if b"\n" in data else (buffer,)
        for line in lines:
            yield line
        if lines:
            buffer = bytearray(rest)
        if len(buffer) > _MAX_LINE:
            raise ValueError("a worker sends a line that is too long")


# ---- in the worker


def _work(plan: Plan, sock: socket.socket, counter: int, others: Sequence[socket.socket]) -> None:
    """Be a worker: run a share of the plan and report to the parent."""
    for other in others:
        other.close()
    # A terminal sends ^C to all processes; the parent passes on what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    trio.run(_report_to, sock, plan, numbers(counter))


def shared_counter() -> IO[bytes]:
    """Return a file for `numbers()`. Raise OSError."""
    return tempfile.TemporaryFile()


def numbers(counter: int) -> Callable[[], int]:
    """Return a function that counts across all processes that inherited the descriptor of `shared_counter()`.

    They share the offset of one open file, to which lseek(2) adds atomically. That holds for a regular file only: Linux
    does not lock the offset of a memfd, and two processes would get the same number.
    """

    def following() -> int:
        return os.lseek(counter, 1, os.SEEK_CUR)

    return following


async def _report_to(sock: socket.socket, plan: Plan, number: Callable[[], int]) -> None:
    sock.setblocking(False)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def send(**message: Any) -> None:
        await stream.send_all(msgspec.json.encode(message) + b"\n")

    async def on_interval(interval: Interval) -> None:
        await send(kind="interval", interval=interval.to_dict())

    try:
        try:
            generator = Generator(plan, number=number, on_interval=on_interval)
            await generator.resolve()
        except (PlanError, OSError) as exc:
            await send(kind="error", text=str(exc))
            return
        await send(kind="ready")
        word = await stream.receive_some(1)
        if not word:
            return
        if word != _GO:
            generator.stop()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_obey, stream, generator)
            await generator.run()
            nursery.cancel_scope.cancel()
        interval, warm_up = generator.last_interval, generator.warm_up
        assert interval is not None
        await send(
            kind="end",
            report=generator.counts.as_report() | {"timeline": []},
            warm_up=None if warm_up is None else warm_up.as_report() | {"timeline": []},
            interval=interval.to_dict(),
        )
    except* trio.BrokenResourceError:
        sys.exit(1)  # the parent is gone


async def _obey(stream: trio.SocketStream, generator: Generator) -> None:
    """Stop or abort as the parent says; abort when it is gone."""
    with suppress(trio.BrokenResourceError):
        while words := await stream.receive_some(16):
            if _ABORT in words:
                break
            if _STOP in words:
                generator.stop()
    generator.abort()
