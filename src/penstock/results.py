"""Results of checks of a mail transaction, for later checks and for the delivery."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from penstock.mailauth.arc import ArcResult
    from penstock.mailauth.dkim import DkimResult
    from penstock.mailauth.dmarc import DmarcResult
    from penstock.mailauth.spf import SpfResult


class Quarantine(NamedTuple):
    """What happens to a message in quarantine that is neither held nor routed: it is delivered with header fields."""

    is_held: bool = False
    """It stays in the spool until it is released."""
    route: str = ""
    """The name of the route whose next hop gets it."""


def parse_quarantine(text: str) -> Quarantine | None:
    """Read "tag", "hold" or "route:NAME"; None for any other text."""
    if text in ("tag", "hold"):
        return Quarantine(is_held=text == "hold")
    _, prefix, route = text.partition("route:")
    return Quarantine(route=route) if prefix and route and text.startswith(prefix) else None


class IprevResult(NamedTuple):
    """Whether a name of the client's address resolves to that address (RFC 8601 2.7.3)."""

    result: Literal["pass", "fail", "temperror", "permerror"]
    name: str = ""
    """The name that resolves to the address; "" without one."""
    cause: str = ""


class Listing(NamedTuple):
    """A DNS list that contains the client's address."""

    zone: str
    answers: tuple[str, ...]
    """The addresses that the list has returned."""
    score: float
    text: str = ""
    """The reason that the list publishes (TXT record); printable ASCII."""


class DnsblResult(NamedTuple):
    """The lists that contain the client."""

    listings: tuple[Listing, ...] = ()

    @property
    def score(self) -> float:
        """The sum of their scores."""
        return sum(each.score for each in self.listings)


class Results(dict[str, Any]):
    """Results of the built-in checks as attributes; policies may store values under keys of their own.

    None: the check was not made, because it is off, or the client is trusted or authenticated.

    >>> transaction.results.spf.result
    'pass'
    >>> transaction.results["my policy"] = 42
    """

    __slots__ = ("arc", "dkim", "dmarc", "dnsbl", "iprev", "monitored_scores", "quarantine", "scores", "spf")

    def __init__(self) -> None:
        super().__init__()
        self.iprev: IprevResult | None = None
        self.dnsbl: DnsblResult | None = None
        self.spf: SpfResult | None = None
        self.dkim: tuple[DkimResult, ...] = ()
        self.dmarc: DmarcResult | None = None
        self.arc: ArcResult | None = None
        self.scores: dict[str, float] = {}
        """Scores by the name of the check; they are added up at the end of the message."""
        self.monitored_scores: dict[str, float] = {}
        """Scores of checks in monitor mode: they decide nothing."""
        self.quarantine = ""
        """What happens to the message if it is accepted: "" (it is delivered), "tag", "hold", or "route:NAME"."""

    @property
    def score(self) -> float:
        """The sum of `scores`."""
        return sum(self.scores.values()) if self.scores else 0
