"""Where the mail of a domain goes: the routes of the configuration, and the ways they lead.

A recipient waits in a *lane*, named by its domain. A *route* says which next hops a lane's mail is for. What comes of
it at a moment is a *way*: next hops in the order in which they are to be tried, or the delivery on this machine.
"""

from __future__ import annotations

import random
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

import msgspec

from penstock.addresses import canonical_domain, domain_of
from penstock.message import Recipient
from penstock.net.resolver import Exchanger, Resolver
from penstock.relay.hop import AuthPolicy, Hop, HopLimits, TlsPolicy

_HOST: Final = re.compile(r"[A-Za-z0-9._:-]+")
_PORTS: Final = {"smtp": 25, "smtps": 465, "lmtp": 24}
_FORMS: Final = "smtp://host:25, smtps://host:465, lmtp://host:24 or lmtp+unix:///path"
_MOST_HOPS: Final = 12
"""Next hops that a message is offered to in one attempt."""


class NextHopSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of several next hops."""

    url: Annotated[str, msgspec.Meta(description=_FORMS)]
    priority: Annotated[
        int, msgspec.Meta(ge=0, le=65_535, description="The least is tried first; others when that is down")
    ] = 10
    weight: Annotated[
        int, msgspec.Meta(ge=1, le=65_535, description="Its part of the mail among those of its priority")
    ] = 1


class RelayAuthSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who we are to a smart host (RFC 4954)."""

    user: Annotated[str, msgspec.Meta(min_length=1, description="The user name")]
    password_file: Annotated[
        str, msgspec.Meta(min_length=1, description="File with the password in its first line, relative to data_dir")
    ]
    mechanisms: Annotated[
        tuple[Literal["SCRAM-SHA-256", "PLAIN", "LOGIN"], ...],
        msgspec.Meta(min_length=1, description="SASL mechanisms to use, the preferred one first"),
    ] = ("SCRAM-SHA-256", "PLAIN", "LOGIN")
    unverified_tls: Annotated[
        bool,
        msgspec.Meta(
            description='Use PLAIN and LOGIN over TLS even if tls.mode is "require": the certificate is not verified'
        ),
    ] = False


class RouteSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the mail of some domains goes. The longest domain that matches decides."""

    domains: Annotated[
        tuple[str, ...],
        msgspec.Meta(description='".example.org" is all names below it; without any, all that no other route names'),
    ] = ()
    next_hop: Annotated[
        str,
        msgspec.Meta(description=f'"mx": as the DNS says; "maildir": delivered here; or {_FORMS}'),
    ] = ""
    next_hops: Annotated[
        tuple[NextHopSettings, ...], msgspec.Meta(max_length=64, description="In the place of next_hop: several")
    ] = ()
    tls: TlsPolicy = TlsPolicy()
    auth: Annotated[RelayAuthSettings | None, msgspec.Meta(description="Without this table, no AUTH")] = None
    limits: HopLimits = HopLimits()


DEFAULT_ROUTES: Final = (RouteSettings(next_hop="maildir"),)
"""Those of a server that names none."""


# ---- checking


def check_routes(routes: Sequence[RouteSettings]) -> None:
    """Raise ValueError, which begins with the key, for routes that lead nowhere."""
    owner: dict[str, int] = {}
    for number, route in enumerate(routes):
        key = f"route[{number}]"
        for domain in route.domains:
            try:
                canonical = _canonical(domain)
            except ValueError as exc:
                form = 'expected "example.org", or ".example.org" for all names below it'
                raise ValueError(f"{key}.domains: {domain!r} is not a domain; {form}") from exc
            before = owner.setdefault(canonical, number)
            if before != number:
                raise ValueError(f"{key}.domains: {domain!r} is in route[{before}], too")
        if not route.domains:
            before = owner.setdefault("", number)
            if before != number:
                raise ValueError(
                    f"{key}.domains: route[{before}] has no domains either, and one is enough for all others"
                )
        try:
            _check_hops(route)
        except ValueError as exc:
            raise ValueError(f"{key}.{exc}") from exc
    if routes and "" not in owner:
        raise ValueError(
            "route: reports have to go to the senders, wherever they are: add a route without domains, such as "
            '[[route]] next_hop = "mx"'
        )


def _canonical(domain: str) -> str:
    """Return the canonical form of a domain of a route; a leading dot stays. Raise ValueError."""
    below = "." if domain.startswith(".") else ""
    return below + canonical_domain(domain.removeprefix("."))


def _check_hops(route: RouteSettings) -> None:
    if route.next_hop and route.next_hops:
        raise ValueError("next_hops: next_hop is there already; put it into the list")
    if not route.next_hop and not route.next_hops:
        raise ValueError(f'next_hop: it is missing; write "mx", "maildir" or {_FORMS}')
    if route.next_hop in ("mx", "maildir"):
        if route.auth is not None:
            raise ValueError(f"auth: a password is for a smart host, not for {route.next_hop!r}")
        return
    for place, url in enumerate([route.next_hop] if route.next_hop else [hop.url for hop in route.next_hops]):
        try:
            hop = parse_hop(url)
        except ValueError as exc:
            raise ValueError(f"{'next_hop' if route.next_hop else f'next_hops[{place}].url'}: {exc}") from exc
        if route.auth is not None and route.tls.mode == "opportunistic" and not hop.path:
            raise ValueError('tls.mode: say what protects the password: "verify", "require", or "none" for SCRAM alone')


def parse_hop(url: str) -> Hop:
    """Read the URL of a next hop. Raise ValueError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise ValueError(f"{url!r}: {exc}; a next hop looks like {_FORMS}") from exc
    if parts.scheme == "lmtp+unix" and parts.path.startswith("/") and not parts.netloc and not parts.query:
        return Hop(kind="lmtp", path=parts.path, host="localhost")
    host = parts.hostname or ""
    is_plain = not (parts.path or parts.query or parts.fragment or parts.username or parts.password)
    if parts.scheme not in _PORTS or not _HOST.fullmatch(host) or not is_plain or port == 0:
        raise ValueError(f"a next hop looks like {_FORMS}, not {url!r}")
    return Hop(
        host=host,
        port=port or _PORTS[parts.scheme],
        kind="lmtp" if parts.scheme == "lmtp" else "smtp",
        tls=TlsPolicy(implicit=parts.scheme == "smtps"),
    )


