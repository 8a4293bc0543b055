"""The extensions and protocol limits of a listener.

Each listener has one `Extensions`. The replies to EHLO are encoded once for each state of a
connection that changes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

import msgspec


class ExtensionSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The extensions of a listener: all are offered unless disabled."""

    pipelining: Annotated[bool, msgspec.Meta(description="PIPELINING (RFC 2920)")] = True
    eightbitmime: Annotated[bool, msgspec.Meta(description="8BITMIME (RFC 6152)")] = True
    smtputf8: Annotated[bool, msgspec.Meta(description="SMTPUTF8 (RFC 6531)")] = True
    enhancedstatuscodes: Annotated[
        bool, msgspec.Meta(description="ENHANCEDSTATUSCODES (RFC 2034); replies have the codes in any case")
    ] = True
    chunking: Annotated[bool, msgspec.Meta(description="CHUNKING: BDAT (RFC 3030)")] = True
    binarymime: Annotated[bool, msgspec.Meta(description="BINARYMIME (RFC 3030); only with CHUNKING")] = True
    dsn: Annotated[bool, msgspec.Meta(description="DSN (RFC 3461)")] = True
    requiretls: Annotated[bool, msgspec.Meta(description="REQUIRETLS inside TLS (RFC 8689)")] = True
    expn: Annotated[bool, msgspec.Meta(description="EXPN answers 252; without it 502 (RFC 5321 3.5)")] = True


@dataclass(frozen=True)
class Extensions:
    """The protocol constants of a listener."""

    hostname: str = "localhost"
    """The name in the greeting and in the reply to EHLO (RFC 5321 4.1.1.1)."""
    own_domain: str = ""
    """Domain of `<postmaster>` and of senders without a domain; "" leaves them without one."""
    tolerant_addresses: bool = True
    """Accept common irregularities in arguments (penstock.smtp.grammar); False is the syntax of the RFCs."""
    is_lmtp: bool = False
    """LHLO instead of EHLO, and one reply per recipient at the end of the data (RFC 2033)."""
    max_size: int = 26_214_400
    """SIZE: octets of a message (RFC 1870); 0 is no limit."""
    max_recipients: int = 1000
    """LIMITS RCPTMAX: recipients of a transaction (RFC 9422); at least 100 (RFC 5321 4.5.3.1.8)."""
    max_messages: int = 0
    """LIMITS MAILMAX: transactions of a connection (RFC 9422); 0 is no limit and is not announced."""
    max_errors: int = 20
    """Commands answered with 5xx before the session ends with 421 4.7.0."""
    max_unknown: int = 50
    """Recipients refused with 5xx before the session ends with 421 4.7.0."""
    max_junk: int = 100
    """Commands without mail (NOOP, RSET, EHLO ...) since the last MAIL; more of them count as errors."""
    max_auth_failures: int = 3
    """Failed authentications before the session ends with 421 4.7.0."""
    starttls: bool = False
    """Offer STARTTLS until TLS is active (RFC 3207)."""
    require_tls: bool = False
    """Refuse all commands but EHLO, STARTTLS, NOOP, RSET, HELP and QUIT before TLS: 530 5.7.0."""
    require_auth: bool = False
    """Refuse MAIL before AUTH: 530 5.7.0."""
    mechanisms: tuple[str, ...] = ()
    """AUTH mechanisms of the listener, in the order they are offered; () does not offer AUTH."""
    auth_without_tls: bool = False
    """Also offer mechanisms that send a clear-text password when there is no TLS (RFC 4954 4 forbids it by default)."""
    pipelining: bool = True
    eightbitmime: bool = True
    smtputf8: bool = True
    enhancedstatuscodes: bool = True
    chunking: bool = True
    binarymime: bool = True
    dsn: bool = True
    requiretls: bool = True
    """Offer REQUIRETLS inside TLS (RFC 8689)."""
    can_verify: bool = False
    """Pass VRFY to the driver instead of answering 252."""
    can_expand: bool = False
    """Pass EXPN to the driver instead of answering 252."""
    expn: bool = True
    """EXPN is implemented; otherwise the reply is 502."""
    _answers: dict[tuple[bool, bool], bytes] = field(default_factory=dict, repr=False, compare=False)

    def mechanisms_for(self, *, tls: bool) -> tuple[str, ...]:
        """Return the mechanisms offered with or without TLS.

        Without TLS, mechanisms that send a clear-text password are left out, and so is -PLUS: there is no channel to
        bind to.
        """
        if tls:
            return self.mechanisms
        return tuple(
            m
            for m in self.mechanisms
            if not m.endswith("-PLUS") and (self.auth_without_tls or m not in CLEARTEXT_MECHANISMS)
        )

    def keywords(self, *, tls: bool, authenticated: bool) -> list[str]:
        """Return the EHLO lines after the hostname for a state of the connection."""
        lines = []
        if self.pipelining:
            lines.append("PIPELINING")  # RFC 2920
        lines.append(f"SIZE {self.max_size}" if self.max_size else "SIZE")  # RFC 1870
        if self.eightbitmime:
            lines.append("8BITMIME")  # RFC 6152
        if self.smtputf8:
            lines.append("SMTPUTF8")  # RFC 6531
        if self.enhancedstatuscodes:
            lines.append("ENHANCEDSTATUSCODES")  # RFC 2034
        if self.chunking:
            lines.append("CHUNKING")  # RFC 3030
            if self.binarymime:
                lines.append("BINARYMIME")  # RFC 3030 3: only with CHUNKING
        if self.dsn:
            lines.append("DSN")  # RFC 3461
        if self.starttls and not tls:
            lines.append("STARTTLS")  # RFC 3207 4.2: not once TLS is active
        if tls and self.requiretls:
            lines.append("REQUIRETLS")  # RFC 8689 2: only inside TLS
        mechanisms = self.mechanisms_for(tls=tls)
        if mechanisms and not authenticated:
            lines.append("AUTH " + " ".join(mechanisms))  # RFC 4954 3
        lines.append(self._limits)
        lines.append("HELP")
        return lines

    @cached_property
    def _limits(self) -> str:
        """The LIMITS keyword (RFC 9422 3)."""
        mailmax = f" MAILMAX={self.max_messages}" if self.max_messages else ""
        return f"LIMITS RCPTMAX={self.max_recipients}{mailmax}"

    def ehlo_answer(self, *, tls: bool, authenticated: bool) -> bytes:
        """Return the encoded reply to EHLO or LHLO (RFC 5321 4.1.1.1), made once for each state."""
        state = (tls, authenticated)
        answer = self._answers.get(state)
        if answer is None:
            lines = [self.hostname, *self.keywords(tls=tls, authenticated=authenticated)]
            answer = "".join(f"250-{line}\r\n" for line in lines[:-1]).encode() + f"250 {lines[-1]}\r\n".encode()
            self._answers[state] = answer
        return answer

    @cached_property
    def greeting(self) -> bytes:
        """The encoded 220 (RFC 5321 4.2)."""
        return f"220 {self.hostname} {'LMTP' if self.is_lmtp else 'ESMTP'} Penstock\r\n".encode()

    @cached_property
    def helo_answer(self) -> bytes:
        """The encoded 250 to HELO."""
        return f"250 {self.hostname}\r\n".encode()


CLEARTEXT_MECHANISMS = frozenset({"PLAIN", "LOGIN"})
"""Mechanisms that send the password itself."""
