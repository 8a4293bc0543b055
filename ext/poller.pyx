"""One edge-triggered epoll set for all plaintext sockets of a worker, and the system calls they need.

Theory
------
trio's own waiting arms a socket anew for each wait: an epoll_ctl, a table of waiters, a cancel scope's worth of
bookkeeping. A mail session waits four times per message, so here a socket is registered once, edge-triggered, and
its readiness is stored in its `Watch`; writability is only requested for sockets that had to wait once. Tasks park
with `trio.lowlevel.wait_task_rescheduled`; one task of the worker calls `Poller.poll`, which asks the kernel once for
many sockets and wakes the tasks that wait for them.

Waking a task costs more than most commands of a session do. So a task may leave a `Protocol` with its Watch before it
parks: plain functions that are called when octets are there, receive them, and return the output. The task
sleeps until `data_received` returns None: something has to be awaited, or the session is over. The output of the turns
of one `poll` is sent at its end, back to back, so that a client process that serves many connections is
woken once for all of them.

Listening sockets are in the set, too: a connection that a client opens is greeted with all others that are answered
then.

Rules
-----
1. An edge is reported once. `is_readable` stays set until a receive finds nothing more, or until `look_again` has the
   kernel report the edge once more: a turn is always taken in `poll`, never by the task that begins to sleep.
2. A task that waits is woken once: `poll` takes it out of the Watch before it reschedules it, and the abort function
   of a cancelled wait takes it out, too. What was readable stays readable for the next one.
3. A turn that raises wakes its task with the exception. A task that was cancelled has no protocol any more.
4. One socket normally gets one receive in a `poll`; one that has more to give comes again after the others, and so does
   a protocol that has left input unread (`wants_turn`). However many these are, the kernel is asked again after
   MOST_TIME: a client that sends one command waits for a few of their turns, not for a turn of each.
5. Watches are found by descriptor. An event for a descriptor that was closed, and perhaps reused, wakes a task
   without need, which receives nothing and waits again.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport EAGAIN, ECONNABORTED, EINPROGRESS, EINTR, EISCONN, EMFILE, ENFILE, ENOBUFS, ENOMEM, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from collections import deque

from outcome import Error, Value
import trio
from trio.lowlevel import notify_closing, reschedule


cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <sys/socket.h>
    #include <time.h>
    #define POLL_BATCH 128
    static long long clock_ns(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return t.tv_sec * 1000000000LL + t.tv_nsec;
    }
    #if defined(__linux__)
    #include <sys/epoll.h>
    #include <sys/timerfd.h>
    static int timer_create_in_a_file(void) { return timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK); }
    static int timer_set(int fd, long long at)
    {
        struct itimerspec when = {{0, 0}, {at / 1000000000LL, at % 1000000000LL}};
        return timerfd_settime(fd, TFD_TIMER_ABSTIME, &when, NULL);
    }
    #define POLL_HAS_EPOLL 1
    #else
    /* Elsewhere streams wait with trio: there is no set, and only the calls on one socket are of use. */
    #define POLL_HAS_EPOLL 0
    #include <stdint.h>
    #define SOCK_NONBLOCK 0
    #define SOCK_CLOEXEC 0
    enum { EPOLL_CLOEXEC, EPOLL_CTL_ADD = 1, EPOLL_CTL_DEL, EPOLL_CTL_MOD };
    enum { EPOLLIN = 1, EPOLLOUT = 4, EPOLLERR = 8, EPOLLHUP = 16, EPOLLRDHUP = 32 };
    #define EPOLLET (1u << 31)
    struct epoll_event { uint32_t events; union { int fd; uint64_t u64; } data; };
    static int epoll_create1(int flags) { (void)flags; errno = ENOSYS; return -1; }
    static int epoll_ctl(int e, int op, int fd, struct epoll_event *v)
    {
        (void)e; (void)op; (void)fd; (void)v;
        return -1;
    }
    static int epoll_wait(int e, struct epoll_event *v, int n, int t) { (void)e; (void)v; (void)n; (void)t; return -1; }
    static int timer_create_in_a_file(void) { errno = ENOSYS; return -1; }
    static int timer_set(int fd, long long at) { (void)fd; (void)at; return -1; }
    static int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
    {
        int sock = accept(fd, address, length);
        (void)flags;
        if (sock >= 0) {
            fcntl(sock, F_SETFL, fcntl(sock, F_GETFL) | O_NONBLOCK);
            fcntl(sock, F_SETFD, FD_CLOEXEC);
        }
        return sock;
    }
    #endif
    #ifndef MSG_NOSIGNAL
    #define MSG_NOSIGNAL 0
    #endif
    #ifndef MSG_MORE
    #define MSG_MORE 0
    #endif
    """
    struct epoll_data "union_data":
        int fd
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data data
    int64_t clock_ns() noexcept nogil
    int epoll_create1(int flags) nogil
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event) nogil
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout) nogil
    int timer_create_in_a_file() nogil
    int timer_set(int fd, int64_t at) nogil
    ctypedef unsigned int socklen_t
    struct sockaddr:
        uint16_t sa_family
    struct sockaddr_storage:
        uint16_t ss_family
    int c_accept4 "accept4"(int fd, sockaddr *address, socklen_t *length, int flags) nogil
    ssize_t c_recv "recv"(int fd, void *buffer, size_t size, int flags) nogil
    ssize_t c_send "send"(int fd, const void *buffer, size_t size, int flags) nogil
    int c_shutdown "shutdown"(int fd, int how) nogil
    int c_socket "socket"(int family, int kind, int protocol) nogil
    int c_connect "connect"(int fd, const sockaddr *address, socklen_t length) nogil
    int setsockopt(int fd, int level, int name, const void *value, socklen_t size) nogil
    enum:
        POLL_BATCH, POLL_HAS_EPOLL, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD
        EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLLERR, EPOLLHUP
        EPOLLET, SOCK_NONBLOCK, SOCK_CLOEXEC, SOCK_STREAM, MSG_MORE, MSG_NOSIGNAL, AF_INET, AF_INET6, SHUT_WR
        IPPROTO_TCP, TCP_NODELAY

