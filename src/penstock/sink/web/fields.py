"""Header fields of mail, read leniently: values, encoded words, parameters, addresses.

Everything here takes time proportional to the octets it is given, never raises for malformed input, and has bounds:
header fields come from strangers. The email package of the standard library is not used, because its structured
parsers need quadratic time, and raise much that is not documented.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from penstock.sink.web.charset import decode, without_surrogates

MAX_HEADER: Final = 1 << 20
"""Octets of a header that are read."""
MAX_FIELDS: Final = 10_000
MAX_VALUE: Final = 65_536
"""Octets of a field that are read."""
_MAX_PARAMETERS: Final = 200
_MAX_ADDRESSES: Final = 1000

_FIELD: Final = re.compile(rb"([!-9;-~]++)[ \t]*+:([^\n]*+(?:\n[ \t][^\n]*+)*+)(?:\n|\Z)")
_SEPARATOR: Final = re.compile(rb">?From [^\n]*\n")
"""The line that an mbox file has above each message."""
_FOLD: Final = re.compile(rb"\r?\n(?=[ \t])")
_WORD: Final = re.compile(r"=\?([^\s?*=]+)(?:\*[^\s?]*)?\?([bBqQ])\?([^?]*)\?=")
"""An encoded word (RFC 2047 2; its language by RFC 2231 5). Blanks within it are wrong, and frequent."""
_NOT_BASE64: Final = re.compile(r"[^A-Za-z0-9+/]")
_PARAMETER: Final = re.compile(r';\s*+([^\s=;"]++)\s*+=\s*+("(?:[^"\\]|\\.)*+"?|[^;]*+)', re.DOTALL)
_ESCAPED: Final = re.compile(r'\\(["\\])')
_SECTION: Final = re.compile(r"([^*]+)(?:\*([0-9]{1,3}))?(\*)?\Z")
"""The name of a parameter: in sections, encoded, or both (RFC 2231 3, 4)."""
_TOKEN: Final = re.compile(
    r'"((?:[^"\\]|\\.)*+)"?'
    r"|<([^<>]*+)>?"
    r"|\(((?:[^()\\]|\\.)*+)\)?"
    r"|([,;:])"
    r'|((?:=\?[^\s?]++\?[bBqQ]\?[^?]*+\?=|[^"<(,;:])++)',
    re.DOTALL,
)
"""Quoted string, angle address, comment, separator, other text; encoded words are kept in one piece."""
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Field(NamedTuple):
    """A header field."""

    name: str
    value: str
    """Unfolded, not decoded."""

    @property
    def text(self) -> str:
        """The value with its encoded words decoded."""
        return decode_words(self.value)


class Address(NamedTuple):
    """An address of a header field."""

    name: str
    """The display name, decoded; may be empty."""
    address: str

    @property
    def text(self) -> str:
        """Name and address, for people."""
        return f"{self.name} <{self.address}>" if self.name and self.address else self.name or self.address


def read_header(data: bytes, start: int, end: int) -> tuple[list[Field], int]:
    """Return the fields of an entity, and where its body begins.

    The header ends at an empty line, or at a line that is no field: that line belongs to the body.
    """
    limit = min(end, start + MAX_HEADER)
    separator = _SEPARATOR.match(data, start, limit)
    at = separator.end() if separator else start
    fields: list[Field] = []
    while len(fields) < MAX_FIELDS and (found := _FIELD.match(data, at, limit)):
        value = _FOLD.sub(b"", found[2][:MAX_VALUE]).strip()
        fields.append(Field(found[1].decode("ascii"), decode(value, "")))
        at = found.end()
    for empty in (b"\r\n", b"\n"):
        if data.startswith(empty, at, end):
            return fields, at + len(empty)
    return fields, at


def value_of(fields: Sequence[Field], name: str) -> str:
    """Return the value of the first field of a name, not decoded; "" without one."""
    return next((field.value for field in fields if field.name.lower() == name), "")


def decode_words(text: str) -> str:
    """Return a text with its encoded words decoded.

    White space between two of them is dropped (RFC 2047 6.2). Neighbours of one charset are decoded together: some
    software splits characters between them.
    """
    if "=?" not in text:
        return text
    return without_surrogates("".join(_decoded(text)))


def _decoded(text: str) -> Iterator[str]:
    waiting, charset, at = b"", "", 0
    for word in _WORD.finditer(text):
        between = text[at : word.start()]
        if between.strip() or at == 0 or charset != word[1].lower():
            yield decode(waiting, charset)
            waiting = b""
            if between.strip() or at == 0:
                yield between
        charset = word[1].lower()
        waiting += _base64(word[3]) if word[2] in "bB" else _quoted(word[3])
        at = word.end()
    yield decode(waiting, charset)
    yield text[at:]


def _base64(text: str) -> bytes:
    """Decode what is there, whatever its padding is."""
    text = _NOT_BASE64.sub("", text)
    text = text[:-1] if len(text) % 4 == 1 else text
    return binascii.a2b_base64(text + "=" * (-len(text) % 4))


def _quoted(text: str) -> bytes:
    return binascii.a2b_qp(text.encode("utf-8", "replace"), header=True)


def read_parameters(value: str) -> tuple[str, Mapping[str, str]]:
    """Return the value before the first ";", in lower case, and the parameters by their names.

    Reads RFC 2231 (charsets, sections), RFC 2047 in a parameter, which is wrong and frequent, and unquoted values with
    blanks. The first of two parameters of the same name counts; an encoded one counts before one that is not.
    """
    value = value[:MAX_VALUE]
    plain: dict[str, str] = {}
    sections: dict[str, dict[int, tuple[str, bool]]] = {}
    for _, found in zip(range(_MAX_PARAMETERS), _PARAMETER.finditer(value), strict=False):
        name, text = found[1].lower(), _unquoted(found[2])
        parts = _SECTION.match(name)
        if parts is None or (parts[2] is None and parts[3] is None):
            plain.setdefault(name, decode_words(text))
        else:
            sections.setdefault(parts[1], {}).setdefault(int(parts[2] or 0), (text, parts[3] is not None))
    plain.update({name: _joined(found) for name, found in sections.items()})
    return value.partition(";")[0].strip().lower(), plain


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text.strip()
    # Only what has to be escaped is: a path of Windows has single backslashes.
    return _ESCAPED.sub(r"\1", text[1:-1] if len(text) > 1 and text.endswith('"') else text[1:])


def _joined(sections: Mapping[int, tuple[str, bool]]) -> str:
    """Return the value of a parameter in sections (RFC 2231 3, 4.1): charset'language'octets, in its first section."""
    first, is_encoded = sections.get(0, ("", False))
    label = ""
    if is_encoded and first.count("'") >= 2:
        label, _, first = first.split("'", 2)
    data = b""
    for number in range(len(sections)):
        if number not in sections:
            break
        text, is_encoded = sections[number]
        text = first if number == 0 else text
        data += unquote_to_bytes(text) if is_encoded else text.encode("utf-8", "replace")
    return decode(data, label)


def file_name(text: str) -> str:
    """Return a file name that can be shown: at most 255 characters, control characters replaced."""
    return _CONTROLS.sub("_", without_surrogates(text))[:255].strip()


def read_addresses(value: str) -> list[Address]:
    """Return the addresses of a field such as To (RFC 5322 3.4); names of groups are dropped."""
    found: list[Address] = []
    words: list[str] = []
    comment = ""
    address: str | None = None

    def finish() -> None:
        nonlocal comment, address
        name = decode_words(" ".join(" ".join(words).split()))
        if address is None and "@" in name:
            name, address = comment, name.replace(" ", "")
        if name or address:
            found.append(Address(_CONTROLS.sub(" ", name or comment), _CONTROLS.sub("", decode_words(address or ""))))
        words.clear()
        comment, address = "", None

    for token in _TOKEN.finditer(value[:MAX_VALUE]):
        quoted, within, said, mark, text = token.groups()
        if mark == ":" and not any("@" in word for word in words):
            words.clear()
        elif mark in (",", ";"):
            finish()
            if len(found) >= _MAX_ADDRESSES:
                return found
        elif within is not None:
            address = within.strip()
        elif said is not None:
            comment = decode_words(said.strip())
        elif mark is None:
            words.append(_ESCAPED.sub(r"\1", quoted) if quoted is not None else text)
    finish()
    return found
