"""Replies to clients (RFC 5321 4.2), and all constant ones.

A reply is a value: functions return it, nothing raises it. The text for the peer and the `cause` for the journal are
separate fields, so that a traceback or a file name never reaches the network.
"""

from __future__ import annotations

import re
from typing import Final

_CODE = range(200, 600)
_STATUS = re.compile(r"[245]\.\d{1,3}\.\d{1,3}")
_MAX_TEXT = 480
"""A reply line has at most 512 octets with its code, status and CRLF (RFC 5321 4.5.3.1.5)."""
_SHORT_TEXT = 400
_checked: set[tuple[int, str | None]] = set()
"""Codes with statuses that were checked before; there are few."""


def _check(code: int, status: str | None) -> None:
    """Raise ValueError unless the code is 200 to 599 and the status is well-formed and of its class."""
    if code not in _CODE:
        raise ValueError(f"a reply code must be between 200 and 599, not {code}")
    if status is not None and (not _STATUS.fullmatch(status) or status[0] != str(code)[0]):
        raise ValueError(f"expected an enhanced status code such as '{code // 100}.1.1' for {code}, not {status!r}")
    _checked.add((code, status))


def _encode(code: int, status: str | None, text: str) -> bytes:
    """Return a reply as it is sent."""
    lead = f"{status} " if status else ""
    if len(text) <= _SHORT_TEXT and text.isascii() and text.isprintable():
        return f"{code} {lead}{text}\r\n".encode()  # one plain line: almost all replies
    lines = [f"{lead}{_clean(line)}\r\n" for line in text.split("\n")]
    return "".join([*(f"{code}-{line}" for line in lines[:-1]), f"{code} {lines[-1]}"]).encode()


def _clean(line: str) -> str:
    """Return a text that is safe to send: printable, one line, at most _MAX_TEXT octets."""
    printable = "".join(c if c.isprintable() else "?" for c in line)
    encoded = printable.encode("utf-8", "replace")
    if len(encoded) <= _MAX_TEXT:
        return printable
    return encoded[:_MAX_TEXT].decode("utf-8", "ignore")


class Reply:
    r"""A code, an enhanced status code (RFC 3463, RFC 5248), a text, and whether the connection is closed afterwards.

    `text` may have several lines, separated by "\n"; each is sent with the code and the status. Characters that are not
    printable become "?", and lines are cut after 480 octets.

    >>> Reply(550, "5.1.1", "No such user").encoded
    b'550 5.1.1 No such user\r\n'
    """

    __slots__ = ("cause", "closes", "code", "encoded", "status", "text")

    code: Final[int]
    """Reply code, 200 to 599 (RFC 5321 4.2)."""
    status: Final[str | None]
    """Enhanced status code; None for 220, 334, 354 and replies to HELO and EHLO, which have none."""
    text: Final[str]
    """The text for the client, without code and status; lines are separated by a newline."""
    closes: Final[bool]
    """The server closes the connection after this reply."""
    cause: Final[str]
    """The reason for the journal; "" if the text says it all."""
    encoded: Final[bytes]
    """The reply as it is sent."""

    def __init__(self, code: int, status: str | None, text: str, *, closes: bool = False, cause: str = "") -> None:
        """Raise ValueError if the code is not 200 to 599, or the status is malformed or of another class."""
        if (code, status) not in _checked:
            _check(code, status)
        self.code = code
        self.status = status
        self.text = text
        self.closes = closes
        self.cause = cause
        self.encoded = _encode(code, status, text)

    def because(self, cause: str) -> Reply:
        """Return the same reply with a cause for the journal."""
        return Reply(self.code, self.status, self.text, closes=self.closes, cause=cause)

    @property
    def accepts(self) -> bool:
        """The code is 2xx or 3xx: the command succeeded."""
        return self.code < 400

    @property
    def is_permanent(self) -> bool:
        """The code is 5xx: the client must not repeat the same request (RFC 5321 4.2.1)."""
        return self.code >= 500

    def __repr__(self) -> str:
        return f"<Reply {self.encoded.decode().strip()!r}{' closes' if self.closes else ''}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reply):
            return NotImplemented
        return self.encoded == other.encoded and self.closes == other.closes

    def __hash__(self) -> int:
        return hash((self.encoded, self.closes))


