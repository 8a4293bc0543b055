"""The order of commands as a table (RFC 5321 4.1.4, RFC 3030 2, RFC 3207 4, RFC 4954 4).

For each state the table has the verbs that are refused in it, with the reply; all others are allowed. The session looks
a verb up by its number (`_wire.VERBS`), so a rule costs one index.

        greet        HELO/EHLO/LHLO        MAIL          RCPT            DATA            CRLF.CRLF
    OPENED --> HELLO ------------> READY ------> MAIL ------> RCPT ------------> BODY ------------> READY
                 ^                   ^                         |  BDAT      BDAT LAST                 ^
                 |  STARTTLS         |  RSET, EHLO             +------> CHUNKS -----------------------+
                 +----------- TLS    +---- from anywhere
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from penstock import reply
from penstock.reply import Reply
from penstock.smtp._wire import VERBS


class State(IntEnum):
    """The state of a session."""

    OPENED = 0
    """Nothing was sent; the greeting comes first."""
    HELLO = 1
    """After the greeting, and after the TLS handshake: HELO, EHLO or LHLO comes next."""
    READY = 2
    """No transaction is open."""
    MAIL = 3
    """MAIL was accepted, no recipient yet."""
    RCPT = 4
    """At least one recipient was accepted."""
    BODY = 5
    """The text after a 354 is being received."""
    CHUNKS = 6
    """Between two BDAT commands of one message."""
    REFUSED = 7
    """A BDAT was refused: RSET or MAIL has to follow (RFC 3030 2)."""
    OCTETS = 8
    """The octets of a BDAT are being received."""
    AUTH = 9
    """An AUTH exchange is in progress."""
    TLS = 10
    """Between the 220 to STARTTLS and the end of the handshake."""
    CLOSED = 11
    """The last reply was sent."""


NUMBER: Final = {name: number for number, name in enumerate(VERBS)}
"""The number of a verb."""

Rules = tuple[Reply | None, ...]
"""For the number of each verb, the reply that refuses it, None when it is allowed."""
Table = tuple[Rules, ...]
"""For the number of each state, its rules; () when it reads no commands."""


def _rules(**refusals: Reply) -> Rules:
    return tuple(refusals.get(verb) for verb in VERBS)


_NO_TRANSACTION = _rules(RCPT=reply.MAIL_FIRST, DATA=reply.MAIL_FIRST, BDAT=reply.MAIL_FIRST)


def _table(rules: dict[State, Rules]) -> Table:
    return tuple(rules.get(state, ()) for state in State)


def _rules_after(hello: Reply, extended: Reply) -> Table:
    """Return the table of a protocol. `hello` and `extended` refuse what needs HELO or EHLO, and what needs EHLO."""
    return _table(
        {
            State.HELLO: _rules(MAIL=hello, RCPT=hello, DATA=hello, BDAT=hello, AUTH=extended, STARTTLS=extended),
            State.READY: _NO_TRANSACTION,
            State.MAIL: _rules(
                MAIL=reply.NESTED_MAIL,
                DATA=reply.RCPT_FIRST,
                BDAT=reply.RCPT_FIRST,
                AUTH=reply.AUTH_IN_TRANSACTION,
            ),
            State.RCPT: _rules(MAIL=reply.NESTED_MAIL, AUTH=reply.AUTH_IN_TRANSACTION),
            State.CHUNKS: _rules(
                MAIL=reply.NESTED_MAIL,
                RCPT=reply.RCPT_AFTER_BDAT,
                DATA=reply.DATA_AFTER_BDAT,
                AUTH=reply.AUTH_IN_TRANSACTION,
            ),
            State.REFUSED: _rules(
                RCPT=reply.BDAT_ENDED,
                DATA=reply.BDAT_ENDED,
                BDAT=reply.BDAT_ENDED,
                AUTH=reply.AUTH_IN_TRANSACTION,
            ),
        }
    )


_ALLOWED_BEFORE_TLS = frozenset({"", "HELO", "EHLO", "LHLO", "STARTTLS", "NOOP", "RSET", "HELP", "QUIT", "HTTP"})
_ALLOWED_BEFORE_AUTH = _ALLOWED_BEFORE_TLS | {"AUTH"}


def _require(rules: Table, allowed: frozenset[str], refusal: Reply) -> Table:
    """Return the table that refuses every verb that is not allowed, in every state."""
    overlay = tuple(None if verb in allowed else refusal for verb in VERBS)
    return tuple(
        tuple(over or rule for over, rule in zip(overlay, each, strict=True)) if each else () for each in rules
    )


class Tables(NamedTuple):
    """The tables of a protocol."""

    ordinary: Table
    before_tls: Table
    """Of a listener that requires TLS, before it (RFC 3207 4)."""
    before_auth: Table
    """Of a listener that requires authentication, before it (RFC 4954 6)."""

    @classmethod
    def of(cls, rules: Table) -> Tables:
        """Return the table of a protocol, and those made of it."""
        return cls(
            rules,
            _require(rules, _ALLOWED_BEFORE_TLS, reply.TLS_REQUIRED),
            _require(rules, _ALLOWED_BEFORE_AUTH, reply.AUTH_REQUIRED),
        )


SMTP: Final = Tables.of(_rules_after(reply.HELLO_FIRST, reply.EHLO_FIRST))
LMTP: Final = Tables.of(_rules_after(reply.LHLO_FIRST, reply.LHLO_FIRST))

LINE_LIMIT: Final = 512
"""Octets of a command line with its CRLF, without additions of extensions (RFC 5321 4.5.3.1.4)."""
AUTH_LINE_LIMIT: Final = 12_288
"""Octets of a line of an AUTH exchange, and of the AUTH command (RFC 4954 4)."""
LONGER_LINES: Final = {
    # SIZE 26 (RFC 1870 3), BODY 17 (RFC 6152 2), SMTPUTF8 10 (RFC 6531 3.1), AUTH 500 (RFC 4954 3),
    # RET and ENVID 9 + 107 (RFC 3461 4.3, 4.4), REQUIRETLS 11 (RFC 8689 2)
    "MAIL": 26 + 17 + 10 + 500 + 116 + 11,
    # NOTIFY 29 and ORCPT 507 (RFC 3461 4.1, 4.2)
    "RCPT": 29 + 507,
    "AUTH": AUTH_LINE_LIMIT - LINE_LIMIT,
}
"""Octets that extensions add to the line of a verb."""
ARGUMENT_LIMIT: Final = tuple(
    # without the verb, one space and the CRLF; an unknown line is all argument
    LINE_LIMIT + LONGER_LINES.get(verb, 0) - (len(verb) + 1 if verb else 0) - 2
    for verb in VERBS
)
"""Octets of the longest argument of each verb."""
