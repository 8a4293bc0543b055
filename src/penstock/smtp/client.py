# cython: wraparound=True
r"""What a client sends to a server, and what the replies mean (RFC 5321, 2920, 3030, 4954, 6531). No I/O.

`ClientSession` (penstock.smtp.client_session) puts these parts into order.

>>> reader = ReplyReader()
>>> reader.feed(b"250-mx.example.org\r\n250 SIZE 1000\r\n")
>>> capabilities = Capabilities.of(reader.next())
>>> capabilities.size
1000

This file is compiled as it stands (client.pxd has the C types).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple

import scramp

from penstock.message import Envelope, Recipient

_LINE: Final = re.compile(rb"([2-5][0-9][0-9])([ -]?)([^\n]*)\n")
_CODES: Final = {b"%d " % code: code for code in range(200, 600)}
"""How a reply of one line begins."""
_STATUS: Final = re.compile(r"([245]\.[0-9]{1,3}\.[0-9]{1,3})(?:[ \t]|$)")
MAX_LINE: Final = 4096
"""Octets in a line of a reply. RFC 5321 4.5.3.1.5 says 512; real servers send longer lines."""
MAX_LINES: Final = 500
"""Lines in a reply."""
_MAX_CACHED: Final = 2048
"""Octets of a reply of several lines that is not parsed again if another connection has got the same."""
_MAX_SINGLE: Final = 200
"""Octets of a reply of one line that is kept, to be found instead of parsed when it is received again."""
_MAX_KEPT: Final = 512
"""Replies that are kept."""
_MAX_SHOWN: Final = 100
"""Characters of a malformed line that an error shows."""
_MAX_TEXT: Final = 1000
"""Characters of a reply that logs and reports show."""
MAX_SCRAM_ITERATIONS: Final = 1_000_000
"""The largest iteration count accepted from a server; a larger one would keep this process busy for seconds."""
MECHANISMS: Final = ("SCRAM-SHA-256", "PLAIN", "LOGIN")
"""The SASL mechanisms supported, in the default order of preference."""
CLEAR_TEXT: Final = frozenset({"PLAIN", "LOGIN"})
"""Mechanisms that give the password to the server."""


class ProtocolError(ValueError):
    """The server sent something that is not a valid reply."""


class CannotSendError(ValueError):
    """The server does not offer what this message needs. Permanent, with its enhanced status code."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status


class ServerReply(NamedTuple):
    """A reply to one command."""

    code: int
    lines: tuple[str, ...]
    """The text of each line, without code and line end."""

    @property
    def accepts(self) -> bool:
        """The reply is a 2xx or a 3xx."""
        return self.code < 400

    @property
    def is_permanent(self) -> bool:
        """The reply is a 5xx."""
        return self.code >= 500

    @property
    def enhanced_status(self) -> str | None:
        """The first enhanced status code (RFC 2034) that has the class of the code; None without one."""
        digit = str(self.code)[0]
        for line in self.lines:
            found = _STATUS.match(line)
            if found is not None and found.group(1)[0] == digit:
                return found.group(1)
        return None

    @property
    def status(self) -> str:
        """The enhanced status code, or x.0.0 of the class of the code."""
        return self.enhanced_status or f"{self.code // 100}.0.0"

    @property
    def text(self) -> str:
        """The reply in one line, as reports show it: printable, at most 1,000 characters."""
        lines = self.lines
        text = f"{self.code} {lines[0]}" if len(lines) == 1 else f"{self.code} {' / '.join(lines)}"
        if len(text) > _MAX_TEXT:
            text = f"{text[: _MAX_TEXT - 3]}..."
        return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


_SINGLE: Final[dict[bytes, ServerReply]] = {}
"""Replies of one line by their octets."""


_MAX_BLANK: Final = 100
"""Octets of a line with nothing but carriage returns."""


