"""Every dialog, played three ways against a whole connection."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
import trustme

from penstock.assemble import Secrets, Shared, make_gate, make_offer
from penstock.config import ListenerSettings
from penstock.inbound.body import BodySettings, MemoryBudget
from penstock.inbound.connection import Connection
from penstock.inbound.gate import Domains, Gate
from penstock.inbound.limits import AdmissionSettings, AuthThrottle
from penstock.journal import Journal, JournalSettings
from penstock.message import Message, MessageIds, Recipient
from penstock.message import Path as MailPath
from penstock.policy.hooks import HookSettings
from penstock.policy.pipeline import Pipeline
from penstock.reply import DISK_FULL, Reply
from penstock.smtp.sasl import ChannelBinding, ScramKeys
from penstock.transaction import MailParameters, Peer, Transaction
from tests.dialog import SPLITTERS, Client, Splitter, octet_by_octet, play, read_dialog

DIALOGS = sorted((Path(__file__).parent / "dialogs").glob("*.smtp"))


@dataclass
class Recorder:
    """A delivery that keeps what it got, as texts; or refuses, or breaks."""

    kind: str = "keep"
    needs_body: bool = True
    delivered: list[dict[str, str]] = field(default_factory=list)

    async def start(self) -> None:
        """Nothing to open."""

    async def aclose(self) -> None:
        """Nothing to close."""

    async def accept(self, message: Message) -> Reply:
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


class RefusesConnect:
    def on_connect(self, peer: Peer, listener: str) -> Reply | None:
        return Reply(554, "5.7.1", "Not from you")


class RefusesHelo:
    async def on_helo(self, transaction: Transaction, name: str) -> Reply | None:
        return Reply(550, "5.7.1", "Not this name") if name == "bad.example" else None


class RefusesMail:
    def on_mail(self, transaction: Transaction, sender: MailPath, parameters: MailParameters) -> Reply | None:
        return Reply(550, "5.7.1", "Not this sender") if sender.local == "bad" else None


class RefusesRcpt:
    async def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> Reply | None:
        await trio.lowlevel.checkpoint()
        return {
            "bad": Reply(550, "5.1.1", "No such user"),
            "later": Reply(450, "4.2.1", "Later"),
            "good": Reply(250, "2.1.5", "Welcome"),
        }[recipient.path.local]


class RefusesMessage:
    def on_message(self, transaction: Transaction, message: Message) -> Reply | None:
        is_spam = b"spam" in b"".join(message.body.chunks())
        return Reply(554, "5.7.1", "Not this message") if is_spam else None


class RefusesAuth:
    def on_auth(self, transaction: Transaction, identity: str, mechanism: str) -> Reply | None:
        return Reply(535, "5.7.8", "Not you")


class Throws:
    def on_mail(self, transaction: Transaction, sender: MailPath, parameters: MailParameters) -> Reply | None:
        raise LookupError("the database is gone")


HOOKS: dict[str, type] = {
    "connect": RefusesConnect,
    "helo": RefusesHelo,
    "mail": RefusesMail,
    "rcpt": RefusesRcpt,
    "message": RefusesMessage,
    "auth": RefusesAuth,
    "throws": Throws,
}


class Host:
    """A worker with room for everybody."""

    is_stopping = False

    def admit(self, peer: Peer) -> Reply | None:
        return None

    def release(self, peer: Peer) -> None:
        pass


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


@pytest.fixture(scope="session")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", key_type=trustme.KeyType.ECDSA).configure_cert(context)
    return context


@pytest.fixture(scope="session")
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def gate_of(settings: dict[str, Any], delivery: Recorder, tls: ssl.SSLContext, folder: Path) -> Gate:
    """Assemble the gate that the settings of a dialog ask for, with recorders at its ends."""
    settings = {"tls": {"mode": "none"}, **settings}
    domains = settings.pop("domains", None)
    hook = settings.pop("hooks", None)
    listener = msgspec.convert(settings, ListenerSettings)
    journal = Journal(JournalSettings())
    policies = [(HOOKS[hook](), HookSettings(hook=hook))] if hook else []
    shared = Shared(
        hostname="mx.example.org",
        domains=None if domains is None else Domains(domains),
        data_dir=folder,
        journal=journal,
        delivery=delivery,
        pipeline=Pipeline(policies, journal),
        throttle=AuthThrottle(AdmissionSettings()),
        body=BodySettings(),
        budget=MemoryBudget(1 << 20),
        ids=MessageIds(),
    )
    assert make_offer(listener, "mx.example.org").hostname == "mx.example.org"
    secrets = Secrets(tls if listener.tls.mode != "none" else None, ChannelBinding("tls-server-end-point", b"x"))
    return make_gate(listener, shared, secrets, Alice() if listener.auth else None)


@pytest.mark.parametrize("split", SPLITTERS.values(), ids=SPLITTERS)
@pytest.mark.parametrize("path", DIALOGS, ids=lambda path: path.stem)
async def test_dialog(
    path: Path, split: Splitter, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, tmp_path: Path
) -> None:
    dialog = read_dialog(path)
    settings = dict(dialog.settings)
    if settings.pop("split", "") == "whole" and split is octet_by_octet:
        split = SPLITTERS["whole"]  # a rule about what comes in one piece
    delivery = Recorder(settings.pop("delivery", "keep"))
    client_end, server_end = trio.testing.memory_stream_pair()
    peer = Peer("192.0.2.1", 12345, "192.0.2.25", 25)
    connection = Connection(server_end, peer, gate_of(settings, delivery, server_tls, tmp_path), Host())
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            await play(dialog, Client(client_end, client_tls, split), delivery.delivered)
            await client_end.aclose()


def test_there_are_enough_dialogs() -> None:
    assert len(DIALOGS) >= 150
    rules = [read_dialog(path).rule for path in DIALOGS]
    assert len(set(rules)) == len(rules)
