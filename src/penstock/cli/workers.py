"""A server of several processes: the supervisor's side and the worker's side.

The supervisor reads the configuration, the certificates and the keys, binds the sockets, and hands all of it to its
workers. With `server.user` it stays root to do so again at a reload; workers run as that user. It accepts no
connections, loads no policies, and decodes nothing but short JSON lines from its workers.
"""

from __future__ import annotations

import base64
import os
import pickle
import signal
import socket
import sqlite3
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import msgspec
import trio

from penstock.app import Overrides, Server, assemble
from penstock.cli.certificates import Certificates
from penstock.cli.filecheck import cause_of
from penstock.cli.journaling import JournalWriter
from penstock.cli.logfile import LogFile
from penstock.cli.notify import ServiceManager, passed_sockets
from penstock.cli.operating import Load, Operations, Outfit, RollError
from penstock.cli.running import (
    account_of,
    become,
    fit_descriptors,
    innermost,
    raise_descriptor_limit,
    run_server,
    tell_fitted,
    tune_collector,
)
from penstock.cli.services import run_services
from penstock.cli.signals import accept_signals
from penstock.cli.sockets import ListeningSockets
from penstock.config import ConfigError, Settings, check
from penstock.control import Channel, ControlError, HopAction, WorkerState
from penstock.files import memory_file
from penstock.journal import Journal
from penstock.metrics.segment import attach_segment
from penstock.net.tls import KeyPair
from penstock.operations.observation import Observation, keep_reporting, start_counting
from penstock.privileges import Account, acting_as
from penstock.spool.admin import QueueAdmin
from penstock.spool.spool import SpoolError, shard_of, shards
from penstock.state import snapshot
from penstock.state.keeper import Keeper
from penstock.supervisor import Command, Supervisor, WorkerError, WorkerProcess, describe_end

_SESSIONS: Final = 10**12
"""Sessions of a worker are numbered from here, times its number: a journal of all of them has no number twice."""
_STATE_TIMEOUT: Final = 2.0
_RELOAD_TIMEOUT: Final = 30.0
_SILENT: Final = 5.0
"""Seconds after which a worker that does not report is considered hung."""
_replace = msgspec.structs.replace


class Inheritance(msgspec.Struct, frozen=True):
    """What a worker inherits, on its command line."""

    index: int
    line: int
    """The descriptor of its end of the channel (penstock.control)."""
    boot: int
    """The descriptor of a file in memory with its `Boot`."""
    sockets: list[list[int]]
    """Descriptors of the listening sockets of each listener; none for a worker that only sees to its spool."""
    state: int
    """The descriptor where the supervisor keeps rates and greylisting (penstock.state.keeper)."""
    segment: int
    """The descriptor of the memory that all workers share (penstock.operations.observation)."""
    page: int
    """Its page of that."""

    def encode(self) -> str:
        """Return it as a word."""
        return msgspec.json.encode(self).decode()


class Boot(NamedTuple):
    """The data for a worker. Pickled: only a supervisor writes it, and arguments may have dates."""

    settings: Settings
    key_pairs: Sequence[KeyPair | None]
    is_draining: bool = False
    account: Account | None = None
    """Who to become."""

    def encode(self) -> bytes:
        """Return it as octets."""
        return pickle.dumps(self)

    @classmethod
    def decode(cls, data: bytes) -> Boot:
        """Return what `encode` has encoded."""
        found = pickle.loads(data)  # noqa: S301 - from the supervisor, which has more rights
        assert isinstance(found, cls)
        return found


def needs_supervisor(settings: Settings, wanted: Sequence[int], manager: ServiceManager) -> bool:
    """Return whether a server has a supervisor: for several workers, another user, /metrics, or a service manager."""
    return (
        len(wanted) > 1
        or bool(settings.server.user)
        or bool(settings.metrics.address)
        or manager.exists
        or "LISTEN_FDS" in os.environ
    )