class ReplyReader:
    """Splits the octets received from a server into replies (RFC 5321 4.2).

    Tolerant where strictness would cost a duplicate of a message that was taken: carriage returns are ignored
    wherever they are, a line ends with LF, and where the lines of a reply have different codes the last one counts,
    as Postfix does. Blank lines are skipped.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._start = 0
        self._lines: list[str] = []

    def feed(self, data: bytes | bytearray) -> None:
        """Add received octets."""
        octets = bytes(data)
        self._buffer = self._buffer[self._start :] + octets if self._start < len(self._buffer) else octets
        self._start = 0

    def single(self, data: bytes) -> ServerReply | None:
        """Return the reply if the octets are exactly one reply of one line, and nothing is left over from before.

        Most replies are received like this, and most have been received before.
        """
        if self._buffer or self._lines:
            return None
        kept = _SINGLE
        reply = kept.get(data)
        if reply is None:
            size = len(data)
            code = _CODES.get(data[:4])
            if code is None or data.find(b"\n") != size - 1 or size > MAX_LINE:
                return None
            reply = ServerReply(code, (data[4:].translate(None, b"\r\n").decode("utf-8", "replace"),))
            if size <= _MAX_SINGLE:
                if len(kept) >= _MAX_KEPT:
                    kept.clear()
                kept[data] = reply
        return reply

    @property
    def waiting(self) -> int:
        """Octets of an incomplete line."""
        return len(self._buffer) - self._start

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left over, not even part of a reply."""
        return self._start == len(self._buffer) and not self._lines

    def next(self) -> ServerReply | None:
        """Return the next reply; None until it is complete. Raise ProtocolError if it is malformed or too long."""
        while (start := self._start) < len(self._buffer):
            line = _LINE.match(self._buffer, start)
            if line is None:
                if self._skip_blank_line():
                    continue
                self._check_incomplete_line()
                return None
            digits, mark, octets = line.groups()
            self._start = line.end()
            if len(octets) > MAX_LINE or len(self._lines) >= MAX_LINES:
                raise ProtocolError("a reply is too long")
            text = octets.replace(b"\r", b"").decode("utf-8", "replace")
            if mark != b"-" and not self._lines:
                return ServerReply(int(digits), (text,))
            if mark == b"-":
                if not self._lines and len(self._buffer) - start <= _MAX_CACHED:
                    reply = _whole_reply(self._buffer[start:])
                    if reply is not None:
                        self._start = len(self._buffer)
                        return reply
                self._lines.append(text)
            else:
                lines, self._lines = (*self._lines, text), []
                return ServerReply(int(digits), lines)
        self._buffer, self._start = b"", 0
        return None

    def _skip_blank_line(self) -> bool:
        end = self._buffer.find(b"\n", self._start, self._start + _MAX_BLANK)
        if end < 0 or self._buffer[self._start : end].strip(b"\r"):
            return False
        self._start = end + 1
        return True

    def _check_incomplete_line(self) -> None:
        """Raise ProtocolError if more octets cannot make the rest of the buffer a line of a reply."""
        end = self._buffer.find(b"\n", self._start, self._start + MAX_LINE + 1)
        if end >= 0 or len(self._buffer) - self._start > MAX_LINE:
            line = self._buffer[self._start : end if end >= 0 else self._start + MAX_LINE]
            raise ProtocolError(f"this is not a reply: {_shown(line)}")


@lru_cache(maxsize=64)  # servers send the same lines in reply to each EHLO
def _whole_reply(octets: bytes) -> ServerReply | None:
    """Return a reply that consists of exactly these octets; None if they are not one whole reply."""
    lines = octets.split(b"\n")
    *first, last = lines[:-1]
    if lines[-1] or any(line[3:4] != b"-" or not _LINE.match(line + b"\n") for line in first):
        return None
    found = _LINE.match(last + b"\n")
    if found is None or found.group(2) == b"-":
        return None
    texts = tuple(line[4:].replace(b"\r", b"").decode("utf-8", "replace") for line in first)
    return ServerReply(int(found.group(1)), (*texts, found.group(3).replace(b"\r", b"").decode("utf-8", "replace")))


def _shown(line: bytes) -> str:
    r"""Return a line as logs and reports show it: printable, controls as \xNN, at most 100 characters."""
    text = line[: _MAX_SHOWN * 4].removesuffix(b"\r").decode("utf-8", "replace")[:_MAX_SHOWN]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)[:_MAX_SHOWN]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a server offers in its reply to EHLO (RFC 5321 4.1.1.1)."""

    keywords: dict[str, str] = field(default_factory=dict)
    """Keyword in capitals -> parameters as sent."""
    pipelining: bool = False
    chunking: bool = False
    eightbitmime: bool = False
    binarymime: bool = False
    smtputf8: bool = False
    dsn: bool = False
    starttls: bool = False
    requiretls: bool = False
    size: int | None = None
    """Octets a message may have (RFC 1870); None if SIZE is not offered, 0 if there is no limit."""
    mechanisms: tuple[str, ...] = ()
    max_recipients: int = 100
    """RCPTs in a transaction: LIMITS RCPTMAX (RFC 9422), otherwise the 100 that every server accepts (RFC 5321
    4.5.3.1.8)."""

    @classmethod
    def of(cls, reply: ServerReply | None) -> Capabilities:
        """Return the capabilities of a reply to EHLO; None, or a reply of one line, offers nothing."""
        return cls() if reply is None else _capabilities(reply.lines[1:])


@lru_cache(maxsize=64)  # most connections of a run, and of a next hop, get the same lines
def _capabilities(lines: tuple[str, ...]) -> Capabilities:
    keywords: dict[str, str] = {}
    for line in lines:
        keyword, _, parameters = line.strip().partition(" ")
        if keyword.upper().startswith("AUTH="):  # not standard, still sent for old clients
            keyword, parameters = "AUTH", f"{keyword[5:]} {parameters}"
        keywords.setdefault(keyword.upper(), parameters.strip())
    size = keywords.get("SIZE")
    limits = dict(limit.partition("=")[::2] for limit in keywords.get("LIMITS", "").upper().split())
    rcptmax = limits.get("RCPTMAX", "")
    return Capabilities(
        keywords,
        pipelining="PIPELINING" in keywords,
        chunking="CHUNKING" in keywords,
        eightbitmime="8BITMIME" in keywords,
        binarymime="BINARYMIME" in keywords,
        smtputf8="SMTPUTF8" in keywords,
        dsn="DSN" in keywords,
        starttls="STARTTLS" in keywords,
        requiretls="REQUIRETLS" in keywords,
        size=None if size is None else _number(size) or 0,
        mechanisms=tuple(keywords.get("AUTH", "").upper().split()),
        max_recipients=max(1, _number(rcptmax) or 100),
    )


def _number(text: str) -> int | None:
    """Return a decimal number of at most 20 digits (RFC 1870 3); None for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else None


