"""DNS messages (RFC 1035 4, RFC 6891), the UDP sockets they are exchanged by, and the cache of answers.

A response comes from anywhere, so that every octet is checked before it is read:

- a compression pointer leads backwards, to before the name part it ends (no loops, RFC 1035 4.1.4);
- a name has at most 255 octets, a response at most MAX_RECORDS records, a chain of aliases at most MAX_ALIASES;
- the length of a record's data is what the data of its type takes, no more and no less.

Only records that answer the question are returned: those that belong to the name asked for, or to the name at the end
of its aliases (RFC 1034 4.3.2). What a server adds about other names is never believed.

The sockets and the cache are here because a question to the DNS should cost little more than its system calls and the
wait: in Python, all that surrounds them costs as much again.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EINTR, EMFILE, errno
from libc.string cimport memcmp, memcpy

from collections import OrderedDict as _OrderedDict
from os import urandom as _urandom

from trio.lowlevel import notify_closing as _notify_closing


cdef extern from "Python.h":
    object PyUnicode_DecodeASCII(const char *text, Py_ssize_t size, const char *errors)
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef extern from "sys/socket.h" nogil:
    ssize_t c_send "send"(int fd, const void *buffer, size_t size, int flags)
    ssize_t c_recv "recv"(int fd, void *buffer, size_t size, int flags)

cdef enum:
    HEADER = 12
    MAX_NAME = 255          # RFC 1035 2.3.4
    MAX_LABEL = 63
    ALIASES = 8
    RECORDS = 1000
    PAYLOAD = 1232          # what passes every path without fragments (RFC 9715 3.2)
    QUERY = 12 + 255 + 1 + 4 + 11
    DATAGRAM = 4096         # octets of a response that are received
    LEAST_SOCKETS = 4       # sockets that queries are spread over at least
    MAX_IDLE = 64           # sockets that are kept
    RANDOM_OCTETS = 2048    # asked of the operating system at a time
    A = 1
    NS = 2
    CNAME = 5
    SOA = 6
    PTR = 12
    MX = 15
    TXT = 16
    AAAA = 28
    OPT = 41
    TLSA = 52

MAX_ALIASES = ALIASES
MAX_RECORDS = RECORDS
MAX_PAYLOAD = PAYLOAD

NOERROR = 0
FORMERR = 1
SERVFAIL = 2
NXDOMAIN = 3
NOTIMP = 4
REFUSED = 5


class MalformedMessageError(ValueError):
    """A response that breaks the format, or does not belong to the question."""


cdef inline unsigned int get16(const unsigned char *p) noexcept:
    return (p[0] << 8) | p[1]


cdef inline unsigned int get32(const unsigned char *p) noexcept:
    return (<unsigned int>p[0] << 24) | (p[1] << 16) | (p[2] << 8) | p[3]


cdef inline unsigned char lower(unsigned char c) noexcept:
    return c + 32 if c'A' <= c <= c'Z' else c


def encode_query(int ident, str name not None, int kind, bint edns=True):
    """Return a recursive query of class IN that asks for the AD bit (RFC 6840 5.7)."""
    cdef unsigned char[QUERY] out
    cdef Py_ssize_t size = write_query(out, ident, name, kind, edns)
    return PyBytes_FromStringAndSize(<const char *>out, size)


cdef Py_ssize_t write_query(unsigned char *out, int ident, str name, int kind, bint edns) except -1:
    """Write a query to `out`, which has space for QUERY octets; return how many it has."""
    cdef Py_ssize_t n = 0, i, start = 0, o = HEADER
    cdef const unsigned char *p = <const unsigned char *>PyUnicode_AsUTF8AndSize(name, &n)
    if n and p[n - 1] == c'.':
        n -= 1
    if n > MAX_NAME - 2:
        raise ValueError("a name of the DNS has at most 253 octets")
    out[0] = (ident >> 8) & 255
    out[1] = ident & 255
    out[2] = 0x01                       # RD
    out[3] = 0x20                       # AD
    out[4], out[5], out[6], out[7], out[8], out[9], out[10], out[11] = 0, 1, 0, 0, 0, 0, 0, 1 if edns else 0
    if n:
        for i in range(n + 1):
            if i == n or p[i] == c'.':
                if i == start or i - start > MAX_LABEL:
                    raise ValueError("a label of a DNS name has 1 to 63 octets")
                out[o] = <unsigned char>(i - start)
                memcpy(&out[o + 1], p + start, i - start)
                o += 1 + i - start
                start = i + 1
    out[o] = 0
    out[o + 1], out[o + 2], out[o + 3], out[o + 4] = (kind >> 8) & 255, kind & 255, 0, 1
    o += 5
    if edns:
        out[o], out[o + 1], out[o + 2] = 0, 0, OPT
        out[o + 3], out[o + 4] = PAYLOAD >> 8, PAYLOAD & 255
        out[o + 5], out[o + 6], out[o + 7], out[o + 8], out[o + 9], out[o + 10] = 0, 0, 0, 0, 0, 0
        o += 11
    return o


cdef Py_ssize_t question_end(const unsigned char *p, Py_ssize_t n) except -1:
    """Return where the question of a message ends; it holds no pointers."""
    cdef Py_ssize_t i = HEADER
    while True:
        if i >= n or p[i] > MAX_LABEL:
            raise MalformedMessageError("the question is cut or compressed")
        if p[i] == 0:
            break
        i += 1 + p[i]
    if i + 5 > n:
        raise MalformedMessageError("the question is cut")
    return i + 5


def is_response_to(bytes wire, bytes query):
    """Say whether a message is a response to a query: its id, its QR bit and its question, in letters of any case.

    A failure without a question section is a response as well: the reply to a query that a server cannot parse.
    """
    return matches(
        <const unsigned char *>PyBytes_AS_STRING(wire), PyBytes_GET_SIZE(wire),
        <const unsigned char *>PyBytes_AS_STRING(query), PyBytes_GET_SIZE(query),
    )


cdef bint matches(const unsigned char *p, Py_ssize_t n, const unsigned char *q, Py_ssize_t m) except -1:
    """Say whether a message is a response to a query."""
    cdef Py_ssize_t i, end
    if n < HEADER or p[0] != q[0] or p[1] != q[1] or p[2] & 0xF8 != 0x80:   # QR, and opcode QUERY
        return False
    if p[4] == 0 and p[5] == 0:
        return p[3] & 15 != NOERROR and p[3] & 15 != NXDOMAIN
    end = question_end(q, m)
    if p[4] != 0 or p[5] != 1 or n < end:
        return False
    for i in range(HEADER, end - 4):
        if lower(p[i]) != lower(q[i]):
            return False
    return memcmp(p + end - 4, q + end - 4, 4) == 0


cdef str read_name(const unsigned char *p, Py_ssize_t n, Py_ssize_t *at):
    """Return a name in lower case without its final dot, "" for the root, and move after it.

    An octet that would be mistaken for another name is written as in a zone file, \\DDD (RFC 1035 5.1).
    """
    cdef unsigned char[4 * MAX_NAME + 4] out
    cdef Py_ssize_t i = at[0], end = -1, o = 0, total = 1, bound = i, j, k
    cdef unsigned char c
    while True:
        if i >= n:
            raise MalformedMessageError("a name is cut")
        c = p[i]
        if c == 0:
            if end < 0:
                end = i + 1
            break
        if c >= 0xC0:
            if i + 1 >= n:
                raise MalformedMessageError("a pointer is cut")
            j = ((c & 63) << 8) | p[i + 1]
            if end < 0:
                end = i + 2
            if j >= bound or j < HEADER:
                raise MalformedMessageError("a pointer does not lead backwards")
            bound = i = j
            continue
        if c > MAX_LABEL:
            raise MalformedMessageError("a label has an unknown type")
        total += 1 + c
        if total > MAX_NAME or i + 1 + c > n:
            raise MalformedMessageError("a name is too long or cut")
        if o:
            out[o] = c'.'
            o += 1
        for k in range(i + 1, i + 1 + c):
            if 33 <= p[k] <= 126 and p[k] != c'.' and p[k] != c'\\':
                out[o] = lower(p[k])
                o += 1
            else:
                out[o], out[o + 1], out[o + 2], out[o + 3] = (
                    c'\\', c'0' + p[k] // 100, c'0' + p[k] // 10 % 10, c'0' + p[k] % 10
                )
                o += 4
        i += 1 + c
    at[0] = end
    return PyUnicode_DecodeASCII(<const char *>out, o, NULL)


cdef str whole_name(const unsigned char *p, Py_ssize_t n, Py_ssize_t at, Py_ssize_t stop):
    """Return the name that fills the data of a record."""
    cdef str name = read_name(p, n, &at)
    if at != stop:
        raise MalformedMessageError("a name does not fill its record")
    return name


cdef object read_text(const unsigned char *p, Py_ssize_t at, Py_ssize_t stop):
    """Return the strings of a TXT record, joined (RFC 7208 3.3, RFC 6376 3.6.2.2)."""
    cdef list parts
    if at < stop and at + 1 + p[at] == stop:
        return PyBytes_FromStringAndSize(<const char *>p + at + 1, p[at])
    parts = []
    while at < stop:
        if at + 1 + p[at] > stop:
            raise MalformedMessageError("a string is cut")
        parts.append(PyBytes_FromStringAndSize(<const char *>p + at + 1, p[at]))
        at += 1 + p[at]
    return b"".join(parts)


cdef object read_data(const unsigned char *p, Py_ssize_t n, int kind, Py_ssize_t at, Py_ssize_t size):
    """Return the data of a record in the form of its type; that of other types as octets."""
    cdef Py_ssize_t stop = at + size
    if kind == TXT:
        return read_text(p, at, stop)
    if kind == A or kind == AAAA:
        if size != (4 if kind == A else 16):
            raise MalformedMessageError("an address has a wrong length")
    elif kind == MX:
        if size < 3:
            raise MalformedMessageError("an MX is cut")
        return get16(p + at), whole_name(p, n, at + 2, stop)
    elif kind == PTR or kind == NS or kind == CNAME:
        return whole_name(p, n, at, stop)
    elif kind == TLSA:
        if size < 4:
            raise MalformedMessageError("a TLSA is cut")
        return p[at], p[at + 1], p[at + 2], PyBytes_FromStringAndSize(<const char *>p + at + 3, size - 3)
    return PyBytes_FromStringAndSize(<const char *>p + at, size)


cdef object soa_ttl(const unsigned char *p, Py_ssize_t n, Py_ssize_t at, Py_ssize_t stop, unsigned int ttl):
    """Return how long a negative answer holds: the lesser of the SOA's TTL and its MINIMUM (RFC 2308 5)."""
    read_name(p, n, &at)
    read_name(p, n, &at)
    if at + 20 != stop:
        raise MalformedMessageError("an SOA has a wrong length")
    return min(ttl, get32(p + at + 16))


