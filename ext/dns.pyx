"""DNS messages (RFC 1035 4, RFC 6891): queries are written, responses are read.

A response comes from anywhere, so that every octet is checked before it is read:

- a compression pointer leads backwards, to before the name part it ends (no loops, RFC 1035 4.1.4);
- a name has at most 255 octets, a response at most MAX_RECORDS records, a chain of aliases at most MAX_ALIASES;
- the length of a record's data is what the data of its type takes, no more and no less.

Only records that answer the question are returned: those that belong to the name asked for, or to the name at the end
of its aliases (RFC 1034 4.3.2). What a server adds about other names is never believed.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcmp, memcpy


cdef extern from "Python.h":
    object PyUnicode_DecodeASCII(const char *text, Py_ssize_t size, const char *errors)

cdef enum:
    HEADER = 12
    MAX_NAME = 255          # RFC 1035 2.3.4
    MAX_LABEL = 63
    ALIASES = 8
    RECORDS = 1000
    PAYLOAD = 1232          # what passes every path without fragments (RFC 9715 3.2)
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


def encode_query(int ident, str name, int kind, bint edns=True):
    """Return a recursive query of class IN that asks for the AD bit (RFC 6840 5.7)."""
    cdef bytes text = name.encode()
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(text)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(text), i, start = 0, o = HEADER
    cdef unsigned char[HEADER + MAX_NAME + 1 + 4 + 11] out
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
    return PyBytes_FromStringAndSize(<const char *>out, o)


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

    A failure without a question section is a response as well: servers that cannot read a query say so like this.
    """
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(wire)
    cdef const unsigned char *q = <const unsigned char *>PyBytes_AS_STRING(query)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(wire), i, end
    if n < HEADER or p[0] != q[0] or p[1] != q[1] or p[2] & 0xF8 != 0x80:   # QR, and opcode QUERY
        return False
    if p[4] == 0 and p[5] == 0:
        return p[3] & 15 != NOERROR and p[3] & 15 != NXDOMAIN
    end = question_end(q, PyBytes_GET_SIZE(query))
    if p[4] != 0 or p[5] != 1 or n < end:
        return False
    for i in range(HEADER, end - 4):
        if lower(p[i]) != lower(q[i]):
            return False
    return memcmp(p + end - 4, q + end - 4, 4) == 0


cdef str read_name(const unsigned char *p, Py_ssize_t n, Py_ssize_t *at):
    """Return a name in lower case without its final dot, "" for the root, and move behind it.

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
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(wire)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(wire), at, start, size
    cdef unsigned int answers, authorities, total, number, rcode, ttl
    cdef int kind, asked
    cdef list found = []
    cdef str owner, name
    cdef object negative = None
    cdef bint has_ns = False
    if not is_response_to(wire, query):
        raise MalformedMessageError("not the response to the question")
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
    return follow(wire, rcode, name, asked, found, negative, has_ns and not p[2] & 4 and not p[3] & 0x80)


cdef tuple follow(bytes wire, unsigned int rcode, str name, int asked, list found, object negative, bint referred):
    """Return the result of `decode_response`, from the records of the answer section."""
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(wire)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(wire), start, size
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
