"""DANE: the certificate of an MX host is in the DNS (RFC 7672, RFC 7671, RFC 6698).

Only what the DNS has proved with DNSSEC counts; see `MailExchangers.tlsa_names`. A host with usable records is sent
mail over TLS with a matching certificate, or none. One whose records are all unusable is sent mail over TLS with any
certificate (RFC 7672 2.2).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError

DANE_TA: Final = 2
"""Usage: the certificate of an authority, which signs that of the host."""
DANE_EE: Final = 3
"""Usage: the certificate of the host itself, with any names and dates (RFC 7672 3.1.1)."""
MAX_RECORDS: Final = 32
"""TLSA records of a host that are compared."""
_MAX_CHAIN: Final = 8
"""Certificates of a server that are read, with its own."""
_MAX_ANCHORS: Final = 8
_NO_MATCH: Final = "DANE: the certificate matches no TLSA record"
_LENGTHS: Final = {1: 32, 2: 64}
"""Octets of the data by matching type: SHA-256, SHA-512."""


class Tlsa(msgspec.Struct, frozen=True):
    """A TLSA record."""

    usage: int
    selector: int
    """0: the whole certificate; 1: its public key."""
    matching: int
    """0: the octets themselves; 1: SHA-256; 2: SHA-512."""
    data: bytes

    @property
    def is_usable(self) -> bool:
        """It can be compared. PKIX-TA and PKIX-EE are unusable in SMTP (RFC 7672 3.1.3)."""
        if self.usage not in (DANE_TA, DANE_EE) or self.selector not in (0, 1) or self.matching not in (0, 1, 2):
            return False
        return bool(self.data) and len(self.data) == _LENGTHS.get(self.matching, len(self.data))

    def matches(self, octets: bytes, certificate: x509.Certificate | None) -> bool:
        """Return whether a certificate in DER matches the record; `certificate` is None if it cannot be read."""
        if self.selector == 1:
            if certificate is None:
                return False
            try:
                octets = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            except (ValueError, UnsupportedAlgorithm):
                return False
        if self.matching:
            octets = hashlib.new("sha256" if self.matching == 1 else "sha512", octets).digest()
        return hmac.compare_digest(octets, self.data)

    def __str__(self) -> str:
        return f"{self.usage} {self.selector} {self.matching} {self.data.hex()}"


class DanePolicy(msgspec.Struct, frozen=True, cache_hash=True):
    """The TLSA records of an MX host."""

    records: tuple[Tlsa, ...]
    """Those that are usable; () if all are unusable: TLS with any certificate."""
    names: tuple[str, ...]
    """The first is used for SNI; all count for a certificate that an authority has signed (RFC 7672 3.2.2)."""

    @property
    def authenticates(self) -> bool:
        """A certificate has to match."""
        return bool(self.records)

    def check(self, chain: Sequence[bytes]) -> str:
        """Return why no record matches the certificates of a host, in DER, its own first; "" if one does."""
        if not self.records:
            return ""
        if not chain:
            return "DANE: the server has sent no certificate"
        own = _load(chain[0])
        if any(each.usage == DANE_EE and each.matches(chain[0], own) for each in self.records):
            return ""
        wanted = [each for each in self.records if each.usage == DANE_TA]
        if own is None:
            return "DANE: the certificate cannot be read"
        if not wanted:
            return _NO_MATCH
        # The other certificates count for an authority only; those that cannot be read are skipped.
        others = [(octets, made) for octets in chain[1:_MAX_CHAIN] if (made := _read(octets)) is not None]
        anchors = _anchors(wanted, others)
        if not anchors:
            return _NO_MATCH
        store, intermediates = Store(anchors), _one_per_subject([made for _, made in others])
        why = ""
        for name in self.names:
            failure = _verify(own, intermediates, store, name)
            if not failure:
                return ""
            why = why or f"DANE: {failure}"
        return why


def policy_of(records: Sequence[tuple[int, int, int, bytes]], names: Sequence[str]) -> DanePolicy:
    """Return the policy of TLSA records as the resolver has them; there is at least one. `names` begins with theirs.

    The policy is part of the identity of a hop, so it depends neither on the order of the records nor on names that
    are not compared: without a record of an authority, domains with the same MX host share its connections.
    """
    usable = _strongest([each for each in (Tlsa(*record) for record in sorted(set(records))) if each.is_usable])
    usable = usable[:MAX_RECORDS]
    has_authority = any(each.usage == DANE_TA for each in usable)
    unique = tuple(dict.fromkeys(names))
    return DanePolicy(tuple(usable), unique if has_authority else unique[:1])


def _strongest(records: Sequence[Tlsa]) -> list[Tlsa]:
    """Return the records without those whose digest is weaker than another one for the same usage and selector.

    RFC 7671 9: a domain that publishes SHA-512 beside SHA-256 is protected by SHA-512. Whole certificates and keys have
    no digest, and always count.
    """
    best: dict[tuple[int, int], int] = {}
    for each in records:
        kind = each.usage, each.selector
        best[kind] = max(best.get(kind, 0), each.matching)
    return [each for each in records if each.matching in (0, best[each.usage, each.selector])]


def _load(octets: bytes) -> x509.Certificate | None:
    try:
        return x509.load_der_x509_certificate(octets)
    except (ValueError, x509.InvalidVersion):
        return None


def _read(octets: bytes) -> x509.Certificate | None:
    """Return the certificate of an authority; None if it, or its subject, cannot be read."""
    certificate = _load(octets)
    try:
        _ = certificate and certificate.subject  # it is parsed only now
    except ValueError:
        return None
    return certificate


def _anchors(wanted: Sequence[Tlsa], others: Sequence[tuple[bytes, x509.Certificate]]) -> list[x509.Certificate]:
    """Return the authorities that records name: of the chain, or whole in a record (RFC 7672 3.1.2)."""
    found = [made for octets, made in others if any(each.matches(octets, made) for each in wanted)]
    for each in wanted:
        if (each.selector, each.matching) == (0, 0):
            certificate = _read(each.data)
            if certificate is not None and certificate not in found:
                found.append(certificate)
    return found[:_MAX_ANCHORS]


def _one_per_subject(chain: Sequence[x509.Certificate]) -> list[x509.Certificate]:
    """Return the first certificate of each subject.

    The search for a path tries all certificates of a subject at each step: a server that sends many with the same
    subject, issuer and key would make it take exponential time, in which no other task runs.
    """
    return list({each.subject: each for each in reversed(chain)}.values())


def _verify(own: x509.Certificate, intermediates: Sequence[x509.Certificate], anchors: Store, name: str) -> str:
    """Return why a certificate is not one for a name that leads to an authority; "" if it is.

    Authorities for DANE are often private: what the web demands of the extensions of a certificate is not asked for.
    """
    try:
        verifier = (
            PolicyBuilder()
            .store(anchors)
            .extension_policies(
                ca_policy=ExtensionPolicy.permit_all().require_present(
                    x509.BasicConstraints, Criticality.AGNOSTIC, None
                ),
                ee_policy=ExtensionPolicy.permit_all().require_present(
                    x509.SubjectAlternativeName, Criticality.AGNOSTIC, None
                ),
            )
            .build_server_verifier(x509.DNSName(name))
        )
        verifier.verify(own, list(intermediates))
    except (VerificationError, ValueError, UnsupportedAlgorithm) as exc:
        return str(exc).partition(" (encountered")[0]
    return ""
