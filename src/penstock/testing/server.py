"""A real Penstock server in the process of the test, in its own thread with its own event loop.

Because of the thread it works in every kind of test: one without an event loop may block in smtplib, and one in trio
or asyncio shares nothing with the server but the inbox and the socket. The test's thread assembles the worker and
binds its sockets, so that wrong arguments are raised there; the server's thread only runs it.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import msgspec

from penstock import schema
from penstock.app import Overrides, assemble
from penstock.config import Settings, from_table
from penstock.server.connection import Connection
from penstock.server.dialog import DialogObserver
from penstock.server.worker import BoundListener
from penstock.sink.accept_all import ACCEPT_ALL_MECHANISMS, AcceptAllAuthenticator
from penstock.sink.faults import AppliedFault, FaultEngine
from penstock.sink.injector import fault_injection
from penstock.sink.plan import PlanError, PlanSettings, load_plan, parse_plan, reply_of
from penstock.testing.dialog import Dialog, NotedFaults, NotedJournal
from penstock.testing.helpers import Authority, InboxDelivery, Users, authority_of_process, folder_for
from penstock.testing.inbox import Inbox, ReceivedMessage, describe_last
from penstock.testing.thread import WorkerThread

_MAX_GRACE: Final = 20.0
_DJANGO_BACKEND: Final = "django.core.mail.backends.smtp.EmailBackend"
_STATUS: Final = re.compile(r"[245]\.[0-9]{1,3}\.[0-9]{1,3}")
_SHOWN_LINES: Final = 60
_SHOWN_MESSAGES: Final = 20
_LINES_IN_ERRORS: Final = 12


def _joined(table: dict[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with further keys; nested tables are merged."""
    result = dict(table)
    for key, value in further.items():
        both = isinstance(value, Mapping) and isinstance(table.get(key), dict)
        result[key] = _joined(table[key], value) if both else value
    return result


def _settings_of(
    listener: Mapping[str, Any], hostname: str, domains: Sequence[str] | None, max_octets: int
) -> Settings:
    """Return the settings of a server with one listener. Raise ConfigError (a ValueError) that names the key."""
    return from_table(
        {
            "hostname": hostname,
            "domains": domains,
            "listener": [listener],
            "body": {"memory_per_message": min(max_octets, 1 << 30), "memory_total": max_octets},
        },
        allow_open=True,
    )


def _check_users(users: Mapping[str, str], *, require_auth: bool, accept_any_auth: bool) -> None:
    """Raise ValueError for options about users that do not fit together."""
    if require_auth and not (users or accept_any_auth):
        raise ValueError("require_auth=True needs users={name: password} or accept_any_auth=True")
    if accept_any_auth and users:
        raise ValueError("accept_any_auth=True and users={...} are mutually exclusive")
    if not all(type(text) is str and text for pair in users.items() for text in pair):
        raise ValueError("users are names and their passwords: {'alice': 'secret'}")


def _with_any_auth(settings: Settings) -> Settings:
    """Return the settings with the mechanisms of `AcceptAllAuthenticator`, which are no values of a configuration."""
    replace = msgspec.structs.replace
    (listener,) = settings.listener
    assert listener.auth is not None
    auth = replace(listener.auth, mechanisms=ACCEPT_ALL_MECHANISMS)
    return replace(settings, listener=(replace(listener, auth=auth),))


def _place_of(bound: BoundListener) -> tuple[str, int]:
    """Return the address and port of a bound listener, or the path of a unix socket and 0."""
    address, port = bound.local_address
    return (address, port) if address else (str(bound.socket.getsockname()), 0)


FaultPlan = PlanSettings | Mapping[str, Any] | str | Path
"""A fault plan: its settings, a table as in TOML, TOML text, or the path of a TOML file."""


def _plan_of(plan: FaultPlan) -> PlanSettings:
    """Read a plan. Raise PlanError (a ValueError) that names the key."""
    if isinstance(plan, PlanSettings):
        return plan
    if isinstance(plan, Path):
        return load_plan(plan)
    if isinstance(plan, str):
        return parse_plan(plan)
    try:
        return schema.convert(plan, PlanSettings)
    except schema.SchemaError as exc:
        raise PlanError(str(exc)) from exc