cdef extern from "netinet/in.h" nogil:
    struct in_addr:
        pass
    struct in6_addr:
        pass
    struct sockaddr_in:
        uint16_t sin_family
        uint16_t sin_port
        in_addr sin_addr
    struct sockaddr_in6:
        uint16_t sin6_family
        uint16_t sin6_port
        in6_addr sin6_addr
    uint16_t ntohs(uint16_t port)
    uint16_t htons(uint16_t port)

cdef extern from "arpa/inet.h" nogil:
    const char *inet_ntop(int family, const void *address, char *text, socklen_t size)
    int inet_pton(int family, const char *text, void *address)

cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)
    ssize_t c_read "read"(int fd, void *buffer, size_t size)

cpdef int64_t now() noexcept nogil:
    """Return the monotonic clock in nanoseconds."""
    return clock_ns()


HAS_EPOLL = bool(POLL_HAS_EPOLL)
SHORTAGES = frozenset({EMFILE, ENFILE, ENOBUFS, ENOMEM})

cdef enum:
    MOST_TIME = 1_000_000   # nanoseconds of a poll before the tasks it has woken have their turn
    MOST_ACCEPTED = 64  # connections of a listener in a poll: more wait in the kernel while these have their turn
    SHORT = 4096    # a receive of fewer octets has emptied the socket: a wire always has room for as many


cdef class Protocol:
    """Takes the turns of a connection. Compiled classes override the cdef methods; others have methods of Python."""

    cdef Py_ssize_t receive(self, int fd) except -2:
        """Return the octets received, 0 at the end of the stream, -1 when there is nothing."""
        return self.recv(fd)

    cdef object take_turn(self, Py_ssize_t received):
        """Handle the octets received: return what is to be sent, None to end the turns."""
        return self.data_received(received)

    cdef int end(self, Py_ssize_t received, object failure) except -1:
        """The turns have ended, and no task waits for that."""
        self.connection_lost(received, failure)
        return 0


cdef class Watch:
    """The readiness of one socket, and the tasks that wait for it."""

    def __init__(self, int fd):
        self.fd = fd
        self.is_writable = True


