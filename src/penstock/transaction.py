"""What is known so far of one connection and of the mail transaction open on it.

The session writes here as replies move its state; checks, hooks and the trace header read it.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from penstock.addresses import literal_of_address, network_of
from penstock.message import NO_PARAMETERS, NULL_PATH, Envelope, MailParameters, Path, Recipient
from penstock.results import Results

_FIELD: Final = re.compile(rb"[!-9;-~]+: [^\r\n\x00]*(?:\r\n[ \t]+[^\r\n\x00 \t][^\r\n\x00]*)*\r\n")
"""A header field, perhaps folded (RFC 5322 2.2, 2.2.3)."""
_FIELD_OCTETS: Final = 8192
_MOST_FIELDS: Final = 100


class Peer(NamedTuple):
    """The two ends of a connection. An address of "" is a unix socket."""

    address: str
    """IP address of the client: from the PROXY header of a trusted proxy, otherwise the socket's own."""
    port: int
    local_address: str = ""
    local_port: int = 0
    proxy: str = ""
    """IP address of the proxy between us, "" without one."""

    @property
    def literal(self) -> str:
        """The address literal of RFC 5321 4.1.3: "[192.0.2.1]" or "[IPv6:2001:db8::1]"; "[unix]" without one."""
        return literal_of_address(self.address)

    @property
    def local_literal(self) -> str:
        """The address literal of the server's address, in the canonical form of recipients' domains."""
        return literal_of_address(self.local_address).lower()

    @property
    def network(self) -> str:
        """What limits per client count by: the IPv4 address, the IPv6 /64, "" for a unix socket."""
        return network_of(self.address)


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


class Transaction:
    """The facts about a connection, and those about its open mail transaction, which `reset` forgets.

    Compiled as it stands (transaction.pxd has the C types), because each command of a session writes here.
    """

    def __init__(
        self,
        peer: Peer,
        listener: str = "",
        *,
        hello: str = "",
        is_esmtp: bool = False,
        is_lmtp: bool = False,
        tls: TlsInfo | None = None,
        identity: str | None = None,
    ) -> None:
        self.peer = peer
        self.listener = listener
        """The name of the listener."""
        self.hello = hello
        """The name the client gave with HELO, EHLO or LHLO; "" before it."""
        self.is_esmtp = is_esmtp
        self.is_lmtp = is_lmtp
        self.tls = tls
        """What TLS has negotiated; None without TLS."""
        self.identity = identity
        """The authenticated user; None without authentication."""
        self.sender: Path | None = None
        """The reverse-path; None while no transaction is open."""
        self.parameters: MailParameters = NO_PARAMETERS
        self.recipients: list[Recipient] = []
        """Accepted so far, in the order of their RCPT."""
        self.number = 0
        """What the journal calls the connection."""
        self.evidence: object = None
        """What the built-in checks keep about the connection (penstock.policy.judge); None before they need it."""
        self._results: Results | None = None
        self._fields: list[bytes] | None = None

    @property
    def results(self) -> Results:
        """What checks have found out about this transaction: for later checks and the delivery."""
        if self._results is None:  # as in most transactions
            self._results = Results()
        return self._results

    @property
    def has_results(self) -> bool:
        """A check has looked at this transaction, or a policy has kept something."""
        return self._results is not None

    @property
    def quarantine(self) -> str:
        """What happens to the message if it is accepted: "" (it is delivered), "tag", "hold" or "route:NAME"."""
        return "" if self._results is None else self._results.quarantine

    @property
    def added_fields(self) -> bytes:
        """The header fields that policies have added, encoded, in their order; b"" without any."""
        return b"" if self._fields is None else b"".join(self._fields)

    def add_field(self, name: str, value: str) -> None:
        """Add a header field to the message of this transaction, above the Received field.

        `name` is a field name (RFC 5322 3.6.8); `value` is one line, or lines that are folded already (each after the
        first begins with a blank); non-ASCII text is sent as UTF-8 (RFC 6532). Raise ValueError for anything that
        would end the field, or the header. At most 100 fields, and 8,192 octets in each.
        """
        field = f"{name}: {value}\r\n".encode()
        if not _FIELD.fullmatch(field) or len(field) > _FIELD_OCTETS:
            raise ValueError(f"not a header field: {field[:100]!r}")
        if self._fields is None:
            self._fields = []
        if len(self._fields) >= _MOST_FIELDS:
            raise ValueError(f"a message gets at most {_MOST_FIELDS} added fields")
        self._fields.append(field)

    def reset(self) -> None:
        """Forget the open transaction."""
        self.forget()

    def forget(self) -> None:
        """Do the same, called from compiled code."""
        self.sender = None
        self.parameters = NO_PARAMETERS
        if self.recipients:
            self.recipients = []
        self._results = None
        self._fields = None

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
