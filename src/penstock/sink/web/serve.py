"""Serves the HTTP API in the trio loop of the sessions: hypercorn on sockets that were bound before."""

from __future__ import annotations

import re
import socket
from typing import Final, cast

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from hypercorn.typing import ASGIFramework

from penstock.net.listen import ListenAddress, bind, name_of
from penstock.sink.web.guard import App

_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{8,128}")


def check_token(address: ListenAddress, token: str | None) -> None:
    """Raise ValueError when an address needs a token and has none, or when it is of no use."""
    if token is None and not address.is_loopback:
        raise ValueError(f"{address} can be reached from other machines: it needs a token (PENSTOCK_WEB_TOKEN)")
    if token is not None and not _TOKEN.fullmatch(token):
        raise ValueError("a token is 8 to 128 letters, digits, - and _")


def bind_web(address: str, token: str | None) -> list[socket.socket]:
    """Bind the sockets of an address, "127.0.0.1:8025". Raise ValueError, OSError."""
    parsed = ListenAddress.parse(address)
    check_token(parsed, token)
    return bind(parsed)


def url_of(sock: socket.socket) -> str:
    """Return what to open in a browser."""
    return f"http://{name_of(sock)}/"


async def serve_web(app: App, sockets: list[socket.socket]) -> None:
    """Serve until cancelled. Closes the sockets."""
    config = Config()
    config.bind = [f"fd://{sock.detach()}" for sock in sockets]
    config.accesslog = None
    config.loglevel = "CRITICAL"
    config.include_server_header = False
    config.keep_alive_timeout = 15
    config.read_timeout = 15
    config.h11_max_incomplete_size = 32_768
    config.graceful_timeout = 0.5
    config.shutdown_timeout = 0.5
    config.websocket_max_message_size = 1024
    await serve(cast(ASGIFramework, app), config, shutdown_trigger=trio.sleep_forever)
