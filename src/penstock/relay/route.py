"""Where the mail of a domain goes: the routes of the configuration, and the next hops they lead to.

A recipient waits in the queue of its domain. A *rule* (a [[route]] table) says which next hops the mail of a domain is
for. What it comes to at a moment is a `Route`: next hops in the order in which they are tried, or local delivery.

The host of a static next hop is looked up by the system (hosts file, DNS) and becomes one hop for each address, so that
each address has its own connections and its own circuit breaker, and the next one is tried when one defers a message.
"""

from __future__ import annotations

import ipaddress
import random
import re
import time
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

import msgspec
import trio

from penstock.addresses import canonical_domain, domain_of
from penstock.dns.exchangers import Exchanger, MailExchangers, ResolveError, is_local_address
from penstock.message import Path as MailPath
from penstock.message import Recipient
from penstock.net.listen import ListenAddress
from penstock.relay.hop import AuthPolicy, Hop, HopLimits, TlsPolicy
from penstock.relay.tlspolicy import Protection, TlsPolicies

SMTP_PORT: Final = 25
_HOST: Final = re.compile(r"[A-Za-z0-9._:-]+")
_PORTS: Final = {"smtp": 25, "smtps": 465, "lmtp": 24}
_FORMS: Final = "smtp://host:25, smtps://host:465, lmtp://host:24 or lmtp+unix:///path"
_MAX_HOPS: Final = 12
"""Next hops (addresses) of one attempt; cf. Postfix smtp_mx_address_limit."""
_LOOKUP_LIFETIME: Final = 60.0
"""Seconds for which the addresses of a static next hop are used before the name is looked up again."""


class NextHopSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of several next hops."""

    url: Annotated[str, msgspec.Meta(description=_FORMS)]
    priority: Annotated[
        int, msgspec.Meta(ge=0, le=65_535, description="The lowest is tried first, the others when it is unavailable")
    ] = 10
    weight: Annotated[
        int, msgspec.Meta(ge=1, le=65_535, description="Share of the mail among next hops of the same priority")
    ] = 1


class RelayAuthSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """AUTH with a smart host (RFC 4954)."""

    user: Annotated[str, msgspec.Meta(min_length=1, description="User name")]
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
    """Where the mail of some domains goes. The longest matching domain decides."""

    domains: Annotated[
        tuple[str, ...],
        msgspec.Meta(description='".example.org" matches all names below it; without domains: all others'),
    ] = ()
    name: Annotated[
        str,
        msgspec.Meta(
            max_length=100,
            description="Name for policy.quarantine; a named route without domains is used for nothing else",
        ),
    ] = ""
    next_hop: Annotated[
        str,
        msgspec.Meta(description=f'"mx": the mail exchangers in the DNS; "maildir": local delivery; or {_FORMS}'),
    ] = ""
    next_hops: Annotated[
        tuple[NextHopSettings, ...], msgspec.Meta(max_length=64, description="Several next hops, instead of next_hop")
    ] = ()
    tls: TlsPolicy = TlsPolicy()
    auth: Annotated[RelayAuthSettings | None, msgspec.Meta(description="Without this table, no AUTH")] = None
    limits: HopLimits = HopLimits()


DEFAULT_ROUTES: Final = (RouteSettings(next_hop="maildir"),)
"""The routes of a configuration that has none."""


# ---- checking


def check_routes(routes: Sequence[RouteSettings]) -> None:
    """Raise ValueError, beginning with the key, for routes that cannot work."""
    owner: dict[str, int] = {}
    names: dict[str, int] = {}
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
                raise ValueError(f"{key}.domains: {domain!r} is already in route[{before}]")
        if route.name:
            before = names.setdefault(route.name, number)
            if before != number:
                raise ValueError(f"{key}.name: {route.name!r} is the name of route[{before}]")
        elif not route.domains:
            before = owner.setdefault("", number)
            if before != number:
                raise ValueError(
                    f"{key}.domains: route[{before}] has no domains either; only one route may be the default"
                )
        try:
            _check_hops(route)
        except ValueError as exc:
            raise ValueError(f"{key}.{exc}") from exc
    if routes and "" not in owner:
        raise ValueError(
            "route: no default route: bounces go to senders in any domain; add a route without domains, such as "
            '[[route]] next_hop = "mx"'
        )


def _canonical(domain: str) -> str:
    """Return the canonical form of a domain of a route; a leading dot stays. Raise ValueError."""
    below = "." if domain.startswith(".") else ""
    return below + canonical_domain(domain.removeprefix("."))


def _check_hops(route: RouteSettings) -> None:
    if route.next_hop and route.next_hops:
        raise ValueError("next_hops: cannot be combined with next_hop; put that one into the list")
    if not route.next_hop and not route.next_hops:
        raise ValueError(f'next_hop: missing; expected "mx", "maildir" or {_FORMS}')
    if route.next_hop in ("mx", "maildir"):
        if route.auth is not None:
            raise ValueError(f"auth: only for a smart host, not for {route.next_hop!r}")
        return
    for place, url in enumerate([route.next_hop] if route.next_hop else [hop.url for hop in route.next_hops]):
        try:
            hop = parse_hop(url)
        except ValueError as exc:
            raise ValueError(f"{'next_hop' if route.next_hop else f'next_hops[{place}].url'}: {exc}") from exc
        if route.auth is not None and route.tls.mode == "opportunistic" and not hop.path:
            raise ValueError(
                'tls.mode: with auth, choose what protects the password: "verify", "require", or "none" for SCRAM only'
            )


def parse_hop(url: str) -> Hop:
    """Parse the URL of a next hop. Raise ValueError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise ValueError(f"{url!r}: {exc}; expected {_FORMS}") from exc
    if parts.scheme == "lmtp+unix" and parts.path.startswith("/") and not parts.netloc and not parts.query:
        return Hop(kind="lmtp", path=parts.path, host="localhost")
    host = parts.hostname or ""
    is_plain = not (parts.path or parts.query or parts.fragment or parts.username or parts.password)
    with suppress(ValueError):
        host = canonical_domain(host)  # as in certificates and in the DNS: no U-labels
    if parts.scheme not in _PORTS or not _HOST.fullmatch(host) or not is_plain or port == 0:
        raise ValueError(f"{url!r} is not a next hop; expected {_FORMS}")
    return Hop(
        host=host,
        port=port or _PORTS[parts.scheme],
        kind="lmtp" if parts.scheme == "lmtp" else "smtp",
        tls=TlsPolicy(implicit=parts.scheme == "smtps"),
    )


