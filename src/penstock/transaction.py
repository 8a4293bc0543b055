"""The facts about a connection and its open mail transaction.

The session updates them with its state; checks, hooks and the Received field read them.
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
    """IP address of the client, in canonical form: from the PROXY header of a trusted proxy, or of the socket."""
    port: int
    """TCP port of the client; 0 for a unix socket."""
    local_address: str = ""
    """IP address the client connected to, in canonical form; with a PROXY header, the one in it."""
    local_port: int = 0
    """TCP port the client connected to; 0 for a unix socket."""
    proxy: str = ""
    """IP address of the proxy that sent a PROXY header; "" without one."""

    @property
    def literal(self) -> str:
        """The client's address literal (RFC 5321 4.1.3): "[192.0.2.1]", "[IPv6:2001:db8::1]"; "[unix]" without one."""
        return literal_of_address(self.address)

    @property
    def local_literal(self) -> str:
        """The address literal of the server's address, in the canonical form of recipients' domains."""
        return literal_of_address(self.local_address).lower()

    @property
    def network(self) -> str:
        """The network that limits per client apply to: the IPv4 address or IPv6 /64; "" for a unix socket."""
        return network_of(self.address)


class TlsInfo(NamedTuple):
    """The parameters of a TLS session."""

    version: str
    """"TLSv1.3"."""
    cipher: str
    """"TLS_AES_256_GCM_SHA384"."""
    bits: int
    """Secret bits of the cipher."""
    sni: str | None = None
    """The server name that the client requested (SNI, RFC 6066 3); None without one."""


class Transaction:
    """The facts about a connection, and those about its open mail transaction, which `reset` clears.

    It is valid during a hook or `Delivery.accept`; its attributes change with the commands that follow. Compiled
    (transaction.pxd has the C types), because each command of a session writes here.
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
        """The addresses of the connection."""
        self.listener = listener
        """The name of the listener."""
        self.hello = hello
        """The client's name from HELO, EHLO or LHLO (RFC 5321 4.1.1.1), not verified; "" before it."""
        self.is_esmtp = is_esmtp
        """The client has sent EHLO or LHLO, not HELO."""
        self.is_lmtp = is_lmtp
        """The listener uses LMTP (RFC 2033)."""
        self.tls = tls
        """The parameters of TLS; None without TLS."""
        self.identity = identity
        """The authenticated user; None without authentication."""
        self.sender: Path | None = None
        """The reverse-path; None while no transaction is open."""
        self.parameters: MailParameters = NO_PARAMETERS
        """The parameters of MAIL in the open transaction."""
        self.recipients: list[Recipient] = []
        """The accepted recipients, in the order of their RCPT."""
        self.number = 0
        """The number of the session in the journal."""
        self.evidence: object = None
        """Data of the built-in checks about the connection (penstock.policy.judge); None before they need it."""
        self._results: Results | None = None
        self._fields: list[bytes] | None = None

    @property
    def results(self) -> Results:
        """Results of checks of this transaction, for later checks and the delivery."""
        if self._results is None:  # as in most transactions
            self._results = Results()
        return self._results

    @property
    def has_results(self) -> bool:
        """`results` has been used: by a check, or by a policy."""
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
        """Clear the open transaction: sender, parameters, recipients, results and added fields."""
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
