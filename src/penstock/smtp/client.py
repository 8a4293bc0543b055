r"""The client's half of the language: what is said to a server, and what its answers mean. Pure, like the rest here.

A conversation (penstock.relay, penstock.load) joins commands made by these functions into groups (RFC 2920), feeds what
comes back to an `AnswerReader`, and takes one `Answer` for each command.

>>> reader = AnswerReader()
>>> reader.feed(b"250-mx.example.org\r\n250 SIZE 1000\r\n")
>>> offer = Capabilities.of(reader.next())
>>> offer.size
1000
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import scramp

from penstock.message import Envelope, Recipient

_LINE: Final = re.compile(rb"([2-5][0-9][0-9])([ -]?)([^\r\n]*)\r?\n")
_STATUS: Final = re.compile(r"([245]\.[0-9]{1,3}\.[0-9]{1,3})(?:[ \t]|$)")
MAX_LINE: Final = 4096
"""Octets of a line of an answer; RFC 5321 4.5.3.1.5 says 512, servers in the field say more."""
MAX_LINES: Final = 500
_MOST_SHOWN: Final = 100
"""Characters that are shown of what is no answer."""
_MOST_TEXT: Final = 1000
"""Characters of an answer that logs and reports show."""


class ProtocolError(ValueError):
    """The server said something that is no answer."""


class CannotSendError(ValueError):
    """The server does not offer what this message needs. Permanent, with its enhanced status code."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status


class Answer(NamedTuple):
    """What a server said to one command."""

    code: int
    lines: tuple[str, ...]
    """The texts of the lines, without code and line end."""

    @property
    def accepts(self) -> bool:
        """It is a 2yz or a 3yz."""
        return self.code < 400

    @property
    def is_permanent(self) -> bool:
        """It is a 5yz."""
        return self.code >= 500

    @property
    def status(self) -> str:
        """The enhanced status code (RFC 2034), or the least one of the code's class."""
        found = _STATUS.match(self.lines[0])
        return found.group(1) if found else f"{self.code // 100}.0.0"

    @property
    def text(self) -> str:
        """All of it in one line, as a bounce shows it: printable, at most 1,000 characters."""
        lines = self.lines
        text = f"{self.code} {lines[0]}" if len(lines) == 1 else f"{self.code} {' / '.join(lines[:_MOST_TEXT])}"
        if len(text) > _MOST_TEXT:
            text = f"{text[: _MOST_TEXT - 3]}..."
        return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


class AnswerReader:
    """Cuts what a server sends into answers."""

    __slots__ = ("_buffer", "_code", "_lines", "_place")

    def __init__(self) -> None:
        self._buffer = b""
        self._place = 0
        """Where in the buffer the next line begins."""
        self._code = 0
        self._lines: list[str] = []

    def feed(self, data: bytes | bytearray) -> None:
        """Take what was received."""
        self._buffer = self._buffer[self._place :] + data
        self._place = 0

    @property
    def is_empty(self) -> bool:
        """Nothing is left over, not even half an answer."""
        return self._place == len(self._buffer) and not self._lines

    def next(self) -> Answer | None:
        """Return the next answer, None before it is whole. Raise ProtocolError for what is none, or too long."""
        while self._place < len(self._buffer):
            line = _LINE.match(self._buffer, self._place)
            if line is None:
                self._expect_more()
                return None
            digits, mark, text = line.groups()
            code = int(digits)
            self._place = line.end()
            if len(text) > MAX_LINE or len(self._lines) >= MAX_LINES:
                raise ProtocolError("an answer is too long")
            if not self._lines:
                if mark != b"-":
                    return Answer(code, (text.decode("utf-8", "replace"),))
                self._code = code
            elif code != self._code:
                raise ProtocolError(f"an answer changes its code from {self._code} to {code}")
            self._lines.append(text.decode("utf-8", "replace"))
            if mark != b"-":
                lines, self._lines = tuple(self._lines), []
                return Answer(code, lines)
        return None

    def _expect_more(self) -> None:
        """Raise ProtocolError when what is there will be no line of an answer, whatever comes."""
        line, mark, _ = self._buffer[self._place :].partition(b"\n")
        if mark or len(line) > MAX_LINE:
            raise ProtocolError(f"this is no answer: {_shown(line)}")


