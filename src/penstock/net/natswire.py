"""The protocol of NATS without I/O: what a client reads and writes, headers, and keys for authentication.

https://docs.nats.io/reference/reference-protocols/nats-protocol describes the lines; ADR-4 of nats-architecture-and-
design the headers.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_MAX_LINE: Final = 1 << 20
"""Octets of a line of the server; INFO with many URLs is the longest."""
_MAX_PAYLOAD: Final = 64 << 20
"""Octets of headers and payload; a server is limited to 64 MiB."""
_FIRST_LINE: Final = b"NATS/1.0"


class ProtocolError(Exception):
    """The server sent something that is not NATS."""


class Info(msgspec.Struct, frozen=True):
    """What a server says about itself, first and whenever it changes."""

    server_name: str = ""
    version: str = ""
    max_payload: int = 1 << 20
    headers: bool = False
    tls_required: bool = False
    nonce: str = ""
    connect_urls: tuple[str, ...] = ()
    ldm: bool = False
    """Lame duck mode: the server is about to shut down."""


class Message(NamedTuple):
    """A message that was received."""

    subject: str
    """"" for an answer."""
    reply: str
    """The subject for an answer; "" if none is expected."""
    headers: bytes
    """The header block as received; b"" without headers."""
    data: bytes

    @property
    def status(self) -> int:
        """The status that the server sends in place of an answer, such as 503 without responders; 0 if none."""
        word = self.headers[len(_FIRST_LINE) + 1 : len(_FIRST_LINE) + 4]
        return int(word) if word.isdigit() else 0

    @property
    def fields(self) -> dict[str, str]:
        """The headers by name."""
        return parse_headers(self.headers)


def make_headers(fields: Mapping[str, str]) -> bytes:
    """Return a header block. Raise ValueError for a value that would need more than one line."""
    lines = [f"{name}: {value}\r\n" for name, value in fields.items()]
    if any(line.count("\r") + line.count("\n") != 2 for line in lines):
        raise ValueError("a header must be one line")
    return b"".join([_FIRST_LINE, b"\r\n", "".join(lines).encode(), b"\r\n"])


def parse_headers(block: bytes) -> dict[str, str]:
    """Return the headers of a block by name; of several with one name, the last."""
    found: dict[str, str] = {}
    for line in block.decode("utf-8", "replace").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            found[name] = value.strip(" ")
    return found


class Receiver(Protocol):
    """What takes the operations of a server."""

    def on_message(self, sid: bytes, subject: bytes, reply: bytes, headers: bytes, data: bytes) -> None:
        """Take a message of the subscription `sid`."""

    def on_info(self, info: Info) -> None:
        """Take what the server says about itself."""

    def on_ping(self) -> None:
        """Answer with PONG."""

    def on_pong(self) -> None:
        """Take the answer to a PING."""

    def on_error(self, text: str) -> None:
        """Take an error; the server closes the connection after most of them."""


class Parser:
    """Splits what a server sends into operations. An incomplete one waits for the rest."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._buffer = bytearray()
        self._needed = 0
        """Octets that must be in the buffer before the next operation is complete."""

    def feed(self, data: bytes) -> None:
        """Take octets. Raise ProtocolError if they are not NATS."""
        buffer = self._buffer
        buffer += data
        if len(buffer) < self._needed:
            return
        start = 0
        while True:
            end = buffer.find(b"\r\n", start)
            if end < 0:
                if len(buffer) - start > _MAX_LINE:
                    raise ProtocolError("the server sent a line without an end")
                self._needed = 0
                break
            line = bytes(buffer[start:end])
            if line.startswith((b"MSG ", b"HMSG ")):
                after = self._message(line, end + 2)
                if after > len(buffer):
                    self._needed = after - start
                    break
                start = after
            else:
                self._other(line)
                start = end + 2
        del buffer[:start]

    def _message(self, line: bytes, start: int) -> int:
        """Handle a message whose payload starts here, if it is complete. Return where it ends."""
        verb, *words = line.split()
        try:
            size = int(words.pop())
            header_size = int(words.pop()) if verb == b"HMSG" else 0
            subject, sid, *rest = words
        except (ValueError, IndexError) as exc:
            raise ProtocolError(f"malformed line {line[:100]!r}") from exc
        if not 0 <= header_size <= size <= _MAX_PAYLOAD or len(rest) > 1:
            raise ProtocolError(f"malformed line {line[:100]!r}")
        reply = rest[0] if rest else b""
        end = start + size
        buffer = self._buffer
        if end + 2 <= len(buffer):
            middle = start + header_size
            headers, data = bytes(buffer[start:middle]), bytes(buffer[middle:end])
            self._receiver.on_message(sid, subject, reply, headers, data)
        return end + 2

    def _other(self, line: bytes) -> None:
        verb, _, rest = line.partition(b" ")
        if verb == b"PING":
            self._receiver.on_ping()
        elif verb == b"PONG":
            self._receiver.on_pong()
        elif verb == b"INFO":
            self._receiver.on_info(decode_info(rest))
        elif verb == b"-ERR":
            self._receiver.on_error(rest.strip(b" '").decode("utf-8", "replace"))
        elif verb != b"+OK":
            raise ProtocolError(f"unknown operation {line[:100]!r}")


