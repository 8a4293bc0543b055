"""What every connection passes: the bound, its making, its turns, its end.

A turn is: octets have come, the session says what they mean, and what is to be said is sent. This is the loop that every
command passes, on a socket as on any other stream; penstock.server.connection, which inherits it, decides what the
events are answered with. A turn never waits. What it can not finish it leaves: something to be awaited (`_pending`), a
message that a delivery has (`_committing`), or the end of the conversation.

Most connections bring one message and leave. What such a one needs beside its turns costs more than they do, so it stands
here, too: how a client is let in, how a connection begins without a task, how a text that nobody keeps is answered, how
it all ends.
"""

from time import monotonic

from penstock.metrics._session cimport SessionMetrics, Metrics
from penstock._transaction cimport TransactionCore
from penstock.net._poller cimport Poller, SocketCore, Taker
from penstock.smtp._grammar cimport of_type
from penstock.smtp._session cimport SessionCore
from penstock.smtp._wire cimport Wire

from outcome import Error, Value
from trio import BrokenResourceError

from penstock import reply as replies
from penstock.server.body import BodyCollector
from penstock.smtp.events import CLOSED, NEED_DATA
from penstock.net._poller import close
from penstock.net.stream import SocketStream
from penstock.transaction import Peer, Transaction

cdef enum:
    READ_OCTETS = 65_536

cdef object closed = CLOSED
cdef object need_data = NEED_DATA
cdef object go_ahead = replies.GO_AHEAD_DATA
cdef object peer_type = Peer
cdef object socket_stream = SocketStream
cdef object transaction_type = Transaction


cdef str network_of(peer):
    """Return what limits count a client by. Most have an IPv4 address, which is its own network."""
    cdef str address = (<tuple> peer)[0]
    return peer.network if ":" in address else address


cdef class Host:
    """What the connections of a worker have in common."""

    cdef readonly set connections
    cdef readonly object admission
    cdef public bint is_stopping
    cdef public long long sessions

    def __init__(self, set connections not None, admission not None):
        self.connections = connections
        self.admission = admission

    def admit(self, peer not None):
        return self.let_in(peer)

    cdef object let_in(self, peer):
        """Count a client in and return None, or return why not."""
        return self.admission.admit(network_of(peer))

    cdef int let_out(self, peer) except -1:
        """Count a client out again."""
        self.admission.release(network_of(peer))
        return 0


cdef class Acceptor:
    """Lets in the clients of one listening socket."""

    cdef Host host
    cdef Poller poller
    cdef object listener
    cdef object kind
    cdef str address
    cdef object port
    cdef bint counts

    def __init__(self, Host host not None, Poller poller, listener not None, kind not None, str address not None, port not None):
        self.host = host
        self.poller = poller
        self.listener = listener
        self.kind = kind
        self.address = address
        self.port = port
        self.counts = not listener.proxy_networks  # behind a proxy, the client is known later

    def __call__(self, int fd, str address not None, port not None):
        cdef Host host = self.host
        cdef object peer = of_type(peer_type, (address, port, self.address, self.port, ""))
        cdef object refusal
        cdef SocketCore stream = None
        cdef TurnTaker connection = None
        host.sessions += 1
        if self.counts:
            refusal = host.let_in(peer)
            if refusal is not None:
                host.turn_away(fd, peer, self.listener, refusal)
                return
        try:
            stream = socket_stream(fd, self.poller)
            connection = self.kind(stream, peer, self.listener, host, host.sessions, self.counts)
            if not connection.start():
                host.serve(connection)
        except Exception as exc:  # whatever it is, it costs this client and no other
            host.report(exc)
            if connection is not None:
                connection._end("it did not begin")
                return
            if self.counts:
                host.let_out(peer)
            if stream is not None:
                stream.close_nowait()
            else:
                close(fd)



