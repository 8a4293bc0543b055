"""Finds the hosts that accept the mail of a domain, and their addresses (RFC 5321 5.1), in the DNS through dnspython.

Rules
-----
1. Only a DNS answer can say that a name does not exist. A server that fails, refuses or does not answer is a temporary
   error, however long it lasts.
2. An answer is cached for its TTL, within bounds: a TTL of 0 does not cause a query for each message, and one of a year
   does not last a year.
3. Concurrent look-ups of the same name share one query.
4. Mail is not sent to this server itself. It is recognized by name and by address: an address of a listener or of a
   network interface, loopback (a connection there reaches us), or the unspecified address.
"""

from __future__ import annotations

import ipaddress
import random
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Final, Literal, NamedTuple

import dns.asyncbackend
import dns.asyncresolver
import dns.exception
import dns.message
import dns.name
import dns.nameserver
import dns.rdtypes.ANY.MX
import dns.resolver
import dns.ttl
import idna
import msgspec
import trio

_MAX_ALIASES: Final = 8
"""CNAMEs in a chain; a recursive server follows them, others may not."""
_MAX_EXCHANGERS: Final = 16
"""MX hosts of a domain that are used, best first; some domains publish more."""
_MAX_ADDRESSES: Final = 8
"""Addresses of a host, for each family."""
_SERVER: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)|([0-9A-Fa-f:.]+))(?::([0-9]{1,5}))?")


class ResolverSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The DNS."""

    servers: Annotated[
        tuple[str, ...],
        msgspec.Meta(
            max_length=16,
            description="Recursive servers: 192.0.2.53, 127.0.0.1:5353, [::1]:53; empty: those of resolv.conf",
        ),
    ] = ()
    timeout: Annotated[
        float, msgspec.Meta(gt=0, le=60, description="Seconds to wait for one server before the next is asked")
    ] = 5.0
    lifetime: Annotated[float, msgspec.Meta(gt=0, le=120, description="Seconds to wait for all servers together")] = (
        20.0
    )
    families: Annotated[
        tuple[Literal["ipv4", "ipv6"], ...],
        msgspec.Meta(min_length=1, max_length=2, description="Address families to use, in this order"),
    ] = ("ipv4", "ipv6")
    cache_entries: Annotated[int, msgspec.Meta(ge=0, le=10_000_000, description="Answers to cache")] = 50_000
    ttl_least: Annotated[
        float, msgspec.Meta(ge=0, le=3600, description="Minimum seconds to cache an answer, whatever its TTL")
    ] = 5.0
    ttl_most: Annotated[float, msgspec.Meta(ge=1, le=604_800, description="Maximum seconds to cache an answer")] = (
        86_400.0
    )
    ttl_negative: Annotated[
        float, msgspec.Meta(ge=0, le=86_400, description="Maximum seconds to cache that a name does not exist")
    ] = 900.0


class ResolveError(Exception):
    """A domain has no host to send to, temporarily or permanently."""

    def __init__(self, status: str, text: str, *, is_permanent: bool) -> None:
        super().__init__(text)
        self.status = status
        """The enhanced status code: 5.1.2 no such domain, 5.1.10 null MX, 5.4.6 mail loop, 4.4.3 no answer."""
        self.text = text
        self.is_permanent = is_permanent


class Exchanger(NamedTuple):
    """A host that accepts the mail of a domain."""

    preference: int
    host: str
    """In lower case, without the final dot."""
    addresses: tuple[str, ...]


@dataclass(slots=True)
class _Found:
    """An answer, possibly negative."""

    records: tuple[str | tuple[int, str], ...]
    alias: str
    """The canonical name, if the name is an alias."""
    expires: float
    exists: bool = True


def parse_server(text: str) -> tuple[str, int]:
    """Parse "192.0.2.53", "192.0.2.53:5353", "[::1]:53" or "::1". Raise ValueError."""
    match = _SERVER.fullmatch(text)
    if match is not None:
        address, port = match[1] or match[2] or match[3], int(match[4] or 53)
        try:
            ipaddress.ip_address(address)
        except ValueError:
            pass
        else:
            if 0 < port < 65_536:
                return address, port
    raise ValueError(f"{text!r} is not a DNS server; expected 192.0.2.53, 127.0.0.1:5353 or [::1]:53")


def is_local_address(address: str) -> bool:
    """Return whether an address belongs to a network interface of this machine.

    The source address for packets to a local address is that address. Nothing is sent.
    """
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((address, 25))
            return str(sock.getsockname()[0]).partition("%")[0] == address
    except OSError:  # no route: it is not ours
        return False


def _loop(domain: str) -> ResolveError:
    return ResolveError("5.4.6", f"mail for {domain} loops back to this server", is_permanent=True)


class Resolver:
    """Looks up MX hosts and addresses. For one trio loop."""

    def __init__(
        self,
        settings: ResolverSettings,
        *,
        own_names: Collection[str] = (),
        random_source: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        is_local_address: Callable[[str], bool] = is_local_address,
    ) -> None:
        """`own_names` are names and addresses of this server; `is_local_address` recognizes its interfaces.

        Raise ValueError for malformed servers.
        """
        self._settings = settings
        self._servers = [parse_server(server) for server in settings.servers]
        self._own_names = frozenset(name.lower().rstrip(".") for name in own_names)
        self._random = random_source or random.Random()  # noqa: S311 - it spreads load, it hides nothing
        self._clock = clock
        self._is_local_address = is_local_address
        self._cache: OrderedDict[tuple[str, str], _Found] = OrderedDict()
        self._asking: dict[tuple[str, str], trio.Event] = {}
        self._stub: dns.asyncresolver.Resolver | None = None

    async def exchangers(self, domain: str) -> list[Exchanger]:
        """Return the hosts that accept the mail of a domain, best first, equal ones in random order (RFC 5321 5.1).

        Each has at least one address. An address literal is its own host. Raise ResolveError; 5.4.6 if the mail would
        loop back to this server.
        """
        if domain.startswith("["):
            address = _literal(domain)
            if self._is_own(address):
                raise _loop(domain)
            return [Exchanger(0, address, (address,))]
        name = _ascii_form(domain)
        hosts = await self._hosts_of(name)
        usable: list[Exchanger] = []
        own: list[int] = []
        error: ResolveError | None = None
        for preference, host in hosts[:_MAX_EXCHANGERS]:
            try:
                addresses = await self.addresses(host)
            except ResolveError as exc:
                error = exc if error is None or error.is_permanent else error
                continue
            if any(map(self._is_own, addresses)):
                own.append(preference)
            usable.append(Exchanger(preference, host, addresses))
        if own:
            # RFC 5321 5.1: a server on the list must not send to hosts that are not better than itself. As in Postfix,
            # one of our addresses is enough to recognize ourselves.
            usable = [each for each in usable if each.preference < min(own)]
            if not usable and (error is None or error.is_permanent):
                raise _loop(name)
        if not usable:
            assert error is not None
            raise error
        return usable

    def _is_own(self, address: str) -> bool:
        """Return whether a connection to an address would reach this server."""
        parsed = ipaddress.ip_address(address)
        mapped = getattr(parsed, "ipv4_mapped", None)
        parsed = parsed if mapped is None else mapped
        if parsed.is_loopback or parsed.is_unspecified:
            return True
        return str(parsed) in self._own_names or self._is_local_address(str(parsed))

    async def addresses(self, host: str) -> tuple[str, ...]:
        """Return the addresses of a host, in the order of the families. Raise ResolveError."""
        found: list[str] = []
        error: ResolveError | None = None
        exists = False
        for family in self._settings.families:
            try:
                answer, _ = await self._follow(host, "A" if family == "ipv4" else "AAAA")
            except ResolveError as exc:
                error = exc
                continue
            exists |= answer.exists
            records = [str(record) for record in answer.records[:_MAX_ADDRESSES]]
            self._random.shuffle(records)
            found += records
        if found:
            return tuple(found)
        if error is not None:
            raise error
        what = f"the host {host} has no address" if exists else f"the host {host} does not exist"
        raise ResolveError("5.1.2" if not exists else "5.4.4", what, is_permanent=True)

    async def _hosts_of(self, name: str) -> list[tuple[int, str]]:
        """Return the preferences and names of the MX hosts that are better than this server."""
        answer, canonical = await self._follow(name, "MX")
        if not answer.exists:
            raise ResolveError("5.1.2", f"the domain {name} does not exist", is_permanent=True)
        records = [record for record in answer.records if isinstance(record, tuple)]
        if not records:
            # RFC 5321 5.1: without an MX record, the domain itself is the host.
            if not self._own_names.isdisjoint((name, canonical)):
                raise _loop(name)
            await self._expect_address(name)
            return [(0, canonical)]
        if all(host == "" for _, host in records):  # RFC 7505 3
            raise ResolveError("5.1.10", f"the domain {name} does not accept mail (null MX)", is_permanent=True)
        records = [(preference, host) for preference, host in records if host]
        own = [preference for preference, host in records if host in self._own_names]
        if own:
            # RFC 5321 5.1: a server on the list must not send to hosts that are not better than itself.
            records = [(preference, host) for preference, host in records if preference < min(own)]
            if not records:
                raise _loop(name)
        self._random.shuffle(records)
        records.sort(key=lambda record: record[0])
        return records

    async def _expect_address(self, name: str) -> None:
        """Raise ResolveError 5.1.2 for a domain with neither MX nor address."""
        try:
            await self.addresses(name)
        except ResolveError as exc:
            if exc.is_permanent:
                text = f"the domain {name} has neither an MX nor an address"
                raise ResolveError("5.1.2", text, is_permanent=True) from exc
            raise

    async def _follow(self, name: str, kind: str) -> tuple[_Found, str]:
        """Return the records of a name, following aliases, and the canonical name."""
        asked = name
        for _ in range(_MAX_ALIASES):
            found = await self._find(asked, kind)
            if found.records or not found.exists or not found.alias:
                return found, found.alias or asked
            asked = found.alias
        raise ResolveError("4.4.3", f"the aliases of {name} form a loop, or are too many", is_permanent=False)

    # ---- the cache

    async def _find(self, name: str, kind: str) -> _Found:
        """Return an answer from the cache, or query."""
        key = (name, kind)
        while True:
            found = self._cache.get(key)
            if found is not None and found.expires > self._clock():
                self._cache.move_to_end(key)
                return found
            asking = self._asking.get(key)
            if asking is None:
                break
            await asking.wait()
            found = self._cache.get(key)
            if found is not None:
                return found  # just received, however short its TTL
        done = self._asking[key] = trio.Event()
        try:
            found = await self._ask(name, kind)
            self._keep(key, found)
        finally:
            del self._asking[key]
            done.set()
        return found

    def _keep(self, key: tuple[str, str], found: _Found) -> None:
        self._cache[key] = found
        self._cache.move_to_end(key)
        while len(self._cache) > self._settings.cache_entries:
            self._cache.popitem(last=False)

    async def _ask(self, name: str, kind: str) -> _Found:
        """Ask the servers. Raise ResolveError 4.4.3 when none of them knows."""
        try:
            # Without the final dot a name could become one of the search list's.
            question = dns.name.from_text(name + ".")
            backend = dns.asyncbackend.get_backend("trio")
            answer = await self._resolver().resolve(
                question, kind, raise_on_no_answer=False, search=False, backend=backend
            )
        except dns.resolver.NXDOMAIN as exc:
            return _Found((), "", self._expiry(_ttl_of(exc), is_negative=True), exists=False)
        except (dns.name.LabelTooLong, dns.name.EmptyLabel, dns.name.NameTooLong) as exc:
            raise ResolveError("5.1.2", f"{name} is not a valid domain name", is_permanent=True) from exc
        except (dns.exception.DNSException, OSError, ValueError) as exc:
            cause = str(exc).partition(":")[0] if isinstance(exc, dns.exception.DNSException) else str(exc)
            raise ResolveError("4.4.3", f"no answer from the DNS for {name}: {cause}", is_permanent=False) from exc
        records = tuple(_record(data) for data in answer.rrset or ())
        ttl = answer.chaining_result.minimum_ttl
        alias = "" if answer.canonical_name == question else _text_of(answer.canonical_name)
        return _Found(records, alias, self._expiry(ttl, is_negative=not records))

    def _expiry(self, ttl: float, *, is_negative: bool) -> float:
        settings = self._settings
        most = settings.ttl_negative if is_negative else settings.ttl_most
        if ttl >= dns.ttl.MAX_TTL:
            ttl = 0  # without an SOA: not to be cached (RFC 2308 5)
        return self._clock() + min(max(ttl, settings.ttl_least), most)

    def _resolver(self) -> dns.asyncresolver.Resolver:
        """Return dnspython's resolver, created on first use: a machine that never queries needs no resolv.conf."""
        if self._stub is None:
            stub = dns.asyncresolver.Resolver(configure=not self._servers)
            if self._servers:
                stub.nameservers = [dns.nameserver.Do53Nameserver(address, port) for address, port in self._servers]
            stub.timeout, stub.lifetime = self._settings.timeout, self._settings.lifetime
            self._stub = stub
        return self._stub


