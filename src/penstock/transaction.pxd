"""The C types of penstock.transaction."""


cdef class Transaction:
    cdef public object peer
    cdef public str listener
    cdef public str hello
    cdef public bint is_esmtp
    cdef public bint is_lmtp
    cdef public object tls
    cdef public object identity
    cdef public object sender
    cdef public object parameters
    cdef public list recipients
    cdef public long long number
    cdef public object evidence
    cdef object _results
    cdef list _fields

    cpdef forget(self)
