"""What a server does for its operators: signals, reloads, draining, its state. The two kinds of server differ in how.

`Operations` is the base of both implementations of penstock.control.Control: that of a server of one process
(penstock.cli.running) and that of a supervisor (penstock.cli.workers).

A reload goes like this. The configuration and the files that it names are read and checked; if anything is wrong,
nothing changes. What a running process can change is changed in place: new connections get it, open ones keep what they
began with. Other changes need new processes.
"""

from __future__ import annotations

import abc
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import msgspec
import trio

from penstock import __version__
from penstock.app import rolling_changes
from penstock.cli.certificates import Certificates
from penstock.cli.filecheck import problems
from penstock.cli.logfile import LogFile
from penstock.cli.notify import ServiceManager
from penstock.cli.signals import accept_signals
from penstock.config import ConfigError, Settings, check
from penstock.control import ControlError, Counters, Phase, ReloadResult, ReloadState, ServerState, WorkerState
from penstock.journal import Journal
from penstock.net.tls import TlsSettings
from penstock.privileges import Account, acting_as

Load = Callable[[], Settings]
"""Reads the configuration again. Raises ConfigError."""


class RunServices(Protocol):
    """Runs what operators connect to."""

    async def __call__(self, settings: Settings, *, task_status: trio.TaskStatus[None]) -> None:
        """Run until cancelled; `started` once everything is bound. Raise OSError when a socket cannot be bound."""


_ANSWER = 0.5
"""Seconds until the control socket is closed that is not configured any more: an answer may be on its way."""
_DRAIN_LOOK = 0.25
"""Seconds between two looks whether the spool is empty."""


class Outfit:
    """What a server has for its operators, made before its first process."""

    def __init__(
        self,
        settings: Settings,
        load: Load,
        certificates: Certificates,
        log: LogFile,
        journal: Journal,
        write: Callable[[bytes], None],
        manager: ServiceManager,
        account: Account | None = None,
    ) -> None:
        """`account` is that of the workers, if it is not that of this process."""
        self.account = account
        self.settings = settings
        self.load = load
        self.certificates = certificates
        self.log = log
        self.journal = journal
        self.write = write
        self.manager = manager


