"""SPF: whether an address may send for a domain (RFC 7208).

`check` evaluates one identity. Limits (RFC 7208 4.6.4): 10 terms that ask the DNS, 2 of them without an answer, 10
hosts of an `mx`, 10 names of an address. Parsed records are kept by their text: parsing costs more than evaluating.

A record is untrusted text: an error in it is "permerror", a missing answer of the DNS "temperror".
Both are results. Neither is a reason to refuse a message for ever (RFC 7208 8.6, 8.7).
"""

from __future__ import annotations

import functools
import ipaddress
import re
import urllib.parse
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from penstock.mailauth.header import canonical_domain
from penstock.mailauth.lookup import Answer, Cached, Kind, Query, UnknownAnswerError, known_query, run_now

Result = Literal["pass", "fail", "softfail", "neutral", "none", "temperror", "permerror"]
MAX_TERMS: Final = 10
MAX_VOID: Final = 2
MAX_NAMES: Final = 10
MAX_RECORD: Final = 8192
"""Octets of a record; longer ones are permanent errors."""
MAX_EXPLANATION: Final = 400
"""Octets of an explanation that are used: it becomes a part of a reply line."""

_QUALIFIERS: Final[dict[str, Result]] = {"+": "pass", "-": "fail", "~": "softfail", "?": "neutral", "": "pass"}
_TERM: Final = re.compile(
    r"(?:([+\-~?]?)(all|include|a|mx|ptr|ip4|ip6|exists)([:/].*)?|([A-Za-z][A-Za-z0-9\-_.]*)=(.*))", re.IGNORECASE
)
_LENGTHS: Final = re.compile(r"(.*?)(?:/(0|[1-9]\d?))?(?://(0|[1-9]\d{0,2}))?")
_MACRO: Final = re.compile(r"%(?:\{([slodiphcrtv])(\d*)(r?)([.\-+,/_=]*)\}|([%_\-]))", re.IGNORECASE)
_MACRO_STRING: Final = re.compile(r"(?:[!-$&-~]|%\{[slodiphcrtv]\d*r?[.\-+,/_=]*\}|%[%_\-])*", re.IGNORECASE)
_TOP_LABEL: Final = re.compile(r"(?![0-9]+\Z)[A-Za-z0-9](?:[A-Za-z0-9\-]*[A-Za-z0-9])?")
_ESCAPES: Final = {"%": "%", "_": " ", "-": "%20"}


class SpfResult(NamedTuple):
    """The result for one identity."""

    result: Result
    domain: str
    """The domain whose record was evaluated."""
    identity: Literal["mailfrom", "helo"]
    """Whose domain it is; that of EHLO for the null sender (RFC 7208 2.4)."""
    explanation: str = ""
    """The text the domain gives for a fail; printable ASCII."""
    cause: str = ""
    """Why it is an error."""


class _TemporaryError(Exception):
    pass


class _PermanentError(Exception):
    pass


class _Term(NamedTuple):
    """A mechanism."""

    name: str
    result: Result
    domain: str = ""
    network: int = 0
    """The bits of the network, shifted right by `shift`."""
    shift: int = 0
    lengths: tuple[int, int] = (32, 128)
    version: int = 0
    """4 or 6, of the addresses in the network; 0 for other mechanisms."""


@dataclass(frozen=True, slots=True)
class _Record:
    """A parsed record."""

    terms: tuple[_Term, ...]
    redirect: str
    explanation: str
    error: str = ""


async def check(
    query: Query, *, address: str, sender: str, helo: str, receiver: str = "unknown", now: int = 0
) -> SpfResult:
    """Return whether `address` may send for the domain of `sender`, or for `helo` when the sender is null.

    `receiver` and `now` (seconds since 1970) are what explanations may quote. Raise ValueError for what is no address.
    """
    identity: Literal["mailfrom", "helo"] = "mailfrom" if sender else "helo"
    evaluation = _Evaluation(query, address, sender or f"postmaster@{helo}", helo, receiver, now)
    domain = _comparable(evaluation.domain)
    try:
        result = await evaluation.check_host(domain, is_outermost=True)
    except _TemporaryError as exc:
        return SpfResult("temperror", domain, identity, cause=str(exc))
    except _PermanentError as exc:
        return SpfResult("permerror", domain, identity, cause=str(exc))
    return SpfResult(result, domain, identity, evaluation.explanation if result == "fail" else "")


