"""What `serve` and `sink` share: run a worker under signals, and keep its journal."""

from __future__ import annotations

import faulthandler
import gc
import os
import resource
import signal
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Final

import click
import msgspec
import trio

from penstock.app import NO_OVERRIDES, Overrides, Server, assemble, wrong_file
from penstock.cli.journaling import JournalWriter, stderr
from penstock.config import ConfigError, Settings, check
from penstock.journal import Journal
from penstock.spool.spool import SpoolError

_GC_THRESHOLD = 20_000
"""Objects made and not freed before the collector looks: ten thousand connections are no reason to look ten times."""


def listen_on(settings: Settings, addresses: tuple[str, ...]) -> Settings:
    """Return the settings with listeners at these addresses, each like the first one of the file."""
    if not addresses:
        return settings
    first = settings.listener[0]
    listeners = tuple(msgspec.structs.replace(first, address=address, name="") for address in addresses)
    return msgspec.structs.replace(settings, listener=listeners)


def run(
    settings: Settings,
    announce: Callable[[Server], None],
    *,
    done: Callable[[Server], bool] | None = None,
    allow_open: bool = False,
    overrides: Overrides = NO_OVERRIDES,
    beside: Callable[[Server], Awaitable[None]] | None = None,
    is_shared: bool = False,
) -> None:
    """Check the settings and run a server until a signal, or until `done`, which is asked ten times per second.

    `overrides` are those of `assemble`; `beside` runs in the same loop, and is cancelled when the server has stopped;
    `is_shared` says that other processes write to the same standard error.

    End the process with code 2 for wrong settings, 1 when the server cannot start.
    """
    try:
        check(settings, allow_open=allow_open)
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a descriptor for each connection
    descriptor = stderr()
    journal = Journal(settings.journal, is_terminal=os.isatty(descriptor))
    write = JournalWriter(descriptor, journal.tell_dropped, is_shared=is_shared)
    try:
        server = assemble(settings, journal, write, overrides=overrides)
    except (OSError, ValueError) as exc:
        raise click.ClickException(wrong_file(settings) or str(exc)) from exc
    survive_signals()
    try:
        trio.run(_serve, server, announce, done, beside)
    except* (OSError, SpoolError, sqlite3.Error) as group:
        raise click.ClickException(innermost(group)) from group
    finally:
        write(journal.drain())  # what the relay had to say after the last session
        write.close()


_HARMLESS: Final = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM)


def survive_signals() -> None:
    """Have no signal end the process but SIGTERM and SIGINT: SIGQUIT prints all stacks, the others are ignored.

    Log rotation and terminals that close send SIGHUP or SIGUSR1, whose default would cut every session.
    """
    for number in _HARMLESS:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGQUIT, all_threads=True)


def innermost(exc: BaseException) -> str:
    """Return what the first exception of a group says."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return str(exc)


async def _serve(
    server: Server,
    announce: Callable[[Server], None],
    done: Callable[[Server], bool] | None,
    beside: Callable[[Server], Awaitable[None]] | None,
) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signals, server)
        await nursery.start(_run_server, server, nursery)
        # What the start has made lives as long as the process: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD, 20, 100)
        announce(server)
        if beside is not None:
            nursery.start_soon(beside, server)
        if done is not None:
            while not done(server):  # noqa: ASYNC110 - counting stays cheaper than an event for each message
                await trio.sleep(0.1)
            server.stop()


async def _run_server(
    server: Server, nursery: trio.Nursery, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run the server; when it has stopped, end whatever runs beside it."""
    await server.run(task_status=task_status)
    nursery.cancel_scope.cancel()


async def _stop_on_signals(server: Server, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Stop at SIGTERM or SIGINT; at a second one, do not wait for messages that are being received."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        count = 0
        async for _ in signals:
            count += 1
            if count == 1:
                server.stop()
            else:
                server.abort()


def print_authority(server: Server) -> None:
    """Print which authority clients have to trust, where the certificate was generated."""
    if server.ca_file is not None:
        click.echo(f"penstock: TLS with a generated certificate; clients trust {server.ca_file}")
