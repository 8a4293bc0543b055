"""What other compiled modules may do with a wire: take steps, and read what they have found."""

cdef enum Token:
    T_NEED_DATA, T_COMMAND, T_LINE_TOO_LONG, T_LINE_BAD_END, T_LINE_NUL, T_CHUNK, T_TEXT_END, T_TEXT_BROKEN, T_VIOLATION


cdef class Wire:
    # the input: octets [begin, end) of a block wait to be looked at
    cdef unsigned char *block
    cdef size_t capacity, begin, end
    # commands
    cdef size_t line_limit      # octets a line may have, CRLF included
    cdef size_t seen            # octets behind begin that hold no LF
    cdef bint overlong          # the line has passed its limit: drop octets up to its LF
    cdef readonly int verb
    cdef readonly bytes argument
    # text
    cdef int mode
    cdef unsigned report, normalize
    cdef size_t text_line_limit, column
    cdef bint at_line_start, dropping, ended, held_cr
    cdef unsigned long long tail      # the last five octets, while only the end of a refused text is looked for
    cdef bint watching_tail
    cdef readonly int violation
    cdef readonly unsigned long long octets   # of the body so far
    cdef unsigned long long max_octets
    cdef unsigned long long remaining # of a BDAT chunk
    cdef bint last                    # the chunk is the last of its message
    cdef bint counts_text             # a BDAT chunk is text, so its lines are looked at
    cdef public bint discard          # nobody wants the body: count it and make no chunks
    cdef bint vectors
    cdef readonly bytes chunk
    # a text that grows while it is normalized goes here
    cdef unsigned char *grown

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
    cdef void mend(self, size_t *source, size_t *out, size_t n, const char *octets, size_t m, bint keep) noexcept
    cdef bint finish_chunk(self, size_t start, size_t out) except -1
    cdef int next_text(self) except -1
    cdef int watch_tail(self) noexcept
    cdef int next_octets(self) except -1
    cdef bint take_fellow_of_held_cr(self, size_t *source, size_t *out) except -1
