"""The C types of penstock.load.session."""

cimport cython

from libc.stdint cimport int64_t

from penstock.load.jobs cimport Job, JobSource
from penstock.metrics._histogram cimport Histogram as CHistogram
from penstock.net._poller cimport now, open_connection
from penstock.smtp.client_session cimport ClientSession as CClientSession
from penstock.smtp.client_session cimport ClientTransaction as CClientTransaction


cdef class Session:
    cdef readonly object pool
    cdef readonly object target
    cdef readonly str source
    cdef public int64_t asked_at
    cdef public bint is_rested
    cdef bint _is_promised              # a message is reserved for it
    cdef readonly int concluded
    cdef readonly bint is_done
    cdef readonly str timed_out
    cdef public object opened
    cdef readonly CClientSession protocol
    cdef readonly object connection
    cdef int64_t _begun_at              # when the connection was begun
    cdef int _left                      # messages that this connection may still send; negative without a limit
    cdef Job _job
    cdef int64_t _job_begun             # when its MAIL was sent, or was to be
    cdef object _text
    cdef bytes _text_sent               # the octets of `_text` as they are sent
    # what the plan says, looked up once
    cdef object _plan
    cdef JobSource _jobs
    cdef bint _thinks
    cdef bint _pipelining, _chunking, _has_header, _can_replace
    cdef str _address, _sender, _tag
    cdef int _port
    cdef list _rcpts                    # for each recipient of the plan
    # the counts in use, looked up once
    cdef object _counts
    cdef dict _histograms               # by step
    cdef dict _replies
    cdef CHistogram _messages

    cpdef CClientSession begin_connection(self)
    @cython.locals(at=int64_t, session=CClientSession, transaction=CClientTransaction, output=bytes)
    cpdef bytes on_reply(self, object reply)
    cdef _use(self, object counts)
    @cython.locals(histogram=CHistogram, key=tuple, phases=dict)
    cdef _count(self, object step, object reply, int64_t at)
    cpdef promise(self)
    cpdef release(self)
    @cython.locals(job=Job)
    cdef bytes _next(self)
    @cython.locals(transaction=CClientTransaction)
    cdef bytes _begin(self, Job job)
    @cython.locals(job=Job)
    cdef bytes _text_of(self, CClientTransaction transaction)
    @cython.locals(took=int64_t, job=Job)
    cdef _conclude(self, bint is_accepted)
    cdef bint _replace(self) except -1
