# cython: wraparound=True
"""The client's role of SMTP and LMTP on one connection, beside the server's (penstock.smtp.server). No I/O.

    GREETING -> EHLO [-> HELO] [-> STARTTLS -> HANDSHAKE -> EHLO] [-> AUTH] -> READY <-> transactions -> QUIT -> CLOSED

Octets received go into `ClientSession.receive_data`; `next_reply` returns one `ServerReply` after the other, and
`handle` takes each and returns what is to be sent next. `step` names the command that the next reply answers, so that
a driver can keep time and statistics by command. The relay and the load generator are such drivers
(penstock.net.client connects one to a socket).

A `ClientTransaction` is one mail transaction:

    MAIL -> RCPT ... -> DATA -> TEXT -> FINAL ... -> [RSET ->] DONE

With PIPELINING all commands up to DATA are sent together (RFC 2920), otherwise one by one; the path through the steps
is the same. With CHUNKING there is no DATA: the text is one BDAT, or several where its size is not known (RFC 3030).

Rules
-----
1. No octet of a text is sent before the server has accepted a recipient. A server that refuses them all and does not
   know what follows would read the text as commands. The lone dot after an unwanted 354 is the only exception.
2. The result of a recipient is the reply that decided it (`ClientTransaction.outcomes`). Once the end of the text was
   sent and until the reply is read, the server may or may not have taken the message (RFC 1047): `is_in_doubt`.
3. A transaction that leaves the server with half a transaction sends RSET itself. The next one may be pipelined after
   it, or after the end of a text (RFC 2920 3.1): `ClientSession.begin`.

This file is compiled as it stands (client_session.pxd has the C types): what a reply costs decides what the generator
and the relay cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Final, Literal

from penstock.smtp.client import (
    CLEAR_TEXT,
    AuthExchange,
    CannotSendError,
    Capabilities,
    Credentials,
    DotStuffer,
    ProtocolError,
    ReplyReader,
    ServerReply,
)


class Step(StrEnum):  # a StrEnum is hashed faster than an Enum
    """The command whose reply comes next, or the state between commands."""

    GREETING = "the greeting"
    EHLO = "EHLO"
    HELO = "HELO"
    LHLO = "LHLO"
    STARTTLS = "STARTTLS"
    HANDSHAKE = "the TLS handshake"
    """The driver has to negotiate TLS, and then to call `tls_started`."""
    AUTH = "AUTH"
    READY = "READY"
    """A transaction can begin."""
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    TEXT = "the text"
    """The text has to be sent, or is being sent."""
    FINAL = "the end of the text"
    RSET = "RSET"
    DONE = "the transaction"
    """The transaction is over."""
    QUIT = "QUIT"
    CLOSED = "CLOSED"
    """The server has replied to QUIT."""


# Global names: before Python 3.12 the lookup of an enum member costs as much as handling the reply.
_GREETING: Final = Step.GREETING
_EHLO: Final = Step.EHLO
_HELO: Final = Step.HELO
_LHLO: Final = Step.LHLO
_STARTTLS: Final = Step.STARTTLS
_HANDSHAKE: Final = Step.HANDSHAKE
_AUTH: Final = Step.AUTH
_READY: Final = Step.READY
_MAIL: Final = Step.MAIL
_RCPT: Final = Step.RCPT
_DATA: Final = Step.DATA
_TEXT: Final = Step.TEXT
_FINAL: Final = Step.FINAL
_RSET: Final = Step.RSET
_DONE: Final = Step.DONE
_QUIT: Final = Step.QUIT
_CLOSED: Final = Step.CLOSED

_NOTHING_OFFERED: Final = Capabilities()
_EXPECTED: Final = {Step.DATA: (3, 3), Step.AUTH: (2, 3)}
"""The first digits of replies that are no refusal, where 2xx is not the only one (RFC 5321 4.3.2)."""
_ANY_2XX: Final = (2, 2)
_EHLO_UNKNOWN: Final = frozenset({500, 501, 502, 503, 504, 550, 554, 555})
"""Replies to EHLO after which HELO is tried (RFC 5321 3.2, 4.1.4)."""
_BDAT_UNKNOWN: Final = frozenset({500, 502})
"""Replies to BDAT from a server that offers CHUNKING and does not implement it."""


class OpeningError(Exception):
    """The connection cannot be used for mail as it was asked for."""

    def __init__(self, text: str, status: str, reply: ServerReply | None = None) -> None:
        super().__init__(text)
        self.status = status
        """An enhanced status code."""
        self.reply = reply
        """The refusal of the server; None if the session gave up without one."""


class ClosingError(Exception):
    """The server replied 421: it closes the connection (RFC 5321 3.8)."""

    def __init__(self, reply: ServerReply) -> None:
        super().__init__(reply.text)
        self.reply = reply


class BodyError(Exception):
    """A text does not have the size that was announced, or cannot be read. Not a fault of the server."""


def means_too_many(reply: ServerReply) -> bool:
    """Return whether a refusal of RCPT means "too many recipients".

    A status X.5.3 does (RFC 3463 3.6), whatever the code, and so do 452 and 552 without a status (RFC 5321 4.5.3.1.10).
    """
    status = reply.enhanced_status
    return status in ("4.5.3", "5.5.3") or (status is None and reply.code in (452, 552))


def check_reply(step: Step, reply: ServerReply) -> None:
    """Raise ProtocolError for a reply that the step cannot have (RFC 5321 4.3.2). Refusals are always possible."""
    if reply.code < 400:
        least, most = _EXPECTED.get(step, _ANY_2XX)
        if not least <= reply.code // 100 <= most:
            raise ProtocolError(f"{reply.code} is not a valid reply to {step}: {reply.text}")


class ClientSession:
    """The protocol of one connection, from the greeting to QUIT.

    `handle` raises ProtocolError for a reply that makes no sense, ClosingError for 421, OpeningError before READY.
    After any of them the connection is of no more use.
    """

    def __init__(
        self,
        hostname: str,
        *,
        lmtp: bool = False,
        starttls: Literal["never", "offered", "required"] = "never",
        credentials: Credentials | None = None,
        is_private: bool = False,
        chunking: bool = True,
        max_recipients: int = 1000,
    ) -> None:
        """`hostname` is the argument of EHLO. `starttls`: whether to use it, and whether to go on without.

        `is_private`: the password may be shown on this connection even without TLS (a unix socket). `chunking`: use
        BDAT if offered. `max_recipients`: of a transaction, if the server accepts as many.
        """
        self.capabilities = _NOTHING_OFFERED
        self.transaction: ClientTransaction | None = None
        """The transaction whose replies come next."""
        self.is_encrypted = False
        self.starttls_refused = False
        """STARTTLS was offered and refused; the session goes on in clear text."""
        self._hostname = hostname.encode("ascii", "replace")
        self._lmtp = lmtp
        self._wants_tls = starttls != "never"
        self._requires_tls = starttls == "required"
        self._credentials = credentials
        self._is_private = is_private
        self._chunking = chunking
        self.max_recipients = max_recipients
        """Recipients of a transaction."""
        self.needs_handshake = False
        """The driver has to negotiate TLS, and then to call `tls_started`."""
        self._reader = ReplyReader()
        self._following: ClientTransaction | None = None
        """The transaction that was begun while the replies to another one are awaited."""
        self._step = _GREETING
        self._exchange: AuthExchange | None = None

    # ---- input

    def single_reply(self, data: bytes) -> ServerReply | None:
        """Return the reply if some octets are exactly one: in place of `receive_data` and `next_reply`."""
        return self._reader.single(data)

    def receive_data(self, data: bytes | bytearray) -> None:
        """Add received octets, decrypted."""
        self._reader.feed(data)

    def next_reply(self) -> ServerReply | None:
        """Return the next reply, for `handle`; None until it is complete. Raise ProtocolError."""
        return self._reader.next()

    @property
    def step(self) -> Step:
        """The command whose reply comes next, or the state between commands."""
        transaction = self.transaction
        return self._step if transaction is None else transaction.step

    @property
    def is_costly(self) -> bool:
        """Handling a 334 now may take up to half a second of computing (SCRAM): do it in a thread."""
        exchange = self._exchange
        return self._step is _AUTH and exchange is not None and exchange.mechanism not in CLEAR_TEXT

    def handle(self, reply: ServerReply) -> bytes:
        """Take the reply to the earliest command without one. Return what is to be sent, perhaps nothing."""
        if reply.code == 421:
            raise ClosingError(reply)
        transaction = self.transaction
        if transaction is not None:
            output = transaction.handle(reply)
            if transaction.step is _DONE:
                self.transaction, self._following = self._following, None
            return output
        step = self._step
        if step is _QUIT:
            self._step = _CLOSED
            return b""
        if step is _READY or step is _HANDSHAKE or step is _CLOSED:
            raise ProtocolError(f"a reply to no command: {reply.text}")
        if reply.code // 100 != 2:
            check_reply(step, reply)
        return self._advance(reply)

    # ---- the opening

    def tls_started(self, *, is_private: bool) -> bytes:
        """Go on after the handshake, before the greeting with implicit TLS. Return what is to be sent.

        `is_private`: the server was verified, or the password may be shown to any.
        """
        self.is_encrypted = True
        self.needs_handshake = False
        self._is_private = self._is_private or is_private
        if self._step is _GREETING:
            return b""
        return self._hello()  # RFC 3207 4.2: what was offered before the handshake is discarded

    def _advance(self, reply: ServerReply) -> bytes:
        """Take the reply to a command before READY. Return the next command; nothing after the last one."""
        step, code = self._step, reply.code
        if step is _EHLO or step is _LHLO:
            return self._on_hello(reply, code)
        if step is _GREETING:
            if code != 220:
                raise OpeningError(reply.text, reply.status, reply)
            return self._hello()
        if step is _HELO:
            self.capabilities = _NOTHING_OFFERED
            self.max_recipients = min(self.max_recipients, _NOTHING_OFFERED.max_recipients)
            if code != 250:
                raise OpeningError(reply.text, reply.status, reply)
            return self._after_hello()
        return self._on_starttls(reply, code) if step is _STARTTLS else self._on_auth(reply, code)

    def _hello(self) -> bytes:
        self._step = step = _LHLO if self._lmtp else _EHLO
        return step.encode() + b" " + self._hostname + b"\r\n"

    def _on_hello(self, reply: ServerReply, code: int) -> bytes:
        if code == 250:
            found = Capabilities.of(reply)
            self.capabilities = found if self._chunking else replace(found, chunking=False)
            self.max_recipients = min(self.max_recipients, found.max_recipients)
            return self._after_hello()
        if self._lmtp or code not in _EHLO_UNKNOWN:
            raise OpeningError(reply.text, reply.status, reply)
        self._step = _HELO
        return b"HELO " + self._hostname + b"\r\n"

    def _after_hello(self) -> bytes:
        if self.is_encrypted or not self._wants_tls:
            return self._authenticate()
        if self.capabilities.starttls:
            self._step = _STARTTLS
            return b"STARTTLS\r\n"
        if self._requires_tls:
            raise OpeningError("TLS is required, and the server does not offer it", "4.7.4")
        return self._authenticate()

    def _on_starttls(self, reply: ServerReply, code: int) -> bytes:
        """Expect the handshake. Raise ProtocolError if clear text follows the 220 (RFC 3207 6)."""
        if code == 220:
            if not self._reader.is_empty:  # an attacker may have inserted it
                raise ProtocolError("the server sent something between STARTTLS and TLS")
            self._step = _HANDSHAKE
            self.needs_handshake = True
            return b""
        self.starttls_refused = True
        if self._requires_tls:
            raise OpeningError(f"STARTTLS was refused: {reply.text}", "4.7.4", reply)
        return self._authenticate()

    def _authenticate(self) -> bytes:
        if self._credentials is None:
            self._step = _READY
            return b""
        try:
            exchange = AuthExchange(self._credentials, self.capabilities, is_private=self._is_private)
        except CannotSendError as exc:
            raise OpeningError(f"AUTH: {exc}", exc.status) from exc
        self._exchange = exchange
        self._step = _AUTH
        return exchange.start()

    def _on_auth(self, reply: ServerReply, code: int) -> bytes:
        exchange = self._exchange
        assert exchange is not None
        if code == 334:
            return exchange.respond(reply)
        if code != 235:
            raise OpeningError(f"AUTH was refused: {reply.text}", reply.status, reply)
        exchange.finish()
        self._step = _READY
        return b""

    # ---- transactions

    @property
    def can_begin(self) -> bool:
        """A transaction can begin now: none is under way, or a pipelined one waits for its last replies only."""
        transaction = self.transaction
        if transaction is None:
            return self._step is _READY
        return self._following is None and transaction.pipelining and transaction.step in (_FINAL, _RSET)

    def begin(self, transaction: ClientTransaction) -> bytes:
        """Begin a transaction; see `can_begin`. Return what is to be sent."""
        assert self.can_begin
        if self.transaction is None:
            self.transaction = transaction
        else:
            self._following = transaction
        return transaction.start()

    def quit(self) -> bytes:
        """End the session. Return what is to be sent."""
        self._step = _QUIT
        return b"QUIT\r\n"


class ClientTransaction:
    """One mail transaction: what is sent, and what each reply means for which recipient."""

    def __init__(
        self,
        mail: bytes,
        rcpts: Sequence[bytes],
        *,
        pipelining: bool = False,
        chunking: bool = False,
        lmtp: bool = False,
        is_question: bool = False,
        size: int | None = None,
    ) -> None:
        r"""`mail` and `rcpts` are the commands with their CR LF; at least one recipient.

        `is_question`: only ask for the recipients, and send no text. `size`: octets of the text, if they are known;
        then BDAT sends it in one chunk.
        """
        self.mail = mail
        self._rcpts = rcpts
        self.pipelining = pipelining
        self.chunking = chunking
        self.lmtp = lmtp
        self.is_question = is_question
        self.step = _MAIL
        self.mail_reply: ServerReply | None = None
        self.outcomes: list[ServerReply | None] = [None] * len(rcpts)
        """For each recipient the reply that decided it; None until then."""
        self.accepted: list[int] = []
        """Recipients whose RCPT was accepted, by their position."""
        self.too_many: list[int] = []
        """Recipients beyond those that the server takes in one transaction (RFC 5321 4.5.3.1.10)."""
        self.chunking_refused = False
        """The server does not know BDAT although it offers CHUNKING: the text can be sent with DATA."""
        self.is_broken = False
        """The connection cannot be used any more: the text was refused while it was being sent."""
        self.is_in_doubt = False
        """The end of the text was sent, and the last reply was not read."""
        self._position = 0
        """Recipients answered so far: to RCPT, then of an LMTP server to the text (RFC 2033 4.2)."""
        self._pieces = 0
        """BDATs before the last one whose replies were not read."""
        self._has_size = size is not None
        self._octets_left = size or 0
        """Octets of the announced BDAT that are still to be sent."""
        self._stuffer: DotStuffer | None = None

    @property
    def has_result(self) -> bool:
        """Every recipient has its outcome, or none is possible any more."""
        return self.step is _DONE or self.step is _RSET

    @property
    def is_accepted(self) -> bool:
        """The server has taken the message for all recipients that it had accepted, at least one."""
        outcomes = self.outcomes
        for position in self.accepted:
            reply = outcomes[position]
            if reply is None or reply.code >= 300:
                return False
        return bool(self.accepted)

    def start(self) -> bytes:
        """Return the first commands."""
        if not self.pipelining:
            return self.mail
        opening = b"".join([self.mail, *self._rcpts])
        return opening if self.chunking or self.is_question else opening + b"DATA\r\n"

    # ---- the text

    def begin_text(self) -> bytes:
        """Return what is sent before the text."""
        if not self.chunking or not self._has_size:
            return b""
        if not self._octets_left:
            self.end_text()
        return b"BDAT %d LAST\r\n" % self._octets_left

    def feed_text(self, chunk: bytes) -> bytes:
        """Return what is sent for the next octets of the text. Raise BodyError if there are too many."""
        if not self.chunking:
            if self._stuffer is None:
                self._stuffer = DotStuffer()
            return self._stuffer.feed(chunk)
        if not self._has_size:
            self._pieces += 1
            return b"BDAT %d\r\n%b" % (len(chunk), chunk)
        self._octets_left -= len(chunk)
        if self._octets_left < 0:
            raise BodyError("the body is longer than announced")
        if not self._octets_left:
            self.end_text()
        return chunk

    def finish_text(self) -> bytes:
        """Return what is sent at the end of the text. Raise BodyError if octets are missing."""
        if self.chunking and self._octets_left:
            raise BodyError("the body is shorter than announced")
        self.end_text()
        if not self.chunking:
            return b".\r\n" if self._stuffer is None else self._stuffer.end()
        return b"" if self._has_size else b"BDAT 0 LAST\r\n"

    def end_text(self) -> None:
        """Note that the end of the text is about to be sent: from here on the message may have been taken."""
        self.is_in_doubt = True
        if self.step is _TEXT:
            self.step = _FINAL

    # ---- replies

    def handle(self, reply: ServerReply) -> bytes:
        """Take the reply to the earliest command without one. Return what is to be sent. Raise ProtocolError."""
        code, step = reply.code, self.step
        if code < 400 and code // 100 != (3 if step is _DATA else 2):
            check_reply(step, reply)
        if step is _MAIL:
            return self._on_mail(reply, code)
        if step is _RCPT:
            return self._on_rcpt(reply, code)
        if step is _DATA:
            return self._on_data(reply, code)
        if step is _FINAL:
            return self._on_final(reply, code)
        if step is _TEXT:
            return self._on_text(reply, code)
        assert step is _RSET
        self.step = _DONE
        return b""

    def _on_mail(self, reply: ServerReply, code: int) -> bytes:
        self.mail_reply = reply
        self.step = _RCPT
        if code < 300:
            return b"" if self.pipelining else self._rcpts[0]
        self.outcomes = [reply] * len(self.outcomes)
        if not self.pipelining:
            self.step = _DONE
        return b""

    def _on_rcpt(self, reply: ServerReply, code: int) -> bytes:
        position = self._position
        self._position += 1
        assert self.mail_reply is not None
        if self.mail_reply.code >= 300:
            pass  # MAIL was refused: the replies to the commands pipelined after it mean nothing
        elif code < 300:
            self.accepted.append(position)
            if self.is_question:
                self.outcomes[position] = reply
        elif self.accepted and means_too_many(reply):
            self.too_many.append(position)
        else:
            self.outcomes[position] = reply
        if self._position < len(self._rcpts):
            return b"" if self.pipelining else self._rcpts[self._position]
        self._position = 0
        if self.is_question:
            return self._finish()
        if self.pipelining and not self.chunking:
            self.step = _DATA
            return b""
        if not self.accepted:
            return self._finish()
        self.step = _TEXT if self.chunking else _DATA
        return b"" if self.chunking else b"DATA\r\n"

    def _on_data(self, reply: ServerReply, code: int) -> bytes:
        if code < 400:
            if self.accepted:
                self.step = _TEXT
                return b""
            self.step = _FINAL
            return b".\r\n"  # RFC 2920 3.1: a server that wants a text for no recipient gets an empty one
        self._decide(reply)
        return self._finish()

    def _on_text(self, reply: ServerReply, code: int) -> bytes:
        """Take a reply while the text is being sent: to a piece of it, or a refusal before its end."""
        if self._pieces and code < 300:
            self._pieces -= 1
            return b""
        if code < 300:
            raise ProtocolError(f"{code} before the end of the text: {reply.text}")
        self._refuse_text(reply, code)
        self.is_broken = True
        self.step = _DONE
        return b""

    def _on_final(self, reply: ServerReply, code: int) -> bytes:
        if self._pieces:
            return self._on_text(reply, code)
        if not self.accepted:
            return self._finish()
        if self.chunking and code in _BDAT_UNKNOWN and not self._is_of_recipient(reply):
            return self._on_text(reply, code)  # the octets of the text may have been read as commands
        if not self.lmtp:
            self._decide(reply)
        else:
            self.outcomes[self.accepted[self._position]] = reply
            self._position += 1
            if self._position < len(self.accepted):
                return b""
        self.is_in_doubt = False
        self.step = _DONE
        return b""

    def _is_of_recipient(self, reply: ServerReply) -> bool:
        """Return whether a 500 or 502 of an LMTP server refuses a message for one recipient, and not BDAT as such.

        To send the text again would give those who have accepted it a duplicate.
        """
        return self.lmtp and (self._position > 0 or reply.enhanced_status not in (None, "5.5.1", "5.5.2"))

    def _refuse_text(self, reply: ServerReply, code: int) -> None:
        self.is_in_doubt = False
        if self.chunking and code in _BDAT_UNKNOWN:
            self.chunking_refused = True
        else:
            self._decide(reply)

    def _decide(self, reply: ServerReply) -> None:
        for position in self.accepted:
            self.outcomes[position] = reply

    def _finish(self) -> bytes:
        """End without a text. Return the RSET that a transaction begun on the server needs."""
        assert self.mail_reply is not None
        if self.mail_reply.code >= 300:
            self.step = _DONE
            return b""
        self.step = _RSET
        return b"RSET\r\n"
