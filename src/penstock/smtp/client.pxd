"""The C types of penstock.smtp.client, and what other compiled modules may call of its reader."""

cimport cython


cdef class ReplyReader:
    cdef bytes _buffer
    cdef Py_ssize_t _start              # where the next line begins in the buffer
    cdef list _lines                    # of the reply that is not complete

    @cython.locals(octets=bytes)
    cpdef feed(self, object data)
    @cython.locals(size=Py_ssize_t, kept=dict)
    cpdef object single(self, bytes data)
    cpdef object next(self)