def check_known(
    cached: Cached, *, address: str, sender: str, helo: str, receiver: str = "unknown", now: int = 0
) -> SpfResult | None:
    """Return what `check` does; None if it needs an answer that is not cached."""
    _, number, is_v6 = _parse_address(address)
    domain = _comparable(sender.rpartition("@")[2] if sender else helo)
    try:
        result, _ = _result_of_networks(cached, domain, number, is_v6, MAX_TERMS)
    except UnknownAnswerError:
        return None
    if result is not None:
        return SpfResult(result, domain, "mailfrom" if sender else "helo")
    query = known_query(cached)
    return run_now(check(query, address=address, sender=sender, helo=helo, receiver=receiver, now=now))


def _comparable(domain: str) -> str:
    return domain.lower() if domain.isascii() else canonical_domain(domain)  # RFC 8616 4


def _result_of_networks(cached: Cached, domain: str, number: int, is_v6: bool, terms: int) -> tuple[Result | None, int]:
    """Evaluate a record of which only networks and includes are needed, as of nearly all.

    Return the result, and how many terms are left that may ask. None where something else is needed: other mechanisms,
    macros, errors and explanations. Raise UnknownAnswerError for an answer that is not cached.
    """
    if not _is_domain(domain):
        return None, terms
    answer = cached(domain, "TXT")
    if answer is None:
        raise UnknownAnswerError
    record = None if answer.status == "failed" else _only_record(answer.records)
    if record is None or record.error:
        return None, terms
    for term in record.terms:
        if term.version:
            matches = (term.version == 6) == is_v6 and number >> term.shift == term.network
        elif term.name == "all":
            matches = True
        elif term.name == "include" and terms and "%" not in term.domain:
            result, terms = _result_of_networks(cached, term.domain, number, is_v6, terms - 1)
            if result is None:
                return None, terms
            matches = result == "pass"
        else:
            return None, terms
        if matches:
            return None if record.explanation and term.result == "fail" else term.result, terms
    return None if record.redirect else "neutral", terms


@functools.lru_cache(maxsize=10_000)
def _parse_address(text: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int, bool]:
    """Return an address, its number, and whether it is of IPv6. Raise ValueError."""
    parsed = ipaddress.ip_address(text)
    if parsed.version == 6 and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped  # RFC 7208 5
    return parsed, int(parsed), parsed.version == 6


