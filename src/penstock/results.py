"""What checks have found out about a mail transaction, for later checks and for the delivery."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from penstock.mailauth.arc import ArcResult
    from penstock.mailauth.dkim import DkimResult
    from penstock.mailauth.dmarc import DmarcResult
    from penstock.mailauth.spf import SpfResult


class IprevResult(NamedTuple):
    """Whether a name of the client's address leads back to it (RFC 8601 2.7.3)."""

    result: Literal["pass", "fail", "temperror", "permerror"]
    name: str = ""
    """The name that leads back; "" without one."""
    cause: str = ""


class Listing(NamedTuple):
    """A list of addresses in the DNS that has the client."""

    zone: str
    answers: tuple[str, ...]
    """The addresses that the list has returned."""
    score: float
    text: str = ""
    """What the list says about it; printable ASCII."""


class DnsblResult(NamedTuple):
    """The lists that have the client."""

    listings: tuple[Listing, ...] = ()

    @property
    def score(self) -> float:
        """The sum of their scores."""
        return sum(each.score for each in self.listings)


class Results(dict[str, Any]):
    """The findings of the built-in checks as attributes; policies keep what they like under names of their own.

    None means that a check was not made: it is off, or the client is trusted or authenticated.

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
        return sum(self.scores.values())
