"""DMARC: what the domain of From says about mail that is not authenticated (RFC 9989).

The organizational domain is found by walking up the DNS, 8 questions at most for each domain (RFC 9989 4.10); no list
of public suffixes is needed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from penstock.mailauth.dkim import DkimResult
from penstock.mailauth.lookup import Query
from penstock.mailauth.spf import SpfResult

Result = Literal["pass", "fail", "none", "temperror", "permerror"]
Policy = Literal["none", "quarantine", "reject"]
MAX_LABELS: Final = 8
MAX_RECORD: Final = 4096
MAX_WALKS: Final = 4
"""Domains whose organizational domain is looked for, besides that of the author."""
_POLICIES: Final[dict[str, Policy]] = {"none": "none", "quarantine": "quarantine", "reject": "reject"}
_TESTED: Final[dict[Policy, Policy]] = {"reject": "quarantine", "quarantine": "none", "none": "none"}
_TAG: Final = re.compile(r"[ \t]*([A-Za-z0-9]+)[ \t]*=[ \t]*(.*?)[ \t]*", re.DOTALL)
_URI: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:[!-+\--~]+")


class Record(NamedTuple):
    """A policy record."""

    policy: Policy
    subdomain_policy: Policy
    absent_policy: Policy
    """For subdomains that do not exist."""
    strict_dkim: bool = False
    strict_spf: bool = False
    psd: str = "u"
    """"y": a public suffix; "n": an organizational domain; "u": not said."""
    is_testing: bool = False
    reports: tuple[str, ...] = ()
    """rua=: where aggregate reports go."""


class DmarcResult(NamedTuple):
    """The result for the domain of From."""

    result: Result
    domain: str
    """The domain of From."""
    policy: Policy = "none"
    """What the domain asks for when the result is fail, or could be."""
    policy_domain: str = ""
    """Where the record was found."""
    cause: str = ""
    record: Record | None = None


class _TemporaryError(Exception):
    pass


async def check(query: Query, domain: str, spf: SpfResult | None, dkim: Sequence[DkimResult]) -> DmarcResult:
    """Return whether something that is authenticated belongs to the domain of From; "" is a domain that is none.

    A temporary result of SPF or DKIM that could have made it pass makes it "temperror": the policy says how much that
    matters. `query` never raises.
    """
    if not domain:
        return DmarcResult("permerror", domain, cause="From has no domain")
    walks = _Walks(query)
    try:
        own = await walks.record(domain)
        passed = pass_of_own_record(own, domain, spf, dkim)
        if passed is not None:
            return passed
        walk = await walks.walk(domain)
    except _TemporaryError as exc:
        return DmarcResult("temperror", domain, "reject", cause=str(exc))  # what the policy is, is not known
    found = walk.policy
    if found is None:
        return DmarcResult("none", domain, cause="no DMARC record")
    policy_domain, record = found
    try:
        policy = await _policy(query, domain, policy_domain, record)
    except _TemporaryError as exc:
        return DmarcResult("temperror", domain, record.subdomain_policy, policy_domain, str(exc), record)
    verdicts: list[tuple[str, str, str]] = [(each.domain, each.result, "dkim") for each in dkim]
    if spf is not None:
        verdicts.append((spf.domain, spf.result, "spf"))
    result, cause = await _align(walks, walk, record, verdicts)
    return DmarcResult(result, domain, policy, policy_domain, cause, record)


def pass_of_own_record(
    own: Record | None, domain: str, spf: SpfResult | None, dkim: Sequence[DkimResult]
) -> DmarcResult | None:
    """Return a pass if the domain of From has a record, and itself has passed: no walk is needed (RFC 9989 4.10.2)."""
    if own is None:
        return None
    for each in dkim:
        if each.domain == domain and each.result == "pass":
            break
    else:
        if spf is None or spf.domain != domain or spf.result != "pass":
            return None
    return DmarcResult("pass", domain, _tested(own, own.policy), domain, record=own)


async def _align(
    walks: _Walks, author: _Walk, record: Record, verdicts: list[tuple[str, str, str]]
) -> tuple[Result, str]:
    """Look for something that passes and is aligned; return the result and its cause."""
    unsure = ""
    # Those that pass come first, and those that are cheap to compare; one that is aligned is enough.
    for domain, result, method in sorted(verdicts, key=lambda each: (each[1] != "pass", each[0] != author.domain)):
        if result not in ("pass", "temperror"):
            continue
        try:
            strict = record.strict_spf if method == "spf" else record.strict_dkim
            aligned = await _is_aligned(walks, author, domain, strict=strict)
        except _TemporaryError as exc:
            unsure = unsure or str(exc)
            continue
        if aligned and result == "pass":
            return "pass", ""
        if aligned:
            unsure = unsure or f"a temporary error of {domain}"
    return ("temperror", unsure) if unsure else ("fail", "nothing is aligned")


async def _policy(query: Query, domain: str, policy_domain: str, record: Record) -> Policy:
    """Return the policy that applies (RFC 9989 4.10.1)."""
    policy = record.policy
    if domain != policy_domain:
        policy = record.subdomain_policy
        if record.absent_policy != policy:
            status = (await query(domain, "A")).status
            if status == "failed":
                raise _TemporaryError(f"the DNS does not answer about {domain}")
            if status == "missing":
                policy = record.absent_policy
    return _tested(record, policy)


def _tested(record: Record, policy: Policy) -> Policy:
    return _TESTED[policy] if record.is_testing else policy  # t=y: one step milder


async def _is_aligned(walks: _Walks, author: _Walk, domain: str, *, strict: bool) -> bool:
    """Compare an authenticated domain with that of From (RFC 9989 4.10.2)."""
    if domain == author.domain:
        return True
    if strict:
        return False
    organization = author.organization
    if domain != organization and not domain.endswith("." + organization):
        return False  # its organizational domain is above it, and so another
    return (await walks.walk(domain)).organization == organization


class _Walk(NamedTuple):
    """The records found on the way up from a domain, from the longest name to the shortest."""

    domain: str
    records: tuple[tuple[str, Record], ...]

    @property
    def organization(self) -> str:
        """Return the organizational domain (RFC 9989 4.10.2)."""
        for name, record in self.records:
            if record.psd == "n":
                return name
            if record.psd == "y" and name != self.domain:
                labels = self.domain.split(".")
                return ".".join(labels[-name.count(".") - 2 :])
        return self.records[-1][0] if self.records else self.domain

    @property
    def policy(self) -> tuple[str, Record] | None:
        """Return the record that applies: the domain's, its organization's, or that of the public suffix."""
        organization = self.organization
        found = dict(self.records)
        for name in (self.domain, organization):
            if name in found:
                return name, found[name]
        return next((each for each in self.records if each[1].psd == "y"), None)


class _Walks:
    """Walks up the DNS, each domain once."""

    def __init__(self, query: Query) -> None:
        self._query = query
        self._walks: dict[str, _Walk] = {}

    async def record(self, domain: str) -> Record | None:
        """Return the record of a domain; several are none. Raise _TemporaryError.

        A top-level domain that is not answered about counts as without a record: hardly any has one, and mail must not
        wait for those of a DNS that does not serve them.
        """
        answer = await self._query(f"_dmarc.{domain}", "TXT")
        if answer.status == "failed" and "." in domain:
            raise _TemporaryError(f"the DNS does not answer about _dmarc.{domain}")
        return only_record(answer.records)

    async def walk(self, domain: str) -> _Walk:
        """Return the records of a domain and those above it (RFC 9989 4.10). Raise _TemporaryError."""
        found = self._walks.get(domain)
        if found is not None:
            return found
        if len(self._walks) > MAX_WALKS:
            return _Walk(domain, ())
        records: list[tuple[str, Record]] = []
        for name in names_to_ask(domain):
            record = await self.record(name)
            if record is not None:
                records.append((name, record))
                if record.psd != "u":
                    break
        walk = self._walks[domain] = _Walk(domain, tuple(records))
        return walk


def names_to_ask(domain: str) -> list[str]:
    """Return the domains whose records are asked for, at most 8 (RFC 9989 4.10)."""
    labels = domain.split(".")
    above = labels[1:] if len(labels) < MAX_LABELS else labels[1 - MAX_LABELS :]
    return [domain, *(".".join(above[at:]) for at in range(len(above)))]


@functools.lru_cache(maxsize=20_000)
def only_record(records: tuple[bytes, ...]) -> Record | None:
    """Return the record in an answer; several are none (RFC 9989 4.10)."""
    candidates = [text for text in records if _is_dmarc(text)]
    return parse(candidates[0]) if len(candidates) == 1 else None


def _is_dmarc(text: bytes) -> bool:
    return re.match(rb"v[ \t]*=[ \t]*DMARC1[ \t]*(?:;|\Z)", text) is not None


def parse(octets: bytes) -> Record | None:
    """Read a record (RFC 9989 4.7, 4.8). None is one that must be ignored: an invalid policy, and no reports wanted."""
    if not _is_dmarc(octets) or len(octets) > MAX_RECORD:
        return None
    tags: dict[str, str] = {}
    for part in octets.decode("latin-1").split(";"):
        match = _TAG.fullmatch(part)
        if match is not None:
            tags.setdefault(match[1].lower(), match[2])
    reports = tuple(uri for uri in map(str.strip, tags.get("rua", "").split(",")) if _URI.fullmatch(uri))
    policies = [_POLICIES.get(tags[name].lower()) for name in ("p", "sp", "np") if name in tags]
    if None in policies:
        if not reports:
            return None
        policy = subdomain = absent = _POLICIES["none"]
    else:
        policy = _POLICIES[tags.get("p", "none").lower()]
        subdomain = _POLICIES[tags["sp"].lower()] if "sp" in tags else policy
        absent = _POLICIES[tags["np"].lower()] if "np" in tags else subdomain
    psd = tags.get("psd", "u").lower()
    return Record(
        policy,
        subdomain,
        absent,
        tags.get("adkim", "r").lower() == "s",
        tags.get("aspf", "r").lower() == "s",
        psd if psd in ("y", "n") else "u",
        tags.get("t", "n").lower() == "y",
        reports,
    )
