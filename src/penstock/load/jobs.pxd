"""The C types of penstock.load.jobs."""


cdef class Job:
    cdef readonly long long number
    cdef readonly object text
    cdef readonly long long intended


cdef class JobSource:
    cdef long long _total               # negative without a limit
    cdef object _number
    cdef object _text_of
    cdef bint _is_open_loop
    cdef public long long started
    cdef public long long promised
    cdef public bint is_stopping
    cdef public bint is_pacing
    cdef readonly object intended

    cpdef Job take(self)
    cpdef bint has_work(self) except -1
