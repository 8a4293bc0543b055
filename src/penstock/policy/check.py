"""The interface of the built-in checks.

A check finds something out and proposes a verdict; the judge (judge.py) decides. It applies the mode: a verdict of a
check that only monitors is counted and journaled, and has no other effect. A check with parts that have modes of their
own, such as SPF and DMARC, returns a `Proposal` for each.

A check is a module of this package with a subclass of `Check`, its settings, and a function that makes it:

    def make_checks(settings: PolicySettings, parts: Parts) -> list[Check]

which `penstock.policy.judge.MAKERS` lists in the order in which checks are asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import trio

from penstock.journal import Journal
from penstock.message import MailParameters, Message, Path, Recipient
from penstock.policy.base import Mark
from penstock.policy.evidence import Watcher
from penstock.reply import CHECK_FAILED, Reply
from penstock.state import State
from penstock.transaction import Transaction

if TYPE_CHECKING:
    from penstock.dns import Resolver

Mode = Literal["off", "monitor", "enforce"]


class Proposal(NamedTuple):
    """The verdict of a part of a check, which has a name and a mode of its own."""

    check: str
    """What the journal and the statistics call the part: "spf", "dmarc"."""
    mode: Mode
    verdict: Reply | Mark
    cause: str = ""
    """Of a mark, for the journal."""


Finding = Reply | Mark | list[Proposal] | None


class Edited(NamedTuple):
    """The verdict of a check that changes the message; in monitor mode the change is dropped."""

    message: Message
    verdict: Finding = None


FindingOrAwaitable = Finding | Awaitable[Finding]
MessageFinding = Finding | Edited
MessageFindingOrAwaitable = MessageFinding | Awaitable[MessageFinding]


class Check:
    """A built-in check. Override the hook points that it needs; those it does not override cost nothing.

    Each hook point may be a plain function or `async`. A plain one, or an `async` one that is only called where it
    must wait, costs less: there is no deadline to keep. A `Reply` refuses, or accepts with its text; a `Mark` adds a
    score, a header field, or a reason for quarantine; None: no result.
    """

    name: str = ""
    """What the journal and the statistics call it: "dnsbl", "greylist"."""
    mode: Mode = "enforce"
    """"monitor" or "enforce"; a check that is off is not made."""
    deadline: float = 10.0
    """Seconds that a hook point may take; after them it has failed."""
    failure: Reply | None = CHECK_FAILED
    """What follows when it raises or misses its deadline; None for a check that is left out then."""
    judges_trusted: ClassVar[bool] = False
    """It is also asked about clients in `policy.trusted`, and on unix sockets."""
    awaits_lookups: ClassVar[bool] = False
    """At RCPT, it is asked when what is looked up about the client (`Evidence.look_up`) is known."""
    judges_authenticated: ClassVar[bool] = False
    """It is also asked about authenticated clients."""

    def on_connect(self, transaction: Transaction) -> FindingOrAwaitable:
        """Judge a client by its address, before the greeting. The PROXY header has been read."""

    def on_helo(self, transaction: Transaction, name: str) -> FindingOrAwaitable:
        """Judge the name of a client; `transaction.hello` still holds the one before."""

    def on_mail(self, transaction: Transaction, sender: Path, parameters: MailParameters) -> FindingOrAwaitable:
        """Judge a sender; `transaction.sender` is not set yet. A plain function may be called twice for one MAIL."""

    def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> FindingOrAwaitable:
        """Judge a recipient; `transaction.recipients` holds those accepted before."""

    def on_data(self, transaction: Transaction) -> Watcher | None:
        """Return what looks at the message while it arrives; one check of a server may override this."""

    def on_message(self, transaction: Transaction, message: Message) -> MessageFindingOrAwaitable:
        """Judge a whole message. `message.prefix` has the fields that we add, Authentication-Results among them."""

    def on_refused(self, transaction: Transaction, hook_point: str) -> None:
        """Note that something else has refused what this check let pass at a hook point ("on_rcpt"...).

        For checks that count: refused commands and messages do not count.
        """

    def on_accepted(self, transaction: Transaction, message: Message) -> None:
        """Note that the delivery has accepted the message."""

    def on_disconnect(self, transaction: Transaction) -> None:
        """Note that the connection has ended."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Background task of the check, until cancelled. Not started unless overridden."""
        task_status.started()


@dataclass(frozen=True, slots=True)
class Parts:
    """What checks are made from."""

    hostname: str
    resolver: Resolver
    journal: Journal
    data_dir: FilePath
    is_ours: Callable[[str], bool]
    """Whether mail for a domain (in canonical form) is accepted from all clients."""
    send: Callable[[Message], Awaitable[None]] | None = None
    """Puts a message of our own into the queue; None without one."""
    spool_name: str = "spool"
    """The name of the worker's spool in `data_dir`."""
    state: State | None = None
    """Rate limits and greylisting; None if no check needs it."""
    can_hold: bool = True
    """There is a spool where messages can be held."""
