"""The plain form of the arguments of EHLO, MAIL and RCPT, as nearly all clients send them.

The plain form is a part of the whole grammar (penstock.smtp.grammar): each function here returns None for what it does
not know, and otherwise exactly what the whole grammar would. A property test compares the two.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_SET_ITEM

from penstock import reply as replies
from penstock.message import NO_PARAMETERS, MailParameters, Path, Recipient
from penstock.reply import Reply
from penstock.smtp.events import Mail, Rcpt


cdef extern from "Python.h":
    object PyUnicode_DecodeASCII(const char *text, Py_ssize_t size, const char *errors)
    object PyType_GenericAlloc(object type, Py_ssize_t items)

cdef enum:
    # RFC 5321 4.5.3.1.1, 4.5.3.1.2, 4.5.3.1.3 (with the angle brackets), 2.3.5
    MAX_LOCAL_PART = 64
    MAX_DOMAIN = 255
    MAX_PATH = 256
    MAX_LABEL = 63
    MAX_HELLO = 255
    MAX_SIZE_DIGITS = 20    # RFC 1870 5

cdef object bad_sender = Reply(501, "5.1.7", "Bad sender address syntax")
cdef object bad_recipient = Reply(501, "5.1.3", "Bad recipient address syntax")
cdef object too_big = replies.TOO_BIG
cdef object path_type = Path
cdef object recipient_type = Recipient
cdef object mail_type = Mail
cdef object rcpt_type = Rcpt
cdef object no_parameters = NO_PARAMETERS

BAD_SENDER = bad_sender
BAD_RECIPIENT = bad_recipient

cdef bint[256] is_atext
cdef bint[256] is_let_dig
cdef int octet
for octet in range(256):
    is_let_dig[octet] = c'0' <= octet <= c'9' or c'A' <= octet <= c'Z' or c'a' <= octet <= c'z'
    is_atext[octet] = is_let_dig[octet] or (octet < 128 and octet in b"!#$%&'*+-/=?^_`{|}~")


cdef object of_type(object type, tuple items):
    """Return a named tuple without the detour over its constructor."""
    cdef object made = PyType_GenericAlloc(type, len(items))
    cdef Py_ssize_t i
    for i in range(len(items)):
        Py_INCREF(items[i])
        PyTuple_SET_ITEM(made, i, items[i])
    return made


cdef size_t skip_local_part(const unsigned char *p, size_t at, size_t stop) noexcept:
    """Return where a Dot-string ends (RFC 5321 4.1.2), which begins at `at`; 0 when there is none."""
    while at < stop and is_atext[p[at]]:
        at += 1
        if at < stop and p[at] == c'.':
            at += 1
            if at == stop or not is_atext[p[at]]:
                return 0
    return at


cdef size_t skip_domain(const unsigned char *p, size_t at, size_t stop) noexcept:
    """Return where a Domain of letters, digits and hyphens ends; 0 when there is none."""
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


cdef object plain_path(const unsigned char *p, size_t begin, size_t stop, size_t *end, object bad):
    """Read `<local@domain>`, which begins at `begin`. Return the path and where it ends, `bad` when a part is too long.

    None is for what is no plain path.
    """
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
    end[0] = at + 1
    if domain - local - 1 > MAX_LOCAL_PART or at - domain > MAX_DOMAIN or at + 1 - begin > MAX_PATH:
        return bad
    for i in range(at - domain):
        lower[i] = p[domain + i] + 32 if c'A' <= p[domain + i] <= c'Z' else p[domain + i]
    return of_type(path_type, (
        PyUnicode_DecodeASCII(<const char *> p + local, at - local, NULL),
        PyUnicode_DecodeASCII(<const char *> p + local, domain - local - 1, NULL),
        PyUnicode_DecodeASCII(lower, at - domain, NULL),
    ))


cdef bint says(const unsigned char *p, size_t at, size_t stop, const char *word, size_t length) noexcept:
    """Say whether a word, given in upper case, stands at a place, in whatever case."""
    cdef size_t i
    if stop - at < length:
        return False
    for i in range(length):
        if (p[at + i] & ~32 if c'a' <= p[at + i] <= c'z' else p[at + i]) != <unsigned char> word[i]:
            return False
    return True


cdef bint begins_with(const unsigned char *p, size_t *at, size_t stop, const char *word, size_t length) noexcept:
    """Skip blanks and a word behind them. Where that is not what comes, skip nothing and return False."""
    cdef size_t place = at[0]
    while place < stop and p[place] == c' ':
        place += 1
    if place == at[0] or not says(p, place, stop, word, length):
        return False
    at[0] = place + length
    return True


cpdef object plain_mail(bytes argument, bint esmtp, bint eightbitmime, unsigned long long max_size):
    cdef const unsigned char *p = <const unsigned char *> PyBytes_AS_STRING(argument)
    cdef size_t stop = PyBytes_GET_SIZE(argument)
    cdef size_t at = 0, digits
    cdef object path, size = None, body_type = None
    if not says(p, 0, stop, b"FROM:", 5):
        return None
    path = plain_path(p, 5, stop, &at, bad_sender)
    if path is None:
        return None
    if at < stop and begins_with(p, &at, stop, b"SIZE=", 5):
        digits = at
        while at < stop and c'0' <= p[at] <= c'9':
            at += 1
        if at == digits or at - digits > MAX_SIZE_DIGITS:
            return None
        size = int(argument[digits:at])
    if at < stop and begins_with(p, &at, stop, b"BODY=8BITMIME", 13):
        body_type = "8BITMIME"
    elif at < stop and begins_with(p, &at, stop, b"BODY=7BIT", 9):
        body_type = "7BIT"
    if at < stop:
        return None
    if size is None and body_type is None:
        return path if path is bad_sender else of_type(mail_type, (path, no_parameters))
    if not esmtp or (body_type is not None and not eightbitmime):
        return None
    if path is bad_sender:
        return path
    if size is not None and size > max_size > 0:
        return too_big  # RFC 1870 6.1
    return of_type(mail_type, (path, MailParameters(size, "7BIT" if body_type is None else body_type)))


def plain_rcpt(bytes argument not None):
    cdef object recipient = plain_recipient(argument)
    if recipient is None or recipient is bad_recipient:
        return recipient
    return of_type(rcpt_type, (recipient,))


cpdef object plain_recipient(bytes argument):
    """Read what follows RCPT, when it is plain. Return the recipient, the refusal of one that is too long, or None."""
    cdef const unsigned char *p = <const unsigned char *> PyBytes_AS_STRING(argument)
    cdef size_t stop = PyBytes_GET_SIZE(argument)
    cdef size_t at = 0
    cdef object path
    if not says(p, 0, stop, b"TO:", 3):
        return None
    path = plain_path(p, 3, stop, &at, bad_recipient)
    if path is None or at < stop:
        return None
    if path is bad_recipient:
        return path
    return of_type(recipient_type, (path, None, None))


cpdef object plain_hello(bytes argument):
    """Return the name behind EHLO, when it is one that everybody takes: printable and not too long; else None."""
    cdef const unsigned char *p = <const unsigned char *> PyBytes_AS_STRING(argument)
    cdef size_t size = PyBytes_GET_SIZE(argument), i
    if not 1 <= size <= MAX_HELLO:
        return None
    for i in range(size):
        if not c'\x21' <= p[i] <= c'\x7e':
            return None
    return PyUnicode_DecodeASCII(<const char *> p, size, NULL)