def decode_response(bytes wire, bytes query):
    """Return (rcode, truncated, authentic, recursive, name, records, ttl) of a response to a query.

    `name` is that at the end of the aliases. `ttl` is that of the answer, or of its absence; None when an absence
    came without an SOA and must not be kept (RFC 2308 5). `recursive` is False for a referral to other servers.
    Records: A and AAAA as 4 and 16 octets, TXT as joined octets, PTR, NS and CNAME as names, MX as (preference,
    name), TLSA as (usage, selector, matching type, data), others as octets. Raise MalformedMessageError.
    """
    if not is_response_to(wire, query):
        raise MalformedMessageError("not the response to the question")
    return decode(<const unsigned char *>PyBytes_AS_STRING(wire), PyBytes_GET_SIZE(wire))


cdef tuple decode(const unsigned char *p, Py_ssize_t n):
    """Return what `decode_response` does, of a response that belongs to the question."""
    cdef Py_ssize_t at, start, size
    cdef unsigned int answers, authorities, total, number, rcode, ttl
    cdef int kind, asked
    cdef list found = []
    cdef str owner, name
    cdef object negative = None
    cdef bint has_ns = False
    rcode = p[3] & 15
    if p[5] == 0 or p[2] & 2:
        return rcode, bool(p[2] & 2), False, True, "", (), None
    at = HEADER
    name = read_name(p, n, &at)
    asked = get16(p + at)
    at += 4
    answers, authorities = get16(p + 6), get16(p + 8)
    total = answers + authorities + get16(p + 10)
    if total > RECORDS:
        raise MalformedMessageError("too many records")
    for number in range(total):
        if at + 1 < n and p[at] == 0xC0 and p[at + 1] == HEADER:
            owner = name
            at += 2
        else:
            owner = read_name(p, n, &at)
        if at + 10 > n:
            raise MalformedMessageError("a record is cut")
        kind, ttl, size = get16(p + at), get32(p + at + 4), get16(p + at + 8)
        start = at + 10
        at = start + size
        if at > n:
            raise MalformedMessageError("a record is cut")
        if kind == OPT:
            rcode |= (ttl >> 24) << 4       # RFC 6891 6.1.3
            continue
        if get16(p + start - 8) != 1:
            continue                        # another class than IN
        if ttl > 0x7FFFFFFF:
            ttl = 0                         # RFC 2181 8
        if number < answers:
            if kind == asked or kind == CNAME:
                found.append((owner, kind, ttl, start, size))
        elif number < answers + authorities:
            if kind == SOA:
                negative = soa_ttl(p, n, start, at, ttl)
            elif kind == NS:
                has_ns = True
    return follow(p, n, rcode, name, asked, found, negative, has_ns and not p[2] & 4 and not p[3] & 0x80)


