"""Worker processes: start, watch, start again, replace, stop.

Workers share nothing but the machine: each has its listening sockets, its part of the spool, its relay. There is a set
of sockets for each worker (SO_REUSEPORT: the kernel spreads the clients), and the supervisor keeps them all open, so
that clients who wait in the queue of a worker that died are served by the one that takes its place. A worker is a
process of its own, which inherits its set and one end of a channel (penstock.control). The life of a worker:

    started    imports, loads policies, makes its parts: "prepared"
    prepared   waits for "begin": the process before it in the same place has ended by then
    begun      opens its part of the spool, accepts clients: "ready"
    ready      says "alive" from its loop, and answers requests
    ended      by SIGTERM, by an error, or because the channel has ended: the supervisor has died

A worker that ends unasked is started again: at once when it had lived for a while, otherwise later and later, so that
a worker that cannot live does not use up the machine. If one never becomes ready at the start of the supervisor, that
ends: what keeps one from starting keeps all of them.

`roll` replaces workers one after the other. A new one must be prepared before the old one is asked to end; when it
fails before that, nothing has happened. When it fails later, the place gets a worker of the old kind again. In both
cases the roll stops, and the other workers go on as they are.

A worker that says nothing for `watchdog` seconds hangs: it is ended with SIGABRT, which writes the stacks of its
threads to standard error, and then with SIGKILL.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

import trio

from penstock.control import LONGEST_ANSWER, Channel, ControlError

_LONG_LIFE: Final = 10.0
"""Seconds after which the end of a worker is no sign that the next would end at once."""
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 30.0
_PREPARE: Final = 120.0
"""Seconds that a worker of a roll has to be prepared."""
_BEGIN: Final = 600.0
"""Seconds that it has to be ready from then on: the opening of a large spool after a crash takes a while."""
_LAST_WORDS: Final = 1.0
"""Seconds between SIGABRT and SIGKILL."""

RestartReason = Literal["exit", "signal", "watchdog"]


class WorkerError(Exception):
    """A worker did not become ready."""


class Command(NamedTuple):
    """How to start a process."""

    words: Sequence[str]
    descriptors: Sequence[int]
    """Those that it inherits."""
    ended: Callable[[], None] | None = None
    """Called once the process has ended."""


class Launch(Protocol):
    """How a worker is started."""

    def __call__(self, index: int, line: int) -> AbstractContextManager[Command]:
        """Yield how to start worker `index`; `line` is its end of the channel. Everything is closed afterwards."""


class WorkerProcess:
    """A process, from its start to its end."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.since = time.time()
        """Unix time of its start."""
        self.process: trio.Process | None = None
        self.channel: Channel | None = None
        self.connected = trio.Event()
        """There is a channel, or there will be none."""
        self.prepared = trio.Event()
        self.may_begin = trio.Event()
        self.ready = trio.Event()
        self.ended = trio.Event()
        self.code = 0
        """Its exit code; negative: the signal that ended it."""
        self.silence = 0.0
        """Seconds since it has said that it is alive, of those in which the supervisor has run itself."""
        self.has_hung = False

    @property
    def pid(self) -> int:
        """Its process id; 0 before the start."""
        return 0 if self.process is None else self.process.pid

    @property
    def is_ready(self) -> bool:
        """It serves clients."""
        return self.ready.is_set() and not self.ended.is_set()

    @property
    def reason(self) -> RestartReason:
        """Why it has ended."""
        return "watchdog" if self.has_hung else "signal" if self.code < 0 else "exit"

    @property
    def is_stopped(self) -> bool:
        """A signal has stopped it, as a debugger does: it gets no other signal but SIGKILL."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except (OSError, IndexError):
            return False

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)

    async def ask(self, verb: str, *, seconds: float = 10.0, **arguments: Any) -> Any:
        """Ask it something (penstock.control.Channel.ask). Raise ControlError."""
        with trio.move_on_after(seconds):
            await self.connected.wait()
        if self.channel is None or self.ended.is_set():
            raise ControlError(f"worker {self.index} is not running")
        try:
            return await self.channel.ask(verb, seconds=seconds, **arguments)
        except ControlError as exc:
            with trio.move_on_after(_LAST_WORDS):  # if it has closed the channel, it is about to end
                await self.ended.wait()
            raise ControlError(f"worker {self.index}: {exc}") from None


class _Place:
    """A place for a worker, and the process that has it."""

    def __init__(self, index: int, launch: Launch) -> None:
        self.index = index
        self.launch = launch
        self.worker: WorkerProcess | None = None
        self.successor: WorkerProcess | None = None
        self.is_leaving = False
        self.changed = trio.Event()
        """Set when a pause between two processes has to end."""
        self.left = trio.Event()
        self.restarts = 0


class Supervisor:
    """Keeps workers running. `run` returns once all have ended after `stop`."""

    def __init__(
        self,
        launch: Launch,
        indexes: Sequence[int],
        *,
        watchdog: float = 0.0,
        patience: float = 120.0,
        restarted: Callable[[WorkerProcess], None] | None = None,
        notice: Callable[[int, str, dict[str, Any]], None] | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        """Keep a worker for each index. `restarted` is called with each that ended unasked.

        `notice` is called with the index, verb and arguments of what workers report themselves. With a `watchdog` of 0
        seconds, hanging workers are not noticed. Workers have `patience` seconds to end; then they are killed.
        """
        self.watchdog = watchdog
        self.patience = patience
        self._places = {index: _Place(index, launch) for index in indexes}
        self._restarted = restarted
        self._notice = notice
        self._clock = clock
        self._nursery: trio.Nursery | None = None
        self._living: set[WorkerProcess] = set()
        self._stop_wanted = trio.Event()
        self._all_ready = trio.Event()

    # ---- what others see

    @property
    def workers(self) -> list[WorkerProcess]:
        """The processes that have a place, by their index. Between two of them, a place has none."""
        places = sorted(self._places.values(), key=lambda place: place.index)
        return [place.worker for place in places if place.worker is not None and not place.worker.ended.is_set()]

    @property
    def living(self) -> list[WorkerProcess]:
        """All processes that have not ended, also those that are to take a place."""
        return list(self._living)

    @property
    def processes(self) -> dict[int, int]:
        """The process ids of the workers that are ready, by their index."""
        return {worker.index: worker.pid for worker in self.workers if worker.is_ready}

    @property
    def places(self) -> int:
        """How many workers there are to be."""
        return len(self._places)

    def restarts(self, index: int) -> int:
        """Return how often the worker of a place was started again."""
        place = self._places.get(index)
        return 0 if place is None else place.restarts

    # ---- start and stop

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start the workers and keep them; `started` when all are ready. Raise WorkerError when one does not start."""
        async with trio.open_nursery() as watching:
            watching.start_soon(self._watch)
            async with trio.open_nursery() as self._nursery:
                for place in self._places.values():
                    self._nursery.start_soon(self._keep, place)
                await self._all_ready.wait()
                task_status.started()
                await self._stop_wanted.wait()
                watching.start_soon(self._end_late)
            watching.cancel_scope.cancel()

    def stop(self) -> None:
        """Ask all workers to stop gently. Asked again, they stop at once."""
        self._stop_wanted.set()
        self._all_ready.set()  # nothing waits for the workers to be ready any more
        for worker in self._living:
            worker.send_signal(signal.SIGTERM)

    async def _end_late(self) -> None:
        """Kill the workers that do not stop: stopped by a debugger, or waiting for a disk that hangs."""
        await trio.sleep(self.patience)
        for worker in self._living:
            worker.send_signal(signal.SIGKILL)

    # ---- replacing

    async def roll(self, launch: Launch, indexes: Sequence[int]) -> None:
        """Replace all workers, one after the other; then there is one for each index.

        Raise WorkerError when a new one does not become ready: the places before it have new workers then, its own and
        those after it the old ones. Not to be called before `run` has started, nor twice at the same time.
        """
        known = [index for index in indexes if index in self._places]
        # New places first: their sockets are open already, and no client should wait for the replacements.
        for index in indexes:
            await self.add(launch, index)
        for index in known:
            await self._replace(self._places[index], launch)
        for place in [place for index, place in self._places.items() if index not in indexes]:
            place.is_leaving = True
            place.changed.set()
            if place.worker is not None:
                place.worker.send_signal(signal.SIGTERM)
            await place.left.wait()

    async def add(self, launch: Launch, index: int) -> None:
        """Start a worker more, unless there is one for the index. Raise WorkerError when it does not become ready."""
        if index not in self._places:
            await self._add(_Place(index, launch))

    async def _add(self, place: _Place) -> None:
        assert self._nursery is not None
        self._places[place.index] = place
        self._nursery.start_soon(self._keep, place)
        while place.worker is None and not place.left.is_set():
            await trio.lowlevel.checkpoint()
        worker = place.worker
        if worker is not None:
            with trio.move_on_after(_PREPARE + _BEGIN):
                await _first(worker.ready, worker.ended, self._stop_wanted)
        if worker is None or not worker.is_ready:
            place.is_leaving = True
            place.changed.set()
            if worker is not None:
                worker.send_signal(signal.SIGKILL)
            del self._places[place.index]
            raise self._failure(place.index, worker)

    async def _replace(self, place: _Place, launch: Launch) -> None:
        successor = self._spawn(place.index, launch)
        with trio.move_on_after(_PREPARE):
            await _first(successor.prepared, successor.ended, self._stop_wanted)
        if not successor.prepared.is_set() or successor.ended.is_set() or self._stop_wanted.is_set():
            successor.send_signal(signal.SIGKILL)
            raise self._failure(place.index, successor)
        if place.successor is not None:  # the worker before hangs, and was to be replaced anyway
            place.successor.send_signal(signal.SIGKILL)
        old, place.successor = place.worker, successor
        place.changed.set()
        if old is not None:
            old.send_signal(signal.SIGTERM)
            with trio.move_on_after(self.patience):
                await old.ended.wait()
            old.send_signal(signal.SIGKILL)  # one that waits for a disk that hangs would block all later reloads
            await old.ended.wait()
        with trio.move_on_after(_BEGIN):
            await _first(successor.ready, successor.ended, self._stop_wanted)
        if not successor.is_ready:
            successor.send_signal(signal.SIGKILL)
            raise self._failure(place.index, successor)
        place.launch = launch  # only now: after a failure, the place gets a worker of the old kind

    def _failure(self, index: int, worker: WorkerProcess | None) -> WorkerError:
        if self._stop_wanted.is_set():
            return WorkerError("the server stops")
        if worker is None or not worker.ended.is_set():
            return WorkerError(f"the new worker {index} was not ready in time")
        return WorkerError(f"the new worker {index} ended with code {worker.code} before it was ready")

    # ---- a place

    async def _keep(self, place: _Place) -> None:
        """Give a place one process after the other."""
        pause = _FIRST_PAUSE
        worker = self._spawn(place.index, place.launch)
        try:
            while True:
                place.worker = worker
                worker.may_begin.set()
                begun = self._clock()
                await worker.ended.wait()
                if self._stop_wanted.is_set() or place.is_leaving:
                    return
                if place.successor is None or worker.has_hung:
                    self._note_end(place, worker)
                if place.successor is None:
                    if self._clock() - begun >= _LONG_LIFE:
                        pause = _FIRST_PAUSE
                    else:
                        place.changed = trio.Event()
                        with trio.move_on_after(pause):
                            await _first(self._stop_wanted, place.changed)
                        pause = min(pause * 2, _LONGEST_PAUSE)
                if self._stop_wanted.is_set() or place.is_leaving:
                    return
                worker, place.successor = place.successor or self._spawn(place.index, place.launch), None
        finally:
            place.left.set()
            if place.is_leaving:
                self._places.pop(place.index, None)

    def _note_end(self, place: _Place, worker: WorkerProcess) -> None:
        """Note that a worker has ended unasked. Raise WorkerError during the start."""
        if not self._all_ready.is_set():
            raise WorkerError(f"worker {worker.index} ended with code {worker.code} before it was ready")
        place.restarts += 1
        if self._restarted is not None:
            self._restarted(worker)

    # ---- a process

    def _spawn(self, index: int, launch: Launch) -> WorkerProcess:
        """Start a process; it does not begin before `may_begin`."""
        assert self._nursery is not None
        worker = WorkerProcess(index)
        self._living.add(worker)
        self._nursery.start_soon(self._live, worker, launch)
        return worker

    async def _live(self, worker: WorkerProcess, launch: Launch) -> None:
        """Run a process from its start to its end."""
        ours, theirs = socket.socketpair()
        note_end: Callable[[], None] | None = None
        try:
            with ours, theirs, launch(worker.index, theirs.fileno()) as command:
                worker.process = process = await trio.lowlevel.open_process(
                    command.words,
                    stdin=subprocess.DEVNULL,
                    pass_fds=tuple(command.descriptors),
                    start_new_session=True,
                )
                note_end = command.ended
                line = ours.dup()
            if self._stop_wanted.is_set():
                process.send_signal(signal.SIGTERM)
            worker.channel = Channel(line, notice=lambda *said: self._take(worker, *said), longest=LONGEST_ANSWER)
            worker.connected.set()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._let_begin, worker)
                    await worker.channel.run()
                    nursery.cancel_scope.cancel()
                await process.wait()
            except BaseException:
                process.kill()
                raise
            finally:
                with trio.CancelScope(shield=True):
                    worker.code = await process.wait()
        finally:
            self._living.discard(worker)
            if note_end is not None:
                note_end()
            worker.ended.set()
            worker.connected.set()

    async def _let_begin(self, worker: WorkerProcess) -> None:
        """Tell a process when it may begin."""
        await worker.prepared.wait()
        await worker.may_begin.wait()
        assert worker.channel is not None
        worker.silence = 0.0
        with suppress(ControlError):
            worker.channel.tell("begin")

    def _take(self, worker: WorkerProcess, verb: str, arguments: dict[str, Any]) -> None:
        """Take what a process reports."""
        worker.silence = 0.0
        if verb == "prepared":
            worker.prepared.set()
        elif verb == "ready":
            worker.ready.set()
            if len(self.processes) == len(self._places):
                self._all_ready.set()
        elif verb != "alive" and self._notice is not None:
            self._notice(worker.index, verb, arguments)

    # ---- the watchdog

    async def _watch(self) -> None:
        """End processes that hang."""
        async with trio.open_nursery() as nursery:
            while True:
                interval = min(0.5, self.watchdog / 10) if self.watchdog else 0.5
                await trio.sleep(interval)
                for worker in self._living:
                    if not worker.may_begin.is_set() or not worker.prepared.is_set() or worker.has_hung:
                        continue
                    # Not the difference of two times: when this process was stopped, so were the others, perhaps.
                    worker.silence += interval
                    if self.watchdog and worker.silence > self.watchdog:
                        worker.has_hung = True
                        nursery.start_soon(self._end_hung, worker)

    async def _end_hung(self, worker: WorkerProcess) -> None:
        place = self._places.get(worker.index)
        if place is not None and place.worker is worker and place.successor is None and not place.is_leaving:
            place.successor = self._spawn(place.index, place.launch)  # it prepares itself meanwhile
        worker.send_signal(signal.SIGABRT)
        with trio.move_on_after(0.0 if worker.is_stopped else _LAST_WORDS):
            await worker.ended.wait()
        worker.send_signal(signal.SIGKILL)


async def _first(*events: trio.Event) -> None:
    """Wait for the first of some events."""
    async with trio.open_nursery() as nursery:

        async def wait(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        for event in events:
            nursery.start_soon(wait, event)


def describe_end(worker: WorkerProcess) -> str:
    """Return how a worker has ended, in words."""
    if worker.has_hung:
        return "did not answer the watchdog"
    return f"was ended by {signal.Signals(-worker.code).name}" if worker.code < 0 else f"ended with code {worker.code}"
