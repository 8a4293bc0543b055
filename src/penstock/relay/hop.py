"""A next hop, and the result of a message for a recipient."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Literal, NamedTuple

import msgspec

from penstock.relay.dane import DanePolicy
from penstock.smtp.client import MECHANISMS, ServerReply


class TlsPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS towards a next hop (RFC 3207, RFC 8314).

    `none` never uses it. `opportunistic` uses it if it is offered, with any certificate, and repeats one attempt in
    clear text if the handshake fails: a protection against passive attacks only (RFC 7435). `require` sends no mail in
    clear text. `verify` also requires a certificate for the name of the hop from a trusted authority.
    """

    mode: Annotated[
        Literal["none", "opportunistic", "require", "verify"],
        msgspec.Meta(
            description="opportunistic: if offered, any certificate, one attempt in clear text if the handshake fails; "
            "require: never in clear text; verify: with a trusted certificate for the name of the hop"
        ),
    ] = "opportunistic"
    implicit: Annotated[
        bool, msgspec.Meta(description="TLS from the first octet, as on port 465, in place of STARTTLS (RFC 8314)")
    ] = False
    ca_file: Annotated[
        str,
        msgspec.Meta(description="PEM file of the certificate authorities for verify; default: those of the system"),
    ] = ""
    name: Annotated[
        str, msgspec.Meta(description="Name in the certificate, and for SNI; default: the host name of the hop")
    ] = ""


class AuthPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How to authenticate at a next hop (RFC 4954)."""

    mechanisms: tuple[str, ...] = MECHANISMS
    """SASL mechanisms to use, the preferred one first."""
    unverified_tls: bool = False
    """Use PLAIN and LOGIN, which give the password away, over TLS even if the certificate was not verified."""


class HopLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits for a next hop, and what happens after its failures. See admission.shared."""

    connections: Annotated[int, msgspec.Meta(ge=1, le=10_000, description="Concurrent connections to a hop")] = 20
    messages: Annotated[
        int, msgspec.Meta(ge=1, le=10_000_000, description="Transactions on a connection before it is closed")
    ] = 1000
    recipients: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=1000,
            description="Recipients of a transaction; 100 if the hop does not announce its limit (RFC 9422)",
        ),
    ] = 1000
    idle: Annotated[float, msgspec.Meta(ge=0, le=3600, description="Seconds an idle connection is kept")] = 15.0
    queue: Annotated[
        int, msgspec.Meta(ge=1, le=1_000_000, description="Messages that may wait for a connection to the hop")
    ] = 1000
    wait: Annotated[float, msgspec.Meta(gt=0, le=3600, description="Seconds a message waits for a connection")] = 300.0
    message_rate: Annotated[float, msgspec.Meta(ge=0, description="Messages per second; 0: no limit")] = 0.0
    connection_rate: Annotated[float, msgspec.Meta(ge=0, description="New connections per second; 0: no limit")] = 0.0
    chunking: Annotated[bool, msgspec.Meta(description="Use CHUNKING (BDAT, RFC 3030) if it is offered")] = True
    breaker_failures: Annotated[
        int, msgspec.Meta(ge=1, le=1000, description="Consecutive failures after which a hop is not tried for a while")
    ] = 3
    breaker_pause: Annotated[
        float,
        msgspec.Meta(ge=0, le=3600, description="Seconds until it is tried again; doubled after each failure"),
    ] = 10.0
    breaker_longest: Annotated[
        float, msgspec.Meta(ge=0, le=86_400, description="Maximum seconds until it is tried again")
    ] = 600.0


