"""Finds the hosts that accept the mail of a domain, and their addresses (RFC 5321 5.1), in the DNS.

Rules
-----
1. Only a DNS answer can say that a name does not exist. A server that fails, refuses or does not answer is a temporary
   error, however long it lasts.
2. Mail is not sent to this server itself. It is recognized by name and by address: an address of a listener or of a
   network interface, loopback (a connection there reaches us), or the unspecified address.

Answers are cached and shared by the resolver (resolver.py).
"""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Callable, Collection
from typing import Final, Literal, NamedTuple

import idna

from penstock.dns.resolver import Answer, Kind, Resolver

_MAX_EXCHANGERS: Final = 16
"""MX hosts of a domain that are used, best first; some domains publish more."""
_MAX_ADDRESSES: Final = 8
"""Addresses of a host, for each family."""
Family = Literal["ipv4", "ipv6"]


class ResolveError(Exception):
    """A domain has no host to send to, temporarily or permanently."""

    def __init__(self, status: str, text: str, *, is_permanent: bool) -> None:
        super().__init__(text)
        self.status = status
        """The enhanced status code: 5.1.2 no such domain, 5.1.10 null MX, 5.4.6 or 4.4.6 mail loop, 4.4.3 no answer."""
        self.text = text
        self.is_permanent = is_permanent


class Exchanger(NamedTuple):
    """A host that accepts the mail of a domain."""

    preference: int
    host: str
    """In lower case, without the final dot."""
    addresses: tuple[str, ...]


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


class MailExchangers:
    """Looks up MX hosts and addresses. For one trio loop."""

    def __init__(
        self,
        resolver: Resolver,
        *,
        families: Collection[Family] = ("ipv4", "ipv6"),
        own_names: Collection[str] = (),
        random_source: random.Random | None = None,
        is_local_address: Callable[[str], bool] = is_local_address,
    ) -> None:
        """`families` are those of addresses, in this order.

        `own_names` are names and addresses of this server; `is_local_address` recognizes its interfaces.
        """
        self._resolver = resolver
        self._kinds: tuple[Kind, ...] = tuple("A" if family == "ipv4" else "AAAA" for family in families)
        self._own_names = frozenset(name.lower().rstrip(".") for name in own_names)
        self._random = random_source or random.Random()  # noqa: S311 - it spreads load, it hides nothing
        self._is_local_address = is_local_address

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
        for kind in self._kinds:
            try:
                answer = await self._ask(host, kind)
            except ResolveError as exc:
                error = exc
                continue
            exists |= answer.status != "missing"
            records = [str(ipaddress.ip_address(record)) for record in answer.records[:_MAX_ADDRESSES]]
            self._random.shuffle(records)
            found += records
        if found:
            return tuple(found)
        if error is not None:
            raise error
        what = f"the host {host} has no address" if exists else f"the host {host} does not exist"
        raise ResolveError("5.1.2" if not exists else "5.4.4", what, is_permanent=True)

    async def tlsa_names(self, domain: str, host: str) -> tuple[str, ...]:
        """Return the names at which the TLSA records of an MX host count (RFC 7672 2.2.1, 2.2.2), the first one first.

        None unless the DNS has proved with DNSSEC that the domain has this host, and the host its addresses. Answers
        are those that `exchangers` has used, from the cache. Raise ResolveError.
        """
        if domain.startswith("["):
            return ()
        mx = await self._ask(_ascii_form(domain), "MX")
        if not mx.authentic:
            return ()
        names: list[str] = []
        failure: ResolveError | None = None
        for kind in self._kinds:
            try:
                answer = await self._ask(host, kind)
            except ResolveError as exc:  # as in `addresses`, those of the other family serve
                failure = exc
                continue
            if not answer.authentic:
                return ()
            if answer.records:
                names.append(answer.name)
        if failure is not None and not names:
            raise failure
        # With an alias, its target may have the records, or the alias itself.
        return (*names[:1], host) if names and names[0] != host else (host,)

    async def _ask(self, name: str, kind: Kind) -> Answer:
        """Return the answer of the DNS. Raise ResolveError 4.4.3 without an answer, 5.1.2 for an invalid name."""
        answer = await self._resolver.query(name, kind)
        if answer.is_failure:
            text = f"no answer from the DNS for {name}: {answer.cause}"
            raise ResolveError("4.4.3", text, is_permanent=False)
        return answer

    async def _hosts_of(self, name: str) -> list[tuple[int, str]]:
        """Return the preferences and names of the MX hosts that are better than this server."""
        answer = await self._ask(name, "MX")
        if answer.status == "missing":
            raise ResolveError("5.1.2", f"the domain {name} does not exist", is_permanent=True)
        records: list[tuple[int, str]] = list(answer.records)
        if not records:
            # RFC 5321 5.1: without an MX record, the domain itself is the host.
            if not self._own_names.isdisjoint((name, answer.name)):
                raise _loop(name)
            await self._expect_address(name)
            return [(0, answer.name or name)]
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
