"""A proxy that cuts connections, by a random seed: within a line, within a body, between a final dot and its reply."""

from __future__ import annotations

import random
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

_RESET = struct.pack("ii", 1, 0)
Cut = Literal["never", "client", "server", "reply"]


@dataclass
class _Link:
    """A connection through the proxy, and where it is cut."""

    client: socket.socket
    server: socket.socket
    cut: Cut
    """`client`, `server`: after `left` octets from there; `reply`: when the reply to a final dot comes back."""
    left: int
    is_reset: bool
    texts: int = 0
    tail: bytes = b""
    ends: set[socket.socket] = field(default_factory=set)

    def passes(self, source: socket.socket, data: bytes) -> bool:
        """Return whether data may pass; otherwise the connection is cut."""
        side = "client" if source is self.client else "server"
        if side == "client":
            self.texts += (self.tail + data).count(b"\r\n.\r\n") - self.tail.count(b"\r\n.\r\n")
            self.tail = (self.tail + data)[-4:]
        if self.cut == "reply":
            return side == "client" or self.texts <= self.left
        if self.cut == side:
            self.left -= len(data)
            return self.left > 0
        return True


class CuttingProxy:
    """Forwards octets between clients and a server, and cuts half of the connections. A context manager."""

    def __init__(self, server_port: int, seed: int) -> None:
        self._server_port = server_port
        self._rng = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.moments: list[float] = []
        """When connections were cut, in seconds since the epoch."""
        self._is_cutting = True
        self._is_over = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def stop_cutting(self) -> None:
        """Let all connections live from now on."""
        self._is_cutting = False

    def _run(self) -> None:
        while not self._is_over.is_set():
            for key, _ in self._selector.select(timeout=0.1):
                if key.data is None:
                    self._accept()
                else:
                    self._forward(key.fileobj, key.data)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self._server_port), timeout=5)
        except OSError:
            client.close()
            return
        rng = self._rng
        cut: Cut = rng.choice(["never", "never", "client", "server", "reply"])
        left = {"client": rng.randrange(1, 200_000), "server": rng.randrange(1, 2_000), "reply": rng.randrange(5)}
        link = _Link(client, server, cut, left.get(cut, 0), rng.random() < 0.5)
        for sock in (client, server):
            sock.settimeout(10)  # both ends read: sending does not block for long
            self._selector.register(sock, selectors.EVENT_READ, link)

    def _forward(self, source: object, link: _Link) -> None:
        assert isinstance(source, socket.socket)
        target = link.server if source is link.client else link.client
        try:
            data = source.recv(65_536)
            if not data:
                target.shutdown(socket.SHUT_WR)
                self._selector.unregister(source)
                link.ends.add(source)
                if len(link.ends) == 2:
                    link.client.close()
                    link.server.close()
                return
            if self._is_cutting and not link.passes(source, data):
                self._cut(link)
                return
            target.sendall(data)
        except OSError:
            self._cut(link)

    def _cut(self, link: _Link) -> None:
        self.moments.append(time.time())
        for sock in (link.client, link.server):
            if sock in self._selector.get_map():
                self._selector.unregister(sock)
            if link.is_reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sock.close()
