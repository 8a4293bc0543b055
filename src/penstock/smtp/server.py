"""The server side of SMTP and LMTP: octets in, events out, replies back. No I/O, no clock.

    session = ServerSession(extensions, wire, transaction)
    session.greet()
    while True:
        event = session.next_event()
        if event is NEED_DATA: send session.take_output(), then session.receive(more input)
        elif event is CLOSED:  send session.take_output(), then close
        else:                  session.reply(the decision of the driver)

Rules
-----
1. The next event is returned only after the last one was answered. Pipelined input after it is not parsed before,
   because the reply decides how it is parsed.
2. The *reply* changes the state: an event is a request, and a refusal leaves everything unchanged.
3. Replies are collected while there is more input, so that pipelined commands cost one send (RFC 2920 3.2).
4. Each command gets one reply, and so does each message (in LMTP one for each recipient), whatever its text contains.
5. If the end of a text is not known for certain (a BDAT without a length, a refused text whose end the two sides see at
   different places), the session ends: the text of a message is never executed as a command.
6. The limits (errors, unknown recipients, commands without mail, failed authentications, messages) apply to the
   connection: neither RSET nor EHLO nor STARTTLS resets them.
7. Events in `auto_accept` are not returned: the session accepts them. State, transaction and replies are the same as if
   the driver had accepted them.

This file is compiled (server.pxd has the C types): nearly all clients send the same six commands in their plainest
form, and their cost is most of the cost of a server. penstock.smtp._grammar parses their arguments;
penstock.smtp.grammar parses all other forms.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import cython  # type: ignore[import-untyped]  # it has no types, and is not needed at run time

from penstock import reply as replies
from penstock.message import NO_PARAMETERS
from penstock.reply import Reply
from penstock.smtp import _wire
from penstock.smtp.events import (
    CLOSED,
    NEED_DATA,
    TURN_OVER,
    Auth,
    AuthAborted,
    AuthResponse,
    BeginData,
    BodyChunk,
    Command,
    EndOfMessage,
    Event,
    Expand,
    Hello,
    Mail,
    MessageAborted,
    Quit,
    Rcpt,
    StartTls,
    Verify,
)
from penstock.smtp.extensions import Extensions
from penstock.smtp.grammar import parse_hello_name, parse_mail, parse_rcpt
from penstock.smtp.helptext import help_reply
from penstock.smtp.sasl import decode_response
from penstock.smtp.states import (
    ARGUMENT_LIMIT,
    AUTH_LINE_LIMIT,
    LINE_LIMIT,
    LMTP,
    LONGER_LINES,
    NUMBER,
    SMTP,
    Rules,
    State,
    Table,
)

if TYPE_CHECKING:
    from penstock.message import Recipient
    from penstock.transaction import TlsInfo, Transaction

if not cython.compiled:  # compiled, these are the C constants and functions of server.pxd
    from penstock.smtp._grammar import plain_hello, plain_mail, plain_recipient
    from penstock.smtp._wire import CHUNK as T_CHUNK
    from penstock.smtp._wire import COMMAND as T_COMMAND
    from penstock.smtp._wire import NEED_DATA as T_NEED_DATA
    from penstock.smtp._wire import TEXT_BROKEN as T_TEXT_BROKEN
    from penstock.smtp._wire import TEXT_END as T_TEXT_END
    from penstock.smtp._wire import VIOLATION as T_VIOLATION

    V_HELO, V_EHLO, V_MAIL, V_RCPT, V_DATA, V_BDAT, V_QUIT = 1, 2, 4, 5, 6, 7, 10
    P_MESSAGE, P_BDAT, P_UNASKED = 17, 7, 22

# Events that the session can accept without the driver: bits of `auto_accept`.
AUTO_ACCEPT_HELLO: Final = 1
AUTO_ACCEPT_MAIL: Final = 2
AUTO_ACCEPT_RCPT: Final = 4
AUTO_ACCEPT_QUIT: Final = 8

_SLOW_COMMAND: Final = 8
"""Commands of a turn that a MAIL or RCPT with the whole grammar counts for: it takes about as long."""
OUTPUT_TAKEN: Final = -1
"""Argument of the observer before the output is taken; otherwise it is a token of the wire."""

VIOLATION_REPLIES: Final[dict[int, Reply]] = {
    _wire.BARE_LF: replies.BARE_LF_IN_TEXT,
    _wire.BARE_CR: replies.BARE_CR_IN_TEXT,
    _wire.NUL: replies.NUL_IN_TEXT,
    _wire.LONG_LINE: replies.LONG_LINE_IN_TEXT,
    _wire.TOO_BIG: replies.TOO_BIG,
}
"""The reply to a text that breaks a rule of the wire."""

_BAD_LINES: Final[dict[int, Reply]] = {
    _wire.LINE_TOO_LONG: replies.LINE_TOO_LONG,
    _wire.LINE_BAD_END: replies.BAD_LINE_END,
    _wire.LINE_NUL: replies.NUL_IN_COMMAND,
}
_BDAT_WITHOUT_LENGTH: Final = Reply(501, "5.5.4", "BDAT needs the number of octets", closes=True)
_BDAT_NOT_OFFERED: Final = Reply(502, "5.5.1", "BDAT is not offered here", closes=True)
_MAX_BDAT_DIGITS: Final = 18
INTERCEPTABLE_VERBS: Final = frozenset(NUMBER[verb] for verb in ("RSET", "NOOP", "VRFY", "EXPN", "HELP"))
"""Verbs that a session answers itself unless its driver intercepts them."""
NO_VERBS: Final[frozenset[int]] = frozenset()
_JUNK: Final = frozenset(NUMBER[verb] for verb in ("HELO", "EHLO", "LHLO", "RSET", "NOOP", "VRFY", "EXPN", "HELP"))
"""Verbs without mail, whose number is limited (Postfix smtpd_junk_command_limit)."""

_FOR_MESSAGE, _FOR_DATA, _FOR_MAIL, _FOR_RCPT, _FOR_HELLO, _FOR_CHUNK, _FOR_TLS, _FOR_AUTH, _FOR_COMMAND = range(1, 10)
"""The kinds of events that wait for a reply; 0: none waits."""

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

_BEGIN_DATA: Final = BeginData(None)
_QUIT: Final = Quit()


class ServerSession:
    """One session. The top of this file describes how to drive it, server.pxd has the C types of its attributes."""

    extensions: Extensions
    """What the listener offers, and its limits."""
    wire: _wire.Wire
    transaction: Transaction
    """Facts about the client and its open transaction, which the session writes."""
    auto_accept: int
    """Events that the session accepts without the driver: bits AUTO_ACCEPT_..."""
    intercepted_verbs: frozenset[int]
    """Numbers of the verbs that the driver gets as Command, among INTERCEPTABLE_VERBS."""
    watched_prefixes: tuple[str, ...] | None
    """See `watch`."""
    first_letters: str | None
    """The first letters of the watched prefixes."""
    observer: Callable[[int], object] | None
    """Called with each token of the wire before it is handled, and with OUTPUT_TAKEN before the output is taken."""
    metrics: Any
    """The SessionMetrics that count replies and latencies (penstock.metrics); None counts nothing."""
    turn_limit: int
    """Commands that one call of `next_event` may answer; costly ones count several times. 0: no limit."""
    commands: int
    """Lines read so far."""
    errors: int
    """Replies 5xx so far, except for unknown recipients."""
    unknown: int
    """Recipients refused with 5xx so far."""
    junk: int
    """Commands without mail since the last MAIL."""
    last_verb: int
    """The number of the last verb, for the journal."""
    has_quit: bool
    output_octets: int
    """Octets of the replies since the output was last taken."""
    _output: list[bytes]
    _state: Any
    """A State; declared as Any because mypy would assume that no call changes it."""
    _table: Table
    _rules: Rules
    _event: Any
    """The event that waits for its reply."""
    _waiting: int
    """The kind of that event, one of _FOR_...; 0 without one."""
    tolerated: tuple[str, ...]
    """Tolerated irregularities of MAIL and RCPT in this transaction (penstock.smtp.grammar)."""
    _mails: int
    _auth_failures: int
    _chunk_is_last: bool
    _chunk_octets: int
    _chunk_refusal: Reply | None

    def __init__(
        self, extensions: Extensions, wire: _wire.Wire, transaction: Transaction, auto_accept: int = 0
    ) -> None:
        """`auto_accept`: the events that the session accepts without the driver, bits `AUTO_ACCEPT_...`."""
        self.extensions = extensions
        self.wire = wire
        self.transaction = transaction
        self.auto_accept = auto_accept
        self.intercepted_verbs = NO_VERBS
        self._output: list[bytes] = []
        self._state = _OPENED
        self._greeting = extensions.greeting
        self._is_lmtp = extensions.is_lmtp
        self._eightbitmime = extensions.eightbitmime
        self._max_size = extensions.max_size
        self._max_recipients = extensions.max_recipients
        self._max_messages = extensions.max_messages
        self._max_errors = extensions.max_errors
        self._max_unknown = extensions.max_unknown
        self._max_junk = extensions.max_junk
        transaction.is_lmtp = extensions.is_lmtp
        wire.set_line_limit(AUTH_LINE_LIMIT if extensions.mechanisms else LINE_LIMIT + LONGER_LINES["MAIL"])
        self._choose_table()
        self._rules = self._table[_HELLO]

    def fresh(self, wire: _wire.Wire, transaction: Transaction) -> ServerSession:
        """Return a new session with the settings of this one, at a fraction of the cost of the constructor.

        `wire`: made by `fresh` of this session's wire.
        """
        other: ServerSession = type(self).__new__(type(self))
        other.extensions = self.extensions
        other.wire = wire
        other.transaction = transaction
        other.auto_accept = self.auto_accept
        other.intercepted_verbs = self.intercepted_verbs
        other.watched_prefixes = self.watched_prefixes
        other.first_letters = self.first_letters
        other._output = []
        other._state = _OPENED
        other._table = self._table
        other._rules = self._rules
        other._greeting = self._greeting
        other._is_lmtp = self._is_lmtp
        other._eightbitmime = self._eightbitmime
        other._max_size = self._max_size
        other._max_recipients = self._max_recipients
        other._max_messages = self._max_messages
        other._max_errors = self._max_errors
        other._max_unknown = self._max_unknown
        other._max_junk = self._max_junk
        transaction.is_lmtp = self._is_lmtp
        return other

    # ---- the driver's side

    @property
    def state(self) -> State:
        """The state of the session."""
        return self._state  # type: ignore[no-any-return]

    @property
    def in_body(self) -> bool:
        """A message is being received: its text, or the commands between its BDAT chunks."""
        return self._state in (_BODY, _OCTETS, _CHUNKS)

    @property
    def replies_waiting(self) -> list[bytes]:
        """The replies since the output was last taken. Do not change the list."""
        return self._output

    def watch(self, prefixes: tuple[str, ...] | None) -> None:
        """Return an event for recipients whose local part begins with one of these, even with AUTO_ACCEPT_RCPT.

        Raise ValueError for a prefix that is empty or does not begin with an ASCII character.
        """
        letters = set()
        for prefix in prefixes or ():
            if not prefix[:1].isascii() or not prefix:
                raise ValueError(f"a watched prefix must begin with an ASCII character, not {prefix!r}")
            letters.add(prefix[0])
        self.watched_prefixes = prefixes
        self.first_letters = "".join(sorted(letters))

    def greet(self, refusal: Reply | None = None) -> None:
        """Send the greeting (RFC 5321 4.2), or in its place a refusal (421 or 554), which ends the session."""
        if refusal is None:
            self.send_encoded(self._greeting)
            self.enter(_HELLO)
        else:
            self.send_encoded(refusal.encoded)
            self._state = _CLOSED

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Parse octets later, with `next_event`. Drivers with a socket let the wire receive them instead."""
        self.wire.feed(data)

    def take_output(self) -> bytes:
        """Return the replies since the last call, and clear the output."""
        data = b""
        if self.observer is not None:
            self.observer(OUTPUT_TAKEN)
        if self._output:
            data = self._output[0] if len(self._output) == 1 else b"".join(self._output)
            self._output.clear()
            self.output_octets = 0
        if self.metrics is not None:
            self.metrics.end_turn(len(data))
            if self._waiting:
                self.metrics.in_turn = True  # the replies are for earlier commands; this one is still timed
        return data

    def next_event(self) -> Event:
        """Return the next event. Raise RuntimeError while an event waits for its reply.

        With NEED_DATA the wire has released its buffer, unless it has the beginning of a line. After `turn_limit`
        commands (0: no limit) TURN_OVER is returned: there may be more input, but other sessions should run first.
        """
        if self._waiting:
            raise RuntimeError(f"{self._event} was not answered")
        if self.metrics is not None and not self.metrics.in_turn:
            self.metrics.begin_turn()
        self._turn_left = self.turn_limit
        while self._state is not _CLOSED:
            token = self.wire.next()
            if self.observer is not None:
                self.observer(token)
            if token == T_COMMAND:
                event = self.take_line()
                if event is None:
                    self._turn_left -= 1
                    if self._turn_left <= 0 and self.turn_limit > 0 and self._state is not _CLOSED:
                        return TURN_OVER
            elif token == T_NEED_DATA:
                self.wire.rest()
                return NEED_DATA
            elif token == T_CHUNK:
                return BodyChunk(self.wire.chunk)
            elif token == T_TEXT_END:
                event = self.take_text_end()
            else:
                event = self.take_violation(token)
            if event is not None:
                return event
        return CLOSED

    def reply(self, reply: Reply) -> None:
        """Reply to the last event; each event documents its replies. Raise RuntimeError if none waits."""
        waiting = self._waiting
        self._waiting = 0
        if waiting == _FOR_MESSAGE:
            self.reply_to_message(reply)
        elif waiting == _FOR_DATA:
            self.reply_to_data(reply)
        elif waiting == _FOR_RCPT:
            self.reply_to_rcpt(reply)
        elif waiting == _FOR_MAIL:
            self.send(reply)
            if reply.code < 400:
                self.begin_transaction(self._event)
        elif waiting == _FOR_HELLO:
            self.reply_to_hello(reply)
        elif waiting == _FOR_CHUNK:
            self.reply_to_chunk(reply)
        elif waiting == _FOR_AUTH:
            self.reply_to_auth(reply)
        elif waiting == _FOR_TLS:
            self.send(reply)
            if reply.accepts:
                self._state = _TLS_STATE
        elif waiting == _FOR_COMMAND:
            self.send(reply)
        else:
            raise RuntimeError("no event waits for a reply")

    def challenge(self, data: bytes) -> None:
        """Answer Auth or AuthResponse with a 334 (RFC 4954 4)."""
        if self._waiting != _FOR_AUTH:
            raise RuntimeError("no authentication is under way")
        self._waiting = 0
        self.send_encoded(b"334 " + binascii.b2a_base64(data, newline=False) + b"\r\n")
        self._state = _AUTH_STATE
        self.wire.expect_line()

    def authenticated(self, identity: str, reply: Reply = replies.AUTHENTICATED) -> None:
        """Answer Auth or AuthResponse with a 235: the client has proved to be `identity`."""
        self.transaction.identity = identity
        self._choose_table()
        self.reply(reply)

    def tls_started(self, info: TlsInfo) -> None:
        """Start over after the TLS handshake: everything the client sent before it is discarded (RFC 3207 4.2)."""
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
            self.enter(_HELLO)

    def execute(self) -> Event | None:
        """Answer Command as if it had not been intercepted. Return the MessageAborted of a RSET that ended a text."""
        command = self._event
        if not self._waiting or not isinstance(command, Command):
            raise RuntimeError("no command waits to be executed")
        self._waiting = 0
        return _HANDLERS[NUMBER[command.verb]](self, command.argument)

    def close_with(self, reply: Reply) -> None:
        """End the session in any state, with a reply such as the 421 of a timeout or a shutdown."""
        if self._state is not _CLOSED:
            if not self._waiting and self.metrics is not None:
                self.metrics.phase = P_UNASKED
            self._waiting = 0
            self.send_encoded(reply.encoded)
            self._state = _CLOSED

    # ---- state and replies

    def enter(self, state: State) -> None:
        """Change to a state in which commands are read."""
        self._state = state
        self._rules = self._table[state]

    def send_encoded(self, encoded: bytes) -> None:
        """Add an encoded reply to the output. All replies are added here."""
        self._output.append(encoded)
        self.output_octets += len(encoded)
        if self.metrics is not None:
            self.metrics.replied(encoded)

    def send(self, reply: Reply) -> None:
        """Add a reply to the output; end the session if the reply `closes`, or after too many errors."""
        self.send_encoded(reply.encoded)
        if reply.closes:
            self._state = _CLOSED
        elif reply.code >= 500:
            self.count_error()

    def count_error(self) -> None:
        """Count an error of the client; too many of them end the session (Postfix smtpd_hard_error_limit)."""
        self.errors += 1
        if self.errors > self._max_errors:
            self.close_with(replies.TOO_MANY_ERRORS)

    def is_too_much_junk(self) -> bool:
        """Count a command without mail; beyond the limit it is an error. Return True if that ends the session."""
        self.junk += 1
        if self.junk <= self._max_junk:
            return False
        self.count_error()
        return self._state is _CLOSED

    def _choose_table(self) -> None:
        """Choose the table of rules for the present state of TLS and AUTH."""
        extensions, transaction = self.extensions, self.transaction
        tables = LMTP if self._is_lmtp else SMTP
        if extensions.require_tls and transaction.tls is None:
            self._table = tables.before_tls
        elif extensions.require_auth and transaction.identity is None:
            self._table = tables.before_auth
        else:
            self._table = tables.ordinary

    def _ask(self, event: Event, waiting: int) -> Event:
        """Return an event to the driver; nothing more is parsed before its reply."""
        self._event = event
        self._waiting = waiting
        return event

    def _refuse(self, reply: Reply) -> Event | None:
        """Refuse a command; the driver gets no event."""
        self.send(reply)
        return None

    # ---- lines

    def take_line(self) -> Event | None:
        """Read a command. Return its event, None if the session has replied."""
        argument = self.wire.argument
        verb = self.wire.verb
        self.commands += 1
        if self._state is _AUTH_STATE:
            return self._take_auth_line(argument)
        self.last_verb = verb
        if self.metrics is not None:
            self.metrics.phase = verb
        refusal = self._rules[verb]
        if len(argument) > ARGUMENT_LIMIT[verb]:
            self.send(replies.LINE_TOO_LONG)
        elif refusal is not None and verb != V_BDAT:  # octets follow a BDAT even where it is refused
            self.send(refusal)
        elif verb == V_RCPT:
            return self.take_rcpt(argument)
        elif verb == V_MAIL:
            return self.take_mail(argument)
        elif verb == V_DATA:
            return self.take_data(argument)
        elif verb in (V_EHLO, V_HELO):
            return self.take_hello(verb, argument)
        elif verb == V_QUIT:
            return self.take_quit(argument)
        else:
            return self.take_other(verb, argument)
        return None

    def take_other(self, verb: int, argument: bytes) -> Event | None:
        """Read a command other than the frequent ones."""
        if verb in _JUNK and self.is_too_much_junk():
            return None
        if verb in self.intercepted_verbs:
            return self._ask(Command(_wire.VERBS[verb], argument), _FOR_COMMAND)
        return _HANDLERS[verb](self, argument)

    def take_violation(self, token: int) -> Event | None:
        """Handle a token that only faulty clients cause."""
        if token == T_VIOLATION:
            return MessageAborted(VIOLATION_REPLIES[self.wire.violation].text, will_be_refused=True)
        if token == T_TEXT_BROKEN:
            if self.metrics is not None:
                self.metrics.text_ends(P_MESSAGE)
            refusal = VIOLATION_REPLIES[self.wire.violation]
            self._end_message(Reply(refusal.code, refusal.status, refusal.text, closes=True))
            return None
        self.commands += 1
        if self._state is _AUTH_STATE:
            return self._abort_auth(replies.AUTH_LINE_TOO_LONG if token == _wire.LINE_TOO_LONG else _BAD_LINES[token])
        if self.metrics is not None:
            self.metrics.phase = 0
        self.last_verb = 0
        return self._refuse(_BAD_LINES[token])

    def _unknown_verb(self, argument: bytes) -> Event | None:
        return self._refuse(replies.UNKNOWN_COMMAND)

    def _http(self, argument: bytes) -> Event | None:
        return self._refuse(replies.NOT_SMTP)

    # ---- HELO EHLO LHLO

    def take_hello(self, verb: int, argument: bytes) -> Event | None:
        """Read a HELO or EHLO; reply to a plain one if HELO is in `auto_accept`."""
        # After part of a message the driver must discard its body, so it gets the event.
        if (
            self.auto_accept & AUTO_ACCEPT_HELLO
            and not self._is_lmtp
            and (self._state is _HELLO or self._state is _READY)
        ):
            name = plain_hello(argument)
            if name is not None:
                if not self.is_too_much_junk():
                    self.accept_hello(verb, name)
                return None
        return self.take_other(verb, argument)

    def accept_hello(self, verb: int, name: str) -> None:
        """Answer HELO, EHLO or LHLO."""
        transaction = self.transaction
        transaction.forget()  # RFC 5321 4.1.4: EHLO is an implicit RSET
        transaction.hello = name
        transaction.is_esmtp = verb != V_HELO
        self.enter(_READY)
        if verb == V_HELO:
            self.send_encoded(self.extensions.helo_answer)
        else:
            has_tls, has_identity = transaction.tls is not None, transaction.identity is not None
            self.send_encoded(self.extensions.ehlo_answer(tls=has_tls, authenticated=has_identity))

    def _hello(self, argument: bytes) -> Event | None:
        verb = _wire.VERBS[self.last_verb]
        if (verb == "LHLO") is not self._is_lmtp:  # RFC 2033 4.1: LHLO and nothing else
            return self._refuse(replies.NOT_ESMTP if self._is_lmtp else replies.NOT_LMTP)
        name = parse_hello_name(argument, tolerant=self.extensions.tolerant_addresses)
        if isinstance(name, Reply):
            return self._refuse(name)
        return self._ask(Hello(verb, name), _FOR_HELLO)

    def reply_to_hello(self, reply: Reply) -> None:
        """Answer Hello."""
        if reply.accepts:
            self.accept_hello(NUMBER[self._event.verb], self._event.name)
        else:
            self.send(reply)

    # ---- MAIL RCPT

    def take_mail(self, argument: bytes) -> Event | None:
        """Read a MAIL."""
        if self._max_messages and self._mails >= self._max_messages:
            self.send(replies.TOO_MANY_MESSAGES)
            return None
        transaction = self.transaction
        mail = plain_mail(argument, transaction.is_esmtp, self._eightbitmime, self._max_size)
        if mail is None:
            self._turn_left -= _SLOW_COMMAND - 1
            mail = parse_mail(argument, self.extensions, esmtp=transaction.is_esmtp, tls=transaction.tls is not None)
        if not isinstance(mail, Mail):
            self.send(mail)
            return None
        if self._state is _REFUSED or not self.auto_accept & AUTO_ACCEPT_MAIL:
            transaction.forget()  # the rest of a refused BDAT, or of a MAIL that a policy refused
        if self.auto_accept & AUTO_ACCEPT_MAIL:
            self.send_encoded(replies.SENDER_OK.encoded)
            self.begin_transaction(mail)
            return None
        self._event = mail
        self._waiting = _FOR_MAIL
        return mail

    def begin_transaction(self, mail: Mail) -> None:
        """Open a transaction: MAIL was accepted."""
        transaction = self.transaction
        self._mails += 1
        self.junk = 0
        transaction.sender = mail[0]
        transaction.parameters = mail[1]
        self.tolerated = mail[2]
        self.enter(_MAIL)

    def take_rcpt(self, argument: bytes) -> Event | None:
        """Read a RCPT."""
        if len(self.transaction.recipients) >= self._max_recipients:
            self.send(replies.TOO_MANY_RECIPIENTS)  # RFC 5321 4.5.3.1.10
            return None
        recipient = plain_recipient(argument)
        if recipient is None:
            transaction = self.transaction
            self._turn_left -= _SLOW_COMMAND - 1
            rcpt = parse_rcpt(
                argument, self.extensions, esmtp=transaction.is_esmtp, smtputf8=transaction.parameters.smtputf8
            )
            if not isinstance(rcpt, Rcpt):
                self.send(rcpt)
                return None
            recipient = rcpt[0]
            if rcpt[1]:
                self.tolerated += rcpt[1]
        if self.auto_accept & AUTO_ACCEPT_RCPT and not (self.first_letters and self._is_watched(recipient[0][1])):
            self.send_encoded(replies.RECIPIENT_OK.encoded)
            self.add_recipient(recipient)
            return None
        event = Rcpt(recipient)
        self._event = event
        self._waiting = _FOR_RCPT
        return event

    def _is_watched(self, local: str) -> bool:
        letters, prefixes = self.first_letters, self.watched_prefixes
        return letters is not None and prefixes is not None and local[:1] in letters and local.startswith(prefixes)

    def reply_to_rcpt(self, reply: Reply) -> None:
        """Answer Rcpt."""
        self.send_encoded(reply.encoded)
        if reply.code < 300:
            self.add_recipient(self._event[0])
        elif reply.closes:
            self._state = _CLOSED
        elif reply.code >= 500:
            # Not counted as errors: a list with a few dead addresses is no attack, a directory harvest is.
            self.unknown += 1
            if self.unknown > self._max_unknown:
                self.close_with(replies.TOO_MANY_UNKNOWN)

    def add_recipient(self, recipient: Recipient) -> None:
        """Add an accepted recipient to the transaction."""
        self.transaction.recipients.append(recipient)
        if self._state is not _RCPT:
            self.enter(_RCPT)

    # ---- DATA and the end of a text

    def take_data(self, argument: bytes) -> Event | None:
        """Read a DATA."""
        parameters = self.transaction.parameters
        if argument:
            self.send(replies.NO_ARGUMENT_ALLOWED)
            return None
        if parameters is NO_PARAMETERS:
            event = _BEGIN_DATA
        elif parameters.body_type == "BINARYMIME":
            self.send(replies.BINARYMIME_NEEDS_BDAT)  # RFC 3030 3
            return None
        else:
            event = BeginData(parameters.size)
        self._event = event
        self._waiting = _FOR_DATA
        return event

    def reply_to_data(self, reply: Reply) -> None:
        """Answer BeginData after DATA."""
        self.send(reply)
        if reply.code < 400:
            self._state = _BODY
            self.wire.expect_text()
            if self.metrics is not None:
                self.metrics.text_begins()

    def take_text_end(self) -> Event | None:
        """Handle the end of a text, or of a BDAT chunk."""
        if self._state is _OCTETS:
            if self.metrics is not None:
                ends_message = self._chunk_is_last and self._chunk_refusal is None
                self.metrics.text_ends(P_MESSAGE if ends_message else P_BDAT)
            return self._end_chunk()
        if self.metrics is not None:
            self.metrics.text_ends(P_MESSAGE)
        if self.wire.violation:
            self._end_message(VIOLATION_REPLIES[self.wire.violation])
            return None
        event = self._event = EndOfMessage(self.wire.octets)
        self._waiting = _FOR_MESSAGE
        return event

    def reply_to_message(self, reply: Reply) -> None:
        """Answer EndOfMessage: in LMTP the same reply for every recipient (RFC 2033 4.2)."""
        if reply.code < 400 and self.metrics is not None:
            self.metrics.message(self.transaction, self.wire.octets)
        if self._is_lmtp:
            self._end_message(reply)
        else:
            self.transaction.forget()
            self.enter(_READY)
            self.send(reply)

    def _end_message(self, reply: Reply) -> None:
        """Reply to a message whose text has ended, once for each recipient in LMTP (RFC 2033 4.2)."""
        times = len(self.transaction.recipients) if self._is_lmtp else 1
        self._end_transaction()
        for _ in range(times - 1):
            self.send_encoded(reply.encoded)
        self.send(reply)  # it counts as one error of the client, for any number of recipients

    def _end_transaction(self) -> None:
        self.transaction.forget()
        self.enter(_READY)

    # ---- BDAT (RFC 3030)

    def _bdat(self, argument: bytes) -> Event | None:
        if not self.extensions.chunking:
            return self._refuse(_BDAT_NOT_OFFERED)
        words = argument.upper().split()
        is_last = len(words) == 2 and words[1] == b"LAST"
        if not (len(words) == 1 or is_last) or not words[0].isdigit() or len(words[0]) > _MAX_BDAT_DIGITS:
            return self._refuse(_BDAT_WITHOUT_LENGTH)  # rule 5: where the octets end is unknown
        octets = int(words[0])
        self._chunk_is_last = is_last
        self._chunk_octets = octets
        refusal = self._rules[V_BDAT]
        if refusal is not None:
            self._drop_chunk(octets, refusal)
            return None
        if self._state is _RCPT:
            return self._ask(BeginData(octets if is_last else self.transaction.parameters.size), _FOR_CHUNK)
        self._begin_chunk(octets, first=False)
        return None

    def reply_to_chunk(self, reply: Reply) -> None:
        """Answer BeginData after BDAT."""
        if reply.accepts:
            self._begin_chunk(self._chunk_octets, first=True)
        else:
            self._drop_chunk(self._chunk_octets, reply)

    def _begin_chunk(self, octets: int, *, first: bool) -> None:
        self._state = _OCTETS
        self._chunk_refusal = None
        if first and self.metrics is not None:
            self.metrics.text_begins()
        is_text = self.transaction.parameters.body_type != "BINARYMIME"
        self.wire.expect_octets(octets, last=self._chunk_is_last, text=is_text, first=first)

    def _drop_chunk(self, octets: int, refusal: Reply) -> None:
        """Read the octets of a refused BDAT, then refuse it: they must not be read as commands."""
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
            self.send(Reply(250, "2.0.0", f"{wire.octets} octets received"))
            self.enter(_CHUNKS)
            return None
        event = self._event = EndOfMessage(wire.octets)
        self._waiting = _FOR_MESSAGE
        return event

    def _end_refused_chunk(self, refusal: Reply) -> None:
        transaction = self.transaction
        if transaction.sender is None:  # there is no transaction to end
            self.enter(_READY if transaction.hello else _HELLO)
            self.send(refusal)
        elif not transaction.recipients:
            self.enter(_MAIL)
            self.send(refusal)
        elif self._chunk_is_last and self._table[_REFUSED][V_BDAT] is not refusal:
            self._end_message(refusal)
        else:
            self.enter(_REFUSED)
            self.send(refusal)

    # ---- RSET NOOP QUIT VRFY EXPN HELP

    def _rset(self, argument: bytes) -> Event | None:
        if argument:
            return self._refuse(replies.NO_ARGUMENT_ALLOWED)
        had_body = self._state is _CHUNKS
        self.transaction.reset()
        if self._state is not _HELLO:
            self.enter(_READY)
        self.send(replies.RESET_OK)
        return MessageAborted("RSET") if had_body else None

    def _noop(self, argument: bytes) -> Event | None:
        self.send(replies.OK)  # RFC 5321 4.1.1.9: an argument is ignored
        return None

    def take_quit(self, argument: bytes) -> Event | None:
        """Reply to QUIT. Without AUTO_ACCEPT_QUIT, or after part of a message, the driver gets an event."""
        if argument:
            self.send(replies.NO_ARGUMENT_ALLOWED)
            return None
        event = None if self.auto_accept & AUTO_ACCEPT_QUIT and self._state is not _CHUNKS else _QUIT
        self.has_quit = True
        self.send(replies.BYE)
        return event

    def _vrfy(self, argument: bytes) -> Event | None:
        if not argument:
            return self._refuse(replies.BAD_ARGUMENT)
        if not self.extensions.can_verify:
            self.send(replies.CANNOT_VERIFY)  # RFC 5321 3.5.3
            return None
        return self._ask(Verify(argument.decode("utf-8", "replace")), _FOR_COMMAND)

    def _expn(self, argument: bytes) -> Event | None:
        if not self.extensions.expn:
            return self._refuse(replies.NOT_IMPLEMENTED)
        if not argument:
            return self._refuse(replies.BAD_ARGUMENT)
        if not self.extensions.can_expand:
            self.send(replies.CANNOT_EXPAND)
            return None
        return self._ask(Expand(argument.decode("utf-8", "replace")), _FOR_COMMAND)

    def _help(self, argument: bytes) -> Event | None:
        self.send(help_reply(argument, is_lmtp=self._is_lmtp))
        return None

    # ---- STARTTLS (RFC 3207)

    def _starttls(self, argument: bytes) -> Event | None:
        if argument:
            return self._refuse(replies.NO_ARGUMENT_ALLOWED)
        if self.transaction.tls is not None:
            return self._refuse(replies.TLS_ALREADY)
        if not self.extensions.starttls:
            return self._refuse(replies.NOT_IMPLEMENTED)
        if self.wire.waiting:
            # This input was sent in clear text and would be executed inside TLS (CVE-2011-0411).
            self.wire.drop_input()
            return self._refuse(replies.INPUT_AFTER_STARTTLS)
        return self._ask(StartTls(), _FOR_TLS)

    # ---- AUTH (RFC 4954)

    def _auth(self, argument: bytes) -> Event | None:
        extensions, transaction = self.extensions, self.transaction
        words = argument.split()
        if not extensions.mechanisms:
            return self._refuse(replies.AUTH_NOT_HERE)
        if not transaction.is_esmtp:
            return self._refuse(replies.EHLO_FIRST)
        if transaction.identity is not None:
            return self._refuse(replies.AUTH_ALREADY)
        if not 1 <= len(words) <= 2:
            return self._refuse(replies.BAD_ARGUMENT)
        mechanism = words[0].decode("ascii", "replace").upper()
        if mechanism not in extensions.mechanisms:
            return self._refuse(replies.UNKNOWN_MECHANISM)
        if mechanism not in extensions.mechanisms_for(tls=transaction.tls is not None):
            return self._refuse(replies.AUTH_NEEDS_TLS)
        initial: bytes | None = None
        if len(words) == 2:
            initial = b"" if words[1] == b"=" else decode_response(words[1])
            if initial is None:
                return self._refuse(replies.BAD_BASE64)
        return self._ask(Auth(mechanism, initial), _FOR_AUTH)

    def _take_auth_line(self, line: bytes) -> Event:
        if line.rstrip(b" \t") == b"*":
            return self._abort_auth(replies.AUTH_CANCELLED)
        data = decode_response(line)
        if data is None:
            return self._abort_auth(replies.BAD_BASE64)
        return self._ask(AuthResponse(data), _FOR_AUTH)

    def _abort_auth(self, reply: Reply) -> Event:
        self.wire.expect_commands()
        self.enter(_READY)
        self.send(reply)
        self._count_auth_failure()
        return AuthAborted()

    def reply_to_auth(self, reply: Reply) -> None:
        """Answer Auth or AuthResponse with a final reply; too many failures end the session."""
        self.wire.expect_commands()
        self.enter(_READY)
        self.send_encoded(reply.encoded)
        if reply.closes:
            self._state = _CLOSED
        elif reply.is_permanent:
            self._count_auth_failure()

    def _count_auth_failure(self) -> None:
        """Count an exchange that has failed: a wrong proof, a malformed message, or cancelled by the client."""
        self._auth_failures += 1
        if self._auth_failures >= self.extensions.max_auth_failures:
            self.close_with(replies.TOO_MANY_AUTH_FAILURES)


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
