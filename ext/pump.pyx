"""The pump of a server connection: the turns that need no decision.

A connection is one task (penstock.server.connection). While nothing has to be decided or waited for, the task is parked
and the poller calls its pump when octets are received: the pump reads into the wire, lets the session parse it, and
returns the replies. It continues without the task as long as

- the session can answer on its own, because nothing is registered for that hook point (`auto_accept`), or
- a synchronous handler is registered for the event (a recipient in one of our domains, a chunk that fits into memory),
  and returns True; the one that only counts a message is in this file, because a sink does nothing else.

Otherwise the task is woken, and gets the event with `take_event`. There is no third case.

A turn is bounded: it ends after OUTPUT_LIMIT octets of output or TURN_TIME, and continues after the turns of the other
connections. Output that does not fit into the socket wakes the task, which sends it; until then, nothing is read.
"""

from libc.stdint cimport int64_t

from penstock.net._poller cimport Protocol, now
from penstock.smtp._wire cimport Wire
from penstock.smtp.server cimport ServerSession

from penstock import reply as replies
from penstock.smtp.events import CLOSED, NEED_DATA, TURN_OVER, BeginData, EndOfMessage

cdef enum:
    READ_OCTETS = 65_536
    COMMANDS_AT_A_TIME = 16     # between two looks at the clock
    OUTPUT_LIMIT = 16_384       # octets
    TURN_TIME = 500_000         # nanoseconds

cdef object closed = CLOSED
cdef object need_data = NEED_DATA
cdef object turn_over = TURN_OVER
cdef object begin_data_type = BeginData
cdef object end_of_message_type = EndOfMessage
cdef object go_ahead = replies.GO_AHEAD_DATA


cdef class Pump(Protocol):
    """Takes the turns of one connection."""

    cdef readonly ServerSession session
    cdef Wire wire
    cdef public dict sync_handlers
    cdef object owner
    cdef public object counting
    cdef public bint is_counting
    cdef readonly int texts
    cdef readonly int messages
    cdef public object tls
    cdef object event
    cdef readonly bint has_ended
    cdef readonly long long octets

    def __init__(self, ServerSession session not None, dict sync_handlers not None, owner not None):
        self.session = session
        self.wire = session.wire
        self.sync_handlers = sync_handlers
        self.owner = owner
        session.turn_limit = COMMANDS_AT_A_TIME

    cpdef object advance(self):
        """Read the input. Return the event that the task has to handle; NEED_DATA and TURN_OVER are none."""
        cdef object event, handler
        cdef ServerSession session = self.session
        cdef int64_t end = 0
        while True:
            event = session.next_event()
            if event is need_data or event is closed:
                return event
            if event is not turn_over and not (self.counting is not None and self.count_message(event)):
                handler = self.sync_handlers.get(type(event))
                if handler is None or not handler(self.owner, event):
                    return event
            if session.output_octets >= OUTPUT_LIMIT:
                return turn_over
            if event is turn_over:
                if end == 0:
                    end = now() + TURN_TIME
                elif now() >= end:
                    return turn_over

    cdef bint count_message(self, object event) except -1:
        """Receive a message that is only counted. Return False for every other event."""
        cdef ServerSession session = self.session
        if type(event) is begin_data_type:
            self.texts += 1
            self.is_counting = True
            self.wire.discard = True
            session.reply(go_ahead)
        elif self.is_counting and type(event) is end_of_message_type:
            self.is_counting = False
            self.messages += 1
            session.reply(self.counting.discard(len(session.transaction.recipients), event.size))
        else:
            return False
        return True

    cpdef bytes take_output(self):
        """Return the octets to send now: replies, encrypted if there is TLS."""
        cdef bytes output = self.session.take_output()
        return output if self.tls is None else self.tls.encrypt(output)

    def feed(self, data not None):
        """Add octets that were received and decrypted elsewhere."""
        self.octets += len(data)
        self.wire.feed(data)

    cpdef int feed_tls(self) except -1:
        """Decrypt what was received."""
        if not self.tls.decrypt_into(self.wire.feed):
            self.has_ended = True   # after the octets received so far
        return 0

    def take_event(self):
        """Return the event that the last turn left to the task, once; None without one."""
        event, self.event = self.event, None
        return event

    def close(self):
        """Release the buffer of the wire, and the connection, which refers to this pump."""
        self.wire.drop()
        self.sync_handlers = {}
        self.owner = None

    # ---- the poller's side

    cdef Py_ssize_t receive(self, int fd) except -2:
        return self.wire.receive(fd, READ_OCTETS) if self.tls is None else self.tls.recv(fd)

    cdef object take_turn(self, Py_ssize_t received):
        cdef object event
        if received > 0:
            self.octets += received
            if self.tls is not None:
                self.feed_tls()
        event = self.advance()
        if event is need_data:
            return None if self.has_ended else self.take_output()
        if event is turn_over:
            self.wants_turn = True
            return self.take_output()
        self.event = event
        return None
