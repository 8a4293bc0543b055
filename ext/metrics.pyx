"""What a sink counts of its sessions: replies by phase, code and status, latencies by phase, and sequence tags.

Theory
------
Counting may cost a hundredth of the message that is counted, so what happens for each command happens here, in C: a
session has a `SessionMetrics`, which notes what is being answered and adds to the `Metrics` that all sessions share.
Counts are in a hash table of C integers, latencies in histograms, sequence tags in bitmaps. Readers look at the totals
once a second.

A latency starts when the server has received the octets that end the command, and stops when the reply is passed to the
kernel. With the poller, both are times of a round: it begins when the kernel has reported the readable sockets, and
ends when the output of all turns is sent. So two clock reads suffice for all sockets of a round, and the time that a
socket waits for the others is included, as its client observes it. A session in a task reads the clock itself.

Rules
-----
1. Counts are exact; nothing is sampled. The table has 1,024 kinds of reply; other kinds are counted together.
2. The latency of a pipelined command starts when its octets were received, so it includes the wait for the commands
   before it.
3. `think` is the client's own time: from a reply (or a greeting, or the end of a handshake) to the next octets.
4. A tag is a bit in a bitmap of its run: 125 KB for a million. All bitmaps together have at most 64 MiB, and there are
   at most 64 runs; tags beyond that are counted, but not as distinct. One of several processes has a second bitmap of
   the tags that it has not sent to its parent yet.
5. A reply is counted as the client receives it. If a fault replaces it, counting is suspended with `suspend`, and the
   replies that are sent are reported with `count_replies`.
6. Several processes count their open sessions, and the peak of them, in memory that they share.
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
    int bits_in "__builtin_popcountll"(uint64_t bits) noexcept nogil

cdef extern from "shared.h":
    uint64_t load64(const uint64_t *at) noexcept nogil
    void store64(uint64_t *at, uint64_t value) noexcept nogil
    int swap64(uint64_t *at, uint64_t *seen, uint64_t value) noexcept nogil
    uint64_t add64(uint64_t *at, int64_t value) noexcept nogil

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
    PAGE = 4096             # octets of a piece of a bitmap that is sent
    OPEN = 0                # of the numbers that processes share
    PEAK = 1

TOTALS = (
    "sessions", "open_sessions", "peak_sessions", "received", "sent", "replies", "accepted", "unheard", "refused",
    "recipients", "text_octets", "tls_failed", "further",
)

cdef uint64_t MOST_OCTETS = 64 << 20
OTHER = "others"


cdef void raise_to(uint64_t *at, uint64_t value) noexcept nogil:
    """Store a value where several processes note the highest one."""
    cdef uint64_t seen = load64(at)
    while seen < value and not swap64(at, &seen, value):
        pass


cdef int note_cause(dict causes, str cause, int64_t times=1) except -1:
    """Count a cause; causes beyond the limit are counted together."""
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
        self.counters = &self.own[0]
        self.clear()

    def __init__(self, *, source=None, bint reads_marks=True, uint64_t[::1] shared=None, sequences=None):
        self.source = source
        self.reads_marks = reads_marks
        if shared is not None:
            if shared.shape[0] != 2:
                raise ValueError("shared must be two numbers")
            self.shared = shared
            self.counters = &shared[0]
            self.tracker.tracks_changes = True
        if sequences is not None:
            self.tracker = self.sequences = sequences

    cdef int clear(self) except -1:
        self.latencies = tuple([Histogram() for _ in range(PHASE_COUNT)])
        self.recent_messages = Histogram()
        self.recent_replies = Histogram()
        self.tracker = SequenceTracker()
        self.tracker.tracks_changes = self.counters != &self.own[0]
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
        store64(&self.counters[PEAK], 0)
        raise_to(&self.counters[PEAK], load64(&self.counters[OPEN]))
        return 0

    @property
    def peak_sessions(self):
        return load64(&self.counters[PEAK])

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
        raise_to(&self.counters[PEAK], add64(&self.counters[OPEN], 1))
        return session

    def count_refused_connection(self, bytes encoded not None):
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
        self.open_sessions += totals["open_sessions"]
        raise_to(&self.counters[PEAK], totals["peak_sessions"])
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
        """Return the cell of a kind of reply; -1 if the table is full."""
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
    """The latencies of one session. Refers to its totals, which refer to it for one round only."""

    # ---- the session's side

    cdef void begin_turn(self) noexcept:
        """Start the latencies of a turn: octets were received, or an awaited result is there."""
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
        """Count a reply to the command of `phase`."""
        if (self.phase == P_MESSAGE or self.expects_refusal) and PyBytes_AS_STRING(encoded)[0] >= c'4':
            self.totals.refused += 1
            self.expects_refusal = False
        if self.is_held:
            return
        self.totals.count(self.phase, <const unsigned char *> PyBytes_AS_STRING(encoded), PyBytes_GET_SIZE(encoded))
        self.totals.replies += 1
        self.owed |= <uint32_t> 1 << self.phase
        self.owing[self.phase] += 1

    cdef int end_turn(self, Py_ssize_t octets) except -1:
        """The output of the turn is about to be sent."""
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
        """The output was sent."""
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
        """The last octet of a text was received; its reply belongs to this phase."""
        if self.awaits_text:    # it came with the command
            self.awaits_text = False
            self.text_began = self.began
        if phase == P_MESSAGE:
            (<Histogram> (<tuple> self.totals.latencies)[P_TEXT]).add(self.began - self.text_began, 1)
        self.phase = phase

    cdef int message(self, object transaction, uint64_t octets) except -1:
        """Count an accepted message."""
        cdef Metrics totals = self.totals
        cdef object found
        if self.is_held:
            self.has_taken = True   # `count_replies` decides whether its reply is readable
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

    def suspend(self):
        self.is_held = True

    def count_replies(self, list replies not None):
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

    def before_sending(self, Py_ssize_t octets):
        self.end_turn(octets)

    def uncount(self, bytes encoded not None):
        cdef Metrics totals = self.totals
        cdef Py_ssize_t at = totals.cell(key_of(
            self.phase, <const unsigned char *> PyBytes_AS_STRING(encoded), PyBytes_GET_SIZE(encoded)
        ))
        if at >= 0 and totals.counts[at]:    # otherwise the counters were reset since
            totals.counts[at] -= 1
            totals.replies -= 1
        if self.owing[self.phase]:
            self.owing[self.phase] -= 1
            if self.owing[self.phase] == 0:
                self.owed &= ~(<uint32_t> 1 << self.phase)
            if self.owed:
                totals.sent -= len(encoded)  # `end_turn` counts these octets with the others

    # ---- the connection's side

    def begin_tls(self):
        self.tls_began = clock_now()

    def end_tls(self):
        cdef int64_t now = clock_now()
        (<Histogram> (<tuple> self.totals.latencies)[P_TLS]).add(now - self.tls_began, 1)
        self.tls_began = 0
        if self.phase == P_BANNER:
            self.began = now
        else:
            self.said = now

    def pause_text(self):
        if self.said:
            # After a 354: the client may send, and nothing is read.
            self.said = 0
            self.awaits_text = False
            self.text_began = clock_now()
        else:
            self.in_turn = True     # octets are there, whose clock runs on

    def expect_refusal(self):
        self.expects_refusal = True

    def lose_message(self, str cause not None):
        self.awaits_text = False
        note_cause(self.totals.lost, cause)

    def ended(self, str cause not None, uint64_t received):
        cdef Metrics totals = self.totals
        if self.has_ended:
            return
        self.has_ended = True
        totals.open_sessions -= 1
        add64(&totals.counters[OPEN], -1)
        totals.received += received
        if self.has_taken:
            self.count_replies([])   # the connection was lost before a reply
        if self.expects_refusal:
            note_cause(totals.lost, cause)
        if self.tls_began:
            totals.tls_failed += 1
        note_cause(totals.ends, cause)


# ---- sequences

cdef class Sequence:
    """The sequence numbers of one run."""

    def __cinit__(self, str run not None):
        self.run = run
        self.examples = []

    def __dealloc__(self):
        free(self.bits)
        free(self.unreported)

    cdef bint reserve(self, uint64_t number, uint64_t room) noexcept:
        """Extend the bitmap for a number, by at most `room` octets. Return False if that is too little."""
        cdef size_t needed = number // 8 + 1, size
        cdef unsigned char *bits
        if needed <= self.size:
            return True
        size = max(self.size * 2, needed, FIRST_BITS)
        if size - self.size > room:
            size = needed
            if size - self.size > room:
                return False
        if self.tracks_changes:
            bits = <unsigned char *> realloc(self.unreported, size)
            if bits == NULL:
                return False
            memset(bits + self.size, 0, size - self.size)
            self.unreported = bits
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
        if self.tracks_changes:
            self.unreported[number // 8] |= bit
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

    cdef dict take_changes(self):
        """Return what was noted since the last time."""
        cdef size_t at, size
        cdef list pages = []
        for at in range(0, self.size, PAGE):
            size = min(<size_t> PAGE, self.size - at)
            if self.unreported[at] or memcmp(self.unreported + at, self.unreported + at + 1, size - 1):
                pages.append((at, PyBytes_FromStringAndSize(<char *> self.unreported + at, size)))
                memset(self.unreported + at, 0, size)
        found = {
            "run": self.run,
            "pages": pages,
            "received": self.received - self.reported_received,
            "out_of_order": self.out_of_order - self.reported_out_of_order,
            "highest": self.highest,
            "lowest": self.lowest,
            "examples": self.examples[self.reported_examples:],
        }
        self.reported_received, self.reported_out_of_order = self.received, self.out_of_order
        self.reported_examples = len(self.examples)
        return found

    cdef int add(self, dict changes) except -1:
        """Add the changes of another process; `reserve` has extended the bitmap. Tags that both have are duplicates."""
        cdef const unsigned char[:] page
        cdef size_t at, i
        cdef int bit
        cdef unsigned char both
        self.examples += changes["examples"][:MOST_EXAMPLES - len(self.examples)]
        self.lowest = min(self.lowest, <uint64_t> changes["lowest"]) if self.distinct else changes["lowest"]
        self.highest = max(self.highest, <uint64_t> changes["highest"])
        for at, page in changes["pages"]:
            for i in range(<size_t> page.shape[0]):
                both = self.bits[at + i] & page[i]
                self.distinct += bits_in(page[i] & ~both)
                self.bits[at + i] |= page[i]
                for bit in range(8 if both else 0):
                    if both >> bit & 1 and len(self.examples) < MOST_EXAMPLES:
                        self.examples.append((at + i) * 8 + bit)
        self.received += changes["received"]
        self.duplicates = self.received - self.distinct
        self.out_of_order += changes["out_of_order"]
        return 0

    def __contains__(self, uint64_t number):
        return number // 8 < self.size and self.bits[number // 8] >> number % 8 & 1

    cdef uint64_t count(self, uint64_t first, uint64_t last) noexcept:
        """Return how many numbers from `first` to `last` were received."""
        cdef uint64_t number = first, found = 0
        if first <= self.lowest and self.highest <= last:
            return self.distinct
        last = min(last, self.highest)
        while number <= last:
            if number % 64 == 0 and number + 63 <= last and number // 8 + 8 <= self.size:
                found += bits_in((<uint64_t *> self.bits)[number // 64])
                number += 64
            else:
                found += self.bits[number // 8] >> number % 8 & 1
                number += 1
        return found

    def missing(self, uint64_t first, uint64_t last, Py_ssize_t most):
        cdef list examples = []
        cdef uint64_t number = first, count
        if last < first:
            return 0, examples
        count = last - first + 1 - self.count(first, last)
        most = min(most, count)
        while len(examples) < most:
            if number % 64 == 0 and number // 8 + 8 <= self.size and (
                (<uint64_t *> self.bits)[number // 64] == <uint64_t> 0xFFFFFFFFFFFFFFFF
            ):
                number += 64
                continue
            if number // 8 >= self.size or not self.bits[number // 8] >> number % 8 & 1:
                examples.append(number)
            number += 1
        return count, examples


cdef class SequenceTracker:
    """The runs that were received."""

    def __cinit__(self):
        self.runs = {}

    cdef bint note_mark(self, str text) except -1:
        """Track the tag at the end of a text, see `penstock.sequence.parse`. Return False without one."""
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
        """Track a tag. Return False if it is beyond the limits."""
        cdef Sequence found = self.runs.get(run)
        cdef size_t before
        if found is None:
            if len(self.runs) >= MOST_RUNS:
                self.further += 1
                return False
            found = self.new(run)
        before = found.size
        if not found.reserve(number, MOST_OCTETS - self.octets):
            self.further += 1
            return False
        self.octets += found.size - before
        self.runs[run] = found
        self.latest = found
        found.take(number)
        return True

    cdef Sequence new(self, str run):
        cdef Sequence made = Sequence(run)
        made.tracks_changes = self.tracks_changes
        return made

    def take_changes(self):
        cdef Sequence each
        if not self.tracks_changes:
            raise RuntimeError("only metrics with shared counters track their changes")
        found = {
            "unmarked": self.unmarked - self.reported_unmarked,
            "further": self.further - self.reported_further,
            "runs": [each.take_changes() for each in self.runs.values() if each.received > each.reported_received],
        }
        self.reported_unmarked, self.reported_further = self.unmarked, self.further
        return found

    def add(self, dict changes not None):
        cdef Sequence found
        cdef size_t before
        cdef uint64_t size
        self.unmarked += changes["unmarked"]
        self.further += changes["further"]
        for run in changes["runs"]:
            found = self.runs.get(run["run"])
            if found is None:
                found = self.new(run["run"])
            before = found.size
            size = max([at + len(page) for at, page in run["pages"]], default=0)
            if len(self.runs) - (run["run"] in self.runs) >= MOST_RUNS or (
                size and not found.reserve(size * 8 - 1, MOST_OCTETS - self.octets)
            ):
                self.further += run["received"]
                continue
            self.octets += found.size - before
            self.runs[run["run"]] = found
            found.add(run)

    def mark(self, str text not None):
        return self.note_mark(text)
