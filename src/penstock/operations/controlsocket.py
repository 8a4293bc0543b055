"""The control socket: what `penstock status`, `top` and `ctl` ask of a running server.

A unix socket that only its owner (and root) may use. On it, one JSON object per line, as between a supervisor and its
workers (penstock.control.Channel): a request has a verb, a number and arguments; the answer has the number, and a
result or an error.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from penstock.control import Channel, Control, ControlError
from penstock.metrics.collect import LONGEST_NAME
from penstock.net.listen import ListenAddress, bind
from penstock.operations.observation import Observation

MAX_CONNECTIONS: Final = 16
_LONGEST: Final = 65_536
"""Octets of a request."""
_MODE: Final = 0o600
_MOST_SECONDS: Final = 604_800


class ControlSocket:
    """Serves requests of operators."""

    def __init__(self, control: Control, observation: Observation) -> None:
        self._control = control
        self._observation = observation
        self._connections = 0
        self._verbs: dict[str, Callable[..., Awaitable[Any]]] = {
            "state": self._state,
            "metrics": self._metrics,
            "reload": self._reload,
            "drain": self._drain,
            "resume": self._resume,
            "rotate": self._rotate,
            "hop": self._hop,
        }

    async def run(self, sock: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled, then remove the socket; `started` once clients are accepted."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        path = sock.getsockname()
        try:
            await trio.serve_listeners(self._serve, [listener], task_status=_without_value(task_status))
        finally:
            with suppress(OSError):
                os.unlink(path)  # noqa: PTH108 - it does not wait

    async def _serve(self, stream: trio.SocketStream) -> None:
        """Be the task of one connection."""
        if self._connections >= MAX_CONNECTIONS:
            await trio.aclose_forcefully(stream)
            return
        self._connections += 1
        try:
            await Channel(_stdlib(stream), handle=self._handle, longest=_LONGEST).run()
        finally:
            self._connections -= 1

    async def _handle(self, verb: str, arguments: dict[str, Any]) -> Any:
        """Carry out a request. Raise ControlError."""
        act = self._verbs.get(verb)
        if act is None:
            raise ControlError(f"unknown request {verb!r}; there are {', '.join(self._verbs)}")
        try:
            return msgspec.to_builtins(await act(**arguments))
        except TypeError as exc:
            raise ControlError(f"{verb}: {exc}") from exc

    async def _state(self) -> object:
        return await self._control.state()

    async def _metrics(self) -> object:
        """Return all series: kind, name and value of each; and those of each worker by its process."""
        total = [(kind, name, value) for (kind, name), value in (await self._observation.sums(self._control)).items()]
        return {"series": total, "workers": self._observation.by_process()}

    async def _reload(self) -> object:
        return await self._control.reload()

    async def _drain(self, wait: bool = False, delay: float = 5.0, most: float = 600.0, stay: bool = False) -> object:
        self._control.drain(delay=_seconds("delay", delay), timeout=_seconds("most", most), stay=bool(stay))
        return await self._control.wait_drained() if wait else None

    async def _resume(self) -> object:
        await self._control.resume()
        return None

    async def _rotate(self) -> object:
        await self._control.rotate()
        return None

    async def _hop(self, hop: object, action: str) -> object:
        if action not in ("suspend", "resume", "retry"):
            raise ControlError(f"unknown action {action!r}; there are suspend, resume, retry")
        if not isinstance(hop, str) or len(hop) > LONGEST_NAME:
            raise ControlError(f"hop: expected a name of at most {LONGEST_NAME} characters")
        return await self._control.hop(hop, action)  # type: ignore[arg-type]


def _seconds(name: str, value: object) -> float:
    """Return an argument that is a time. Raise ControlError."""
    if not isinstance(value, int | float) or not 0 <= value <= _MOST_SECONDS:
        raise ControlError(f"{name}: expected 0 to {_MOST_SECONDS} seconds, not {value!r}")
    return value


def bind_control(path: Path) -> socket.socket:
    """Bind the control socket; its folder is made if need be. Raise OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    (sock,) = bind(ListenAddress("", 0, str(path)), mode=_MODE)
    return sock


def _stdlib(stream: trio.SocketStream) -> socket.socket:
    """Take the socket out of a stream, which is not used any more."""
    descriptor = stream.socket.detach()
    return socket.socket(fileno=descriptor)


def _without_value(task_status: trio.TaskStatus[None]) -> Any:
    """Return a task status whose `started` may be called with a value, which is dropped."""

    class Started:
        def started(self, _: object = None) -> None:
            task_status.started()

    return Started()
