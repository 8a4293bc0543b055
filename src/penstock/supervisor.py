"""Worker processes: start, watch, start again, stop.

Workers share nothing but the machine: each has its listening sockets, its part of the spool, its relay. There is a set
of sockets for each worker (SO_REUSEPORT: the kernel spreads the clients), and the supervisor keeps them all open, so
that clients who wait in the queue of a worker that died are served by the one that takes its place. A worker is a
process of its own, which inherits its set and one end of a socket pair, its *line*:

- on it the worker says that it is ready;
- when the supervisor dies, however that happens, the line ends, and the worker stops.

A worker that ends unasked is started again: at once when it had lived for a while, otherwise later and later, so that
a worker that cannot live does not eat the machine. One that never became ready ends the supervisor: what keeps it
from starting keeps all of them.
"""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import trio

_LONG_LIFE: Final = 10.0
"""Seconds after which the end of a worker is no sign that the next would end at once."""
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 30.0
_READY: Final = b"ready\n"


class WorkerError(Exception):
    """A worker did not become ready."""


class Launch(Protocol):
    """How a worker is started."""

    def __call__(self, index: int, line: int) -> tuple[Sequence[str], Sequence[int]]:
        """Return the command of worker `index` and the descriptors it inherits, `line` among them."""


class _Worker:
    """A place for a worker, and the process that has it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.process: trio.Process | None = None
        self.is_ready = False


class Supervisor:
    """Keeps workers running. `run` returns once all have ended after `stop`."""

    def __init__(
        self,
        launch: Launch,
        indexes: Sequence[int],
        *,
        restarted: Callable[[int, int], None] | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        """Keep a worker for each index. `restarted` is told of each that ended unasked, and its exit code.

        A code that is negative is the signal that ended it.
        """
        self._launch = launch
        self._workers = [_Worker(index) for index in indexes]
        self._restarted = restarted
        self._clock = clock
        self._stop_wanted = trio.Event()
        self._all_ready = trio.Event()

    @property
    def processes(self) -> dict[int, int]:
        """The process ids of the workers that are ready, by their index."""
        return {each.index: each.process.pid for each in self._workers if each.process is not None and each.is_ready}

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
        self._all_ready.set()  # nobody is waited for any more
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
            if self._restarted is not None:
                self._restarted(worker.index, code)
            if self._clock() - begun >= _LONG_LIFE:
                pause = _FIRST_PAUSE
                continue
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
        try:
            async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as line:
                await self._listen(worker, line)
            return await process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            with trio.CancelScope(shield=True):
                await process.wait()
            worker.process = None
            worker.is_ready = False

    async def _listen(self, worker: _Worker, line: trio.SocketStream) -> None:
        """Wait for the end of a line, and hear when the worker is ready."""
        try:
            while await line.receive_some(len(_READY)):
                worker.is_ready = True
                if all(each.is_ready for each in self._workers):
                    self._all_ready.set()
        except trio.BrokenResourceError:
            return  # it was killed


class Line:
    """The worker's end: says that it is ready, and hears when the supervisor has died."""

    def __init__(self, descriptor: int) -> None:
        """Take over an inherited descriptor."""
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=descriptor)))

    async def ready(self) -> None:
        """Say so. A supervisor that has died does not hear it."""
        try:
            await self._stream.send_all(_READY)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    async def wait_for_end(self) -> None:
        """Return when the supervisor has died."""
        try:
            while await self._stream.receive_some(1024):
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