cdef tuple follow(
    const unsigned char *p, Py_ssize_t n, unsigned int rcode, str name, int asked, list found, object negative,
    bint referred
):
    """Return the result of `decode_response`, from the records of the answer section."""
    cdef Py_ssize_t start, size
    cdef unsigned int ttl, least = 0x7FFFFFFF
    cdef int kind, _step
    cdef str owner, alias
    cdef list records
    cdef bint authentic = p[3] & 0x20
    for _step in range(ALIASES + 1):
        records = []
        alias = None
        for owner, kind, ttl, start, size in found:
            if owner == name:
                if kind == asked:
                    records.append(read_data(p, n, kind, start, size))
                elif alias is None:
                    alias = whole_name(p, n, start, start + size)
                least = min(least, ttl)
        if records:
            return rcode, False, authentic, True, name, tuple(records), least
        if alias is None:
            if negative is not None:
                negative = min(negative, least)
            return rcode, False, authentic, not (referred and negative is None), name, (), negative
        name = alias
    raise MalformedMessageError("the aliases do not come to an end")


cdef class _Entry:
    """A cached answer."""

    cdef object answer
    cdef double expires, stale_until


cdef class Cache:
    """Answers by name and kind; the one that was used the longest time ago is the first to go."""

    cdef object entries
    cdef public Py_ssize_t hits
    cdef type answer
    cdef object clock
    cdef Py_ssize_t most
    cdef double least, longest, negative, stale

    def __init__(self, type answer not None, clock not None, *, Py_ssize_t most, double least, double longest,
                 double negative, double stale):
        self.entries = _OrderedDict()
        self.answer = answer
        self.clock = clock
        self.most = most
        self.least = least
        self.longest = longest
        self.negative = negative
        self.stale = stale

    @staticmethod
    def key(str name not None, str kind not None):
        """Return what a question is found under."""
        return key_of(name, kind)

    cpdef object find(self, tuple key):
        """Return the answer to a question, None without one that is valid."""
        cdef object found = self.entries.get(key)
        if found is None or (<_Entry>found).expires <= <double>self.clock():
            return None
        self.entries.move_to_end(key)
        self.hits += 1
        return (<_Entry>found).answer

    def get(self, str name not None, str kind not None):
        """Return the answer to a question, None without one that is valid."""
        return self.find(key_of(name, kind))

    cpdef object keep(self, tuple key, answer, double seconds, double stale):
        """Keep an answer for some seconds, and as a stale one for some more."""
        cdef _Entry entry = _Entry.__new__(_Entry)
        cdef double now = self.clock()
        entry.answer = answer
        entry.expires = now + seconds
        entry.stale_until = entry.expires + stale
        self.entries[key] = entry
        self.entries.move_to_end(key)
        while len(self.entries) > self.most:
            self.entries.popitem(False)

    cpdef object keep_response(self, tuple key, tuple response, bint is_trusted, double longest):
        """Return the answer in a response, and keep it; None if the response names an alias to ask for."""
        cdef bint authentic = response[2] and is_trusted
        cdef unsigned int rcode = response[0]
        cdef str name = response[4]
        cdef tuple records = response[5]
        cdef object ttl = response[6], answer
        # With an SOA, the name at the end of the aliases has no such records.
        if not records and rcode != NXDOMAIN and ttl is None and name != <str>key[0]:
            return None
        longest = min(longest, self.longest)
        if not records:
            longest = min(longest, self.negative)
        status = "found" if records else "missing" if rcode == NXDOMAIN else "empty"
        # As `Answer(status, records, name, authentic)`, without a call of Python.
        answer = tuple.__new__(self.answer, (status, records, name, authentic, False, ""))
        self.keep(key, answer, min(max(0.0 if ttl is None else <double>ttl, self.least), longest), self.stale)
        return answer

    def stale_answer(self, tuple key, double seconds):
        """Return an expired answer that may serve while no server answers, and serve it for some seconds; or None."""
        cdef object found = self.entries.get(key)
        cdef _Entry entry
        cdef double now = self.clock()
        if found is None:
            return None
        entry = <_Entry>found
        if now >= entry.stale_until:
            return None
        # What was validated once stays so: a relay that forgot it would do without DANE while the DNS is down.
        entry.answer = entry.answer._replace(is_stale=True)
        entry.expires = min(now + seconds, entry.stale_until)
        return entry.answer

    def clear(self):
        """Forget all answers."""
        self.entries.clear()