class _Evaluation:
    """One evaluation: its limits, and the values of the macros."""

    def __init__(self, query: Query, address: str, sender: str, helo: str, receiver: str, now: int) -> None:
        self.query = query
        self.address, self.number, self.is_v6 = _parse_address(address)
        self.kind: Kind = "AAAA" if self.is_v6 else "A"
        self.terms = 0
        self.voids = 0
        self.explanation = ""
        local, _, self.domain = sender.rpartition("@")
        self.local = local or "postmaster"  # RFC 7208 4.3
        self._names_of_parties = helo, receiver, now

    @functools.cached_property
    def macros(self) -> dict[str, str]:
        """Return the values of the macros (RFC 7208 7.2); few records use any."""
        helo, receiver, now = self._names_of_parties
        return {
            "s": f"{self.local}@{self.domain}",
            "l": self.local,
            "o": self.domain,
            "h": helo,
            "i": ".".join(f"{self.number:032X}") if self.is_v6 else str(self.address),
            "v": "ip6" if self.is_v6 else "in-addr",
            "c": str(self.address),
            "r": receiver,
            "t": str(now),
        }

    async def check_host(self, domain: str, *, is_outermost: bool = False) -> Result:
        """Evaluate the record of a domain (RFC 7208 4). Raise _TemporaryError, _PermanentError."""
        domain = domain.rstrip(".")
        if not _is_domain(domain):
            return "none"  # RFC 7208 4.3
        record = _only_record((await self._ask(domain, "TXT")).records)
        if record is None:
            return "none"
        if record.error:
            raise _PermanentError(f"{domain}: {record.error}")
        for term in record.terms:
            if term.version:  # most terms are networks
                matches = (term.version == 6) == self.is_v6 and self.number >> term.shift == term.network
            elif term.name == "all":
                matches = True
            else:
                matches = await self._matches(term, domain)
            if matches:
                if term.result == "fail" and record.explanation and is_outermost:
                    await self._explain(record.explanation, domain)
                return term.result
        if not record.redirect:
            return "neutral"
        self._count()
        target = await self._expand(record.redirect, domain)
        result = await self.check_host(target, is_outermost=is_outermost)
        if result == "none":
            raise _PermanentError(f"{domain} redirects to {target}, which has no SPF record")
        return result

    async def _matches(self, term: _Term, domain: str) -> bool:
        """Evaluate a mechanism that asks the DNS (RFC 7208 5)."""
        self._count()
        target = await self._expand(term.domain, domain) if term.domain else domain
        if term.name == "include":
            result = await self.check_host(target)
            if result == "none":
                raise _PermanentError(f"{domain} includes {target}, which has no SPF record")
            return result == "pass"
        if term.name == "exists":
            return bool(await self._ask_counted(target, "A"))
        if term.name == "ptr":
            target = target.lower().rstrip(".")
            return any(name == target or name.endswith("." + target) for name in await self._names())
        if term.name == "a":
            return self._has(await self._ask_counted(target, self.kind), term.lengths)
        hosts = await self._ask_counted(target, "MX")
        if len(hosts) > MAX_NAMES:
            raise _PermanentError(f"{target} has more than {MAX_NAMES} mail exchangers")
        for _, host in hosts:
            if host and self._has((await self._ask(host, self.kind)).records, term.lengths):
                return True
        return False

    def _has(self, addresses: tuple[bytes, ...], lengths: tuple[int, int]) -> bool:
        shift = 128 - lengths[1] if self.is_v6 else 32 - lengths[0]
        return any(int.from_bytes(each, "big") >> shift == self.number >> shift for each in addresses)

    # ---- the DNS, counted

    def _count(self) -> None:
        self.terms += 1
        if self.terms > MAX_TERMS:
            raise _PermanentError(f"more than {MAX_TERMS} terms ask the DNS")

    async def _ask(self, name: str, kind: Kind) -> Answer:
        answer = await self.query(name, kind)
        if answer.status == "failed":
            raise _TemporaryError(f"the DNS does not answer about {name}")
        return answer

    async def _ask_counted(self, name: str, kind: Kind) -> tuple[Any, ...]:
        records = (await self._ask(name, kind)).records
        if not records:
            self.voids += 1
            if self.voids > MAX_VOID:
                raise _PermanentError(f"more than {MAX_VOID} terms have no answer in the DNS")
        return records

    async def _names(self) -> list[str]:
        """Return the names of the address that lead back to it (RFC 7208 5.5)."""
        names = (await self.query(self.address.reverse_pointer, "PTR")).records[:MAX_NAMES]
        return [
            name.lower().rstrip(".")
            for name in names
            if self.address.packed in (await self.query(name, self.kind)).records
        ]

    # ---- macros (RFC 7208 7)

    async def _expand(self, text: str, domain: str, *, is_domain: bool = True) -> str:
        if "%" in text:
            parts: list[str] = []
            at = 0
            for match in _MACRO.finditer(text):
                parts += (text[at : match.start()], await self._macro(match, domain))
                at = match.end()
            text = "".join(parts) + text[at:]
        while is_domain and len(text) > 253 and "." in text:
            text = text.partition(".")[2]
        return text

    async def _macro(self, match: re.Match[str], domain: str) -> str:
        if match[5]:
            return _ESCAPES[match[5]]
        letter = match[1].lower()
        if letter == "d":
            value = domain
        elif letter == "p":
            value = await self._validated_name(domain)
        else:
            value = self.macros[letter]
        if match[2] or match[3] or match[4]:
            parts = re.split(f"[{re.escape(match[4] or '.')}]", value)
            if match[3]:
                parts.reverse()
            if match[2]:
                parts = parts[-int(match[2]) :]
            value = ".".join(parts)
        return urllib.parse.quote(value, safe="-._~") if match[1].isupper() else value

    async def _validated_name(self, domain: str) -> str:
        names = await self._names()
        domain = domain.lower()
        below = [name for name in names if name.endswith("." + domain)]
        return domain if domain in names else (*below, *names, "unknown")[0]

    async def _explain(self, target: str, domain: str) -> None:
        """Fetch and expand the explanation; one with errors is ignored (RFC 7208 6.2)."""
        answer = await self.query(await self._expand(target, domain), "TXT")
        if len(answer.records) != 1 or len(answer.records[0]) > MAX_RECORD:
            return
        text = answer.records[0].decode("latin-1")
        if not text.isascii() or _MACRO_STRING.fullmatch(text.replace(" ", "")) is None:
            return
        text = await self._expand(text, domain, is_domain=False)
        self.explanation = "".join(c if " " <= c <= "~" else "?" for c in text)[:MAX_EXPLANATION]


# ---- records


