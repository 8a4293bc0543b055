"""Worker processes: start, watch, restart, drain, sum what they count.

Workers share nothing but the machine. The supervisor binds the listening sockets, a set for each worker (SO_REUSEPORT:
the kernel spreads the clients), and keeps them all open, so that clients who wait in the queue of a worker that died
are served by the one that takes its place. A worker is a process of its own, which inherits its set and one end of a
socket pair, its *line*:

- on it the worker says, a JSON object a line, that it is ready and what it has counted;
- when the supervisor dies, however that happens, the line ends, and the worker stops.

A worker that ends unasked is started again: at once when it had lived for a while, otherwise later and later, so that
a worker that can not live does not eat the machine. One that never became ready ends the supervisor: what keeps it
from starting keeps all of them.
"""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec
import trio

_LONG_LIFE: Final = 10.0
"""Seconds after which the end of a worker is no sign that the next would end at once."""
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 30.0
_MAX_LINE: Final = 16 << 20
"""Octets of a line: a report has some kilobytes."""

Report = dict[str, Any]


class WorkerError(Exception):
    """A worker did not become ready."""


class Launch(Protocol):
    """How a worker is started."""

    def __call__(self, index: int, line: int) -> tuple[Sequence[str], Sequence[int]]:
        """Return the command of worker `index` and the descriptors it inherits, `line` among them."""


@dataclass
class _Worker:
    index: int
    process: trio.Process | None = None
    is_ready: bool = False
    report: Report = field(default_factory=dict)
    """What it has counted, by its last word."""
    past: list[Report] = field(default_factory=list)
    """The last reports of those that had its place before."""


class Supervisor:
    """Keeps a number of workers running. `run` returns once all have ended after `stop`."""

    def __init__(
        self,
        launch: Launch,
        count: int,
        *,
        restarted: Callable[[int, int], None] | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        """`restarted` is told of each worker that ended unasked, with its exit code (negative: the signal)."""
        self._launch = launch
        self._workers = [_Worker(index) for index in range(count)]
        self._restarted = restarted
        self._clock = clock
        self._stop_wanted = trio.Event()
        self._all_ready = trio.Event()
        self.ready: list[Report] = []
        """What each worker said when it was ready, in no order."""
        self.restarts = 0
        """Workers that ended unasked and were started again."""

    @property
    def processes(self) -> list[int]:
        """The process ids of the workers that run, in the order of their index."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    def reports(self) -> Iterator[Report]:
        """Yield the last report of every worker there is and was."""
        for worker in self._workers:
            yield from worker.past
            if worker.report:
                yield worker.report

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start the workers and keep them; `started` when all are ready. Raise WorkerError when one does not start."""
        async with trio.open_nursery() as nursery:
            for worker in self._workers:
                nursery.start_soon(self._keep, worker)
            await self._all_ready.wait()
            task_status.started()

    def stop(self) -> None:
        """Ask all workers to stop gently. Asked again, they stop at once."""
        self._stop_wanted.set()
        for worker in self._workers:
            if worker.process is not None and worker.process.returncode is None:
                worker.process.send_signal(signal.SIGTERM)

    async def _keep(self, worker: _Worker) -> None:
        """Start a worker again and again."""
        pause = _FIRST_PAUSE
        while True:
            begun = self._clock()
            code = await self._live(worker)
            if self._stop_wanted.is_set():
                return
            if not self._all_ready.is_set():
                raise WorkerError(f"worker {worker.index} ended with code {code} before it was ready")
            if worker.report:
                worker.past.append(worker.report)
                worker.report = {}
            if self._restarted is not None:
                self._restarted(worker.index, code)
            self.restarts += 1
            if self._clock() - begun >= _LONG_LIFE:
                pause = _FIRST_PAUSE
            else:
                with trio.move_on_after(pause):
                    await self._stop_wanted.wait()
                    return
                pause = min(pause * 2, _LONGEST_PAUSE)

    async def _live(self, worker: _Worker) -> int:
        """Run a worker from its start to its end; return its exit code."""
        ours, theirs = socket.socketpair()
        with theirs:
            command, descriptors = self._launch(worker.index, theirs.fileno())
            process = await trio.lowlevel.open_process(
                command, stdin=subprocess.DEVNULL, pass_fds=tuple(descriptors), start_new_session=True
            )
        worker.process = process
        if self._stop_wanted.is_set():
            process.send_signal(signal.SIGTERM)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        try:
            async with stream:
                await self._listen(worker, stream)
            return await process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            with trio.CancelScope(shield=True):
                await process.wait()
            worker.process = None

    async def _listen(self, worker: _Worker, line: trio.SocketStream) -> None:
        """Take in what a worker says, up to its end."""
        buffer = b""
        try:
            while data := await line.receive_some(65_536):
                buffer += data
                *words, buffer = buffer.split(b"\n")
                for word in words:
                    self._heard(worker, msgspec.json.decode(word))
                if len(buffer) > _MAX_LINE:
                    raise WorkerError(f"worker {worker.index} says too much in one line")
        except trio.BrokenResourceError:
            return  # it was killed while it spoke

    def _heard(self, worker: _Worker, word: Report) -> None:
        if "ready" in word:
            self.ready.append(word["ready"])
            worker.is_ready = True
            if all(each.is_ready for each in self._workers):
                self._all_ready.set()
        if "report" in word:
            worker.report = word["report"]


class Line:
    """The worker's end: says words to the supervisor, and hears when that has died."""

    def __init__(self, descriptor: int) -> None:
        """Take over an inherited descriptor."""
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=descriptor)))
        self._lock = trio.Lock()

    async def say(self, **word: object) -> None:
        """Say `ready=...` or `report=...`. A supervisor that has died does not hear it."""
        async with self._lock:
            try:
                await self._stream.send_all(msgspec.json.encode(word) + b"\n")
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    async def wait_for_end(self) -> None:
        """Return when the supervisor has died."""
        try:
            while await self._stream.receive_some(1024):
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
