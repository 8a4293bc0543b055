"""Header fields and the canonical forms of DKIM (RFC 6376 3.4), compiled: they touch every octet of every message.

Header: one pass splits it into fields. Body: one pass with a state of a few octets (line ends, blanks and a CR whose
meaning is not known yet), so that any split into chunks gives the same, and memory does not grow with the message.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memchr, memcpy

cdef enum:
    BLOCK = 8192


def split_header(bytes header):
    """Return (name in lower case, start, colon, stop) of each field; a line without a colon is a field without name."""
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(header)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(header), i = 0, start, end, k
    cdef const unsigned char *found
    cdef bytes name
    cdef unsigned char *out
    cdef list fields = []
    while i < n:
        start = i
        while True:
            found = <const unsigned char *>memchr(p + i, 10, n - i)
            i = n if found == NULL else found - p + 1
            if i >= n or (p[i] != 32 and p[i] != 9):
                break
        found = <const unsigned char *>memchr(p + start, 58, i - start)
        if found == NULL:
            fields.append((b"", start, start, i))
            continue
        end = found - p
        while end > start and (p[end - 1] == 32 or p[end - 1] == 9):
            end -= 1
        # Not made from the text and then changed: Python shares the objects of single octets.
        name = PyBytes_FromStringAndSize(NULL, end - start)
        out = <unsigned char *>PyBytes_AS_STRING(name)
        for k in range(end - start):
            out[k] = p[start + k] + 32 if 65 <= p[start + k] <= 90 else p[start + k]
        fields.append((name, start, found - p, i))
    return fields


def relaxed_field(bytes name, bytes value):
    """Return a field in the relaxed form, with its CRLF (RFC 6376 3.4.2); `name` is in lower case already."""
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(value)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(value), size = PyBytes_GET_SIZE(name), i = 0, o
    cdef bytes made = PyBytes_FromStringAndSize(NULL, size + n + 3)
    cdef unsigned char *out = <unsigned char *>PyBytes_AS_STRING(made)
    cdef bint blank = False, started = False
    memcpy(out, PyBytes_AS_STRING(name), size)
    out[size] = 58
    o = size + 1
    while i < n:
        if p[i] == 32 or p[i] == 9:
            blank = started
        elif p[i] == 13 and i + 1 < n and p[i + 1] == 10:
            i += 1
        else:
            if blank:
                out[o] = 32
                o += 1
                blank = False
            out[o] = p[i]
            o += 1
            started = True
        i += 1
    out[o] = 13
    out[o + 1] = 10
    return made[:o + 2]


cdef inline bint is_blank(unsigned char c) noexcept:
    return c == 32 or c == 9 or c == 13 or c == 10


def without_signature(bytes value):
    """Return the value of a signature field without the value of its first b= (RFC 6376 3.7)."""
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(value)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(value), start = 0, i, end
    cdef const unsigned char *found
    while start < n:
        found = <const unsigned char *>memchr(p + start, 59, n - start)
        end = n if found == NULL else found - p
        i = start
        while i < end and is_blank(p[i]):
            i += 1
        if i < end and p[i] == 98:
            i += 1
            while i < end and is_blank(p[i]):
                i += 1
            if i < end and p[i] == 61:
                return value[:i + 1] + value[end:]
        start = end + 1
    return value


cdef inline Py_ssize_t end_of_words(const unsigned char *p, Py_ssize_t i, Py_ssize_t n) noexcept:
    """Return where octets end that stay as they are: words with one space between each two."""
    cdef unsigned long long eight
    while i < n:
        while i + 8 <= n:
            memcpy(&eight, p + i, 8)
            if (eight - 0x2121212121212121ULL) & ~eight & 0x8080808080808080ULL:
                break           # one of the eight octets is below 0x21
            i += 8
        while i < n and p[i] > 32:
            i += 1
        if i == n or p[i] == 13 or p[i] == 9:
            break
        if p[i] == 32:
            if i + 1 == n or p[i + 1] <= 32:
                break
            i += 1
        i += 1
    return i


cdef class BodyCanonicalizer:
    """The body in its canonical form, handed to a function in pieces of at most 8 KiB."""

    cdef object sink
    cdef bytearray block
    cdef unsigned char *out
    cdef Py_ssize_t size
    cdef long long line_ends
    cdef bint blank, cr, is_relaxed, is_empty

    def __init__(self, sink, bint relaxed):
        self.sink = sink
        self.is_relaxed = relaxed
        self.is_empty = True
        self.block = bytearray(BLOCK)
        self.out = self.block

    cdef int put(self, const unsigned char *p, Py_ssize_t n) except -1:
        cdef Py_ssize_t part
        while n:
            if self.size == BLOCK:
                self.flush()
            part = min(n, BLOCK - self.size)
            memcpy(self.out + self.size, p, part)
            self.size += part
            p += part
            n -= part
        return 0

    cdef int flush(self) except -1:
        if self.size:
            self.sink(memoryview(self.block)[:self.size])
            self.size = 0
        return 0

    cdef int put_pending(self) except -1:
        """Write the line ends, and the blank, that something follows."""
        while self.line_ends:
            self.put(b"\r\n", 2)
            self.line_ends -= 1
        if self.blank:
            self.put(b" ", 1)
            self.blank = False
        if self.cr:
            self.put(b"\r", 1)
            self.cr = False
        self.is_empty = False
        return 0

    def feed(self, const unsigned char[:] data):
        """Take the next piece of the body."""
        cdef Py_ssize_t n = data.shape[0], i = 0, start
        cdef const unsigned char *p
        cdef const unsigned char *found
        if n == 0:
            return
        p = &data[0]
        while i < n:
            if self.cr:
                if p[i] == 10:
                    self.cr = self.blank = False
                    self.line_ends += 1
                    i += 1
                    continue
                self.put_pending()
            if p[i] == 13:
                self.cr = True
                i += 1
                continue
            start = i
            if not self.is_relaxed:
                found = <const unsigned char *>memchr(p + i, 13, n - i)
                i = n if found == NULL else found - p
            elif p[i] == 32 or p[i] == 9:
                self.blank = True
                i += 1
                continue
            else:
                i = end_of_words(p, i + 1, n)
            if self.line_ends or self.blank or self.is_empty:
                self.put_pending()
            self.put(p + start, i - start)
        self.flush()

    def finish(self):
        """Take the end of the body: it ends in one CRLF, and an empty relaxed body is empty (RFC 6376 3.4.3, 3.4.4)."""
        if self.cr:
            self.put_pending()
        if not self.is_empty or not self.is_relaxed:
            self.put(b"\r\n", 2)
        self.flush()