cdef class Poller:
    """The epoll set."""

    def __cinit__(self):
        self.fd = -1

    def __init__(self):
        self.watches = {}
        self.listeners = {}
        self.again = deque()
        self.fd = epoll_create1(EPOLL_CLOEXEC)
        if self.fd < 0:
            PyErr_SetFromErrno(OSError)

    def __len__(self):
        return len(self.watches)

    cdef int control(self, int what, int fd, unsigned int events) except -1:
        cdef epoll_event event
        event.events = events
        event.data.u64 = 0
        event.data.fd = fd
        if epoll_ctl(self.fd, what, fd, &event) < 0:
            PyErr_SetFromErrno(OSError)
        return 0

    cpdef Watch watch(self, int fd):
        cdef Watch watch = Watch.__new__(Watch)
        watch.fd = fd
        watch.is_writable = True
        self.add(watch)
        return watch

    cdef int add(self, Watch watch) except -1:
        self.control(EPOLL_CTL_ADD, watch.fd, EPOLLIN | EPOLLRDHUP | <uint32_t> EPOLLET)
        self.watches[watch.fd] = watch
        return 0

    def look_for_room(self, Watch watch not None):
        if not watch.looks_for_room:
            self.report_again(watch, EPOLLOUT)
            watch.looks_for_room = True

    def look_again(self, Watch watch not None):
        self.report_again(watch, EPOLLOUT if watch.looks_for_room else 0)

    cdef int report_again(self, Watch watch, uint32_t more) except -1:
        # What is ready already is reported, too: EPOLL_CTL_MOD checks the readiness (epoll_ctl(2)).
        self.control(EPOLL_CTL_MOD, watch.fd, EPOLLIN | EPOLLRDHUP | <uint32_t> EPOLLET | more)
        watch.is_readable = False
        return 0

    def listen(self, int fd, accepted not None, shortage not None):
        self.control(EPOLL_CTL_ADD, fd, EPOLLIN)  # level-triggered: a batch may leave some connections waiting
        self.listeners[fd] = (accepted, shortage)

    def ignore(self, int fd):
        cdef epoll_event unused  # kernels before 2.6.9 wanted one
        if self.listeners.pop(fd, None) is not None and self.fd >= 0:
            epoll_ctl(self.fd, EPOLL_CTL_DEL, fd, &unused)  # closing a descriptor has removed it already

    cpdef int forget(self, Watch watch) except -1:
        # Closing the descriptor removes it from the set (epoll(7)).
        if self.watches.get(watch.fd) is watch:
            del self.watches[watch.fd]
        return 0

    def poll(self):
        cdef int64_t end = now() + MOST_TIME
        cdef int found
        while True:
            if self.metrics is not None:
                self.metrics.begin_round()
            try:
                found = self.poll_once(end)
            finally:
                if self.metrics is not None:
                    self.metrics.end_round()
            if found == 0 or now() >= end:
                return found

    cdef int poll_once(self, int64_t end) except -1:
        """Ask the kernel once, and handle the sockets that are ready; those that have more to give until `end`."""
        cdef epoll_event events[POLL_BATCH]
        cdef int ready = epoll_wait(self.fd, events, POLL_BATCH, 0)
        cdef int found = ready
        cdef int i, _
        cdef uint32_t what
        cdef Watch watch
        cdef object known
        cdef list outputs
        cdef object again = self.again
        cdef bint had_input
        if ready < 0:
            if errno != EINTR:
                PyErr_SetFromErrno(OSError)
            ready = found = 0
        outputs = self.outputs = []
        for _ in range(<int> len(again)):
            found += 1
            watch = again.popleft()
            watch.is_queued = False
            if watch.protocol is None:
                continue
            if watch.protocol.wants_turn:
                watch.protocol.wants_turn = False
                self.go_on(watch, 0, -1, outputs)
            elif watch.is_readable:
                self.take_turn(watch, outputs)
            if now() >= end:
                break
        if outputs:
            # A turn below may end the turns of one of these; their output is sent first.
            self.send_all(outputs)
            outputs.clear()
        for i in range(ready):
            known = self.watches.get(events[i].data.fd)
            if known is None:
                self.accept_some(events[i].data.fd)
                continue
            watch = <Watch> known
            what = events[i].events
            if what & <uint32_t> (EPOLLIN | EPOLLRDHUP | EPOLLERR | EPOLLHUP):
                had_input = watch.is_readable
                watch.is_readable = True
                if what & <uint32_t> (EPOLLRDHUP | EPOLLERR | EPOLLHUP):
                    watch.has_hung_up = True
                if watch.protocol is not None:
                    # One that had input already, or was not ready with it, has had its turn or waits in `again`.
                    if not had_input and not watch.protocol.wants_turn:
                        self.take_turn(watch, outputs)
                elif watch.reader is not None:
                    known = watch.reader
                    watch.reader = None
                    reschedule(known)
            if what & <uint32_t> (EPOLLOUT | EPOLLERR | EPOLLHUP):
                watch.is_writable = True
                if watch.writer is not None:
                    known = watch.writer
                    watch.writer = None
                    reschedule(known)
        self.outputs = None
        if outputs:
            self.send_all(outputs)
        return found

    cdef int accept_some(self, int fd) except -1:
        """Accept from a listening socket, if it is one. A shortage of descriptors ends that."""
        cdef object bound = self.listeners.get(fd)
        cdef object accepted
        cdef int _
        if bound is None:
            return 0
        for _ in range(MOST_ACCEPTED):
            try:
                accepted = accept(fd)
            except OSError as exc:
                if exc.errno in SHORTAGES:
                    self.ignore(fd)
                    bound[1](exc)
                    return 0
                continue  # any other error belongs to the one connection that was to be accepted (accept(2))
            if accepted is None:
                return 0
            bound[0](*accepted)
        return 0

    cdef int wake_reader(self, Watch watch, Py_ssize_t received, object failure) except -1:
        """End a wait for input with its result, or with the exception of a receive or a turn."""
        cdef object task = watch.reader
        cdef Protocol protocol = watch.protocol
        watch.reader = None
        watch.protocol = None
        if task is not None:
            reschedule(task, Value(received) if failure is None else Error(failure))
        else:
            protocol.end(received, failure)
        return 0

    cdef int take_turn(self, Watch watch, list outputs) except -1:
        """Receive for a protocol, and let it answer."""
        cdef Py_ssize_t received
        try:
            received = watch.protocol.receive(watch.fd)
        except OSError as exc:
            lost = trio.BrokenResourceError(f"receiving failed: {exc}")
            lost.__cause__ = exc
            self.wake_reader(watch, -1, lost)
            return 0
        except BaseException as exc:
            self.wake_reader(watch, -1, exc)
            return 0
        if received < SHORT and not watch.has_hung_up:
            watch.is_readable = False
        if received < 0:
            watch.is_readable = False
        elif received == 0:
            self.wake_reader(watch, 0, None)
        else:
            self.go_on(watch, received, received, outputs)
        return 0

    cdef int go_on(self, Watch watch, Py_ssize_t received, Py_ssize_t outcome, list outputs) except -1:
        """Take a turn. If it wakes the task, `outcome` is the result of the wait."""
        cdef object answer
        try:
            answer = watch.protocol.take_turn(received)
        except BaseException as exc:
            if watch.protocol is None:
                raise  # no task is there to get it: a bug that ends the worker
            self.wake_reader(watch, -1, exc)
            return 0
        if watch.protocol is None:
            return 0  # the turn has closed or interrupted its own socket
        if answer is None:
            self.wake_reader(watch, outcome, None)
        else:
            if answer:
                outputs.append(watch)
                outputs.append(answer)
            if (watch.protocol.wants_turn or watch.is_readable) and not watch.is_queued:
                watch.is_queued = True
                self.again.append(watch)
        return 0

    cdef int send_all(self, list outputs) except -1:
        """Send the output of the turns. A task whose output does not fit into the socket is woken to send the rest."""
        cdef Py_ssize_t i, size
        cdef ssize_t sent
        cdef Watch watch
        cdef bytes answer
        for i in range(0, len(outputs), 2):
            watch = <Watch> outputs[i]
            answer = <bytes> outputs[i + 1]
            if watch.protocol is None:
                continue
            size = len(answer)
            sent = c_send(watch.fd, <char *> answer, size, MSG_NOSIGNAL)
            if sent == size:
                continue
            # Full, or broken: sending the rest shows which.
            watch.is_writable = sent < 0 and errno != EAGAIN
            watch.unsent = answer[max(sent, 0):]
            self.wake_reader(watch, -1, None)
        return 0

    def close(self):
        if self.fd >= 0:
            c_close(self.fd)
            self.fd = -1