# 2xx
OK = Reply(250, "2.0.0", "Ok")
SENDER_OK = Reply(250, "2.1.0", "Sender ok")
RECIPIENT_OK = Reply(250, "2.1.5", "Recipient ok")
RESET_OK = Reply(250, "2.0.0", "Reset")
BYE = Reply(221, "2.0.0", "Bye", closes=True)
GO_AHEAD_TLS = Reply(220, "2.0.0", "Ready to start TLS")
AUTHENTICATED = Reply(235, "2.7.0", "Authentication succeeded")
CANNOT_VERIFY = Reply(252, "2.5.2", "Cannot verify the user, but will take mail for it and attempt delivery")
CANNOT_EXPAND = Reply(252, "2.5.2", "Cannot expand lists, but will take mail for a list and attempt delivery")
# 3xx
GO_AHEAD_DATA = Reply(354, None, "End data with <CR><LF>.<CR><LF>")
# 4xx
TRY_LATER = Reply(451, "4.3.0", "Temporary failure, please try again later")
CHECK_FAILED = Reply(451, "4.7.1", "A check of this server failed, please try again later")
TOO_MANY_RECIPIENTS = Reply(452, "4.5.3", "Too many recipients; send the rest in another transaction")
TOO_MANY_MESSAGES = Reply(452, "4.5.3", "Too many messages on this connection; open another one")
DISK_FULL = Reply(452, "4.3.1", "Insufficient system storage, please try again later")
TOO_BUSY = Reply(421, "4.3.2", "Too many connections, please try again later", closes=True)
TOO_MANY_FROM_HERE = Reply(421, "4.7.0", "Too many connections from your network, please try again later", closes=True)
TOO_FAST_FROM_HERE = Reply(
    421, "4.7.0", "Too many new connections from your network, please try again later", closes=True
)
UNEXPECTED = Reply(421, "4.3.0", "Internal error, closing", closes=True)
SHUTTING_DOWN = Reply(421, "4.3.2", "Service shutting down, please try again later", closes=True)
IDLE_TIMEOUT = Reply(421, "4.4.2", "Idle for too long, closing", closes=True)
DATA_TIMEOUT = Reply(421, "4.4.2", "The message took too long, closing", closes=True)
SESSION_TIMEOUT = Reply(421, "4.4.2", "The session took too long, closing", closes=True)
TOO_MANY_ERRORS = Reply(421, "4.7.0", "Too many errors, closing", closes=True)
TOO_MANY_UNKNOWN = Reply(421, "4.7.0", "Too many unknown recipients, closing", closes=True)
TOO_MANY_AUTH_FAILURES = Reply(421, "4.7.0", "Too many failed authentications, closing", closes=True)
AUTH_THROTTLED = Reply(454, "4.7.0", "Too many failed authentications from your network, please try again later")
AUTH_UNAVAILABLE = Reply(454, "4.7.0", "Temporary authentication failure")
TLS_UNAVAILABLE = Reply(454, "4.7.0", "TLS not available due to a temporary reason")
# 5xx: syntax
LINE_TOO_LONG = Reply(500, "5.5.2", "Line too long")
AUTH_LINE_TOO_LONG = Reply(500, "5.5.6", "Authentication exchange line is too long")
UNKNOWN_COMMAND = Reply(500, "5.5.1", "Command unrecognized")
NOT_LMTP = Reply(500, "5.5.1", "Command unrecognized: this is SMTP, send EHLO")
NOT_ESMTP = Reply(500, "5.5.1", "Command unrecognized: this is LMTP, send LHLO")
NOT_SMTP = Reply(500, "5.5.1", "This is a mail server, not a web server", closes=True)
BAD_LINE_END = Reply(500, "5.5.2", "Command lines end with <CR><LF> and contain no other <CR> or <LF>")
NUL_IN_COMMAND = Reply(500, "5.5.2", "Commands must not contain NUL")
BAD_ARGUMENT = Reply(501, "5.5.4", "Syntax error in parameters or arguments")
NO_ARGUMENT_ALLOWED = Reply(501, "5.5.4", "This command takes no argument")
BAD_BASE64 = Reply(501, "5.5.2", "Cannot decode base64")
AUTH_CANCELLED = Reply(501, "5.0.0", "Authentication cancelled")
INPUT_AFTER_STARTTLS = Reply(501, "5.5.1", "STARTTLS must be the last command in a group", closes=True)
NOT_IMPLEMENTED = Reply(502, "5.5.1", "Command not implemented")
# 5xx: sequence
HELLO_FIRST = Reply(503, "5.5.1", "Send EHLO or HELO first")
EHLO_FIRST = Reply(503, "5.5.1", "Send EHLO first")
LHLO_FIRST = Reply(503, "5.5.1", "Send LHLO first")
MAIL_FIRST = Reply(503, "5.5.1", "Send MAIL first")
RCPT_FIRST = Reply(503, "5.5.1", "Send RCPT first")
NESTED_MAIL = Reply(503, "5.5.1", "A transaction is already open; send RSET to abort it")
RCPT_AFTER_BDAT = Reply(503, "5.5.1", "Recipients must be sent before BDAT")
DATA_AFTER_BDAT = Reply(503, "5.5.1", "DATA cannot be mixed with BDAT")
BDAT_ENDED = Reply(503, "5.5.1", "This message was refused; send RSET or MAIL")
BINARYMIME_NEEDS_BDAT = Reply(503, "5.5.1", "BODY=BINARYMIME needs BDAT")
TLS_ALREADY = Reply(503, "5.5.1", "TLS is already active")
AUTH_ALREADY = Reply(503, "5.5.1", "Already authenticated")
AUTH_IN_TRANSACTION = Reply(503, "5.5.1", "AUTH is not allowed during a mail transaction")
AUTH_NOT_HERE = Reply(503, "5.5.1", "AUTH is not offered here")
UNKNOWN_MECHANISM = Reply(504, "5.5.4", "Unrecognized authentication mechanism")
TLS_REQUIRED = Reply(530, "5.7.0", "Send STARTTLS first")
AUTH_REQUIRED = Reply(530, "5.7.0", "Authentication required")
AUTH_FAILED = Reply(535, "5.7.8", "Authentication credentials invalid")
AUTH_NEEDS_TLS = Reply(538, "5.7.11", "Encryption required for this authentication mechanism")
# 5xx: mail
RELAY_DENIED = Reply(550, "5.7.1", "Relaying denied")
TOO_BIG = Reply(552, "5.3.4", "Message too big")
BARE_LF_IN_TEXT = Reply(550, "5.6.0", "The message has a bare <LF>; lines must end with <CR><LF>")
BARE_CR_IN_TEXT = Reply(550, "5.6.0", "The message has a bare <CR>; lines must end with <CR><LF>")
NUL_IN_TEXT = Reply(550, "5.6.0", "The message has a NUL")
LONG_LINE_IN_TEXT = Reply(550, "5.6.0", "The message has a line that is too long")
MAIL_LOOP = Reply(554, "5.4.6", "Too many hops: this message is looping")
BAD_PARAMETER = Reply(555, "5.5.4", "Parameter not recognized or not offered")
