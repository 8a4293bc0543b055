"""A name server on the loopback, by UDP and TCP on one port, that answers as a test wants it to."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import dns.exception
import msgspec
import trio

from penstock.dns import Resolver, ResolverSettings
from tests.net.nameserver import Zone

Reply = Callable[[bytes], list[bytes]]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Lying:
    """What the server says: by default what the zone holds."""

    zone: Zone = field(default_factory=Zone)
    udp: Reply | None = None
    """Query -> datagrams."""
    tcp: Reply | None = None
    """Query -> pieces of the stream, with the length octets."""
    asked_tcp: int = 0
    clients: list[Any] = field(default_factory=list)
    """The addresses queries came from."""

    def answer_udp(self, wire: bytes) -> list[bytes]:
        if self.udp is not None:
            return self.udp(wire)
        try:
            answer = self.zone.answer(wire)
        except dns.exception.TooBig:
            return [truncated(wire)]
        return [] if answer is None else [answer]

    def answer_tcp(self, wire: bytes) -> list[bytes]:
        self.asked_tcp += 1
        if self.tcp is not None:
            return self.tcp(wire)
        answer = self.zone.answer(without_edns(wire)) or b""  # whose size has no limit
        return [len(answer).to_bytes(2, "big"), answer]


def without_edns(query: bytes) -> bytes:
    return query[:10] + b"\0\0" + query[12:-11]


def truncated(query: bytes) -> bytes:
    """Return a truncated response to a query."""
    return query[:2] + b"\x83\x80" + without_edns(query)[4:]


async def bind(port: int) -> tuple[trio.socket.SocketType, trio.socket.SocketType]:
    """Return a UDP socket and a listening TCP socket with one port number."""
    while True:
        udp = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await udp.bind(("127.0.0.1", port))
        listener = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            await listener.bind(udp.getsockname())
        except OSError:  # the TCP port is in use: another try
            udp.close()
            listener.close()
            if port:
                raise
        else:
            listener.listen()
            return udp, listener


@asynccontextmanager
async def serving(lying: Lying, port: int = 0) -> AsyncIterator[int]:
    """Answer until the end of the block; yield the port."""
    udp, listener = await bind(port)
    port = udp.getsockname()[1]

    async def serve_udp() -> None:
        while True:
            wire, client = await udp.recvfrom(4096)
            lying.clients.append(client)
            for datagram in lying.answer_udp(wire):
                await udp.sendto(datagram, client)

    async def serve_tcp() -> None:
        while True:
            connection, _ = await listener.accept()
            # A client that is given nonsense leaves early.
            with suppress(trio.BrokenResourceError):
                stream = trio.SocketStream(connection)
                size = int.from_bytes(await stream.receive_some(2), "big")
                for piece in lying.answer_tcp(bytes(await stream.receive_some(size))) if size else ():
                    await stream.send_all(piece)
            connection.close()

    with udp, listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_udp)
            nursery.start_soon(serve_tcp)
            yield port
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def running(resolver: Resolver) -> AsyncIterator[Resolver]:
    """Run a resolver until the end of the block."""
    async with trio.open_nursery() as nursery:
        await nursery.start(resolver.run)
        yield resolver
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def resolving(*servers: Lying, clock: Clock | None = None, **settings: Any) -> AsyncIterator[Resolver]:
    """Run a resolver that asks these servers."""
    async with trio.open_nursery() as nursery:
        ports: list[int] = []

        async def serve(lying: Lying, *, task_status: trio.TaskStatus[None]) -> None:
            async with serving(lying) as port:
                ports.append(port)
                task_status.started()
                await trio.sleep_forever()

        for lying in servers:
            await nursery.start(serve, lying)
        given = msgspec.structs.replace(
            ResolverSettings(servers=tuple(f"127.0.0.1:{port}" for port in ports)), **settings
        )
        async with running(Resolver(given, clock=clock or Clock(), probe_interval=0.01)) as resolver:
            yield resolver
        nursery.cancel_scope.cancel()


def zone_of(*lines: str, **fields: Any) -> Zone:
    """Return a zone of lines such as "example.org MX 10 mx.example.org."."""
    zone = Zone(**fields)
    for line in lines:
        name, kind, record = line.split(" ", 2)
        zone.add(name, kind, record)
    return zone
