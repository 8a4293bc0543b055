"""What other compiled modules may do with a poller and the sockets on it."""

from libc.stdint cimport int64_t, uint32_t

from penstock.metrics._session cimport Metrics


cpdef int64_t now() noexcept nogil
cpdef bytes recv(int fd, Py_ssize_t octets)
cpdef tuple open_connection(str address, int port)


cdef class Protocol:
    cdef public bint wants_turn

    cdef Py_ssize_t receive(self, int fd) except -2
    cdef object take_turn(self, Py_ssize_t received)
    cdef int end(self, Py_ssize_t received, object failure) except -1


cdef class Watch:
    cdef readonly int fd
    cdef public bint is_readable
    cdef public bint is_writable
    cdef public bint has_hung_up
    cdef bint looks_for_room
    cdef bint is_queued  # in `again`
    cdef public object reader
    cdef public object writer
    cdef public Protocol protocol
    cdef public bytes unsent


cdef class Poller:
    cdef readonly int fd
    cdef public Metrics metrics
    cdef dict watches
    cdef dict listeners
    cdef object again  # a deque: the sockets that have more to give
    cdef list outputs  # what the poll that is under way has to send: a watch, its octets, the next watch ...

    cdef int control(self, int what, int fd, unsigned int events) except -1
    cpdef Watch watch(self, int fd)
    cdef int report_again(self, Watch watch, uint32_t more) except -1
    cdef int add(self, Watch watch) except -1
    cpdef int forget(self, Watch watch) except -1
    cdef int poll_once(self, int64_t end) except -1
    cdef int accept_some(self, int fd) except -1
    cdef int wake_reader(self, Watch watch, Py_ssize_t received, object failure) except -1
    cdef int take_turn(self, Watch watch, list outputs) except -1
    cdef int go_on(self, Watch watch, Py_ssize_t received, Py_ssize_t outcome, list outputs) except -1
    cdef int send_all(self, list outputs) except -1


cdef class Socket:
    cdef readonly int fd
    cdef readonly Poller poller
    cdef readonly Watch watch
    cdef public bint eof_sent

    cpdef Py_ssize_t send_nowait(self, data, Py_ssize_t start=*) except -1
    cpdef Py_ssize_t send_and_close_nowait(self, bytes data) except -1
    cpdef int close_nowait(self) except -1
    cpdef int replace(self, int fd) except -1
