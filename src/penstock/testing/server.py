"""A real Penstock in the test's own process, in a thread with a loop of its own.

The thread makes it work for every kind of test: one without a loop may block in smtplib, and one in trio or asyncio
shares nothing with the server but the inbox and the socket. The test's thread assembles the worker and binds its
sockets, so that what is wrong with the arguments is raised there; the server's thread only runs it.
"""

from __future__ import annotations

import atexit
import hashlib
import hmac
import os
import shutil
import ssl
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import msgspec
import scramp
import trio

from penstock.assemble import Given, assemble
from penstock.config import Settings, from_table
from penstock.inbound.connection import Connection
from penstock.inbound.server import Door
from penstock.message import Message, MessageId
from penstock.net.tls import GeneratedCertificate, generated_certificate
from penstock.reply import Reply
from penstock.smtp.sasl import ScramKeys
from penstock.testing.dialog import Dialog, NotedJournal, NotedSession
from penstock.testing.inbox import Inbox, received
from penstock.testing.thread import WorkerThread
from penstock.transaction import Transaction

_NAMES: Final = ("localhost", "127.0.0.1", "::1")
_MOST_GRACE: Final = 20.0
_SHOWN_LINES: Final = 60
_SHOWN_MESSAGES: Final = 20
_LINES_IN_ERRORS: Final = 12


class Authority:
    """A certificate authority, and the certificate it has made for the servers on this machine."""

    def __init__(self, folder: Path, names: Sequence[str] = _NAMES) -> None:
        """Make both in the folder, or take what another process has made there. Raise OSError.

        `names` are the host names and addresses that clients call the server by.
        """
        self.made: GeneratedCertificate = generated_certificate(folder, names)

    @property
    def ca_file(self) -> Path:
        """The authority as a PEM file: what clients have to trust."""
        return self.made.ca_file

    def ssl_context(self) -> ssl.SSLContext:
        """Return a new context for a client that trusts this authority and no other, and checks the host name."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.ca_file)
        return context


_authority_lock = threading.Lock()
_authority: Authority | None = None


def authority_of_process() -> Authority:
    """Return the authority that servers of this process have in common, made when it is first asked for."""
    global _authority  # noqa: PLW0603 - made once a process: certificates cost more than servers
    with _authority_lock:
        if _authority is None:
            folder = tempfile.mkdtemp(prefix="penstock-authority-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            _authority = Authority(Path(folder))
        return _authority


class _Users:
    """The authenticator of a test: passwords are compared, not hashed (penstock.auth.base)."""

    def __init__(self, users: Mapping[str, str]) -> None:
        self._passwords = dict(users)
        self._keys: dict[str, ScramKeys] = {}
        self._secret = os.urandom(32)

    async def verify(self, name: str, password: str) -> bool:
        await trio.lowlevel.checkpoint()
        known = self._passwords.get(name)
        return known is not None and hmac.compare_digest(known.encode(), password.encode())

    def scram_keys(self, name: str) -> ScramKeys:
        if name not in self._passwords:
            invented = [hmac.digest(self._secret, text + name.encode(), hashlib.sha256) for text in (b"1", b"2", b"3")]
            return ScramKeys(invented[0][:16], invented[1], invented[2], 4096)
        if name not in self._keys:
            mechanism = scramp.ScramMechanism("SCRAM-SHA-256")
            self._keys[name] = ScramKeys(*mechanism.make_auth_info(self._passwords[name], iteration_count=4096))
        return self._keys[name]


class _InboxDelivery:
    """The delivery into an inbox (penstock.delivery.base). Its 250 promises that the test can see the message."""

    needs_body = True

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self.arriving: dict[MessageId, Transaction] = {}
        """The transactions of messages on their way here: what came with them beside the envelope."""

    async def start(self) -> None:
        """Do nothing."""

    async def accept(self, message: Message) -> Reply:
        """Put the message in the inbox, or refuse it with 452 when that is full."""
        return self._inbox.put(received(message, self.arriving[message.id]))

    async def aclose(self) -> None:
        """Do nothing."""


def _kind_of_connection(delivery: _InboxDelivery, dialog: Dialog, ended: Callable[[], None]) -> type[Connection]:
    """Return what the sockets of a server become: connections whose dialog is noted and whose messages are known.

    `ended` is called when one has come to its end.
    """

    class NotedConnection(Connection):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self._session = NotedSession(self._gate.offer, self._wire, self._transaction, dialog, self.number)

        async def _take(self, message: Message) -> Reply:
            delivery.arriving[message.id] = self._transaction
            try:
                return await super()._take(message)
            finally:
                del delivery.arriving[message.id]

        def _end(self, cause: str) -> None:
            super()._end(cause)
            ended()

    return NotedConnection


def _joined(table: dict[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with further keys; tables within it are joined, too."""
    result = dict(table)
    for key, value in further.items():
        both = isinstance(value, Mapping) and isinstance(table.get(key), dict)
        result[key] = _joined(table[key], value) if both else value
    return result


