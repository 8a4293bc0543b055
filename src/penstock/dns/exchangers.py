"""Which hosts take the mail of a domain (RFC 5321 5.1, RFC 7505)."""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Collection
from typing import Final, Literal, NamedTuple

import idna

from penstock.dns.resolver import Answer, Resolver

_MAX_EXCHANGERS: Final = 16
"""Hosts of a domain that are looked at; the worse ones of those who publish more are never needed."""
_MAX_ADDRESSES: Final = 8
"""Addresses of a host, of each family."""

Family = Literal["ipv4", "ipv6"]


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


class Exchangers:
    """Looks up exchangers and addresses."""

    def __init__(
        self,
        resolver: Resolver,
        *,
        families: tuple[Family, ...] = ("ipv4", "ipv6"),
        own_names: Collection[str] = (),
        random_source: random.Random | None = None,
    ) -> None:
        """`own_names` are names and addresses of this server, which it must not send to (RFC 5321 5.1)."""
        self._resolver = resolver
        self._families = families
        self._own_names = frozenset(name.lower().rstrip(".") for name in own_names)
        self._random = random_source or random.Random()  # noqa: S311 - it spreads load, it hides nothing

    async def exchangers(self, domain: str) -> list[Exchanger]:
        """Return the hosts that take the mail of a domain, best first, equal ones in random order (RFC 5321 5.1).

        Each has at least one address. An address literal is its own host. Raise ResolveError.
        """
        if domain.startswith("["):
            address = _literal(domain)
            if address in self._own_names:
                raise ResolveError("5.4.6", f"the mail of {domain} is for this server itself", is_permanent=True)
            return [Exchanger(0, address, (address,))]
        usable: list[Exchanger] = []
        trouble: ResolveError | None = None
        for preference, host in (await self._hosts_of(_ascii_form(domain)))[:_MAX_EXCHANGERS]:
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
        for family in self._families:
            answer = await self._resolver.query(host, "A" if family == "ipv4" else "AAAA")
            if answer.is_failure:
                trouble = _no_answer(host, answer)
                continue
            exists |= answer.status != "missing"
            kind = socket.AF_INET if family == "ipv4" else socket.AF_INET6
            records = [socket.inet_ntop(kind, record) for record in answer.records[:_MAX_ADDRESSES]]
            self._random.shuffle(records)
            found += records
        if found:
            return tuple(found)
        if trouble is not None:
            raise trouble
        what = f"the host {host} has no address" if exists else f"the host {host} does not exist"
        raise ResolveError("5.4.4" if exists else "5.1.2", what, is_permanent=True)

    async def _hosts_of(self, name: str) -> list[tuple[int, str]]:
        """Return the preferences and names of the exchangers that are better than this server."""
        answer = await self._resolver.query(name, "MX")
        if answer.is_failure:
            raise _no_answer(name, answer)
        if answer.status == "missing":
            raise ResolveError("5.1.2", f"the domain {name} does not exist", is_permanent=True)
        records: list[tuple[int, str]] = list(answer.records)
        if not records:
            # RFC 5321 5.1: without an MX, the domain is its own exchanger.
            if not self._own_names.isdisjoint((name, answer.name)):
                raise ResolveError("5.4.6", f"the mail of {name} is for this server itself", is_permanent=True)
            await self._expect_address(name)
            return [(0, answer.name or name)]
        if all(host == "" for _, host in records):  # RFC 7505 3
            raise ResolveError("5.1.10", f"the domain {name} takes no mail (null MX)", is_permanent=True)
        records = [(preference, host) for preference, host in records if host]
        own = [preference for preference, host in records if host in self._own_names]
        if own:
            # RFC 5321 5.1: a host on the list must not send to those that are not better than itself.
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


def _no_answer(name: str, answer: Answer) -> ResolveError:
    return ResolveError("4.4.3", f"no answer about {name} from the DNS: {answer.cause}", is_permanent=False)


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
