"""What the results mean for a message: accept, quarantine, refuse, or ask the client to try again.

Only an answer can condemn: a result that is not known now never refuses for ever, and makes the client wait only where
the answer could have refused. A permanent error in a record counts as if there were no record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from penstock.mailauth.dkim import DkimResult
from penstock.mailauth.dmarc import DmarcResult, Policy
from penstock.mailauth.spf import SpfResult

Mode = Literal["off", "monitor", "enforce"]
Action = Literal["accept", "quarantine", "defer", "reject"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionSettings:
    """How much each check may decide. A check that is "off" was not made."""

    spf: Mode = "monitor"
    dkim: Mode = "monitor"
    dmarc: Mode = "monitor"
    require_aligned: bool = False
    """A message without a valid signature of its From domain is refused."""
    on_fail: dict[Policy, Action] = field(
        default_factory=lambda: {"reject": "reject", "quarantine": "quarantine", "none": "accept"}
    )
    """What follows from a fail of DMARC, by what the domain asks for."""
    temperror: Literal["defer", "accept"] = "defer"
    trusted_sealers: frozenset[str] = frozenset()
    """Domains, in lower case, whose ARC seals the header calls trusted. They decide nothing."""


class Decision(NamedTuple):
    """What to do, and what to say."""

    action: Action
    check: str = ""
    """The check that decides: "from", "spf", "dkim", "dmarc"."""
    code: int = 250
    status: str = ""
    text: str = ""
    """For the client."""
    cause: str = ""
    """For the journal."""


ACCEPT: Final = Decision("accept")
_SEVERITY: Final[dict[Action, int]] = {"accept": 0, "quarantine": 1, "defer": 2, "reject": 3}


class Decisions(NamedTuple):
    """What the checks decide that may, and what those would that only watch."""

    enforced: Decision = ACCEPT
    monitored: Decision = ACCEPT


NOTHING: Final = Decisions()


class Findings(NamedTuple):
    """What the checks found for a message."""

    author_domains: tuple[str, ...]
    """The domains of all authors in all From fields."""
    from_fields: int
    spf: SpfResult | None = None
    dkim: tuple[DkimResult, ...] = ()
    dmarc: DmarcResult | None = None


def decide(findings: Findings, settings: DecisionSettings) -> Decisions:
    """Return the most severe decision of the checks that enforce, and that of those that monitor."""
    if findings.dmarc is not None and findings.dmarc.result == "pass" and not settings.require_aligned:
        return NOTHING  # it takes one From field with one author
    found: list[tuple[Mode, Decision]] = [
        (settings.dmarc, _of_from(findings)),
        (settings.dmarc, _of_dmarc(findings.dmarc, settings)),
    ]
    if settings.dmarc == "off":
        found.append((settings.spf, _of_spf(findings.spf, settings)))
    if settings.require_aligned:
        found.append((settings.dkim, _of_dkim(findings, settings)))
    return Decisions(_severest(found, "enforce"), _severest(found, "monitor"))


def _severest(found: list[tuple[Mode, Decision]], mode: Mode) -> Decision:
    return max((each for of, each in found if of == mode), key=lambda each: _SEVERITY[each.action], default=ACCEPT)


def _of_from(findings: Findings) -> Decision:
    """Refuse more than one From field, and authors of several domains (RFC 5322 3.6; RFC 9989 11.5)."""
    if findings.from_fields > 1:
        return Decision(
            "reject", "from", 550, "5.6.0", "More than one From field", f"{findings.from_fields} From fields"
        )
    if len(findings.author_domains) > 1:
        cause = "authors of several domains: " + ", ".join(findings.author_domains[:4])
        return Decision("reject", "from", 550, "5.6.0", "The authors in From belong to different domains", cause)
    return ACCEPT


def _of_dmarc(result: DmarcResult | None, settings: DecisionSettings) -> Decision:
    if result is None or result.result not in ("fail", "temperror"):
        return ACCEPT
    action = settings.on_fail[result.policy]
    if result.result == "temperror":
        if action == "accept" or settings.temperror == "accept":
            return ACCEPT
        text = f"The DMARC policy of {result.domain} cannot be evaluated at present"
        return Decision("defer", "dmarc", 451, "4.4.3", text, result.cause)
    cause = f"dmarc=fail p={result.policy} of {result.policy_domain}"
    if action == "reject":
        text = f"The DMARC policy of {result.domain} rejects this message"
        return Decision("reject", "dmarc", 550, "5.7.1", text, cause)
    return Decision(action, "dmarc", cause=cause)


def _of_spf(result: SpfResult | None, settings: DecisionSettings) -> Decision:
    """Without DMARC, a fail of SPF refuses (RFC 7208 8.4); the domain explains."""
    if result is None:
        return ACCEPT
    if result.result == "fail":
        text = f"SPF validation of {result.domain} failed"
        if result.explanation:
            # RFC 7208 8.4: the explanation is another's text, and must be seen as such.
            text += f"; {result.domain} explains: {result.explanation}"
        return Decision("reject", "spf", 550, "5.7.23", text, f"spf=fail for {result.domain}")
    if result.result == "temperror" and settings.temperror == "defer":
        text = f"The SPF record of {result.domain} cannot be evaluated at present"
        return Decision("defer", "spf", 451, "4.7.24", text, result.cause)
    return ACCEPT


def _of_dkim(findings: Findings, settings: DecisionSettings) -> Decision:
    """Ask for a valid signature of the author's domain (RFC 7372 3.1)."""
    author = findings.author_domains[0] if findings.author_domains else ""

    def is_aligned(domain: str) -> bool:
        return domain == author or author.endswith("." + domain) or domain.endswith("." + author)

    if any(each.result == "pass" and is_aligned(each.domain) for each in findings.dkim if author):
        return ACCEPT
    if any(each.result == "temperror" and is_aligned(each.domain) for each in findings.dkim):
        if settings.temperror == "accept":
            return ACCEPT
        text = "The DKIM key cannot be fetched at present"
        return Decision("defer", "dkim", 451, "4.4.3", text, "dkim=temperror")
    if any(each.result == "pass" for each in findings.dkim):
        text = "No valid DKIM signature matches the author"
        return Decision("reject", "dkim", 550, "5.7.22", text, "no aligned signature passes")
    if any(each.result == "policy" for each in findings.dkim):
        return Decision("reject", "dkim", 550, "5.7.21", "No acceptable DKIM signature found", "dkim=policy")
    return Decision("reject", "dkim", 550, "5.7.20", "No passing DKIM signature found", "no signature passes")