def _place_of(door: Door) -> tuple[str, int]:
    """Return the address and port of a door, or the path of a unix socket and 0."""
    address, port = door.local_address
    return (address, port) if address else (str(door.listener.getsockname()), 0)


class SmtpServer:
    r"""An SMTP or LMTP server for a test: the real one, on a free port of the loopback, until the `with` ends.

    >>> with SmtpServer() as server:
    ...     with smtplib.SMTP(server.host, server.port) as client:
    ...         _ = client.sendmail("alice@example.org", ["bob@example.org"], "Subject: Hello\n\nHow are you?")
    ...     server.inbox.last.subject
    'Hello'

    Messages are in `inbox` before their client hears 250. The server may be started and stopped once.
    """

    def __init__(
        self,
        *,
        tls: Literal["none", "starttls", "implicit"] = "none",
        require_tls: bool = False,
        users: Mapping[str, str] | None = None,
        require_auth: bool = False,
        lmtp: bool = False,
        max_size: int = 26_214_400,
        domains: Sequence[str] | None = None,
        policies: Sequence[object] = (),
        address: str = "127.0.0.1:0",
        hostname: str = "localhost",
        listener: Mapping[str, Any] | None = None,
        max_messages: int = 10_000,
        max_octets: int = 67_108_864,
        grace: float = 0.1,
        authority: Authority | None = None,
    ) -> None:
        """Check the arguments; `start`, or `with`, opens the port. Raise ValueError that says what is wrong.

        `tls`: "starttls" offers it after EHLO, "implicit" begins with it; `require_tls` refuses mail before STARTTLS.
        `users`: passwords by name; with them AUTH is offered (SCRAM-SHA-256, PLAIN, LOGIN; in the clear, too, when
        `tls` is "none"), and `require_auth` refuses mail without it.
        `lmtp`: LHLO in the place of EHLO, and a reply for each recipient.
        `max_size`: octets of a message (SIZE); 0 is no limit.
        `domains`: those that may be sent to without AUTH; None is all of them.
        `policies`: objects as penstock.policy.base describes, asked in this order.
        `address`: "127.0.0.1:0" takes a free port; also "[::1]:0" and "unix:/path/of/socket".
        `hostname`: the server's name in its greeting.
        `listener`: further keys of a [[listener]] table of the configuration, in its form:
        `{"limits": {"recipients": 100}, "extensions": {"pipelining": False}}`.
        `max_messages`, `max_octets`: the room of the inbox; what is beyond is refused with 452.
        `grace`: seconds that open sessions have to end by themselves when the server stops. A sender that the test does
        not wait for then hears the rest of its replies; a session that is left open costs that long.
        `authority`: whose certificate is shown; one is made for the process when there is none.
        """
        self._users = dict(users or {})
        if require_auth and not users:
            raise ValueError("require_auth=True needs users={name: password}")
        if require_tls and tls == "none":
            raise ValueError("require_tls=True needs tls='starttls' or tls='implicit'")
        if not all(self._users) or not all(self._users.values()):
            raise ValueError("a user has a name and a password")
        if not 0 <= grace <= _MOST_GRACE:
            raise ValueError(f"grace is 0 to {_MOST_GRACE:g} seconds, not {grace!r}")
        self._authority = authority
        self._policies = tuple(policies)
        table: dict[str, Any] = {
            "address": address,
            "name": "test",
            "kind": "lmtp" if lmtp else "smtp",
            "max_size": max_size,
            "tls": {"mode": tls, "required": require_tls},
        }
        if users:
            table["auth"] = {"required": require_auth, "without_tls": tls == "none"}
        self._settings = from_table(
            {
                "hostname": hostname,
                "domains": domains,
                "listener": [_joined(table, listener or {})],
                "body": {"memory_per_message": min(max_octets, 1 << 30), "memory_total": max_octets},
            },
            allow_open=True,
        )
        self.dialog = Dialog()
        """What was said: `dialog.lines()`. Without passwords, and the last thousand lines."""
        self.inbox = Inbox(max_messages=max_messages, max_octets=max_octets, context=self._last_words)
        """The messages that were received."""
        self._journal = NotedJournal(self.dialog)
        self._thread = WorkerThread(grace=grace, failed=self._fail)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._place: tuple[str, int] | None = None
        self._is_running = False
        self._failure: BaseException | None = None

    # ---- where it is

    @property
    def host(self) -> str:
        """The address to connect to; the path of a unix socket. Raise RuntimeError before the start."""
        return self._placed()[0]

    @property
    def port(self) -> int:
        """The port to connect to; 0 for a unix socket. Raise RuntimeError before the start."""
        return self._placed()[1]

    @property
    def ca_file(self) -> Path:
        """The authority that clients have to trust, as a PEM file."""
        return self.authority.ca_file

    @property
    def authority(self) -> Authority:
        """Who has signed the certificate."""
        if self._authority is None:
            self._authority = authority_of_process()
        return self._authority

    def ssl_context(self) -> ssl.SSLContext:
        """Return a new context for a client: it trusts the server's authority and no other, and checks the name."""
        return self.authority.ssl_context()

    def django_settings(self) -> dict[str, Any]:
        """Return Django's settings for sending to this server, as the first of its users when it has some.

        Django trusts the authorities of the machine only. With TLS, let it trust the server's one:
        `monkeypatch.setenv("SSL_CERT_FILE", str(server.ca_file))`.
        """
        mode = self._settings.listener[0].tls.mode
        name, password = next(iter(self._users.items()), ("", ""))
        return {
            "EMAIL_BACKEND": "django.core.mail.backends.smtp.EmailBackend",
            "EMAIL_HOST": self.host,
            "EMAIL_PORT": self.port,
            "EMAIL_HOST_USER": name,
            "EMAIL_HOST_PASSWORD": password,
            "EMAIL_USE_TLS": mode == "starttls",
            "EMAIL_USE_SSL": mode == "implicit",
            "EMAIL_TIMEOUT": 10,
        }

    def report(self) -> str:
        """Return what was received, what failed, and the last lines of the dialog: for a human to look at."""
        messages = list(self.inbox)
        lines = [f"{self!r}: {len(messages)} received"]
        if len(messages) > _SHOWN_MESSAGES:
            lines.append(f"(the last {_SHOWN_MESSAGES} of them)")
        first = max(len(messages) - _SHOWN_MESSAGES, 0)
        lines += [f"[{number}] {message.describe()}" for number, message in enumerate(messages[first:], first)]
        lines += [f"failed: {type(exc).__name__}: {exc}" for exc in self._journal.failures]
        said = self.dialog.lines()
        lines.append("dialog:" if len(said) <= _SHOWN_LINES else f"dialog (the last {_SHOWN_LINES} lines):")
        lines += said[-_SHOWN_LINES:] or ["nobody has connected"]
        return "\n".join(lines)

    def __repr__(self) -> str:
        where = "not started" if self._place is None else ":".join(str(part) for part in self._place if part)
        return f"<SmtpServer {where}{' stopped' if self._place and not self._is_running else ''}>"

    # ---- its life

    def start(self) -> Self:
        """Open the port and serve. Takes a few milliseconds, and blocks for them. Raise OSError when it can not."""
        if self._place is not None:
            raise RuntimeError("this server was started before; make another one")
        delivery = _InboxDelivery(self.inbox)
        self._folder = tempfile.TemporaryDirectory(prefix="penstock-test-")
        try:
            parts = assemble(
                self._settings_in(self._folder.name),
                self._journal,
                lambda _lines: None,
                kind=_kind_of_connection(delivery, self.dialog, self._thread.note_end),
                given=Given(delivery, _Users(self._users), self._policies),
            )
        except BaseException:
            self._folder.cleanup()
            raise
        self._place = _place_of(parts.doors[0])
        self._is_running = True
        self._thread.start(parts)
        if self._failure is not None:
            self.stop()  # raises what it was
        return self

    def stop(self) -> None:
        """Let the sessions end within the grace, then end them, and close the port. Does nothing the second time.

        Raise RuntimeError, from what was thrown, when something in the server has failed meanwhile: such a test may
        have passed for the wrong reason.
        """
        if not self._is_running:
            return
        self._is_running = False
        assert self._folder is not None
        self._thread.stop()
        self._folder.cleanup()
        failures = [*([self._failure] if self._failure is not None else []), *self._journal.failures]
        if failures:
            first = failures[0]
            raise RuntimeError(f"the server has failed: {type(first).__name__}: {first}") from first

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except RuntimeError as exc:
            if value is None:
                raise
            value.add_note(f"{exc}")  # what the test has thrown tells more

    def _fail(self, failure: BaseException) -> None:
        self._failure = failure
        self.inbox.fail(failure)

    def _settings_in(self, folder: str) -> Settings:
        """Return the settings with a folder to work in, and with the authority's certificate when TLS needs one."""
        replace = msgspec.structs.replace
        listener = self._settings.listener[0]
        if listener.tls.mode != "none" and not listener.tls.certificate:
            tls = replace(listener.tls, certificate=str(self.authority.made.certificate))
            listener = replace(listener, tls=tls)
        return replace(self._settings, data_dir=folder, listener=(listener,))

    def _placed(self) -> tuple[str, int]:
        if self._place is None:
            raise RuntimeError("the server was not started: use it in a with statement, or call start")
        return self._place

    def _last_words(self) -> str:
        said = self.dialog.lines()[-_LINES_IN_ERRORS:]
        return "\n".join(["the dialog, at its end:", *said]) if said else "nobody has connected"
