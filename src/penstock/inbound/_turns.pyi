"""What the compiled turns of a connection show. What they are for stands at the top of ext/turns.pyx."""

from collections.abc import Callable, Coroutine
from typing import Any

from penstock.message import Message
from penstock.net.stream import SocketStream
from penstock.net.tls import TlsLayer
from penstock.reply import Reply
from penstock.smtp._wire import Wire
from penstock.smtp.server import ServerSession

class TurnTaker:
    """What a connection needs to take its turns."""

    _socket: SocketStream | None
    """The stream, where it is a socket of our own."""
    _host: Any
    """The worker: a `Host` of penstock.inbound.connection."""
    _wire: Wire
    _session: ServerSession
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
    _is_in_message: bool
    """The text of a message has begun, and its end is not dealt with."""
    _has_left: bool
    """The client has ended TLS."""
    _octets: int
    """What was received so far."""

    def _turn(self, received: int) -> bytes | None:
        """Answer what has come, as far as that needs no waiting, and return what is to be sent.

        None means that the task has to go on: something is to be awaited (`_pending`), or the conversation is over.
        """
