"""How a gateway ends while the cluster is mute: it accepts connections, or answers PING, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import pytest
import trio
from bench.nats_servers import NatsServers

from penstock.cluster.setup import make_layout
from penstock.cluster.writer import Writer
from tests.cluster.nodes import PATIENCE, NextHop, gateway, made, next_hop, node_of, owns, send
from tests.contracts.delivery import make_message


class MuteProxy:
    """Forwards to a server of NATS until a client sends a given text; then clients get no message any more."""

    def __init__(self, port: int) -> None:
        self.trigger = b""
        """What to wait for; nothing if it is empty."""
        self.is_mute = trio.Event()
        self._port = port

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Run for the length of an `async with`; give the URL."""
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, self._serve, [listener])
            yield f"nats://127.0.0.1:{listener.socket.getsockname()[1]}"
            nursery.cancel_scope.cancel()

    def mute(self) -> None:
        self.is_mute.set()

    async def _serve(self, client: trio.SocketStream) -> None:
        try:
            async with await trio.open_tcp_stream("127.0.0.1", self._port) as server, trio.open_nursery() as nursery:
                nursery.start_soon(self._send, client, server)
                await self._receive(server, client)
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def _send(self, client: trio.SocketStream, server: trio.SocketStream) -> None:
        seen = b""
        """The last octets, which may be the begin of the trigger."""
        async for data in client:
            seen += data
            if self.trigger and self.trigger in seen:
                self.mute()
            seen = seen[max(0, len(seen) - len(self.trigger) + 1) :]
            await server.send_all(bytes(data))

    async def _receive(self, server: trio.SocketStream, client: trio.SocketStream) -> None:
        """Pass on what a server sends: INFO and PONG for ever, messages until the client is cut off."""
        rest = b""
        async for data in server:
            rest += data
            while (end := rest.find(b"\r\n")) >= 0:
                line = rest[: end + 2]
                is_message = line.startswith((b"MSG ", b"HMSG "))
                length = len(line) + (int(line.split()[-1]) + 2 if is_message else 0)
                if len(rest) < length:
                    break
                if not (is_message and self.is_mute.is_set()):
                    await client.send_all(rest[:length])
                rest = rest[length:]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything wait for the cluster for longer than any test, so that only the end of the node ends it."""
    for name in ("queue._TIMEOUT", "queue._RECORDING", "queue._REPORT_PATIENCE", "jetstream._TIMEOUT"):
        monkeypatch.setattr(f"penstock.cluster.{name}", PATIENCE + 20)
    monkeypatch.setattr("penstock.cluster.leases._TIMEOUT", PATIENCE + 20)
    monkeypatch.setattr("penstock.cluster.node._ENDING", 0.0)
    monkeypatch.setattr("penstock.cluster.node._RELEASING", 0.1)
    monkeypatch.setattr("penstock.relay.recorder._FIRST_PAUSE", 0.0)


@contextmanager
def ending() -> Iterator[None]:
    """Fail if a gateway does not end; what is shielded is not cancelled."""
    with trio.move_on_after(PATIENCE) as scope:
        yield
    assert trio.current_time() < scope.deadline


STATES = {
    "loading": b"CONSUMER.CREATE",
    "claiming": b"HPUB $KV.%s-lease.",
    "publishing": b"HPUB %s.m.",
    "fetching": b"DIRECT.GET.%s-MAIL",
    "recording": b"STREAM.MSG.DELETE.%s-MAIL",
    "renewing": b"HPUB $KV.%s-lease.",
    "following": b"HPUB %s.o.",
    "releasing": b"",
}


@pytest.mark.parametrize("state", STATES)
async def test_a_gateway_ends_while_jetstream_is_mute(servers: NatsServers, tmp_path: Path, state: str) -> None:
    hop = NextHop()
    async with made(servers, tmp_path, partitions=1, lease=6) as (jetstream, settings), next_hop(tmp_path, hop) as url:
        trigger = STATES[state] % settings.name.encode() if b"%s" in STATES[state] else STATES[state]
        proxy = MuteProxy(servers.client[0])
        async with proxy.running() as address:
            behind = msgspec.structs.replace(settings, servers=(address,))
            if state in ("loading", "claiming"):
                proxy.trigger = trigger
            with ending():
                async with gateway(tmp_path, behind, url, "g1") as server, trio.open_nursery() as nursery:
                    if state not in ("loading", "claiming"):
                        await owns(server, 1)
                    proxy.trigger = trigger
                    if state in ("publishing", "recording"):
                        nursery.start_soon(send, server, "text")
                    elif state == "fetching":
                        message = make_message(b"Subject: test\r\n\r\ntext")
                        await Writer(jetstream, make_layout(settings)).write(message, 0, patience=10)
                        node_of(server).queue._wake.set()
                    elif state == "releasing":
                        proxy.mute()
                    await proxy.is_mute.wait()


async def test_a_gateway_ends_while_it_waits_for_info(servers: NatsServers, tmp_path: Path) -> None:
    asked = trio.Event()

    async def accept(_: trio.SocketStream) -> None:
        asked.set()
        await trio.sleep_forever()

    async with made(servers, tmp_path) as (_, settings), trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, accept, [listener])
        port = listener.socket.getsockname()[1]
        behind = msgspec.structs.replace(settings, servers=(f"nats://127.0.0.1:{port}",))
        with ending():
            async with gateway(tmp_path, behind, "smtp://127.0.0.1:1", "g1"):
                await asked.wait()
        nursery.cancel_scope.cancel()