def _ttl_of(exc: dns.resolver.NXDOMAIN) -> int:
    """Return how long a negative answer may be cached (RFC 2308 5)."""
    responses: dict[dns.name.Name, dns.message.QueryMessage] = exc.responses()  # type: ignore[no-untyped-call]
    return min((response.resolve_chaining().minimum_ttl for response in responses.values()), default=0)


def _record(data: object) -> str | tuple[int, str]:
    """Return an address, or the preference and the name of an MX host, "" for the null MX."""
    if isinstance(data, dns.rdtypes.ANY.MX.MX):
        return (data.preference, _text_of(data.exchange))
    return str(data)


def _text_of(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True).lower() if len(name) > 1 else ""


def _literal(domain: str) -> str:
    """Return the address of an address literal (RFC 5321 4.1.3). Raise ResolveError for a general one."""
    text = domain.strip("[]").lower().removeprefix("ipv6:")
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as exc:
        raise ResolveError("5.1.2", f"{domain} is not an address", is_permanent=True) from exc


def _ascii_form(domain: str) -> str:
    """Return a domain in the form of the DNS: A-labels in lower case. Raise ResolveError."""
    if domain.isascii():
        return domain.lower().rstrip(".")
    try:
        return idna.encode(domain, uts46=True, std3_rules=True).decode().lower()
    except (idna.IDNAError, UnicodeError) as exc:
        raise ResolveError("5.1.2", f"{domain} is not a valid domain", is_permanent=True) from exc
