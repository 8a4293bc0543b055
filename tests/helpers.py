"""Server that tests put a connection together of: fakes at its ends, the real ones in between."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import trio

from penstock.assembly.listeners import Secrets, Shared, make_listener, own_domain
from penstock.auth.throttle import AuthThrottle
from penstock.config import ListenerSettings
from penstock.delivery.base import Delivery
from penstock.journal import Journal, JournalSettings
from penstock.message import Message, MessageIds
from penstock.policy.hooks import HookSettings
from penstock.policy.pipeline import Pipeline
from penstock.reply import DISK_FULL, Reply
from penstock.server.body import BodySettings, MemoryBudget
from penstock.server.connection import Connection
from penstock.server.domains import Domains
from penstock.server.limits import Admission, AdmissionSettings
from penstock.server.listener import Listener
from penstock.smtp.sasl import ChannelBinding, ScramKeys
from penstock.transaction import Peer, Transaction

PEER = Peer("192.0.2.1", 12345, "192.0.2.25", 25)
TRANSACTION = Transaction(PEER)
"""For deliveries that look at nothing of it."""


@dataclass
class Recorder(Delivery):
    """A delivery that keeps what it got, as texts; or refuses, or breaks."""

    kind: str = "keep"
    needs_body: bool = True
    delivered: list[dict[str, str]] = field(default_factory=list)

    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        if self.kind == "full":
            return DISK_FULL
        if self.kind == "broken":
            raise OSError("the disk is on fire")
        envelope = message.envelope
        self.delivered.append(
            {
                "sender": envelope.sender.text,
                "recipients": " ".join(str(recipient) for recipient in envelope.recipients),
                "body": b"".join(message.body.chunks()).decode("utf-8", "surrogateescape"),
                "body_type": envelope.body_type,
                "smtputf8": str(envelope.smtputf8),
                "ret": str(envelope.ret),
                "envid": str(envelope.envid),
                "auth": str(envelope.auth),
                "notify": ",".join(sorted(envelope.recipients[0].notify or ())),
                "orcpt": str(envelope.recipients[0].orcpt),
                "with": message.prefix.decode().partition(" with ")[2].partition(" id ")[0].rpartition(" with ")[2],
            }
        )
        return Reply(250, "2.0.0", f"Ok: kept as {message.id}")


class Alice:
    """An authenticator that knows alice, whose password is secret."""

    async def verify(self, name: str, password: str) -> bool:
        await trio.lowlevel.checkpoint()
        return (name, password) == ("alice", "secret")

    def scram_keys(self, name: str) -> ScramKeys:
        return ScramKeys(b"0123456789abcdef", b"s" * 32, name.encode().ljust(32)[:32], 4096)


class FakeWorker:
    """A worker that admits all clients (penstock.server.connection.Host)."""

    def __init__(self) -> None:
        self.connections: set[Connection] = set()
        self.admission = Admission(AdmissionSettings())
        self.is_stopping = False

    def ended(self, connection: Connection) -> None:
        self.connections.discard(connection)


def listener_of(
    settings: dict[str, Any],
    delivery: Delivery,
    folder: Path,
    *,
    tls: ssl.SSLContext | None = None,
    policies: Sequence[object] = (),
    journal: Journal | None = None,
    memory: int = 1 << 20,
) -> Listener:
    """Assemble the listener that the settings of a listener ask for, without TLS unless they say so."""
    (folder / "tmp").mkdir(exist_ok=True)
    settings = {"tls": {"mode": "none"}, **settings}
    domains = settings.pop("domains", None)
    wanted = msgspec.convert(settings, ListenerSettings)
    journal = journal or Journal(JournalSettings())
    asked = [(policy, HookSettings(hook=type(policy).__name__)) for policy in policies]
    shared = Shared(
        hostname="mx.example.org",
        domains=None if domains is None else Domains(domains),
        data_dir=folder,
        journal=journal,
        delivery=delivery,
        pipeline=Pipeline(asked, journal),
        throttle=AuthThrottle(AdmissionSettings()),
        body=BodySettings(),
        budget=MemoryBudget(memory),
        ids=MessageIds(),
        own_domain="" if domains is None else own_domain(Domains(domains), "mx.example.org"),
        authenticator=Alice() if wanted.auth else None,
        refuses_routing=True,
    )
    secrets = Secrets(tls if wanted.tls.mode != "none" else None, ChannelBinding("tls-server-end-point", b"x"))
    return make_listener(wanted, shared, secrets)


class Replies:
    """Reads replies from a stream."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._buffer = b""

    async def next(self) -> str:
        """Return the last line of the next reply; "" at the end."""
        while True:
            while b"\r\n" not in self._buffer:
                data = await self._stream.receive_some(65536)
                if not data:
                    return ""
                self._buffer += data
            line, _, self._buffer = self._buffer.partition(b"\r\n")
            if line[3:4] != b"-":
                return line.decode()
