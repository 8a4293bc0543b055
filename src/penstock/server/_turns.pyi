"""What the compiled part of a connection shows. What it is for stands at the top of ext/turns.pyx."""

from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

import trio

from penstock.message import Message
from penstock.metrics._session import SessionMetrics
from penstock.net._poller import Poller, Receiver, Taker
from penstock.net.stream import SocketStream
from penstock.net.tls import TlsLayer
from penstock.reply import Reply
from penstock.server.body import BodyCollector
from penstock.server.limits import Admission, Deadlines
from penstock.server.listener import Listener
from penstock.smtp import sasl
from penstock.smtp._wire import Wire
from penstock.smtp.events import BeginData, EndOfMessage
from penstock.smtp.server import ServerSession
from penstock.transaction import Peer, Transaction

class Host:
    """What the connections of a worker have in common. The worker inherits it.

    It has five methods more:

    spawn(connection, woken)    gives a connection that has come without a task one that goes on with `run(woken)`
    serve(connection)           gives a new connection the task that it needs
    ended()                     a connection is over while the worker wants to end
    turn_away(fd, peer, listener, refusal)      refuses a client before it costs anything, and closes the socket
    report(exc)                 journals why a client that was accepted is not served
    """

    @property
    def connections(self) -> set[Any]:
        """The connections that are open."""
    @property
    def admission(self) -> Admission:
        """Who may come in."""
    is_stopping: bool
    """The worker wants to end: no new transactions."""
    sessions: int
    """Connections so far, those that were turned away among them."""
    def __init__(self, connections: set[Any], admission: Admission) -> None:
        """Keep the connections that are open in this set."""
    def admit(self, peer: Peer) -> Reply | None:
        """Count a client in, or say why not."""

class Acceptor:
    """Lets in the clients of one listening socket: give it to `penstock.net.listen.accept_forever`."""

    def __init__(
        self, host: Host, poller: Poller | None, listener: Listener, kind: type[TurnTaker], address: str, port: int
    ) -> None:
        """`kind` is what the clients' sockets become; address and port are those the listener is bound to."""
    def __call__(self, fd: int, address: str, port: int) -> None:
        """Admit an accepted socket and start its session."""

class TurnTaker(Taker):
    """What a connection has, and what each of them passes."""

    asks_all: ClassVar[bool]
    """This kind of connection wants to be asked about every event, whatever its listener takes no interest in."""
    watched_prefixes: ClassVar[tuple[str, ...] | None]
    """Beginnings of local parts that this kind wants to be asked about in any case."""
    open: ClassVar[set[Any] | None]
    """Where the connections of this kind are that are open, for whoever wants to know; None is nowhere."""
    @property
    def number(self) -> int:
        """What the journal calls it."""
    _stream: trio.abc.Stream
    _socket: SocketStream | None
    """The stream, where it is a socket of our own."""
    _takes_turns: bool
    """The stream is a socket on a poller: turns are taken without a task, which can be nudged and held."""
    _peer: Peer
    _listener: Listener
    _host: Host
    _wire: Wire
    _receiver: Receiver
    """What octets are received into: the wire, or TLS in front of it."""
    _transaction: Transaction
    _session: ServerSession
    _metrics: SessionMetrics | None
    _tls: TlsLayer | None
    """TLS on a socket of our own; on another stream it is a trio.SSLStream."""
    _handlers: dict[type, Callable[[Any, Any], Coroutine[Any, Any, None] | None]]
    """What each event is for; see `Connection.handlers`."""
    _pending: Coroutine[Any, Any, None] | None
    """What the task has to await before the next event."""
    _committing: Message | None
    """The message that a delivery has, and that nothing was said of yet."""
    _last_words: Reply | None
    """Why the client is to be sent away."""
    _clocks: Deadlines | None
    """Made when the sweeper first looks: most connections are over by then."""
    _scope: trio.CancelScope | None
    """Cancelled to end a wait for the client, but for the one of `attend`, which is nudged instead."""
    _body: BodyCollector | None
    _exchange: sasl.Exchange | None
    _ahead: bytes
    """What came behind a PROXY header."""
    _is_admitted: bool
    _is_attending: bool
    _is_sending: bool
    _is_in_message: bool
    """The text of a message has begun, and its end is not dealt with."""
    _has_left: bool
    """The client has ended TLS."""
    _has_ended: bool
    _octets: int
    """What was received so far."""
    _begun: int
    """Messages whose text has begun."""
    _messages: int
    """Messages that were taken."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        peer: Peer,
        listener: Listener,
        host: Host,
        number: int = 0,
        is_admitted: bool = False,
    ) -> None:
        """`is_admitted` says that the host has counted the client in."""
    def start(self) -> bool:
        """Begin the conversation without a task. Return False when it needs one from the start: then call `run`."""
    def _turn(self, received: int) -> bytes | None:
        """Answer what has come, as far as that needs no waiting, and return what is to be sent.

        None means that the task has to go on: something is to be awaited (`_pending`), or the conversation is over.
        """
    def _on_begin_data(self, event: BeginData) -> None:
        """Let the text of a message come."""
    def _on_end(self, event: EndOfMessage) -> Coroutine[Any, Any, None] | None:
        """Judge and deliver a whole message. Nothing from here on is cut short but by the end of the process."""
    def _say(self, reply: Reply) -> None:
        """Tell the client what became of its message."""
    def _end(self, cause: str) -> None:
        """Close the connection and give everything back. Does nothing the second time."""
