"""What other compiled modules may do with a session: make one, ask for its next event, take what it has said."""

from penstock.metrics._session cimport SessionMetrics
from penstock._transaction cimport TransactionCore
from penstock.smtp._wire cimport Wire


cdef class SessionCore:
    cdef readonly object offer
    cdef readonly Wire wire
    cdef readonly TransactionCore transaction
    cdef public int commands
    cdef public int errors
    cdef public int unknown
    cdef public int last_verb
    cdef public bint has_quit
    cdef public int unasked
    cdef public object observer
    cdef tuple beginnings
    cdef unsigned long long[2] firsts  # the first characters of the beginnings, one bit for each of ASCII
    cdef public SessionMetrics metrics
    cdef public int _mails
    cdef public list _out
    cdef public object _state
    cdef public tuple _table
    cdef public tuple _rules
    cdef public object _event
    cdef public object _answered
    cdef public object intercepted_verbs
    cdef public int _auth_failures
    cdef public bint _chunk_is_last
    cdef public object _chunk_refusal
    # what the offer says, looked up once
    cdef bytes greeting
    cdef bint is_lmtp, eightbitmime
    cdef unsigned long long max_size
    cdef Py_ssize_t max_recipients
    cdef int max_messages, max_errors, max_unknown

    cdef SessionCore made_like(self, Wire wire, TransactionCore transaction)
    cdef int welcome(self) except -1
    cdef bytes take_said(self)
    cdef object find_event(self)
    cdef int answer(self, object reply) except -1
    cdef int answer_data(self, object reply) except -1
    cdef int answer_message(self, object reply) except -1
    cdef int note_trouble(self, int token) except -1
    cdef int enter(self, object state) except -1
    cdef int emit(self, bytes encoded) except -1
    cdef int say(self, object reply) except -1
    cdef object take_line(self)
    cdef object take_hello(self, int verb, bytes argument)
    cdef object take_mail(self, bytes argument)
    cdef int begin_transaction(self, object mail) except -1
    cdef object take_rcpt(self, bytes argument)
    cdef bint is_remarkable(self, str local) except -1
    cdef int add_recipient(self, object recipient) except -1
    cdef object take_quit(self, bytes argument)
    cdef object take_data(self, bytes argument)
