"""Gateways of a cluster in the loop of a test, and a next hop that notes what it gets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import trio
from bench.nats_servers import NatsServers

from penstock.app import Overrides, Server, open_server
from penstock.cluster.jetstream import JetStream
from penstock.cluster.node import Node
from penstock.cluster.settings import JetStreamSettings
from penstock.cluster.setup import SetupError, connected, make_streams
from penstock.config import Settings, from_table
from penstock.delivery.base import Delivery
from penstock.delivery.jetstream import JetStreamDelivery
from penstock.message import Message, Recipient
from penstock.policy.base import ACCEPT, Verdict
from penstock.reply import Reply
from penstock.transaction import Transaction

_names: Final = itertools.count()
PATIENCE: Final = 180.0
"""Seconds after which a test gives up."""


@dataclass
class NextHop(Delivery):
    """Counts messages by recipient and the first line of their body; sends the configured replies."""

    replies: dict[str, Reply] = field(default_factory=dict)
    """What to say to a recipient instead of 250."""
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    """What was accepted."""
    waits: trio.Event | None = None
    """Messages wait for it."""
    begun: int = 0
    """Messages that came, and recipients."""
    asked: int = 0
    changed: trio.Event = field(default_factory=trio.Event)

    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        self.begun += 1
        self._change()
        if self.waits is not None:
            await self.waits.wait()
        text = b"".join(message.body.chunks()).partition(b"\r\n\r\n")[2].split(b"\r\n")[0].decode()
        self.seen.update((recipient.path.text, text) for recipient in message.envelope.recipients)
        self._change()
        return Reply(250, "2.0.0", "Ok")

    async def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> Verdict:
        reply = self.replies.get(recipient.path.text)
        self.asked += 1
        self._change()
        return ACCEPT if reply is None else reply

    def _change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something is so, whenever a message has come."""
        with trio.fail_after(PATIENCE):
            while not condition():
                await self.changed.wait()


@asynccontextmanager
async def made(servers: NatsServers, folder: Path, **values: Any) -> AsyncIterator[tuple[JetStream, JetStreamSettings]]:
    """Make streams, and give a connection of its own, and the settings."""
    table = {
        "servers": servers.urls,
        "monitors": servers.monitors,
        "name": f"test{next(_names)}",
        "partitions": 4,
        "lease": 3.0,
        "patience": 2.0,
        "max_octets": 64 << 20,
        **values,
    }
    settings = msgspec.convert(table, JetStreamSettings)
    async with connected(settings, folder) as jetstream:
        await _make_streams(jetstream, settings)
        yield jetstream, settings


async def _make_streams(jetstream: JetStream, settings: JetStreamSettings) -> None:
    """Make the streams once all servers are there: an earlier test may have restarted one."""
    with trio.fail_after(60):
        while True:
            try:
                await make_streams(jetstream, settings)
            except SetupError as exc:
                if "no suitable peers" not in str(exc):
                    raise
                await trio.sleep(0.1)
            else:
                return


@asynccontextmanager
async def next_hop(folder: Path, hop: NextHop) -> AsyncIterator[str]:
    """Run the next hop; give its URL."""
    settings = from_table(
        {
            "hostname": "hop.example.org",
            "data_dir": str(folder / "hop"),
            "listener": [{"address": "127.0.0.1:0", "tls": {"mode": "none"}}],
            "journal": {"events": "none"},
        }
    )
    async with open_server(settings, overrides=Overrides(delivery=hop, policies=[hop])) as server:
        yield f"smtp://{server.addresses[0]}"


def gateway_settings(folder: Path, jetstream: JetStreamSettings, url: str, node: str, **more: Any) -> Settings:
    """Return the settings of a gateway."""
    return from_table(
        {
            "hostname": f"{node}.example.org",
            "data_dir": str(folder / node),
            "listener": [{"address": "127.0.0.1:0", "tls": {"mode": "none"}, "max_size": 0}],
            "delivery": {"kind": "jetstream"},
            "jetstream": {**msgspec.to_builtins(jetstream), "node": node},
            "route": [{"next_hop": url}],
            "journal": {"events": "errors"},
            "relay": {"retry": {"schedule": [600]}},
            **more,
        }
    )


@asynccontextmanager
async def gateway(
    folder: Path, jetstream: JetStreamSettings, url: str, node: str, **more: Any
) -> AsyncIterator[Server]:
    """Run a gateway of the cluster."""
    async with open_server(gateway_settings(folder, jetstream, url, node, **more)) as server:
        yield server


def node_of(server: Server) -> Node:
    """Return the node of a gateway."""
    assert isinstance(server.delivery, JetStreamDelivery)
    found = server.delivery._cluster
    assert isinstance(found, Node)
    return found


async def until(condition: Callable[[], object]) -> None:
    """Wait until something is so, without an event."""
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 - it has none
            await trio.sleep(0.01)


async def owns(server: Server, count: int) -> None:
    """Wait until a gateway relays this many partitions."""
    await until(lambda: len(node_of(server).queue.owned) == count)


async def rows(server: Server) -> list[tuple[str, int, int, float]]:
    """Return address, state, attempts and due time of the recipients in the index of a gateway."""

    def read(store: Any) -> list[tuple[str, int, int, float]]:
        found = store._database.execute("SELECT address, state, attempts, due_at FROM recipient ORDER BY address")
        return [tuple(row) for row in found.fetchall()]

    return await node_of(server).queue._committer.do(read)


async def send(server: Server, text: str, *, to: tuple[str, ...] = ("b@example.org",), size: int = 0) -> str:
    """Send a message, and return the reply to its data, or to the first command that was refused."""
    host, port = server.addresses[0].rsplit(":", 1)
    async with await trio.open_tcp_stream(host, int(port)) as stream:

        async def say(*lines: str) -> str:
            if lines:
                await stream.send_all("".join(f"{line}\r\n" for line in lines).encode())
            received = b""
            while not received.endswith(b"\n") or received.split(b"\r\n")[-2][3:4] == b"-":
                received += await stream.receive_some()
            return received.decode().strip()

        await say()
        for command in (
            "EHLO client.example.com",
            "MAIL FROM:<a@example.com>",
            *(f"RCPT TO:<{each}>" for each in to),
            "DATA",
        ):
            answer = await say(command)
            if answer[0] not in "23":
                return answer
        return await say("Subject: test", "", text, *["x" * 70] * (size // 72), ".")