def indexes(settings: Settings, account: Account | None) -> list[int]:
    """Return the workers that are wanted: those of the settings, and one for each part of the spool that others left.

    Parts without mail need none. Raise OSError, sqlite3.Error or SpoolError when such a part cannot be read.
    """
    count = settings.server.workers
    wanted = list(range(count))
    if settings.delivery.has_relay:
        folder = Path(settings.data_dir) / settings.spool.path
        with acting_as(account):
            for index in shards(folder):
                if index >= count:
                    with QueueAdmin.opened(folder.parent / shard_of(folder.name, index)) as admin:
                        wanted += [] if admin.is_empty else [index]
    return wanted


# ---- the supervisor's side


class Launcher:
    """Starts workers, with the settings and certificates that are in use."""

    def __init__(
        self,
        settings: Settings,
        key_pairs: Sequence[KeyPair | None],
        sockets: ListeningSockets,
        account: Account | None,
        observation: Observation,
        keeper: Keeper,
    ) -> None:
        self.settings = settings
        self.key_pairs = key_pairs
        self.is_draining = False
        self._sockets = sockets
        self._account = account
        self._observation = observation
        self.keeper = keeper
        """Has the rates and the greylist of all workers, whichever settings they have."""

    @property
    def boot(self) -> Boot:
        """The data for a worker."""
        return Boot(self.settings, self.key_pairs, self.is_draining, self._account)

    @contextmanager
    def __call__(self, index: int, line: int) -> Iterator[Command]:
        """Yield how to start a worker."""
        sockets = [
            [sock.fileno() for sock in each]
            for each in self._sockets.of_worker(self.settings, index, self.settings.server.workers)
        ]
        connected = self.keeper.connect()
        with self._observation.claimed() as page, memory_file(self.boot.encode()) as boot, connected:
            segment, state = self._observation.inherited, connected.fileno()
            told = Inheritance(index, line, boot, sockets, state, segment, page)
            words = [*_python(), "-m", "penstock", *sys.argv[1:], "--worker", told.encode()]
            descriptors = [line, boot, state, segment, *(fd for each in sockets for fd in each)]
            yield Command(words, descriptors, partial(self._observation.ended, page))


def _python() -> list[str]:
    """Return how to start Python. `-m` must not add the current folder to the path of modules if it is not there."""
    return [sys.executable] if str(Path.cwd()) in sys.path or "" in sys.path else [sys.executable, "-P"]


