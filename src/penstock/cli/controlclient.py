"""Asks a running server through its control socket (penstock.operations.controlsocket)."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import msgspec

from penstock.metrics.settings import ControlSettings
from penstock.schema import parse_table

_TIMEOUT: Final = 15.0
"""Default seconds to wait for an answer."""
_MOST_OCTETS: Final = 64 << 20
T = TypeVar("T")

_OPTIONS: Final = (
    click.option("--config", "config_file", type=click.Path(path_type=Path), help="Configuration file of the server."),
    click.option("--data", "data_dir", metavar="DIR", help="Data directory of the server [default: ./penstock-data]."),
)


class ServerError(Exception):
    """The server cannot be reached, or has refused a request."""


def server_options(command: Callable[..., T]) -> Callable[..., T]:
    """Add the options that name a server: those of `penstock serve`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def socket_path(config_file: Path | None, data_dir: str | None) -> Path:
    """Return the control socket of the server that runs with these options. End the process with an error.

    Only the two keys that matter are read: a file that was made wrong after the start must not keep operators away
    from the server.
    """
    folder, name = Path("penstock-data"), ControlSettings().socket
    if config_file is not None:
        try:
            table = parse_table(config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            if data_dir is None:
                raise click.ClickException(f"{config_file}: {exc}") from exc
            table = {}
        folder = config_file.absolute().parent / str(table.get("data_dir", folder))
        control = table.get("control")
        name = str(control.get("socket", name)) if isinstance(control, dict) else name
    if not name:
        raise click.ClickException('control.socket is "": this server has no control socket')
    return Path(data_dir or folder).absolute() / name


def ask(path: Path, verb: str, *, seconds: float | None = _TIMEOUT, **arguments: Any) -> Any:
    """Return the result of a request. `seconds` is how long the answer may take; None waits as long as it takes.

    Raise ServerError.
    """
    request = msgspec.json.encode({"verb": verb, "number": 1, "arguments": arguments}) + b"\n"
    try:
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as sock:
            sock.settimeout(seconds)
            sock.connect(str(path))
            sock.sendall(request)
            answer = _read_line(sock)
    except (FileNotFoundError, ConnectionRefusedError) as exc:
        raise ServerError(f"no server is running: {path}: {exc.strerror}") from exc
    except TimeoutError as exc:
        raise ServerError(f"the server did not answer within {seconds:g} seconds") from exc
    except OSError as exc:
        raise ServerError(f"{path}: {exc.strerror or exc}") from exc
    try:
        fields = msgspec.json.decode(answer, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as exc:
        raise ServerError("the server has ended") from exc
    if fields.get("error"):
        raise ServerError(fields["error"])
    return fields.get("result")


def _read_line(sock: socket.socket) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        data = sock.recv(1 << 20)
        if not data or len(line) > _MOST_OCTETS:
            break
        line += data
    return bytes(line)
