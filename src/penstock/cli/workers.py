"""`penstock serve --workers N`: the supervisor's side and the worker's side of a server of several processes."""

from __future__ import annotations

import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import click
import msgspec
import trio

from penstock.app import Overrides, Server, bind_listener
from penstock.cli.journaling import JournalWriter, stderr
from penstock.cli.running import innermost, print_authority, run, survive_signals
from penstock.config import ConfigError, Settings, check
from penstock.journal import Journal
from penstock.net.listen import close_listener, name_of, share
from penstock.spool.admin import QueueAdmin
from penstock.spool.spool import SpoolError, shard_of, shards
from penstock.state import snapshot
from penstock.state.keeper import Keeper
from penstock.supervisor import Line, Supervisor, WorkerError

_SESSIONS: Final = 10**12
"""Sessions of a worker are numbered from here, times its number: a journal of all of them has no number twice."""
_replace = msgspec.structs.replace


class Inheritance(msgspec.Struct, frozen=True):
    """What a worker is told by its supervisor, on the command line."""

    index: int
    line: int
    """The descriptor of the line (penstock.supervisor)."""
    sockets: list[list[int]]
    """Descriptors of the listening sockets of each listener; none for a worker that only sees to its spool."""
    state: int
    """The descriptor where the keeper answers (penstock.state.keeper)."""

    def encode(self) -> str:
        """Return it as a word."""
        return msgspec.json.encode(self).decode()


def indexes(settings: Settings, count: int) -> list[int]:
    """Return the workers that are wanted: so many, and one for each part of the spool where more of them left mail.

    Ends the process with code 1 when such a part cannot be read.
    """
    wanted = list(range(count))
    if settings.delivery.has_relay:
        folder = Path(settings.data_dir) / settings.spool.path
        try:
            for index in shards(folder):
                if index >= count:
                    with QueueAdmin.opened(folder.parent / shard_of(folder.name, index)) as desk:
                        wanted += [] if desk.is_empty else [index]
        except (SpoolError, sqlite3.Error) as exc:
            raise click.ClickException(str(exc)) from exc
    return wanted


# ---- the supervisor's side


def supervise(settings: Settings, wanted: Sequence[int], count: int) -> None:
    """Run workers until a signal; `count` of them listen. Ends the process with code 1 when one does not start."""
    try:
        check(settings)
        listeners = [bind_listener(listener) for listener in settings.listener]
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    except OSError as exc:
        raise click.ClickException(str(exc)) from exc
    # What it has to say is written as its workers' journals are: nobody who does not read it holds it up.
    write = JournalWriter(stderr(), Journal(settings.journal).tell_dropped, is_shared=True)
    survive_signals()
    state = Path(settings.data_dir) / snapshot.FILE
    try:
        with Keeper(state, lambda text: write(f"penstock: {text}\n".encode())) as keeper:
            trio.run(_supervise, settings, wanted, [share(sockets, count) for sockets in listeners], keeper, write)
    except* (WorkerError, OSError, sqlite3.Error) as group:
        raise click.ClickException(innermost(group)) from group
    finally:
        write.close()


async def _supervise(
    settings: Settings,
    wanted: Sequence[int],
    sets: list[list[list[socket.socket]]],
    keeper: Keeper,
    write: Callable[[bytes], None],
) -> None:
    program = [sys.executable, "-m", "penstock", *sys.argv[1:]]

    def launch(index: int, line: int) -> tuple[Sequence[str], Sequence[int]]:
        sockets = [[sock.fileno() for sock in each[index]] if index < len(each) else [] for each in sets]
        told = Inheritance(index, line, sockets, keeper.connect(index))
        return [*program, "--worker", told.encode()], [line, told.state, *(fd for each in sockets for fd in each)]

    def restarted(index: int, code: int) -> None:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        write(f"penstock: worker {index} {how}, and is started again\n".encode())

    supervisor = Supervisor(launch, wanted, restarted=restarted)
    where = ", ".join(name_of(sock) for each in sets for sock in each[0])
    async with _closing(sets) as close, trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signals, supervisor, close)
        await nursery.start(_keep, supervisor, nursery)
        shards_alone = len(wanted) - len(sets[0])
        beside = f", and {shards_alone} for what others left in the spool" if shards_alone else ""
        click.echo(
            f"penstock: listening on {where}; {len(sets[0])} workers{beside}; "
            f"{settings.delivery.kind} below {settings.data_dir}"
        )


@asynccontextmanager
async def _closing(sets: list[list[list[socket.socket]]]) -> AsyncIterator[Callable[[], None]]:
    """Close all sockets at the end, if what it gives was not called before."""

    def close() -> None:
        for sock in {sock for each in sets for part in each for sock in part}:
            close_listener(sock)

    try:
        yield close
    finally:
        close()


async def _keep(
    supervisor: Supervisor, nursery: trio.Nursery, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    await supervisor.run(task_status=task_status)
    nursery.cancel_scope.cancel()


async def _stop_on_signals(
    supervisor: Supervisor,
    close: Callable[[], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Stop at a signal. Nobody waits in a queue from which no worker takes any more."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            close()
            supervisor.stop()


# ---- the worker's side


def work(settings: Settings, word: str) -> None:
    """Be a worker, as the supervisor has said."""
    told = msgspec.json.decode(word, type=Inheritance)
    sockets = [[socket.socket(fileno=fd) for fd in each] for each in told.sockets]
    settings = _replace(settings, spool=_replace(settings.spool, path=shard_of(settings.spool.path, told.index)))
    state = socket.socket(fileno=told.state)
    line: list[Line] = []

    def announce(parts: Server) -> None:
        parts.worker.sessions = told.index * _SESSIONS
        line.append(Line(told.line))
        if told.index == 0:
            print_authority(parts)

    async def beside(parts: Server) -> None:
        await line[0].ready()
        await line[0].wait_for_end()
        parts.worker.stop()

    run(settings, announce, overrides=Overrides(sockets=sockets, state=state), beside=beside, is_shared=True)
