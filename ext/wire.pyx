"""The wire: octets in, tokens out. Splits lines, cuts verb and argument, un-stuffs DATA, counts BDAT, enforces SIZE.

Theory
------
A wire owns one buffer. `feed` copies octets into it, `recv` reads them from a socket; `next` parses them in one of four
modes and returns a token:

    COMMAND   a line: `verb` and `argument`            (RFC 5321 4.1.1)
    LINE      a whole line, in `argument`              (the exchange of AUTH, RFC 4954 4)
    TEXT      CHUNK ... TEXT_END                       (DATA, RFC 5321 4.1.1.4 and 4.5.2)
    OCTETS    CHUNK ... TEXT_END                       (one BDAT chunk, RFC 3030 2)

Rules
-----
1. Any split of the input gives the same tokens, except for the boundaries between CHUNKs. Octets that cannot be
   decided yet stay in the buffer: a CR at its end, a dot or dot CR at the start of a line.
2. A token is made only on request: the input after a command is not parsed before the command has been answered,
   because the answer decides the mode for it.
3. Only CR LF . CR LF ends the data (RFC 5321 4.1.1.4). A bare LF or CR never starts a line, never ends the data, and
   never hides a dot.
4. A text that breaks a rule (`violation`) is read to its end and dropped, so that the reply belongs to the right
   command. While a text is refused for its line ends, its sender may believe that LF . LF has ended it: TEXT_BROKEN
   means that the two sides no longer agree about the end of the text.
5. Every buffer is bounded: an overlong line is dropped as it arrives, text leaves as CHUNKs, and `feed` refuses more
   than MAX_BUFFER unparsed octets.
6. No Python object is made for a line of text, and none at all for a body that is not kept (`discard`).
7. An idle wire holds no buffer: all wires share a pool of equal blocks (`rest`).
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcpy, memmove


cdef extern from "sys/socket.h" nogil:
    ssize_t c_recv "recv"(int fd, void *buffer, size_t size, int flags)


cdef extern from "scan.h" nogil:
    enum: SCAN_MORE, SCAN_DOT, SCAN_BARE_LF, SCAN_BARE_CR, SCAN_NUL, SCAN_LONG, SCAN_HAS_VECTORS
    unsigned SCAN_BIT(int kind)
    ctypedef struct scan_result:
        size_t at
        size_t column
        int kind
    scan_result scan_text(const unsigned char *p, size_t n, size_t column, size_t limit, unsigned report, int vectors)


# Tokens. The .pyi gives their meaning.
NEED_DATA, COMMAND, LINE_TOO_LONG, LINE_BAD_END, LINE_NUL, CHUNK, TEXT_END, TEXT_BROKEN, VIOLATION = range(9)

cdef enum Mode:
    M_COMMAND, M_LINE, M_TEXT, M_OCTETS

# Violations: the rule that a text breaks. The first four are the kinds of scan.h.
BARE_LF = SCAN_BARE_LF
BARE_CR = SCAN_BARE_CR
NUL = SCAN_NUL
LONG_LINE = SCAN_LONG
TOO_BIG = 6
cdef int V_TOO_BIG = 6

HAS_VECTORS = bool(SCAN_HAS_VECTORS)

VERBS = (
    "", "HELO", "EHLO", "LHLO", "MAIL", "RCPT", "DATA", "BDAT", "RSET", "NOOP", "QUIT", "VRFY", "EXPN", "HELP",
    "AUTH", "STARTTLS", "HTTP",
)

cdef enum:
    BLOCK = 65536                # octets of a pooled block
    SPARE_BLOCKS = 64            # unused blocks in the pool: 4 MiB at most
    SMALL = 4096                 # at most this many waiting octets move to a small block while the wire is idle
    MAX_BUFFER_OCTETS = 1 << 20
    MIN_TEXT_LINE = 64

MAX_BUFFER = MAX_BUFFER_OCTETS

cdef unsigned char *spare[SPARE_BLOCKS]
cdef int spares = 0
cdef Py_ssize_t in_use = 0


cdef unsigned char *take_block(size_t capacity) except NULL:
    global spares, in_use
    cdef unsigned char *block
    if capacity == BLOCK and spares > 0:
        spares -= 1
        in_use += 1
        return spare[spares]
    block = <unsigned char *> malloc(capacity)
    if block == NULL:
        raise MemoryError
    in_use += 1
    return block


cdef void give_block(unsigned char *block, size_t capacity) noexcept:
    global spares, in_use
    in_use -= 1
    if capacity == BLOCK and spares < SPARE_BLOCKS:
        spare[spares] = block
        spares += 1
    else:
        free(block)


def blocks_in_use():
    return in_use


cdef int verb_number(const unsigned char *p, size_t n) noexcept:
    """Return the index of a verb in VERBS, in any case of letters; 0 for an unknown verb."""
    cdef unsigned long long word = 0
    cdef size_t i
    cdef unsigned char c
    if n < 3 or n > 8:
        return 0
    for i in range(n):
        c = p[i]
        if c'a' <= c <= c'z':
            c -= 32
        word = word << 8 | c
    # The verbs as numbers: their letters, the last one in the lowest octet.
    if word == 0x4D41494C:
        return 4  # MAIL
    if word == 0x52435054:
        return 5  # RCPT
    if word == 0x44415441:
        return 6  # DATA
    if word == 0x51554954:
        return 10  # QUIT
    if word == 0x45484C4F:
        return 2  # EHLO
    if word == 0x48454C4F:
        return 1  # HELO
    if word == 0x52534554:
        return 8  # RSET
    if word == 0x42444154:
        return 7  # BDAT
    if word == 0x4E4F4F50:
        return 9  # NOOP
    if word == 0x4C484C4F:
        return 3  # LHLO
    if word == 0x56524659:
        return 11  # VRFY
    if word == 0x4558504E:
        return 12  # EXPN
    if word == 0x48454C50:
        return 13  # HELP
    if word == 0x41555448:
        return 14  # AUTH
    if word == 0x5354415254544C53:
        return 15  # STARTTLS
    # GET, POST, PUT, HEAD, DELETE, CONNECT, OPTIONS, PATCH, TRACE: an HTTP client, or an attack by way of one
    if word in (
        0x474554, 0x504F5354, 0x505554, 0x48454144, 0x44454C455445, 0x434F4E4E454354, 0x4F5054494F4E53, 0x5041544348,
        0x5452414345,
    ):
        return 16
    return 0


cdef class Wire:
    """The reading side of one connection. The .pyi documents each method."""

    def __cinit__(self):
        self.block = NULL
        self.grown = NULL

    def __init__(
        self,
        *,
        unsigned int line_limit=2048,
        unsigned int text_line_limit=998,
        unsigned long long max_octets=0,
        reject=("bare_lf", "bare_cr", "nul", "long_line"),
        normalize=(),
        bint vectors=True,
    ):
        cdef dict kinds = {
            "bare_lf": SCAN_BARE_LF, "bare_cr": SCAN_BARE_CR, "nul": SCAN_NUL, "long_line": SCAN_LONG,
        }
        if text_line_limit < MIN_TEXT_LINE:
            raise ValueError(f"text_line_limit must be at least {MIN_TEXT_LINE}, not {text_line_limit}")
        for name in (*reject, *normalize):
            if name not in kinds:
                raise ValueError(f"unknown wire rule {name!r}; expected one of: {', '.join(kinds)}")
        self.line_limit = line_limit
        self.text_line_limit = text_line_limit
        self.max_octets = max_octets
        self.vectors = vectors
        self.report = SCAN_BIT(SCAN_DOT)
        self.normalize = 0
        for name in reject:
            self.report |= SCAN_BIT(kinds[name])
        for name in normalize:
            self.report |= SCAN_BIT(kinds[name])
            self.normalize |= SCAN_BIT(kinds[name])
        self.argument = b""
        self.chunk = b""
        self.mode = M_COMMAND

    def fresh(self):
        return self.made_like()

    cdef Wire made_like(self):
        """Return a new wire with the same rules."""
        cdef Wire other = Wire.__new__(Wire)
        other.line_limit = self.line_limit
        other.text_line_limit = self.text_line_limit
        other.max_octets = self.max_octets
        other.vectors = self.vectors
        other.report = self.report
        other.normalize = self.normalize
        other.argument = b""
        other.chunk = b""
        other.mode = M_COMMAND
        return other

    def __dealloc__(self):
        self.release()
        free(self.grown)

    # ---- input

    cdef unsigned char *reserve(self, size_t octets) except NULL:
        """Return space for that many octets after the waiting ones."""
        cdef size_t waiting = self.end - self.begin
        cdef size_t wanted = waiting + octets
        cdef size_t capacity
        cdef unsigned char *block
        if self.block != NULL:
            if self.capacity - self.end >= octets:
                return self.block + self.end
            if self.capacity >= wanted:
                memmove(self.block, self.block + self.begin, waiting)
                self.begin = 0
                self.end = waiting
                return self.block + waiting
        if wanted > MAX_BUFFER_OCTETS:
            raise BufferError(f"a wire holds at most {MAX_BUFFER_OCTETS} unparsed octets")
        capacity = BLOCK if wanted <= BLOCK else wanted
        block = take_block(capacity)
        if self.block != NULL:
            memcpy(block, self.block + self.begin, waiting)
            give_block(self.block, self.capacity)
        self.block = block
        self.capacity = capacity
        self.begin = 0
        self.end = waiting
        return block + waiting

    cdef void release(self) noexcept:
        if self.block != NULL:
            give_block(self.block, self.capacity)
            self.block = NULL
        self.capacity = self.begin = self.end = 0

    def feed(self, data not None):
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if view.len > 0:
                memcpy(self.reserve(view.len), view.buf, view.len)
                self.end += view.len
        finally:
            PyBuffer_Release(&view)

    def recv(self, int fd, Py_ssize_t octets=BLOCK):
        return self.receive(fd, octets)

    cdef Py_ssize_t receive(self, int fd, Py_ssize_t octets) except -2:
        """`recv` for compiled callers."""
        cdef ssize_t n
        # Stay within one block: what does not fit stays in the kernel.
        cdef size_t waiting = self.end - self.begin
        cdef size_t room = max(BLOCK - waiting, <size_t> SMALL) if waiting < BLOCK else SMALL
        if <size_t> octets < room:
            room = octets
        if waiting == 0:
            self.begin = self.end = 0
        cdef unsigned char *into = self.reserve(room)
        while True:
            n = c_recv(fd, into, room, 0)
            if n >= 0:
                self.end += n
                return n
            if errno == EINTR:
                continue
            if errno == EAGAIN:
                return -1
            PyErr_SetFromErrno(OSError)

    cpdef void rest(self) noexcept:
        """Release the buffer; see the .pyi."""
        global in_use
        cdef size_t waiting = self.end - self.begin
        cdef unsigned char *small
        if waiting == 0:
            self.release()
        elif waiting <= SMALL and self.capacity > SMALL:
            small = <unsigned char *> malloc(SMALL)
            if small != NULL:
                in_use += 1
                memcpy(small, self.block + self.begin, waiting)
                give_block(self.block, self.capacity)
                self.block = small
                self.capacity = SMALL
                self.begin = 0
                self.end = waiting

    def drop_input(self):
        return self.drop()

    cdef size_t drop(self) noexcept:
        """Drop the unparsed input. Return how many octets it had."""
        cdef size_t waiting = self.end - self.begin
        self.release()
        self.seen = 0
        self.overlong = False
        return waiting

    @property
    def waiting(self):
        return self.end - self.begin

    # ---- modes

    def set_line_limit(self, unsigned int octets):
        self.line_limit = octets

    def expect_commands(self):
        self.mode = M_COMMAND

    def expect_line(self):
        self.mode = M_LINE

    def expect_text(self):
        self.mode = M_TEXT
        self.at_line_start = True  # as if a CRLF had just passed: that of the DATA command (RFC 5321 4.1.1.4)
        self.column = 0
        self.octets = 0
        self.violation = 0
        self.dropping = self.watching_tail = self.ended = self.held_cr = False

    def expect_octets(
        self, unsigned long long octets, *, bint last=True, bint text=True, bint first=True, bint drop=False
    ):
        self.mode = M_OCTETS
        self.remaining = octets
        self.last = last
        self.counts_text = text
        self.ended = False
        if first:
            self.column = 0
            self.octets = 0
            self.violation = 0
            self.held_cr = False
            self.watching_tail = False
            self.dropping = False
        if drop:
            self.dropping = True

    # ---- output

    cpdef int next(self) except -1:
        """Return the next token; see the .pyi."""
        if self.mode == M_TEXT:
            return self.next_text()
        if self.mode == M_OCTETS:
            return self.next_octets()
        return self.next_line()

    cdef int next_line(self) except -1:
        cdef unsigned char *start = self.block + self.begin
        cdef size_t waiting = self.end - self.begin
        cdef unsigned char *lf = NULL
        cdef size_t length
        cdef bint has_cr
        if waiting > self.seen:
            lf = <unsigned char *> memchr(start + self.seen, c'\n', waiting - self.seen)
        if lf == NULL:
            if self.overlong or waiting >= self.line_limit:
                # Keep nothing of a line that is already too long, only that fact.
                self.overlong = True
                self.begin = self.end
                self.seen = 0
            else:
                self.seen = waiting
            return T_NEED_DATA
        length = lf - start
        self.begin += length + 1
        self.seen = 0
        if self.overlong or length + 1 > self.line_limit:
            self.overlong = False
            return T_LINE_TOO_LONG
        has_cr = length > 0 and start[length - 1] == c'\r'
        if has_cr:
            length -= 1
        elif self.report & SCAN_BIT(SCAN_BARE_LF) and not self.normalize & SCAN_BIT(SCAN_BARE_LF):
            return T_LINE_BAD_END
        if memchr(start, 0, length) != NULL:
            return T_LINE_NUL
        if memchr(start, c'\r', length) != NULL:
            return T_LINE_BAD_END
        if self.mode == M_LINE:
            self.argument = PyBytes_FromStringAndSize(<char *> start, length)
            return T_COMMAND
        return self.cut(start - self.block, start - self.block + length)

    cdef int cut(self, size_t start, size_t stop) except -1:
        """Cut a line into verb and argument."""
        cdef unsigned char *p = self.block + start
        cdef size_t length = stop - start
        cdef size_t i = 0
        # White space at the end is tolerated (RFC 5321 4.1.1).
        while length > 0 and (p[length - 1] == c' ' or p[length - 1] == c'\t'):
            length -= 1
        while i < length and p[i] != c' ' and p[i] != c'\t':
            i += 1
        self.verb = verb_number(p, i)
        if self.verb == 0:
            self.argument = PyBytes_FromStringAndSize(<char *> p, length)
            return T_COMMAND
        while i < length and (p[i] == c' ' or p[i] == c'\t'):
            i += 1
        if i == length:
            self.argument = b""
        else:
            self.argument = PyBytes_FromStringAndSize(<char *> p + i, length - i)
        return T_COMMAND

    # ---- text

    cdef bint violate(self, int kind) noexcept:
        """Record a violation and drop the rest of the text. Return True if it is the first one."""
        self.dropping = True
        if self.violation != 0:
            return False
        self.violation = kind
        return True

    cdef bint put(self, size_t *out, const unsigned char *octets, size_t n) except -1:
        """Write octets of the un-stuffed text: in place, or into the grown buffer if there is one."""
        cdef unsigned char *target = self.block + out[0]
        if self.grown != NULL:
            target = self.grown + (out[0] - self.grown_from)
        if target != octets:
            memmove(target, octets, n)
        out[0] += n
        return True

    cdef bint scan_into(self, size_t *source, size_t *out, size_t stop, unsigned report, int *kind) except -1:
        """Move text from source to out up to the next octet that needs a decision; normalize on the way.

        Sets `kind` to SCAN_MORE, SCAN_DOT or a violation, and `at_line_start` for the octet at source.
        """
        cdef scan_result r
        cdef unsigned char *p
        cdef bint keep = not self.dropping and not self.discard
        while True:
            p = self.block + source[0]
            r = scan_text(p, stop - source[0], self.column, self.text_line_limit, report, self.vectors)
            if r.at > 0:
                # Checked before the octets move. A CR is never separated from its LF, so both are in this run.
                self.at_line_start = r.at > 1 and p[r.at - 1] == c'\n' and p[r.at - 2] == c'\r'
                if keep:
                    self.put(out, p, r.at)
            self.octets += r.at
            source[0] += r.at
            self.column = r.column
            kind[0] = r.kind
            if r.kind == SCAN_MORE or r.kind == SCAN_DOT or not self.normalize & SCAN_BIT(r.kind):
                return True
            if keep and self.grown == NULL:
                self.grow(out[0], stop - source[0])
            self.at_line_start = False
            if r.kind == SCAN_BARE_LF:
                self.repair(source, out, 1, b"\r\n", 2, keep)
                self.column = 0
            elif r.kind == SCAN_BARE_CR:
                self.repair(source, out, 1, b" ", 1, keep)
                self.column += 1
            elif r.kind == SCAN_NUL:
                self.repair(source, out, 1, b"", 0, keep)
            else:  # SCAN_LONG: fold, as Postfix does
                self.repair(source, out, 0, b"\r\n ", 3, keep)
                self.column = 1

    cdef bint grow(self, size_t out, size_t rest) except -1:
        """Make the grown buffer. Worst case: every octet is a bare LF and becomes two, every 64th is folded."""
        # Only what belongs to this chunk: a client may send thousands of small ones in one block.
        cdef size_t before = out - self.grown_from
        cdef unsigned char *grown = <unsigned char *> malloc(before + rest * 2 + (rest // (MIN_TEXT_LINE - 1) + 2) * 3)
        if grown == NULL:
            raise MemoryError
        memcpy(grown, self.block + self.grown_from, before)
        self.grown = grown
        return True

    cdef void repair(self, size_t *source, size_t *out, size_t n, const char *octets, size_t m, bint keep) noexcept:
        """Replace n octets of the input by m others."""
        source[0] += n
        self.octets += m
        if keep:
            memcpy(self.grown + (out[0] - self.grown_from), octets, m)
            out[0] += m

    cdef bint finish_chunk(self, size_t start, size_t out) except -1:
        """Make the chunk of [start, out). Return False if it is empty or dropped."""
        cdef unsigned char *source = self.block + start
        cdef bint some = out > start and not self.dropping
        if self.grown != NULL:
            source = self.grown  # from the start of the chunk
        if some:
            self.chunk = PyBytes_FromStringAndSize(<char *> source, out - start)
        if self.grown != NULL:
            free(self.grown)
            self.grown = NULL
        return some

    cdef int next_text(self) except -1:
        cdef size_t start = self.begin
        cdef size_t source = start
        cdef size_t out = start
        cdef size_t stop = self.end
        cdef unsigned char *p
        cdef int kind = SCAN_MORE
        cdef bint news = False
        cdef bint after_dot
        self.grown_from = start
        while source < stop and not self.ended and not self.watching_tail:
            p = self.block + source
            after_dot = False
            if self.at_line_start and p[0] == c'.':
                if stop - source < 2 or (p[1] == c'\r' and stop - source < 3):
                    break  # the end of the data or a stuffed dot: the next octets decide
                if p[1] == c'\r' and p[2] == c'\n':
                    source += 3
                    self.ended = True
                    break
                source += 1  # a stuffed dot (RFC 5321 4.5.2)
                self.at_line_start = False
                after_dot = True
            self.scan_into(&source, &out, stop, self.report, &kind)
            if self.max_octets and self.octets > self.max_octets:
                news |= self.violate(V_TOO_BIG)
            if kind == SCAN_MORE:
                break
            if kind == SCAN_DOT:
                self.at_line_start = True
            else:
                news |= self.violate(kind)
                self.watching_tail = True
                # The octets before this one that can be part of an end of the data.
                after_dot = after_dot and self.block + source == p + 1
                self.tail = 0x0D0A2E if after_dot else 0x0D0A if self.at_line_start else 0
        self.begin = source
        if self.finish_chunk(start, out):
            return T_CHUNK
        if news:
            return T_VIOLATION
        if self.watching_tail and not self.ended:
            return self.watch_tail()
        if self.ended:
            self.mode = M_COMMAND
            self.seen = 0
            return T_TEXT_END
        return T_NEED_DATA

    cdef int watch_tail(self) noexcept:
        """Drop a refused text up to its end; only the last five octets matter."""
        cdef unsigned long long tail = self.tail
        cdef unsigned char *p = self.block
        cdef size_t i = self.begin
        cdef bint lf_matters = self.report & ~self.normalize & SCAN_BIT(SCAN_BARE_LF) != 0
        cdef int token = T_NEED_DATA
        while i < self.end:
            tail = (tail << 8 | p[i]) & 0xFFFFFFFFFF
            i += 1
            if p[i - 1] != c'\n':
                continue
            if tail == 0x0D0A2E0D0A:  # CR LF . CR LF
                self.mode = M_COMMAND
                self.seen = 0
                token = T_TEXT_END
                break
            if lf_matters and (tail & 0xFFFFFF == 0x0A2E0A or tail & 0xFFFFFFFF == 0x0A2E0D0A):
                token = T_TEXT_BROKEN  # LF . LF or LF . CR LF: the sender may believe that the text has ended
                break
        self.begin = i
        self.tail = tail
        return token

    cdef int next_octets(self) except -1:
        cdef size_t start = self.begin
        cdef size_t source = start
        cdef size_t out = start
        cdef size_t stop = self.end
        cdef int kind = SCAN_MORE
        cdef bint news = False
        self.grown_from = start
        if stop - source > self.remaining:
            stop = source + self.remaining
        if source < stop:
            if self.counts_text and not self.dropping:
                if self.held_cr:
                    news |= self.release_cr(&source, &out, stop)
                self.scan_into(&source, &out, stop, self.report & ~SCAN_BIT(SCAN_DOT), &kind)
                if kind != SCAN_MORE:
                    news |= self.violate(kind)
                elif source + 1 == stop and stop - start == self.remaining:
                    # A CR at the end of a chunk: its LF may be the first octet of the next one.
                    self.held_cr = True
                    self.octets += 1
                    source += 1
            else:
                self.octets += stop - source
                out = stop
                source = stop
            if self.max_octets and self.octets > self.max_octets:
                news |= self.violate(V_TOO_BIG)
            if self.dropping:
                source = stop
            self.remaining -= source - start
            self.begin = source
        if self.remaining == 0 and self.last and self.held_cr:
            news |= self.release_cr(&source, &out, source)
        if self.discard:
            out = start
        if self.finish_chunk(start, out):
            return T_CHUNK
        if news:
            return T_VIOLATION
        if self.remaining == 0:
            self.mode = M_COMMAND
            self.seen = 0
            return T_TEXT_END
        return T_NEED_DATA

    cdef bint release_cr(self, size_t *source, size_t *out, size_t stop) except -1:
        """Decide about the CR that ended the previous chunk, by the octet after it. Return True for a violation.

        Nothing was written for the CR yet: it belongs to a LF, or it is bare and rejected, normalized or accepted.
        """
        cdef bint has_lf = source[0] < stop and self.block[source[0]] == c'\n'
        cdef bint keep = not self.dropping and not self.discard
        self.held_cr = False
        if not has_lf and self.report & ~self.normalize & SCAN_BIT(SCAN_BARE_CR):
            return self.violate(SCAN_BARE_CR)
        if keep and self.grown == NULL:  # a CR may have been released at the start of the same octets
            self.grow(out[0], stop - source[0] + 1)
        if has_lf:
            self.octets -= 1  # counted when it was held; `repair` counts both
            self.repair(source, out, 1, b"\r\n", 2, keep)
            self.column = 0
        else:
            self.octets -= 1
            self.repair(source, out, 0, b" " if self.normalize & SCAN_BIT(SCAN_BARE_CR) else b"\r", 1, keep)
            self.column += 1
        return False
