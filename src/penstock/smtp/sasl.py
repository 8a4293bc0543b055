"""SASL exchanges, server side (RFC 4422): messages in, steps out.

PLAIN and LOGIN end with `VerifyPassword`, because checking a password is slow and is done by the authenticator. SCRAM
verifies the proof itself, with keys that are looked up by name; the arithmetic is that of the library scramp.

Rules for every exchange:

1. Each state is one function. The exchange is over unless that function sets the next one, so nothing the client sends
   after a failure, a success or a `VerifyPassword` can succeed.
2. Every input leads to a step. Exceptions of scramp become a `Failure` in one place, `_Scram.respond`.
3. Lengths are checked first. SASLprep (RFC 4013) costs about 10 us a character, before the client is authenticated.
4. 535 is for a wrong proof, 501 for a message that cannot be parsed. Both count as failed attempts.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

import scramp

from penstock import reply as replies
from penstock.reply import Reply

MECHANISMS: Final = ("SCRAM-SHA-256-PLUS", "SCRAM-SHA-256", "PLAIN", "LOGIN")
"""The implemented mechanisms, the strongest first (RFC 7677, RFC 5802, RFC 4616; LOGIN has no RFC)."""

MAX_NAME: Final = 255
"""Octets of a user name in UTF-8."""
MAX_PASSWORD: Final = 1024
"""Octets of a password in UTF-8."""
MAX_SCRAM_MESSAGE: Final = 2048
"""Octets of a SCRAM message: the escaped name has at most three times `MAX_NAME`, the nonce and the channel binding
have less than 200 each in practice."""
_MALFORMED: Final = Reply(501, "5.5.2", "Cannot read that authentication message")
_OTHER_AUTHZID: Final = "the authorization identity is another user"


class ScramKeys(NamedTuple):
    """What a server stores of a password for SCRAM-SHA-256 (RFC 5802 3): enough to verify it, not to learn it."""

    salt: bytes
    """At least 12 octets."""
    stored_key: bytes
    """32 octets."""
    server_key: bytes
    """32 octets."""
    iterations: int
    """4096 (RFC 7677 4) to 10,000,000."""


class ChannelBinding(NamedTuple):
    """The channel binding of the TLS connection that an exchange runs in (RFC 5929)."""

    name: str
    """ "tls-server-end-point"."""
    data: bytes
    """The hash of the certificate in DER (RFC 5929 4.1)."""


class Challenge(NamedTuple):
    """Send the data with a 334."""

    data: bytes


class VerifyPassword(NamedTuple):
    """Ask the authenticator whether the password is right. The exchange is over."""

    authzid: str
    """The authorization identity: "" or the same as `name`; others are refused."""
    name: str
    """1 to `MAX_NAME` octets, no NUL."""
    password: str
    """1 to `MAX_PASSWORD` octets, no NUL."""


class Success(NamedTuple):
    """The client is authenticated as this user."""

    name: str
    """Prepared with SASLprep (RFC 5802 5.1): the name that `scram_keys` was called with."""
    authzid: str
    """Always "": SCRAM is refused with an authorization identity."""


class Failure(NamedTuple):
    """Authentication failed: 535 for a wrong proof, 501 for an unreadable message, 454 without keys."""

    reply: Reply
    """The reply to the client."""
    cause: str
    """The cause for the journal; contains no password."""


Step = Challenge | VerifyPassword | Success | Failure


class Exchange(Protocol):
    """One authentication under way. Its methods do not raise."""

    mechanism: str
    name: str
    """The user name that the client claims, "" until it is known."""

    def start(self, initial: bytes | None) -> Step:
        """Handle the initial response: b"" for an empty one, None when there was none (RFC 4954 4)."""

    def respond(self, data: bytes) -> Step:
        """Handle the response to the last challenge. Return a `Failure` when there was no challenge."""


def start_exchange(
    mechanism: str, *, scram_keys: Callable[[str], ScramKeys], binding: ChannelBinding | None
) -> Exchange:
    """Return a new exchange.

    `scram_keys` returns keys for every name, also for unknown ones. `binding` is that of the TLS connection; None
    without TLS, and also when no -PLUS mechanism was offered: a client that reports this ("y", RFC 5802 6) is refused
    when there is a binding. Raise KeyError for a mechanism that is not in `MECHANISMS`, and for a -PLUS mechanism
    without a binding.
    """
    if mechanism == "PLAIN":
        return _Plain()
    if mechanism == "LOGIN":
        return _Login()
    if mechanism not in MECHANISMS or (mechanism.endswith("-PLUS") and binding is None):
        raise KeyError(mechanism)
    return _Scram(mechanism, scram_keys, binding)


def decode_response(line: bytes) -> bytes | None:
    """Decode a line of an AUTH exchange, or an initial response, from base64 (RFC 4954 4, RFC 4648 4).

    Trailing blanks are removed (RFC 5321 4.1.1). Return None when the rest is not base64.
    """
    try:
        return binascii.a2b_base64(line.rstrip(b" \t"), strict_mode=True)
    except binascii.Error:
        return None


def _text(data: bytes, most: int) -> str | None:
    """Return a name or password; None when it is empty, too long, not UTF-8, or has a NUL."""
    if not data or len(data) > most or b"\0" in data:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _verify(authzid: str, name: bytes, password: bytes) -> Step:
    name_text, password_text = _text(name, MAX_NAME), _text(password, MAX_PASSWORD)
    if name_text is None or password_text is None:
        return Failure(_MALFORMED, "a name or a password is empty, too long, or not UTF-8")
    return VerifyPassword(authzid, name_text, password_text)


def _is_over(data: bytes) -> Step:  # noqa: ARG001 - has the signature of a state
    """Refuse a response without a challenge."""
    return Failure(_MALFORMED, "the exchange is over")


class _StateByState:
    """An exchange whose states are functions: `_take` is the state, and sets the next one or ends it (rule 1)."""

    mechanism: str
    name = ""
    _prompt = b""
    _take: Callable[[bytes], Step]

    def start(self, initial: bytes | None) -> Step:
        return Challenge(self._prompt) if initial is None else self.respond(initial)

    def respond(self, data: bytes) -> Step:
        take, self._take = self._take, _is_over
        return take(data)


class _Plain(_StateByState):
    """PLAIN: one message, authzid NUL authcid NUL password (RFC 4616 2)."""

    mechanism = "PLAIN"

    def __init__(self) -> None:
        self._take = self._take_message

    def _take_message(self, data: bytes) -> Step:
        parts = data.split(b"\0")
        if len(parts) != 3:
            return Failure(_MALFORMED, "a PLAIN message has two NULs")
        authzid, name, password = parts
        question = _verify("", name, password)
        if not isinstance(question, VerifyPassword) or not authzid:
            return question
        if authzid != name:
            return Failure(replies.AUTH_FAILED, _OTHER_AUTHZID)
        return question._replace(authzid=question.name)


class _Login(_StateByState):
    """LOGIN: asks for the name, then for the password; an initial response is the name."""

    mechanism = "LOGIN"
    _prompt = b"Username:"

    def __init__(self) -> None:
        self._take = self._take_name
        self._name = b""

    def _take_name(self, data: bytes) -> Step:
        name = _text(data, MAX_NAME)
        if name is None:
            return Failure(_MALFORMED, "a name is empty, too long, or not UTF-8")
        self.name = name
        self._name = data
        self._take = self._take_password
        return Challenge(b"Password:")

    def _take_password(self, data: bytes) -> Step:
        return _verify("", self._name, data)


_SCRAM_REPLIES: Final = {
    "invalid-proof": replies.AUTH_FAILED,
    "channel-bindings-dont-match": replies.AUTH_FAILED,
    "server-does-support-channel-binding": replies.AUTH_FAILED,
    "no-resources": replies.AUTH_UNAVAILABLE,
}
"""The replies for server-error-values of RFC 5802 7; the others are errors in the message."""


class _Scram(_StateByState):
    """SCRAM-SHA-256 and SCRAM-SHA-256-PLUS (RFC 5802, RFC 7677).

    The server's last message is sent as a challenge, and the client's response to it is empty: a 235 carries no data
    (RFC 4954 4). An authorization identity is refused, even the user's own: scramp cannot read one.
    """

    def __init__(self, mechanism: str, scram_keys: Callable[[str], ScramKeys], binding: ChannelBinding | None) -> None:
        self.mechanism = mechanism
        self._take = self._take_client_first
        self._scram_keys = scram_keys
        # Without -PLUS the library still needs the binding: it refuses a client that says "y" (I could bind, the server
        # cannot), because then an attacker has removed -PLUS from the offer (RFC 5802 6).
        self._server = scramp.ScramMechanism(mechanism).make_server(self._look_up, channel_binding=binding)

    def respond(self, data: bytes) -> Step:
        if len(data) > MAX_SCRAM_MESSAGE:
            self._take = _is_over
            return Failure(_MALFORMED, f"a SCRAM message has at most {MAX_SCRAM_MESSAGE} octets")
        try:
            return super().respond(data)
        except scramp.ScramException as exc:
            return _failure_of(exc)
        except ValueError as exc:  # not UTF-8
            return Failure(_MALFORMED, str(exc))

    def _look_up(self, name: str) -> ScramKeys | None:
        """Return the keys of a name; None when it is too long, because SASLprep may have made it longer."""
        if len(name.encode()) > MAX_NAME:
            return None
        self.name = name
        return self._scram_keys(name)

    def _take_client_first(self, data: bytes) -> Step:
        text = data.decode()
        parts = text.split(",")  # gs2-cbind-flag "," [ authzid ] "," "n=" saslname "," "r=" nonce (RFC 5802 7)
        names = [part[2:].replace("=2C", ",").replace("=3D", "=") for part in parts[2:] if part.startswith("n=")]
        if any(len(name.encode()) > MAX_NAME for name in names):
            return Failure(_MALFORMED, "the name is too long")
        if len(parts) > 2 and parts[1]:
            return Failure(replies.AUTH_FAILED, _OTHER_AUTHZID)
        self._server.set_client_first(text)
        self._take = self._take_client_final
        return Challenge(self._server.get_server_first().encode())

    def _take_client_final(self, data: bytes) -> Step:
        self._server.set_client_final(data.decode())
        # Only now: a wrong proof has raised.
        self._take = self._take_last_word
        return Challenge(self._server.get_server_final().encode())

    def _take_last_word(self, data: bytes) -> Step:
        if data:
            return Failure(_MALFORMED, "the last response of SCRAM is empty")
        return Success(self.name, "")


def _failure_of(exc: scramp.ScramException) -> Failure:
    """Translate an exception of scramp; its error values are those of RFC 5802 7."""
    error = getattr(exc.server_error, "value", exc.server_error)
    if error == "unknown-user":  # `scram_keys` knows every name: `_look_up` did not call it
        return Failure(_MALFORMED, "the name is too long")
    cause = str(exc) if exc.__cause__ is None else f"{exc}: {exc.__cause__}"
    return Failure(_SCRAM_REPLIES.get(error, _MALFORMED), cause)
