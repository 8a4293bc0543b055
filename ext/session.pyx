"""The commonest path of a session: EHLO, MAIL, RCPT, DATA, the end of the text, QUIT, as nearly all clients say them.

Theory
------
A session is pure Python (penstock.smtp.server), and so are its rules. But of a hundred commands ninety-nine are the same
six, in their plainest form, and what they cost decides what a server costs. `SessionCore` is what `ServerSession`
inherits: the state, the intake of lines, the replies, and these six. Whatever is not plain it leaves to the methods of
its heir, which is any other verb, any argument with a quoted string, a literal, UTF-8 or a parameter other than SIZE
and BODY, and all that is wrong.

Rules
-----
1. The plain form is a part of the whole grammar: `plain_mail` and `plain_rcpt` say None to what they do not know, and
   otherwise exactly what `penstock.smtp.grammar` would. A property test holds them to that.
2. An event that the driver takes no interest in (`unasked`) is answered here with the reply that accepts it, and never
   made. Nothing else differs: state, transaction and replies are the same.
3. No I/O, no clock, no policy; nothing is awaited.
"""

from penstock.metrics._session cimport P_BDAT, P_MESSAGE, P_UNASKED, SessionMetrics
from penstock._transaction cimport TransactionCore
from penstock.smtp._grammar cimport of_type, plain_hello, plain_mail, plain_recipient
from penstock.smtp._wire cimport T_CHUNK, T_COMMAND, T_NEED_DATA, T_TEXT_BROKEN, T_TEXT_END, T_VIOLATION, Wire

from penstock import reply as replies
from penstock.message import NO_PARAMETERS
from penstock.smtp._grammar import BAD_RECIPIENT
from penstock.smtp.events import CLOSED, NEED_DATA, BeginData, BodyChunk, EndOfMessage, Mail, Quit, Rcpt
from penstock.smtp.states import ARGUMENT_LIMIT, State


# What a driver may take no interest in.
AUTO_ACCEPT_HELLO = 1
AUTO_ACCEPT_MAIL = 2
AUTO_ACCEPT_RCPT = 4
AUTO_ACCEPT_QUIT = 8
SENDS = -1

cdef enum:
    U_HELLO = 1
    U_MAIL = 2
    U_RCPT = 4
    U_QUIT = 8
    # The verbs of the path, by their place in _wire.VERBS.
    V_HELO = 1
    V_EHLO = 2
    V_MAIL = 4
    V_RCPT = 5
    V_DATA = 6
    V_BDAT = 7
    V_QUIT = 10

cdef object AUTH_STATE = State.AUTH
cdef object BODY_STATE = State.BODY
cdef object CHUNKS_STATE = State.CHUNKS
cdef object CLOSED_STATE = State.CLOSED
cdef object HELLO_STATE = State.HELLO
cdef object MAIL_STATE = State.MAIL
cdef object OPENED_STATE = State.OPENED
cdef object RCPT_STATE = State.RCPT
cdef object READY_STATE = State.READY
cdef object REFUSED_STATE = State.REFUSED

cdef tuple argument_limit = ARGUMENT_LIMIT
cdef object need_data = NEED_DATA
cdef object closed = CLOSED
cdef object begin_data = BeginData(None)
cdef object quit_event = Quit()
cdef object sender_ok = replies.SENDER_OK
cdef object recipient_ok = replies.RECIPIENT_OK
cdef object bad_recipient = BAD_RECIPIENT
cdef object mail_type = Mail
cdef object rcpt_type = Rcpt
cdef object no_parameters = NO_PARAMETERS



# ---- the session

