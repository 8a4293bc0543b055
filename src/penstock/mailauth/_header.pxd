"""The header and its text functions for other compiled modules."""


cdef class Field:
    cdef readonly bytes name
    cdef readonly Py_ssize_t start, colon, stop


cdef class Header:
    cdef readonly bytes octets
    cdef readonly list fields
    cdef readonly dict by_name

    cdef bytes text(self, Py_ssize_t start, Py_ssize_t stop)
    cpdef bytes value(self, Field field)
    cpdef bytes relaxed(self, Field field)
    cdef list selected(self, list names)
    cpdef bytes signed(self, list names, Field own, bint relaxed)
    cpdef bytes own(self, Field field, bint relaxed)


cpdef dict split_tags(bytes value)
cpdef str squeeze(str text)
cpdef bytes decode_base64(str text)
cpdef str simple_mailbox(bytes value)


cdef class BodyCanonicalizer:
    cdef object sink
    cdef bytearray block
    cdef unsigned char *out
    cdef Py_ssize_t size
    cdef long long line_ends
    cdef bint blank, cr, is_relaxed, is_empty, is_wide

    cdef int put(self, const unsigned char *p, Py_ssize_t n) except -1
    cdef int flush(self) except -1
    cdef int put_pending(self) except -1
    cpdef feed(self, const unsigned char[:] data)
    cpdef finish(self)
