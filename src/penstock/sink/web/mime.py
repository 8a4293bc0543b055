"""The MIME structure of a message: a flat list of parts, each a range of octets that is decoded when it is asked for.

Rules
-----
1. Nothing is cut in silence: each part can be decoded whole, a container as the octets it consists of. What is beyond
   a bound stays in its container, and the structure says so (`is_partial`).
2. The cost is proportional to the octets. A multipart is searched for its delimiter lines once; the octets searched in
   all levels together are bounded (MAX_SCANNED), whatever the nesting. Lines that only look like delimiters count too.
3. The functions run in a thread that shares the interpreter with the SMTP sessions. They call `Work.pause` for each
   part and each piece of at most 256 KiB, which gives the interpreter to other threads and ends work whose client has
   left.
4. Malformed mail gives a simpler structure, never an exception: a multipart without delimiters is a text, a message
   nested too deep is a file.

The parser of the standard library checks each line against the boundaries of all levels, which takes 20 s for 1 MB.
"""

from __future__ import annotations

import binascii
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from penstock.sink.web.fields import Field, file_name, read_header, read_parameters, value_of

MAX_PARTS: Final = 1000
MAX_DEPTH: Final = 100
MAX_SCANNED: Final = 512 << 20
"""Octets searched for delimiters."""
_CANDIDATE: Final = 1024
"""Octets that a line which may be a delimiter counts as."""
_PIECE: Final = 1 << 18
_MAX_BOUNDARY: Final = 1000
_MESSAGES: Final = frozenset({"message/rfc822", "message/global", "message/news"})
_TYPE: Final = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+/[!#$%&'*+.^_`|~0-9a-z-]+")
_MISNAMED: Final = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-png": "image/png"}
"""Names that mailers give to types which have another one."""
_TURN: Final = 0.0005
"""Seconds for which a piece of work keeps the interpreter from other threads: giving it up takes a tenth of that."""
_LINE: Final = 1024
"""Octets of a first line that are looked at."""
_WORDS: Final = re.compile(rb"\s*+[^\r\n]*?[^\s][ \t]++[^\s]")
"""A first line with a blank between words: that is not base64."""
_NOT_BASE64: Final = bytes(
    octet for octet in range(256) if octet not in b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
)


class Abandoned(Exception):  # noqa: N818 - an end, not an error
    """The client that waited for the result has left."""


class Work:
    """A piece of work in a thread, which can be given up from another one."""

    def __init__(self) -> None:
        self.is_abandoned = False
        self._turn_began = time.perf_counter()

    def abandon(self) -> None:
        """Let the next `pause` raise."""
        self.is_abandoned = True

    def pause(self) -> None:
        """Give the interpreter to a thread that waits for it, once in a while. Raise Abandoned."""
        if self.is_abandoned:
            raise Abandoned
        if time.perf_counter() - self._turn_began >= _TURN:
            time.sleep(0)
            self._turn_began = time.perf_counter()


@dataclass(slots=True)
class Part:
    """A part of a message: the message itself, a part of a multipart, or an embedded message."""

    number: int
    depth: int
    """How many containers it is in."""
    within: int
    """The number of the message it belongs to: 0 or the part of an embedded message."""
    fields: list[Field]
    data: bytes = field(repr=False)
    start: int
    """Where its header begins in `data`."""
    body: int
    end: int
    type: str
    parameters: Mapping[str, str]
    disposition: str
    filename: str
    content_id: str
    """Without angle brackets."""
    encoding: str
    """Content-Transfer-Encoding, in lower case."""
    has_parts: bool = False

    @property
    def charset(self) -> str:
        """The label of the charset; may be empty."""
        return self.parameters.get("charset", "")

    @property
    def boundary(self) -> bytes:
        """What delimits the parts of a multipart (RFC 2046 5.1.1); may be empty."""
        return self.parameters.get("boundary", "").rstrip()[:_MAX_BOUNDARY].encode()

    @property
    def source(self) -> bytes:
        """The part with its header, as it was received."""
        return self.data[self.start : self.end]

    def pieces(self, work: Work) -> Iterator[bytes]:
        """Return the content, decoded, in pieces. Of a container these are the octets it consists of."""
        pieces = _cut(self.data, self.body, self.end, work)
        decoder = self._decoder
        return pieces if decoder is None else decoder(pieces)

    @property
    def _decoder(self) -> Callable[[Iterator[bytes]], Iterator[bytes]] | None:
        # A multipart has no encoding of its own (RFC 2045 6.4), whatever its header says.
        if self.type.startswith("multipart/") and self.has_parts:
            return None
        # Some programs say base64 of a text that they did not encode.
        is_text = self.encoding == "base64" and self.type.startswith("text/")
        if is_text and _WORDS.match(self.data, self.body, min(self.end, self.body + _LINE)):
            return None
        return _DECODERS.get(self.encoding)

    def content(self, work: Work, most: int | None = None) -> bytes:
        """Return the content, or its first octets."""
        found: list[bytes] = []
        for piece in self.pieces(work):
            found.append(piece)
            if most is not None:
                most -= len(piece)
                if most <= 0:
                    found[-1] = piece[: len(piece) + most]
                    break
        return b"".join(found)

    def size(self, work: Work) -> int:
        """Return the octets of the content, decoded."""
        if self._decoder is None:
            return self.end - self.body
        if self._decoder is _from_base64:
            return _base64_size(_cut(self.data, self.body, self.end, work))
        return sum(map(len, self.pieces(work)))


@dataclass(slots=True)
class Structure:
    """The parts of a message in their order: containers stand before what they contain."""

    parts: list[Part]
    is_partial: bool
    """There is more structure than the bounds allow."""


def read(data: bytes, work: Work) -> Structure:
    """Return the structure of a message."""
    reader = _Reader(work)
    reader.read(data, 0, len(data))
    return Structure(reader.parts, reader.is_partial)


class _Reader:
    def __init__(self, work: Work) -> None:
        self.parts: list[Part] = []
        self.is_partial = False
        self._work = work
        self._scanned = 0

    def read(
        self, data: bytes, start: int, end: int, *, depth: int = 0, within: int = 0, default: str = "text/plain"
    ) -> None:
        """Note a part and all within it."""
        if len(self.parts) >= MAX_PARTS:
            self.is_partial = True
            return
        self._work.pause()
        part = _part(data, start, end, len(self.parts), depth, within, default)
        self.parts.append(part)
        is_container = part.type in _MESSAGES or (part.type.startswith("multipart/") and part.boundary != b"")
        if is_container and depth >= MAX_DEPTH:
            self.is_partial = True
        elif part.type in _MESSAGES:
            self._read_message(part)
        elif is_container:
            default = "message/rfc822" if part.type == "multipart/digest" else "text/plain"  # RFC 2046 5.1.5
            for begin, stop in self._split(part):
                part.has_parts = True
                self.read(data, begin, stop, depth=depth + 1, within=within, default=default)

    def _read_message(self, part: Part) -> None:
        """Read an embedded message. RFC 2046 5.2.1 allows it no encoding but 7bit, 8bit and binary; some have one."""
        part.has_parts = True
        within = len(self.parts)
        if part.encoding in ("base64", "quoted-printable"):
            embedded = part.content(self._work)
            self.read(embedded, 0, len(embedded), depth=part.depth + 1, within=within)
        else:
            self.read(part.data, part.body, part.end, depth=part.depth + 1, within=within)

    def _split(self, part: Part) -> Iterator[tuple[int, int]]:
        """Yield where the parts of a multipart begin and end (RFC 2046 5.1.1); the last one may lack its end."""
        begin = -1
        for line, stop, is_last in self._delimiters(part, b"--" + part.boundary):
            if begin >= 0:
                yield begin, max(begin, line)
            begin = -1 if is_last else stop
            if is_last:
                return
        if begin >= 0:
            yield begin, part.end

    def _delimiters(self, part: Part, delimiter: bytes) -> Iterator[tuple[int, int, bool]]:
        """Yield each delimiter line: where the line end before it begins, where the next line begins, if it closes."""
        data, at, end = part.data, part.body, part.end
        rest = re.compile(rb"(--)?[ \t]*+(?:\r?\n|\Z)")
        while at < end and self._scanned < MAX_SCANNED:
            stop = min(end, at + _PIECE)
            found = data.find(delimiter, at, min(end, stop + len(delimiter) - 1))
            self._scanned += (stop if found < 0 else found) - at
            if found < 0:
                at = stop
                self._work.pause()
                continue
            self._scanned += _CANDIDATE
            at = found + len(delimiter)
            line = rest.match(data, at, end)
            if line is not None and (found == part.body or data[found - 1] == 0x0A):
                before = found - 1 if found > part.body else found
                before -= before > part.body and data[before - 1] == 0x0D  # the line end belongs to the delimiter
                at = line.end()
                yield before, at, line[1] is not None
        self.is_partial = self.is_partial or at < end


def _part(data: bytes, start: int, end: int, number: int, depth: int, within: int, default: str) -> Part:
    fields, body = read_header(data, start, end)
    kind, parameters = read_parameters(value_of(fields, "content-type"))
    disposition, about = read_parameters(value_of(fields, "content-disposition"))
    return Part(
        number,
        depth,
        within,
        fields,
        data,
        start,
        min(body, end),
        end,
        type=_MISNAMED.get(kind, kind) if _TYPE.fullmatch(kind) else default,
        parameters=parameters,
        disposition=disposition,
        filename=file_name(about.get("filename") or parameters.get("name") or ""),
        content_id=value_of(fields, "content-id").strip(" \t<>"),
        encoding=value_of(fields, "content-transfer-encoding").partition(";")[0].strip().lower(),
    )


# ---- content transfer encodings


def _cut(data: bytes, start: int, end: int, work: Work) -> Iterator[bytes]:
    for at in range(start, end, _PIECE):
        work.pause()
        yield data[at : min(end, at + _PIECE)]


def _from_base64(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Decode base64 (RFC 2045 6.8): other characters are ignored, padding ends a sequence, and another may follow."""
    rest = b""
    for piece in pieces:
        octets = rest + piece
        # Whole lines of whole quartets, as all mailers write them, are decoded as they are: in half the time.
        cut = octets.rfind(b"\n") + 1
        if cut and b"=" not in octets:
            try:
                decoded = binascii.a2b_base64(octets[:cut])
            except binascii.Error:
                pass
            else:
                yield decoded
                rest = octets[cut:]
                continue
        *ended, rest = octets.translate(None, _NOT_BASE64).split(b"=")
        for sequence in ended:
            if sequence:
                yield _quartets(sequence)
        whole = len(rest) & ~3
        yield binascii.a2b_base64(rest[:whole])
        rest = rest[whole:]
    yield _quartets(rest.translate(None, _NOT_BASE64))


def _base64_size(pieces: Iterator[bytes]) -> int:
    """Return how many octets `_from_base64` yields, in half the time."""
    size = rest = 0
    for piece in pieces:
        *ended, last = piece.translate(None, _NOT_BASE64).split(b"=")
        for sequence in ended:
            size += (rest + len(sequence)) * 3 // 4
            rest = 0
        rest += len(last)
    return size + rest * 3 // 4


def _quartets(sequence: bytes) -> bytes:
    """Decode a sequence without its padding; a single character at its end means nothing."""
    sequence = sequence[:-1] if len(sequence) % 4 == 1 else sequence
    return binascii.a2b_base64(sequence + b"=" * (-len(sequence) % 4))


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the same octets in pieces that end with a line; a line has at most 1 MiB."""
    rest = b""
    for piece in pieces:
        rest += piece
        cut = rest.rfind(b"\n") + 1 or (len(rest) if len(rest) > 4 * _PIECE else 0)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def _from_quoted(pieces: Iterator[bytes]) -> Iterator[bytes]:
    return map(binascii.a2b_qp, _lines(pieces))


def _from_uu(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Decode what stands between "begin" and "end"; lines that cannot be decoded are skipped."""
    is_inside = False
    for piece in _lines(pieces):
        for line in piece.splitlines():
            if line.startswith(b"begin "):
                is_inside = True
            elif line == b"end":
                is_inside = False
            elif is_inside:
                try:
                    yield binascii.a2b_uu(line)
                except binascii.Error:
                    continue


_DECODERS: Final[Mapping[str, Callable[[Iterator[bytes]], Iterator[bytes]]]] = {
    "base64": _from_base64,
    "quoted-printable": _from_quoted,
    **dict.fromkeys(("x-uuencode", "uuencode", "uue", "x-uue"), _from_uu),
}
"""Other encodings, 7bit, 8bit and binary among them, leave the octets as they are."""
