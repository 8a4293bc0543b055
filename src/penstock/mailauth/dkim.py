# cython: wraparound=True
"""DKIM: signatures checked and made (RFC 6376, 8301, 8463).

A verifier is made when the header is complete. It names the keys to ask for, so that they are fetched while the body
still comes in; it hashes the body as it arrives, once for each canonical form in use; `finish` gives the results.

Results: "fail" for a changed body or header or an expired signature; "temperror" for a key that cannot be had now;
"permerror" for a missing, revoked or malformed key or signature; "policy" for what is valid and not good enough: SHA-1,
keys outside 1024 to 4096 bits, a body signed in part, From not signed.

This file is compiled as it stands (dkim.pxd has the C types): all of it runs for each message.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Final, Literal, NamedTuple

import cython  # type: ignore[import-untyped]  # it has no types, and is not needed at run time
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from penstock.mailauth._header import BodyCanonicalizer, relaxed_field
from penstock.mailauth.header import Field, Header
from penstock.mailauth.lookup import Answer

if not cython.compiled:  # compiled, these are the C functions of _header.pxd and header.pxd
    from penstock.mailauth._header import decode_base64 as read_base64
    from penstock.mailauth._header import split_tags, squeeze
    from penstock.mailauth.header import canonical_domain

Result = Literal["pass", "fail", "policy", "temperror", "permerror"]
MAX_SIGNATURES: Final = 8
MAX_KEYS: Final = 5
MIN_RSA: Final = 1024
MAX_RSA: Final = 4096
MAX_KEY_RECORD: Final = 4096
_MAX_SIGNATURE: Final = 16_384
"""Octets of a signature field."""

_PADDING: Final = padding.PKCS1v15()
_SHA256: Final = Prehashed(hashes.SHA256())
_REQUIRED: Final = ("a", "b", "bh", "d", "s")
_MAX_DIGITS: Final = 12
_ALGORITHMS: Final = {"rsa-sha256": "rsa", "ed25519-sha256": "ed25519", "rsa-sha1": "rsa"}

PublicKey = rsa.RSAPublicKey | ed25519.Ed25519PublicKey
PrivateKey = rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


class DkimResult(NamedTuple):
    """What became of one signature."""

    result: Result
    domain: str
    """d=, in lower case; "" when the signature is too broken to have one."""
    selector: str
    cause: str = ""
    is_testing: bool = False
    """The key says t=y (RFC 6376 3.6.1)."""


class Invalid(Exception):  # noqa: N818 - it carries a result
    """A signature that is not valid, and the result that follows."""

    def __init__(self, result: Result, cause: str) -> None:
        super().__init__(cause)
        self.result = result
        self.cause = cause


class Key(NamedTuple):
    """A usable key record."""

    public: PublicKey
    flags: frozenset[str]
    is_rsa: bool
    size: int
    """Bits of an RSA key."""


def parse_tags(value: bytes) -> dict[str, str]:
    """Read a tag list (RFC 6376 3.2). Raise Invalid."""
    tags = split_tags(value)
    if tags is None:
        raise Invalid("permerror", "malformed tags")
    return tags


def decode_base64(text: str) -> bytes:
    """Decode base64 with blanks in it. Raise Invalid."""
    octets = read_base64(text)
    if octets is None:
        raise Invalid("permerror", "malformed base64")
    return octets


# ---- signatures


class Signature:
    """A parsed signature field: of DKIM, or of ARC, which has no v= and uses i= for itself."""

    def __init__(self, header: Header, field: Field, *, is_arc: bool = False) -> None:
        """Read the tags; `read` must follow. Raise Invalid."""
        self.field = field
        self._is_arc = is_arc
        value = header.value(field)
        if len(value) > _MAX_SIGNATURE:
            raise Invalid("permerror", "the signature is too long")
        tags = self.tags = parse_tags(value)
        self.domain = canonical_domain(squeeze(tags.get("d", "")))  # RFC 8616 5: it may have U-labels
        self.selector = squeeze(tags.get("s", "")).lower()
        self.question = f"{self.selector}._domainkey.{self.domain}"
        """The name whose TXT record is the key."""

    def read(self) -> None:
        """Read the values of the tags. Raise Invalid."""
        tags, is_arc = self.tags, self._is_arc
        for name in _REQUIRED:
            if not tags.get(name):
                raise Invalid("permerror", f"no tag {name}=")
        if not self.domain:
            raise Invalid("permerror", "d= is not a domain")
        if "h" not in tags or not (tags["h"] or is_arc):
            raise Invalid("permerror", "no tag h=")
        if not is_arc and tags.get("v") != "1":
            raise Invalid("permerror", "unknown version")
        self.algorithm = squeeze(tags["a"]).lower()
        if self.algorithm not in _ALGORITHMS:
            raise Invalid("permerror", "unknown algorithm")
        self.signature, self.body_hash = decode_base64(tags["b"]), decode_base64(tags["bh"])
        self.is_relaxed_header, self.is_relaxed_body = _canonicalization(
            tags.get("c", "relaxed/relaxed" if is_arc else "simple/simple")
        )
        self.names = squeeze(tags["h"]).lower().encode("utf-8", "surrogateescape").split(b":")
        self.length = _number(tags, "l")
        self.expires = _number(tags, "x")
        created = _number(tags, "t")
        if self.expires is not None and created is not None and self.expires < created:
            raise Invalid("permerror", "it expires before it was made")
        if "q" in tags and "dns/txt" not in _words(tags["q"]):
            raise Invalid("permerror", "unknown query method")
        self.identity_domain = self.domain
        if not is_arc and "i" in tags:
            self.identity_domain = canonical_domain(squeeze(tags["i"]).rpartition("@")[2])
            if self.identity_domain != self.domain and not self.identity_domain.endswith("." + self.domain):
                raise Invalid("permerror", "i= is not below d=")

    def check_policy(self, now: int) -> None:
        """Raise Invalid for what no key can make good."""
        if self.expires is not None and self.expires < now:
            raise Invalid("fail", "the signature has expired")
        if self.algorithm == "rsa-sha1":
            raise Invalid("policy", "SHA-1 is not accepted")  # RFC 8301 3.1
        if b"from" not in self.names:
            raise Invalid("policy", "From is not signed")  # RFC 6376 6.1.1

    def header_digest(self, header: Header) -> bytes:
        """Return the SHA-256 of what is signed (RFC 6376 3.7, 5.4.2)."""
        return hashlib.sha256(header.signed(self.names, self.field, self.is_relaxed_header)).digest()

    def verify(self, header: Header, key: Key) -> None:
        """Check the signature itself. Raise Invalid."""
        if key.is_rsa != (_ALGORITHMS[self.algorithm] == "rsa"):
            raise Invalid("permerror", "the key is for another algorithm")
        if "s" in key.flags and self.identity_domain != self.domain:
            raise Invalid("permerror", "the key does not allow subdomains in i=")
        verify_digest(key, self.signature, self.header_digest(header))


def verify_digest(key: Key, signature: bytes, digest: bytes) -> None:
    """Check a signature of a SHA-256. Raise Invalid."""
    try:
        if key.is_rsa:
            if not MIN_RSA <= key.size <= MAX_RSA:
                raise Invalid("policy", f"an RSA key of {key.size} bits")
            key.public.verify(signature, digest, _PADDING, _SHA256)  # type: ignore[call-arg]
        else:
            key.public.verify(signature, digest)  # type: ignore[call-arg]
    except InvalidSignature:
        raise Invalid("fail", "the signature does not match") from None


@functools.lru_cache(maxsize=64)
def _canonicalization(text: str) -> tuple[bool, bool]:
    header, _, body = squeeze(text).lower().partition("/")
    if header not in ("simple", "relaxed") or body not in ("", "simple", "relaxed"):
        raise Invalid("permerror", "unknown canonicalization")
    return header == "relaxed", body == "relaxed"


def _number(tags: dict[str, str], name: str) -> int | None:
    text = tags.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise Invalid("permerror", f"{name}= is not a number")
    return int(text)


# ---- keys


def key_of(answer: Answer | None) -> Key:
    """Return the key in an answer of the DNS. Raise Invalid."""
    if answer is None or answer.status == "failed":
        raise Invalid("temperror", "the key is temporarily unavailable")
    if not answer.records:
        raise Invalid("permerror", "no key")
    error: Invalid | None = None
    for record in answer.records[:MAX_KEYS]:
        key = _parse_key(record)
        if isinstance(key, Key):
            return key
        error = error or key
    assert error is not None
    raise Invalid(error.result, error.cause)  # a new one: the other is kept, and must not gather tracebacks


@functools.lru_cache(maxsize=20_000)
def _parse_key(record: bytes) -> Key | Invalid:
    """Parse a key record (RFC 6376 3.6.1); what is wrong with it is remembered as well."""
    try:
        return _read_key(record)
    except Invalid as exc:
        return Invalid(exc.result, exc.cause)


def _read_key(record: bytes) -> Key:
    if len(record) > MAX_KEY_RECORD:
        raise Invalid("permerror", "the key record is too long")
    tags = parse_tags(record)
    if "v" in tags and (tags["v"] != "DKIM1" or next(iter(tags)) != "v"):
        raise Invalid("permerror", "not a key of DKIM")
    if "p" not in tags:
        raise Invalid("permerror", "no key in the record")
    if not tags["p"]:
        raise Invalid("permerror", "the key is revoked")
    if "sha256" not in _words(tags.get("h", "sha256")):
        raise Invalid("permerror", "the key does not allow SHA-256")
    if _words(tags.get("s", "*")).isdisjoint({"*", "email"}):
        raise Invalid("permerror", "the key is not for mail")
    octets = decode_base64(tags["p"])
    kind = tags.get("k", "rsa").lower()
    try:
        if kind == "ed25519":
            return Key(ed25519.Ed25519PublicKey.from_public_bytes(octets), _words(tags.get("t", "")), False, 256)
        key = serialization.load_der_public_key(octets) if kind == "rsa" else None
    except (ValueError, UnsupportedAlgorithm):
        raise Invalid("permerror", "malformed key") from None
    if not isinstance(key, rsa.RSAPublicKey):
        raise Invalid("permerror", "unknown type of key")
    return Key(key, _words(tags.get("t", "")), True, key.key_size)


def _words(text: str) -> frozenset[str]:
    return frozenset(word.strip(" \t\r\n").lower() for word in text.split(":"))


# ---- the body


class BodyHashes:
    """The hashes of a body as it arrives: one for each canonical form and length that is asked for."""

    def __init__(self) -> None:
        self._hashes: dict[tuple[bool, int | None], _BodyHash] = {}
        self._is_finished = False

    def want(self, *, relaxed: bool, length: int | None = None) -> None:
        """Have a hash made; before the first octet of the body."""
        key = (relaxed, length)
        if key not in self._hashes:
            self._hashes[key] = _BodyHash(length, relaxed=relaxed)

    def feed(self, chunk: bytes | memoryview) -> None:
        """Take the next piece of the body, with CRLF, without dot-stuffing."""
        for each in self._hashes.values():
            each.canonicalizer.feed(chunk)

    def finish(self) -> None:
        """Take the end of the body, once."""
        if not self._is_finished:
            self._is_finished = True
            for each in self._hashes.values():
                each.finish()

    def digest(self, *, relaxed: bool, length: int | None = None) -> tuple[bytes, int]:
        """Return a hash, and the octets of the whole canonical body."""
        found = self.hash_of(relaxed, length)
        return found.digest, found.total

    def hash_of(self, relaxed: bool, length: int | None) -> _BodyHash:
        """Return a hash that is wanted."""
        return self._hashes[relaxed, length]


class _BodyHash:
    """A SHA-256 of a canonical body, or of its first `length` octets."""

    def __init__(self, length: int | None, *, relaxed: bool) -> None:
        self._sha = hashlib.sha256()
        self._left = length or 0
        self.total = 0
        self.digest = b""
        sink: Callable[[memoryview], object] = self._sha.update if length is None else self._limited
        self.canonicalizer = BodyCanonicalizer(sink, relaxed)

    def _limited(self, piece: memoryview) -> None:
        self.total += len(piece)
        if self._left:
            part = piece[: self._left]
            self._sha.update(part)
            self._left -= len(part)

    def finish(self) -> None:
        self.canonicalizer.finish()
        self.digest = self._sha.digest()


def check_body(signature: Signature, hashes: BodyHashes) -> None:
    """Compare the hash of the body. Raise Invalid."""
    found = hashes.hash_of(signature.is_relaxed_body, signature.length)
    if found.digest != signature.body_hash or (signature.length is not None and signature.length > found.total):
        raise Invalid("fail", "the body was changed")


# ---- verifying


class DkimVerifier:
    """The signatures of one message."""

    def __init__(self, header: Header, *, now: int, author: str = "", hashes: BodyHashes | None = None) -> None:
        """`author` is the domain of From: signatures of it, and of domains above and below, are evaluated first.

        `now` is in seconds since 1970. `hashes` take the body, and may be shared with other checks.
        """
        self._header = header
        self.hashes = hashes or BodyHashes()
        self._signatures: list[Signature | DkimResult] = []
        self.questions: list[str] = []
        """Names whose TXT records are the keys, MAX_KEYS at most."""
        fields = header.by_name.get(b"dkim-signature")
        if fields is None:
            return
        parsed = [_parse_signature(header, field, now) for field in fields[: 4 * MAX_SIGNATURES]]
        if len(parsed) > 1:
            parsed.sort(key=lambda each: not _is_related(each.domain, author))
        for each in parsed[:MAX_SIGNATURES]:
            if isinstance(each, Signature):
                if each.question not in self.questions:
                    if len(self.questions) == MAX_KEYS:
                        too_many = DkimResult("policy", each.domain, each.selector, "too many keys")
                        self._signatures.append(too_many)
                        continue
                    self.questions.append(each.question)
                self.hashes.want(relaxed=each.is_relaxed_body, length=each.length)
            self._signatures.append(each)

    def finish(self, answers: Mapping[str, Answer]) -> list[DkimResult]:
        """Return the result of each signature; `answers` are those to `questions`. The body hashes are finished."""
        return [
            each if isinstance(each, DkimResult) else self._verify(each, answers.get(each.question))
            for each in self._signatures
        ]

    def _verify(self, signature: Signature, answer: Answer | None) -> DkimResult:
        domain, selector = signature.domain, signature.selector
        try:
            check_body(signature, self.hashes)
            key = key_of(answer)
            signature.verify(self._header, key)
        except Invalid as exc:
            return DkimResult(exc.result, domain, selector, exc.cause)
        if signature.length is not None:
            total = self.hashes.hash_of(signature.is_relaxed_body, signature.length).total
            if signature.length < total:
                return DkimResult("policy", domain, selector, f"{total - signature.length} octets are not signed")
        return DkimResult("pass", domain, selector, is_testing="y" in key.flags)


def _parse_signature(header: Header, field: Field, now: int) -> Signature | DkimResult:
    try:
        signature = Signature(header, field)
    except Invalid as exc:
        return DkimResult(exc.result, "", "", exc.cause)
    try:
        signature.read()
        signature.check_policy(now)
    except Invalid as exc:
        return DkimResult(exc.result, signature.domain, signature.selector, exc.cause)
    return signature


def _is_related(domain: str, author: str) -> bool:
    return bool(author) and (domain == author or domain.endswith("." + author) or author.endswith("." + domain))


# ---- signing

SIGNED: Final = (
    b"from", b"sender", b"reply-to", b"subject", b"date", b"message-id", b"to", b"cc", b"mime-version", b"content-type",
    b"content-transfer-encoding", b"in-reply-to", b"references", b"list-id", b"list-unsubscribe",
    b"list-unsubscribe-post",
)  # fmt: skip
"""Fields that are signed (RFC 6376 5.4.1)."""
_OVERSIGNED: Final = (b"from", b"subject", b"date", b"to")
"""Fields that must not be added later either: named once more than they occur (RFC 6376 8.15)."""


class DkimSigner:
    """Signs messages of a domain, relaxed/relaxed, with RSA or Ed25519."""

    def __init__(self, domain: str, selector: str, key: PrivateKey) -> None:
        """Raise ValueError for an RSA key below 1024 bits."""
        if isinstance(key, rsa.RSAPrivateKey) and key.key_size < MIN_RSA:
            raise ValueError(f"an RSA key for DKIM has at least {MIN_RSA} bits")  # RFC 8301 3.2
        self._domain = domain
        self._selector = selector
        self._key = key

    @staticmethod
    def start() -> BodyHashes:
        """Return what the body is fed to."""
        hashes = BodyHashes()
        hashes.want(relaxed=True)
        return hashes

    def finish(self, header: Header, hashes: BodyHashes, *, now: int) -> bytes:
        """Return the field, with CRLF, that goes above the header; `hashes` are finished."""
        names: list[bytes] = []
        for name in SIGNED:
            names += [name] * (len(header.by_name.get(name, ())) + (name in _OVERSIGNED))
        algorithm = "rsa-sha256" if isinstance(self._key, rsa.RSAPrivateKey) else "ed25519-sha256"
        digest, _ = hashes.digest(relaxed=True)
        listed = b":\r\n\t ".join(b":".join(names[at : at + 4]) for at in range(0, len(names), 4)).decode()
        field = (
            f"DKIM-Signature: v=1; a={algorithm}; c=relaxed/relaxed;\r\n\td={self._domain}; s={self._selector};"
            f" t={now};\r\n\th={listed};\r\n\tbh={base64.b64encode(digest).decode()};\r\n\tb="
        ).encode()
        signed = hashlib.sha256()
        for each in header.select(names):
            signed.update(header.relaxed(each))
        signed.update(relaxed_field(b"dkim-signature", field.partition(b":")[2])[:-2])
        if isinstance(self._key, rsa.RSAPrivateKey):
            signature = self._key.sign(signed.digest(), _PADDING, _SHA256)
        else:
            signature = self._key.sign(signed.digest())
        text = base64.b64encode(signature)
        return field + b"\r\n\t ".join(text[at : at + 72] for at in range(0, len(text), 72)) + b"\r\n"


def load_private_key(pem: bytes) -> PrivateKey:
    """Read a private key from PEM. Raise ValueError for what is none, or neither RSA nor Ed25519."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (TypeError, UnsupportedAlgorithm) as exc:
        raise ValueError(f"not a usable private key: {exc}") from exc
    if not isinstance(key, rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey):
        raise ValueError("a DKIM key is RSA or Ed25519")  # noqa: TRY004 - it is the file that is wrong
    return key