class Operations(abc.ABC):
    """A running server, for its operators."""

    def __init__(self, outfit: Outfit, *, allow_open: bool = False) -> None:
        self.counters = Counters()
        self.settings = outfit.settings
        self.certificates = outfit.certificates
        self.journal = outfit.journal
        self.manager = outfit.manager
        self.phase: Phase = "starting"
        self.last_reload = ReloadState()
        self._account = outfit.account
        self._load = outfit.load
        self._log = outfit.log
        self._write = outfit.write
        self._allow_open = allow_open
        self._since = time.time()
        self._changing = trio.Lock()
        self._reload_wanted = trio.Event()
        self._has_other_services = trio.Event()
        self._services: Settings | None = None
        """Those that `keep_services` uses; None: nothing runs."""
        self._unused_certificates: str | None = None
        """Why the pairs of `certificates` could not be used yet; None: they are used."""
        self._is_started = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._draining: trio.CancelScope | None = None
        self._drained = trio.Event()
        self._resumed = trio.Event()
        self._has_left_mail = False
        """Draining was given up after its timeout."""

    # ---- what the two kinds of server do differently

    @abc.abstractmethod
    def stop(self) -> None:
        """End gracefully; called again, at once."""

    @abc.abstractmethod
    async def _apply(self, settings: Settings, certificates: Certificates, rolling: list[str]) -> None:
        """Use other settings; `rolling` are the keys that need new processes.

        Raise ControlError when nothing was changed, RollError when some processes may have changed.
        """

    @abc.abstractmethod
    async def _use_certificates(self) -> None:
        """Use the pairs of `certificates`. Raise ControlError."""

    @abc.abstractmethod
    async def _check_policies(self) -> None:
        """Load policies again whose files have changed."""

    @abc.abstractmethod
    async def _set_draining(self, is_draining: bool) -> None:
        """Refuse mail, or accept it again."""

    @abc.abstractmethod
    async def _is_empty(self) -> bool:
        """Return whether no session is open and the spool is empty."""

    @abc.abstractmethod
    async def _worker_states(self) -> list[WorkerState]:
        """Return the state of each worker."""

    @abc.abstractmethod
    async def _rotate_workers(self) -> None:
        """Have other processes open the journal again."""

    @property
    @abc.abstractmethod
    def is_alive(self) -> bool:
        """All workers live."""

    # ---- Control

    @property
    def is_ready(self) -> bool:
        """It accepts mail."""
        return self.phase == "running" and self.is_alive

    async def state(self) -> ServerState:
        """Ask all workers."""
        return ServerState(
            version=__version__,
            pid=os.getpid(),
            since=self._since,
            phase=self.phase,
            is_ready=self.is_ready,
            workers=tuple(await self._worker_states()),
            last_reload=self.last_reload,
        )

    async def reload(self) -> ReloadState:
        """Read the configuration and its files again; during the start, wait for its end."""
        await self._is_started.wait()
        async with self._changing:
            self.manager.reloading()
            try:
                return await self._reload()
            finally:
                self.manager.tell("READY=1")

    async def _reload(self) -> ReloadState:
        try:
            settings, certificates = await trio.to_thread.run_sync(self._read)
            await self._apply(settings, certificates, rolling_changes(self.settings, settings))
        except (ControlError, ConfigError, OSError, ValueError) as exc:
            self.journal.reload_refused(str(exc))
            return self.note_reload("refused", str(exc))
        except RollError as exc:
            self.journal.reload_failed(str(exc))
            return self.note_reload("failed", str(exc))
        except Exception as exc:  # noqa: BLE001 - a bug costs this reload, not the server
            self.journal.error(0, "reload", exc)
            return self.note_reload("failed", f"{type(exc).__name__}: {exc}")
        used = self._services  # not those of the reload before: they may have been unusable
        if used is None or (settings.control, settings.metrics) != (used.control, used.metrics):
            self._has_other_services.set()
        self.settings, self.certificates = settings, certificates
        self._unused_certificates = None
        try:
            await trio.to_thread.run_sync(self._log.move, settings)
        except OSError as exc:
            self.journal.error(0, "journal.file", exc)
        self.journal.reloaded("configuration")
        return self.note_reload("ok")

    def _read(self) -> tuple[Settings, Certificates]:
        """Read and check the configuration and its files. Policies are not loaded: a supervisor may be root."""
        settings = self._load()
        check(settings, allow_open=self._allow_open)
        certificates = Certificates(settings, self._account)
        with acting_as(self._account):
            wrong = problems(_without_tls(settings), loads_code=False)
        if wrong:
            raise ConfigError("; ".join(wrong))
        return settings, certificates

    def note_reload(self, result: ReloadResult, reason: str = "") -> ReloadState:
        """Count a reload, and write the journal."""
        self.last_reload = ReloadState(at=time.time(), result=result, reason=reason)
        self.counters.reloads[result] += 1
        if result == "ok":
            self.counters.last_reload_success = self.last_reload.at
        self.flush()
        return self.last_reload

    def flush(self) -> None:
        """Write what is in the journal."""
        self._write(self.journal.drain())

    async def rotate(self) -> None:
        """Open the journal file again."""
        try:
            await trio.to_thread.run_sync(self._log.reopen)
            await self._rotate_workers()
        except OSError as exc:
            self.journal.error(0, "journal.file", exc)
            self.flush()
            raise ControlError(exc.strerror or str(exc)) from exc

    # ---- draining

    def drain(self, *, delay: float = 5.0, timeout: float = 600.0, stay: bool = False) -> None:
        """Begin to drain; asked again while draining, nothing changes. Raise ControlError during start and stop."""
        if self.is_draining:
            return
        if self.phase != "running" or self._nursery is None:
            raise ControlError(f"the server is {self.phase}")
        self.phase = "draining"
        self._drained, self._resumed = trio.Event(), trio.Event()
        self._draining = trio.CancelScope()
        self._nursery.start_soon(self._drain, self._draining, delay, timeout, stay)

    async def _drain(self, scope: trio.CancelScope, delay: float, timeout: float, stay: bool) -> None:  # noqa: ASYNC109
        with scope:
            await trio.sleep(delay)
            await self._set_draining(True)
            states = await self._worker_states()
            self.journal.draining(sum(each.sessions for each in states))
            self.flush()
            with trio.move_on_after(timeout) as looking:
                while not await self._is_empty():  # noqa: ASYNC110 - the spool is looked at from outside
                    await trio.sleep(_DRAIN_LOOK)
            self._has_left_mail = looking.cancelled_caught
            self.phase = "drained"
            self._drained.set()
            if not stay:
                self.stop()

    async def wait_drained(self) -> bool:
        """Return, when draining is over, whether nothing was left in sessions and the spool.

        Raise ControlError when the server was resumed, or does not drain.
        """
        if self.phase not in ("draining", "drained"):
            raise ControlError("the server does not drain")
        async with trio.open_nursery() as nursery:
            for event in (self._drained, self._resumed):
                nursery.start_soon(_cancel_after, event, nursery.cancel_scope)
        if self._resumed.is_set():
            raise ControlError("the server was resumed")
        return not self._has_left_mail

    async def resume(self) -> None:
        """Accept mail again."""
        if self.phase not in ("draining", "drained"):
            return
        if self._draining is not None:
            self._draining.cancel()
        self.phase = "running"
        self._resumed.set()
        await self._set_draining(False)
        self.journal.resumed()
        self.flush()

    @property
    def is_draining(self) -> bool:
        """Mail is refused, or will soon be."""
        return self.phase in ("draining", "drained")

    # ---- running

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Handle signals and check files for changes until cancelled."""
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self._obey_signals)
            self._nursery.start_soon(self._keep_reloading)
            self._nursery.start_soon(self._keep_looking)
            task_status.started()

    async def keep_services(
        self, run: RunServices, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run what operators connect to until cancelled; start it again when its settings have changed.

        Where it cannot be started with those, it runs with the last that worked, and each reload tries again.
        `started` once it runs for the first time. Raise OSError before that.
        """
        settings, working = self.settings, None
        while True:
            self._has_other_services = trio.Event()
            self._services = settings
            is_working = False
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(run, settings)
                    if working is None:
                        task_status.started()
                    working, is_working = settings, True
                    await self._has_other_services.wait()
                    await trio.sleep(_ANSWER)
                    nursery.cancel_scope.cancel()
            except* OSError as group:
                if working is None:
                    raise
                self.journal.error(0, "control, metrics", group.exceptions[0])
                self.flush()
            if is_working or settings is working:
                self._services = None
                await self._has_other_services.wait()
                settings = self.settings
            elif self._has_other_services.is_set():  # a reload has come meanwhile
                settings = self.settings
            else:  # an address in use, for example: what operators could connect to before is better than nothing
                settings = working

    def started(self) -> None:
        """All workers are ready."""
        if self.phase == "starting":
            self.phase = "running"
        self._is_started.set()
        self.manager.tell("READY=1", f"MAINPID={os.getpid()}")
        if self.manager.watchdog and self._nursery is not None:
            self._nursery.start_soon(self._feed_watchdog)

    def stopping(self) -> None:
        """The server is about to end."""
        self.phase = "stopping"
        self.manager.tell("STOPPING=1")

    async def _feed_watchdog(self) -> None:
        """Say that the server lives only while all workers do."""
        while True:
            if self.is_alive:
                self.manager.tell("WATCHDOG=1")
            await trio.sleep(self.manager.watchdog / 4)

    async def _obey_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        assert self._nursery is not None
        wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        with trio.open_signal_receiver(*wanted) as signals:
            accept_signals()
            task_status.started()
            async for number in signals:
                if number == signal.SIGHUP:
                    self._reload_wanted.set()
                elif number == signal.SIGUSR1:
                    self._nursery.start_soon(self._rotate_quietly)
                elif number == signal.SIGUSR2:
                    self._nursery.start_soon(self._write_state)
                else:
                    self.stop()

    async def _rotate_quietly(self) -> None:
        with suppress(ControlError):
            await self.rotate()

    async def _keep_reloading(self) -> None:
        """Reload at SIGHUP; one that comes during a reload causes one more."""
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted = trio.Event()
            await self.reload()

    async def _write_state(self) -> None:
        """Write the state of the server to the journal."""
        state = msgspec.to_builtins(await self.state())
        for worker in state.pop("workers"):
            self.journal.state(_flat("worker", worker))
        self.journal.state(_flat("server", state))
        self.flush()

    async def _keep_looking(self) -> None:
        """Look after files that may change without a signal."""
        again = 0.0
        while True:
            interval = self.settings.server.reload_check
            await trio.sleep(again or interval or 1.0)
            if not interval:
                continue
            async with self._changing:
                try:
                    again = await self._look(interval)
                except Exception as exc:  # noqa: BLE001 - a disk that fails now may work later
                    again = 0.0
                    self.journal.error(0, "reload_check", exc)
                    self.flush()

    async def _look(self, interval: float) -> float:
        """Use certificates and policies that have changed. Return the seconds until the next look, 0 for as usual."""
        look = await trio.to_thread.run_sync(self.certificates.look, interval)
        for problem in look.problems:
            self.journal.reload_failed(f"{problem}; the certificate used before remains")
            self.note_reload("failed", problem)
        if look.is_changed or self._unused_certificates is not None:
            await self._change_certificates()
        await self._check_policies()
        return look.again

    async def _change_certificates(self) -> None:
        """Use the pairs of `certificates`. If that fails, it is reported once, and the next look tries it again."""
        before, self._unused_certificates = self._unused_certificates, ""
        try:
            await self._use_certificates()
        except ControlError as exc:
            self._unused_certificates = str(exc)
            if self._unused_certificates != before:
                self.journal.reload_failed(f"{exc}; the new certificate will be tried again")
                self.note_reload("failed", str(exc))
        else:
            self._unused_certificates = None
            self.journal.reloaded("certificates")
            self.note_reload("ok")


class RollError(Exception):
    """Some new processes are not ready. The text says why."""


def _without_tls(settings: Settings) -> Settings:
    """Return the settings without certificates, which have been checked before, as root."""
    replace = msgspec.structs.replace
    none = TlsSettings(mode="none")
    return replace(settings, listener=tuple(replace(each, tls=none) for each in settings.listener))


def _flat(what: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state as the fields of a journal line."""
    fields: dict[str, Any] = {"of": what}
    for name, value in state.items():
        if isinstance(value, dict):
            fields |= {f"{name}_{key}": each for key, each in value.items() if each not in (None, "")}
        elif isinstance(value, list | tuple):
            fields[name] = [str(each.get("address", each)) if isinstance(each, dict) else str(each) for each in value]
        elif value is not None:
            fields[name] = value
    return fields


async def _cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
