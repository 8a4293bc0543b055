"""Header fields and the canonical forms of DKIM (RFC 6376 3.4), compiled: they touch every octet of every message.

Header: one pass splits it into fields. Body: one pass with a state of a few octets (line ends, blanks and a CR whose
meaning is not known yet), so that any split into chunks gives the same, and memory does not grow with the message.
"""

from cpython.bytearray cimport PyByteArray_FromStringAndSize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeASCII, PyUnicode_DecodeUTF8
from libc.string cimport memchr, memcpy


cdef extern from "Python.h":
    bint PyUnicode_IS_ASCII(str text)
    void *PyUnicode_DATA(str text)
    Py_ssize_t PyUnicode_GET_LENGTH(str text)

cdef extern from "canon.h":
    size_t canon_relax(const unsigned char *p, size_t n, unsigned char *out, size_t room, size_t *written) noexcept
    bint canon_is_wide() noexcept
    size_t canon_relax_wide(const unsigned char *p, size_t n, unsigned char *out, size_t room, size_t *written,
                            size_t *line_ends) noexcept

cdef enum:
    BLOCK = 8192
    MORE = 3                # a colon and a line end
    LINE = 78               # of a field that we write (RFC 5322 2.1.1)
    MAX_VALUE = 320         # characters of a value in Authentication-Results
    LEAST_ROOM = 1024       # for what `canon_relax` writes at a time
    WIDE = 256              # octets from which `canon_relax_wide` is faster
    B_PADDING = 64          # no digits of base64
    B_BLANK = 65
    B_NONE = 66


cdef inline bint is_blank(unsigned char c) noexcept:
    return c == 32 or c == 9 or c == 13 or c == 10


cdef inline Py_ssize_t end_of_field(const unsigned char *p, Py_ssize_t i, Py_ssize_t n) noexcept:
    """Return where the field that begins at `i` ends: behind a line that no folded one follows."""
    cdef const unsigned char *found
    while True:
        found = <const unsigned char *>memchr(p + i, 10, n - i)
        i = n if found == NULL else found - p + 1
        if i >= n or (p[i] != 32 and p[i] != 9):
            return i


cdef inline Py_ssize_t end_of_text(const unsigned char *p, Py_ssize_t start, Py_ssize_t stop) noexcept:
    """Return where octets end without their last line end."""
    if stop > start and p[stop - 1] == 10:
        stop -= 2 if stop - start > 1 and p[stop - 2] == 13 else 1
    return stop


cdef class Field:
    """Position of a field in the header."""

    def __repr__(self):
        return f"<Field {self.name!r} {self.start}:{self.stop}>"


