"""The C types of penstock.net.natswire."""

cimport cython


cdef class Waiting:
    cdef readonly object done
    cdef readonly double deadline
    cdef readonly Py_ssize_t octets


cdef class Answer:
    cdef public object number
    cdef Requests _requests
    cdef object _task
    cdef object _found


cdef class Requests:
    cdef readonly Py_ssize_t octets
    cdef public double now
    cdef public Py_ssize_t unsent
    cdef dict _waiting
    cdef bytes _inbox
    cdef Py_ssize_t _most_waiting
    cdef Py_ssize_t _most_octets
    cdef Py_ssize_t _last
    cdef list _out

    cpdef send(self, bytes data)
    cpdef publish(self, str subject, str reply, bytes headers, bytes data)
    cpdef bytes take_output(self)
    @cython.locals(octets=Py_ssize_t, most=Py_ssize_t, number=Py_ssize_t)
    cpdef object add(self, str subject, bytes data, bytes headers, object done, double deadline)
    @cython.locals(out=list, size=Py_ssize_t)
    cdef object _publish(self, str subject, bytes reply, bytes headers, bytes data)
    @cython.locals(waiting=Waiting)
    cpdef object forget(self, object number)
    @cython.locals(waiting=Waiting, number=bytes)
    cpdef answer(self, bytes subject, bytes headers, bytes data)
    @cython.locals(waiting=Waiting, late=list)
    cpdef end_late(self, double now, str server)
    @cython.locals(waiting=Waiting, left=list)
    cpdef end_all(self, object error)


cdef class Parser:
    cdef object _receiver
    cdef Requests _requests
    cdef bytearray _pending
    cdef Py_ssize_t _needed

    @cython.locals(
        pending=bytearray, start=Py_ssize_t, end=Py_ssize_t, after=Py_ssize_t, length=Py_ssize_t, line=bytes
    )
    cpdef feed(self, bytes data)
    @cython.locals(
        words=list, count=Py_ssize_t, place=Py_ssize_t, has_headers=bint, size=Py_ssize_t, header_size=Py_ssize_t,
        end=Py_ssize_t, middle=Py_ssize_t, requests=Requests,
    )
    cdef Py_ssize_t _message(self, bytes buffer, bytes line, Py_ssize_t start) except -1
    cdef object _other(self, bytes line)
