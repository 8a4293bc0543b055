"""Events of a server session: one for each command that needs a decision.

The session returns the next event only after the last one was answered with `ServerSession.reply`, or with the method
that the docstring here names. The session replies to all other commands.
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
"""All input is parsed: send the output, then receive more."""
TURN_OVER: Final = _Need.TURN_OVER
"""The limit of commands in a turn is reached, there may be more input: let other tasks run, then call again."""
CLOSED: Final = _Need.CLOSED
"""The session is over: send the output, then close."""


class Hello(NamedTuple):
    """HELO, EHLO or LHLO. In place of an accepting reply, the session sends its own, which lists the extensions."""

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
    """VRFY, if `Extensions.can_verify`."""

    argument: str


class Expand(NamedTuple):
    """EXPN, if `Extensions.can_expand`."""

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
    """A part of the body, in any size. No reply."""

    data: bytes


class EndOfMessage(NamedTuple):
    """The end of the data. In LMTP the reply is sent once for each accepted recipient (RFC 2033 4.2)."""

    size: int
    """Octets of the body."""


class MessageAborted(NamedTuple):
    """The message that is being received will not be accepted: discard its body. No reply: the session sends it."""

    cause: str
    will_be_refused: bool = False
    """The rest of the body is read, and the message is refused; False if the client has aborted it."""


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
    """The client cancelled the exchange or sent an invalid line. No reply: the session has sent it."""


class Quit(NamedTuple):
    """QUIT; `CLOSED` follows. No reply: the session has sent it."""


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
