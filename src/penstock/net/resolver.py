"""Names to addresses: which hosts take the mail of a domain (RFC 5321 5.1), asked of the DNS through dnspython.

Rules
-----
1. Only the DNS itself can say that something is not there. A server that fails, refuses or keeps silent says nothing:
   that is temporary, whatever it costs us to wait.
2. An answer is kept as long as its TTL says, within bounds of our own: one of 0 is asked for once in a while and not
   for each message, and one of a year is asked for again.
3. Each name is asked for once at a time: those who want the same answer wait for the same question.
"""

from __future__ import annotations

import ipaddress
import random
import re
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

_MOST_ALIASES: Final = 8
"""CNAMEs that lead from one to the next; a recursive server follows them for us, others may not."""
_MOST_EXCHANGERS: Final = 16
"""Hosts of a domain that are looked at; the worse ones of those who publish more are never needed."""
_MOST_ADDRESSES: Final = 8
"""Addresses of a host."""
_SERVER: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)|([0-9A-Fa-f:.]+))(?::([0-9]{1,5}))?")


class ResolverSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The DNS."""

    servers: Annotated[
        tuple[str, ...],
        msgspec.Meta(
            max_length=16,
            description="Recursive servers: 192.0.2.53, 127.0.0.1:5353, [::1]:53; those of resolv.conf when empty",
        ),
    ] = ()
    timeout: Annotated[
        float, msgspec.Meta(gt=0, le=60, description="Seconds a server has for one answer, before the next is asked")
    ] = 5.0
    lifetime: Annotated[
        float, msgspec.Meta(gt=0, le=120, description="Seconds in which all servers together have to answer")
    ] = 20.0
    families: Annotated[
        tuple[Literal["ipv4", "ipv6"], ...],
        msgspec.Meta(min_length=1, max_length=2, description="Kinds of addresses that are used, in this order"),
    ] = ("ipv4", "ipv6")
    cache_entries: Annotated[int, msgspec.Meta(ge=0, le=10_000_000, description="Answers that are kept")] = 50_000
    ttl_least: Annotated[
        float, msgspec.Meta(ge=0, le=3600, description="Seconds an answer is kept, whatever its TTL says")
    ] = 5.0
    ttl_most: Annotated[float, msgspec.Meta(ge=1, le=604_800, description="And at most")] = 86_400.0
    ttl_negative: Annotated[
        float, msgspec.Meta(ge=0, le=86_400, description="Seconds that something is known not to exist, at most")
    ] = 900.0


class ResolveError(Exception):
    """A domain has no host to send to, now or for ever."""

    def __init__(self, status: str, text: str, *, is_permanent: bool) -> None:
        super().__init__(text)
        self.status = status
        """The enhanced status code: 5.1.2 no such domain, 5.1.10 it takes no mail, 5.4.6 it is us, 4.4.3 no answer."""
        self.text = text
        self.is_permanent = is_permanent


class Exchanger(NamedTuple):
    """A host that takes the mail of a domain."""

    preference: int
    host: str
    """In lower case, without the final dot."""
    addresses: tuple[str, ...]


@dataclass(slots=True)
class _Found:
    """An answer, or that there is none."""

    records: tuple[str | tuple[int, str], ...]
    alias: str
    """The name the answer is of, when that is another."""
    expires: float
    exists: bool = True


def parse_server(text: str) -> tuple[str, int]:
    """Read "192.0.2.53", "192.0.2.53:5353", "[::1]:53" or "::1". Raise ValueError."""
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
    raise ValueError(f"a DNS server looks like 192.0.2.53, 127.0.0.1:5353 or [::1]:53, not {text!r}")


class Resolver:
    """Looks up exchangers and addresses. For one trio loop."""

    def __init__(
        self,
        settings: ResolverSettings,
        *,
        own_names: Collection[str] = (),
        random_source: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`own_names` are names and addresses of this server, which it must not send to (RFC 5321 5.1).

        Raise ValueError for servers that are none.
        """
        self._settings = settings
        self._servers = [parse_server(server) for server in settings.servers]
        self._own_names = frozenset(name.lower().rstrip(".") for name in own_names)
        self._random = random_source or random.Random()  # noqa: S311 - it spreads load, it hides nothing
        self._clock = clock
        self._cache: OrderedDict[tuple[str, str], _Found] = OrderedDict()
        self._asking: dict[tuple[str, str], trio.Event] = {}
        self._stub: dns.asyncresolver.Resolver | None = None

    async def exchangers(self, domain: str) -> list[Exchanger]:
        """Return the hosts that take the mail of a domain, best first, equal ones in random order (RFC 5321 5.1).

        Each has at least one address. An address literal is its own host. Raise ResolveError.
        """
        if domain.startswith("["):
            address = _literal(domain)
            if address in self._own_names:
                raise ResolveError("5.4.6", f"the mail of {domain} is for this server itself", is_permanent=True)
            return [Exchanger(0, address, (address,))]
        name = _ascii_form(domain)
        hosts = await self._hosts_of(name)
        usable, trouble = [], None
        for preference, host in hosts[:_MOST_EXCHANGERS]:
            try:
                addresses = await self.addresses(host)
            except ResolveError as exc:
                trouble = exc if trouble is None or trouble.is_permanent else trouble
                continue
            usable.append(Exchanger(preference, host, addresses))
        if not usable:
            assert trouble is not None
            raise trouble
        return usable

    async def addresses(self, host: str) -> tuple[str, ...]:
        """Return the addresses of a host, in the order of the families. Raise ResolveError."""
        found: list[str] = []
        trouble: ResolveError | None = None
        exists = False
        for family in self._settings.families:
            try:
                answer, _ = await self._follow(host, "A" if family == "ipv4" else "AAAA")
            except ResolveError as exc:
                trouble = exc
                continue
            exists |= answer.exists
            records = [str(record) for record in answer.records[:_MOST_ADDRESSES]]
            self._random.shuffle(records)
            found += records
        if found:
            return tuple(found)
        if trouble is not None:
            raise trouble
        what = f"the host {host} has no address" if exists else f"the host {host} does not exist"
        raise ResolveError("5.1.2" if not exists else "5.4.4", what, is_permanent=True)

    async def _hosts_of(self, name: str) -> list[tuple[int, str]]:
        """Return the preferences and names of the exchangers, those before us only."""
        answer, canonical = await self._follow(name, "MX")
        if not answer.exists:
            raise ResolveError("5.1.2", f"the domain {name} does not exist", is_permanent=True)
        records = [record for record in answer.records if isinstance(record, tuple)]
        if not records:
            # RFC 5321 5.1: without an MX, the domain is its own exchanger.
            if not self._own_names.isdisjoint((name, canonical)):
                raise ResolveError("5.4.6", f"the mail of {name} is for this server itself", is_permanent=True)
            await self._expect_address(name)
            return [(0, canonical)]
        if all(host == "" for _, host in records):  # RFC 7505 3
            raise ResolveError("5.1.10", f"the domain {name} takes no mail (null MX)", is_permanent=True)
        records = [(preference, host) for preference, host in records if host]
        own = [preference for preference, host in records if host in self._own_names]
        if own:
            # RFC 5321 5.1: whoever is on the list must not send to those that are not better than itself.
            records = [(preference, host) for preference, host in records if preference < min(own)]
            if not records:
                raise ResolveError("5.4.6", f"the best exchanger of {name} is this server itself", is_permanent=True)
        self._random.shuffle(records)
        records.sort(key=lambda record: record[0])
        return records

    async def _expect_address(self, name: str) -> None:
        """Raise ResolveError 5.1.2 for a domain that has neither MX nor address."""
        try:
            await self.addresses(name)
        except ResolveError as exc:
            if exc.is_permanent:
                text = f"the domain {name} has neither an MX nor an address"
                raise ResolveError("5.1.2", text, is_permanent=True) from exc
            raise

    async def _follow(self, name: str, kind: str) -> tuple[_Found, str]:
        """Return what there is at a name or at the end of its aliases, and the name it is of."""
        asked = name
        for _ in range(_MOST_ALIASES):
            found = await self._find(asked, kind)
            if found.records or not found.exists or not found.alias:
                return found, found.alias or asked
            asked = found.alias
        raise ResolveError("4.4.3", f"the aliases of {name} do not come to an end", is_permanent=False)

    # ---- the cache

    async def _find(self, name: str, kind: str) -> _Found:
        """Return an answer from the cache, or ask."""
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
                return found  # just asked for, however short its life is
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
            raise ResolveError("5.1.2", f"{name} is not a name of the DNS", is_permanent=True) from exc
        except (dns.exception.DNSException, OSError, ValueError) as exc:
            cause = str(exc).partition(":")[0] if isinstance(exc, dns.exception.DNSException) else str(exc)
            raise ResolveError("4.4.3", f"no answer about {name} from the DNS: {cause}", is_permanent=False) from exc
        records = tuple(_record(data) for data in answer.rrset or ())
        ttl = answer.chaining_result.minimum_ttl
        alias = "" if answer.canonical_name == question else _text_of(answer.canonical_name)
        return _Found(records, alias, self._expiry(ttl, is_negative=not records))

    def _expiry(self, ttl: float, *, is_negative: bool) -> float:
        settings = self._settings
        most = settings.ttl_negative if is_negative else settings.ttl_most
        if ttl >= dns.ttl.MAX_TTL:
            ttl = 0  # without an SOA: not to be kept (RFC 2308 5)
        return self._clock() + min(max(ttl, settings.ttl_least), most)

    def _resolver(self) -> dns.asyncresolver.Resolver:
        """Return dnspython's resolver, made when it is first needed: a machine that never asks needs no resolv.conf."""
        if self._stub is None:
            stub = dns.asyncresolver.Resolver(configure=not self._servers)
            if self._servers:
                stub.nameservers = [dns.nameserver.Do53Nameserver(address, port) for address, port in self._servers]
            stub.timeout, stub.lifetime = self._settings.timeout, self._settings.lifetime
            self._stub = stub
        return self._stub


def _ttl_of(exc: dns.resolver.NXDOMAIN) -> int:
    """Return how long it is known that a name does not exist (RFC 2308 5)."""
    responses: dict[dns.name.Name, dns.message.QueryMessage] = exc.responses()  # type: ignore[no-untyped-call]
    return min((response.resolve_chaining().minimum_ttl for response in responses.values()), default=0)


def _record(data: object) -> str | tuple[int, str]:
    """Return an address, or the preference and the name of an exchanger, "" for the null MX."""
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
    """Return a domain as the DNS knows it: A-labels in lower case. Raise ResolveError."""
    if domain.isascii():
        return domain.lower().rstrip(".")
    try:
        return idna.encode(domain, uts46=True, std3_rules=True).decode().lower()
    except (idna.IDNAError, UnicodeError) as exc:
        raise ResolveError("5.1.2", f"{domain} is not a domain", is_permanent=True) from exc