class SupervisorOperations(Operations):
    """A supervisor and its workers, for their operators."""

    def __init__(
        self,
        outfit: Outfit,
        sockets: ListeningSockets,
        launcher: Launcher,
        wanted: Sequence[int],
        observation: Observation,
    ) -> None:
        super().__init__(outfit)
        self.observation = observation
        self.supervisor = Supervisor(
            launcher,
            wanted,
            watchdog=outfit.settings.server.watchdog,
            patience=_patience(outfit.settings),
            restarted=self._restarted,
            notice=self._take,
        )
        self._sockets = sockets
        self._launcher = launcher
        self._is_mixed = False
        """A roll has failed half-way: some workers have settings that others do not have."""

    @property
    def is_ready(self) -> bool:
        """It accepts mail."""
        return self.phase == "running" and bool(self.supervisor.processes)

    @property
    def is_alive(self) -> bool:
        """All workers live."""
        workers = self.supervisor.workers
        return len(workers) == self.supervisor.places and all(each.silence < _SILENT for each in workers)

    def stop(self) -> None:
        """End gracefully; called again, at once."""
        self.stopping()
        # Clients would wait in vain in the queue of a socket that stays open, unless the next server takes it over.
        self._sockets.close(leaves_stored=True)
        self.supervisor.stop()

    # ---- workers

    def _restarted(self, worker: WorkerProcess) -> None:
        self.counters.restarts[worker.reason] += 1
        self._write(f"penstock: worker {worker.index} {describe_end(worker)}, and is started again\n".encode())

    def _take(self, index: int, verb: str, arguments: dict[str, Any]) -> None:
        """Take what workers report of their own."""
        if verb == "policies":
            problem = str(arguments.get("problem", ""))
            if problem:
                self.journal.reload_failed(f"worker {index}: {problem}; the policies used before remain")
            else:
                self.journal.reloaded(f"policies of worker {index}")
            self.note_reload("failed" if problem else "ok", problem)

    async def _ask_all(
        self, verb: str, *, seconds: float, only_serving: bool = False, **arguments: Any
    ) -> dict[WorkerProcess, Any | ControlError]:
        """Ask all workers at the same time; return their answers or errors. Those that end meanwhile are left out.

        Unless `only_serving`, those that are to take a place are asked, too: a change must miss none.
        """
        answers: dict[WorkerProcess, Any | ControlError] = {}

        async def ask(worker: WorkerProcess) -> None:
            try:
                answers[worker] = await worker.ask(verb, seconds=seconds, **arguments)
            except ControlError as exc:
                if not worker.ended.is_set():
                    answers[worker] = exc

        async with trio.open_nursery() as nursery:
            for worker in self.supervisor.workers if only_serving else self.supervisor.living:
                nursery.start_soon(ask, worker)
        return answers

    # ---- reload

    async def _apply(self, settings: Settings, certificates: Certificates, rolling: list[str]) -> None:
        if rolling or self._is_mixed:
            await self._roll(settings, certificates)
        else:
            await self._change(settings, certificates.pairs)
        self.supervisor.watchdog = settings.server.watchdog
        self.supervisor.patience = _patience(settings)

    async def _change(self, settings: Settings, key_pairs: Sequence[KeyPair | None]) -> None:
        """Change all workers in place, or none. Raise ControlError; RollError if some could not be changed back."""
        launcher = self._launcher
        before = launcher.settings, launcher.key_pairs
        launcher.settings, launcher.key_pairs = settings, key_pairs  # first: one that is started now has them
        answers = await self._ask_all("reload", seconds=_RELOAD_TIMEOUT, boot=_text(launcher.boot))
        errors = [each for each in answers.values() if isinstance(each, ControlError)]
        if errors:
            launcher.settings, launcher.key_pairs = before
            restored = await self._ask_all("reload", seconds=_RELOAD_TIMEOUT, boot=_text(launcher.boot))
            if any(isinstance(each, ControlError) for each in restored.values()):
                self._is_mixed = True
                raise RollError(f"{errors[0]}; some workers may have the new settings") from errors[0]
            raise errors[0]

    async def _roll(self, settings: Settings, certificates: Certificates) -> None:
        """Replace the workers. Raise ControlError or OSError when nothing has changed, RollError otherwise."""
        try:
            account = account_of(settings)
        except click.UsageError as exc:
            raise ControlError(exc.message) from exc
        if settings.server.workers > self.observation.most_workers:
            most = self.observation.most_workers
            raise ControlError(f"server.workers: more than {most} workers need a restart")
        undo = self._sockets.prepare(settings, settings.server.workers)
        launcher = Launcher(
            settings, certificates.pairs, self._sockets, account, self.observation, self._launcher.keeper
        )
        launcher.is_draining = self.is_draining
        before = self.supervisor.processes
        try:
            wanted = await self._indexes(settings)
        except (ControlError, OSError):
            undo()
            raise
        try:
            await self.supervisor.roll(launcher, wanted)
        except WorkerError as exc:
            undo()
            self._is_mixed = self._is_mixed or before != self.supervisor.processes
            raise RollError(f"{exc}; the other workers were not replaced") from exc
        try:
            # A worker that has left may have accepted mail after it was looked at.
            for index in await self._indexes(settings):
                await self.supervisor.add(launcher, index)
        except (WorkerError, ControlError, OSError) as exc:
            self._is_mixed = True  # and the sockets remain, because the new workers have them
            raise RollError(f"{exc}; all workers were replaced, but mail in other parts of the spool waits") from exc
        self._is_mixed = False
        self._launcher, self._account = launcher, account
        self._sockets.keep_only(settings)

    async def _indexes(self, settings: Settings) -> list[int]:
        try:
            return await trio.to_thread.run_sync(indexes, settings, self._account)
        except (sqlite3.Error, SpoolError) as exc:
            raise ControlError(f"spool.path: {exc}") from exc

    async def _use_certificates(self) -> None:
        self._launcher.key_pairs = list(self.certificates.pairs)
        answers = await self._ask_all("certificates", seconds=_RELOAD_TIMEOUT, boot=_text(self._launcher.boot))
        for answer in answers.values():
            if isinstance(answer, ControlError):
                raise answer

    async def _check_policies(self) -> None:
        """Do nothing: workers reload their policies themselves, a supervisor loads none."""

    async def _rotate_workers(self) -> None:
        for answer in (await self._ask_all("rotate", seconds=10.0)).values():
            if isinstance(answer, ControlError):
                raise answer

    # ---- draining

    async def _set_draining(self, is_draining: bool) -> None:
        self._launcher.is_draining = is_draining
        await self._ask_all("drain" if is_draining else "resume", seconds=10.0)

    async def _is_empty(self) -> bool:
        answers = await self._ask_all("is_drained", seconds=10.0, only_serving=True)
        return len(answers) == self.supervisor.places and all(each is True for each in answers.values())

    # ---- state

    async def _worker_states(self) -> list[WorkerState]:
        answers = await self._ask_all("state", seconds=_STATE_TIMEOUT, only_serving=True)
        found = []
        for worker in self.supervisor.workers:
            state = WorkerState(index=worker.index, pid=worker.pid)
            answer = answers.get(worker)
            if answer is not None and not isinstance(answer, ControlError):
                with suppress(msgspec.ValidationError):
                    state = msgspec.convert(answer, WorkerState)
            found.append(
                _replace(
                    state,
                    index=worker.index,
                    pid=worker.pid,
                    since=worker.since,
                    is_ready=worker.is_ready,
                    restarts=self.supervisor.restarts(worker.index),
                )
            )
        return found

    async def hop(self, hop: str, action: HopAction) -> int:
        """Suspend, resume or retry a next hop in all workers."""
        answers = await self._ask_all("hop", seconds=30.0, only_serving=True, hop=hop, action=action)
        for answer in answers.values():
            if isinstance(answer, ControlError):
                raise answer
        return sum(answer for answer in answers.values() if isinstance(answer, int))


