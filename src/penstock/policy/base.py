"""The policy interface: the arguments of each hook, and the verdicts it may return.

A policy is any object with some of the methods named in `HOOK_POINTS`. Each method may be a plain function or an
`async def`; a missing method costs nothing. A hook returns

- `None`: no opinion, the next policy is called;
- `ACCEPT`: accepted, and the policies after this one are not called;
- a `Reply`: 4xx and 5xx refuse, with this reply; 2xx replaces the ordinary reply of an acceptance;
- a `Mark`: no opinion yet, but a score, a header field or a reason for quarantine. The next policy is called.

A hook that raises, or takes longer than its deadline, is a failed check: the client gets 451, and the cause is
journaled.

Domains of paths are in canonical form: lower-case A-labels without a trailing dot (`xn--bcher-kva.example`). The
client's IP address is in canonical form, too: an IPv4-mapped IPv6 address is the IPv4 address.

>>> class NoBulkFromAfar:
...     def on_rcpt(self, transaction, recipient):
...         if recipient.path.domain == "lists.example.org" and transaction.tls is None:
...             return Reply(550, "5.7.10", "Use TLS to reach this list")
"""

from __future__ import annotations

from collections.abc import Awaitable
from enum import Enum
from typing import Final, Literal, NamedTuple, Protocol

from penstock.message import MailParameters, Message, Path, Recipient
from penstock.reply import Reply
from penstock.transaction import Peer, Transaction


class Accept(Enum):
    """The type of `ACCEPT`."""

    ACCEPT = "accept"


ACCEPT: Final = Accept.ACCEPT
"""The verdict that accepts without calling the policies that follow."""


class Mark(NamedTuple):
    """The verdict that adds something to a message without deciding about it.

    Scores of all checks are added up at the end of the message: from `policy.reject_above` on it is refused, from
    `policy.quarantine_above` on it is quarantined. A mark of a hook before MAIL applies to all messages of the
    connection.
    """

    score: float = 0.0
    """Positive for spam, negative for wanted mail."""
    header: str | tuple[str, str] | None = None
    """A header field for the top of the message: "X-Virus: none", or ("X-Virus", "none")."""
    quarantine: bool | str = False
    """True: if the message is accepted, it is quarantined according to `policy.quarantine`; "hold": it is held."""


Verdict = Reply | Mark | Literal[Accept.ACCEPT] | None
Answer = Verdict | Awaitable[Verdict]

HOOK_POINTS: Final[dict[str, int]] = {
    "on_connect": 2, "on_helo": 2, "on_auth": 3, "on_mail": 3, "on_rcpt": 2, "on_message": 2, "on_reset": 1,
    "on_disconnect": 1,
}  # fmt: skip
"""The methods that a policy may have, and how many arguments each is called with."""


class ConnectPolicy(Protocol):
    """Asked before the greeting."""

    def on_connect(self, peer: Peer, listener: str) -> Answer:
        """Judge a client by its address. A refusal is sent in place of the greeting, and the connection ends."""


class HeloPolicy(Protocol):
    """Asked at HELO, EHLO and LHLO."""

    def on_helo(self, transaction: Transaction, name: str) -> Answer:
        """Judge the name the client gives itself; `transaction.hello` still holds the one before."""


class AuthPolicy(Protocol):
    """Asked after the password was right, before the 235."""

    def on_auth(self, transaction: Transaction, identity: str, mechanism: str) -> Answer:
        """Judge an identity that has proved itself."""


class MailPolicy(Protocol):
    """Asked at MAIL."""

    def on_mail(self, transaction: Transaction, sender: Path, parameters: MailParameters) -> Answer:
        """Judge a reverse-path; `transaction.sender` is not set yet."""


class RcptPolicy(Protocol):
    """Asked at each RCPT that the domains of the listener let through."""

    def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> Answer:
        """Judge a forward-path; `transaction.recipients` holds those accepted before."""


class MessagePolicy(Protocol):
    """Asked at the end of the data, before the delivery."""

    def on_message(self, transaction: Transaction, message: Message) -> Answer:
        """Judge a whole message. Reading `message.body.chunks()` may touch the disk: use a thread for large ones.

        `transaction.add_field(name, value)` adds a header field to it.
        """


class ResetPolicy(Protocol):
    """Called at RSET, before the transaction is forgotten."""

    def on_reset(self, transaction: Transaction) -> Answer:
        """Called when the client has aborted the transaction. The result is ignored."""


class DisconnectPolicy(Protocol):
    """Called when a connection has ended that was greeted."""

    def on_disconnect(self, transaction: Transaction) -> Answer:
        """Note the end of a connection. The answer is ignored; `transaction` may still hold an open transaction."""
