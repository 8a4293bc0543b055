"""`penstock sink --workers N`: several processes on the same address, and one report of all of them.

The parent binds the sockets, forks the workers (penstock.forked), and adds up what they report (penstock.sink.merging).
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import click
import msgspec
import trio

from penstock.app import bind_listener
from penstock.cli.running import account_of, become, innermost
from penstock.cli.signals import accept_signals
from penstock.config import ConfigError, Settings, check
from penstock.forked import Frame, WorkerError, WorkerLine, Workers
from penstock.net.listen import close_listener, name_of, share
from penstock.privileges import Account
from penstock.sink.merging import KeptCopy, Second, WorkerReport

RESET, PLAN = 1, 2
"""Places of numbers that workers share with their parent: how often it has reset the counters and replaced the plan."""
_NUMBERS: Final = 3

Sockets = Sequence[Sequence[socket.socket]]
"""The listening sockets of each listener."""


class Progress(msgspec.Struct, array_like=True):
    """How far a worker is."""

    messages: int
    sessions: int
    open: int


class SinkFrame(Frame):
    """What a worker of a sink tells the parent."""

    progress: Progress | None = None
    second: Second | None = None
    kept: list[KeptCopy] = []  # noqa: RUF012 - each frame has a list of its own
    report: WorkerReport | None = None


Work = Callable[[Sockets, WorkerLine], WorkerReport]
"""Runs a sink on the sockets until it is stopped. Raises click.ClickException."""


class SinkWorkers:
    """The parent's side."""

    def __init__(self, settings: Settings, count: int, work: Work, *, allow_open: bool, serves: bool = False) -> None:
        """Bind the sockets and start the workers, before trio runs, because that forks. Raise click.ClickException.

        With `serves`, this process serves clients, too: it becomes the user of the settings.
        """
        self._account: Account | None = None
        try:
            check(settings, allow_open=allow_open)
            if serves:
                self._account = account_of(settings)
            self._sets = [share(bind_listener(listener), count) for listener in settings.listener]
            self.addresses = [name_of(sock) for each in self._sets for sock in each[0]]
            """The addresses it listens on."""
            self._progress = dict.fromkeys(range(count), Progress(0, 0, 0))
            self.ready = trio.Event()
            """Set when all workers are ready."""

            def run(index: int, line: WorkerLine) -> Frame:
                try:
                    return SinkFrame(is_last=True, report=work([each[index] for each in self._sets], line))
                except click.ClickException as exc:
                    return SinkFrame(error=exc.message, is_usage=isinstance(exc, click.UsageError))

            self._workers = Workers(count, run, SinkFrame, numbers=_NUMBERS)
        except ConfigError as exc:
            raise click.UsageError(str(exc)) from exc
        except OSError as exc:
            raise click.ClickException(str(exc)) from exc
        self.tell = self._workers.tell

    @property
    def progress(self) -> Progress:
        """How far all workers together are."""
        found = self._progress.values()
        return Progress(
            sum(each.messages for each in found), sum(each.sessions for each in found), sum(each.open for each in found)
        )

    def _stop(self) -> None:
        """Stop gracefully. Close the listening sockets first: clients in their queues would wait in vain."""
        for sock in {sock for each in self._sets for part in each for sock in part}:
            close_listener(sock)
        self._workers.stop()

    def run(
        self,
        announce: Callable[[], None],
        take: Callable[[int, SinkFrame], None],
        is_done: Callable[[Progress], bool],
        *,
        beside: Callable[[], Awaitable[None]],
    ) -> None:
        """Run until a signal, until `is_done`, or until a worker has failed. Raise click.ClickException then.

        `announce` is called when all workers are ready, `take` with what each of them has counted and kept; `beside`
        runs in the same loop until all have ended.
        """
        accept_signals()
        try:
            if self._account is not None:
                become(self._account)
            trio.run(self._run, announce, take, is_done, beside)
        except* OSError as group:
            raise click.ClickException(innermost(group)) from group
        except* WorkerError as group:
            failure = group.exceptions[0]
            is_usage = isinstance(failure, WorkerError) and failure.is_usage
            raise (click.UsageError if is_usage else click.ClickException)(innermost(group)) from group
        finally:
            self._stop()
            self._workers.close()

    async def _run(
        self,
        announce: Callable[[], None],
        take: Callable[[int, SinkFrame], None],
        is_done: Callable[[Progress], bool],
        beside: Callable[[], Awaitable[None]],
    ) -> None:
        def on_ready() -> None:
            announce()
            self.ready.set()

        def on_frame(index: int, frame: SinkFrame) -> None:
            if frame.progress is not None:
                self._progress[index] = frame.progress
                if is_done(self.progress):
                    self._stop()
            else:
                take(index, frame)

        async with trio.open_nursery() as nursery:
            await nursery.start(self._stop_on_signals)
            nursery.start_soon(beside)
            await self._workers.follow(on_frame, on_ready)
            nursery.cancel_scope.cancel()

    async def _stop_on_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            await anext(signals)
            self._stop()
            async for _ in signals:
                self._workers.abort()