cdef class SessionCore:
    """The state of a session and its commonest path. See penstock.smtp.server, which inherits it."""

    def __init__(self, offer, Wire wire not None, TransactionCore transaction not None, int unasked=0):
        self.offer = offer
        self.wire = wire
        self.transaction = transaction
        self.unasked = unasked
        self._out = []
        self._state = OPENED_STATE
        self.greeting = offer.greeting
        self.is_lmtp = offer.is_lmtp
        self.eightbitmime = offer.eightbitmime
        self.max_size = offer.max_size
        self.max_recipients = offer.max_recipients
        self.max_messages = offer.max_messages
        self.max_errors = offer.max_errors
        self.max_unknown = offer.max_unknown

    def fresh(self, Wire wire not None, TransactionCore transaction not None):
        return self.made_like(wire, transaction)

    cdef SessionCore made_like(self, Wire wire, TransactionCore transaction):
        """Return a new session that is made like this one."""
        cdef SessionCore other = type(self).__new__(type(self))
        other.offer = self.offer
        other.wire = wire
        other.transaction = transaction
        other.unasked = self.unasked
        other.intercepted_verbs = self.intercepted_verbs
        other.beginnings = self.beginnings
        other.firsts = self.firsts
        other._out = []
        other._state = OPENED_STATE
        other._table = self._table
        other._rules = self._rules
        other.greeting = self.greeting
        other.is_lmtp = self.is_lmtp
        other.eightbitmime = self.eightbitmime
        other.max_size = self.max_size
        other.max_recipients = self.max_recipients
        other.max_messages = self.max_messages
        other.max_errors = self.max_errors
        other.max_unknown = self.max_unknown
        transaction.is_lmtp = self.is_lmtp
        return other

    # ---- the driver's side

    def greet(self, refusal=None):
        if refusal is None:
            self.welcome()
            return
        self.emit(refusal.encoded)
        self._state = CLOSED_STATE

    cdef int welcome(self) except -1:
        """Say the greeting of RFC 5321 4.2."""
        self.emit(self.greeting)
        return self.enter(HELLO_STATE)

    def data_to_send(self):
        return self.take_said()

    cdef bytes take_said(self):
        """Return the replies made since the last call, and forget them."""
        cdef list out = self._out
        cdef bytes data = b""
        if self.observer is not None:
            self.observer(SENDS)
        if out:
            data = out[0] if len(out) == 1 else b"".join(out)
            out.clear()
        if self.metrics is not None:
            self.metrics.end_turn(len(data))
            if self._answered is not None:
                self.metrics.in_turn = True   # these were replies to earlier commands: the clock of this one runs on
        return data

    def next_event(self):
        return self.find_event()

    cdef object find_event(self):
        """Return what the client wants next."""
        cdef object event
        cdef int token
        if self._answered is not None:
            raise RuntimeError(f"{self._event} was not answered")
        if self.metrics is not None and not self.metrics.in_turn:
            self.metrics.begin_turn()
        while self._state is not CLOSED_STATE:
            token = self.wire.step()
            if self.observer is not None:
                self.observer(token)
            if token == T_COMMAND:
                event = self.take_line()
            elif token == T_NEED_DATA:
                self.wire.settle()
                return need_data
            elif token == T_CHUNK:
                return BodyChunk(self.wire.chunk)
            elif token == T_TEXT_END and self._state is BODY_STATE and self.wire.violation == 0:
                event = self._event = EndOfMessage(self.wire.octets)
                self._answered = message_answered
                if self.metrics is not None:
                    self.metrics.text_ends(P_MESSAGE)
            elif token == T_TEXT_END:
                if self.metrics is not None:
                    self.metrics.text_ends(P_MESSAGE if self._ends_message() else P_BDAT)
                event = self._end_text()
            else:
                if self.metrics is not None:
                    self.note_trouble(token)
                event = self._take_trouble(token)
            if event is not None:
                return event
        return closed

    def reply(self, reply):
        self.answer(reply)

    cdef int answer(self, object reply) except -1:
        """Answer the event that waits for it."""
        cdef object answered = self._answered
        if answered is None:
            raise RuntimeError("no event waits for an answer")
        self._answered = None
        if answered is message_answered:
            self.answer_message(reply)
        elif answered is data_answered:
            self.answer_data(reply)
        else:
            answered(self, reply)
        return 0

    cdef int note_trouble(self, int token) except -1:
        """Tell the metrics what the reply to it is for."""
        if token == T_TEXT_BROKEN:
            self.metrics.text_ends(P_MESSAGE)
        elif token != T_VIOLATION and self._state is not AUTH_STATE:
            self.metrics.phase = 0
        return 0

    # ---- state and replies

    def _enter(self, state):
        self.enter(state)

    cdef int enter(self, object state) except -1:
        self._state = state
        self._rules = <tuple> self._table[<int> state]
        return 0

    def _emit(self, encoded):
        self.emit(encoded)

    cdef int emit(self, bytes encoded) except -1:
        """Send a reply as it is. Every reply passes here."""
        self._out.append(encoded)
        if self.metrics is not None:
            self.metrics.replied(encoded)
        return 0

    def _say(self, reply):
        self.say(reply)

    cdef int say(self, object reply) except -1:
        """Send a reply; end the session when it says so, or when the budget of errors is used up."""
        self.emit(reply.encoded)
        if reply.closes:
            self._state = CLOSED_STATE
        elif reply.code >= 500:
            self.errors += 1
            if self.errors > self.max_errors:
                self.close_with(replies.TOO_MANY_ERRORS)
        return 0

    def _text_begins(self):
        if self.metrics is not None:
            self.metrics.text_begins()

    def _answers_unasked(self):
        if self.metrics is not None:
            self.metrics.phase = P_UNASKED

    def _message_taken(self):
        if self.metrics is not None:
            self.metrics.message(self.transaction, self.wire.octets)

    def _end_transaction(self):
        self.transaction.forget()
        self.enter(READY_STATE)

    # ---- lines

    cdef object take_line(self):
        """Take a command in. Return the event that it is, None when it was answered."""
        cdef bytes argument = self.wire.argument
        cdef int verb = self.wire.verb
        cdef object refusal
        self.commands += 1
        if self._state is AUTH_STATE:
            return self._take_auth_line(argument)
        self.last_verb = verb
        if self.metrics is not None:
            self.metrics.phase = verb
        refusal = self._rules[verb]
        if len(argument) > <Py_ssize_t> argument_limit[verb]:
            self.say(replies.LINE_TOO_LONG)
        elif refusal is not None and verb != V_BDAT:  # octets follow a BDAT even where it is refused
            self.say(refusal)
        elif verb == V_RCPT:
            return self.take_rcpt(argument)
        elif verb == V_MAIL:
            return self.take_mail(argument)
        elif verb == V_DATA:
            return self.take_data(argument)
        elif verb == V_EHLO or verb == V_HELO:
            return self.take_hello(verb, argument)
        elif verb == V_QUIT:
            return self.take_quit(argument)
        else:
            return self._take_verb(verb, argument)
        return None

    cdef object take_hello(self, int verb, bytes argument):
        cdef object name = None
        cdef TransactionCore transaction
        # Behind a part of a message there is a body to forget, of which the driver has to hear.
        if self.unasked & U_HELLO and not self.is_lmtp and (self._state is HELLO_STATE or self._state is READY_STATE):
            name = plain_hello(argument)
        if name is None:
            return self._take_verb(verb, argument)
        transaction = self.transaction
        transaction.forget()  # RFC 5321 4.1.4: EHLO is an implicit RSET
        transaction.hello = name
        transaction.is_esmtp = verb == V_EHLO
        self.enter(READY_STATE)
        if verb == V_EHLO:
            self.emit(self.offer.ehlo_answer(
                tls=transaction.tls is not None, authenticated=transaction.identity is not None
            ))
        else:
            self.emit(self.offer.helo_answer)
        return None

    cdef object take_mail(self, bytes argument):
        cdef object mail
        if self.max_messages and self._mails >= self.max_messages:
            self.say(replies.TOO_MANY_MESSAGES)
            return None
        mail = plain_mail(argument, self.transaction.is_esmtp, self.eightbitmime, self.max_size)
        if mail is None:
            mail = self._parse_mail(argument)
        if type(mail) is not mail_type:
            self.say(mail)
            return None
        if self.unasked & U_MAIL:
            self.emit(sender_ok.encoded)
            self.begin_transaction(mail)
            return None
        self._event = mail
        self._answered = mail_answered
        return mail

    def _mail_answered(self, reply):
        self.say(reply)
        if reply.code < 400:
            self.begin_transaction(self._event)

    cdef int begin_transaction(self, object mail) except -1:
        cdef TransactionCore transaction = self.transaction
        self._mails += 1
        if self._state is REFUSED_STATE:
            transaction.forget()  # a refused BDAT has left its transaction behind
        transaction.sender = mail[0]
        transaction.parameters = mail[1]
        self.enter(MAIL_STATE)
        return 0

    cdef object take_rcpt(self, bytes argument):
        cdef object recipient, rcpt
        cdef list recipients = self.transaction.recipients
        if len(recipients) >= self.max_recipients:
            self.say(replies.TOO_MANY_RECIPIENTS)  # RFC 5321 4.5.3.1.10
            return None
        recipient = plain_recipient(argument)
        if recipient is None:
            rcpt = self._parse_rcpt(argument)
            if type(rcpt) is not rcpt_type:
                self.say(rcpt)
                return None
            recipient = rcpt[0]
        elif recipient is bad_recipient:
            self.say(bad_recipient)
            return None
        else:
            rcpt = None
        if self.unasked & U_RCPT and not (self.beginnings is not None and self.is_remarkable(recipient[0][1])):
            self.emit(recipient_ok.encoded)
            self.add_recipient(recipient)
            return None
        if rcpt is None:
            rcpt = of_type(rcpt_type, (recipient,))
        self._event = rcpt
        self._answered = rcpt_answered
        return rcpt

    def _rcpt_answered(self, reply):
        cdef int code = reply.code
        self.emit(reply.encoded)
        if code < 300:
            self.add_recipient(self._event[0])
        elif reply.closes:
            self._state = CLOSED_STATE
        elif code >= 500:
            # Counted apart from errors: a list with a few dead addresses is no attack, a harvest is.
            self.unknown += 1
            if self.unknown > self.max_unknown:
                self.close_with(replies.TOO_MANY_UNKNOWN)

    @property
    def watched_prefixes(self):
        return self.beginnings

    @watched_prefixes.setter
    def watched_prefixes(self, tuple beginnings):
        cdef str each
        cdef unsigned int first
        self.beginnings = beginnings
        self.firsts[0] = self.firsts[1] = 0
        for each in beginnings or ():
            first = <unsigned int> <Py_UCS4> each[0]
            if first >= 128:
                raise ValueError(f"a local part that is watched_prefixes begins in ASCII, not {each!r}")
            self.firsts[first >> 6] |= 1ull << (first & 63)

    cdef bint is_remarkable(self, str local) except -1:
        cdef unsigned int first = <unsigned int> <Py_UCS4> local[0] if local else 0
        if first >= 128 or not self.firsts[first >> 6] >> (first & 63) & 1:
            return False  # as nearly all are
        return local.startswith(self.beginnings)

    cdef int add_recipient(self, object recipient) except -1:
        cdef list recipients = self.transaction.recipients
        recipients.append(recipient)
        if self._state is not RCPT_STATE:
            self.enter(RCPT_STATE)
        return 0

    cdef object take_quit(self, bytes argument):
        cdef object event
        if argument:
            self.say(replies.NO_ARGUMENT_ALLOWED)
            return None
        if self.unasked & U_QUIT and self._state is not CHUNKS_STATE:
            event = None  # there is no body to forget
        else:
            event = quit_event
        self.has_quit = True
        self.say(replies.BYE)
        return event

    cdef object take_data(self, bytes argument):
        cdef object parameters = self.transaction.parameters
        cdef object event
        if argument:
            self.say(replies.NO_ARGUMENT_ALLOWED)
            return None
        if parameters is no_parameters:
            event = begin_data
        elif parameters.body_type == "BINARYMIME":
            self.say(replies.BINARYMIME_NEEDS_BDAT)  # RFC 3030 3
            return None
        else:
            event = BeginData(parameters.size)
        self._event = event
        self._answered = data_answered
        return event

    def _data_answered(self, reply):
        self.answer_data(reply)

    cdef int answer_data(self, object reply) except -1:
        self.say(reply)
        if reply.code < 400:
            self._state = BODY_STATE
            self.wire.expect_text()
            if self.metrics is not None:
                self.metrics.text_begins()
        return 0

    def _message_answered(self, reply):
        self.answer_message(reply)

    cdef int answer_message(self, object reply) except -1:
        if self.metrics is not None and reply.code < 400:
            self.metrics.message(self.transaction, self.wire.octets)
        if self.is_lmtp:
            self._refuse_message(reply)
        else:
            self.transaction.forget()
            self.enter(READY_STATE)
            self.say(reply)
        return 0


cdef object mail_answered = SessionCore._mail_answered
cdef object rcpt_answered = SessionCore._rcpt_answered
cdef object data_answered = SessionCore._data_answered
cdef object message_answered = SessionCore._message_answered
