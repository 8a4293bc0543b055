"""What a session tells its driver: one event for each command that needs a decision.

The session holds the next event back until the last one is answered with `ServerSession.reply` (or what its docstring
here names instead); commands that need no decision it answers by itself.
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
"""The input is used up: send what is to be sent, then feed more."""
TURN_OVER: Final = _Need.TURN_OVER
"""Enough commands were answered in one turn; there may be more input. Let others have their turn, then ask again."""
CLOSED: Final = _Need.CLOSED
"""The conversation is over: send what is to be sent, then close."""


class Hello(NamedTuple):
    """HELO, EHLO or LHLO. An accepting reply is not sent itself: the session words the answer."""

    verb: str
    name: str


class Mail(NamedTuple):
    """MAIL, with its path and parameters checked."""

    path: Path
    parameters: MailParameters


class Rcpt(NamedTuple):
    """RCPT, with its path and parameters checked."""

    recipient: Recipient


class Verify(NamedTuple):
    """VRFY, where the listener has a lookup for it."""

    argument: str


class Expand(NamedTuple):
    """EXPN, where the listener has a lookup for it."""

    argument: str


class Command(NamedTuple):
    """One of the verbs in `intercepted_verbs`: RSET, NOOP, VRFY, EXPN or HELP. Answer with `execute`, or a refusal."""

    verb: str
    argument: bytes


class BeginData(NamedTuple):
    """DATA, or the first BDAT of a message. Answer with GO_AHEAD_DATA for both (no 354 is sent for BDAT)."""

    size: int | None
    """Octets announced by SIZE or by BDAT, None when the client did not say."""


class BodyChunk(NamedTuple):
    """A piece of the body; needs no answer."""

    data: bytes


class EndOfMessage(NamedTuple):
    """The end of the data was seen. LMTP answers with `reply_each`."""

    size: int
    """Octets of the body."""


class MessageAborted(NamedTuple):
    """The body that had begun is void; the session has answered or will. Needs no answer."""

    cause: str
    will_be_refused: bool = False
    """It is read to its end, which a refusal answers; otherwise the client has given it up."""


class StartTls(NamedTuple):
    """STARTTLS. After an accepting reply is sent, do the handshake, then call `tls_started`."""


class Auth(NamedTuple):
    """AUTH. Answer with `challenge` for a 334, or with a final reply; 235 goes through `authenticated`."""

    mechanism: str
    initial: bytes | None
    """The initial response, decoded; None when there was none, b"" for "=" (RFC 4954 4)."""


class AuthResponse(NamedTuple):
    """The client's answer to a challenge, decoded."""

    data: bytes


class AuthAborted(NamedTuple):
    """The client gave the exchange up, or broke it; the session has answered. Needs no answer."""


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