class Hop(msgspec.Struct, frozen=True, kw_only=True, cache_hash=True):
    """A next hop: where to connect, and how. The key of its connections; keep it, and use it again."""

    host: str = ""
    """The name of the host, or its address: what a certificate must name, and what logs show."""
    port: int = 25
    kind: Literal["smtp", "lmtp"] = "smtp"
    path: str = ""
    """A unix socket; "" is TCP."""
    address: str = ""
    """The IP address to connect to, if it is known; otherwise `host` is looked up."""
    tls: TlsPolicy = TlsPolicy()
    user: str = ""
    """The user name for AUTH; "" does not authenticate."""
    password: str = ""
    auth: AuthPolicy = AuthPolicy()
    limits: HopLimits = HopLimits()
    dane: DanePolicy | None = None
    """How its certificate is verified instead of by an authority (RFC 7672)."""
    is_testing: bool = False
    """Verify its certificate as with the mode "verify", report a failure, and then go on without (RFC 8461 5)."""
    is_reported: bool = True
    """Connections are counted for TLS reports; not those that carry such reports (RFC 8460 3)."""

    @property
    def is_verified(self) -> bool:
        """A connection is used only if the certificate is that of the hop."""
        return self.tls.mode == "verify" or (self.dane is not None and self.dane.authenticates)

    @property
    def name(self) -> str:
        """The name in logs and reports: "mx.example.org[192.0.2.1]:25", "unix:/run/lmtp"."""
        if self.path:
            return f"unix:{self.path}"
        address = f"[{self.address}]" if self.address and self.address != self.host else ""
        return f"{self.host}{address}:{self.port}"

    def __repr__(self) -> str:
        return f"<Hop {self.kind} {self.name}>"  # never the password


class Outcome(Enum):
    """What became of a recipient."""

    DELIVERED = "delivered"
    """The hop has taken responsibility (2xx)."""
    DEFERRED = "deferred"
    """To be tried again: the hop replied 4xx, or the connection was lost."""
    FAILED = "failed"
    """Permanently refused (5xx), or the hop cannot accept this message."""


class Result(NamedTuple):
    """The outcome for one recipient."""

    kind: Outcome
    text: str
    """The reply of the hop, printable and in one line: "550 5.1.1 no such user". Or what happened, without a code."""
    status: str
    """The enhanced status code: "5.1.1"."""
    hop: str
    """The name of the hop."""
    is_said: bool = True
    """The text is a reply of the hop, otherwise our own."""
    reports: bool = False
    """The hop supports DSN: it sends the notifications that the sender asked for (RFC 3461 5.2.1)."""
    in_doubt: bool = False
    """The connection was lost after the whole text was sent: the hop may have the message (RFC 1047)."""

    @classmethod
    def of(cls, reply: ServerReply, hop: str, *, reports: bool = False) -> Result:
        """Return the result that a reply means."""
        code = reply.code
        kind = Outcome.DELIVERED if code < 300 else Outcome.FAILED if code >= 500 else Outcome.DEFERRED
        return cls(kind, reply.text, reply.status, hop, True, reports)


Delivered = Sequence[Result]
"""The outcome of a delivery: one result for each recipient of the envelope, in its order."""


class NextHopUnavailable(Exception):  # noqa: N818 - a state of the hop, not a mistake of the caller
    """The hop cannot be used now, and nothing of the message was sent: another hop may be tried at once."""

    def __init__(
        self, hop: str, text: str, status: str = "4.4.1", *, is_said: bool = False, tls_failure: str = ""
    ) -> None:
        super().__init__(f"{hop}: {text}")
        self.tls_failure = tls_failure
        """The result type of a TLS report (RFC 8460 4.3) if TLS is what failed."""
        self.hop = hop
        self.text = text
        """The reply of the hop, or the error; printable."""
        self.status = status
        """The enhanced status code as the hop gave it, or ours. A 5.x.x does not fail the recipients."""
        self.is_said = is_said
        """`text` is the hop's reply; otherwise it is ours."""

    def as_result(self) -> Result:
        """Return it as the result for a recipient: deferred, with a persistent transient status (RFC 3463 3.1)."""
        status = f"4{self.status[1:]}" if self.status.startswith("5") else self.status
        return Result(Outcome.DEFERRED, self.text, status, self.hop, is_said=self.is_said)