cdef class Header:
    """A header, split once and read by all checks."""

    def __init__(self, bytes octets):
        """`octets` are the lines of the header, without the empty line after them."""
        cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(octets)
        cdef Py_ssize_t n = PyBytes_GET_SIZE(octets), i = 0, start
        cdef const unsigned char *found
        cdef Field field
        cdef list same
        self.octets = octets
        self.fields = []
        self.by_name = {}
        while i < n:
            start = i
            i = end_of_field(p, i, n)
            field = Field.__new__(Field)
            field.start = field.colon = start
            field.stop = i
            found = <const unsigned char *>memchr(p + start, 58, i - start)
            if found == NULL:
                field.name = b""
            else:
                field.colon = found - p
                field.name = lower_name(p + start, field.colon - start)
            self.fields.append(field)
            same = <list>self.by_name.get(field.name)
            if same is None:
                self.by_name[field.name] = [field]
            else:
                same.append(field)

    cdef bytes text(self, Py_ssize_t start, Py_ssize_t stop):
        """Return octets without their last line end."""
        cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(self.octets)
        return self.octets[start:end_of_text(p, start, stop)]

    cpdef bytes value(self, Field field):
        """Return what follows the colon, without the last line end."""
        return self.text(min(field.colon + 1, field.stop), field.stop)

    def raw(self, Field field not None):
        """Return the whole field without its last line end."""
        return self.text(field.start, field.stop)

    cpdef bytes relaxed(self, Field field):
        """Return the field in the relaxed form, with CRLF (RFC 6376 3.4.2)."""
        # The relaxed form drops the last line end as well.
        return relaxed_field(field.name, self.octets[min(field.colon + 1, field.stop):field.stop])

    cdef list selected(self, list names):
        """Return the fields that a list of names means: those of a name from the bottom up (RFC 6376 5.4.2)."""
        cdef dict left = {}
        cdef list fields, found = []
        cdef Py_ssize_t number
        cdef object rest
        for name in names:
            fields = <list>self.by_name.get(name)
            if fields is None:
                continue
            rest = left.get(name)
            number = len(fields) if rest is None else <Py_ssize_t>rest
            if number > 0:
                number -= 1
                found.append(fields[number])
                left[name] = number
        return found

    def select(self, list names not None):
        """Return the fields that a list of names means: those of a name from the bottom up (RFC 6376 5.4.2)."""
        return self.selected(names)

    cpdef bytes signed(self, list names, Field own, bint relaxed):
        """Return what a signature field signs: the fields that it names, then itself without b= (RFC 6376 3.7)."""
        cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(self.octets)
        cdef list fields = self.selected(names)
        cdef bytes end = self.own(own, relaxed), made
        cdef unsigned char *out
        cdef Field field
        cdef Py_ssize_t size = PyBytes_GET_SIZE(end), o = 0, stop
        for each in fields:
            field = <Field>each
            size += field.stop - field.start + MORE
        made = PyBytes_FromStringAndSize(NULL, size)
        out = <unsigned char *>PyBytes_AS_STRING(made)
        for each in fields:
            field = <Field>each
            if relaxed:
                o += relax(out + o, field.name, p + min(field.colon + 1, field.stop), p + field.stop)
                continue
            stop = end_of_text(p, field.start, field.stop)
            memcpy(out + o, p + field.start, stop - field.start)
            o += stop - field.start
            out[o], out[o + 1] = 13, 10
            o += 2
        memcpy(out + o, PyBytes_AS_STRING(end), PyBytes_GET_SIZE(end))
        return made[:o + PyBytes_GET_SIZE(end)]

    cpdef bytes own(self, Field field, bint relaxed):
        """Return a signature field without the value of its b=, and without its last line end (RFC 6376 3.7)."""
        cdef bytes value = without_signature(self.text(min(field.colon + 1, field.stop), field.stop))
        if relaxed:
            value = relaxed_field(field.name, value)
            return value[:PyBytes_GET_SIZE(value) - 2]
        return self.octets[field.start:field.colon + 1] + value


cdef inline void put32(unsigned char *out, Py_ssize_t value) noexcept:
    out[0], out[1], out[2], out[3] = (value >> 24) & 255, (value >> 16) & 255, (value >> 8) & 255, value & 255


def milter_headers(bytes octets not None, bint keeps_blank):
    """Return SMFIC_HEADER of the milter protocol for each field of a header: its name and its value, each ended by NUL.

    Lines of a value are separated by LF, as sendmail has them; `keeps_blank`: it keeps the blank after the colon.
    """
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(octets)
    cdef const unsigned char *found
    cdef unsigned char *out
    cdef Py_ssize_t n = PyBytes_GET_SIZE(octets), i = 0, start, at, end, stop, o
    cdef bytes made
    cdef list packets = []
    while i < n:
        start = i
        i = end_of_field(p, i, n)
        found = <const unsigned char *>memchr(p + start, 58, i - start)
        if found == NULL or found == p + start:
            continue            # a line without a colon, or without a name
        end, at, stop = found - p, found - p + 1, i
        while end > start and (p[end - 1] == 32 or p[end - 1] == 9):
            end -= 1
        while stop > at and (p[stop - 1] == 13 or p[stop - 1] == 10):
            stop -= 1
        if not keeps_blank and at < stop and (p[at] == 32 or p[at] == 9):
            at += 1
        made = PyBytes_FromStringAndSize(NULL, end - start + stop - at + 7)
        out = <unsigned char *>PyBytes_AS_STRING(made)
        out[4] = c'L'
        memcpy(out + 5, p + start, end - start)
        o = 5 + end - start
        out[o] = 0
        o += 1
        while at < stop:
            if p[at] != 0 and not (p[at] == 13 and at + 1 < stop and p[at + 1] == 10):
                out[o] = p[at]
                o += 1
            at += 1
        out[o] = 0
        o += 1
        put32(out, o - 4)
        packets.append(made if o == PyBytes_GET_SIZE(made) else made[:o])
    return packets


