"""The wire for other compiled modules."""

cdef enum Token:
    T_NEED_DATA, T_COMMAND, T_LINE_TOO_LONG, T_LINE_BAD_END, T_LINE_NUL, T_CHUNK, T_TEXT_END, T_TEXT_BROKEN, T_VIOLATION


cdef class Wire:
    # the input: octets [begin, end) of a block are not parsed yet
    cdef unsigned char *block
    cdef size_t capacity, begin, end
    # commands
    cdef size_t line_limit      # maximum octets of a line, CRLF included
    cdef size_t seen            # octets after begin that hold no LF
    cdef bint overlong          # the line is longer than its limit: drop it up to its LF
    cdef readonly int verb
    cdef readonly bytes argument
    # text
    cdef int mode
    cdef unsigned report, normalize
    cdef size_t text_line_limit, column
    cdef bint at_line_start, dropping, ended, held_cr
    cdef unsigned long long tail      # the last five octets while a refused text is skipped
    cdef bint watching_tail
    cdef readonly int violation
    cdef readonly unsigned long long octets   # of the body so far
    cdef unsigned long long max_octets
    cdef unsigned long long remaining  # of a BDAT chunk
    cdef bint last                    # the chunk is the last of its message
    cdef bint counts_text             # a BDAT chunk is text, so its lines are checked
    cdef public bint discard          # count the body and make no chunks
    cdef bint vectors
    cdef readonly bytes chunk
    # output of a text that grows while it is normalized
    cdef unsigned char *grown
    cdef size_t grown_from            # the place in the block of its first octet

    cdef Wire made_like(self)
    cdef Py_ssize_t receive(self, int fd, Py_ssize_t octets) except -2
    cdef size_t drop(self) noexcept
    cdef unsigned char *reserve(self, size_t octets) except NULL
    cdef void release(self) noexcept
    cpdef void rest(self) noexcept
    cpdef int next(self) except -1
    cdef int next_line(self) except -1
    cdef int cut(self, size_t start, size_t stop) except -1
    cdef bint violate(self, int kind) noexcept
    cdef bint put(self, size_t *out, const unsigned char *octets, size_t n) except -1
    cdef bint scan_into(self, size_t *source, size_t *out, size_t stop, unsigned report, int *kind) except -1
    cdef bint grow(self, size_t out, size_t rest) except -1
    cdef void repair(self, size_t *source, size_t *out, size_t n, const char *octets, size_t m, bint keep) noexcept
    cdef bint finish_chunk(self, size_t start, size_t out) except -1
    cdef int next_text(self) except -1
    cdef int watch_tail(self) noexcept
    cdef int next_octets(self) except -1
    cdef bint release_cr(self, size_t *source, size_t *out, size_t stop) except -1
