"""What other compiled modules may do with a transaction: read and write its fields."""


cdef class TransactionCore:
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
    cdef dict _findings

    cdef int forget(self) except -1