def header_field(bytes name not None, bytes value not None, bint has_space):
    """Return a field with CRLF; None if the name is none. A value of several lines is folded, whatever they begin with.

    `has_space`: the value has what follows the colon.
    """
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(name)
    cdef const unsigned char *v = <const unsigned char *>PyBytes_AS_STRING(value)
    cdef unsigned char *out
    cdef Py_ssize_t n = PyBytes_GET_SIZE(name), size = PyBytes_GET_SIZE(value), breaks = 0, at = 0, end, k, o
    cdef bint is_first = True, is_empty
    cdef bytes made
    if not 0 < n <= 998:
        return None
    for k in range(n):
        if not 33 <= p[k] <= 126 or p[k] == 58:
            return None
    while size > 0 and is_blank(v[size - 1]):
        size -= 1
    for k in range(size):
        breaks += v[k] == 13 or v[k] == 10
    made = PyBytes_FromStringAndSize(NULL, n + size + 2 * breaks + 4)    # a line end of one octet becomes CRLF and TAB
    out = <unsigned char *>PyBytes_AS_STRING(made)
    memcpy(out, p, n)
    out[n] = 58
    o = n + 1
    if not has_space:
        out[o] = 32
        o += 1
    while True:
        end, is_empty = at, True
        while end < size and v[end] != 13 and v[end] != 10:
            if not (v[end] == 32 or 9 <= v[end] <= 12 or v[end] == 0):
                is_empty = False
            end += 1
        if is_first or not is_empty:    # an empty line would end the header
            while at < end and v[at] == 0:
                at += 1
            if not is_first:
                out[o], out[o + 1] = 13, 10
                o += 2
                if v[at] != 32 and v[at] != 9:
                    out[o] = 9
                    o += 1
            for k in range(at, end):
                if v[k] != 0:
                    out[o] = v[k]
                    o += 1
            is_first = False
        if end == size:
            break
        at = end + 2 if v[end] == 13 and v[end + 1] == 10 else end + 1
    out[o], out[o + 1] = 13, 10
    return made[:o + 2]


