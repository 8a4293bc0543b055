"""Counters and limits in memory that all processes of a server share.

Theory
------
The supervisor makes one segment (a memfd) and each worker inherits it. It has a page for each worker, with

- cells: counters, gauges and histograms, 64-bit words. A page describes itself: `register` writes the name of a series
  beside its cell, so that a reader needs neither the settings nor the version of the writer;
- a mailbox: one text at a time from the worker to the supervisor, for data without a fixed set of names;
- a table of keys (networks, user names, next hops): how many connections each has open, and how many events it has
  had lately.

Rules
-----
1. A page is written by its worker alone, and read by all. So nothing is locked, no count is lost, and what a worker
   that was killed had open is known: the supervisor takes it out with `release`, and nothing leaks.
2. Readers sum over the pages. Between a look and the count that follows it, other workers may count as well: a limit
   may be exceeded by as many as there are workers less one. It is exact for events one after another.
3. Words are read and written whole, in no particular order. A slot whose key changes while it is read counts wrongly
   once.
4. Everything is bounded: 8,192 cells, 256 KiB of mail, 65,536 keys. A key is searched for in 32 slots; where all are in
   use, the one that would be forgotten first is, and never one with something open.
5. Keys are hashed with a random key of the segment (SipHash-1-3): clients cannot choose names that share slots.
6. Rates of next hops are the exception to rule 1: all workers draw from one bucket by compare-and-swap. It is a time,
   not a count, so a worker that is killed leaves nothing behind in it.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strlen
cimport cython

from penstock.metrics._session cimport P_BANNER, P_MESSAGE, Metrics, SessionMetrics

from penstock.metrics._session import PHASES as _PHASES

cdef extern from "shared.h":
    uint64_t load64(const uint64_t *at) noexcept nogil
    void store64(uint64_t *at, uint64_t value) noexcept nogil
    uint64_t acquire64(const uint64_t *at) noexcept nogil
    void publish64(uint64_t *at, uint64_t value) noexcept nogil
    int swap64(uint64_t *at, uint64_t *seen, uint64_t value) noexcept nogil
    int64_t shared_clock() noexcept nogil
    int half_octave(uint64_t value) noexcept nogil
    uint64_t siphash13(uint64_t k0, uint64_t k1, unsigned char kind, const unsigned char *text, size_t size) nogil

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef enum:
    MOST_CELLS = 8192
    NAME_OCTETS = 160
    MAIL_OCTETS = 262_144
    SLOTS = 65_536
    PROBES = 32
    BUCKET_COUNT = 48
    MOST_PAGES = 1024
    MOST_RATES = 2048
    HEAD_OCTETS = 4096      # of the segment: its number of pages, the key of the hashes, which pages are in use
    ACTIVE_AT = 64
    # words of a page's head
    W_SERIES = 0
    W_OPEN = 1
    W_BEAT = 2
    W_MAIL = 3
    W_PID = 4
    PAGE_HEAD = 64

BUCKETS = BUCKET_COUNT
"""Buckets of a histogram, two for each octave."""

cdef struct Slot:
    uint64_t key            # 0: never used
    uint32_t open
    uint32_t window         # the number of the fixed window that `recent` is of
    int32_t recent
    int32_t before          # of the window before
    uint64_t ends           # when nothing of it matters any more, in seconds

cdef struct PageMemory:
    uint64_t head[PAGE_HEAD]
    uint64_t cells[MOST_CELLS]
    char names[MOST_CELLS][NAME_OCTETS]
    char mail[MAIL_OCTETS]
    Slot slots[SLOTS]

cdef struct SegmentMemory:
    uint64_t head[512]                  # HEAD_OCTETS
    uint64_t rates[MOST_RATES][2]       # a key and a time

FIRST_OCTAVE = {"s": 13, "o": 8, "n": 1}
"""By kind of a histogram: values below this power of two (nanoseconds, octets, a number) are in the first bucket."""


def segment_octets(int pages):
    if not 1 <= pages <= MOST_PAGES:
        raise ValueError(f"a segment has 1 to {MOST_PAGES} pages, not {pages}")
    return sizeof(SegmentMemory) + <size_t> pages * sizeof(PageMemory)


def bucket_bounds(str kind not None):
    """Return the bounds of the buckets of a histogram: the least value that is above each."""
    cdef int first = FIRST_OCTAVE[kind]
    bounds = []
    for i in range(BUCKET_COUNT - 1):
        octave, half = divmod(i + 1, 2)
        bounds.append((1 << (first + octave)) + (half << (first + octave)) // 2)
    return bounds


cdef class Segment:
    """The memory that all processes of a server share."""

    cdef Py_buffer view
    cdef SegmentMemory *memory
    cdef PageMemory *first
    cdef uint8_t *active
    cdef readonly int count

    def __cinit__(self, buffer, int count=0, bytes key=b""):
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        self.memory = <SegmentMemory *> self.view.buf
        self.first = <PageMemory *> (<char *> self.view.buf + sizeof(SegmentMemory))
        self.active = <uint8_t *> self.view.buf + ACTIVE_AT
        if count:
            if len(key) != 16 or self.view.len < segment_octets(count):
                raise ValueError("a segment needs a key of 16 octets, and memory for its pages")
            self.memory.head[0] = count
            memcpy(&self.memory.head[1], PyBytes_AS_STRING(key), 16)
        self.count = <int> self.memory.head[0]
        if self.view.len < segment_octets(self.count):
            raise ValueError("the memory is smaller than the segment")

    def __dealloc__(self):
        PyBuffer_Release(&self.view)

    def page(self, int index):
        return Page(self, index)

    @property
    def in_use(self):
        return [i for i in range(self.count) if self.active[i]]

    def claim(self):
        """Return a page that no worker has, for one that is about to start. Raise ValueError without one."""
        cdef int i
        for i in range(self.count):
            if not self.active[i]:
                self.active[i] = 1
                return i
        raise ValueError(f"all {self.count} pages are in use")

    def free(self, int index):
        """Take back the page of a worker that has ended, with all that it had open."""
        self.page(index).release()
        self.active[index] = 0

    @property
    def open(self):
        cdef uint64_t total = 0
        cdef int i
        for i in range(self.count):
            if self.active[i]:
                total += load64(&self.first[i].head[W_OPEN])
        return total

    cdef uint64_t hash(self, int kind, str key) except? 0:
        cdef Py_ssize_t size
        cdef const char *text = PyUnicode_AsUTF8AndSize(key, &size)
        cdef uint64_t found = siphash13(
            self.memory.head[1], self.memory.head[2], kind, <const unsigned char *> text, size
        )
        return found if found else 1


cdef class Page:
    """What one worker counts."""

    cdef readonly Segment segment
    cdef readonly int index
    cdef PageMemory *memory
    cdef dict known
    cdef readonly uint64_t overflow

    def __cinit__(self, Segment segment not None, int index):
        if not 0 <= index < segment.count:
            raise ValueError(f"there is no page {index}")
        self.segment = segment
        self.index = index
        self.memory = &segment.first[index]
        self.known = {}

    # ---- cells

    def register(self, str kind not None, str name not None):
        """Return the cell of a series."""
        cdef uint64_t at, size = BUCKET_COUNT + 1 if kind in FIRST_OCTAVE else 1
        cdef bytes text
        found = self.known.get((kind, name))
        if found is not None:
            return found
        text = (kind + name).encode()
        at = self.memory.head[W_SERIES]
        if at + size > MOST_CELLS - BUCKET_COUNT - 1 or len(text) >= NAME_OCTETS:
            self.overflow += 1
            return MOST_CELLS - BUCKET_COUNT - 1     # counted, but never read
        memset(&self.memory.cells[at], 0, size * sizeof(uint64_t))
        memset(self.memory.names[at], 0, size * NAME_OCTETS)
        memcpy(self.memory.names[at], PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
        publish64(&self.memory.head[W_SERIES], at + size)
        self.known[kind, name] = at
        return at

    def start(self, uint64_t pid):
        """Reset: no series, nothing in the mailbox. `pid` is the process that writes the page."""
        self.known = {}
        publish64(&self.memory.head[W_SERIES], 0)
        store64(&self.memory.head[W_PID], pid)
        publish64(&self.memory.head[W_MAIL], 0)
        self.beat()

    @property
    def pid(self):
        return load64(&self.memory.head[W_PID])

    def add(self, unsigned int cell, int64_t n=1):
        if cell >= MOST_CELLS:
            raise IndexError("there is no such cell")
        store64(&self.memory.cells[cell], self.memory.cells[cell] + <uint64_t> n)

    def put(self, unsigned int cell, int64_t value):
        if cell >= MOST_CELLS:
            raise IndexError("there is no such cell")
        store64(&self.memory.cells[cell], <uint64_t> value)

    def get(self, unsigned int cell):
        if cell >= MOST_CELLS:
            raise IndexError("there is no such cell")
        return <int64_t> load64(&self.memory.cells[cell])

    def observe(self, unsigned int cell, int first, uint64_t value):
        """Add a value to a histogram; `first` is the octave where its buckets begin."""
        if cell >= MOST_CELLS - BUCKET_COUNT:
            raise IndexError("there is no such cell")
        self.note(cell, first, value, 1)

    cdef inline void note(self, unsigned int cell, int first, uint64_t value, uint64_t n) noexcept:
        cdef uint64_t *cells = &self.memory.cells[cell]
        cdef int at = half_octave(value) - 2 * first
        if at < 0:
            at = 0
        elif at >= BUCKET_COUNT:
            at = BUCKET_COUNT - 1
        store64(&cells[at], cells[at] + n)
        store64(&cells[BUCKET_COUNT], cells[BUCKET_COUNT] + value * n)

    cdef inline void bump(self, unsigned int cell, uint64_t n) noexcept:
        store64(&self.memory.cells[cell], self.memory.cells[cell] + n)

    def series(self):
        """Return (kind, name, value) of all series; a histogram has the counts of its buckets, then the sum."""
        cdef uint64_t at = 0, size, end = min(acquire64(&self.memory.head[W_SERIES]), <uint64_t> MOST_CELLS)
        cdef list found = []
        while at < end:
            text = self.memory.names[at][:min(strlen(self.memory.names[at]), <size_t> NAME_OCTETS)]
            text = text.decode("utf-8", "replace")
            kind, name = text[:1], text[1:]
            if kind in FIRST_OCTAVE:
                size = BUCKET_COUNT + 1
                if at + size > end:
                    break
                found.append((kind, name, [load64(&self.memory.cells[at + i]) for i in range(size)]))
            else:
                size = 1
                found.append((kind, name, <int64_t> load64(&self.memory.cells[at])))
            at += size
        return found

    # ---- signs of life, and mail

    def beat(self):
        store64(&self.memory.head[W_BEAT], shared_clock())

    @property
    def silence(self):
        """Seconds since the last `beat`; 0 before the first."""
        cdef uint64_t at = load64(&self.memory.head[W_BEAT])
        return max(0.0, (shared_clock() - <int64_t> at) / 1e9) if at else 0.0

    def send(self, bytes text not None):
        """Put a text into the mailbox. Return False if it is too long, or the last one was not taken yet."""
        if len(text) > MAIL_OCTETS or not text or acquire64(&self.memory.head[W_MAIL]):
            return False
        memcpy(self.memory.mail, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
        publish64(&self.memory.head[W_MAIL], PyBytes_GET_SIZE(text))
        return True

    def receive(self):
        """Take the text out of the mailbox; b"" without one."""
        cdef uint64_t size = min(acquire64(&self.memory.head[W_MAIL]), <uint64_t> MAIL_OCTETS)
        if size == 0:
            return b""
        text = self.memory.mail[:size]
        publish64(&self.memory.head[W_MAIL], 0)
        return text

    def release(self):
        """Take out all that a worker had open which has ended. What it counted lately still counts for limits."""
        cdef int i
        store64(&self.memory.head[W_OPEN], 0)
        store64(&self.memory.head[W_BEAT], 0)
        publish64(&self.memory.head[W_SERIES], 0)
        for i in range(SLOTS):
            if self.memory.slots[i].open:
                self.memory.slots[i].open = 0


@cython.final
cdef class SharedTable:
    """Counts by key of all workers together; this process writes its own page."""

    cdef Segment segment
    cdef PageMemory *own
    cdef int index

    def __init__(self, Page page not None):
        self.segment = page.segment
        self.own = page.memory
        self.index = page.index

    cdef Slot *find(self, PageMemory *page, uint64_t key) noexcept:
        """Return the slot of a key in a page, NULL without one."""
        cdef uint64_t at = key % SLOTS
        cdef int _
        for _ in range(PROBES):
            if page.slots[at].key == key:
                return &page.slots[at]
            if page.slots[at].key == 0:
                return NULL
            at = (at + 1) % SLOTS
        return NULL

    cdef Slot *claim(self, uint64_t key, double now) noexcept:
        """Return the own slot of a key, a new one if need be; NULL where all have something open."""
        cdef uint64_t at = key % SLOTS
        cdef Slot *slot
        cdef Slot *best = NULL
        cdef int _
        for _ in range(PROBES):
            slot = &self.own.slots[at]
            if slot.key == key:
                return slot
            if slot.open == 0 and (best == NULL or slot.ends < best.ends):
                best = slot
            if slot.key == 0:
                break
            at = (at + 1) % SLOTS
        if best != NULL:
            best.open = 0
            best.window = 0
            best.recent = best.before = 0
            best.ends = 0
            store64(&best.key, key)
        return best

    cdef double lately(self, Slot *slot, uint32_t window, double part) noexcept:
        """Return the events of a slot in the last window: those of this fixed one, and a part of those before."""
        if slot.window == window:
            return slot.recent + slot.before * (1 - part)
        return slot.recent * (1 - part) if slot.window + 1 == window else 0

    cdef void happened(self, Slot *slot, uint32_t window, double seconds, double now, int n) noexcept:
        if slot.window != window:
            slot.before = slot.recent if slot.window + 1 == window else 0
            slot.recent = 0
            slot.window = window
        if n < 0 and slot.recent <= 0 and slot.before > 0:
            slot.before += n        # it was counted in the window before
        else:
            slot.recent += n
        slot.ends = <uint64_t> (now + 2 * seconds) + 1

    cdef bint counts(self, int page) noexcept:
        """Return whether a page has counts: what an ended worker has counted lately comes back with the next one."""
        return self.segment.active[page] or load64(&self.segment.first[page].head[W_PID]) != 0

    cdef void sums(self, uint64_t key, uint32_t window, double part, uint64_t *opened, double *recent) noexcept:
        """Return the sum of all workers for a key."""
        cdef Slot *slot
        cdef int i
        opened[0] = 0
        recent[0] = 0
        for i in range(self.segment.count):
            if self.counts(i) or i == self.index:
                slot = self.find(&self.segment.first[i], key)
                if slot != NULL:
                    opened[0] += slot.open
                    recent[0] += self.lately(slot, window, part)

    # ---- connections

    def enter(self, str key not None, uint64_t most, double rate, double now):
        """Count a connection in and return 0; 1 if `most` are open, 2 if there were `rate` in the last minute."""
        cdef uint64_t code = self.segment.hash(b'n', key), opened
        cdef double recent, turn = now / 60
        cdef uint32_t window = <uint32_t> turn
        cdef Slot *slot
        self.sums(code, window, turn - <double> window, &opened, &recent)
        if opened >= most:
            return 1
        if recent >= rate:
            return 2
        slot = self.claim(code, now)
        if slot != NULL:
            slot.open += 1
            self.happened(slot, window, 60, now, 1)
        return 0

    def leave(self, str key not None):
        """Count a connection out."""
        cdef Slot *slot = self.find(self.own, self.segment.hash(b'n', key))
        if slot != NULL and slot.open:
            slot.open -= 1

    @property
    def total(self):
        return self.segment.open

    def count_total(self, int n):
        store64(&self.own.head[W_OPEN], self.own.head[W_OPEN] + n)

    # ---- open things of other kinds: connections to next hops

    def opened(self, int kind, str key not None):
        cdef uint64_t opened
        cdef double recent
        self.sums(self.segment.hash(kind, key), 0, 0, &opened, &recent)
        return opened

    def open_more(self, int kind, str key not None, int n, double now):
        """Add to the count of a key; subtract if negative."""
        cdef Slot *slot = self.claim(self.segment.hash(kind, key), now)
        if slot != NULL and <int64_t> slot.open + n >= 0:
            slot.open += n
            slot.ends = <uint64_t> now + 60

    # ---- events

    def count(self, int kind, str key not None, double seconds, double now):
        """Return how many events a key has had in the last `seconds`."""
        cdef uint64_t opened
        cdef double recent, turn = now / seconds
        cdef uint32_t window = <uint32_t> turn
        self.sums(self.segment.hash(kind, key), window, turn - <double> window, &opened, &recent)
        return max(0.0, recent)

    def happen(self, int kind, str key not None, int n, double seconds, double now):
        """Add events to a key; remove them if negative."""
        cdef Slot *slot = self.claim(self.segment.hash(kind, key), now)
        if slot != NULL:
            self.happened(slot, <uint32_t> (now / seconds), seconds, now, n)

    def forget(self, int kind, str key not None, double seconds, double now):
        """Make the sum of all events of a key 0: what others have counted is taken off here (rule 1)."""
        cdef uint64_t code = self.segment.hash(kind, key)
        cdef uint32_t window = <uint32_t> (now / seconds)
        cdef Slot *own = self.claim(code, now)
        cdef Slot *slot
        cdef int i
        if own == NULL:
            return
        self.happened(own, window, seconds, now, 0)
        own.recent = own.before = 0
        for i in range(self.segment.count):
            if i != self.index and self.counts(i):
                slot = self.find(&self.segment.first[i], code)
                if slot != NULL and slot.window == window:
                    own.recent -= slot.recent
                    own.before -= slot.before
                elif slot != NULL and slot.window + 1 == window:
                    own.before -= slot.recent

    # ---- rates

    def available(self, str key not None, double rate, double burst):
        """Return how many things a bucket that is filled with `rate` per second would give now."""
        cdef uint64_t *at = self.bucket(key)
        cdef int64_t now = shared_clock()
        cdef double due
        if at == NULL:
            return burst
        due = max(0.0, (<int64_t> load64(at) - now) / 1e9)
        return max(0.0, burst - due * rate)

    def take(self, str key not None, double rate, double burst):
        """Take one thing out of a bucket. Return False if it is empty."""
        cdef uint64_t *at = self.bucket(key)
        cdef int64_t now = shared_clock(), due
        cdef uint64_t seen
        if at == NULL:
            return True
        seen = load64(at)
        while True:
            due = max(<int64_t> seen, now)
            if (due - now) / 1e9 * rate > burst - 1 + 1e-6:
                return False
            if swap64(at, &seen, <uint64_t> (due + <int64_t> (1e9 / rate))):
                return True

    cdef uint64_t *bucket(self, str key) except? NULL:
        """Return the time of a bucket: when it would be full again. NULL if there are too many."""
        cdef uint64_t code = self.segment.hash(b'r', key), seen, at = code % MOST_RATES
        cdef int _
        for _ in range(PROBES):
            seen = acquire64(&self.segment.memory.rates[at][0])
            if seen == 0 and swap64(&self.segment.memory.rates[at][0], &seen, code):
                return &self.segment.memory.rates[at][1]
            if seen == code:
                return &self.segment.memory.rates[at][1]
            at = (at + 1) % MOST_RATES
        return NULL


# ---- sessions

cdef enum:
    CODES = 600             # replies 0 to 599
    CLASSES = 6
    VERBS = 18              # those of PHASES before "text"

_PLAIN = tuple(_PHASES[:VERBS])


cdef class SessionTotals(Metrics):
    """What the sessions of a worker count in its page: a few additions for each reply."""

    cdef readonly Page page
    cdef unsigned int codes[CODES]
    cdef unsigned int verbs[VERBS * CLASSES]
    cdef unsigned int accept_seconds, size_octets, octets
    cdef object code_cell, verb_cell

    def __init__(self, Page page not None, code_cell, verb_cell):
        """`code_cell(code)` and `verb_cell(verb, class)` return the cells of replies_total and commands_total."""
        self.page = page
        self.accept_seconds = page.register("s", "accept_seconds")
        self.size_octets = page.register("o", "message_size_octets")
        self.octets = page.register("c", "message_octets_total")
        self.code_cell = code_cell
        self.verb_cell = verb_cell

    cdef void note_reply(self, int phase, bytes encoded) noexcept:
        cdef const unsigned char *text = <const unsigned char *> PyBytes_AS_STRING(encoded)
        cdef int code = 0, at
        if PyBytes_GET_SIZE(encoded) >= 3 and c'2' <= text[0] <= c'5':
            code = (text[0] - 48) * 100 + (text[1] - 48) * 10 + text[2] - 48
        if not 200 <= code < CODES:
            return
        if not self.codes[code]:
            self.codes[code] = 1 + <unsigned int> self.cell_of_code(code)
        self.page.bump(self.codes[code] - 1, 1)
        if phase < VERBS:
            at = phase * CLASSES + code // 100
            if not self.verbs[at]:
                self.verbs[at] = 1 + <unsigned int> self.cell_of_verb(phase, code // 100)
            self.page.bump(self.verbs[at] - 1, 1)

    cdef int cell_of_code(self, int code) noexcept:
        return self.code_cell(code)

    cdef int cell_of_verb(self, int phase, int kind) noexcept:
        return self.verb_cell(_PLAIN[phase], kind)


cdef class ListenerTotals:
    """What the sessions of one listener count."""

    cdef readonly SessionTotals totals
    cdef Page page
    cdef object end_cell, refused
    cdef unsigned int sessions, accepted

    def __init__(self, SessionTotals totals not None, unsigned int sessions, unsigned int accepted, end_cell, refused):
        """`end_cell(cause)` returns the cell of an end; `refused(phase, encoded)` gets refused messages,
        recipients and handshakes.
        """
        self.totals = totals
        self.page = totals.page
        self.sessions = sessions
        self.accepted = accepted
        self.end_cell = end_cell
        self.refused = refused

    def new_session(self):
        cdef CountedSession session = CountedSession.__new__(CountedSession)
        session.totals = self.totals
        session.counts = self.totals
        session.listener = self
        session.phase = P_BANNER
        session.in_turn = True
        self.page.bump(self.sessions, 1)
        return session

    def count_refused_connection(self, bytes encoded not None):
        """Count a connection that was refused before it had a session."""
        self.totals.note_reply(P_BANNER, encoded)
        self.page.bump(<unsigned int> self.end_cell("turned away"), 1)


@cython.no_gc
cdef class CountedSession(SessionMetrics):
    """One session of a server. Holds a listener's totals, which never holds it for longer than a round."""

    cdef SessionTotals counts
    cdef ListenerTotals listener
    cdef uint32_t accepted      # messages whose 250 is about to be sent

    cdef void begin_turn(self) noexcept:
        self.in_turn = True
        self.began = 0

    cdef void replied(self, bytes encoded) noexcept:
        cdef unsigned char first = PyBytes_AS_STRING(encoded)[0]
        self.counts.note_reply(self.phase, encoded)
        if self.phase == P_MESSAGE:
            if first == c'2':
                self.accepted += 1
                return
        elif self.phase != 5 or first < c'4':   # RCPT
            return
        if first >= c'4':
            self.tell_refusal(encoded)

    cdef void tell_refusal(self, bytes encoded) noexcept:
        self.listener.refused("message" if self.phase == P_MESSAGE else "rcpt", encoded)

    cdef int end_turn(self, Py_ssize_t octets) except -1:
        self.in_turn = False
        if not self.accepted:
            return 0
        if not self.totals.in_round:
            self.settle(shared_clock())
        elif not self.is_listed:
            self.is_listed = True
            self.totals.flushed.append(self)
        return 0

    cdef void settle(self, int64_t now) noexcept:
        self.counts.page.note(self.counts.accept_seconds, 13, now - self.text_began, self.accepted)
        self.accepted = 0

    cdef void text_begins(self) noexcept:
        pass

    cdef void text_ends(self, int phase) noexcept:
        """The last octet of a text has come: the clock of what follows it starts."""
        self.phase = phase
        if phase == P_MESSAGE and not self.accepted:
            self.text_began = self.totals.round_began if self.totals.in_round else shared_clock()

    cdef int message(self, object transaction, uint64_t octets) except -1:
        cdef Page page = self.counts.page
        page.bump(self.listener.accepted, 1)
        page.bump(self.counts.octets, octets)
        page.note(self.counts.size_octets, 8, octets, 1)
        return 0

    def begin_tls(self):
        self.tls_began = 1

    def end_tls(self):
        self.tls_began = 0

    def expect_refusal(self):
        pass

    def lose_message(self, str cause not None):
        pass

    def pause_text(self):
        pass

    def ended(self, str cause not None, uint64_t received):
        """Count the connection out. Does nothing the second time."""
        if self.has_ended:
            return
        self.has_ended = True
        if self.tls_began:
            self.listener.refused("tls", b"")
        self.listener.page.bump(self.listener.sessions, <uint64_t> -1)
        self.listener.page.bump(<unsigned int> self.listener.end_cell(cause), 1)
