"""A milter that does what a test tells it: the filter's side of the protocol, from libmilter's documentation."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

CONTINUE: Final = b"c"


def answer(code: bytes, *parts: bytes) -> bytes:
    """Return a packet."""
    data = code + b"".join(parts)
    return struct.pack("!I", len(data)) + data


class FakeMilter:
    """Answers each command with the packets that `answers` has for it or its code, otherwise with CONTINUE."""

    def __init__(self, steps: int = 0, answers: Mapping[bytes, bytes] | None = None, *, keeps: bool = True) -> None:
        """`steps` are those that it asks for; `keeps`: it goes on after QUIT_NC."""
        self.steps = steps
        self._agreed = 0
        self.answers = dict(answers or {})
        self.keeps = keeps
        self.probes = 0
        """Connections on which it was asked whether it takes another client."""
        self.seen: list[bytes] = []
        """All commands, with their data."""
        self.connections = 0
        self.break_at = b""
        """The command that it does not answer, and what it does instead: see `serve`."""
        self.breaks = ""
        self.address = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Serve; yield the address."""
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listeners[0].socket.getsockname()[1]
            nursery.start_soon(trio.serve_listeners, self.serve, listeners)
            self.address = f"inet:127.0.0.1:{port}"
            yield self.address
            nursery.cancel_scope.cancel()

    async def serve(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await self._serve(stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        buffer = bytearray()
        async with stream:
            while True:
                while len(buffer) < 4 or len(buffer) < 4 + struct.unpack_from("!I", buffer)[0]:
                    data = await stream.receive_some(65_536)
                    if not data:
                        return
                    buffer += data
                end = 4 + struct.unpack_from("!I", buffer)[0]
                code, command = bytes(buffer[4:5]), bytes(buffer[4:end])
                del buffer[:end]
                self.seen.append(command)
                if not await self._answer(stream, code, command):
                    return

    async def _answer(self, stream: trio.SocketStream, code: bytes, command: bytes) -> bool:
        if code == self.break_at:
            if self.breaks == "hang":
                await trio.sleep_forever()
            if self.breaks == "cut":
                await stream.send_all(b"\0\0\0\x09y55")
            if self.breaks == "nonsense":
                await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                await trio.sleep_forever()
            if self.breaks == "progress":
                while True:
                    await stream.send_all(answer(b"p"))
                    await trio.sleep(1)
            return False
        if code == b"O":
            (offered,) = struct.unpack_from("!I", command, 9)
            self._agreed = self.steps & (offered | ~0x1FF7FF)
            await stream.send_all(answer(b"O", struct.pack("!III", 6, 0x1FF, self._agreed)))
        elif code == b"K":
            self.probes += self.commands()[-3:] == b"OCK"
            return self.keeps
        elif code not in b"DAQ" and not self._is_silent(code):
            await stream.send_all(self.answers.get(command, self.answers.get(code, answer(CONTINUE))))
        return code != b"Q"

    def _is_silent(self, code: bytes) -> bool:
        bits = {b"C": 0x1000, b"H": 0x2000, b"M": 0x4000, b"R": 0x8000, b"T": 0x10000, b"L": 0x80, b"N": 0x40000}
        return bool(self._agreed & bits.get(code, 0x80000 if code == b"B" else 0))

    def commands(self) -> bytes:
        """Return the codes of what it has seen, without macros."""
        return b"".join(each[:1] for each in self.seen if each[:1] != b"D")