cdef class Socket:
    """A non-blocking socket, perhaps watched by a poller: what `SocketStream` does without waiting."""

    def __init__(self, int fd, Poller poller=None):
        self.fd = fd
        self.poller = poller
        self.watch = None if poller is None else poller.watch(fd)

    cpdef Py_ssize_t send_nowait(self, data, Py_ssize_t start=0) except -1:
        cdef Py_ssize_t sent
        if self.fd < 0:
            raise trio.ClosedResourceError("this stream was closed")
        if self.eof_sent:
            raise trio.ClosedResourceError("the end of this stream was sent")
        try:
            sent = send_octets(self.fd, data, start, MSG_NOSIGNAL)
        except OSError as exc:
            raise trio.BrokenResourceError(f"sending failed: {exc}") from exc
        if sent >= 0:
            return sent
        if self.watch is not None:
            self.watch.is_writable = False
        return 0

    cpdef Py_ssize_t send_and_close_nowait(self, bytes data) except -1:
        cdef Py_ssize_t sent = len(data)
        try:
            if data and self.fd >= 0:
                sent = max(send_octets(self.fd, data, 0, MSG_NOSIGNAL | MSG_MORE), 0)
        except OSError:
            pass  # the peer has left: there is no reader
        if sent == len(data):
            self.close_nowait()
        return sent

    cpdef int replace(self, int fd) except -1:
        cdef int before = self.fd
        cdef Watch watch = self.watch
        self.poller.forget(watch)
        watch.fd = self.fd = fd
        watch.is_readable = watch.has_hung_up = watch.looks_for_room = self.eof_sent = False
        watch.is_writable = True
        watch.unsent = None
        c_close(before)
        self.poller.add(watch)
        return 0

    def interrupt(self):
        cdef Watch watch = self.watch
        cdef object task
        if watch is None or watch.protocol is None or watch.reader is None:
            return
        task = watch.reader
        watch.reader = watch.protocol = None
        reschedule(task, Value(-1))

    cpdef int close_nowait(self) except -1:
        cdef int fd = self.fd
        cdef Watch watch = self.watch
        if fd < 0:
            return 0
        self.fd = -1
        if watch is None:
            notify_closing(fd)
        else:
            self.poller.forget(watch)
            if watch.reader is not None:
                reschedule(watch.reader, Value(-1))  # it will find the stream closed
            if watch.writer is not None:
                reschedule(watch.writer)
            watch.reader = watch.writer = watch.protocol = None
        c_close(fd)
        return 0