def _shown(line: bytes) -> str:
    r"""Return a line as logs and reports show it: printable, controls as \xNN, at most 100 characters."""
    text = line[: _MOST_SHOWN * 4].removesuffix(b"\r").decode("utf-8", "replace")[:_MOST_SHOWN]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)[:_MOST_SHOWN]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a server offers in its answer to EHLO (RFC 5321 4.1.1.1)."""

    keywords: dict[str, str] = field(default_factory=dict)
    """Keyword in capitals -> parameters as they stand."""
    pipelining: bool = False
    chunking: bool = False
    eightbitmime: bool = False
    binarymime: bool = False
    smtputf8: bool = False
    dsn: bool = False
    starttls: bool = False
    requiretls: bool = False
    size: int | None = None
    """Octets a message may have (RFC 1870); None when the server does not say, 0 when there is no limit."""
    mechanisms: tuple[str, ...] = ()
    max_recipients: int = 100
    """RCPTs of a transaction: LIMITS RCPTMAX (RFC 9422), otherwise the 100 that every server takes (RFC 5321
    4.5.3.1.8)."""

    @classmethod
    def of(cls, answer: Answer | None) -> Capabilities:
        """Read the answer to EHLO; None, or one line, offers nothing."""
        keywords: dict[str, str] = {}
        for line in () if answer is None else answer.lines[1:]:
            keyword, _, parameters = line.strip().partition(" ")
            if keyword.upper().startswith("AUTH="):  # an old mistake that servers repeat for old clients
                keyword, parameters = "AUTH", f"{keyword[5:]} {parameters}"
            keywords.setdefault(keyword.upper(), parameters.strip())
        size = keywords.get("SIZE")
        limits = dict(limit.partition("=")[::2] for limit in keywords.get("LIMITS", "").upper().split())
        rcptmax = limits.get("RCPTMAX", "")
        return cls(
            keywords,
            pipelining="PIPELINING" in keywords,
            chunking="CHUNKING" in keywords,
            eightbitmime="8BITMIME" in keywords,
            binarymime="BINARYMIME" in keywords,
            smtputf8="SMTPUTF8" in keywords,
            dsn="DSN" in keywords,
            starttls="STARTTLS" in keywords,
            requiretls="REQUIRETLS" in keywords,
            size=None if size is None else int(size) if size.isascii() and size.isdigit() else 0,
            mechanisms=tuple(keywords.get("AUTH", "").upper().split()),
            max_recipients=max(1, int(rcptmax)) if rcptmax.isascii() and rcptmax.isdigit() else 100,
        )


def check_sendable(envelope: Envelope, size: int, offer: Capabilities) -> None:
    """Raise CannotSendError when a server can not take a message of `size` octets."""
    if offer.size and size > offer.size:
        raise CannotSendError("5.3.4", f"the message has {size} octets, the server takes {offer.size}")
    if envelope.requiretls and not offer.requiretls:
        raise CannotSendError("5.7.30", "the message asks for REQUIRETLS, which the server does not offer")  # RFC 8689
    if envelope.smtputf8 and not offer.smtputf8 and not _is_ascii(envelope):
        raise CannotSendError("5.6.7", "the addresses need SMTPUTF8, which the server does not offer")  # RFC 6531 3.5
    if envelope.body_type == "BINARYMIME" and not (offer.binarymime and offer.chunking):
        raise CannotSendError("5.6.3", "the message is BINARYMIME, which the server does not offer")  # RFC 3030 3


def _is_ascii(envelope: Envelope) -> bool:
    return envelope.sender.text.isascii() and all(to.path.text.isascii() for to in envelope.recipients)


def mail_command(envelope: Envelope, size: int, offer: Capabilities) -> bytes:
    """Return MAIL with the parameters that the server understands (RFC 5321 3.3, 1870, 6152, 6531, 3461, 8689).

    BODY=8BITMIME falls away where it is not offered: servers without it that garble the eighth bit have died out, and
    what the message was declared to be says little of what it is.
    """
    command = f"MAIL FROM:<{envelope.sender.text}>"
    if offer.size is not None and size:
        command += f" SIZE={size}"
    if envelope.body_type != "7BIT" and offer.eightbitmime:
        command += f" BODY={envelope.body_type}"
    if envelope.smtputf8 and offer.smtputf8:
        command += " SMTPUTF8"
    if envelope.requiretls:
        command += " REQUIRETLS"
    if offer.dsn:
        command += f" RET={envelope.ret}" if envelope.ret else ""
        command += f" ENVID={envelope.envid}" if envelope.envid else ""
    return command.encode() + b"\r\n"


def rcpt_command(recipient: Recipient, offer: Capabilities) -> bytes:
    """Return RCPT, with NOTIFY and ORCPT where the server understands them (RFC 3461 4.1, 4.2)."""
    command = f"RCPT TO:<{recipient.path.text}>"
    if offer.dsn:
        command += f" NOTIFY={','.join(sorted(recipient.notify))}" if recipient.notify else ""
        command += f" ORCPT={recipient.orcpt}" if recipient.orcpt else ""
    return command.encode() + b"\r\n"


# ---- the text


class Stuffer:
    """Makes a text fit for DATA as it comes: a dot more on each line that begins with one (RFC 5321 4.5.2).

    A text that does not end with CR LF gets one: there is no way around it with DATA.
    """

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b"\r\n"
        """The last octets so far: a line begins with the first."""

    def feed(self, chunk: bytes) -> bytes:
        """Return what is to be sent for the next octets of the text."""
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
        """Return the final dot."""
        return b".\r\n" if self._tail == b"\r\n" else b"\r\n.\r\n"


def stuffed(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a whole text for DATA, with its final dot; see `Stuffer`."""
    stuffer = Stuffer()
    for chunk in chunks:
        yield stuffer.feed(chunk)
    yield stuffer.end()


