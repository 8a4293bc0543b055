"""The words of the relay: a next hop, and what it said to a message."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Literal, NamedTuple

import msgspec

from penstock.smtp.client import Answer


class TlsPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS towards a next hop (RFC 3207, RFC 8314).

    `none` never asks for it. `opportunistic` takes it where it is offered, whatever the certificate, and goes on in the
    clear when the handshake fails: it keeps out those who listen, not those who interfere (RFC 7435). `require` sends
    nothing in the clear. `verify` also wants a certificate for the hop's name, from an authority that is trusted.
    """

    mode: Annotated[
        Literal["none", "opportunistic", "require", "verify"],
        msgspec.Meta(
            description="opportunistic: where it is offered, any certificate, in the clear when the handshake fails; "
            "require: or nothing is sent; verify: with a certificate for the name of the hop"
        ),
    ] = "opportunistic"
    implicit: Annotated[
        bool, msgspec.Meta(description="TLS from the first octet, as on port 465, in place of STARTTLS (RFC 8314)")
    ] = False
    ca_file: Annotated[
        str, msgspec.Meta(description="PEM file of the authorities that verify trusts; the system's when empty")
    ] = ""
    name: Annotated[
        str, msgspec.Meta(description="The name in the certificate, and for SNI; that of the hop when empty")
    ] = ""


class HopLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of it a next hop gets, and how its failures are met. For each worker."""

    connections: Annotated[int, msgspec.Meta(ge=1, le=10_000, description="Connections to a hop at a time")] = 20
    messages: Annotated[
        int, msgspec.Meta(ge=1, le=10_000_000, description="Transactions on a connection before it is closed")
    ] = 1000
    recipients: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=1000,
            description="Recipients of a transaction; 100 when the hop does not say what it takes (RFC 9422)",
        ),
    ] = 1000
    idle: Annotated[
        float, msgspec.Meta(ge=0, le=3600, description="Seconds a connection is kept with nothing to do")
    ] = 15.0
    queue: Annotated[
        int, msgspec.Meta(ge=1, le=1_000_000, description="Messages that may wait for a connection to the hop")
    ] = 1000
    wait: Annotated[float, msgspec.Meta(gt=0, le=3600, description="Seconds a message waits for a connection")] = 300.0
    message_rate: Annotated[float, msgspec.Meta(ge=0, description="Messages a second; 0 is no limit")] = 0.0
    connection_rate: Annotated[float, msgspec.Meta(ge=0, description="New connections a second; 0 is no limit")] = 0.0
    chunking: Annotated[bool, msgspec.Meta(description="Use CHUNKING (BDAT, RFC 3030) where it is offered")] = True
    breaker_failures: Annotated[
        int, msgspec.Meta(ge=1, le=1000, description="Failures in a row after which a hop is left alone for a while")
    ] = 3
    breaker_pause: Annotated[
        float,
        msgspec.Meta(ge=0, le=3600, description="Seconds it is left alone at first; each time twice as long"),
    ] = 10.0
    breaker_longest: Annotated[float, msgspec.Meta(ge=0, le=86_400, description="Seconds it is left alone at most")] = (
        600.0
    )


class Hop(msgspec.Struct, frozen=True, kw_only=True, cache_hash=True):
    """A next hop: where to connect, and how. The key of its connections; keep it, and use it again."""

    host: str = ""
    """The name of the host, or its address: what a certificate has to name, and what logs show."""
    port: int = 25
    kind: Literal["smtp", "lmtp"] = "smtp"
    path: str = ""
    """A unix socket; "" is TCP."""
    address: str = ""
    """The IP address to connect to, when it is known; otherwise the system looks `host` up."""
    tls: TlsPolicy = TlsPolicy()
    user: str = ""
    """Who we are to a smart host; "" does not authenticate."""
    password: str = ""
    limits: HopLimits = HopLimits()

    @property
    def name(self) -> str:
        """What logs and reports call it: "mx.example.org[192.0.2.1]:25", "unix:/run/lmtp"."""
        if self.path:
            return f"unix:{self.path}"
        address = f"[{self.address}]" if self.address and self.address != self.host else ""
        return f"{self.host}{address}:{self.port}"

    def __repr__(self) -> str:
        return f"<Hop {self.kind} {self.name}>"  # never the password


class Outcome(Enum):
    """What became of a recipient."""

    DELIVERED = "delivered"
    """The hop has taken responsibility (2yz)."""
    DEFERRED = "deferred"
    """Not now (4yz), or the connection was lost: to be tried again."""
    FAILED = "failed"
    """Never (5yz), or the hop can not take this message at all."""


class Result(NamedTuple):
    """The outcome for one recipient."""

    kind: Outcome
    text: str
    """What the hop said, printable and in one line: "550 5.1.1 no such user". Or what happened, without a code."""
    status: str
    """The enhanced status code: "5.1.1"."""
    hop: str
    """The name of the hop."""
    is_said: bool = True
    """The text is the hop's; otherwise it is ours."""
    reports: bool = False
    """The hop has heard what the sender wants to be told, and will tell it (RFC 3461 5.2.1)."""
    in_doubt: bool = False
    """The connection was lost after the whole text was sent: the hop may have the message (RFC 1047)."""

    @classmethod
    def of(cls, answer: Answer, hop: str, *, reports: bool = False) -> Result:
        """Return what an answer means."""
        code = answer.code
        kind = Outcome.DELIVERED if code < 300 else Outcome.FAILED if code >= 500 else Outcome.DEFERRED
        return cls(kind, answer.text, answer.status, hop, True, reports)


Delivered = Sequence[Result]
"""What a transaction came to: one result for each recipient of the envelope, in its order."""


class NextHopUnavailable(Exception):  # noqa: N818 - a state of the hop, not a mistake of the caller
    """The hop cannot be used now, and nothing of the message was sent: another hop may be tried at once."""

    def __init__(self, hop: str, text: str, status: str = "4.4.1", *, is_said: bool = False) -> None:
        super().__init__(f"{hop}: {text}")
        self.hop = hop
        self.text = text
        """What happened, or what the hop said; printable."""
        self.status = status
        """The enhanced status code as the hop gave it, or ours. A 5.x.x does not fail the recipients."""
        self.is_said = is_said
        """`text` is the hop's reply; otherwise it is ours."""

    def as_result(self) -> Result:
        """Return it as the result for a recipient: deferred, with a persistent transient status (RFC 3463 3.1)."""
        status = f"4{self.status[1:]}" if self.status.startswith("5") else self.status
        return Result(Outcome.DEFERRED, self.text, status, self.hop, is_said=self.is_said)