cdef class Timer:
    """A timer of the kernel as a descriptor (timerfd_create(2)): the clock of trio has steps of a millisecond."""

    cdef readonly int fd

    def __cinit__(self):
        self.fd = timer_create_in_a_file()
        if self.fd < 0:
            PyErr_SetFromErrno(OSError)

    def set(self, int64_t at):
        if timer_set(self.fd, max(at, 1)) < 0:  # 0 would stop it
            PyErr_SetFromErrno(OSError)

    def recv(self, int fd, Py_ssize_t octets=8):
        cdef uint64_t count
        return c_read(fd, &count, sizeof(count))

    def close(self):
        if self.fd >= 0:
            c_close(self.fd)
            self.fd = -1


cdef str dotted(const unsigned char *octets):
    """Return an IPv4 address as text. inet_ntop prints it with sprintf, at ten times the price."""
    cdef char[16] text
    cdef int at = 0, i
    for i in range(4):
        if i:
            text[at] = c'.'
            at += 1
        if octets[i] >= 100:
            text[at] = c'0' + octets[i] // 100
            at += 1
        if octets[i] >= 10:
            text[at] = c'0' + octets[i] // 10 % 10
            at += 1
        text[at] = c'0' + octets[i] % 10
        at += 1
    return text[:at].decode("ascii")