def check_sendable(envelope: Envelope, size: int, capabilities: Capabilities) -> None:
    """Raise CannotSendError if a server cannot take a message of `size` octets with this envelope."""
    if capabilities.size and size > capabilities.size:
        raise CannotSendError("5.3.4", f"the message has {size} octets, the server accepts {capabilities.size}")
    if envelope.requiretls and not capabilities.requiretls:  # RFC 8689 4.2.1
        raise CannotSendError("5.7.30", "the message requires REQUIRETLS, which the server does not offer")
    if envelope.smtputf8 and not capabilities.smtputf8 and not _is_ascii(envelope):  # RFC 6531 3.5
        raise CannotSendError("5.6.7", "the addresses need SMTPUTF8, which the server does not offer")
    if envelope.body_type == "BINARYMIME" and not (capabilities.binarymime and capabilities.chunking):  # RFC 3030 3
        raise CannotSendError("5.6.3", "the message is BINARYMIME, which the server does not offer")


def _is_ascii(envelope: Envelope) -> bool:
    return envelope.sender.ascii_text.isascii() and all(to.path.ascii_text.isascii() for to in envelope.recipients)


def _as_utf8_xtext(orcpt: str) -> str:
    r"""Return an ORCPT of the type utf-8 in ASCII: other characters become `\x{HEX}` (RFC 6533 3)."""
    return "".join(c if c.isascii() else f"\\x{{{ord(c):X}}}" for c in orcpt)


def mail_command(envelope: Envelope, size: int, capabilities: Capabilities) -> bytes:
    """Return MAIL with the parameters that the server understands (RFC 5321 3.3, 1870, 6152, 6531, 3461, 8689).

    BODY=8BITMIME is left out where it is not offered, and the text is sent as it is. RFC 6152 3 asks for a conversion,
    which would change signed content; Postfix sends the text unchanged too with `disable_mime_output_conversion`.
    """
    command = f"MAIL FROM:<{envelope.sender.text if capabilities.smtputf8 else envelope.sender.ascii_text}>"
    if capabilities.size is not None and size:
        command += f" SIZE={size}"
    if envelope.body_type != "7BIT" and capabilities.eightbitmime:
        command += f" BODY={envelope.body_type}"
    if envelope.smtputf8 and capabilities.smtputf8:
        command += " SMTPUTF8"
    if envelope.requiretls:
        command += " REQUIRETLS"
    if capabilities.dsn:
        command += f" RET={envelope.ret}" if envelope.ret else ""
        command += f" ENVID={envelope.envid}" if envelope.envid else ""
    return command.encode() + b"\r\n"


def rcpt_command(recipient: Recipient, capabilities: Capabilities) -> bytes:
    """Return RCPT, with NOTIFY and ORCPT where the server understands them (RFC 3461 4.1, 4.2)."""
    command = f"RCPT TO:<{recipient.path.text if capabilities.smtputf8 else recipient.path.ascii_text}>"
    if capabilities.dsn:
        command += f" NOTIFY={','.join(sorted(recipient.notify))}" if recipient.notify else ""
        if recipient.orcpt:
            command += f" ORCPT={recipient.orcpt if capabilities.smtputf8 else _as_utf8_xtext(recipient.orcpt)}"
    return command.encode() + b"\r\n"


# ---- the text