@functools.lru_cache(maxsize=20_000)
def _is_domain(domain: str) -> bool:
    labels = domain.split(".")
    return len(domain) <= 253 and len(labels) > 1 and domain[0] != "[" and all(0 < len(each) < 64 for each in labels)


@functools.lru_cache(maxsize=20_000)
def _only_record(records: tuple[bytes, ...]) -> _Record | None:
    """Return the record in an answer, parsed; more than one are an error (RFC 7208 4.5)."""
    found = [each for each in records if each[:6].lower() == b"v=spf1" and each[6:7] in (b"", b" ")]
    if len(found) > 1:
        return _Record((), "", "", "more than one SPF record")
    return _parse(found[0]) if found else None


def _parse(octets: bytes) -> _Record:
    """Parse a record (RFC 7208 12)."""
    try:
        text = octets.decode("ascii")
        if len(text) > MAX_RECORD:
            return _Record((), "", "", "the record is too long")
        return _parse_terms(text[6:].split(" "))
    except UnicodeDecodeError:
        return _Record((), "", "", "the record is not ASCII")
    except _PermanentError as exc:
        return _Record((), "", "", str(exc))


def _parse_terms(words: list[str]) -> _Record:
    terms: list[_Term] = []
    modifiers: dict[str, str] = {}
    for word in filter(None, words):
        match = _TERM.fullmatch(word)
        if match is None:
            raise _PermanentError(f"unknown term {word}")
        if match[4]:
            name = match[4].lower()
            if name in ("redirect", "exp"):
                if name in modifiers:
                    raise _PermanentError(f"{name} is given twice")
                modifiers[name] = _domain_spec(match[5])
            elif _MACRO_STRING.fullmatch(match[5]) is None:
                raise _PermanentError(f"invalid macro in {word}")
        else:
            terms.append(_mechanism(match[2].lower(), _QUALIFIERS[match[1]], match[3] or "", word))
    return _Record(tuple(terms), modifiers.get("redirect", ""), modifiers.get("exp", ""))


def _mechanism(name: str, result: Result, rest: str, word: str) -> _Term:
    if name == "all":
        if rest:
            raise _PermanentError(f"invalid term {word}")
        return _Term(name, result)
    if name in ("ip4", "ip6"):
        return _network(name, result, rest, word)
    if name in ("include", "exists"):
        if not rest.startswith(":"):
            raise _PermanentError(f"invalid term {word}")
        return _Term(name, result, _domain_spec(rest[1:]))
    match = _LENGTHS.fullmatch(rest.removeprefix(":"))
    assert match is not None  # every part of it is optional
    lengths = int(match[2] or 32), int(match[3] or 128)
    if lengths[0] > 32 or lengths[1] > 128 or (name == "ptr" and (match[2] or match[3])):
        raise _PermanentError(f"invalid prefix length in {word}")
    domain = _domain_spec(match[1]) if match[1] or rest.startswith(":") else ""
    return _Term(name, result, domain, lengths=lengths)


def _network(name: str, result: Result, rest: str, word: str) -> _Term:
    address, slash, length = rest[1:].partition("/")
    if rest[:1] != ":" or (slash and re.fullmatch("0|[1-9][0-9]{0,2}", length) is None):
        raise _PermanentError(f"invalid term {word}")
    try:
        start = (ipaddress.IPv4Address if name == "ip4" else ipaddress.IPv6Address)(address)
    except ValueError:
        raise _PermanentError(f"invalid address in {word}") from None
    shift = start.max_prefixlen - int(length or start.max_prefixlen)
    if shift < 0:
        raise _PermanentError(f"invalid prefix length in {word}")
    return _Term(name, result, network=int(start) >> shift, shift=shift, version=start.version)


def _domain_spec(text: str) -> str:
    """Check a domain-spec (RFC 7208 7.1): it ends in a macro or in a top label."""
    if not text or _MACRO_STRING.fullmatch(text) is None:
        raise _PermanentError(f"invalid domain {text}")
    for match in _MACRO.finditer(text):
        if match[1] and match[1].lower() in "crt":
            raise _PermanentError(f"the macro {match[1]} is for explanations only")
        if match[2] and int(match[2]) == 0:
            raise _PermanentError(f"a macro of {text} keeps no labels")
    if _MACRO_END.search(text) is None:
        before, dot, label = text.rstrip(".").rpartition(".")
        if not dot or not before or _TOP_LABEL.fullmatch(label) is None:
            raise _PermanentError(f"invalid domain {text}")
    return text


_MACRO_END: Final = re.compile(r"%(?:\{[^}]*\}|[%_\-])\Z")
