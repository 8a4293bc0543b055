"""Greylisting: the first attempt of a client that is not known is deferred (RFC 6647).

Rules
-----
1. An attempt is known by the network of the client (IPv4 /24, IPv6 /64), the sender and the recipient, because large
   senders try again from another address; or, if SPF passes, by the domain it has authenticated, because pools of some
   senders span many networks.
2. Without the state, mail is accepted (fail open): no mail is lost for want of a defence against spam.
3. With `when = "suspicious"`, what is known at RCPT decides: the score, the client's name, SPF. DKIM is not known then.
4. A client that tries again too early gets the remaining time in the reply, and the time does not start again.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Awaitable
from hashlib import blake2b
from typing import Final

from penstock.addresses import parse_address
from penstock.message import NULL_PATH, Recipient
from penstock.policy.check import Check, Mode, Parts
from penstock.policy.evidence import evidence_of
from penstock.policy.settings import GreylistSettings, PolicySettings
from penstock.policy.units import parse_duration
from penstock.reply import Reply
from penstock.state import GreylistTimes, State, StateUnavailableError
from penstock.transaction import Transaction

_SUSPICIOUS_SCORE: Final = 2.0
_LONG_KEY: Final = 160
_NANO: Final = 1_000_000_000


@functools.lru_cache(maxsize=65_536)
def wide_network(address: str) -> str:
    """Return the network that greylisting knows a client by: IPv4 /24, IPv6 /64."""
    found = parse_address(address)
    bits = 24 if found.version == 4 else 64
    return str(ipaddress.ip_network((found, bits), strict=False))


def make_key(*parts: str) -> str:
    """Return a key of the state: short, whatever clients have sent. The first part is text of our own."""
    key = "\0".join(parts)
    if len(key) <= _LONG_KEY and key.isascii():
        return key
    return f"{parts[0]}\0{blake2b(key.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


class GreylistCheck(Check):
    """Asks clients that are not known to try again."""

    name = "greylist"
    failure = None

    def __init__(self, settings: GreylistSettings, mode: Mode, state: State) -> None:
        self.mode = mode
        self._state = state
        self._only_suspicious = settings.when == "suspicious"
        self._times = GreylistTimes(
            parse_duration(settings.delay), parse_duration(settings.window), parse_duration(settings.remember)
        )

    def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> Reply | Awaitable[Reply | None] | None:
        """Defer an attempt that is not known."""
        if self._only_suspicious and not is_suspicious(transaction):
            return None
        key = self._key(transaction, recipient)
        try:
            wait = self._state.greylist(key, self._times)
        except StateUnavailableError:
            return None
        return self._verdict(wait) if isinstance(wait, int) else self._await(wait)

    def _key(self, transaction: Transaction, recipient: Recipient) -> str:
        spf = transaction.results.spf if transaction.has_results else None
        if spf is not None and spf.result == "pass" and spf.domain:
            return make_key("domain", spf.domain)
        sender = transaction.sender or NULL_PATH
        path = recipient.path
        return make_key(
            wide_network(transaction.peer.address),
            f"{sender.local}@{sender.domain}".lower(),
            f"{path.local}@{path.domain}".lower(),
        )

    async def _await(self, wait: Awaitable[int]) -> Reply | None:
        try:
            return self._verdict(await wait)
        except StateUnavailableError:
            return None

    @staticmethod
    def _verdict(wait: int) -> Reply | None:
        if not wait:
            return None
        return Reply(451, "4.7.1", f"Greylisted, please try again in {-(-wait // _NANO)} seconds")


def is_suspicious(transaction: Transaction) -> bool:
    """Return whether a result so far makes a client suspicious."""
    if not transaction.has_results:
        return True  # nothing was checked, so the client may be suspicious
    results = transaction.results
    marks = evidence_of(transaction).marks
    if results.score + sum(mark.score for _, mark, is_monitored in marks if not is_monitored) >= _SUSPICIOUS_SCORE:
        return True
    if results.iprev is not None and results.iprev.result in ("fail", "permerror"):
        return True
    return results.spf is None or results.spf.result in ("none", "permerror")


def make_checks(settings: PolicySettings, parts: Parts) -> list[Check]:
    """Return the check, if it is wanted."""
    mode = settings.mode_of(settings.greylist)
    if settings.greylist is None or mode == "off" or parts.state is None:
        return []
    return [GreylistCheck(settings.greylist, mode, parts.state)]