def chunked(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield a text of `size` octets as one BDAT LAST (RFC 3030 2): nothing in it is touched."""
    yield b"BDAT %d LAST\r\n" % size
    yield from chunks


# ---- authentication


class AuthDialog:
    """Proves to a server who we are, with the best mechanism that both know (RFC 4954).

    SCRAM-SHA-256 where it is offered; PLAIN and LOGIN, which show the password, only when `is_private`.
    """

    def __init__(self, user: str, password: str, offer: Capabilities, *, is_private: bool) -> None:
        """Raise CannotSendError when no mechanism is left."""
        self._user, self._password = user, password
        self._scram: scramp.ScramClient | None = None
        self._steps = 0
        wanted = ["SCRAM-SHA-256", *(["PLAIN", "LOGIN"] if is_private else [])]
        mechanism = next((name for name in wanted if name in offer.mechanisms), None)
        if mechanism is None:
            raise CannotSendError("4.7.0", f"no mechanism of {' '.join(offer.mechanisms) or 'none'} can be used here")
        self.mechanism = mechanism

    def start(self) -> bytes:
        """Return the AUTH command."""
        if self.mechanism == "PLAIN":
            return b"AUTH PLAIN " + _b64(f"\0{self._user}\0{self._password}") + b"\r\n"  # RFC 4616
        if self.mechanism == "LOGIN":
            return b"AUTH LOGIN\r\n"
        self._scram = scramp.ScramClient(["SCRAM-SHA-256"], self._user, self._password)
        return b"AUTH SCRAM-SHA-256 " + _b64(self._scram.get_client_first()) + b"\r\n"

    def respond(self, answer: Answer) -> bytes:
        """Return the response to a 334. Raise ProtocolError when the server does not keep to the mechanism."""
        self._steps += 1
        try:
            challenge = base64.b64decode(answer.lines[0], validate=False).decode()
            if self.mechanism == "LOGIN" and self._steps <= 2:
                return _b64(self._user if self._steps == 1 else self._password) + b"\r\n"
            if self._scram is not None and self._steps == 1:
                self._scram.set_server_first(challenge)
                return _b64(self._scram.get_client_final()) + b"\r\n"
            if self._scram is not None and self._steps == 2:
                self._scram.set_server_final(challenge)
                return b"\r\n"
        except (ValueError, scramp.ScramException) as exc:
            raise ProtocolError(f"{self.mechanism}: {exc}") from exc
        raise ProtocolError(f"{self.mechanism}: an unexpected challenge")

    def finish(self) -> None:
        """Raise ProtocolError when the server has said 235 without proving that it knows us (RFC 5802 3)."""
        if self._scram is not None and self._steps < 2:
            raise ProtocolError(f"{self.mechanism}: the server did not prove that it knows the password")


def _b64(text: str) -> bytes:
    return base64.b64encode(text.encode())