def decode_info(data: bytes) -> Info:
    """Return an INFO. Raise ProtocolError."""
    try:
        return msgspec.json.decode(data, type=Info)
    except msgspec.MsgspecError as exc:
        raise ProtocolError(f"malformed INFO: {exc}") from exc


def publish_parts(subject: str, reply: str, headers: bytes, data: bytes) -> tuple[bytes, ...]:
    """Return the parts of a PUB, or of an HPUB with headers."""
    if headers:
        size = len(headers)
        return f"HPUB {subject} {reply} {size} {size + len(data)}\r\n".encode(), headers, data, b"\r\n"
    return f"PUB {subject} {reply} {len(data)}\r\n".encode(), data, b"\r\n"


# ---- nkeys: Ed25519 keys in base32 with a prefix and a checksum

_SEED_PREFIX: Final = 18 << 3
_USER_PREFIX: Final = 20 << 3


class NkeyError(ValueError):
    """A seed cannot be used."""


class Nkey:
    """The key of a user; it signs the nonce of the server."""

    def __init__(self, seed: str) -> None:
        """`seed` is what `nk -gen user` prints: it begins with SU. Raise NkeyError."""
        try:
            raw = base64.b32decode(seed + "=" * (-len(seed) % 8))
        except binascii.Error as exc:
            raise NkeyError("an nkey seed has 58 letters and digits, and begins with SU") from exc
        is_user = len(raw) == 36 and raw[0] & 0xF8 == _SEED_PREFIX and (raw[0] & 7) << 5 | raw[1] >> 3 == _USER_PREFIX
        if not is_user or _checksum(raw[:-2]) != raw[-2:]:
            raise NkeyError("not the seed of a user nkey: it begins with SU and has a checksum")
        self._key = Ed25519PrivateKey.from_private_bytes(raw[2:34])
        public = self._key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        named = bytes([_USER_PREFIX]) + public
        self.public = base64.b32encode(named + _checksum(named)).decode().rstrip("=")
        """The public key, as the configuration of the server has it."""

    def sign(self, nonce: str) -> str:
        """Return the signature of a nonce, as CONNECT has it."""
        return base64.urlsafe_b64encode(self._key.sign(nonce.encode())).decode().rstrip("=")


def read_nkey(path: Path) -> Nkey:
    """Return the key whose seed is the first line of a file. Raise OSError or NkeyError."""
    return Nkey(path.read_text(encoding="utf-8").partition("\n")[0].strip())


def _checksum(data: bytes) -> bytes:
    return binascii.crc_hqx(data, 0).to_bytes(2, "little")
