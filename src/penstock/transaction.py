"""What is known so far of one connection and of the mail transaction open on it.

The session writes here as replies move its state; checks, hooks and the trace header read it.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from penstock._transaction import TransactionCore
from penstock.message import NULL_PATH, Envelope


class Peer(NamedTuple):
    """The two ends of a connection. An address of "" is a unix socket."""

    address: str
    """IP address of the client: what PROXY said where a trusted proxy said it, otherwise the socket's own."""
    port: int
    local_address: str = ""
    local_port: int = 0
    proxy: str = ""
    """IP address of the proxy between us, "" without one."""

    @property
    def literal(self) -> str:
        """The address literal of RFC 5321 4.1.3: "[192.0.2.1]" or "[IPv6:2001:db8::1]"; "[unix]" without one."""
        if not self.address:
            return "[unix]"
        return f"[IPv6:{self.address}]" if ":" in self.address else f"[{self.address}]"

    @property
    def network(self) -> str:
        """What limits per client count by: the IPv4 address, the IPv6 /64, "" for a unix socket.

        The IPv6 loopback is itself, and an IPv4 address in IPv6 clothes (RFC 4291 2.5.5.2) the IPv4 address: a /64
        would put them, and all others like them, into one.
        """
        if ":" not in self.address:
            return self.address
        address = ipaddress.IPv6Address(self.address.partition("%")[0])
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        if address.is_loopback:
            return str(address)
        return f"{ipaddress.IPv6Address(int(address) >> 64 << 64)}/64"


class TlsInfo(NamedTuple):
    """What the handshake agreed on."""

    version: str
    """"TLSv1.3"."""
    cipher: str
    """"TLS_AES_256_GCM_SHA384"."""
    bits: int
    """Secret bits of the cipher."""
    sni: str | None = None
    """The server name the client asked for."""


class Transaction(TransactionCore):
    """The facts about a connection, and those about its open mail transaction, which `reset` forgets.

    Its fields are compiled, because each command of a session writes there: `TransactionCore`.
    """

    __slots__ = ()

    def envelope(self) -> Envelope:
        """Return the envelope of the open transaction."""
        size, body_type, smtputf8, ret, envid, auth, requiretls = self.parameters
        return Envelope(
            self.sender if self.sender is not None else NULL_PATH,
            tuple(self.recipients),
            body_type,
            smtputf8,
            size,
            ret,
            envid,
            auth,
            requiretls,
        )

    @property
    def protocol(self) -> str:
        """The `with` keyword of the Received field (RFC 3848, RFC 6531 4.3): "ESMTPSA", "UTF8LMTPS", "SMTP" ..."""
        if not self.is_esmtp:
            return "SMTP"
        base = "LMTP" if self.is_lmtp else "SMTP" if self.parameters.smtputf8 else "ESMTP"
        if self.parameters.smtputf8:
            base = f"UTF8{base}"
        return f"{base}{'S' if self.tls else ''}{'A' if self.identity is not None else ''}"
