"""Serves the HTTP API in the trio loop of the sessions: hypercorn on sockets that were bound before.

The page shares its process with the sessions, so what a client of it can take has bounds, and none of them can hold up
the end of the sink:

    connections      100; those beyond hear 503
    a request head   15 s from the connection, or from the answer before it (hypercorn's keep_alive_timeout)
    a request body   262,144 octets, within 15 s (penstock.sink.web.guard)
    an answer        15 s for each 65,536 octets: hypercorn sends in a shielded scope, so the stream has to see to it

There is no time-out for the silence of a client as such (hypercorn's read_timeout): whoever follows /api/events has
nothing to say.
"""

from __future__ import annotations

import re
import socket
from typing import Final, cast

import msgspec
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState

from penstock.net.listen import ListenAddress, bind, name_of
from penstock.sink.web.guard import App

MOST_CONNECTIONS: Final = 100
"""Clients at a time: a browser opens up to six."""
_PATIENCE: Final = 15
"""Seconds for a request, and for each piece of an answer."""
_PIECE: Final = 65_536
_FAREWELL: Final = 1.0
"""Seconds in which a client that is turned away may read why."""
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


class _Client(trio.abc.HalfCloseableStream):
    """The connection of a client, which has to take what is sent to it in time."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket
        """Where hypercorn asks for the addresses."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send piece by piece. Raise BrokenResourceError when one of them takes too long."""
        view = memoryview(data)
        for at in range(0, len(view), _PIECE):
            with trio.move_on_after(_PATIENCE) as scope:
                await self._stream.send_all(view[at : at + _PIECE])
            if scope.cancelled_caught:
                raise trio.BrokenResourceError("the client does not read")

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is room."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive what there is."""
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_eof(self) -> None:
        """Send no more."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Close."""
        await self._stream.aclose()

    def close_nowait(self) -> None:
        """Close, whoever is sending or receiving."""
        self.socket.close()


class _Server(TCPServer):
    """Answers one client."""

    async def _read_data(self) -> None:
        """Read up to the end. The wait for a next request is over then: otherwise it would keep the connection."""
        await super()._read_data()
        await self.idle_task.stop()


class _Clients:
    """All clients of the page."""

    def __init__(self, app: App, most: int) -> None:
        self._app = ASGIWrapper(cast(ASGIFramework, app))
        self._config = _config()
        self._context = WorkerContext(None)
        self._most = most
        self._open: set[_Client] = set()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answer a client until it leaves, or turn it away."""
        client = _Client(stream)
        count = len(self._open)
        self._open.add(client)
        try:
            if count < self._most:
                # It wants a trio.SSLStream, but does with any stream that has a socket.
                await _Server(self._app, self._config, self._context, ConnectionState({}), client)  # type: ignore[arg-type]
            elif count < self._most * 2:
                await self._turn_away(client)
        except Exception:  # noqa: BLE001, S110 - what a client can make hypercorn stumble over costs this client only
            pass
        finally:
            self._open.discard(client)
            client.close_nowait()

    async def _turn_away(self, client: _Client) -> None:
        """Say that there are too many. What the client has to say is read: closing on it would reset the connection."""
        body = msgspec.json.encode({"error": f"this page has {self._most} connections, and no room for more"})
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nretry-after: 5\r\nconnection: close"
        with trio.move_on_after(_FAREWELL):
            await client.send_all(f"HTTP/1.1 503 Service Unavailable\r\n{head}\r\n\r\n".encode() + body)
            await client.send_eof()
            while await client.receive_some(_PIECE):
                pass

    def close(self) -> None:
        """Close all connections, those among them that wait in a shielded scope."""
        for client in list(self._open):
            client.close_nowait()


def _config() -> Config:
    config = Config()
    config.accesslog = None
    config.loglevel = "CRITICAL"
    config.include_server_header = False
    config.keep_alive_timeout = _PATIENCE
    config.h11_max_incomplete_size = 32_768
    config.websocket_max_message_size = 1024
    return config


async def serve_web(app: App, sockets: list[socket.socket], *, most: int = MOST_CONNECTIONS) -> None:
    """Serve at most so many clients at a time, until cancelled. Closes the sockets."""
    clients = _Clients(app, most)
    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in sockets]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, clients.serve, listeners)
        try:
            await trio.sleep_forever()
        finally:
            clients.close()
