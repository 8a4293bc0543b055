"""The C types of penstock.smtp.server, and what other compiled modules may call of a session."""

cimport cython

from penstock.metrics._session cimport P_BDAT, P_MESSAGE, P_UNASKED, SessionMetrics
from penstock.smtp._grammar cimport plain_hello, plain_mail, plain_recipient
from penstock.smtp._wire cimport T_CHUNK, T_COMMAND, T_NEED_DATA, T_TEXT_BROKEN, T_TEXT_END, T_VIOLATION
from penstock.smtp._wire cimport Wire as CWire
from penstock.transaction cimport Transaction as CTransaction

cdef enum:
    # Verbs by their place in _wire.VERBS.
    V_HELO = 1
    V_EHLO = 2
    V_MAIL = 4
    V_RCPT = 5
    V_DATA = 6
    V_BDAT = 7
    V_QUIT = 10


cdef class ServerSession:
    cdef readonly object extensions
    cdef readonly CWire wire
    cdef readonly CTransaction transaction
    cdef public int auto_accept         # see the constants AUTO_ACCEPT_...
    cdef public object intercepted_verbs  # numbers of verbs that are put to the driver as Command
    cdef readonly tuple watched_prefixes
    cdef readonly str first_letters     # the first letters of the watched prefixes
    cdef public object observer         # called with each token of the wire, and with OUTPUT_TAKEN
    cdef public SessionMetrics metrics  # None counts nothing
    cdef public int turn_limit          # commands that one call of next_event may answer; 0 is no limit
    cdef int _turn_left
    cdef readonly int commands          # lines read so far
    cdef readonly int errors            # replies 5xx so far, but for unknown recipients
    cdef readonly int unknown           # recipients refused with 5xx
    cdef readonly int junk              # commands without mail since the last MAIL
    cdef readonly int last_verb         # the number of the last verb, for the journal
    cdef readonly bint has_quit
    cdef readonly Py_ssize_t output_octets  # of the replies that were not taken
    cdef list _output
    cdef object _state
    cdef tuple _table
    cdef tuple _rules
    cdef object _event                  # the one that waits for its reply
    cdef int _waiting                   # what its reply is for
    cdef readonly tuple tolerated       # irregularities of the transaction that were let through
    cdef int _mails
    cdef int _auth_failures
    cdef bint _chunk_is_last
    cdef unsigned long long _chunk_octets
    cdef object _chunk_refusal
    # what the extensions say, looked up once
    cdef bytes _greeting
    cdef bint _is_lmtp, _eightbitmime
    cdef unsigned long long _max_size
    cdef Py_ssize_t _max_recipients
    cdef int _max_messages, _max_errors, _max_unknown, _max_junk

    @cython.locals(other=ServerSession)
    cpdef ServerSession fresh(self, CWire wire, CTransaction transaction)
    cpdef bytes take_output(self)
    @cython.locals(token=cython.int, left=cython.int)
    cpdef object next_event(self)
    @cython.locals(waiting=cython.int)
    cpdef reply(self, object reply)
    cpdef enter(self, object state)
    cpdef send_encoded(self, bytes encoded)
    cpdef send(self, object reply)
    cdef count_error(self)
    cdef bint is_too_much_junk(self)
    @cython.locals(argument=bytes, verb=cython.int)
    cdef object take_line(self)
    cdef object take_other(self, int verb, bytes argument)
    cdef object take_violation(self, int token)
    cdef object take_hello(self, int verb, bytes argument)
    @cython.locals(transaction=CTransaction)
    cdef accept_hello(self, int verb, str name)
    @cython.locals(transaction=CTransaction)
    cdef object take_mail(self, bytes argument)
    @cython.locals(transaction=CTransaction)
    cdef begin_transaction(self, object mail)
    @cython.locals(transaction=CTransaction)
    cdef object take_rcpt(self, bytes argument)
    cdef reply_to_rcpt(self, object reply)
    cdef add_recipient(self, object recipient)
    cdef object take_data(self, bytes argument)
    cdef reply_to_data(self, object reply)
    cdef object take_text_end(self)
    cdef reply_to_message(self, object reply)
    cdef object take_quit(self, bytes argument)
    cdef reply_to_hello(self, object reply)
    cdef reply_to_chunk(self, object reply)
    cdef reply_to_auth(self, object reply)
