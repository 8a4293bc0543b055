"""The C types of penstock.smtp.client_session, and what other compiled modules may call of a session."""

cimport cython

from penstock.smtp.client cimport ReplyReader


cdef class ClientSession:
    cdef public object capabilities
    cdef public ClientTransaction transaction
    cdef public bint is_encrypted
    cdef public bint starttls_refused
    cdef public bint needs_handshake
    cdef public Py_ssize_t max_recipients
    cdef ReplyReader _reader
    cdef bytes _hostname
    cdef bint _lmtp, _is_private, _chunking
    cdef bint _wants_tls, _requires_tls
    cdef object _credentials
    cdef ClientTransaction _following   # begun while the replies to another one are awaited
    cdef object _step
    cdef object _exchange

    cpdef object single_reply(self, bytes data)
    @cython.locals(transaction=ClientTransaction, output=bytes)
    cpdef bytes handle(self, object reply)
    @cython.locals(code=cython.int)
    cdef bytes _advance(self, object reply)
    cdef bytes _hello(self)
    cdef bytes _on_hello(self, object reply, int code)
    cdef bytes _after_hello(self)
    cdef bytes _on_starttls(self, object reply, int code)
    cdef bytes _authenticate(self)
    cdef bytes _on_auth(self, object reply, int code)
    cpdef bytes begin(self, ClientTransaction transaction)
    cpdef bytes quit(self)


cdef class ClientTransaction:
    cdef readonly bytes mail
    cdef object _rcpts
    cdef readonly bint pipelining, chunking, lmtp, is_question
    cdef public object step
    cdef readonly object mail_reply
    cdef readonly list outcomes, accepted, too_many
    cdef readonly bint chunking_refused, is_broken, is_in_doubt
    cdef Py_ssize_t _position           # recipients answered so far
    cdef Py_ssize_t _pieces             # BDATs before the last one whose replies were not read
    cdef bint _has_size
    cdef long long _octets_left         # of the announced BDAT
    cdef object _stuffer

    cpdef bytes start(self)
    cpdef end_text(self)
    @cython.locals(code=cython.int)
    cdef bytes handle(self, object reply)
    cdef bytes _on_mail(self, object reply, int code)
    @cython.locals(position=Py_ssize_t)
    cdef bytes _on_rcpt(self, object reply, int code)
    cdef bytes _on_data(self, object reply, int code)
    cdef bytes _on_text(self, object reply, int code)
    cdef bytes _on_final(self, object reply, int code)
    cdef _refuse_text(self, object reply, int code)
    cdef _decide(self, object reply)
    cdef bytes _finish(self)