def accept(int fd):
    cdef sockaddr_storage address
    cdef socklen_t length = sizeof(address)
    cdef char text[64]
    cdef int sock
    while True:
        length = sizeof(address)
        sock = c_accept4(fd, <sockaddr *> &address, &length, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if sock >= 0:
            break
        if errno == EAGAIN:
            return None
        if errno != EINTR and errno != ECONNABORTED:
            PyErr_SetFromErrno(OSError)
    if address.ss_family == AF_INET:
        return sock, dotted(<unsigned char *> &(<sockaddr_in *> &address).sin_addr), ntohs(
            (<sockaddr_in *> &address).sin_port
        )
    if address.ss_family == AF_INET6:
        inet_ntop(AF_INET6, &(<sockaddr_in6 *> &address).sin6_addr, text, sizeof(text))
        return sock, text.decode("ascii"), ntohs((<sockaddr_in6 *> &address).sin6_port)
    return sock, "", 0


cpdef tuple open_connection(str address, int port):
    cdef sockaddr_in place
    cdef sockaddr_in6 place6
    cdef sockaddr *to = <sockaddr *> &place
    cdef socklen_t size = sizeof(place)
    cdef bytes text = address.encode("ascii", "replace")
    cdef int fd, code = 0, yes = 1, family = AF_INET
    memset(&place, 0, sizeof(place))
    if inet_pton(AF_INET, text, &place.sin_addr) == 1:
        place.sin_family = AF_INET
        place.sin_port = htons(<uint16_t> port)
    else:
        memset(&place6, 0, sizeof(place6))
        if inet_pton(AF_INET6, text, &place6.sin6_addr) != 1:
            raise ValueError(f"not an IP address: {address!r}")
        place6.sin6_family = family = AF_INET6
        place6.sin6_port = htons(<uint16_t> port)
        to, size = <sockaddr *> &place6, sizeof(place6)
    fd = c_socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    if fd < 0:
        PyErr_SetFromErrno(OSError)
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes))
    if c_connect(fd, to, size) < 0:
        # Over loopback the connection is established by now, and a second connect(2) reports it.
        if errno == EINPROGRESS and c_connect(fd, to, size) == 0:
            return fd, 0
        code = errno
    return fd, 0 if code == EISCONN else code


def send(int fd, data not None, Py_ssize_t start=0):
    return send_octets(fd, data, start, MSG_NOSIGNAL)


cdef ssize_t send_octets(int fd, data, Py_ssize_t start, int flags) except -2:
    """Send data from `start` on. Return the octets that were taken, -1 when the socket is full."""
    cdef Py_buffer view
    cdef ssize_t n
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if start < 0 or start > view.len:
            raise ValueError("start lies outside of the data")
        while True:
            n = c_send(fd, <char *> view.buf + start, view.len - start, flags)
            if n >= 0:
                return n
            if errno == EAGAIN:
                return -1
            if errno != EINTR:
                PyErr_SetFromErrno(OSError)
    finally:
        PyBuffer_Release(&view)


cpdef bytes recv(int fd, Py_ssize_t octets):
    cdef bytes data
    cdef ssize_t n
    cdef char small[4096]
    if octets < 1:
        raise ValueError("octets is at least 1")
    if octets <= <Py_ssize_t> sizeof(small):
        while True:
            n = c_recv(fd, small, octets, 0)
            if n >= 0:
                return PyBytes_FromStringAndSize(small, n)
            if errno == EAGAIN:
                return None
            if errno != EINTR:
                PyErr_SetFromErrno(OSError)
    data = PyBytes_FromStringAndSize(NULL, octets)
    while True:
        n = c_recv(fd, <char *> data, octets, 0)
        if n == octets:
            return data
        if n >= 0:
            return data[:n]
        if errno == EAGAIN:
            return None
        if errno != EINTR:
            PyErr_SetFromErrno(OSError)


def close(int fd):
    c_close(fd)


def shutdown(int fd):
    if c_shutdown(fd, SHUT_WR) < 0:
        PyErr_SetFromErrno(OSError)