def milter_packet(bytes code not None, *parts):
    """Return a packet of the milter protocol: its length, its code of one octet, and its data."""
    cdef Py_ssize_t size = 0, at = 5
    cdef bytes part, made
    cdef unsigned char *out
    for each in parts:
        part = <bytes?>each
        size += PyBytes_GET_SIZE(part)
    made = PyBytes_FromStringAndSize(NULL, 5 + size)
    out = <unsigned char *>PyBytes_AS_STRING(made)
    put32(out, size + 1)
    out[4] = <unsigned char>PyBytes_AS_STRING(code)[0]
    for each in parts:
        part = <bytes>each
        memcpy(out + at, PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
        at += PyBytes_GET_SIZE(part)
    return made


cpdef bytes milter_text(str value):
    """Return a string as the milter protocol has it, ended by NUL; those in it are left out."""
    if "\0" in value:
        value = value.replace("\0", "")
    return value.encode("utf-8", "surrogateescape") + b"\0"


def milter_macros(bytes code not None, values):
    """Return SMFIC_MACRO for the command that follows; macros without a value are left out, b"" for none."""
    cdef list parts = []
    cdef str name, value
    for name, value in values:
        if value:
            parts += (name, "\0", value if "\0" not in value else value.replace("\0", ""), "\0")
    if not parts:
        return b""
    return milter_packet(b"D", code, "".join(parts).encode("utf-8", "surrogateescape"))


def milter_split(bytes octets not None, type packet not None, Py_ssize_t most):
    """Return the packets at the beginning of octets, how many octets they have, and the length of one that is invalid.

    Each packet is made as a `packet`, a tuple of its code and its data; those about progress (SMFIR_PROGRESS) are left
    out. The invalid length is -1 if all are valid.
    """
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(octets)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(octets), at = 0, length
    cdef list found = []
    while at + 4 <= n:
        length = (<Py_ssize_t>p[at] << 24) | (p[at + 1] << 16) | (p[at + 2] << 8) | p[at + 3]
        if not 0 < length <= most:
            return found, at, length
        if at + 4 + length > n:
            break
        if p[at + 4] != c'p':
            found.append(tuple.__new__(packet, (octets[at + 4:at + 5], octets[at + 5:at + 4 + length])))
        at += 4 + length
    return found, at, -1


cdef bytes lower_name(const unsigned char *p, Py_ssize_t n):
    """Return a field name in lower case, without the blanks after it."""
    cdef bytes name
    cdef unsigned char *out
    cdef Py_ssize_t k
    while n > 0 and (p[n - 1] == 32 or p[n - 1] == 9):
        n -= 1
    # Not made from the text and then changed: Python shares the objects of single octets.
    name = PyBytes_FromStringAndSize(NULL, n)
    out = <unsigned char *>PyBytes_AS_STRING(name)
    for k in range(n):
        out[k] = p[k] + 32 if 65 <= p[k] <= 90 else p[k]
    return name


cdef inline bint is_letter(unsigned char c) noexcept:
    return 97 <= (c | 32) <= 122


cpdef dict split_tags(bytes value):
    """Return a tag list (RFC 6376 3.2) as a dict; None for a malformed one. Values are stripped, and not unfolded."""
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(value)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(value), start = 0, end, a, b, k
    cdef const unsigned char *found
    cdef str name
    cdef dict tags = {}
    while start <= n:
        found = NULL if start == n else <const unsigned char *>memchr(p + start, 59, n - start)
        end = n if found == NULL else found - p
        a, b = start, end
        start = end + 1
        while a < b and is_blank(p[a]):
            a += 1
        if a == b:
            if end == n:
                break           # one semicolon may end the list
            return None
        k = a
        if not is_letter(p[k]):
            return None
        while k < b and (is_letter(p[k]) or 48 <= p[k] <= 57 or p[k] == 95):
            k += 1
        name = PyUnicode_DecodeASCII(<const char *>p + a, k - a, NULL)
        while k < b and is_blank(p[k]):
            k += 1
        if k == b or p[k] != 61 or name in tags:
            return None
        k += 1
        while k < b and is_blank(p[k]):
            k += 1
        while b > k and is_blank(p[b - 1]):
            b -= 1
        tags[name] = PyUnicode_DecodeUTF8(<const char *>p + k, b - k, "surrogateescape")
    return tags


cpdef str squeeze(str text):
    """Return a text without blanks and folds; the same object if it has none."""
    return text.replace(" ", "").replace("\t", "").replace("\r", "").replace("\n", "")


cdef unsigned char[256] BASE64      # the number of each digit, and what else a character is


cdef void init_base64() noexcept:
    cdef int k
    for k in range(256):
        BASE64[k] = B_NONE
    for k in range(26):
        BASE64[65 + k], BASE64[97 + k] = k, 26 + k
    for k in range(10):
        BASE64[48 + k] = 52 + k
    BASE64[43], BASE64[47], BASE64[61] = 62, 63, B_PADDING
    BASE64[9] = BASE64[10] = BASE64[13] = BASE64[32] = B_BLANK


init_base64()


cpdef bytes decode_base64(str text):
    """Return the octets of base64 with blanks in it; None if it is malformed."""
    cdef Py_ssize_t n = PyUnicode_GET_LENGTH(text), at, o = 0
    cdef const unsigned char *p
    cdef unsigned char *out
    cdef unsigned char digit
    cdef unsigned int bits = 0, digits = 0, padding = 0
    cdef bytes made
    if not PyUnicode_IS_ASCII(text):
        return None
    p = <const unsigned char *>PyUnicode_DATA(text)
    made = PyBytes_FromStringAndSize(NULL, n // 4 * 3 + 3)
    out = <unsigned char *>PyBytes_AS_STRING(made)
    for at in range(n):
        digit = BASE64[p[at]]
        if digit < 64:
            if padding:
                return None
            bits = bits << 6 | digit
            digits += 1
            if digits & 3 == 0:
                out[o], out[o + 1], out[o + 2] = bits >> 16 & 255, bits >> 8 & 255, bits & 255
                o += 3
        elif digit == B_PADDING:
            padding += 1
        elif digit == B_NONE:
            return None
    digits &= 3
    if digits == 0:
        return made[:o] if o or not padding else None
    if digits < 2 or digits + padding != 4:
        return None
    out[o] = (bits >> 10 if digits == 3 else bits >> 4) & 255
    out[o + 1] = bits >> 2 & 255
    return made[:o + digits - 1]


cdef inline bint is_token_char(Py_UCS4 c) noexcept:
    """Say whether a character may stand in a token (RFC 2045 5.1)."""
    return 33 <= c <= 126 and not (
        c == c'(' or c == c')' or c == c'<' or c == c'>' or c == c'@' or c == c',' or c == c';' or c == c':'
        or c == 92 or c == c'"' or c == c'/' or c == c'[' or c == c']' or c == c'?' or c == c'='
    )


cdef bint is_value(str text) noexcept:
    """Say whether a text needs no quotes: a token, perhaps with a domain behind it (RFC 8601 2.2)."""
    cdef Py_UCS4 c
    cdef Py_ssize_t n = len(text), before = 0, after = -1
    if not 0 < n <= MAX_VALUE:
        return False
    for c in text:
        if after >= 0:
            after += 1
            if not (is_letter(<unsigned char>c) if c < 128 else False) and not 48 <= c <= 57 and (
                c != c'.' and c != c'-' and c != c'_'
            ):
                return False
        elif c == c'@' and before:
            after = 0
        elif is_token_char(c):
            before += 1
        else:
            return False
    return after != 0


cpdef str simple_mailbox(bytes value):
    """Return the address in a From field of one ASCII mailbox without comments; None if it is anything else."""
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(value)
    cdef const unsigned char *found
    cdef Py_ssize_t n = PyBytes_GET_SIZE(value), i = 0, start, stop
    while n > 0 and is_blank(p[n - 1]):
        n -= 1
    while i < n and is_blank(p[i]):
        i += 1
    start, stop = i, n
    if n > 0 and p[n - 1] == 62:
        found = <const unsigned char *>memchr(p, 60, n)
        if found == NULL:
            return None
        start, stop = found - p + 1, n - 1
        i = 0
        while i < start - 1:        # the name before the address
            if p[i] == 34:
                i += 1
                while i < start - 1 and p[i] != 34:
                    if p[i] == 92 or p[i] >= 128:
                        return None
                    i += 1
                if i == start - 1:
                    return None     # the first < is in quotes, or they do not end
            elif p[i] >= 128 or is_special(p[i]):
                return None
            i += 1
    if start == stop:
        return None
    for i in range(start, stop):
        if not 32 < p[i] < 128 or is_special(p[i]) or p[i] == 34:
            return None
    return PyUnicode_DecodeASCII(<const char *>p + start, stop - start, NULL)


cdef inline bint is_special(unsigned char c) noexcept:
    """Say whether a character has a meaning in a list of mailboxes, besides the quotes."""
    return (
        c == c'(' or c == c')' or c == c',' or c == c':' or c == c';' or c == c'<' or c == c'>' or c == 92
    )


def quote(str text not None):
    """Return a value as a token or a quoted string (RFC 8601 2.2)."""
    if is_value(text):
        return text
    text = "".join([char if " " <= char <= "~" else "?" for char in text[:MAX_VALUE]])
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


cdef Py_ssize_t put_word(list pieces, Py_ssize_t column, str word):
    """Add a word to a field, on a line of its own if this one is full; return the column after it."""
    if column + 1 + len(word) >= LINE:
        pieces.append("\r\n\t")
        column = 0
    else:
        pieces.append(" ")
    pieces.append(word)
    return column + 1 + len(word)


def authentication_results(str authserv_id not None, results):
    """Return the field with its CRLF, folded; "none" if there are no results (RFC 8601 2.2)."""
    cdef list pieces = ["Authentication-Results: ", authserv_id]
    cdef Py_ssize_t column = 24 + len(authserv_id)
    cdef bint is_empty = True
    cdef str method, result, name, value
    cdef tuple properties
    for method, result, properties in results:
        is_empty = False
        pieces.append(";")
        column = put_word(pieces, column + 1, method + "=" + result)
        for name, value in properties:
            if value:
                column = put_word(pieces, column, name + "=" + <str>quote(value))
    if is_empty:
        pieces.append(";")
        put_word(pieces, column + 1, "none")
    pieces.append("\r\n")
    return "".join(pieces).encode("ascii")


cpdef bytes relaxed_field(bytes name, bytes value):
    """Return a field in the relaxed form, with its CRLF (RFC 6376 3.4.2); `name` is in lower case already."""
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(value)
    cdef Py_ssize_t n = PyBytes_GET_SIZE(value)
    cdef bytes made = PyBytes_FromStringAndSize(NULL, PyBytes_GET_SIZE(name) + n + MORE)
    return made[:relax(<unsigned char *>PyBytes_AS_STRING(made), name, p, p + n)]


cdef Py_ssize_t relax(unsigned char *out, bytes name, const unsigned char *p, const unsigned char *end) noexcept:
    """Write a field in the relaxed form, `MORE` octets longer at most than name and value; return its length."""
    cdef Py_ssize_t n = end - p, i = 0, start, o = PyBytes_GET_SIZE(name)
    cdef bint blank = False, started = False
    memcpy(out, PyBytes_AS_STRING(name), o)
    out[o] = 58
    o += 1
    while i < n:
        if p[i] == 32 or p[i] == 9:
            blank = started
            i += 1
        elif p[i] == 13 and i + 1 < n and p[i + 1] == 10:
            i += 2
        else:
            if blank:
                out[o] = 32
                o += 1
                blank = False
            start = i
            i = end_of_words(p, i + 1, n)
            memcpy(out + o, p + start, i - start)
            o += i - start
            started = True
    out[o], out[o + 1] = 13, 10
    return o + 2


cpdef bytes without_signature(bytes value):
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
    """Return where octets end that stay as they are: words with one space between each two.

    Eight octets are looked at together. They stay when none is a control and no two spaces follow each other; a space
    at their end is looked at again together with what follows it.
    """
    cdef unsigned long long eight, spaces
    while i < n:
        while i + 8 <= n:
            memcpy(&eight, p + i, 8)
            if (eight - 0x2020202020202020ULL) & ~eight & 0x8080808080808080ULL:
                break           # a control
            spaces = eight ^ 0x2020202020202020ULL
            spaces = ~(((spaces & 0x7F7F7F7F7F7F7F7FULL) + 0x7F7F7F7F7F7F7F7FULL) | spaces | 0x7F7F7F7F7F7F7F7FULL)
            if spaces & (spaces << 8):
                break
            i += 8 if p[i + 7] != 32 else 7
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

    def __init__(self, sink, bint relaxed, bint wide=True):
        self.sink = sink
        self.is_wide = wide and canon_is_wide()
        self.is_relaxed = relaxed
        self.is_empty = True
        self.block = PyByteArray_FromStringAndSize(NULL, BLOCK)     # `bytearray` would fill it
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

    cpdef feed(self, const unsigned char[:] data):
        """Take the next piece of the body."""
        cdef Py_ssize_t n = data.shape[0], i = 0, start
        cdef const unsigned char *p
        cdef const unsigned char *found
        cdef size_t written = 0, line_ends = 0
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
                if self.line_ends or self.blank or self.is_empty:
                    self.put_pending()
                if BLOCK - self.size < LEAST_ROOM:
                    self.flush()
                if self.is_wide and n - i > WIDE:
                    i += canon_relax_wide(p + i, n - i, self.out + self.size, BLOCK - self.size, &written, &line_ends)
                    self.line_ends = line_ends
                else:
                    i += canon_relax(p + i, n - i, self.out + self.size, BLOCK - self.size, &written)
                self.size += written
                if i > start:
                    continue
                i = end_of_words(p, i + 1, n)
            if self.line_ends or self.blank or self.is_empty:
                self.put_pending()
            self.put(p + start, i - start)
        self.flush()

    cpdef finish(self):
        """Take the end of the body: it ends in one CRLF, and an empty relaxed body is empty (RFC 6376 3.4.3, 3.4.4)."""
        if self.cr:
            self.put_pending()
        if not self.is_empty or not self.is_relaxed:
            self.put(b"\r\n", 2)
        self.flush()