cdef class TurnTaker(Taker):
    """What a connection needs to take its turns."""

    cdef readonly long long number
    cdef public object _stream
    cdef public SocketCore _socket
    cdef public bint _takes_turns
    cdef public object _peer
    cdef public object _listener
    cdef public Host _host
    cdef public Wire _wire
    cdef public object _receiver
    cdef public TransactionCore _transaction
    cdef public SessionCore _session
    cdef public SessionMetrics _metrics
    cdef public object _tls
    cdef public dict _handlers
    cdef public object _pending
    cdef public object _committing
    cdef public object _last_words
    cdef public object _clocks
    cdef public object _scope
    cdef public object _body
    cdef public object _exchange
    cdef public bytes _ahead
    cdef public bint _is_admitted
    cdef public bint _is_attending
    cdef public bint _is_sending
    cdef public bint _is_in_message
    cdef public bint _has_left
    cdef public bint _has_ended
    cdef public long long _octets
    cdef public int _begun
    cdef public int _messages
    cdef double started

    asks_all = False
    watched_prefixes = None
    open = None

    def __init__(
        self, stream not None, peer not None, listener not None, Host host not None, long long number=0,
        bint is_admitted=False
    ):
        cdef SessionCore pattern = listener.session
        cdef Metrics metrics = listener.metrics
        cdef object watched_prefixes = self.watched_prefixes
        if watched_prefixes is not pattern.beginnings:
            pattern.watched_prefixes = watched_prefixes  # once for a listener: what it is looked up by is made there
        self.number = number
        self._handlers = self.handlers
        self._stream = stream
        if isinstance(stream, SocketCore):
            self._socket = <SocketCore> stream
            self._takes_turns = self._socket._watch is not None
        self._peer = peer
        self._listener = listener
        self._host = host
        self._wire = self._receiver = pattern.wire.made_like()
        self._transaction = transaction_type(peer, listener.name)
        self._session = pattern.made_like(self._wire, self._transaction)
        if self.asks_all:
            self._session.unasked = 0
        if metrics is not None:
            self._metrics = self._session.metrics = metrics.new_session()
        self._ahead = b""
        self._is_admitted = is_admitted
        self.started = monotonic()
        if self.open is not None:
            self.open.add(self)

    # ---- the beginning

    def start(self):
        cdef object listener = self._listener
        if not self._takes_turns or not self._is_admitted or listener.is_implicit_tls or listener.pipeline.connect:
            return False
        self._host.connections.add(self)
        listener.journal.connected(self.number, self._peer, listener.name)
        self._session.welcome()
        self._is_attending = True
        try:
            self._socket.attend_alone(self, self._session.take_said())
        except BrokenResourceError as exc:
            self._end(f"connection lost: {exc.__cause__ or exc}")
        return True

    # ---- the turns

    cdef Py_ssize_t receive(self, int fd) except -2:
        return self._wire.receive(fd, READ_OCTETS) if self._tls is None else self._tls.recv(fd)

    def _turn(self, Py_ssize_t received):
        return self.take(received)

    cdef object take(self, Py_ssize_t received):
        cdef object event, said
        cdef SessionCore session = self._session
        self._octets += received
        if self._tls is not None and received and not self._tls.decrypt_into(self._wire.feed):
            self._has_left = True
            return None
        while self._pending is None and self._committing is None:
            event = session.find_event()
            if event is need_data:
                if self._last_words is None and (self._is_in_message or not self._host.is_stopping):
                    said = session.take_said()
                    return said if self._tls is None else self._tls.encrypt(said)
                self._leave()
            elif event is closed:
                return None
            else:
                self._pending = self._handlers[type(event)](self, event)
        if self._pending is None and self._socket is not None:
            self._socket.hold()
            self._wire.settle()
            return b""  # what was said of earlier commands is sent with the reply to the message
        return None

    cdef bint wake(self, Py_ssize_t received, object failure) except -1:
        """Go on when the turns have come to an end: finish here what needs no waiting, else get a task and say so."""
        self._is_attending = False
        if failure is None and self._pending is None:
            if self._session.has_quit and self._tls is None:
                # As much of it as a client takes that has said QUIT and should read it.
                self._socket.send_and_close_nowait(self._session.take_said())
                self._end("QUIT")
                return False
            if received == 0:
                self._end("the client closed the connection")
                return False
        elif isinstance(failure, OSError):
            self._end(f"connection lost: {failure}")
            return False
        self._host.spawn(self, Value(received) if failure is None else Error(failure))
        return True

    # ---- the commonest answers

    def _on_begin_data(self, event):
        cdef object listener = self._listener
        cdef bint keeps_body = listener.keeps_body
        self._wire.discard = not keeps_body
        if keeps_body:
            self._body = BodyCollector(listener.body, listener.budget, listener.folder)
        self._is_in_message = True
        self._begun += 1
        self._session.answer(go_ahead)

    def _on_end(self, event):
        """Judge and deliver a whole message. Nothing from here on is cut short but by the end of the process."""
        cdef object listener = self._listener
        cdef object journal, reply
        cdef TransactionCore transaction = self._transaction
        if listener.discards is None:
            if listener.defers is not None and self._takes_turns and self._hand_over(listener.defers, event):
                return None
            return self._judge(event)
        self._is_in_message = False
        reply = listener.discards.discard(len(transaction.recipients), event.size)
        journal = listener.journal
        if journal.logs_mail:
            journal.accepted(
                self.number, self._peer, listener.ids.next(), transaction.sender, transaction.recipients, event.size, reply
            )
        self._messages += 1
        self.say(reply)
        return None

    def _say(self, reply):
        self.say(reply)

    cdef int say(self, object reply) except -1:
        """Tell the client what became of its message."""
        if self._transaction.is_lmtp:
            self._session.reply_each([reply] * len(self._transaction.recipients))
        else:
            self._session.answer(reply)
        return 0

    # ---- the end

    def _end(self, str cause not None):
        cdef object pending
        if self._has_ended:
            return
        self._has_ended = True
        if self._is_in_message:
            self._drop_body(cause)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.close()
        if self._metrics is not None:
            self._metrics.ended("QUIT" if self._session.has_quit else cause, self._octets)
        self._wire.drop()  # its buffer is wanted elsewhere, whoever still holds this connection
        if self._is_admitted:
            self._host.let_out(self._peer)
            self._listener.journal.disconnected(
                self.number, self._peer, self._messages, self._session.errors, self._octets, monotonic() - self.started
            )
        self._host.connections.discard(self)
        if self._host.is_stopping:
            self._host.ended()
        if self.open is not None:
            self.open.discard(self)
        if self._socket is not None:
            self._socket.close_nowait()