cdef tuple key_of(str name, str kind):
    name = name.lower()
    if name and name[len(name) - 1] == ".":
        name = name.rstrip(".")
    return name, kind


cdef class _Connected:
    """A connected UDP socket."""

    cdef object socket
    cdef int fd
    cdef int left
    """Queries until it is replaced."""


cdef class UdpPool:
    """The connected UDP sockets to one server: each is used by one query at a time, and again by others, at random."""

    cdef public object open_socket
    """Called without arguments for a new socket, non-blocking and connected."""
    cdef public int most
    """Queries under way."""
    cdef readonly set busy
    cdef object began
    cdef list idle
    cdef bint is_closed
    cdef bytes octets
    cdef Py_ssize_t at

    def __init__(self, open_socket not None, int most, began not None):
        self.open_socket = open_socket
        self.most = most
        self.began = began
        self.busy = set()
        self.idle = []
        self.octets = b""

    cdef int random(self) except -1:
        """Return a random number of 16 bits from the operating system, which is asked for many at a time."""
        cdef const unsigned char *p
        if self.at == PyBytes_GET_SIZE(self.octets):
            self.octets, self.at = _urandom(RANDOM_OCTETS), 0
        p = <const unsigned char *>PyBytes_AS_STRING(self.octets) + self.at
        self.at += 2
        return get16(p)

    def number(self):
        """Return a random number for the id of a query."""
        return self.random()

    cdef _Connected take(self):
        """Return a socket that no query uses."""
        cdef _Connected found
        cdef Py_ssize_t count = len(self.idle), place
        cdef int number = self.random()
        if self.is_closed:
            raise OSError("the resolver was closed")
        if count == 0 or count + len(self.busy) < LEAST_SOCKETS:
            if len(self.busy) >= self.most:
                raise OSError(EMFILE, "too many questions at once")
            found = _Connected.__new__(_Connected)
            found.socket = self.open_socket()
            found.fd = found.socket.fileno()
            found.left = 128 + (number & 127)
            return found
        place = number % count
        found = <_Connected>self.idle[place]
        self.idle[place] = self.idle[count - 1]
        self.idle.pop()
        found.left -= 1
        return found

    def send(self, str name not None, int kind, bint edns, double deadline):
        """Send a query; return what waits for the response."""
        cdef unsigned char[QUERY] query
        cdef Py_ssize_t size = write_query(query, self.random(), name, kind, edns)
        cdef UdpQuery used = UdpQuery.__new__(UdpQuery)
        used.pool = self
        used.connected = self.take()
        used.fd = used.connected.fd
        memcpy(used.query, query, size)
        used.size = size
        used.deadline = deadline
        if not self.busy:
            self.began()
        self.busy.add(used)
        # A full send buffer is like a lost datagram: the next server is asked.
        if c_send(used.fd, query, size, 0) < 0:
            try:
                PyErr_SetFromErrno(OSError)
            finally:
                used.abandon()
        return used

    def expire(self, double now):
        """Wake the tasks whose queries are over."""
        cdef UdpQuery each
        for each in tuple(self.busy):
            if each.deadline <= now:
                each.expire()

    def close(self):
        """Close the sockets, and wake all tasks that wait for a response."""
        cdef UdpQuery each
        cdef _Connected kept
        self.is_closed = True
        for each in tuple(self.busy):
            each.expire()
        for kept in self.idle:
            kept.socket.close()
        self.idle.clear()


