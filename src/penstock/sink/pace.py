"""A stream that reads and writes at a limited rate, or writes one octet at a time."""

from __future__ import annotations

from typing import Final

import trio

_INTERVAL: Final = 0.1
"""Seconds between two reads or writes at a limited rate."""
_PIECE: Final = 65_536


class PacedStream(trio.abc.Stream):
    """Another stream at a limited rate. Owns and closes that stream."""

    def __init__(
        self, stream: trio.abc.Stream, read_rate: int = 0, write_rate: int = 0, *, split: bool = False
    ) -> None:
        """Rates are octets per second, 0 for no limit; `split` sends every octet separately."""
        self.stream = stream
        self.read_rate = read_rate
        self.write_rate = write_rate
        self.split = split

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Receive, then wait for as long as the rate allows for that many octets."""
        if not self.read_rate:
            return await self.stream.receive_some(max_bytes)
        most = max(1, int(self.read_rate * _INTERVAL))
        data = await self.stream.receive_some(min(max_bytes or _PIECE, most))
        await trio.sleep(len(data) / self.read_rate)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send in pieces, and wait after each as the rate requires."""
        if not data:
            await self.stream.send_all(data)
            return
        piece = _PIECE
        if self.split:
            piece = 1
        elif self.write_rate:
            piece = max(1, int(self.write_rate * _INTERVAL))
        view = memoryview(data)
        for begin in range(0, len(view), piece):
            part = view[begin : begin + piece]
            await self.stream.send_all(part)
            if self.write_rate:
                await trio.sleep(len(part) / self.write_rate)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait for the other stream."""
        await self.stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Close the stream."""
        await self.stream.aclose()