def is_own_hop(hop: Hop, listeners: Iterable[str]) -> bool:
    """Return whether a connection to a hop would reach one of the listeners, given by their addresses."""
    host = hop.address or hop.host
    for listener in map(ListenAddress.parse, listeners):
        if hop.path == listener.path if hop.path else listener.is_reached_by(host, hop.port, is_local_address):
            return True
    return False


# ---- routes


@dataclass(frozen=True, slots=True)
class Choice:
    """One host among those of equal priority, with all its addresses."""

    weight: int
    hops: tuple[Hop, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """The next hops of a domain. Routes with the same key share connections and rates."""

    key: Hashable
    ranks: tuple[tuple[Choice, ...], ...] = ()
    """Best first; () is local delivery."""

    @property
    def is_local(self) -> bool:
        """Mail is delivered on this machine."""
        return not self.ranks

    @property
    def only(self) -> tuple[Hop, ...] | None:
        """The next hops if there is nothing to choose at random."""
        if any(len(rank) > 1 for rank in self.ranks):
            return None
        return tuple(_limited([rank[0] for rank in self.ranks]))

    def order(self, source: random.Random) -> tuple[Hop, ...]:
        """Return the next hops in the order of one attempt: by rank, among equals by weight at random."""
        ordered: list[Choice] = []
        for rank in self.ranks:
            left = list(rank)
            while left:
                chosen = source.choices(left, [choice.weight for choice in left])[0]
                left.remove(chosen)
                ordered.append(chosen)
        return tuple(_limited(ordered))

    def hops(self) -> Iterator[Hop]:
        """Yield all next hops, best rank first."""
        return (hop for rank in self.ranks for choice in rank for hop in choice.hops)

    @property
    def first(self) -> tuple[Hop, ...]:
        """The next hops of the best rank."""
        return tuple(hop for choice in self.ranks[0] for hop in choice.hops)


def _limited(choices: Sequence[Choice]) -> list[Hop]:
    """Return at most `_MAX_HOPS` hops in order. Every host keeps a share: many addresses of one never hide the next."""
    shares = [0] * len(choices)
    left = _MAX_HOPS
    while left and any(shares[i] < len(choice.hops) for i, choice in enumerate(choices)):
        for i, choice in enumerate(choices):
            if left and shares[i] < len(choice.hops):
                shares[i] += 1
                left -= 1
    return [hop for choice, share in zip(choices, shares, strict=True) for hop in choice.hops[:share]]


LOCAL: Final = Route("maildir")

Lookup = Callable[[str], Awaitable[Sequence[str]]]
"""Returns the addresses of a host. Raises OSError if the lookup failed."""


async def system_lookup(host: str) -> list[str]:
    """Return the addresses of a host as the system knows them (hosts file, DNS). Raise OSError."""
    found = await trio.socket.getaddrinfo(host, None, type=trio.socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


@dataclass(slots=True, eq=False)
class _Rule:
    """A [[route]] table, parsed."""

    number: int
    tls: TlsPolicy
    limits: HopLimits
    ranks: tuple[tuple[tuple[int, Hop], ...], ...] | None
    """Weights and hops by priority; () is local delivery, None asks the DNS for the MX."""
    names: frozenset[str] = frozenset()
    """Hosts to be looked up."""
    route: Route | None = None
    """The current route; None before the first lookup."""
    expires: float = 0.0
    """When the names are looked up again, in the clock of `Routes`."""
    lock: trio.Lock = field(default_factory=trio.Lock)

    @property
    def told(self) -> tuple[object, ...]:
        """What the settings say."""
        return self.number, self.tls, self.limits, self.ranks, self.names


class Routes:
    """All routes of a server."""

    def __init__(
        self,
        settings: Sequence[RouteSettings],
        *,
        data_dir: Path,
        resolver: MailExchangers,
        own_domain: str,
        lookup: Lookup = system_lookup,
        clock: Callable[[], float] = time.monotonic,
        tls_policies: TlsPolicies | None = None,
        mx_port: int = SMTP_PORT,
        listeners: Sequence[str] = (),
    ) -> None:
        """`own_domain` is the domain of a recipient without one, <Postmaster> (RFC 5321 4.1.1.3).

        `lookup` finds the addresses of static next hops. `tls_policies` say how TLS is used with the MX hosts of a
        domain. `listeners` are the addresses that this server listens on. The settings were checked. Raise OSError if a
        file that they name cannot be read.
        """
        self._tls_policies = tls_policies
        self._mx_port = mx_port
        self._listeners = listeners
        self._resolver = resolver
        self._lookup = lookup
        self._clock = clock
        self.generation = 0
        """How often the routes were replaced."""
        self._told: tuple[object, ...] = ()
        """What the settings say of all routes."""
        self._own_domain = ""
        self._exact: dict[str, _Rule] = {}
        self._below: dict[str, _Rule] = {}
        self._named: dict[str, _Rule] = {}
        self._default: _Rule | None = None
        self.use(settings, data_dir, own_domain)

    def use(self, settings: Sequence[RouteSettings], data_dir: Path, own_domain: str) -> bool:
        """Use other routes; return whether they differ. Raise OSError as the constructor does: nothing is changed."""
        exact: dict[str, _Rule] = {}
        below: dict[str, _Rule] = {}
        named: dict[str, _Rule] = {}
        default: _Rule | None = None
        for number, each in enumerate(settings or DEFAULT_ROUTES):
            rule = _read(number, each, data_dir)
            if each.name:
                named[f"{NAMED}{each.name}"] = rule
            elif not each.domains:
                default = rule
            for domain in each.domains:
                names = below if domain.startswith(".") else exact
                names[_canonical(domain).removeprefix(".")] = rule
        own_domain = own_domain.lower()
        told = (
            own_domain,
            default and default.told,
            *({name: rule.told for name, rule in each.items()} for each in (exact, below, named)),
        )
        if told == self._told:
            return False
        self.generation += 1
        self._told, self._own_domain = told, own_domain
        self._exact, self._below, self._named, self._default = exact, below, named, default
        return True

    def domain_of(self, recipient: Recipient) -> str:
        """Return the domain whose queue a recipient waits in, as the DNS writes it."""
        domain = recipient.path.domain
        if domain.isascii():
            return domain or self._own_domain  # RFC 5321 4.1.1.3: <Postmaster> is ours
        # Spooled before domains had a canonical form.
        return domain_of(domain, utf8=True, underscores=True) or domain

    def qualified(self, recipient: Recipient) -> Recipient:
        """Return a recipient with a domain: <Postmaster> is the postmaster of the first configured domain."""
        if recipient.path.domain:
            return recipient
        local = recipient.path.local or recipient.path.text
        return recipient._replace(path=MailPath(f"{recipient.path.text}@{self._own_domain}", local, self._own_domain))

    def static_route(self, domain: str) -> Route | None:
        """Return the route of a domain if no lookup is needed. Safe to call from any thread."""
        rule = self._rule_of(domain)
        if rule.names and self._clock() >= rule.expires:
            return None
        return rule.route

    def static_key(self, domain: str) -> Hashable | None:
        """Return the key of the route of a domain if it is static. Safe to call from any thread."""
        rule = self._rule_of(domain)
        return None if rule.ranks is None else LOCAL.key if not rule.ranks else ("route", rule.number)

    async def find_route(self, domain: str) -> Route:
        """Return the route of a domain. Raise ResolveError if the DNS has none."""
        rule = self._rule_of(domain)
        if rule is _NO_RULE:
            raise ResolveError("4.4.4", f"there is no {domain} in the configuration", is_permanent=False)
        if rule.ranks is None:
            is_clear, domain = domain.startswith(CLEAR), domain_of_queue(domain)
            exchangers = await self._resolver.exchangers(domain)
            if is_clear:
                return _mx_route(rule, exchangers, self._mx_port, is_reported=False)
            if self._tls_policies is None or rule.tls.mode not in ("opportunistic", "require"):
                return _mx_route(rule, exchangers, self._mx_port)
            protections = await self._tls_policies.protections(domain, rule.tls, exchangers)
            return _mx_route(rule, exchangers, self._mx_port, protections)
        return await self._resolved(rule)

    async def resolve_all(self) -> None:
        """Look up the addresses of all static next hops, so that the first message need not wait for it."""
        for rule in {*self._exact.values(), *self._below.values(), *self._named.values(), self._default}:
            if rule is not None and rule.names:
                with suppress(ResolveError):  # reported when mail is to be sent there
                    await self._resolved(rule)

    async def _resolved(self, rule: _Rule) -> Route:
        """Return the route of a static rule, and look up its hosts if it is time. Raise ResolveError."""
        async with rule.lock:  # one lookup for all domains of the rule
            if rule.route is None or (rule.names and self._clock() >= rule.expires):
                try:
                    rule.route = await self._resolve(rule, rule.ranks or ())
                except ResolveError:
                    if rule.route is None:
                        raise  # otherwise the previous addresses stay in use
                rule.expires = self._clock() + _LOOKUP_LIFETIME
            return rule.route

    async def _resolve(self, rule: _Rule, ranks: Sequence[Sequence[tuple[int, Hop]]]) -> Route:
        """Return a static route with the current addresses of its hosts. Hosts without an address are skipped."""
        addresses: dict[str, Sequence[str]] = {}
        failure: Exception | None = None
        for name in sorted(rule.names):
            try:
                addresses[name] = await self._addresses(name)
            except (OSError, ResolveError) as exc:
                failure = exc
                addresses[name] = ()
        found = _static_route(rule.number, ranks, addresses)
        resolved = Route(found.key, self._without_own(found.ranks))
        if resolved.ranks:
            return resolved
        if found.ranks and failure is None:
            # Temporary, unlike a loop by MX: the DNS may give the name another address tomorrow.
            text = f"the next hop {', '.join(sorted(rule.names))} is this server itself"
            raise ResolveError("4.4.6", text, is_permanent=False)
        unknown = ", ".join(name for name in sorted(rule.names) if not addresses[name])
        text = f"the address of the next hop {unknown} could not be found: {failure}"
        raise ResolveError("4.4.3", text, is_permanent=False) from failure

    def _without_own(self, ranks: tuple[tuple[Choice, ...], ...]) -> tuple[tuple[Choice, ...], ...]:
        """Leave out hosts that are this server, and the ranks after them (cf. RFC 5321 5.1).

        One of our addresses is enough to recognize ourselves. Others of the same rank stay: the configuration names
        them, and two gateways may have the same one.
        """
        for place, rank in enumerate(ranks):
            others = tuple(
                choice for choice in rank if not any(is_own_hop(hop, self._listeners) for hop in choice.hops)
            )
            if len(others) < len(rank):
                return (*ranks[:place], others) if others else ranks[:place]
        return ranks

    async def _addresses(self, name: str) -> Sequence[str]:
        try:
            return await self._lookup(name)
        except OSError:  # the system does not know it, but the servers of [resolver] may
            return await self._resolver.addresses(name)

    def _rule_of(self, domain: str) -> _Rule:
        domain = domain_of_queue(domain)
        found = self._exact.get(domain)
        if found is not None:
            return found
        if domain.startswith(NAMED):
            # Mail that waits for a route which is no longer in the configuration waits on.
            return self._named.get(domain, _NO_RULE)
        if self._below:
            name = domain
            while "." in name:
                name = name.partition(".")[2]
                found = self._below.get(name)
                if found is not None:
                    return found
        assert self._default is not None
        return self._default


NAMED: Final = "route:"
"""The beginning of the queue names of named routes; no domain has a colon."""
CLEAR: Final = "clear:"
"""The beginning of the queue names for mail to a domain without its DANE and MTA-STS policies: TLS reports.

RFC 8460 3: they have to be delivered despite failures of TLS, and their sessions are not reported. The `tls` table of
the route applies.
"""


def domain_of_queue(name: str) -> str:
    """Return the domain whose mail a queue has, or the name of the queue of a named route."""
    return name.removeprefix(CLEAR)


_NO_RULE: Final = _Rule(-1, TlsPolicy(), HopLimits(), None)


def _read(number: int, settings: RouteSettings, data_dir: Path) -> _Rule:
    """Return the rule of a [[route]] table. Raise OSError."""
    tls = settings.tls
    if tls.ca_file:
        tls = msgspec.structs.replace(tls, ca_file=str(data_dir / tls.ca_file))
    if settings.next_hop == "mx":
        return _Rule(number, tls, settings.limits, None)
    if settings.next_hop == "maildir":
        return _Rule(number, tls, settings.limits, (), route=LOCAL)
    user = password = ""
    auth = AuthPolicy()
    if settings.auth is not None:
        user = settings.auth.user
        auth = AuthPolicy(mechanisms=settings.auth.mechanisms, unverified_tls=settings.auth.unverified_tls)
        lines = (data_dir / settings.auth.password_file).read_text().splitlines()
        password = lines[0].strip() if lines else ""
    given = settings.next_hops or (NextHopSettings(url=settings.next_hop),)
    by_priority: dict[int, list[tuple[int, Hop]]] = {}
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
        by_priority.setdefault(each.priority, []).append((each.weight, hop))
    ranks = tuple(tuple(by_priority[priority]) for priority in sorted(by_priority))
    names = frozenset(hop.host for rank in ranks for _, hop in rank if not hop.path and not _is_address(hop.host))
    route = None if names else _static_route(number, ranks, {})
    return _Rule(number, tls, settings.limits, ranks, names, route)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _static_route(
    number: int, ranks: Sequence[Sequence[tuple[int, Hop]]], addresses: dict[str, Sequence[str]]
) -> Route:
    """Return the route of static next hops; `addresses` has those of the hosts that are names."""
    made: list[tuple[Choice, ...]] = []
    for rank in ranks:
        choices = [Choice(weight, _by_address(hop, addresses)) for weight, hop in rank]
        made.append(tuple(choice for choice in choices if choice.hops))
    return Route(("route", number), tuple(filter(None, made)))


def _by_address(hop: Hop, addresses: dict[str, Sequence[str]]) -> tuple[Hop, ...]:
    if hop.path or hop.host not in addresses:
        return (hop,)
    return tuple(msgspec.structs.replace(hop, address=address) for address in addresses[hop.host])


def _mx_route(
    rule: _Rule,
    exchangers: Collection[Exchanger],
    port: int,
    protections: Mapping[str, Protection] | None = None,
    *,
    is_reported: bool = True,
) -> Route:
    """Return the route by MX, over the hosts that have a protection, if they need one.

    Domains with the same hosts and protections have the same key.
    """
    ranks: dict[int, list[Choice]] = {}
    usable = [each for each in exchangers if protections is None or each.host in protections]
    for preference, host, addresses in usable:
        tls, dane, is_testing = Protection(rule.tls) if protections is None else protections[host]
        hops = tuple(
            Hop(
                host=host,
                port=port,
                address=address,
                tls=tls,
                limits=rule.limits,
                dane=dane,
                is_testing=is_testing,
                is_reported=is_reported,
            )
            for address in addresses
        )
        ranks.setdefault(preference, []).append(Choice(1, hops))
    hosts = tuple(sorted((preference, host) for preference, host, _ in usable))
    kind = "mx" if is_reported else "clear"
    key: Hashable = (kind, rule.number, hosts, None if protections is None else frozenset(protections.items()))
    return Route(key, tuple(map(tuple, ranks.values())))
