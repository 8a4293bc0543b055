"""What a test's server is put together of, beside what every server has."""

from __future__ import annotations

import hashlib
import hmac
import os
import shutil
import ssl
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import scramp
import trio

from penstock.delivery.base import Delivery
from penstock.message import Message
from penstock.reply import Reply
from penstock.sink.certificates import Certificates
from penstock.smtp.sasl import ScramKeys
from penstock.testing.inbox import Inbox, received
from penstock.transaction import Transaction

_NAMES: Final = ("localhost", "127.0.0.1", "::1")


class Authority:
    """A certificate authority, and the certificate it has made for the servers on this machine."""

    def __init__(self, folder: Path, names: Sequence[str] = _NAMES) -> None:
        """Make both, and put them into a folder that is used for nothing else. Raise OSError.

        `names` are the host names and addresses that clients call the server by.
        """
        self.certificates: Final = Certificates(names)
        """The authority itself, which also signs what a fault of TLS shows."""
        self.certificates.put(folder)
        self.ca_file: Final = folder / "ca.pem"
        """The authority as a PEM file: what clients have to trust."""
        self.certificate: Final = folder / "server.pem"
        """Chain and key of the server, in one PEM file."""

    def ssl_context(self) -> ssl.SSLContext:
        """Return a new context for a client that trusts this authority and no other, and checks the host name."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.ca_file)
        return context


def folder_for(owner: object) -> tuple[Path, Callable[[], object]]:
    """Make a folder that lives as long as its owner, or until what is returned beside it is called.

    A child of this process (os.fork) has a copy of the owner, whose end must not take the folder away.
    """
    folder = Path(tempfile.mkdtemp(prefix="penstock-test-"))
    return folder, weakref.finalize(owner, _remove, folder, os.getpid())


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


_authority_lock = threading.Lock()
_authority: Authority | None = None


def authority_of_process() -> Authority:
    """Return the authority that servers of this process have in common, made when it is first asked for."""
    global _authority  # noqa: PLW0603 - made once a process: certificates cost more than servers
    with _authority_lock:
        if _authority is None:
            folder, _ = folder_for(authority_of_process)
            _authority = Authority(folder)
        return _authority


class Users:
    """The authenticator of a test: passwords are compared, not hashed (penstock.auth.base)."""

    def __init__(self, users: Mapping[str, str]) -> None:
        self._passwords = dict(users)
        self._keys: dict[str, ScramKeys] = {}
        self._secret = os.urandom(32)

    async def verify(self, name: str, password: str) -> bool:
        """Say whether the password is that user's."""
        await trio.lowlevel.checkpoint()
        known = self._passwords.get(name)
        return known is not None and hmac.compare_digest(known.encode(), password.encode())

    def scram_keys(self, name: str) -> ScramKeys:
        """Return the keys of a user; for an unknown one, keys that no password fits."""
        if name not in self._passwords:
            invented = [hmac.digest(self._secret, text + name.encode(), hashlib.sha256) for text in (b"1", b"2", b"3")]
            return ScramKeys(invented[0][:16], invented[1], invented[2], 4096)
        if name not in self._keys:
            mechanism = scramp.ScramMechanism("SCRAM-SHA-256")
            self._keys[name] = ScramKeys(*mechanism.make_auth_info(self._passwords[name], iteration_count=4096))
        return self._keys[name]


class InboxDelivery(Delivery):
    """The delivery into an inbox. Its 250 promises that the test can see the message."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        """Put the message in the inbox, or refuse it with 452 when that is full."""
        return self._inbox.put(received(message, transaction))
