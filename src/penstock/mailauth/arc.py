"""ARC: what earlier hosts say they found, in a chain of sealed header fields (RFC 8617). Verified only, never sealed.

A chain that passes says who sealed it, not that the sealer told the truth: its word counts for sealers that are
trusted by name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

from penstock.mailauth.dkim import (
    BodyHashes,
    Invalid,
    Signature,
    check_body,
    decode_base64,
    key_of,
    parse_tags,
    verify_digest,
)
from penstock.mailauth.header import Field, Header, canonical_domain
from penstock.mailauth.lookup import Answer

Result = Literal["none", "pass", "fail", "temperror"]
MAX_SETS: Final = 50
"""Instances of a chain (RFC 8617 4.2.1)."""
_INSTANCE: Final = re.compile(rb"[ \t\r\n]*i[ \t\r\n]*=[ \t\r\n]*([0-9]{1,3})[ \t\r\n]*;")
_NAMES: Final = (b"arc-authentication-results", b"arc-message-signature", b"arc-seal")


class ArcResult(NamedTuple):
    """The result of a chain."""

    result: Result
    sealers: tuple[str, ...] = ()
    """The domains of the seals, from the first to the last; only of a chain that passes."""
    cause: str = ""


class _Seal:
    """An ARC-Seal field."""

    def __init__(self, header: Header, field: Field) -> None:
        """Raise Invalid."""
        tags = parse_tags(header.value(field))
        for name in ("a", "b", "cv", "d", "i", "s"):
            if not tags.get(name):
                raise Invalid("permerror", f"no tag {name}= in a seal")
        if "h" in tags or "bh" in tags:
            raise Invalid("permerror", "a seal has no h=")  # RFC 8617 4.1.3
        if tags["a"].lower() != "rsa-sha256":
            raise Invalid("permerror", "unknown algorithm")
        if "t" in tags and re.fullmatch("[0-9]+", tags["t"]) is None:
            raise Invalid("permerror", "t= is not a number")
        self.field = field
        self.chain = tags["cv"].lower()
        self.domain = canonical_domain(tags["d"])
        if not self.domain:
            raise Invalid("permerror", "d= of a seal is not a domain")
        self.question = f"{tags['s'].lower()}._domainkey.{self.domain}"
        self.signature = decode_base64(tags["b"])


class ArcVerifier:
    """The chain of one message."""

    def __init__(self, header: Header, hashes: BodyHashes) -> None:
        """`hashes` take the body; the caller feeds and finishes them."""
        self._header = header
        self._hashes = hashes
        self.questions: list[str] = []
        """Names whose TXT records are the keys, at most one for each seal and one more."""
        self._error = ""
        self._sets: list[tuple[Field, Field, Field]] = []
        self._seals: list[_Seal] = []
        self._message: Signature | None = None
        self.is_present = not header.by_name.keys().isdisjoint(_NAMES)
        if self.is_present:
            try:
                self._read()
            except Invalid as exc:
                self._error = exc.cause

    def _read(self) -> None:
        """Check the structure of the chain (RFC 8617 5.2, steps 1 to 3)."""
        self._sets = _collect(self._header)
        self._seals = [_Seal(self._header, fields[2]) for fields in self._sets]
        for number, seal in enumerate(self._seals):
            if seal.chain != ("pass" if number else "none"):
                raise Invalid("fail", f"the seal {number + 1} says cv={seal.chain}")
        for _, field, _ in self._sets:
            message = Signature(self._header, field, is_arc=True)
            message.read()
            if message.algorithm != "rsa-sha256":
                raise Invalid("fail", "unknown algorithm")
            if b"arc-seal" in message.names:
                raise Invalid("fail", "a message signature that signs seals")  # RFC 8617 4.1.2
            self._message = message  # the last one counts
        assert self._message is not None
        self._hashes.want(relaxed=self._message.is_relaxed_body, length=self._message.length)
        self.questions = list(dict.fromkeys([self._message.question, *(seal.question for seal in self._seals)]))

    def finish(self, answers: Mapping[str, Answer]) -> ArcResult:
        """Return the result; `answers` are those to `questions`. The body hashes are finished."""
        if not self.is_present:
            return ArcResult("none")
        if self._error or self._message is None:
            return ArcResult("fail", cause=self._error)
        try:
            check_body(self._message, self._hashes)
            self._message.verify(self._header, key_of(answers.get(self._message.question)))
            for number in range(len(self._seals), 0, -1):
                seal = self._seals[number - 1]
                verify_digest(key_of(answers.get(seal.question)), seal.signature, self._digest(number))
        except Invalid as exc:
            return ArcResult("temperror" if exc.result == "temperror" else "fail", cause=exc.cause)
        return ArcResult("pass", tuple(seal.domain for seal in self._seals))

    def _digest(self, number: int) -> bytes:
        """Return the hash that a seal signs: the sets up to its own, relaxed (RFC 8617 5.1.1)."""
        signed = hashlib.sha256()
        for at, fields in enumerate(self._sets[:number], 1):
            for field in fields[:2] if at == number else fields:
                signed.update(self._header.relaxed(field))
        signed.update(self._header.own(self._sets[number - 1][2], True))
        return signed.digest()


def _collect(header: Header) -> list[tuple[Field, Field, Field]]:
    """Return the sets in order: authentication results, message signature, seal. Raise Invalid."""
    found: dict[int, dict[bytes, Field]] = {}
    for name in _NAMES:
        fields = header.by_name.get(name, [])
        if len(fields) > MAX_SETS:
            raise Invalid("fail", f"more than {MAX_SETS} instances")
        for field in fields:
            instance = _instance(header, field)
            if found.setdefault(instance, {}).setdefault(name, field) is not field:
                raise Invalid("fail", f"two fields of the instance {instance}")
    if sorted(found) != list(range(1, len(found) + 1)) or any(len(each) != 3 for each in found.values()):
        raise Invalid("fail", "the chain has gaps")
    sets = [found[instance] for instance in sorted(found)]
    return [(each[_NAMES[0]], each[_NAMES[1]], each[_NAMES[2]]) for each in sets]


def _instance(header: Header, field: Field) -> int:
    value = header.value(field)
    if field.name == _NAMES[0]:
        match = _INSTANCE.match(value)
        text = match[1].decode() if match is not None else ""
    else:
        text = parse_tags(value).get("i", "")
    if re.fullmatch("[0-9]{1,3}", text) is None or not 1 <= int(text) <= MAX_SETS:
        raise Invalid("fail", "a field has no instance")
    return int(text)