# ---- ways


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the hosts of equal rank, by all its addresses."""

    weight: int
    hops: tuple[Hop, ...]


@dataclass(frozen=True, slots=True)
class Way:
    """Next hops of a lane. Ways with the same key lead to the same place."""

    key: Hashable
    ranks: tuple[tuple[Choice, ...], ...] = ()
    """Best first; () is the delivery on this machine."""

    @property
    def is_local(self) -> bool:
        """It ends here."""
        return not self.ranks

    @property
    def only(self) -> tuple[Hop, ...] | None:
        """The next hops, when there is nothing to choose between."""
        if any(len(rank) > 1 for rank in self.ranks):
            return None
        return tuple(self._hops(rank[0] for rank in self.ranks))

    def order(self, source: random.Random) -> tuple[Hop, ...]:
        """Return the next hops in the order of one attempt: by rank, and among equals by weight and chance."""
        ordered: list[Choice] = []
        for rank in self.ranks:
            left = list(rank)
            while left:
                chosen = source.choices(left, [choice.weight for choice in left])[0]
                left.remove(chosen)
                ordered.append(chosen)
        return tuple(self._hops(ordered))

    def _hops(self, choices: Iterator[Choice] | Sequence[Choice]) -> list[Hop]:
        return [hop for choice in choices for hop in choice.hops][:_MOST_HOPS]

    @property
    def first(self) -> tuple[Hop, ...]:
        """The next hops of the best rank."""
        return tuple(hop for choice in self.ranks[0] for hop in choice.hops)


LOCAL: Final = Way("maildir")


@dataclass(frozen=True, slots=True)
class _Route:
    """A route, read once."""

    number: int
    tls: TlsPolicy
    limits: HopLimits
    way: Way | None
    """None: the DNS says."""


class Routes:
    """All routes of a server."""

    def __init__(self, settings: Sequence[RouteSettings], *, data_dir: Path, resolver: Resolver, own_name: str) -> None:
        """`own_name` is whose postmaster a recipient without a domain is.

        The settings were checked. Raise OSError when a file that they name can not be read.
        """
        self._resolver = resolver
        self._own_lane = own_name.lower()
        self._exact: dict[str, _Route] = {}
        self._below: dict[str, _Route] = {}
        self._default: _Route | None = None
        for number, each in enumerate(settings or DEFAULT_ROUTES):
            route = _read(number, each, data_dir)
            if not each.domains:
                self._default = route
            for domain in each.domains:
                names = self._below if domain.startswith(".") else self._exact
                names[_canonical(domain).removeprefix(".")] = route

    def lane_of(self, recipient: Recipient) -> str:
        """Return the lane a recipient waits in: its domain, as the DNS writes it."""
        domain = recipient.path.domain
        if domain.isascii():
            return domain or self._own_lane  # RFC 5321 4.1.1.3: <Postmaster> is ours
        # Spooled before domains had a canonical form.
        return domain_of(domain, utf8=True, underscores=True) or domain

    def way_now(self, lane: str) -> Way | None:
        """Return the way of a lane when that is known without asking anybody."""
        return self._route_of(lane).way

    async def way_of(self, lane: str) -> Way:
        """Return the way of a lane. Raise ResolveError when the DNS has none."""
        route = self._route_of(lane)
        if route.way is not None:
            return route.way
        return _way_by_mx(route, await self._resolver.exchangers(lane))

    def _route_of(self, lane: str) -> _Route:
        found = self._exact.get(lane)
        if found is not None:
            return found
        if self._below:
            name = lane
            while "." in name:
                name = name.partition(".")[2]
                found = self._below.get(name)
                if found is not None:
                    return found
        assert self._default is not None
        return self._default


def _read(number: int, settings: RouteSettings, data_dir: Path) -> _Route:
    """Return what a route means. Raise OSError."""
    tls = settings.tls
    if tls.ca_file:
        tls = msgspec.structs.replace(tls, ca_file=str(data_dir / tls.ca_file))
    if settings.next_hop == "mx":
        return _Route(number, tls, settings.limits, None)
    if settings.next_hop == "maildir":
        return _Route(number, tls, settings.limits, LOCAL)
    user = password = ""
    auth = AuthPolicy()
    if settings.auth is not None:
        auth = AuthPolicy(mechanisms=settings.auth.mechanisms, unverified_tls=settings.auth.unverified_tls)
        user = settings.auth.user
        lines = (data_dir / settings.auth.password_file).read_text().splitlines()
        password = lines[0].strip() if lines else ""
    given = settings.next_hops or (NextHopSettings(url=settings.next_hop),)
    ranks: dict[int, list[Choice]] = {}
    for each in given:
        hop = parse_hop(each.url)
        hop = msgspec.structs.replace(
            hop,
            tls=msgspec.structs.replace(tls, implicit=tls.implicit or hop.tls.implicit),
            user=user,
            password=password,
            auth=auth,
            limits=settings.limits,
        )
        ranks.setdefault(each.priority, []).append(Choice(each.weight, (hop,)))
    way = Way(("route", number), tuple(tuple(ranks[priority]) for priority in sorted(ranks)))
    return _Route(number, tls, settings.limits, way)


def _way_by_mx(route: _Route, exchangers: Sequence[Exchanger]) -> Way:
    """Return the way that exchangers make; domains with the same ones have the same."""
    ranks: dict[int, list[Choice]] = {}
    for preference, host, addresses in exchangers:
        hops = tuple(Hop(host=host, address=address, tls=route.tls, limits=route.limits) for address in addresses)
        ranks.setdefault(preference, []).append(Choice(1, hops))
    hosts = tuple(sorted((preference, host) for preference, host, _ in exchangers))
    return Way(("mx", route.number, hosts), tuple(map(tuple, ranks.values())))
