"""The C types of penstock.net.turns."""

cimport cython

from penstock.net._poller cimport Protocol
from penstock.net._poller cimport recv as receive_octets
from penstock.smtp.client_session cimport ClientSession as CClientSession


cdef class ClientTurns(Protocol):
    cdef public CClientSession session
    cdef public object on_reply
    cdef public object tls
    cdef public object costly
    cdef public bytes unsent
    cdef public bint has_pending
    cdef public bint is_interrupted
    cdef readonly bint is_in_turn
    cdef readonly bint has_ended
    cdef bytes _received

    cpdef queue(self, bytes data)
    cdef Py_ssize_t receive(self, int fd) except -2
    cdef object take_turn(self, Py_ssize_t received)
    cdef bytes take_encrypted_turn(self)
    @cython.locals(session=CClientSession, output=bytes, more=bytes)
    cpdef bytes handle(self, bytes data)
