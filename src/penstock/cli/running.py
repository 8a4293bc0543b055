"""What `serve` and `sink` share: one process that serves, under signals, and what every process does at its start."""

from __future__ import annotations

import dataclasses
import gc
import os
import resource
import socket
import sqlite3
from collections.abc import Awaitable, Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Final

import click
import msgspec
import trio

from penstock.app import NO_OVERRIDES, Overrides, Server, assemble
from penstock.cli.certificates import Certificates
from penstock.cli.filecheck import cause_of
from penstock.cli.journaling import JournalWriter
from penstock.cli.logfile import LogFile
from penstock.cli.notify import ServiceManager
from penstock.cli.operating import Load, Operations, Outfit
from penstock.cli.services import run_services
from penstock.config import ConfigError, Settings, check
from penstock.control import ControlError, HopAction, WorkerState
from penstock.journal import Journal
from penstock.net.listen import ListenAddress
from penstock.operations.observation import Observation, keep_reporting, start_counting
from penstock.privileges import Account, drop_capabilities, find_account, is_root
from penstock.spool.spool import SpoolError

_GC_THRESHOLD = 20_000
"""Objects made and not freed before the collector looks: ten thousand connections are no reason to look ten times."""
_OTHER_DESCRIPTORS: Final = 200
"""Descriptors for files, the spool, DNS and the journal."""
_replace = msgspec.structs.replace


def listen_on(settings: Settings, addresses: tuple[str, ...]) -> Settings:
    """Return the settings with listeners at these addresses, each like the first one of the file."""
    if not addresses:
        return settings
    first = settings.listener[0]
    listeners = tuple(_replace(first, address=address, name="") for address in addresses)
    return _replace(settings, listener=listeners)


# ---- before the start


def raise_descriptor_limit() -> int:
    """Allow this process as many descriptors as the system does, and return how many; 0 for no limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return 0 if most == resource.RLIM_INFINITY else most


def fit_descriptors(settings: Settings, limit: int) -> Settings:
    """Return the settings with as many connections as there are descriptors: a refused client still receives 421."""
    wanted = settings.admission.connections
    possible = max(limit - settings.relay.pool.connections - _OTHER_DESCRIPTORS, limit // 2)
    if not limit or wanted <= possible:
        return settings
    return _replace(settings, admission=_replace(settings.admission, connections=possible))


def tell_fitted(settings: Settings, fitted: Settings, limit: int, journal: Journal) -> None:
    """Note that there are fewer descriptors than connections are allowed."""
    if fitted is not settings:
        journal.limited(
            "admission.connections",
            settings.admission.connections,
            fitted.admission.connections,
            f"a process may have {limit} descriptors (ulimit -n, systemd LimitNOFILE=)",
        )


def account_of(settings: Settings) -> Account | None:
    """Return the account that clients are served as; None for that of this process.

    End the process with code 2 for an unknown one, for one that only root can become, and for root on an address that
    other machines can reach.
    """
    wanted = settings.server
    if wanted.user:
        try:
            account = find_account(wanted.user, wanted.group)
        except ValueError as exc:
            raise click.UsageError(str(exc)) from exc
        if is_root():
            return account
        if account.uid != os.geteuid():
            raise click.UsageError(f"server.user: only root can become {wanted.user!r}; start as root or as that user")
        return None
    if is_root() and not wanted.allow_root:
        for number, listener in enumerate(settings.listener):
            if not ListenAddress.parse(listener.address).is_loopback:
                raise click.UsageError(
                    f"server.user: as root, listener[{number}] on {listener.address} can be reached by other machines, "
                    'with the rights of root; set [server] user = "penstock", or allow_root = true'
                )
    return None


def become(account: Account) -> None:
    """Serve as another account from now on, without capabilities. Raise OSError."""
    # Modules that Python imports at their first use: the other account need not be able to read them.
    socket.getaddrinfo("localhost", 0)
    "idna".encode("idna")
    resources.files("penstock").joinpath("py.typed").read_bytes()
    os.setgroups(account.groups)
    os.setgid(account.gid)
    os.setuid(account.uid)
    drop_capabilities()


def tune_collector() -> None:
    """Have the collector pass over what the start has made: it lives as long as the process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 20, 100)


_OF_WORKERS: Final = ("tmp", "maildir", "secret", "spool*", "state*", "index*", "run", "tls")
"""What a server writes in its state directory. Other files of root stay so, such as certificates and keys."""


def prepare_data_dir(settings: Settings, account: Account) -> None:
    """Make the state directory for an account, or hand one that root has used to it. Raise OSError.

    Only a directory of root is given to another owner: no other user could have put a link into it.
    """
    folder = Path(settings.data_dir)
    if not folder.exists():
        folder.mkdir(parents=True, mode=0o750)
    if folder.stat().st_uid != 0:
        return
    names = (
        *_OF_WORKERS,
        f"{settings.spool.path}*",
        settings.delivery.maildir.path.partition("{")[0].rstrip("/") or "tmp",
    )
    found = {path for name in names if not Path(name).is_absolute() for path in folder.glob(name)}
    for path in [*found, *(each for top in found if top.is_dir() for each in top.rglob("*"))]:
        os.chown(path, account.uid, account.gid, follow_symlinks=False)
    os.chown(folder, account.uid, account.gid)


# ---- a server of one process


