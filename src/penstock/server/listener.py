"""What all connections of one listener share. Made once by `assemble`, never changed after."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Annotated, Literal

import msgspec

from penstock.auth.base import Authenticator
from penstock.delivery.base import ChecksCapacity, Defers, Delivery, Discards, Streams
from penstock.journal import Journal
from penstock.message import MessageIds, Path
from penstock.metrics._session import Metrics
from penstock.policy.pipeline import Pipeline
from penstock.server.body import BodySettings, MemoryBudget
from penstock.server.domains import Domains
from penstock.server.limits import AuthThrottle, LimitSettings
from penstock.smtp._session import AUTO_ACCEPT_HELLO, AUTO_ACCEPT_MAIL, AUTO_ACCEPT_QUIT, AUTO_ACCEPT_RCPT
from penstock.smtp._wire import Wire
from penstock.smtp.extensions import Extensions
from penstock.smtp.sasl import ChannelBinding
from penstock.smtp.server import ServerSession
from penstock.transaction import Peer, Transaction

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
WireRule = Literal["accept", "normalize", "reject"]


class WireSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a listener does about octets that a text must not have.

    `reject` reads the text to its end and refuses it with 550 5.6.0; `normalize` mends it, which changes the body;
    `accept` lets it through as it is. The end of the data is CR LF . CR LF in all three.
    """

    bare_lf: Annotated[
        WireRule, msgspec.Meta(description="A LF without a CR (RFC 5321 2.3.8); normalize makes it CR LF")
    ] = "reject"
    bare_cr: Annotated[
        WireRule, msgspec.Meta(description="A CR without a LF (RFC 5321 2.3.8); normalize makes it a space")
    ] = "reject"
    nul: Annotated[WireRule, msgspec.Meta(description="A NUL (RFC 5322 4); normalize drops it")] = "reject"
    long_line: Annotated[
        WireRule,
        msgspec.Meta(description="A line above text_line_limit; normalize folds it with CR LF and a space"),
    ] = "reject"
    text_line_limit: Annotated[
        int,
        msgspec.Meta(ge=64, le=1_000_000, description="Octets of a text line without its CR LF (RFC 5321 4.5.3.1.6)"),
    ] = 998

    def make_wire(self, max_octets: int) -> Wire:
        """Make the wire of a connection; `max_octets` bounds a message, 0 does not."""
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
    """Say whether a client's address is in one of the networks; a unix socket is in every one."""
    if not peer.address:
        return True
    address = ipaddress.ip_address(peer.address)
    return any(address in network for network in networks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """The parts and constants of one listener."""

    name: str
    """What the journal calls the listener."""
    offer: Extensions
    wire: WireSettings
    limits: LimitSettings
    domains: Domains | None
    """The domains that anybody may send to; None is every domain."""
    relay_networks: tuple[Network, ...] = ()
    """Clients from here may send to any domain, too."""
    proxy_networks: tuple[Network, ...] = ()
    """Clients from here must begin with a PROXY header."""
    tls: ssl.SSLContext | None = None
    is_implicit_tls: bool = False
    """TLS begins with the first octet (RFC 8314 3)."""
    binding: ChannelBinding | None = None
    """The channel binding of the certificate (RFC 5929 4)."""
    max_hops: int = 50
    """`Received:` fields of a message before it counts as looping (RFC 5321 6.3); 0 does not look."""
    delivery: Delivery
    pipeline: Pipeline
    authenticator: Authenticator | None = None
    auth_throttle: AuthThrottle
    body: BodySettings
    budget: MemoryBudget
    folder: FilePath
    """Where bodies go that do not stay in memory."""
    journal: Journal
    ids: MessageIds
    metrics: Metrics | None = None
    """What counts the replies and the clocks of all sessions; None counts nothing."""

    session: ServerSession = field(init=False)
    """What the sessions of connections are made like, and its wire what their wires are made like."""
    keeps_body: bool = field(init=False)
    """Somebody will read the body, so it has to be kept."""
    discards: Discards | None = field(init=False)
    """The delivery, when it keeps nothing and nobody wants to see a message before it."""
    defers: Defers | None = field(init=False)
    """The delivery, when it answers later without keeping a task, and nobody wants to see a message before it."""
    room: ChecksCapacity | None = field(init=False)
    """The delivery, when it can say before a message comes that there is no room for it."""
    streams: Streams | None = field(init=False)
    """The delivery, when it begins with a message before its end."""

    def __post_init__(self) -> None:
        keeps = self.delivery.needs_body or bool(self.pipeline.message) or self.max_hops > 0
        discards = self.delivery if isinstance(self.delivery, Discards) and not keeps else None
        defers = self.delivery if isinstance(self.delivery, Defers) and not self.pipeline.message else None
        object.__setattr__(self, "keeps_body", keeps)
        object.__setattr__(self, "discards", discards)
        object.__setattr__(self, "defers", defers)
        room = self.delivery if isinstance(self.delivery, ChecksCapacity) else None
        unasked = AUTO_ACCEPT_QUIT if self.pipeline.helo else AUTO_ACCEPT_QUIT | AUTO_ACCEPT_HELLO
        unasked |= 0 if self.pipeline.mail or room is not None else AUTO_ACCEPT_MAIL
        unasked |= 0 if self.pipeline.rcpt or self.domains is not None else AUTO_ACCEPT_RCPT
        object.__setattr__(self, "room", room)
        object.__setattr__(self, "streams", self.delivery if isinstance(self.delivery, Streams) else None)
        wire = self.wire.make_wire(self.offer.max_size)
        session = ServerSession(self.offer, wire, Transaction(Peer("", 0)), unasked)
        object.__setattr__(self, "session", session)

    def must_announce(self, peer: Peer) -> bool:
        """Say whether a client is one of the proxies that have to begin with a PROXY header."""
        return bool(self.proxy_networks) and _is_in(peer, self.proxy_networks)

    def may_send(self, transaction: Transaction, path: Path) -> bool:
        """Say whether a client may send to a mailbox: to the listener's domains, or anywhere when it may relay.

        Postmaster is always reachable, without a domain and at our address (RFC 5321 4.5.1).
        """
        if self.domains is None or path.domain in self.domains or not path.domain:
            return True
        peer = transaction.peer
        if path.domain == Peer(peer.local_address, 0).literal.lower():
            return path.local.lower() == "postmaster"
        return transaction.identity is not None or _is_in(peer, self.relay_networks)
