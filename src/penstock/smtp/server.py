"""The server's side of the conversation: octets in, events out, replies back. No I/O, no clock.

    session = ServerSession(offer, wire, transaction)
    session.greet()
    while True:
        event = session.next_event()
        if event is NEED_DATA: send session.data_to_send(), then session.receive(what came)
        elif event is CLOSED:  send session.data_to_send(), then close
        else:                  session.reply(what the driver thinks of it)

Rules
-----
1. The next event is held back until the last one is answered. What the client pipelined behind it is not even looked
   at, so the answer decides how it is read.
2. The *reply* moves the state: an event is a question, and a refusal leaves everything as it was.
3. Replies wait in `data_to_send` while there is more input: pipelining then costs one send (RFC 2920 3.2).
4. Each command gets one reply; each message gets one reply (in LMTP one a recipient), whatever its text holds.
5. When what follows can not be told from commands any more (a BDAT without a length, a refused text whose end the
   two sides see at different places), the session ends: never is text of a body read as a command.
6. The budgets (errors, unknown recipients, failed authentications, messages) belong to the connection: neither RSET
   nor EHLO nor STARTTLS renews them.

What a session is most of the time, that is EHLO, MAIL, RCPT, DATA and QUIT in their plain form, the intake of lines and
the replies, is compiled: `SessionCore` (ext/session.pyx), which `ServerSession` inherits. Everything else is here.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable, Sequence
from typing import Final

from penstock import reply as replies
from penstock.reply import Reply
from penstock.smtp import _wire
from penstock.smtp._session import SessionCore
from penstock.smtp._wire import Wire
from penstock.smtp.events import (
    Auth,
    AuthAborted,
    AuthResponse,
    BeginData,
    Command,
    EndOfMessage,
    Event,
    Expand,
    Hello,
    Mail,
    MessageAborted,
    Rcpt,
    StartTls,
    Verify,
)
from penstock.smtp.extensions import Extensions
from penstock.smtp.grammar import parse_any_mail, parse_any_rcpt, parse_hello_name
from penstock.smtp.helptext import help_reply
from penstock.smtp.states import (
    AUTH_LINE_LIMIT,
    LINE_LIMIT,
    LONGER_LINES,
    NUMBER,
    RULES,
    RULES_BEFORE_AUTH,
    RULES_BEFORE_TLS,
    State,
)
from penstock.transaction import TlsInfo, Transaction

VIOLATION_REPLIES: Final[dict[int, Reply]] = {
    _wire.BARE_LF: replies.BARE_LF_IN_TEXT,
    _wire.BARE_CR: replies.BARE_CR_IN_TEXT,
    _wire.NUL: replies.NUL_IN_TEXT,
    _wire.LONG_LINE: replies.LONG_LINE_IN_TEXT,
    _wire.TOO_BIG: replies.TOO_BIG,
}
"""What a client hears of a text that breaks a rule of the wire."""

_BAD_LINES: Final[dict[int, Reply]] = {
    _wire.LINE_TOO_LONG: replies.LINE_TOO_LONG,
    _wire.LINE_BAD_END: replies.BAD_LINE_END,
    _wire.LINE_NUL: replies.NUL_IN_COMMAND,
}
_BDAT_WITHOUT_LENGTH: Final = Reply(501, "5.5.4", "BDAT needs the number of octets", closes=True)
_BDAT_NOT_OFFERED: Final = Reply(502, "5.5.1", "BDAT is not offered here", closes=True)
_MAX_BDAT_DIGITS: Final = 18
INTERCEPTABLE_VERBS: Final = frozenset(NUMBER[verb] for verb in ("RSET", "NOOP", "VRFY", "EXPN", "HELP"))
"""Verbs that a session sees to by itself, unless its driver wants to be asked."""
NO_VERBS: Final[frozenset[int]] = frozenset()
# The states, looked up once: Python 3.11 is slow at members of an Enum.
_AUTH_STATE: Final = State.AUTH
_BODY: Final = State.BODY
_CHUNKS: Final = State.CHUNKS
_CLOSED: Final = State.CLOSED
_HELLO: Final = State.HELLO
_MAIL: Final = State.MAIL
_OCTETS: Final = State.OCTETS
_OPENED: Final = State.OPENED
_RCPT: Final = State.RCPT
_READY: Final = State.READY
_REFUSED: Final = State.REFUSED
_TLS_STATE: Final = State.TLS


class ServerSession(SessionCore):
    """One conversation. See the top of this file for how it is driven."""

    __slots__ = ()

    def __init__(self, offer: Extensions, wire: Wire, transaction: Transaction, unasked: int = 0) -> None:
        """`unasked` are the events that the driver takes no interest in, `UNASKED_...` of penstock.smtp._session.

        Where the commands behind them are plain, the session accepts them by itself.
        """
        super().__init__(offer, wire, transaction, unasked)
        self.intercepted_verbs = NO_VERBS
        transaction.is_lmtp = offer.is_lmtp
        longest = AUTH_LINE_LIMIT if offer.mechanisms else LINE_LIMIT + LONGER_LINES["MAIL"]
        wire.set_line_limit(longest)
        self._choose_table()
        self._rules = RULES[_HELLO]

    # ---- the driver's side

    @property
    def state(self) -> State:
        """Where the conversation stands."""
        return self._state

    @property
    def in_body(self) -> bool:
        """The text of a message, or the exchange about one, is under way."""
        return self._state in (_BODY, _OCTETS, _CHUNKS)

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take in octets. Drivers that own a socket let the wire receive them instead."""
        self.wire.feed(data)

    def reply_each(self, answers: Sequence[Reply]) -> None:
        """Answer EndOfMessage in LMTP: a reply for each accepted recipient, in their order (RFC 2033 4.2)."""
        if self._answered is not ServerSession._message_answered or not self.offer.is_lmtp:
            raise RuntimeError("only the end of an LMTP message is answered for each recipient")
        if len(answers) != len(self.transaction.recipients):
            raise ValueError(f"{len(self.transaction.recipients)} recipients need as many replies")
        self._answered = None
        if any(reply.accepts for reply in answers):
            self._message_taken()
        self._end_transaction()
        for reply in answers:
            self._say(reply)

    def challenge(self, data: bytes) -> None:
        """Answer Auth or AuthResponse with a 334 (RFC 4954 4)."""
        if self._answered is not ServerSession._auth_answered:
            raise RuntimeError("no authentication is under way")
        self._answered = None
        self._emit(b"334 " + binascii.b2a_base64(data, newline=False) + b"\r\n")
        self._state = _AUTH_STATE
        self.wire.expect_line()

    def authenticated(self, identity: str, reply: Reply = replies.AUTHENTICATED) -> None:
        """Answer Auth or AuthResponse with a 235: the client has proved to be `identity`."""
        self.transaction.identity = identity
        self._choose_table()
        self.reply(reply)

    def tls_started(self, info: TlsInfo) -> None:
        """Start over inside TLS: nothing that was said before it is known any more (RFC 3207 4.2)."""
        self.wire.drop_input()
        self.wire.expect_commands()
        transaction = self.transaction
        transaction.reset()
        transaction.hello = ""
        transaction.is_esmtp = False
        transaction.identity = None
        transaction.tls = info
        self._choose_table()
        if self._state is not _OPENED:  # implicit TLS has not been greeted yet
            self._enter(_HELLO)

    def obey(self) -> Event | None:
        """Answer Command: do what it asks for. Return the MessageAborted of a RSET that ended a text."""
        command = self._event
        if self._answered is None or not isinstance(command, Command):
            raise RuntimeError("no command waits to be obeyed")
        self._answered = None
        return _HANDLERS[NUMBER[command.verb]](self, command.argument)

    def close_with(self, reply: Reply) -> None:
        """End the session from outside, in whatever state: a clock ran out, or the server stops (421)."""
        if self._state is not _CLOSED:
            if self._answered is None:
                self._answers_unasked()
            self._answered = None
            self._emit(reply.encoded)
            self._state = _CLOSED

    # ---- state

    def _choose_table(self) -> None:
        """Choose the table of rules for what TLS and AUTH have brought so far."""
        offer, transaction = self.offer, self.transaction
        if offer.require_tls and transaction.tls is None:
            self._table = RULES_BEFORE_TLS
        elif offer.require_auth and transaction.identity is None:
            self._table = RULES_BEFORE_AUTH
        else:
            self._table = RULES

    def _ask(self, event: Event, answered: Callable[[ServerSession, Reply], None]) -> Event:
        """Hold back all that follows until the driver has answered."""
        self._event = event
        self._answered = answered
        return event

    # ---- lines

    def _take_verb(self, verb: int, argument: bytes) -> Event | None:
        """Take a command that is not plain."""
        if verb in self.intercepted_verbs:
            return self._ask(Command(_wire.VERBS[verb], argument), ServerSession._say)
        return _HANDLERS[verb](self, argument)

    def _refuse(self, reply: Reply) -> Event | None:
        """Answer a command with an error of the client's own making; there is no event to tell of."""
        self._say(reply)
        return None

    def _take_trouble(self, token: int) -> Event | None:
        """Handle a token that a well-behaved client does not cause."""
        if token == _wire.VIOLATION:
            return MessageAborted(VIOLATION_REPLIES[self.wire.violation].text, will_be_refused=True)
        if token == _wire.TEXT_BROKEN:
            refusal = VIOLATION_REPLIES[self.wire.violation]
            self._say(Reply(refusal.code, refusal.status, refusal.text, closes=True))
            return None
        self.commands += 1
        if self._state is _AUTH_STATE:
            return self._abort_auth(replies.AUTH_LINE_TOO_LONG if token == _wire.LINE_TOO_LONG else _BAD_LINES[token])
        self.last_verb = 0
        return self._refuse(_BAD_LINES[token])

    def _unknown_verb(self, argument: bytes) -> Event | None:
        return self._refuse(replies.UNKNOWN_COMMAND)

    def _http(self, argument: bytes) -> Event | None:
        return self._refuse(replies.NOT_SMTP)

    # ---- HELO EHLO LHLO

    def _hello(self, argument: bytes) -> Event | None:
        verb = _wire.VERBS[self.last_verb]
        if (verb == "LHLO") is not self.offer.is_lmtp:
            return self._refuse(replies.UNKNOWN_COMMAND)  # RFC 2033 4.1: LHLO and nothing else
        name = parse_hello_name(argument)
        if isinstance(name, Reply):
            return self._refuse(name)
        return self._ask(Hello(verb, name), ServerSession._hello_answered)

    def _hello_answered(self, reply: Reply) -> None:
        if not reply.accepts:
            self._say(reply)
            return
        assert isinstance(self._event, Hello)
        transaction = self.transaction
        transaction.reset()  # RFC 5321 4.1.4: EHLO is an implicit RSET
        transaction.hello = self._event.name
        transaction.is_esmtp = self._event.verb != "HELO"
        self._enter(_READY)
        if transaction.is_esmtp:
            answer = self.offer.ehlo_answer(
                tls=transaction.tls is not None, authenticated=transaction.identity is not None
            )
        else:
            answer = self.offer.helo_answer
        self._emit(answer)

    # ---- MAIL RCPT

    def _parse_mail(self, argument: bytes) -> Mail | Reply:
        """Read a MAIL that is not plain."""
        transaction = self.transaction
        return parse_any_mail(argument, self.offer, esmtp=transaction.is_esmtp, tls=transaction.tls is not None)

    def _parse_rcpt(self, argument: bytes) -> Rcpt | Reply:
        """Read a RCPT that is not plain."""
        transaction = self.transaction
        return parse_any_rcpt(
            argument, self.offer, esmtp=transaction.is_esmtp, smtputf8=transaction.parameters.smtputf8
        )

    # ---- the end of a text

    def _ends_message(self) -> bool:
        """Say whether the text that has just ended was all of a message."""
        return self._state is not _OCTETS or (self._chunk_is_last and self._chunk_refusal is None)

    def _end_text(self) -> Event | None:
        """Handle the end of a chunk, or of a text that broke a rule."""
        if self._state is _OCTETS:
            return self._end_chunk()
        self._refuse_message(VIOLATION_REPLIES[self.wire.violation])
        return None

    def _refuse_message(self, reply: Reply) -> None:
        """Refuse a message whose text has ended, for every recipient (RFC 2033 4.2)."""
        times = len(self.transaction.recipients) if self.offer.is_lmtp else 1
        self._end_transaction()
        for _ in range(times):
            self._say(reply)

    # ---- BDAT (RFC 3030)

    def _bdat(self, argument: bytes) -> Event | None:
        if not self.offer.chunking:
            return self._refuse(_BDAT_NOT_OFFERED)
        words = argument.upper().split()
        is_last = len(words) == 2 and words[1] == b"LAST"
        if not (len(words) == 1 or is_last) or not words[0].isdigit() or len(words[0]) > _MAX_BDAT_DIGITS:
            return self._refuse(_BDAT_WITHOUT_LENGTH)  # rule 5: where the octets end nobody can say
        octets = int(words[0])
        self._chunk_is_last = is_last
        refusal = self._rules[_BDAT]
        if refusal is not None:
            self._swallow(octets, refusal)
            return None
        if self._state is _RCPT:
            self._event = event = BeginData(octets if is_last else self.transaction.parameters.size)
            self._answered = lambda session, reply: session._bdat_answered(octets, reply)
            return event
        self._take_chunk(octets, first=False)
        return None

    def _bdat_answered(self, octets: int, reply: Reply) -> None:
        if reply.accepts:
            self._take_chunk(octets, first=True)
        else:
            self._swallow(octets, reply)

    def _take_chunk(self, octets: int, *, first: bool) -> None:
        self._state = _OCTETS
        self._chunk_refusal = None
        if first:
            self._text_begins()
        is_text = self.transaction.parameters.body_type != "BINARYMIME"
        self.wire.expect_octets(octets, last=self._chunk_is_last, text=is_text, first=first)

    def _swallow(self, octets: int, refusal: Reply) -> None:
        """Read the octets of a refused BDAT before saying so: they must not be taken for commands."""
        self._chunk_refusal = refusal
        self._state = _OCTETS
        self.wire.expect_octets(octets, first=True, drop=True)

    def _end_chunk(self) -> Event | None:
        wire = self.wire
        refusal = self._chunk_refusal
        if refusal is None and wire.violation:
            refusal = VIOLATION_REPLIES[wire.violation]
        if refusal is not None:
            self._end_refused_chunk(refusal)
            return None
        if not self._chunk_is_last:
            self._say(Reply(250, "2.0.0", f"{wire.octets} octets received"))
            self._enter(_CHUNKS)
            return None
        return self._ask(EndOfMessage(wire.octets), _message_answered)

    def _end_refused_chunk(self, refusal: Reply) -> None:
        transaction = self.transaction
        if transaction.sender is None:  # there is no transaction that could be over
            self._enter(_READY if transaction.hello else _HELLO)
            self._say(refusal)
        elif not transaction.recipients:
            self._enter(_MAIL)
            self._say(refusal)
        elif self._chunk_is_last and self._table[_REFUSED][_BDAT] is not refusal:
            self._refuse_message(refusal)
        else:
            self._enter(_REFUSED)
            self._say(refusal)

    # ---- RSET NOOP QUIT VRFY EXPN HELP

    def _rset(self, argument: bytes) -> Event | None:
        if argument:
            return self._refuse(replies.NO_ARGUMENT_ALLOWED)
        had_body = self._state is _CHUNKS
        self.transaction.reset()
        if self._state is not _HELLO:
            self._enter(_READY)
        self._say(replies.RESET_OK)
        return MessageAborted("RSET") if had_body else None

    def _noop(self, argument: bytes) -> None:
        self._say(replies.OK)  # RFC 5321 4.1.1.9: an argument is ignored

    def _vrfy(self, argument: bytes) -> Event | None:
        if not argument:
            return self._refuse(replies.BAD_ARGUMENT)
        if not self.offer.can_verify:
            self._say(replies.CANNOT_VERIFY)  # RFC 5321 3.5.3
            return None
        return self._ask(Verify(argument.decode("utf-8", "replace")), ServerSession._say)

    def _expn(self, argument: bytes) -> Event | None:
        if not self.offer.expn:
            return self._refuse(replies.NOT_IMPLEMENTED)
        if not argument:
            return self._refuse(replies.BAD_ARGUMENT)
        if not self.offer.can_expand:
            self._say(replies.CANNOT_EXPAND)
            return None
        return self._ask(Expand(argument.decode("utf-8", "replace")), ServerSession._say)

    def _help(self, argument: bytes) -> None:
        self._say(help_reply(argument, is_lmtp=self.offer.is_lmtp))

    # ---- STARTTLS (RFC 3207)

    def _starttls(self, argument: bytes) -> Event | None:
        if argument:
            return self._refuse(replies.NO_ARGUMENT_ALLOWED)
        if self.transaction.tls is not None:
            return self._refuse(replies.TLS_ALREADY)
        if not self.offer.starttls:
            return self._refuse(replies.NOT_IMPLEMENTED)
        if self.wire.waiting:
            # What is behind it came without TLS and would be obeyed inside it (CVE-2011-0411).
            self.wire.drop_input()
            return self._refuse(replies.INPUT_BEHIND_STARTTLS)
        return self._ask(StartTls(), ServerSession._starttls_answered)

    def _starttls_answered(self, reply: Reply) -> None:
        self._say(reply)
        if reply.accepts:
            self._state = _TLS_STATE

    # ---- AUTH (RFC 4954)

    def _auth(self, argument: bytes) -> Event | None:
        offer, transaction = self.offer, self.transaction
        words = argument.split()
        if not offer.mechanisms:
            return self._refuse(replies.AUTH_NOT_HERE)
        if not transaction.is_esmtp:
            return self._refuse(replies.EHLO_FIRST)
        if transaction.identity is not None:
            return self._refuse(replies.AUTH_ALREADY)
        if not 1 <= len(words) <= 2:
            return self._refuse(replies.BAD_ARGUMENT)
        mechanism = words[0].decode("ascii", "replace").upper()
        if mechanism not in offer.mechanisms:
            return self._refuse(replies.UNKNOWN_MECHANISM)
        if mechanism not in offer.mechanisms_for(tls=transaction.tls is not None):
            return self._refuse(replies.AUTH_NEEDS_TLS)
        initial: bytes | None = None
        if len(words) == 2:
            initial = b"" if words[1] == b"=" else _decode_base64(words[1])
            if initial is None:
                return self._refuse(replies.BAD_BASE64)
        return self._ask(Auth(mechanism, initial), _auth_answered)

    def _take_auth_line(self, line: bytes) -> Event:
        if line == b"*":
            return self._abort_auth(replies.AUTH_CANCELLED)
        data = _decode_base64(line)
        if data is None:
            return self._abort_auth(replies.BAD_BASE64)
        return self._ask(AuthResponse(data), _auth_answered)

    def _abort_auth(self, reply: Reply) -> Event:
        self.wire.expect_commands()
        self._enter(_READY)
        self._say(reply)
        return AuthAborted()

    def _auth_answered(self, reply: Reply) -> None:
        self.wire.expect_commands()
        self._enter(_READY)
        self._emit(reply.encoded)
        if reply.closes:
            self._state = _CLOSED
        elif reply.code == 535:
            self._auth_failures += 1
            if self._auth_failures >= self.offer.max_auth_failures:
                self.close_with(replies.TOO_MANY_AUTH_FAILURES)


def _decode_base64(text: bytes) -> bytes | None:
    """Decode strictly (RFC 4648 4); None when it is not base64."""
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        return None


_message_answered = ServerSession._message_answered
_auth_answered = ServerSession._auth_answered

_BDAT: Final = NUMBER["BDAT"]
_HANDLERS: Final[dict[int, Callable[[ServerSession, bytes], Event | None]]] = {
    NUMBER[verb]: handler
    for verb, handler in {
        "": ServerSession._unknown_verb,
        "HELO": ServerSession._hello,
        "EHLO": ServerSession._hello,
        "LHLO": ServerSession._hello,
        "BDAT": ServerSession._bdat,
        "RSET": ServerSession._rset,
        "NOOP": ServerSession._noop,
        "VRFY": ServerSession._vrfy,
        "EXPN": ServerSession._expn,
        "HELP": ServerSession._help,
        "AUTH": ServerSession._auth,
        "STARTTLS": ServerSession._starttls,
        "HTTP": ServerSession._http,
    }.items()
}