cdef class UdpQuery:
    """A query that was sent, and the socket on which its response is waited for: until then, or until it is given up.

    Afterwards the socket belongs to another query, and nothing that is called here has an effect on it.
    """

    cdef readonly int fd
    cdef readonly double deadline
    """When the query ends, in the clock of trio."""
    cdef readonly bint is_expired
    cdef object held
    """A response, or an OSError, that `receive` returns or raises next."""
    cdef UdpPool pool
    cdef _Connected connected
    cdef Py_ssize_t size
    cdef unsigned char[QUERY] query

    cdef _Connected detach(self):
        """Give the socket away; None if that was done before."""
        cdef _Connected connected = self.connected
        self.connected = None
        self.fd = -1
        self.pool.busy.discard(self)
        return connected

    @property
    def is_due(self):
        """What `receive` returns need not be waited for."""
        return self.held is not None or self.is_expired

    def answer(self, Cache cache not None, tuple key not None, bint is_trusted):
        """Return the answer in the response, kept in the cache; None if `receive` has to find out more."""
        cdef tuple found
        cdef object answer
        try:
            found = self.receive()
        except OSError as exc:
            self.held = exc
            return None
        if found is None:
            return None
        if not found[1] and found[3] and (found[0] == NOERROR or found[0] == NXDOMAIN):
            answer = cache.keep_response(key, found, is_trusted, cache.longest)
            if answer is not None:
                return answer
        self.held = found
        return None

    cpdef tuple receive(self):
        """Return the response, as `decode_response` does; None until it arrives."""
        cdef object held = self.held
        if held is not None:
            self.held = None
            if isinstance(held, OSError):
                raise held
            return <tuple>held
        return self.receive_datagram()

    cdef tuple receive_datagram(self):
        """Return the response in a datagram that has arrived; None without one."""
        cdef unsigned char[DATAGRAM] wire
        cdef ssize_t n = c_recv(self.fd, wire, DATAGRAM, 0)
        cdef UdpPool pool = self.pool
        cdef _Connected connected
        if n < 0:
            if errno == EAGAIN or errno == EINTR:  # a datagram with a wrong checksum
                return None
            PyErr_SetFromErrno(OSError)
        if not matches(wire, n, self.query, self.size):
            return None
        connected = self.detach()
        if connected.left > 0 and len(pool.idle) < MAX_IDLE and not pool.is_closed:
            pool.idle.append(connected)
        else:
            connected.socket.close()
        try:
            return decode(wire, n)
        except MalformedMessageError:
            return wire[3] & 15, True, False, True, "", (), None

    cpdef object abandon(self):
        """Give the query up, and close the socket; nothing once the response was received."""
        cdef _Connected connected = self.detach()
        if connected is not None:
            connected.socket.close()

    cdef int expire(self) except -1:
        """Wake the task that waits: its time is over."""
        if not self.is_expired:
            self.is_expired = True
            _notify_closing(self.fd)
        return 0
