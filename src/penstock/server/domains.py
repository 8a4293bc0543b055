"""The domains a listener accepts mail for, and which recipients a client may send to."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from penstock import reply as replies
from penstock.addresses import canonical_domain
from penstock.message import Path
from penstock.reply import Reply

ROUTING_DENIED: Final = Reply(550, "5.7.1", "Sender-specified routing is not allowed")
_ROUTING: Final = frozenset("@%!")


class Domains:
    """The domains a listener accepts mail for. An entry with a leading dot matches all names below it."""

    def __init__(self, names: Sequence[str]) -> None:
        """Bring the names into their canonical form. Raise ValueError for what is not a domain."""
        exact = [canonical_domain(name) for name in names if not name.startswith(".")]
        self.first = exact[0] if exact else ""
        """The first entry without a leading dot, "" without one."""
        self._exact = frozenset(exact)
        self._below = tuple(f".{canonical_domain(name[1:])}" for name in names if name.startswith("."))

    def __contains__(self, domain: str) -> bool:
        """Return whether a domain, in its canonical form, is one of them."""
        return domain in self._exact or domain.endswith(self._below)


def has_routing(local_part: str) -> bool:
    """Return whether an unquoted local part has a route: `user%remote`, `remote!user` or `user@remote`.

    A next hop may follow such a route after it has removed our domain, and would relay for any client, because it
    trusts us. Compatibility characters (a full-width @) count, because the next hop may normalize them.
    """
    if not local_part.isascii():
        local_part = unicodedata.normalize("NFKC", local_part)
    return not _ROUTING.isdisjoint(local_part)


@dataclass(frozen=True, slots=True)
class RelayControl:
    """Decides which recipients a client may send to."""

    domains: Domains | None
    """The domains that every client may send to; None: all."""
    own_domain: str = ""
    """The domain whose postmaster is always accepted (RFC 5321 4.5.1)."""
    allow_untrusted_routing: bool = False
    """Accept sender-specified routing in `domains` from every client, like the Postfix setting of this name."""

    def refusal(self, path: Path, *, may_relay: bool, own_literal: str) -> Reply | None:
        """Return why a client may not send to a mailbox, None when it may.

        `may_relay`: the client may send to every domain. `own_literal` is the canonical address literal of the address
        it is connected to; only postmaster is accepted there.
        """
        if self.domains is None or may_relay:
            return None
        if not path.domain or (path.domain == self.own_domain and path.local.lower() == "postmaster"):
            return None
        if path.domain in self.domains:
            return ROUTING_DENIED if not self.allow_untrusted_routing and has_routing(path.local) else None
        if path.domain == own_literal and path.local.lower() == "postmaster":
            return None
        return replies.RELAY_DENIED
