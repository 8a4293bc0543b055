"""SASL exchanges on the server's side (RFC 4422): messages in, steps out. base64 is the session's business.

PLAIN and LOGIN end in a question, `VerifyPassword`, because a password is checked slowly and elsewhere. SCRAM proves
itself, from keys that are looked up by name; its arithmetic is the library scramp's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

import scramp

from penstock import reply as replies
from penstock.reply import Reply

MECHANISMS: Final = ("SCRAM-SHA-256-PLUS", "SCRAM-SHA-256", "PLAIN", "LOGIN")
"""What `start_exchange` knows, the strongest first (RFC 7677, RFC 5802, RFC 4616; LOGIN is older than its RFCs)."""

_MAX_NAME: Final = 255
_MAX_PASSWORD: Final = 1024
_MALFORMED: Final = Reply(501, "5.5.2", "Cannot read that authentication message")


class ScramKeys(NamedTuple):
    """What a server keeps of a password for SCRAM-SHA-256 (RFC 5802 3): enough to check it, not to know it."""

    salt: bytes
    stored_key: bytes
    server_key: bytes
    iterations: int


class ChannelBinding(NamedTuple):
    """What ties an exchange to the TLS it runs in (RFC 5929)."""

    name: str
    """ "tls-server-end-point"."""
    data: bytes


class Challenge(NamedTuple):
    """Send this with a 334."""

    data: bytes


class VerifyPassword(NamedTuple):
    """Ask the authenticator."""

    name: str
    password: str


class Success(NamedTuple):
    """The client has proved to be this user."""

    name: str


class Failure(NamedTuple):
    """It has not: 535 for a wrong proof, 501 for a message that can not be read."""

    reply: Reply
    cause: str


Step = Challenge | VerifyPassword | Success | Failure


class Exchange(Protocol):
    """One authentication under way."""

    mechanism: str

    def start(self, initial: bytes | None) -> Step:
        """Take the initial response; None when there was none."""

    def respond(self, data: bytes) -> Step:
        """Take the response to the last challenge."""


def start_exchange(
    mechanism: str, *, scram_keys: Callable[[str], ScramKeys], binding: ChannelBinding | None
) -> Exchange:
    """Return a new exchange. `binding` is that of the TLS it runs in, None without TLS. Raise KeyError otherwise."""
    if mechanism == "PLAIN":
        return _Plain()
    if mechanism == "LOGIN":
        return _Login()
    if mechanism in MECHANISMS:
        return _Scram(mechanism, scram_keys, binding)
    raise KeyError(mechanism)


def _text(data: bytes, most: int) -> str | None:
    """Return a name or password; None for one that is empty, too long, not UTF-8, or has a NUL."""
    if not data or len(data) > most or b"\0" in data:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _question(name: bytes, password: bytes) -> Step:
    name_text, password_text = _text(name, _MAX_NAME), _text(password, _MAX_PASSWORD)
    if name_text is None or password_text is None:
        return Failure(_MALFORMED, "a name or a password is empty, too long, or not UTF-8")
    return VerifyPassword(name_text, password_text)


class _Plain:
    """PLAIN: one message, authzid NUL authcid NUL password (RFC 4616 2)."""

    mechanism = "PLAIN"

    def start(self, initial: bytes | None) -> Step:
        return Challenge(b"") if initial is None else self.respond(initial)

    def respond(self, data: bytes) -> Step:
        parts = data.split(b"\0")
        if len(parts) != 3:
            return Failure(_MALFORMED, "a PLAIN message has two NULs")
        authzid, name, password = parts
        if authzid not in (b"", name):
            return Failure(replies.AUTH_FAILED, "nobody may act for somebody else")
        return _question(name, password)


class _Login:
    """LOGIN: a name and a password, each asked for."""

    mechanism = "LOGIN"

    def __init__(self) -> None:
        self._name: bytes | None = None

    def start(self, initial: bytes | None) -> Step:
        return Challenge(b"Username:") if initial is None else self.respond(initial)

    def respond(self, data: bytes) -> Step:
        if self._name is None:
            self._name = data
            return Challenge(b"Password:")
        return _question(self._name, data)


class _Scram:
    """SCRAM-SHA-256 and SCRAM-SHA-256-PLUS (RFC 5802, RFC 7677).

    The server's last message is a challenge like the others, and the client's answer to it is empty: a 235 has no
    room for data (RFC 4954 4).
    """

    def __init__(self, mechanism: str, scram_keys: Callable[[str], ScramKeys], binding: ChannelBinding | None) -> None:
        self.mechanism = mechanism
        self._name = ""
        self._messages = 0
        self._scram_keys = scram_keys
        # Without the -PLUS the library still wants to know the binding: a client that says "y", I could bind but you
        # can not, is told that somebody between us took the -PLUS away (RFC 5802 6).
        self._server = scramp.ScramMechanism(mechanism).make_server(self._look_up, channel_binding=binding)

    def _look_up(self, name: str) -> ScramKeys:
        self._name = name
        return self._scram_keys(name)

    def start(self, initial: bytes | None) -> Step:
        return Challenge(b"") if initial is None else self.respond(initial)

    def respond(self, data: bytes) -> Step:
        self._messages += 1
        try:
            if self._messages == 1:
                self._server.set_client_first(data.decode())
                if len(self._name.encode()) > _MAX_NAME:
                    return Failure(_MALFORMED, "the name is too long")
                return Challenge(self._server.get_server_first().encode())
            if self._messages == 2:
                self._server.set_client_final(data.decode())
                return Challenge(self._server.get_server_final().encode())
        except scramp.ScramException as exc:
            is_wrong = "keys don't match" in str(exc)
            return Failure(replies.AUTH_FAILED if is_wrong else _MALFORMED, str(exc))
        except ValueError as exc:  # not UTF-8, not base64, a name that SASLprep forbids
            return Failure(_MALFORMED, str(exc))
        if data:
            return Failure(_MALFORMED, "the last response of SCRAM is empty")
        return Success(self._name)