class SingleOperations(Operations):
    """A server of one process, for its operators."""

    def __init__(self, outfit: Outfit, server: Server, *, allow_open: bool = False) -> None:
        super().__init__(outfit, allow_open=allow_open)
        self._server = server

    @property
    def is_alive(self) -> bool:
        """Always true: a process that answers runs."""
        return True

    def stop(self) -> None:
        """End gracefully; called again, at once."""
        if self.phase == "stopping":
            self._server.abort()
        else:
            self.stopping()
            self._server.stop()

    async def _apply(self, settings: Settings, certificates: Certificates, rolling: list[str]) -> None:
        if rolling:
            raise ControlError(
                f"{rolling[0]}: a server of one process can change this only by a restart; with [server] user, "
                "[metrics] address or two workers, it can at a reload"
            )
        try:
            self._server.reload(settings, certificates.pairs)
        except (OSError, ValueError) as exc:
            raise ControlError(str(exc)) from exc

    async def _use_certificates(self) -> None:
        try:
            self._server.use_key_pairs(self.certificates.pairs)
        except (OSError, ValueError) as exc:
            raise ControlError(str(exc)) from exc

    async def _check_policies(self) -> None:
        try:
            changed = await self._server.check_policies()
        except (OSError, ValueError) as exc:
            self.journal.reload_failed(f"{exc}; the policies used before remain")
            self.note_reload("failed", str(exc))
            return
        if changed:
            self.journal.reloaded("policies")
            self.note_reload("ok")

    async def _set_draining(self, is_draining: bool) -> None:
        if is_draining:
            self._server.worker.drain()
        else:
            self._server.worker.resume()

    async def _is_empty(self) -> bool:
        try:
            return await self._server.is_drained()
        except (OSError, sqlite3.Error, SpoolError):
            return False  # it cannot be read now

    async def _worker_states(self) -> list[WorkerState]:
        state = await self._server.state()
        return [_replace(state, since=self._since, is_ready=self.phase != "starting")]

    async def _rotate_workers(self) -> None:
        pass

    async def hop(self, hop: str, action: HopAction) -> int:
        """Suspend, resume or retry a next hop."""
        try:
            return await self._server.hop(hop, action)
        except (OSError, sqlite3.Error, SpoolError) as exc:
            raise ControlError(str(exc)) from exc


def run(
    settings: Settings,
    announce: Callable[[Server], None],
    *,
    load: Load | None = None,
    done: Callable[[Server], bool] | None = None,
    allow_open: bool = False,
    overrides: Overrides = NO_OVERRIDES,
    beside: Callable[[Server], Awaitable[None]] | None = None,
) -> None:
    """Check the settings and run a server until a signal, or until `done`, which is asked ten times per second.

    `load` reads the settings again at a reload; without it, a reload reads only the files that they name. `overrides`
    are those of `assemble`; `beside` runs in the same loop, and is cancelled when the server has stopped.

    End the process with code 2 for wrong settings, 1 when the server cannot start.
    """
    try:
        check(settings, allow_open=allow_open)
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    account = account_of(settings)
    limit = raise_descriptor_limit()
    fitted = fit_descriptors(settings, limit)
    writer: JournalWriter | None = None
    try:
        log = LogFile(fitted, account)
        journal = Journal(fitted.journal, is_terminal=os.isatty(log.descriptor))
        tell_fitted(settings, fitted, limit, journal)
        certificates = Certificates(fitted)
        overrides = dataclasses.replace(overrides, key_pairs=certificates.pairs, ca_file=certificates.ca_file)
        writer = JournalWriter(log.descriptor, journal.tell_dropped)
        observation = Observation(fitted) if beside is None else None
        if observation is not None:
            counters = start_counting(observation.segment, observation.claim())
            overrides = dataclasses.replace(overrides, counters=counters)
        server = assemble(fitted, journal, writer, overrides=overrides)
        if account is not None:
            prepare_data_dir(fitted, account)
            become(account)
    except (OSError, ValueError) as exc:
        raise click.ClickException(cause_of(exc, fitted)) from exc
    outfit = Outfit(
        fitted, lambda: fit_descriptors(load(), limit) if load else fitted, certificates, log, journal, writer,
        ServiceManager(),
    )  # fmt: skip
    operations = SingleOperations(outfit, server, allow_open=allow_open)
    try:
        trio.run(_serve, server, operations, observation, announce, done, beside)
    except* (OSError, SpoolError, sqlite3.Error) as group:
        raise click.ClickException(innermost(group)) from group
    finally:
        writer(journal.drain())  # what the relay had to say after the last session
        writer.close()


def innermost(exc: BaseException) -> str:
    """Return the text of the first exception of a group."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return str(exc)


async def _serve(
    server: Server,
    operations: SingleOperations,
    observation: Observation | None,
    announce: Callable[[Server], None],
    done: Callable[[Server], bool] | None,
    beside: Callable[[Server], Awaitable[None]] | None,
) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(operations.run)
        if observation is not None:
            await nursery.start(operations.keep_services, partial(run_services, operations, observation))
        await nursery.start(run_server, server, nursery)
        if server.overrides.counters is not None:
            nursery.start_soon(keep_reporting, server, server.overrides.counters)
        tune_collector()
        operations.started()
        announce(server)
        if beside is not None:
            nursery.start_soon(beside, server)
        if done is not None:
            while not done(server):  # noqa: ASYNC110 - counting stays cheaper than an event for each message
                await trio.sleep(0.1)
            server.stop()


async def run_server(
    server: Server, nursery: trio.Nursery, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run the server; when it has stopped, end whatever runs beside it."""
    await server.run(task_status=task_status)
    nursery.cancel_scope.cancel()


def print_authority(server: Server) -> None:
    """Print which authority clients have to trust, where the certificate was generated."""
    if server.ca_file is not None:
        click.echo(f"penstock: TLS with a generated certificate; clients trust {server.ca_file}")
