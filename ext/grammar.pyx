"""The plain form of the arguments of EHLO, MAIL and RCPT, as nearly all clients send them.

The plain form is a subset of the whole grammar (penstock.smtp.grammar), in its strict and in its tolerant mode: each
function here returns None for an argument that is not plain, and otherwise exactly what the whole grammar returns. A
property test compares the two.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_SET_ITEM

from penstock import reply as replies
from penstock.message import NO_PARAMETERS, MailParameters, Path, Recipient
from penstock.reply import Reply
from penstock.smtp.events import Mail


cdef extern from "Python.h":
    object PyUnicode_DecodeASCII(const char *text, Py_ssize_t size, const char *errors)
    object PyType_GenericAlloc(object type, Py_ssize_t items)

cdef enum:
    # The limits of the DNS (RFC 1035 2.3.4). Local parts and paths are bounded by the command line only.
    MAX_DOMAIN = 255
    MAX_LABEL = 63
    MAX_HELLO = 255
    MAX_SIZE_DIGITS = 20    # RFC 1870 5

cdef object too_big = replies.TOO_BIG
cdef object path_type = Path
cdef object recipient_type = Recipient
cdef object mail_type = Mail
cdef object no_parameters = NO_PARAMETERS

BAD_SENDER = Reply(501, "5.1.7", "Bad sender address syntax")
BAD_RECIPIENT = Reply(501, "5.1.3", "Bad recipient address syntax")

cdef bint[256] is_atext
cdef bint[256] is_let_dig
cdef int octet
for octet in range(256):
    is_let_dig[octet] = c'0' <= octet <= c'9' or c'A' <= octet <= c'Z' or c'a' <= octet <= c'z'
    is_atext[octet] = is_let_dig[octet] or (octet < 128 and octet in b"!#$%&'*+-/=?^_`{|}~")


cdef object of_type(object type, tuple items):
    """Return a named tuple without calling its constructor."""
    cdef object made = PyType_GenericAlloc(type, len(items))
    cdef Py_ssize_t i
    for i in range(len(items)):
        Py_INCREF(items[i])
        PyTuple_SET_ITEM(made, i, items[i])
    return made


cdef size_t skip_local_part(const unsigned char *p, size_t at, size_t stop) noexcept:
    """Return the end of the Dot-string that begins at `at` (RFC 5321 4.1.2), 0 without one."""
    while at < stop and is_atext[p[at]]:
        at += 1
        if at < stop and p[at] == c'.':
            at += 1
            if at == stop or not is_atext[p[at]]:
                return 0
    return at


cdef size_t skip_domain(const unsigned char *p, size_t at, size_t stop) noexcept:
    """Return the end of the Domain of letters, digits and hyphens that begins at `at`, 0 without one."""
    cdef size_t label
    while True:
        label = at
        while at < stop and (is_let_dig[p[at]] or p[at] == c'-'):
            at += 1
        if at == label or at - label > MAX_LABEL or p[label] == c'-' or p[at - 1] == c'-':
            return 0
        if at == stop or p[at] != c'.':
            return at
        at += 1


cdef object plain_path(const unsigned char *p, size_t begin, size_t stop, size_t *end):
    """Return the path `<local@domain>` that begins at `begin` and set its end; None when it is not plain."""
    cdef size_t at, local, domain, i
    cdef char lower[MAX_DOMAIN]
    if begin >= stop or p[begin] != c'<':
        return None
    local = begin + 1
    at = skip_local_part(p, local, stop)
    if at == 0 or at == local or at >= stop or p[at] != c'@':
        return None
    domain = at + 1
    at = skip_domain(p, domain, stop)
    if at == 0 or at >= stop or p[at] != c'>':
        return None
    if at - domain > MAX_DOMAIN:
        return None
    end[0] = at + 1
    for i in range(at - domain):
        lower[i] = p[domain + i] + 32 if c'A' <= p[domain + i] <= c'Z' else p[domain + i]
    return of_type(path_type, (
        PyUnicode_DecodeASCII(<const char *> p + local, at - local, NULL),
        PyUnicode_DecodeASCII(<const char *> p + local, domain - local - 1, NULL),
        PyUnicode_DecodeASCII(lower, at - domain, NULL),
    ))


cdef bint has_word(const unsigned char *p, size_t at, size_t stop, const char *word, size_t length) noexcept:
    """Return whether there is a word at a place, in any case; `word` is in upper case."""
    cdef size_t i
    if stop - at < length:
        return False
    for i in range(length):
        if (p[at + i] & ~32 if c'a' <= p[at + i] <= c'z' else p[at + i]) != <unsigned char> word[i]:
            return False
    return True


cdef bint skip_word(const unsigned char *p, size_t *at, size_t stop, const char *word, size_t length) noexcept:
    """Skip blanks and the word after them; skip nothing and return False when something else follows."""
    cdef size_t place = at[0]
    while place < stop and p[place] == c' ':
        place += 1
    if place == at[0] or not has_word(p, place, stop, word, length):
        return False
    at[0] = place + length
    return True


cpdef object plain_mail(bytes argument, bint esmtp, bint eightbitmime, unsigned long long max_size):
    cdef const unsigned char *p = <const unsigned char *> PyBytes_AS_STRING(argument)
    cdef size_t stop = PyBytes_GET_SIZE(argument)
    cdef size_t at = 0, digits
    cdef object path, size = None, body_type = None
    if not has_word(p, 0, stop, b"FROM:", 5):
        return None
    path = plain_path(p, 5, stop, &at)
    if path is None:
        return None
    if at < stop and skip_word(p, &at, stop, b"SIZE=", 5):
        digits = at
        while at < stop and c'0' <= p[at] <= c'9':
            at += 1
        if at == digits or at - digits > MAX_SIZE_DIGITS:
            return None
        size = int(argument[digits:at])
    if at < stop and skip_word(p, &at, stop, b"BODY=8BITMIME", 13):
        body_type = "8BITMIME"
    elif at < stop and skip_word(p, &at, stop, b"BODY=7BIT", 9):
        body_type = "7BIT"
    if at < stop:
        return None
    if size is None and body_type is None:
        return of_type(mail_type, (path, no_parameters, ()))
    if not esmtp or (body_type is not None and not eightbitmime):
        return None
    if size is not None and size > max_size > 0:
        return too_big  # RFC 1870 6.1
    return of_type(mail_type, (path, MailParameters(size, "7BIT" if body_type is None else body_type), ()))


cpdef object plain_recipient(bytes argument):
    """Return the recipient that a plain argument of RCPT names, None when the argument is not plain."""
    cdef const unsigned char *p = <const unsigned char *> PyBytes_AS_STRING(argument)
    cdef size_t stop = PyBytes_GET_SIZE(argument)
    cdef size_t at = 0
    cdef object path
    if not has_word(p, 0, stop, b"TO:", 3):
        return None
    path = plain_path(p, 3, stop, &at)
    if path is None or at < stop:
        return None
    return of_type(recipient_type, (path, None, None))


cpdef object plain_hello(bytes argument):
    """Return the argument of EHLO when it is one word of printable ASCII that is not too long, else None."""
    cdef const unsigned char *p = <const unsigned char *> PyBytes_AS_STRING(argument)
    cdef size_t size = PyBytes_GET_SIZE(argument), i
    if not 1 <= size <= MAX_HELLO:
        return None
    for i in range(size):
        if not c'\x21' <= p[i] <= c'\x7e':
            return None
    return PyUnicode_DecodeASCII(<const char *> p, size, NULL)