class SmtpServer:
    r"""An SMTP or LMTP server for a test: the real one, on a free port of the loopback, until the `with` ends.

    >>> with SmtpServer() as server:
    ...     with smtplib.SMTP(server.host, server.port) as client:
    ...         _ = client.sendmail("alice@example.org", ["bob@example.org"], "Subject: Hello\n\nHow are you?")
    ...     server.inbox.last.subject
    'Hello'

    Messages are in `inbox` before their client gets the 250. The server can be started and stopped once.
    """

    def __init__(
        self,
        *,
        tls: Literal["none", "starttls", "implicit"] = "none",
        require_tls: bool = False,
        users: Mapping[str, str] | None = None,
        require_auth: bool = False,
        accept_any_auth: bool = False,
        lmtp: bool = False,
        max_size: int = 26_214_400,
        domains: Sequence[str] | None = None,
        policies: Sequence[object] = (),
        faults: FaultPlan = "",
        magic_recipients: bool = False,
        address: str = "127.0.0.1:0",
        hostname: str = "localhost",
        listener: Mapping[str, Any] | None = None,
        max_messages: int = 10_000,
        max_octets: int = 67_108_864,
        grace: float = 0.1,
        authority: Authority | None = None,
    ) -> None:
        """Check the arguments; `start`, or `with`, opens the port. Raise ValueError that says what is wrong.

        `tls`: "starttls" offers it after EHLO, "implicit" starts with it; `require_tls` refuses mail before STARTTLS.
        `users`: passwords by name; with them AUTH is offered (SCRAM-SHA-256, PLAIN, LOGIN; without TLS as well if
        `tls` is "none"), and `require_auth` refuses mail without it. `accept_any_auth`: in place of users, accept every
        name and password (PLAIN, LOGIN, CRAM-MD5, XOAUTH2, OAUTHBEARER), with and without TLS.
        `lmtp`: LMTP: LHLO, and a reply for each recipient.
        `max_size`: octets of a message (SIZE); 0 is no limit.
        `domains`: accepted without AUTH; None accepts all.
        `policies`: objects as penstock.policy.base describes, called in this order.
        `faults`: the first fault plan, see the method `faults`; with `magic_recipients` a recipient can request a
        fault, such as `450-4.2.1@example.org` (`penstock sink --describe-faults` has the grammar).
        `address`: "127.0.0.1:0" takes a free port; also "[::1]:0" and "unix:/path/of/socket".
        `hostname`: the server's name in its greeting.
        `listener`: further keys of a [[listener]] table of the configuration:
        `{"limits": {"recipients": 100}, "extensions": {"pipelining": False}}`. Bare LF and CR, NUL and long lines are
        accepted, as by the sink; `{"wire": {"bare_lf": "reject"}}` refuses a message with bare LF, as some servers do.
        `max_messages`, `max_octets`: capacity of the inbox; further messages are refused with 452.
        `grace`: seconds that open sessions have to end when the server stops. A sender that the test does not wait for
        gets the rest of its replies; a session that is left open delays the stop by this time.
        `authority`: issuer of the server's certificate; by default one per process.
        """
        self._users = dict(users or {})
        _check_users(self._users, require_auth=require_auth, accept_any_auth=accept_any_auth)
        if require_tls and tls == "none":
            raise ValueError("require_tls=True needs tls='starttls' or tls='implicit'")
        if not 0 <= grace <= _MAX_GRACE:
            raise ValueError(f"grace is 0 to {_MAX_GRACE:g} seconds, not {grace!r}")
        self._authority = authority
        self._policies = tuple(policies)
        table: dict[str, Any] = {
            "address": address,
            "name": "test",
            "kind": "lmtp" if lmtp else "smtp",
            "max_size": max_size,
            "tls": {"mode": tls, "required": require_tls},
            # As the sink: senders of tests have bare line ends (`message.as_bytes()`), and servers accept them.
            "wire": {"bare_lf": "accept", "bare_cr": "accept", "nul": "accept", "long_line": "accept"},
        }
        self._accepts_any_auth = accept_any_auth
        if users or accept_any_auth:
            table["auth"] = {"required": require_auth, "without_tls": tls == "none" or accept_any_auth}
        settings = _settings_of(_joined(table, listener or {}), hostname, domains, max_octets)
        self._settings = _with_any_auth(settings) if accept_any_auth else settings
        self.dialog = Dialog()
        """The SMTP dialog, its last thousand lines, without passwords: `dialog.lines()`."""
        self.inbox = Inbox(max_messages=max_messages, max_octets=max_octets, context=self._end_of_dialog)
        """The messages that were received."""
        self._journal = NotedJournal(self.dialog)
        self._faults = NotedFaults(self.dialog)
        self._first_plan = _plan_of(faults)
        self._engine = FaultEngine(self._first_plan, receipts=self._faults, has_magic=magic_recipients)
        self._thread = WorkerThread(grace=grace, failed=self._fail)
        self._process = os.getpid()
        self._remove_folder: Callable[[], object]
        self._place: tuple[str, int] | None = None
        self._is_running = False
        self._failure: BaseException | None = None

    # ---- address

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
        """The CA certificate that clients must trust, as a PEM file."""
        return self.authority.ca_file

    @property
    def authority(self) -> Authority:
        """The issuer of the certificate."""
        if self._authority is None:
            self._authority = authority_of_process()
        return self._authority

    def ssl_context(self) -> ssl.SSLContext:
        """Return a new client context that trusts only this server's authority and checks the host name."""
        return self.authority.ssl_context()

    def django_settings(self) -> dict[str, Any]:
        """Return Django's settings for sending to this server, as its first user if it has users.

        They fit the installed version of Django: MAILERS from 6.1 on.

        Django trusts the CA certificates of the system only. With TLS, let it trust the server's authority:
        `monkeypatch.setenv("SSL_CERT_FILE", str(server.ca_file))`.
        """
        from django import VERSION  # type: ignore[import-untyped] # noqa: PLC0415 - optional

        mode = self._settings.listener[0].tls.mode
        name, password = next(iter(self._users.items()), ("", ""))
        options: dict[str, Any] = {"host": self.host, "port": self.port, "timeout": 10}
        options |= {"use_tls": mode == "starttls", "use_ssl": mode == "implicit"}
        users = {"username": name, "password": password}
        if VERSION >= (6, 1):  # the settings below are deprecated
            return {"MAILERS": {"default": {"BACKEND": _DJANGO_BACKEND, "OPTIONS": options | users}}}
        options |= {"backend": _DJANGO_BACKEND, "host_user": name, "host_password": password}
        return {f"EMAIL_{key.upper()}": value for key, value in options.items()}

    # ---- what was sent

    def assert_sent(
        self, *, to: str | None = None, subject: str | None = None, count: int | None = None
    ) -> list[ReceivedMessage]:
        r"""Check that messages were sent, and return them: see `Inbox.assert_sent`.

        >>> with SmtpServer() as server:
        ...     with smtplib.SMTP(server.host, server.port) as client:
        ...         _ = client.sendmail("alice@example.org", ["bob@example.org"], "Subject: Hello\n\nHow are you?")
        ...     [message] = server.assert_sent(to="bob@example.org", subject="Hello", count=1)
        ...     message.sender
        'alice@example.org'
        """
        __tracebackhide__ = True
        return self.inbox.assert_sent(to=to, subject=subject, count=count)

    def latest(self, *, to: str | None = None, subject: str | None = None) -> ReceivedMessage:
        """Return the latest message, or the latest that matches: see `Inbox.latest`."""
        __tracebackhide__ = True
        return self.inbox.latest(to=to, subject=subject)

    def reset(self) -> None:
        """Forget all messages, the dialog and applied faults, and put the first fault plan in force again.

        For a server that several tests share.
        """
        self._engine.load(self._first_plan)
        self._engine.reset()
        self._faults.clear()
        self.inbox.clear()
        self.dialog.clear()

    # ---- faults

    def fail_next(self, phase: str, code: int, *, status: str = "", text: str = "", times: int = 1) -> None:
        """Reply to the next `times` commands of a phase with this code.

        `phase` is the verb of a command ("RCPT"; a first BDAT counts as "DATA"), "." for the end of the message, or
        "banner" for the greeting; upper or lower case. `code` is 200 to 599, and 421 closes the connection. `status` is
        the enhanced status code ("4.2.2") and `text` the text of the reply; both have defaults. Several calls apply in
        their order. Raise ValueError.

        >>> with SmtpServer() as server, smtplib.SMTP(server.host, server.port) as client:
        ...     server.fail_next("RCPT", 452, status="4.2.2", text="Mailbox full")
        ...     client.sendmail("alice@example.org", ["bob@example.org", "eve@example.org"], "Subject: Hello")
        {'bob@example.org': (452, b'4.2.2 Mailbox full')}
        """
        if status and not _STATUS.fullmatch(status):
            raise ValueError(f"a status looks like 4.2.2, not {status!r}")
        said = " ".join(part for part in (str(code), status, text) if part)
        self._engine.fail_next(phase, reply_of(said), times)

    def faults(self, plan: FaultPlan) -> None:
        """Put a fault plan in force, for open sessions as well; an empty plan means no faults.

        A plan is a table as in TOML, TOML text, or the Path of a file. Its rules say when a client gets a delay, a
        wrong reply, a reset, a bad certificate ...; `penstock sink --describe-faults` prints all keys. The same seed
        and the same mail give the same faults. Raise PlanError (a ValueError) that names the key.

        >>> plan = {"rule": [{"phase": "rcpt", "match": {"recipient": ["*@slow.example"]}, "greylist": {"wait": 60}}]}
        >>> with SmtpServer() as server, smtplib.SMTP(server.host, server.port) as client:
        ...     server.faults(plan)
        ...     client.sendmail("alice@example.org", ["bob@slow.example", "eve@fast.example"], "Subject: Hello")
        {'bob@slow.example': (451, b'4.7.1 Greylisted, please try again later')}
        """
        self._engine.load(_plan_of(plan))

    @property
    def applied_faults(self) -> list[AppliedFault]:
        """The applied faults, the last thousand, oldest first."""
        return list(self._faults.last)

    def report(self) -> str:
        """Return the received messages, failures and the last lines of the dialog as text."""
        shown, first = describe_last(self.inbox[:], _SHOWN_MESSAGES)
        lines = [f"{self!r}: {first + len(shown)} received"]
        if first:
            lines.append(f"(the last {_SHOWN_MESSAGES} of them)")
        lines += shown
        lines += [f"failed: {type(exc).__name__}: {exc}" for exc in self._journal.failures]
        lines += [f"fail_next of {count} {phase} was not used" for phase, count in self._engine.pending().items()]
        said = self.dialog.lines()
        lines.append("dialog:" if len(said) <= _SHOWN_LINES else f"dialog (the last {_SHOWN_LINES} lines):")
        lines += said[-_SHOWN_LINES:] or ["no client has connected"]
        return "\n".join(lines)

    def __repr__(self) -> str:
        where = "not started" if self._place is None else ":".join(str(part) for part in self._place if part)
        return f"<SmtpServer {where}{' stopped' if self._place and not self._is_running else ''}>"

    # ---- start and stop

    @property
    def is_running(self) -> bool:
        """The server was started and not stopped."""
        return self._is_running

    def start(self) -> Self:
        """Open the port and serve; blocks for a few milliseconds. Raise OSError."""
        if self._place is not None:
            raise RuntimeError("this server was started before; make another one")
        has_tls = self._settings.listener[0].tls.mode != "none"
        certificates = self.authority.certificates if has_tls else None
        folder, self._remove_folder = folder_for(self)
        try:
            server = assemble(
                self._settings_in(str(folder)),
                self._journal,
                lambda _lines: None,
                overrides=Overrides(
                    delivery=InboxDelivery(self.inbox),
                    authenticator=AcceptAllAuthenticator() if self._accepts_any_auth else Users(self._users),
                    policies=self._policies,
                    components=(self._note_dialog, fault_injection(self._engine, certificates)),
                    ended=self._thread.note_end,
                ),
            )
        except BaseException:
            self._remove_folder()
            raise
        self._place = _place_of(server.listeners[0])
        self._is_running = True
        self._thread.start(server)
        if self._failure is not None:
            self.stop()  # raises the failure
        return self

    def stop(self) -> None:
        """Let the sessions end within the grace, then end them, and close the port. A second call does nothing.

        Raise RuntimeError, from the original exception, if something in the server has failed: the test may have passed
        for the wrong reason.
        """
        if not self._is_running or os.getpid() != self._process:  # a child of os.fork has no server thread
            return
        self._is_running = False
        self._thread.stop()
        self._remove_folder()
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
            value.add_note(f"{exc}")  # the exception of the test says more

    def _note_dialog(self, connection: Connection) -> None:
        """Have the dialog of a new connection noted."""
        note = partial(self.dialog.note, connection.number)
        connection.session.observer = DialogObserver(connection.session, note)

    def _fail(self, failure: BaseException) -> None:
        self._failure = failure
        self.inbox.fail(failure)

    def _settings_in(self, folder: str) -> Settings:
        """Return the settings with a state directory, and with the authority's certificate if TLS needs one."""
        replace = msgspec.structs.replace
        listener = self._settings.listener[0]
        if listener.tls.mode != "none" and not listener.tls.certificate:
            tls = replace(listener.tls, certificate=str(self.authority.certificate))
            listener = replace(listener, tls=tls)
        return replace(self._settings, data_dir=folder, listener=(listener,))

    def _placed(self) -> tuple[str, int]:
        if self._place is None:
            raise RuntimeError("the server was not started: use it in a with statement, or call start")
        return self._place

    def _end_of_dialog(self) -> str:
        said = self.dialog.lines()[-_LINES_IN_ERRORS:]
        return "\n".join(["end of the dialog:", *said]) if said else "no client has connected"
