"""SASL exchanges on the server's side (RFC 4422): messages in, steps out. base64 is the session's business.

PLAIN and LOGIN end in a question, `VerifyPassword`, because a password is checked slowly and elsewhere. SCRAM proves
itself, from keys that are looked up by name; its arithmetic is the library scramp's.

Three rules hold for every exchange:

1. An exchange has one function a state, and is over unless that function names the next one. So nothing the client
   sends after a failure, a success or a question can succeed: there is no state left for it to reach.
2. Whatever the octets, the answer is a step. What scramp raises becomes a `Failure` in one place, `_Scram.respond`.
3. 535 is for a proof that was read and is wrong, and so counts as a guess; 501 is for what could not be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

import scramp

from penstock import reply as replies
from penstock.reply import Reply

MECHANISMS: Final = ("SCRAM-SHA-256-PLUS", "SCRAM-SHA-256", "PLAIN", "LOGIN")
"""What `start_exchange` knows, the strongest first (RFC 7677, RFC 5802, RFC 4616; LOGIN is older than its RFCs)."""

MAX_NAME: Final = 255
"""Octets of a user name in UTF-8."""
MAX_PASSWORD: Final = 1024
"""Octets of a password in UTF-8."""
_MALFORMED: Final = Reply(501, "5.5.2", "Cannot read that authentication message")


class ScramKeys(NamedTuple):
    """What a server keeps of a password for SCRAM-SHA-256 (RFC 5802 3): enough to check it, not to know it."""

    salt: bytes
    """At least 12 octets."""
    stored_key: bytes
    """32 octets."""
    server_key: bytes
    """32 octets."""
    iterations: int
    """4096 (RFC 7677 4) to 10,000,000."""


class ChannelBinding(NamedTuple):
    """What ties an exchange to the TLS it runs in (RFC 5929)."""

    name: str
    """ "tls-server-end-point"."""
    data: bytes
    """The hash of the certificate in DER (RFC 5929 4.1)."""


class Challenge(NamedTuple):
    """Send this with a 334."""

    data: bytes


class VerifyPassword(NamedTuple):
    """Ask the authenticator; its answer ends the exchange."""

    authzid: str
    """Whom the client wants to act for: "" or the same as `name`, others are refused."""
    name: str
    """1 to `MAX_NAME` octets, no NUL."""
    password: str
    """1 to `MAX_PASSWORD` octets, no NUL."""


class Success(NamedTuple):
    """The client has proved to be this user."""

    name: str
    """As SASLprep leaves it (RFC 5802 5.1): the name that `scram_keys` was asked for."""
    authzid: str
    """Always "": no mechanism that proves itself here takes another."""


class Failure(NamedTuple):
    """The client has not: 535 for a wrong proof, 501 for a message that can not be read, 454 when keys are missing."""

    reply: Reply
    """What the client hears."""
    cause: str
    """What the journal hears; holds no password."""


Step = Challenge | VerifyPassword | Success | Failure


class Exchange(Protocol):
    """One authentication under way. Neither method raises, whatever the octets."""

    mechanism: str

    def start(self, initial: bytes | None) -> Step:
        """Take the initial response, b"" for an empty one; None when there was none (RFC 4954 4)."""

    def respond(self, data: bytes) -> Step:
        """Take the response to the last challenge; a `Failure` when there was none."""


def start_exchange(
    mechanism: str, *, scram_keys: Callable[[str], ScramKeys], binding: ChannelBinding | None
) -> Exchange:
    """Return a new exchange.

    `scram_keys` returns keys for every name, also for those that do not exist. `binding` is that of the TLS the
    exchange runs in: None without TLS, and also where no -PLUS mechanism was offered, because a client that says it
    saw none ("y", RFC 5802 6) is refused when there is a binding. Raise KeyError for a mechanism that is not in
    `MECHANISMS`, and for a -PLUS one without a binding.
    """
    if mechanism == "PLAIN":
        return _Plain()
    if mechanism == "LOGIN":
        return _Login()
    if mechanism not in MECHANISMS or (mechanism.endswith("-PLUS") and binding is None):
        raise KeyError(mechanism)
    return _Scram(mechanism, scram_keys, binding)


def _text(data: bytes, most: int) -> str | None:
    """Return a name or password; None for one that is empty, too long, not UTF-8, or has a NUL."""
    if not data or len(data) > most or b"\0" in data:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _question(authzid: str, name: bytes, password: bytes) -> Step:
    name_text, password_text = _text(name, MAX_NAME), _text(password, MAX_PASSWORD)
    if name_text is None or password_text is None:
        return Failure(_MALFORMED, "a name or a password is empty, too long, or not UTF-8")
    return VerifyPassword(authzid, name_text, password_text)


def _is_over(data: bytes) -> Step:  # noqa: ARG001 - a state like the others, whatever comes
    """Refuse a response that nobody has asked for."""
    return Failure(_MALFORMED, "the exchange is over")


class _StateByState:
    """An exchange whose states are functions: `_take` is the state, and names the next one or ends it (rule 1)."""

    mechanism: str
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
        question = _question("", name, password)
        if not isinstance(question, VerifyPassword) or not authzid:
            return question
        if authzid != name:
            return Failure(replies.AUTH_FAILED, "nobody may act for somebody else")
        return question._replace(authzid=question.name)


class _Login(_StateByState):
    """LOGIN: a name and a password, each asked for; an initial response is the name."""

    mechanism = "LOGIN"
    _prompt = b"Username:"

    def __init__(self) -> None:
        self._take = self._take_name
        self._name = b""

    def _take_name(self, data: bytes) -> Step:
        if _text(data, MAX_NAME) is None:
            return Failure(_MALFORMED, "a name is empty, too long, or not UTF-8")
        self._name = data
        self._take = self._take_password
        return Challenge(b"Password:")

    def _take_password(self, data: bytes) -> Step:
        return _question("", self._name, data)


_SCRAM_REPLIES: Final = {
    "invalid-proof": replies.AUTH_FAILED,
    "channel-bindings-dont-match": replies.AUTH_FAILED,
    "server-does-support-channel-binding": replies.AUTH_FAILED,
    "no-resources": replies.AUTH_UNAVAILABLE,
}
"""What each server-error-value of RFC 5802 7 means here; the others are mistakes in the message."""


class _Scram(_StateByState):
    """SCRAM-SHA-256 and SCRAM-SHA-256-PLUS (RFC 5802, RFC 7677).

    The server's last message is a challenge like the others, and the client's answer to it is empty: a 235 has no
    room for data (RFC 4954 4). An authzid is refused, even the user's own: scramp can not read one.
    """

    def __init__(self, mechanism: str, scram_keys: Callable[[str], ScramKeys], binding: ChannelBinding | None) -> None:
        self.mechanism = mechanism
        self._take = self._take_client_first
        self._name = ""
        self._scram_keys = scram_keys
        # Without the -PLUS the library still wants to know the binding: a client that says "y", I could bind but you
        # can not, is told that somebody between us took the -PLUS away (RFC 5802 6).
        self._server = scramp.ScramMechanism(mechanism).make_server(self._look_up, channel_binding=binding)

    def respond(self, data: bytes) -> Step:
        try:
            return super().respond(data)
        except scramp.ScramException as exc:
            return _failure_of(exc)
        except ValueError as exc:  # not UTF-8
            return Failure(_MALFORMED, str(exc))

    def _look_up(self, name: str) -> ScramKeys | None:
        """Return the keys of a name, which SASLprep may have made longer; None when it is too long to look up."""
        if len(name.encode()) > MAX_NAME:
            return None
        self._name = name
        return self._scram_keys(name)

    def _take_client_first(self, data: bytes) -> Step:
        text = data.decode()
        header = text.split(",", 2)  # gs2-header: flag "," [ authzid ] "," (RFC 5802 7)
        if len(header) == 3 and header[1]:
            return Failure(replies.AUTH_FAILED, "nobody may act for somebody else")
        self._server.set_client_first(text)
        self._take = self._take_client_final
        return Challenge(self._server.get_server_first().encode())

    def _take_client_final(self, data: bytes) -> Step:
        self._server.set_client_final(data.decode())
        # Only here, behind the proof: a wrong one has left by an exception.
        self._take = self._take_last_word
        return Challenge(self._server.get_server_final().encode())

    def _take_last_word(self, data: bytes) -> Step:
        if data:
            return Failure(_MALFORMED, "the last response of SCRAM is empty")
        return Success(self._name, "")


def _failure_of(exc: scramp.ScramException) -> Failure:
    """Translate what scramp raises; its error values are those of RFC 5802 7."""
    error = getattr(exc.server_error, "value", exc.server_error)
    if error == "unknown-user":  # nobody is unknown to `scram_keys`: `_look_up` did not ask
        return Failure(_MALFORMED, "the name is too long")
    cause = str(exc) if exc.__cause__ is None else f"{exc}: {exc.__cause__}"
    return Failure(_SCRAM_REPLIES.get(error, _MALFORMED), cause)
