"""Character sets of mail: labels as the WHATWG Encoding Standard defines them, and a guess for text without one."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Final

import webencodings

_UNLABELED: Final = frozenset({"", "ascii", "us-ascii", "ansi_x3.4-1968", "iso646-us"})
"""Labels that say nothing: software writes us-ascii above text of any kind."""
_FALLBACK: Final = webencodings.lookup("windows-1252")
"""Looked up at the import: after a change of user, the codec may not be readable."""
_MAX_LABEL: Final = 64
_CODECS: Final = {
    "gbk": "gb18030",  # https://encoding.spec.whatwg.org/#gbk-decoder
    "iso-8859-8-i": "iso8859-8",
    "x-user-defined": "latin-1",
}
"""Codecs of Python, where the one of webencodings reads less than the standard asks for."""
_RETIRED: Final = {"iso-2022-kr": "iso2022_kr", "csiso2022kr": "iso2022_kr", "hz-gb-2312": "hz"}
"""Labels that the standard bans from the web for what they do to scripts. Old mail has them; no scripts run here."""
_ESCAPE: Final = re.compile(rb"\x1b(\$[@B]|\([BJI])")
_KANJI: Final = frozenset({b"$@", b"$B"})


def without_surrogates(text: str) -> str:
    """Return a text that can be encoded as UTF-8. Halves of surrogate pairs become question marks."""
    return text.encode("utf-8", "replace").decode()


def name_of(data: bytes, label: str, *, is_cut: bool = False) -> str:
    """Return the WHATWG name of the encoding in which `decode` reads this data."""
    label = label.strip().lower()[:_MAX_LABEL]
    if label in _RETIRED:
        return label
    try:
        encoding = None if label in _UNLABELED else webencodings.lookup(label)
    except LookupError:  # this Python has no such codec, or the user of --user cannot read it
        encoding = None
    if encoding is not None:
        return str(encoding.name)
    return "utf-8" if _is_valid(data, "utf-8", is_cut) else str(_FALLBACK.name)


def decode(data: bytes, label: str, *, is_cut: bool = False) -> str:
    """Return a text. Never raises: what the encoding does not define becomes U+FFFD.

    A text without a label, with us-ascii or with an unknown label is UTF-8 if it is valid UTF-8, else windows-1252.
    Data that is cut may end in the middle of a character, which is dropped.
    """
    name = name_of(data, label, is_cut=is_cut)
    if data.startswith(codecs.BOM_UTF8):
        name = "utf-8"
    if name == "iso-2022-jp":
        return "".join(_iso_2022_jp(data))
    codec = _RETIRED.get(name) or _CODECS.get(name) or webencodings.lookup(name).codec_info.name
    if codec == "euc_jp" and not _is_valid(data, codec, is_cut):
        codec = "euc_jis_2004"  # a superset: NEC's circled digits are in the standard's table, and not in Python's
    text = codecs.getincrementaldecoder(codec)("replace").decode(data, not is_cut)
    return without_surrogates(text.removeprefix("\ufeff"))


def _is_valid(data: bytes, codec: str, is_cut: bool) -> bool:
    """Return whether data can be decoded."""
    try:
        codecs.getincrementaldecoder(codec)().decode(data, not is_cut)
    except UnicodeDecodeError:
        return False
    return True


def _iso_2022_jp(data: bytes) -> Iterator[str]:
    """Decode ISO-2022-JP with the characters of Windows (NEC row 13 and others), which Python's codec does not know.

    Pairs of JIS X 0208 are moved to where Shift_JIS has them, and read as windows-31j.
    """
    mode, at = b"(B", 0
    for escape in [*_ESCAPE.finditer(data), None]:
        piece = data[at : escape.start() if escape else len(data)]
        if mode in _KANJI:
            yield _shifted(piece).decode("cp932", "replace")
        elif mode == b"(I":  # half-width katakana
            yield bytes(octet | 0x80 if 0x21 <= octet <= 0x5F else octet for octet in piece).decode("cp932", "replace")
        else:
            yield piece.decode("ascii", "replace")
        if escape is not None:
            mode, at = escape[1], escape.end()


def _shifted(piece: bytes) -> bytes:
    """Return pairs of JIS X 0208 as Shift_JIS. Line ends end a row of pairs (RFC 1468) and are kept."""
    found, at = bytearray(), 0
    while at < len(piece):
        row, cell = piece[at], piece[at + 1] if at + 1 < len(piece) else 0
        if not (0x21 <= row <= 0x7E and 0x21 <= cell <= 0x7E):
            found.append(row)
            at += 1
            continue
        lead = (row + 1) // 2 + (0x70 if row < 0x5F else 0xB0)
        found += bytes((lead, cell + (0x1F + (cell >= 0x60) if row % 2 else 0x7E)))
        at += 2
    return bytes(found)
