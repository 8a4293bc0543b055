"""What a sink counts of its sessions: replies by phase, code and status, latencies by phase, and sequence tags.

Theory
------
Counting may cost a hundredth of the message that is counted, so what happens for each command happens here, in C: a
session has a `SessionMetrics`, which notes what is being answered and adds to the `Metrics` that all sessions share.
Counts are in a hash table of C integers, latencies in histograms, sequence tags in bitmaps. Readers look at the totals
once a second.

A phase's clock starts when the server has got the octets that end the command, and stops when the reply is given to
the kernel. On the poller both are moments of a round: it begins when the kernel has said which sockets are readable,
and ends when all that the turns had to say is sent. So two clock reads do for all sockets of a round, and what one
socket had to wait for the others counts, as it does for its client. A session that has a task reads the clock itself.

Rules
-----
1. Counts are exact; nothing is sampled. The table has room for 1,024 kinds of reply; those of further kinds are counted
   as one number.
2. What was pipelined came at once: each reply's clock starts with the receive that brought its command, so it includes
   the wait for the commands before it.
3. `think` is the client's own time: from a reply (or a greeting, or the end of a handshake) to the next octets.
4. A tag is a bit in a bitmap of its run: 125 KB for a million. All bitmaps together have at most 64 MiB, and there are
   at most 64 runs; tags beyond that are counted, but not as distinct.
5. A reply is counted as the client gets it. Where a fault sends something else in its place, the session is held: it
   notes what becomes of the message, and what is sent is reported with `says`.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcmp, memset
cimport cython

from penstock.metrics._histogram cimport Histogram

cdef extern from *:
    """
    #include <time.h>
    static inline int64_t clock_now(void)
    {
        struct timespec at;
        clock_gettime(CLOCK_MONOTONIC, &at);
        return (int64_t)at.tv_sec * 1000000000 + at.tv_nsec;
    }
    """
    int64_t clock_now() noexcept nogil
    int lowest_bit "__builtin_ctz"(uint32_t bits) noexcept nogil

cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    const unsigned char *PyUnicode_1BYTE_DATA(object text)

PHASES = (
    "unknown", "HELO", "EHLO", "LHLO", "MAIL", "RCPT", "DATA", "BDAT", "RSET", "NOOP", "QUIT", "VRFY", "EXPN", "HELP",
    "AUTH", "STARTTLS", "HTTP", "message", "text", "tls", "think", "banner", "unasked",
)

GARBLED = (
    "none", "wrong-code", "too-long", "many-lines", "unfinished", "non-ascii", "bare-lf", "no-line-end", "garbage",
)

cdef enum:
    MOST_CAUSES = 64
    MOST_RUNS = 64
    MOST_EXAMPLES = 100
    MOST_RUN = 16           # characters of a run in a mark, see penstock.sequence
    MOST_DIGITS = 12
    FIRST_BITS = 8192       # octets of a bitmap to begin with

TOTALS = (
    "sessions", "peak_sessions", "received", "sent", "replies", "accepted", "unheard", "refused", "recipients",
    "text_octets", "tls_failed", "further",
)

cdef uint64_t MOST_OCTETS = 64 << 20
OTHER = "others"


cdef int note_cause(dict causes, str cause, int64_t times=1) except -1:
    """Count a cause; those of further kinds together."""
    cdef object n = causes.get(cause)
    if n is None and len(causes) >= MOST_CAUSES:
        cause = OTHER
        n = causes.get(cause)
    causes[cause] = times if n is None else n + times
    return 0


cdef uint64_t key_of(int phase, const unsigned char *text, Py_ssize_t size) noexcept:
    """Return the key of a reply: phase, code, subject and detail of its status, 0 for each part it lacks.

    The octet above the phase is how it was garbled, see `count`.
    """
    cdef uint64_t code = 0, part = 0
    cdef Py_ssize_t at
    cdef int parts = 0, digits
    cdef uint64_t[2] status
    status[0] = status[1] = 0
    if size < 3:
        return <uint64_t> phase << 40 | <uint64_t> 1 << 63
    for at in range(3):
        if not c'0' <= text[at] <= c'9':
            return <uint64_t> phase << 40 | <uint64_t> 1 << 63
        code = code * 10 + text[at] - c'0'
    # "250 2.1.0 Sender ok": the class is that of the code, so subject and detail say it all.
    if size > 6 and text[4] == text[0] and text[5] == c'.':
        at = 6
        while parts < 2:
            part = 0
            digits = 0
            while at < size and c'0' <= text[at] <= c'9' and digits < 3:
                part = part * 10 + text[at] - c'0'
                digits += 1
                at += 1
            if digits == 0 or at == size or text[at] != (c'.' if parts == 0 else c' '):
                return <uint64_t> 1 << 63 | <uint64_t> phase << 40 | code << 24
            status[parts] = part + 1
            parts += 1
            at += 1
    return <uint64_t> 1 << 63 | <uint64_t> phase << 40 | code << 24 | status[0] << 12 | status[1]


cdef class Metrics:
    """The counts of all sessions of a worker."""

    def __cinit__(self):
        self.flushed = []
        self.clear()

    def __init__(self, *, source=None, bint reads_marks=True):
        self.source = source
        self.reads_marks = reads_marks

    cdef int clear(self) except -1:
        self.latencies = tuple([Histogram() for _ in range(PHASE_COUNT)])
        self.recent_messages = Histogram()
        self.recent_replies = Histogram()
        self.tracker = SequenceTracker()
        self.sequences = self.tracker
        self.ends = {}
        self.lost = {}
        memset(self.keys, 0, sizeof(self.keys))
        memset(self.counts, 0, sizeof(self.counts))
        self.kinds = 0
        self.further = 0
        self.sessions = self.received = self.sent = self.replies = 0
        self.accepted = self.unheard = self.refused = 0
        self.recipients = self.text_octets = self.tls_failed = 0
        self.peak_sessions = self.open_sessions
        return 0

    def reset(self):
        self.clear()

    def forget_recent(self):
        self.recent_messages.reset()
        self.recent_replies.reset()

    def new_session(self):
        cdef SessionMetrics session = SessionMetrics.__new__(SessionMetrics)
        session.totals = self
        session.phase = P_BANNER
        session.began = clock_now()
        session.in_turn = True
        self.sessions += 1
        self.open_sessions += 1
        if self.open_sessions > self.peak_sessions:
            self.peak_sessions = self.open_sessions
        return session

    def turned_away(self, bytes encoded not None):
        self.sessions += 1
        self.replies += 1
        self.sent += len(encoded)
        self.count(P_BANNER, <const unsigned char *> PyBytes_AS_STRING(encoded), PyBytes_GET_SIZE(encoded))
        note_cause(self.ends, "turned away")

    def latency(self, phase):
        return self.latencies[PHASES.index(phase)]

    def counted(self):
        cdef list found = []
        cdef uint64_t key, code, subject, detail
        cdef int i, how
        for i in range(CELLS):
            key = self.keys[i]
            if key and self.counts[i]:
                how = key >> 48 & 0xF
                garbled = GARBLED[how - 1] if how else None
                code, subject, detail = key >> 24 & 0xFFFF, key >> 12 & 0xFFF, key & 0xFFF
                status = f"{code // 100}.{subject - 1}.{detail - 1}" if detail else None
                found.append((PHASES[key >> 40 & 0xFF], code, status, garbled, self.counts[i]))
        found.sort(key=lambda each: (each[0], each[1], each[2] or "", each[3] or ""))
        return found

    def state(self):
        cdef int i
        return {
            "latencies": [each.to_dict() for each in self.latencies],
            "kinds": [(self.keys[i], self.counts[i]) for i in range(CELLS) if self.keys[i]],
            "totals": {name: getattr(self, name) for name in TOTALS},
            "ends": self.ends,
            "lost": self.lost,
            "sequences": self.tracker.state(),
        }

    def add(self, dict state not None):
        cdef dict totals = state["totals"]
        cdef uint64_t key, count
        cdef Py_ssize_t at
        cdef int64_t n
        for mine, theirs in zip(self.latencies, state["latencies"]):
            mine.merge(Histogram.from_dict(theirs))
        for key, count in state["kinds"]:
            at = self.cell(key)
            if at < 0:
                self.further += count
            else:
                self.counts[at] += count
        self.sessions += totals["sessions"]
        self.peak_sessions += totals["peak_sessions"]
        self.received += totals["received"]
        self.sent += totals["sent"]
        self.replies += totals["replies"]
        self.accepted += totals["accepted"]
        self.unheard += totals["unheard"]
        self.refused += totals["refused"]
        self.recipients += totals["recipients"]
        self.text_octets += totals["text_octets"]
        self.tls_failed += totals["tls_failed"]
        self.further += totals["further"]
        for causes, theirs in ((self.ends, state["ends"]), (self.lost, state["lost"])):
            for cause, n in theirs.items():
                note_cause(causes, cause, n)
        self.tracker.add(state["sequences"])

    # ---- the poller's side

    cdef void begin_round(self) noexcept:
        self.in_round = True
        self.round_began = clock_now()

    cdef int end_round(self) except -1:
        cdef SessionMetrics session
        cdef int64_t now
        self.in_round = False
        if self.flushed:
            now = clock_now()
            for session in self.flushed:
                session.is_listed = False
                session.settle(now)
            self.flushed.clear()
        return 0

    # ---- the sessions' side

    cdef void count(self, int phase, const unsigned char *text, Py_ssize_t size) noexcept:
        """Count a reply. `phase` may have the place in GARBLED of how it was corrupted, plus one, in its next octet."""
        cdef Py_ssize_t at = self.cell(key_of(phase, text, size))
        if at < 0:
            self.further += 1
        else:
            self.counts[at] += 1

    cdef Py_ssize_t cell(self, uint64_t key) noexcept:
        """Return where a kind of reply is counted; -1 when there is no room for it."""
        cdef uint64_t at = (key * <uint64_t> 0x9E3779B97F4A7C15) >> 53    # the top 11 bits: CELLS of them
        while self.keys[at] != key:
            if self.keys[at] == 0:
                if self.kinds == MOST_KINDS:
                    return -1
                self.kinds += 1
                self.keys[at] = key
                break
            at = (at + 1) % CELLS
        return at


@cython.no_gc
@cython.freelist(256)
cdef class SessionMetrics:
    """The clocks of one session. Holds a totals, which never holds it for longer than a round."""

    # ---- the session's side

    cdef void begin_turn(self) noexcept:
        """Octets have come, or something that was waited for: what is answered now is answered from here on."""
        cdef Metrics totals = self.totals
        self.in_turn = True
        self.began = totals.round_began if totals.in_round else clock_now()
        if self.said:
            (<Histogram> (<tuple> totals.latencies)[P_THINK]).add(self.began - self.said, 1)
            self.said = 0
        if self.awaits_text:
            self.awaits_text = False
            self.text_began = self.began

    cdef void replied(self, bytes encoded) noexcept:
        """A reply was made to what `phase` says."""
        if (self.phase == P_MESSAGE or self.is_doomed) and PyBytes_AS_STRING(encoded)[0] >= c'4':
            self.totals.refused += 1
            self.is_doomed = False
        if self.is_held:
            return
        self.totals.count(self.phase, <const unsigned char *> PyBytes_AS_STRING(encoded), PyBytes_GET_SIZE(encoded))
        self.totals.replies += 1
        self.owed |= <uint32_t> 1 << self.phase
        self.owing[self.phase] += 1

    cdef int end_turn(self, Py_ssize_t octets) except -1:
        """All that was said is about to be sent."""
        self.in_turn = False
        if not self.owed:
            return 0
        self.totals.sent += octets
        if not self.totals.in_round:
            self.settle(clock_now())
        elif not self.is_listed:
            self.is_listed = True
            self.totals.flushed.append(self)
        return 0

    cdef void settle(self, int64_t now) noexcept:
        """What was said is sent."""
        cdef Metrics totals = self.totals
        cdef uint32_t owed = self.owed
        cdef int64_t ns = now - self.began
        cdef int phase
        while owed:
            phase = lowest_bit(owed)
            owed &= owed - 1
            (<Histogram> (<tuple> totals.latencies)[phase]).add(ns, self.owing[phase])
            totals.recent_replies.add(ns, self.owing[phase])
            if phase == P_MESSAGE:
                totals.recent_messages.add(ns, self.owing[phase])
            self.owing[phase] = 0
        self.owed = 0
        self.said = now

    cdef void text_begins(self) noexcept:
        self.awaits_text = True

    cdef void text_ends(self, int phase) noexcept:
        """The last octet of a text has come. What it is answered with is a reply of this phase."""
        if self.awaits_text:    # it came with the command
            self.awaits_text = False
            self.text_began = self.began
        if phase == P_MESSAGE:
            (<Histogram> (<tuple> self.totals.latencies)[P_TEXT]).add(self.began - self.text_began, 1)
        self.phase = phase

    cdef int message(self, object transaction, uint64_t octets) except -1:
        """A message was taken."""
        cdef Metrics totals = self.totals
        cdef object found
        if self.is_held:
            self.has_taken = True   # `says` knows whether the client can have heard of it
        else:
            totals.accepted += 1
        totals.recipients += len(<list> transaction.recipients)
        totals.text_octets += octets
        if not totals.reads_marks:
            return 0
        if totals.source is None:
            totals.tracker.note_mark(<str> (<tuple> transaction.sender)[1])
        else:
            found = totals.source(transaction)
            if found is None:
                totals.tracker.unmarked += 1
            else:
                totals.tracker.note(found[0], found[1])
        return 0

    # ---- the side of faults

    def hold(self):
        self.is_held = True

    def says(self, list replies not None):
        cdef Metrics totals = self.totals
        cdef int phase
        cdef bytes each
        cdef object garbled
        cdef bint is_heard = False
        self.is_held = False
        for each, garbled in replies:
            phase = self.phase
            if garbled is not None:
                phase |= <int> (GARBLED.index(garbled) + 1) << 8
            totals.count(phase, <const unsigned char *> PyBytes_AS_STRING(each), PyBytes_GET_SIZE(each))
            is_heard = is_heard or each.startswith(b"2")
            if garbled != "none":
                totals.replies += 1
                self.owed |= <uint32_t> 1 << self.phase
                self.owing[self.phase] += 1
        if self.has_taken:
            self.has_taken = False
            if is_heard:
                totals.accepted += 1
            else:
                totals.unheard += 1

    def sends(self, Py_ssize_t octets):
        self.end_turn(octets)

    def takes_back(self, bytes encoded not None):
        cdef Metrics totals = self.totals
        cdef Py_ssize_t at = totals.cell(key_of(
            self.phase, <const unsigned char *> PyBytes_AS_STRING(encoded), PyBytes_GET_SIZE(encoded)
        ))
        if at >= 0 and totals.counts[at]:    # otherwise the counters were started over meanwhile
            totals.counts[at] -= 1
            totals.replies -= 1
        if self.owing[self.phase]:
            self.owing[self.phase] -= 1
            if self.owing[self.phase] == 0:
                self.owed &= ~(<uint32_t> 1 << self.phase)
            if self.owed:
                totals.sent -= len(encoded)  # `end_turn` will be told of these octets with the others

    def takes_unheard(self, object transaction, uint64_t octets):
        self.is_held = True
        self.message(transaction, octets)
        self.says([])

    # ---- the connection's side

    def tls_begins(self):
        self.tls_began = clock_now()

    def tls_begun(self):
        cdef int64_t now = clock_now()
        (<Histogram> (<tuple> self.totals.latencies)[P_TLS]).add(now - self.tls_began, 1)
        self.tls_began = 0
        if self.phase == P_BANNER:
            self.began = now
        else:
            self.said = now

    def pauses_text(self):
        if self.said:
            # Behind a 354: the client may send, and is not read.
            self.said = 0
            self.awaits_text = False
            self.text_began = clock_now()
        else:
            self.in_turn = True     # octets are there, whose clock runs on

    def dooms(self):
        self.is_doomed = True

    def loses(self, str cause not None):
        self.awaits_text = False
        note_cause(self.totals.lost, cause)

    def ended(self, str cause not None, uint64_t received):
        cdef Metrics totals = self.totals
        if self.has_ended:
            return
        self.has_ended = True
        totals.open_sessions -= 1
        totals.received += received
        if self.has_taken:
            self.says([])   # the connection broke before anything could be said
        if self.is_doomed:
            note_cause(totals.lost, cause)
        if self.tls_began:
            totals.tls_failed += 1
        note_cause(totals.ends, cause)


# ---- sequences

cdef class Sequence:
    """The marks of one run that have arrived."""

    def __cinit__(self, str run not None):
        self.run = run
        self.examples = []

    def __dealloc__(self):
        free(self.bits)

    cdef bint reserve(self, uint64_t number, uint64_t room) noexcept:
        """Make room for a number in a bitmap that may grow by `room` octets. Return False where that is too little."""
        cdef size_t needed = number // 8 + 1, size
        cdef unsigned char *bits
        if needed <= self.size:
            return True
        size = max(self.size * 2, needed, FIRST_BITS)
        if size - self.size > room:
            size = needed
            if size - self.size > room:
                return False
        bits = <unsigned char *> realloc(self.bits, size)
        if bits == NULL:
            return False
        memset(bits + self.size, 0, size - self.size)
        self.bits = bits
        self.size = size
        return True

    cdef int take(self, uint64_t number) except -1:
        cdef unsigned char bit = <unsigned char> (1 << number % 8)
        self.received += 1
        if self.bits[number // 8] & bit:
            self.duplicates += 1
            if len(self.examples) < MOST_EXAMPLES:
                self.examples.append(number)
            return 0
        self.bits[number // 8] |= bit
        self.distinct += 1
        if self.distinct == 1:
            self.lowest = self.highest = number
        elif number > self.highest:
            self.highest = number
        else:
            self.out_of_order += 1
            if number < self.lowest:
                self.lowest = number
        return 0

    def state(self):
        return {
            "run": self.run,
            "bits": PyBytes_FromStringAndSize(<char *> self.bits, self.size),
            "received": self.received,
            "distinct": self.distinct,
            "duplicates": self.duplicates,
            "out_of_order": self.out_of_order,
            "highest": self.highest,
            "lowest": self.lowest,
            "examples": self.examples,
        }

    cdef int add(self, dict state) except -1:
        """Add the tags that another process has counted; `reserve` has made room. Those that both have are duplicates.
        """
        cdef const unsigned char[:] bits = state["bits"]
        cdef size_t i
        cdef int bit
        cdef unsigned char both
        cdef uint64_t shared = 0
        self.examples += state["examples"][:MOST_EXAMPLES - len(self.examples)]
        for i in range(<size_t> bits.shape[0]):
            both = self.bits[i] & bits[i]
            self.bits[i] |= bits[i]
            for bit in range(8 if both else 0):
                if both >> bit & 1:
                    shared += 1
                    if len(self.examples) < MOST_EXAMPLES:
                        self.examples.append(i * 8 + bit)
        self.lowest = min(self.lowest, <uint64_t> state["lowest"]) if self.distinct else state["lowest"]
        self.highest = max(self.highest, <uint64_t> state["highest"])
        self.received += state["received"]
        self.distinct += state["distinct"] - shared
        self.duplicates += state["duplicates"] + shared
        self.out_of_order += state["out_of_order"]
        return 0

    def __contains__(self, uint64_t number):
        return number // 8 < self.size and self.bits[number // 8] >> number % 8 & 1

    def missing(self, uint64_t first, uint64_t last, Py_ssize_t most):
        cdef list examples = []
        cdef uint64_t number = first, count = 0
        while number <= last:
            if number % 8 == 0 and number + 7 <= last and number // 8 < self.size and self.bits[number // 8] == 0xFF:
                number += 8
                continue
            if number // 8 >= self.size and len(examples) >= most:
                return count + last - number + 1, examples
            if number // 8 >= self.size or not self.bits[number // 8] >> number % 8 & 1:
                count += 1
                if len(examples) < most:
                    examples.append(number)
            number += 1
        return count, examples


cdef class SequenceTracker:
    """The runs that have arrived."""

    def __cinit__(self):
        self.runs = {}

    cdef bint note_mark(self, str text) except -1:
        """Take the mark at the end of a text, see `penstock.sequence.parse`. Return False where there is none."""
        cdef const unsigned char *p
        cdef Py_ssize_t size, at, begin
        cdef uint64_t number = 0, power = 1
        cdef Sequence latest = self.latest
        if not PyUnicode_IS_COMPACT_ASCII(text):
            self.unmarked += 1
            return False
        p = PyUnicode_1BYTE_DATA(text)
        size = at = PyUnicode_GET_LENGTH(text)
        while at > 0 and c'0' <= p[at - 1] <= c'9' and size - at <= MOST_DIGITS:
            at -= 1
            number += (p[at] - c'0') * power
            power *= 10
        if at < 6 or p[at - 1] != c'-' or not 1 <= size - at <= MOST_DIGITS:
            self.unmarked += 1
            return False
        size = at - 1       # the end of the run
        begin = size
        while begin > 0 and size - begin <= MOST_RUN and (c'0' <= p[begin - 1] <= c'9' or c'a' <= p[begin - 1] <= c'z'):
            begin -= 1
        if not 1 <= size - begin <= MOST_RUN or begin < 4 or memcmp(p + begin - 4, b"seq-", 4) != 0 or (
            begin > 4 and p[begin - 5] != c'+'
        ):
            self.unmarked += 1
            return False
        if latest is not None and PyUnicode_GET_LENGTH(latest.run) == size - begin and (
            PyUnicode_IS_COMPACT_ASCII(latest.run)
            and memcmp(PyUnicode_1BYTE_DATA(latest.run), p + begin, size - begin) == 0
            and number // 8 < latest.size
        ):
            latest.take(number)
            return True
        return self.note(text[begin:size], number)

    cpdef bint note(self, str run, uint64_t number) except -1:
        """Take a mark. Return False when there is no room to tell it apart."""
        cdef Sequence found = self.runs.get(run)
        cdef size_t before
        if found is None:
            if len(self.runs) >= MOST_RUNS:
                self.further += 1
                return False
            found = Sequence(run)
        before = found.size
        if not found.reserve(number, MOST_OCTETS - self.octets):
            self.further += 1
            return False
        self.octets += found.size - before
        self.runs[run] = found
        self.latest = found
        found.take(number)
        return True

    def state(self):
        return {
            "unmarked": self.unmarked,
            "further": self.further,
            "runs": [(<Sequence> each).state() for each in self.runs.values()],
        }

    def add(self, dict state not None):
        cdef Sequence found
        cdef size_t before
        cdef Py_ssize_t size
        self.unmarked += state["unmarked"]
        self.further += state["further"]
        for run in state["runs"]:
            found = self.runs.get(run["run"])
            if found is None:
                found = Sequence(run["run"])
            before, size = found.size, len(run["bits"])
            if len(self.runs) - (run["run"] in self.runs) >= MOST_RUNS or (
                size and not found.reserve(<uint64_t> size * 8 - 1, MOST_OCTETS - self.octets)
            ):
                self.further += run["received"]
                continue
            self.octets += found.size - before
            self.runs[run["run"]] = found
            found.add(run)

    def mark(self, str text not None):
        return self.note_mark(text)