class DotStuffer:
    """Prepares a text for DATA piece by piece: a dot is added to each line that begins with one (RFC 5321 4.5.2).

    A text that does not end with CR LF gets one: DATA cannot carry it otherwise.
    """

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b"\r\n"
        """The last octets so far. The first octet of a text begins a line."""

    def feed(self, chunk: bytes) -> bytes:
        """Return what is sent for the next octets of the text."""
        if not chunk:
            return b""
        tail = self._tail
        self._tail = chunk[-2:] if len(chunk) > 1 else (tail + chunk)[-2:]
        if chunk.startswith(b".") and tail == b"\r\n":
            return b"." + chunk.replace(b"\r\n.", b"\r\n..")
        if chunk.startswith(b"\n.") and tail.endswith(b"\r"):
            return b"\n." + chunk[1:].replace(b"\r\n.", b"\r\n..")
        return chunk.replace(b"\r\n.", b"\r\n..")

    def end(self) -> bytes:
        """Return the end of the text: a dot on a line of its own."""
        return b".\r\n" if self._tail == b"\r\n" else b"\r\n.\r\n"


def stuffed(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a whole text as DATA sends it, with the final dot; see `DotStuffer`."""
    stuffer = DotStuffer()
    for chunk in chunks:
        yield stuffer.feed(chunk)
    yield stuffer.end()


# ---- authentication


class Credentials(NamedTuple):
    """How a client authenticates (RFC 4954)."""

    user: str
    password: str
    mechanisms: Sequence[str] = MECHANISMS
    """Mechanisms to use, the preferred one first."""


class AuthExchange:
    """Authenticates with the preferred mechanism among those that both sides support (RFC 4954).

    PLAIN and LOGIN give the password to the server; they are used only if `is_private`.
    """

    def __init__(self, credentials: Credentials, capabilities: Capabilities, *, is_private: bool) -> None:
        """Raise CannotSendError if no mechanism can be used."""
        self._user, self._password, wanted = credentials
        self._scram: scramp.ScramClient | None = None
        self._steps = 0
        shared = [name for name in wanted if name in capabilities.mechanisms]
        mechanism = next((name for name in shared if is_private or name not in CLEAR_TEXT), None)
        if mechanism is None and shared:
            raise CannotSendError("4.7.0", f"{' and '.join(shared)} would give the password to an unverified server")
        if mechanism is None:
            raise CannotSendError("4.7.0", f"no mechanism in common; offered: {' '.join(capabilities.mechanisms)}")
        self.mechanism = mechanism

    def start(self) -> bytes:
        """Return the AUTH command."""
        if self.mechanism == "PLAIN":
            return b"AUTH PLAIN " + _b64(f"\0{self._user}\0{self._password}") + b"\r\n"  # RFC 4616 2
        if self.mechanism == "LOGIN":
            return b"AUTH LOGIN\r\n"
        self._scram = scramp.ScramClient(["SCRAM-SHA-256"], self._user, self._password)
        return b"AUTH SCRAM-SHA-256 " + _b64(self._scram.get_client_first()) + b"\r\n"

    def respond(self, reply: ServerReply) -> bytes:
        """Return the response to a 334. Raise ProtocolError if the server does not follow the mechanism.

        The first response of SCRAM takes as long as the iterations that the server asks for: up to half a second.
        """
        self._steps += 1
        try:
            challenge = base64.b64decode(reply.lines[0], validate=False).decode()
            if self.mechanism == "LOGIN" and self._steps <= 2:
                return _b64(self._user if self._steps == 1 else self._password) + b"\r\n"
            if self._scram is not None and self._steps == 1:
                _check_iterations(challenge)
                self._scram.set_server_first(challenge)
                return _b64(self._scram.get_client_final()) + b"\r\n"
            if self._scram is not None and self._steps == 2:
                self._scram.set_server_final(challenge)
                return b"\r\n"
        except (ValueError, scramp.ScramException) as exc:
            raise ProtocolError(f"{self.mechanism}: {exc}") from exc
        raise ProtocolError(f"{self.mechanism}: an unexpected challenge")

    def finish(self) -> None:
        """Raise ProtocolError if the server replied 235 without proving that it knows the password (RFC 5802 3)."""
        if self._scram is not None and self._steps < 2:
            raise ProtocolError(f"{self.mechanism}: the server did not prove that it knows the password")


def _check_iterations(server_first: str) -> None:
    """Raise ValueError if the server asks for too many iterations (RFC 5802 5.1, attribute i)."""
    for attribute in server_first.split(",")[:10]:
        if attribute.startswith("i=") and not 0 < (_number(attribute[2:]) or 0) <= MAX_SCRAM_ITERATIONS:
            raise ValueError(f"an iteration count above {MAX_SCRAM_ITERATIONS:,}: {attribute[2:42]}")


def _b64(text: str) -> bytes:
    return base64.b64encode(text.encode())
