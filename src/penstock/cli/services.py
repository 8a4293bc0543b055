"""What runs beside a server for its operators: the control socket and the HTTP address of /metrics."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final

import click
import trio

from penstock.config import Settings
from penstock.control import Control
from penstock.metrics.exposition import CONTENT_TYPE
from penstock.metrics.settings import ControlSettings
from penstock.net.listen import ListenAddress, bind
from penstock.operations.controlsocket import ControlSocket, bind_control
from penstock.operations.endpoint import Answer, Endpoint, read_token
from penstock.operations.observation import Observation
from penstock.privileges import Account, acting_as

_LONGEST_PATH: Final = 107
"""Octets of the path of a unix socket (unix(7))."""


async def run_services(
    control: Control,
    observation: Observation,
    settings: Settings,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run until cancelled, in the supervisor or the only process; `started` once everything is bound.

    Raise OSError when a socket cannot be bound, or the token file not be used.
    """
    token_file, sockets, control_socket = _bind(settings, observation.account)
    observation.collector.use(settings.metrics.destinations)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(observation.run)
        if sockets:
            await nursery.start(make_endpoint(control, observation, token_file).run, sockets)
        if control_socket is not None:
            await nursery.start(ControlSocket(control, observation).run, control_socket)
        task_status.started()


def _bind(settings: Settings, account: Account | None) -> tuple[Path | None, list[socket.socket], socket.socket | None]:
    """Return the token file, the sockets of the HTTP address, and the control socket. Raise OSError."""
    folder = Path(settings.data_dir).absolute()
    token_file = folder / settings.metrics.token_file if settings.metrics.token_file else None
    if token_file is not None:
        try:
            read_token(token_file)
        except (OSError, ValueError) as exc:
            raise OSError(f"metrics.token_file: {exc}") from exc
    sockets: list[socket.socket] = []
    if settings.metrics.address:
        sockets = bind(ListenAddress.parse(settings.metrics.address))
    control_socket: socket.socket | None = None
    try:
        path = folder / settings.control.socket
        if settings.control == ControlSettings() and len(os.fsencode(path)) > _LONGEST_PATH:
            click.echo(f"penstock: without a control socket, as the path {path} is too long", err=True)
        elif settings.control.socket:
            with acting_as(account):
                control_socket = bind_control(path)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return token_file, sockets, control_socket


def make_endpoint(control: Control, observation: Observation, token_file: Path | None) -> Endpoint:
    """Return what answers /metrics, /livez and /readyz."""

    async def metrics() -> Answer:
        return Answer(200, await observation.text(control), CONTENT_TYPE)

    async def live() -> Answer:
        return Answer(200, "ok\n")

    async def ready() -> Answer:
        return Answer(200, "ready\n") if control.is_ready else Answer(503, "not ready\n")

    pages = {"/metrics": metrics, "/livez": live, "/readyz": ready}
    return Endpoint(pages, token_file=token_file, protected=frozenset({"/metrics"}))
