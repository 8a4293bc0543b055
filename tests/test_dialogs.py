"""Every dialog, played three ways against a whole connection."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest
import trio
import trio.testing

from penstock.message import MailParameters, Message, Recipient
from penstock.message import Path as MailPath
from penstock.net._poller import Poller
from penstock.net.stream import SocketStream, watch_sockets
from penstock.reply import Reply
from penstock.server.connection import Connection
from penstock.transaction import Peer, Transaction
from tests.dialog import SPLITTERS, Client, Splitter, octet_by_octet, play, read_dialog
from tests.helpers import PEER, FakeWorker, Recorder, listener_of

DIALOGS = sorted((Path(__file__).parent / "dialogs").glob("*.smtp"))


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
    hook = settings.pop("hooks", None)
    listener = listener_of(settings, delivery, tmp_path, tls=server_tls, policies=[HOOKS[hook]()] if hook else [])
    client_end, server_end = trio.testing.memory_stream_pair()
    connection = Connection(server_end, PEER, listener, FakeWorker())
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            await play(dialog, Client(client_end, client_tls, split), delivery.delivered)
            await client_end.aclose()


TLS_DIALOGS = [path for path in DIALOGS if "tls.mode = " in path.read_text() and "tls.required" not in path.read_text()]


@pytest.mark.parametrize("way", ["poller", "trio"])
@pytest.mark.parametrize("path", [*TLS_DIALOGS, *DIALOGS[::10]], ids=lambda path: path.stem)
async def test_dialog_on_a_socket(
    path: Path, way: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, tmp_path: Path
) -> None:
    """The dialogs with TLS, and some others, on real sockets: there a session takes turns, and TLS is a layer."""
    dialog = read_dialog(path)
    settings = {key: value for key, value in dialog.settings.items() if key not in ("delivery", "hooks", "split")}
    if len(settings) + (dialog.settings.get("split") is not None) < len(dialog.settings):
        return  # told by its parts above
    delivery = Recorder()
    listener = listener_of(settings, delivery, tmp_path, tls=server_tls)
    left, right = socket.socketpair()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            poller = Poller() if way == "poller" else None
            if poller is not None:
                nursery.start_soon(watch_sockets, poller)
            connection = Connection(SocketStream.of(left, poller), PEER, listener, FakeWorker())
            client_end = SocketStream.of(right)
            nursery.start_soon(connection.run)
            await play(dialog, Client(client_end, client_tls, SPLITTERS["whole"]), delivery.delivered)
            await client_end.aclose()
            while poller is not None and len(poller):
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()


def test_there_are_enough_dialogs() -> None:
    assert len(DIALOGS) >= 150
    rules = [read_dialog(path).rule for path in DIALOGS]
    assert len(set(rules)) == len(rules)
