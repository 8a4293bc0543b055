"""Events of a server session: one for each command that needs a decision.

The session returns the next event only after the last one was answered with `ServerSession.reply`, or with the method
that the docstring here names. Commands that need no decision are answered by the session.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, Literal, NamedTuple

from penstock.message import MailParameters, Path, Recipient


class _Need(Enum):
    DATA = "need data"
    CLOSED = "closed"
    TURN_OVER = "turn over"


NEED_DATA: Final = _Need.DATA
"""The input is used up: send the pending output, then feed more."""
TURN_OVER: Final = _Need.TURN_OVER
"""Enough commands were answered in one turn, there may be more input: let other tasks run, then ask again."""
CLOSED: Final = _Need.CLOSED
"""The conversation is over: send the pending output, then close."""


class Hello(NamedTuple):
    """HELO, EHLO or LHLO. An accepting reply is replaced by the session's own, which lists the extensions."""

    verb: str
    name: str


class Mail(NamedTuple):
    """MAIL, with its path and parameters checked."""

    path: Path
    parameters: MailParameters
    tolerated: tuple[str, ...] = ()
    """Irregularities that the tolerant mode let through (`penstock.smtp.grammar.TOLERATED`)."""


class Rcpt(NamedTuple):
    """RCPT, with its path and parameters checked."""

    recipient: Recipient
    tolerated: tuple[str, ...] = ()
    """Irregularities that the tolerant mode let through (`penstock.smtp.grammar.TOLERATED`)."""


class Verify(NamedTuple):
    """VRFY, when the listener can verify users."""

    argument: str


class Expand(NamedTuple):
    """EXPN, when the listener can expand lists."""

    argument: str


class Command(NamedTuple):
    """One of the verbs in `intercepted_verbs`: RSET, NOOP, VRFY, EXPN or HELP. Answer with `execute`, or a refusal."""

    verb: str
    argument: bytes


class BeginData(NamedTuple):
    """DATA, or the first BDAT of a message. Answer with GO_AHEAD_DATA for both (no 354 is sent for BDAT)."""

    size: int | None
    """Octets announced by SIZE or by BDAT, None when the client announced none."""


class BodyChunk(NamedTuple):
    """A piece of the body; needs no answer."""

    data: bytes


class EndOfMessage(NamedTuple):
    """The end of the data was seen. LMTP answers with `reply_each`."""

    size: int
    """Octets of the body."""


class MessageAborted(NamedTuple):
    """The message whose body has begun is discarded; the session has answered or will. Needs no answer."""

    cause: str
    will_be_refused: bool = False
    """The body is read to its end and then refused; False when the client has aborted the message."""


class StartTls(NamedTuple):
    """STARTTLS. After an accepting reply is sent, do the handshake, then call `tls_started`."""


class Auth(NamedTuple):
    """AUTH. Answer with `challenge` for a 334, or with a final reply; 235 goes through `authenticated`."""

    mechanism: str
    initial: bytes | None
    """The initial response, decoded; None when there was none, b"" for "=" (RFC 4954 4)."""


class AuthResponse(NamedTuple):
    """The client's response to a challenge, decoded."""

    data: bytes


class AuthAborted(NamedTuple):
    """The client cancelled the exchange or sent an unreadable line; the session has answered. Needs no answer."""


class Quit(NamedTuple):
    """QUIT was answered; `CLOSED` follows. Needs no answer."""


Event = (
    Literal[_Need.DATA, _Need.CLOSED, _Need.TURN_OVER]
    | Hello
    | Mail
    | Rcpt
    | Verify
    | Expand
    | Command
    | BeginData
    | BodyChunk
    | EndOfMessage
    | MessageAborted
    | StartTls
    | Auth
    | AuthResponse
    | AuthAborted
    | Quit
)
