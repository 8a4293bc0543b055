"""The most frequent lines of the journal, formatted as JSON directly from their values.

`line` returns what `penstock.journal` would format from the same values, or None if it is another event or one of the
values is not plain: a text that is not printable ASCII, contains a quote or a backslash, or is too long. The slower
code in penstock.journal then escapes and cuts it.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.string cimport memcpy
from libc.time cimport gmtime_r, strftime, time_t, tm


cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef enum:
    LINE_OCTETS = 8192
    MAX_TEXT = 256
    MAX_RECIPIENTS = 10
    SECOND_OCTETS = 20
    # Of 2026-11-29T12:00:00. without the milliseconds.


cdef struct Line:
    char *at
    char *end
    bint is_plain


cdef void put(Line *line, const char *octets, Py_ssize_t size) noexcept:
    if line.end - line.at < size:
        line.is_plain = False
    else:
        memcpy(line.at, octets, size)
        line.at += size


cdef void put_number(Line *line, long long number, int digits=1) noexcept:
    """Write a non-negative number with at least `digits` digits."""
    cdef char[20] text
    cdef int at = 20
    if number < 0:
        line.is_plain = False
        return
    while number > 0 or 20 - at < digits:
        at -= 1
        text[at] = c'0' + <char> (number % 10)
        number //= 10
    put(line, text + at, 20 - at)


cdef int put_text(Line *line, str text) except -1:
    cdef Py_ssize_t size, i
    cdef const char *octets
    if not text.isascii():  # other texts may also have no UTF-8 form
        line.is_plain = False
        return 0
    octets = PyUnicode_AsUTF8AndSize(text, &size)
    if size > MAX_TEXT:
        line.is_plain = False
        return 0
    for i in range(size):
        if octets[i] < c' ' or octets[i] > c'~' or octets[i] == c'"' or octets[i] == c'\\':
            line.is_plain = False
            return 0
    put(line, octets, size)
    return 0


cdef int put_recipients(Line *line, recipients) except -1:
    """Write the first recipients and their total number."""
    cdef Py_ssize_t count = len(recipients), i
    put(line, b'","to":[', 8)
    for i in range(min(count, MAX_RECIPIENTS)):
        put(line, b'"' if i == 0 else b',"', 1 if i == 0 else 2)
        put_text(line, recipients[i][0][0])
        put(line, b'"', 1)
    put(line, b'],"recipients":', 15)
    put_number(line, count)
    return 0


cdef void put_seconds(Line *line, double seconds) noexcept:
    cdef long long milliseconds = <long long> (seconds * 1000 + 0.5)
    put(line, b',"seconds":', 11)
    put_number(line, milliseconds // 1000)
    put(line, b".", 1)
    put_number(line, milliseconds % 1000, 3)


cdef char[32] second_text
cdef long long second_known = -1


cdef void put_time(Line *line, double when) noexcept:
    """Write a time with milliseconds. Each second is formatted once."""
    global second_known
    cdef long long milliseconds = <long long> (when * 1000)
    cdef time_t second = milliseconds // 1000
    cdef tm parts
    if second < 0:
        line.is_plain = False
        return
    if second != second_known:
        if strftime(second_text, 32, b"%Y-%m-%dT%H:%M:%S.", gmtime_r(&second, &parts)) != SECOND_OCTETS:
            line.is_plain = False
            return
        second_known = second
    put(line, second_text, SECOND_OCTETS)
    put_number(line, milliseconds % 1000, 3)
    put(line, b"Z", 1)


def line(double when, str event not None, long long session, peer, tuple values not None):
    cdef char buffer[LINE_OCTETS]
    cdef Line line
    line.at = buffer
    line.end = buffer + LINE_OCTETS
    line.is_plain = True
    put(&line, b'{"time":"', 9)
    put_time(&line, when)
    put(&line, b'","event":"', 11)
    put_text(&line, event)
    if peer is not None:
        if peer[4]:  # a proxy
            return None
        put(&line, b'","session":', 12)
        put_number(&line, session)
        put(&line, b',"peer":"', 9)
        put_text(&line, peer[0] or "unix")
    if event == "accepted":
        put_accepted(&line, values)
    elif event == "delivered":
        put_delivered(&line, values)
    elif event == "judged":
        put_judged(&line, values)
    elif event == "disconnected":
        put_disconnected(&line, values)
    elif event == "connected":
        put_connected(&line, values)
    else:
        return None
    put(&line, b"}\n", 2)
    return PyBytes_FromStringAndSize(buffer, line.at - buffer) if line.is_plain else None


cdef int put_accepted(Line *line, tuple values) except -1:
    message_id, sender, recipients, octets, reply = values
    if reply.cause or sender is None or not sender[0]:
        line.is_plain = False
        return 0
    put(line, b'","id":"', 8)
    put_text(line, message_id)
    put(line, b'","from":"', 10)
    put_text(line, sender[0])
    put_recipients(line, recipients)
    put(line, b',"size":', 8)
    put_number(line, octets)
    put(line, b',"reply":"', 10)
    put_number(line, reply.code)
    if reply.status is not None:
        put(line, b" ", 1)
        put_text(line, reply.status)
    put(line, b" ", 1)
    put_text(line, reply.text)
    put(line, b'"', 1)
    return 0


cdef int put_delivered(Line *line, tuple values) except -1:
    message_id, recipients, hop, reply, attempts, seconds = values
    if not reply:
        line.is_plain = False
        return 0
    put(line, b'","id":"', 8)
    put_text(line, message_id)
    put_recipients(line, recipients)
    if hop:  # none for a Maildir
        put(line, b',"hop":"', 8)
        put_text(line, hop)
        put(line, b'"', 1)
    put(line, b',"reply":"', 10)
    put_text(line, reply)
    put(line, b'","attempts":', 13)
    put_number(line, attempts)
    put_seconds(line, seconds)
    return 0


cdef int put_judged(Line *line, tuple values) except -1:
    message_id, verdict, score, checks = values
    if not checks or not -1e9 < score < 1e9:    # larger numbers have an exponent
        line.is_plain = False
        return 0
    put(line, b'","id":"', 8)
    put_text(line, message_id)
    put(line, b'","verdict":"', 13)
    put_text(line, verdict)
    put(line, b'","score":', 10)
    put_text(line, repr(score))
    put(line, b',"checks":"', 11)
    put_text(line, checks)
    put(line, b'"', 1)
    return 0


cdef int put_disconnected(Line *line, tuple values) except -1:
    messages, errors, octets, seconds, cause = values
    put(line, b'","messages":', 13)
    put_number(line, messages)
    put(line, b',"errors":', 10)
    put_number(line, errors)
    put(line, b',"octets":', 10)
    put_number(line, octets)
    put_seconds(line, seconds)
    put(line, b',"cause":"', 10)
    put_text(line, cause)
    put(line, b'"', 1)
    return 0


cdef int put_connected(Line *line, tuple values) except -1:
    (listener,) = values
    if not listener:
        line.is_plain = False
        return 0
    put(line, b'","listener":"', 14)
    put_text(line, listener)
    put(line, b'"', 1)
    return 0