def _patience(settings: Settings) -> float:
    """Return the seconds that a worker has to end: sessions twice the grace, then transactions with next hops once."""
    return 3 * settings.server.grace + 30


def _text(boot: Boot) -> str:
    """Return a boot as text for a JSON line."""
    return base64.b64encode(boot.encode()).decode()


def supervise(
    settings: Settings, load: Load, wanted: Sequence[int], manager: ServiceManager, account: Account | None
) -> None:
    """Run workers until a signal, as an account if it is not that of this process.

    End the process with code 2 for wrong settings, 1 when a worker does not start.
    """
    limit = raise_descriptor_limit()
    fitted = fit_descriptors(settings, limit)
    sockets = ListeningSockets(passed_sockets(), manager)
    try:
        check(fitted)
        observation = Observation(fitted, workers=max(wanted) + 1, account=account)
        certificates = Certificates(fitted, account)
        sockets.prepare(fitted, fitted.server.workers)
        sockets.close_unused()
        log = LogFile(fitted, account)
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    except (OSError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc
    # Its output is written like the journals of its workers: a reader that hangs does not delay it.
    journal = Journal(fitted.journal, is_terminal=os.isatty(log.descriptor))
    write = JournalWriter(log.descriptor, journal.tell_dropped, is_shared=True)
    tell_fitted(settings, fitted, limit, journal)
    write(journal.drain())
    outfit = Outfit(fitted, lambda: fit_descriptors(load(), limit), certificates, log, journal, write, manager, account)
    keeper = Keeper(Path(fitted.data_dir) / snapshot.FILE, lambda text: write(f"penstock: {text}\n".encode()))
    launcher = Launcher(fitted, certificates.pairs, sockets, account, observation, keeper)
    operations = SupervisorOperations(outfit, sockets, launcher, wanted, observation)
    try:
        with keeper:
            trio.run(_supervise, operations, sockets, wanted)
    except* (WorkerError, OSError, sqlite3.Error) as group:
        raise click.ClickException(innermost(group)) from group
    finally:
        write.close()


async def _supervise(operations: SupervisorOperations, sockets: ListeningSockets, wanted: Sequence[int]) -> None:
    settings = operations.settings
    where, count = ", ".join(sockets.addresses(settings)), settings.server.workers
    for address in sockets.unused:
        click.echo(f"penstock: {address} was passed by the service manager, but no listener uses it", err=True)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(operations.run)
            await nursery.start(operations.keep_services, partial(run_services, operations, operations.observation))
            await nursery.start(_keep, operations.supervisor, nursery)
            operations.started()
            alone = len(wanted) - count
            beside = f", and {alone} for what others left in the spool" if alone else ""
            workers = f"{count} workers" if count > 1 else "1 worker"
            click.echo(
                f"penstock: listening on {where}; {workers}{beside}; {settings.delivery.kind} below {settings.data_dir}"
            )
            if operations.certificates.ca_file is not None:
                file = operations.certificates.ca_file
                click.echo(f"penstock: TLS with a generated certificate; clients trust {file}")
    finally:
        sockets.close(leaves_stored=True)


async def _keep(
    supervisor: Supervisor, nursery: trio.Nursery, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    await supervisor.run(task_status=task_status)
    nursery.cancel_scope.cancel()


# ---- the worker's side


def work(word: str) -> None:
    """Run a worker with the data of the supervisor. Signals for its supervisor are ignored."""
    accept_signals()
    told = msgspec.json.decode(word, type=Inheritance)
    with open(told.boot, "rb") as file:  # noqa: PTH123 - of a descriptor
        boot = Boot.decode(file.read())
    raise_descriptor_limit()
    settings = _own(boot.settings, told.index)
    sockets = [[socket.socket(fileno=fd) for fd in each] for each in told.sockets]
    writer: JournalWriter | None = None
    try:
        if boot.account is not None:
            become(boot.account)
        log = LogFile(settings)
        journal = Journal(settings.journal, is_terminal=os.isatty(log.descriptor))
        writer = JournalWriter(log.descriptor, journal.tell_dropped, is_shared=True)
        counters = start_counting(attach_segment(told.segment), told.page)
        state = socket.socket(fileno=told.state)
        overrides = Overrides(sockets=sockets, key_pairs=boot.key_pairs, counters=counters, policy_state=state)
        server = assemble(settings, journal, writer, overrides=overrides)
    except (OSError, ValueError) as exc:
        raise click.ClickException(cause_of(exc, settings, reads_keys=False)) from exc
    server.worker.sessions = told.index * _SESSIONS
    try:
        trio.run(WorkerSide(server, told, boot, log).run)
    except* (OSError, SpoolError, sqlite3.Error) as group:
        raise click.ClickException(innermost(group)) from group
    finally:
        writer(journal.drain())
        writer.close()


def _own(settings: Settings, index: int) -> Settings:
    """Return the settings of a worker, which has a part of the spool."""
    return _replace(settings, spool=_replace(settings.spool, path=shard_of(settings.spool.path, index)))


class WorkerSide:
    """A worker, for its supervisor."""

    def __init__(self, server: Server, told: Inheritance, boot: Boot, log: LogFile) -> None:
        self._server = server
        self._index = told.index
        self._boot = boot
        self._log = log
        self._line = told.line
        self._begin = trio.Event()
        self._stops = 0
        self._requests: dict[str, Callable[[dict[str, Any]], Awaitable[Any]]] = {
            "state": self._state,
            "reload": self._reload,
            "certificates": self._certificates,
            "rotate": self._rotate,
            "drain": self._drain,
            "resume": self._resume,
            "is_drained": self._is_drained,
            "hop": self._hop,
        }

    async def run(self) -> None:
        """Serve from "begin" until SIGTERM, or until the supervisor has died."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._obey_signals)
            channel = Channel(socket.socket(fileno=self._line), handle=self._answer, notice=self._take)
            nursery.start_soon(self._live, channel)
            nursery.start_soon(self._say_alive, channel)
            channel.tell("prepared")
            await self._begin.wait()
            if self._stops:
                self._server.close()
                nursery.cancel_scope.cancel()
                return
            await nursery.start(run_server, self._server, nursery)
            if self._server.overrides.counters is not None:
                nursery.start_soon(keep_reporting, self._server, self._server.overrides.counters)
            tune_collector()
            if self._boot.is_draining:
                self._server.worker.drain()
            with suppress(ControlError):
                channel.tell("ready")
            nursery.start_soon(self._check_policies, channel)

    async def _obey_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for _ in signals:
                self._stop()

    def _stop(self) -> None:
        """Stop gracefully; called again, at once."""
        self._stops += 1
        self._begin.set()
        if self._stops == 1:
            self._server.stop()
        else:
            self._server.abort()

    async def _live(self, channel: Channel) -> None:
        await channel.run()
        if not self._stops:  # the supervisor has died
            self._stop()

    async def _say_alive(self, channel: Channel) -> None:
        """Say from the loop that it runs, often enough for the watchdog."""
        with suppress(ControlError):
            while True:
                channel.tell("alive")
                watchdog = self._server.settings.server.watchdog
                await trio.sleep(min(1.0, watchdog / 5) if watchdog else 1.0)

    async def _check_policies(self, channel: Channel) -> None:
        """Load policies again whose files have changed."""
        with suppress(ControlError):
            while True:
                interval = self._server.settings.server.reload_check
                await trio.sleep(interval or 1.0)
                if not interval:
                    continue
                try:
                    if await self._server.check_policies():
                        channel.tell("policies")
                except (OSError, ValueError) as exc:
                    channel.tell("policies", problem=str(exc))

    def _take(self, verb: str, _: dict[str, Any]) -> None:
        if verb == "begin":
            self._begin.set()

    # ---- requests of the supervisor

    async def _answer(self, verb: str, arguments: dict[str, Any]) -> Any:
        request = self._requests.get(verb)
        if request is None:
            raise ControlError(f"unknown request {verb}")
        try:
            return await request(arguments)
        except (OSError, ValueError, sqlite3.Error, SpoolError) as exc:
            raise ControlError(str(exc)) from exc

    async def _state(self, _: dict[str, Any]) -> Any:
        state = await self._server.state(self._index)
        return msgspec.to_builtins(_replace(state, connections=state.connections - self._index * _SESSIONS))

    async def _reload(self, arguments: dict[str, Any]) -> None:
        boot = Boot.decode(base64.b64decode(arguments["boot"]))
        self._server.reload(_own(boot.settings, self._index), boot.key_pairs)

    async def _certificates(self, arguments: dict[str, Any]) -> None:
        self._server.use_key_pairs(Boot.decode(base64.b64decode(arguments["boot"])).key_pairs)

    async def _rotate(self, _: dict[str, Any]) -> None:
        await trio.to_thread.run_sync(self._log.reopen)

    async def _drain(self, _: dict[str, Any]) -> None:
        self._server.worker.drain()

    async def _resume(self, _: dict[str, Any]) -> None:
        self._server.worker.resume()

    async def _is_drained(self, _: dict[str, Any]) -> bool:
        return await self._server.is_drained()

    async def _hop(self, arguments: dict[str, Any]) -> int:
        return await self._server.hop(arguments["hop"], arguments["action"])
