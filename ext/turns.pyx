"""The turns of a connection: octets have come, the session says what they mean, and what is to be said is sent.

This is the loop that every command passes, on a socket as on any other stream; penstock.inbound.connection, which
inherits it, decides what the events are answered with. A turn never waits. What it can not finish it leaves: something to
be awaited (`_pending`), a message that a delivery has (`_committing`), or the end of the conversation.
"""

from penstock.smtp.events import CLOSED, NEED_DATA

cdef object closed = CLOSED
cdef object need_data = NEED_DATA


cdef class TurnTaker:
    """What a connection needs to take its turns."""

    cdef public object _socket
    cdef public object _host
    cdef public object _wire
    cdef public object _session
    cdef public object _tls
    cdef public dict _handlers
    cdef public object _pending
    cdef public object _committing
    cdef public object _last_words
    cdef public bint _is_in_message
    cdef public bint _has_left
    cdef public long long _octets

    def _turn(self, Py_ssize_t received):
        cdef object event, said
        cdef object session = self._session
        self._octets += received
        if self._tls is not None and received and not self._tls.decrypt_into(self._wire.feed):
            self._has_left = True
            return None
        while self._pending is None and self._committing is None:
            event = session.next_event()
            if event is need_data:
                if self._last_words is None and (self._is_in_message or not self._host.is_stopping):
                    said = session.data_to_send()
                    return said if self._tls is None else self._tls.encrypt(said)
                self._leave()
            elif event is closed:
                return None
            else:
                self._pending = self._handlers[type(event)](self, event)
        if self._pending is None and self._socket is not None:
            self._socket.hold()
            self._wire.rest()
            return b""  # what was said of earlier commands is sent with the reply to the message
        return None
