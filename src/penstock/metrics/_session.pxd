"""What other compiled modules may do with a totals, at the price of a few instructions."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from penstock.metrics._histogram cimport Histogram

cdef enum Phase:
    # 0 to 16 are the verbs, by their place in penstock.smtp._wire.VERBS
    P_BDAT = 7
    P_MESSAGE = 17
    P_TEXT = 18
    P_TLS = 19
    P_THINK = 20
    P_BANNER = 21
    P_UNASKED = 22
    PHASE_COUNT = 23

cdef enum:
    CELLS = 2048            # of the table of counts; at most half of them are used
    MOST_KINDS = 1024


cdef class Metrics:
    cdef tuple latencies            # a Histogram for each phase
    cdef readonly Histogram recent_messages
    cdef readonly Histogram recent_replies
    cdef readonly uint64_t sessions, open_sessions
    cdef uint64_t own[2]
    cdef uint64_t[::1] shared
    cdef uint64_t *counters         # open sessions of all processes, and their peak
    cdef readonly uint64_t received, sent, replies, accepted, unheard, refused, recipients, text_octets, tls_failed
    cdef readonly dict ends, lost
    cdef readonly object sequences
    cdef readonly object source
    cdef readonly bint reads_marks
    cdef SequenceTracker tracker
    cdef uint64_t keys[CELLS]
    cdef uint64_t counts[CELLS]
    cdef int kinds
    cdef readonly uint64_t further
    # the round of the poller that is under way
    cdef bint in_round
    cdef int64_t round_began
    cdef list flushed

    cdef int clear(self) except -1
    cdef void begin_round(self) noexcept
    cdef int end_round(self) except -1
    cdef void count(self, int phase, const unsigned char *text, Py_ssize_t size) noexcept
    cdef Py_ssize_t cell(self, uint64_t key) noexcept


cdef class SessionMetrics:
    cdef readonly Metrics totals
    cdef int64_t began              # when the octets came that are being answered
    cdef int64_t said               # when the last reply was sent, 0 once that is counted
    cdef int64_t text_began
    cdef int64_t tls_began
    cdef public int phase
    cdef bint in_turn, awaits_text, is_listed, has_ended
    cdef bint is_held               # replies are replaced by a fault
    cdef bint has_taken             # a message was taken meanwhile
    cdef bint expects_refusal             # a message has begun that will be refused
    cdef uint32_t owed              # a bit for each phase that has replies to be sent
    cdef uint32_t owing[PHASE_COUNT]

    cdef void begin_turn(self) noexcept
    cdef void replied(self, bytes encoded) noexcept
    cdef int end_turn(self, Py_ssize_t octets) except -1
    cdef void settle(self, int64_t now) noexcept
    cdef void text_begins(self) noexcept
    cdef void text_ends(self, int phase) noexcept
    cdef int message(self, object transaction, uint64_t octets) except -1


cdef class SequenceTracker:
    cdef readonly dict runs
    cdef readonly uint64_t unmarked, further
    cdef readonly uint64_t octets
    cdef uint64_t reported_unmarked, reported_further
    cdef bint tracks_changes        # the runs keep what was noted since the last `take_changes`
    cdef Sequence latest

    cdef Sequence new(self, str run)
    cdef bint note_mark(self, str text) except -1
    cpdef bint note(self, str run, uint64_t number) except -1


cdef class Sequence:
    cdef readonly str run
    cdef bint tracks_changes
    cdef unsigned char *bits
    cdef unsigned char *unreported  # what was noted since the last `take_changes`, if that is tracked
    cdef size_t size                # octets of `bits`, and of `unreported`
    cdef uint64_t reported_received, reported_out_of_order
    cdef Py_ssize_t reported_examples
    cdef readonly uint64_t received, distinct, duplicates, out_of_order, highest, lowest
    cdef readonly list examples     # numbers that came again

    cdef bint reserve(self, uint64_t number, uint64_t room) noexcept
    cdef int take(self, uint64_t number) except -1
    cdef dict take_changes(self)
    cdef int add(self, dict changes) except -1
    cdef uint64_t count(self, uint64_t first, uint64_t last) noexcept
