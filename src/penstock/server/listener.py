"""What all connections of a listener share. Made by penstock.assembly and never changed: a reload makes a new one."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Annotated, Literal

import msgspec

from penstock.addresses import Network, parse_address
from penstock.auth.base import Authenticator
from penstock.auth.throttle import AuthThrottle
from penstock.delivery.base import ChecksCapacity, Delivery, Discards, Streams
from penstock.journal import Journal
from penstock.message import MessageIds, Path
from penstock.metrics._session import Metrics
from penstock.metrics._shared import ListenerTotals
from penstock.policy.pipeline import Pipeline
from penstock.reply import Reply
from penstock.server.body import BodySettings, MemoryBudget
from penstock.server.connection import Component, Connection, SyncHandlers
from penstock.server.domains import RelayControl
from penstock.server.limits import LimitSettings
from penstock.smtp._wire import Wire
from penstock.smtp.extensions import Extensions
from penstock.smtp.sasl import ChannelBinding
from penstock.smtp.server import (
    AUTO_ACCEPT_HELLO,
    AUTO_ACCEPT_MAIL,
    AUTO_ACCEPT_QUIT,
    AUTO_ACCEPT_RCPT,
    ServerSession,
)
from penstock.smtp.states import NUMBER
from penstock.transaction import Peer, Transaction

WireRule = Literal["accept", "normalize", "reject"]


class WireSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Octets and line lengths that RFC 5321 does not allow in message text.

    `reject` reads the text to its end and answers 550 5.6.0; `normalize` repairs it, which changes the body and breaks
    its signatures; `accept` keeps it unchanged. In all three, only CR LF . CR LF ends the data.
    """

    bare_lf: Annotated[
        WireRule,
        msgspec.Meta(
            description="LF without CR (RFC 5321 2.3.8); normalize turns it into CR LF, as Postfix does. Anything but "
            "reject also lets a bare LF end a command"
        ),
    ] = "normalize"
    bare_cr: Annotated[
        WireRule, msgspec.Meta(description="CR without LF (RFC 5321 2.3.8); normalize turns it into a space")
    ] = "normalize"
    nul: Annotated[WireRule, msgspec.Meta(description="NUL (RFC 5322 4); normalize removes it")] = "reject"
    long_line: Annotated[
        WireRule,
        msgspec.Meta(description="Line longer than text_line_limit; normalize folds it with CR LF and a space"),
    ] = "accept"
    text_line_limit: Annotated[
        int,
        msgspec.Meta(
            ge=64,
            le=1_000_000,
            description="Octets of a text line without its CR LF (RFC 5321 4.5.3.1.6); see long_line",
        ),
    ] = 998

    def make_wire(self, max_octets: int) -> Wire:
        """Make the wire of a connection; `max_octets` limits the size of a message, 0 means no limit."""
        rules = {
            "bare_lf": self.bare_lf,
            "bare_cr": self.bare_cr,
            "nul": self.nul,
            "long_line": self.long_line,
        }
        return Wire(
            text_line_limit=self.text_line_limit,
            max_octets=max_octets,
            reject=[name for name, rule in rules.items() if rule == "reject"],
            normalize=[name for name, rule in rules.items() if rule == "normalize"],
        )


def _is_in(peer: Peer, networks: Sequence[Network]) -> bool:
    """Return whether a client's address is in one of the networks; a unix socket is in all."""
    if not peer.address:
        return True
    address = parse_address(peer.address)
    return any(address in network for network in networks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """The parts and constants of one listener."""

    name: str
    """Name of the listener in the journal."""
    extensions: Extensions
    wire: WireSettings
    limits: LimitSettings
    relay_control: RelayControl
    """Which recipients a client may send to."""
    relay_networks: tuple[Network, ...] = ()
    """Networks whose clients may send to any domain."""
    proxy_networks: tuple[Network, ...] = ()
    """Networks whose clients must send a PROXY header first."""
    tls: ssl.SSLContext | None = None
    is_implicit_tls: bool = False
    """Implicit TLS: from the first octet (RFC 8314 3)."""
    binding: ChannelBinding | None = None
    """The channel binding of the certificate (RFC 5929 4)."""
    certificate_not_after: float = 0.0
    """Unix time at which the certificate expires; 0 without TLS."""
    max_hops: int = 50
    """`Received:` fields of a message before it counts as looping (RFC 5321 6.3); 0: no loop detection."""
    delivery: Delivery
    pipeline: Pipeline
    authenticator: Authenticator | None = None
    auth_throttle: AuthThrottle
    body: BodySettings
    budget: MemoryBudget
    folder: FilePath
    """Folder of the temporary files of bodies."""
    journal: Journal
    ids: MessageIds
    metrics: Metrics | ListenerTotals | None = None
    """Counts the replies and latencies of all sessions; None: nothing is counted."""
    components: tuple[Component, ...] = ()
    """Called with each new connection."""

    session: ServerSession = field(init=False)
    """The template of all sessions, with the template of their wires."""
    keeps_body: bool = field(init=False)
    """The body must be kept, because the delivery or a policy reads it."""
    discards: Discards | None = field(init=False)
    """The delivery if it keeps nothing and no policy judges messages; otherwise None."""
    counts: Discards | None = field(init=False)
    """`discards` if messages are not journaled; otherwise None."""
    checks_capacity: ChecksCapacity | None = field(init=False)
    """The delivery if it can refuse a message at MAIL for lack of space; otherwise None."""
    streams: Streams | None = field(init=False)
    """The delivery if it passes messages on while they are received, and no policy judges messages; otherwise None."""
    sync_handlers: SyncHandlers = field(init=False)
    """The events of a connection that need no task."""

    def __post_init__(self) -> None:
        delivery, pipeline = self.delivery, self.pipeline
        keeps = delivery.needs_body or bool(pipeline.message) or self.max_hops > 0
        checks_capacity = delivery if isinstance(delivery, ChecksCapacity) else None
        auto_accept = AUTO_ACCEPT_QUIT if pipeline.helo else AUTO_ACCEPT_QUIT | AUTO_ACCEPT_HELLO
        auto_accept |= 0 if pipeline.mail or checks_capacity is not None else AUTO_ACCEPT_MAIL
        auto_accept |= 0 if pipeline.rcpt or self.relay_control.domains is not None else AUTO_ACCEPT_RCPT
        session = ServerSession(
            self.extensions, self.wire.make_wire(self.extensions.max_size), Transaction(Peer("", 0)), auto_accept
        )
        if pipeline.reset:
            session.intercepted_verbs = frozenset({NUMBER["RSET"]})
        discards = delivery if isinstance(delivery, Discards) and not keeps else None
        made = {
            "session": session,
            "keeps_body": keeps,
            "discards": discards,
            "counts": None if self.journal.logs_mail else discards,
            "checks_capacity": checks_capacity,
            "streams": delivery if isinstance(delivery, Streams) and not pipeline.message else None,
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "sync_handlers", Connection.sync_handlers_for(self))

    def must_announce(self, peer: Peer) -> bool:
        """Return whether a client is a proxy that must send a PROXY header first."""
        return bool(self.proxy_networks) and _is_in(peer, self.proxy_networks)

    def refusal(self, transaction: Transaction, path: Path) -> Reply | None:
        """Return why a client may not send to a mailbox, None when it may."""
        peer = transaction.peer
        may_relay = transaction.identity is not None or (
            bool(self.relay_networks) and _is_in(peer, self.relay_networks)
        )
        return self.relay_control.refusal(path, may_relay=may_relay, own_literal=peer.local_literal)
