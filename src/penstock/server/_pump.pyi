"""The compiled pump; its design is described at the top of ext/pump.pyx."""

from typing import Any

from typing_extensions import Buffer

from penstock.delivery.base import Discards
from penstock.net._poller import Protocol
from penstock.net.tls import TlsTurns
from penstock.smtp.events import Event
from penstock.smtp.server import ServerSession

class Pump(Protocol):
    """Takes the turns of one connection."""

    sync_handlers: dict[type, Any]
    """The events that need no task: called with the owner and the event, they return False to leave it to the task."""
    tls: TlsTurns | None
    """TLS between the socket and the wire; None without TLS, or if a stream does it."""
    counting: Discards | None
    """The delivery that counts messages, if nothing else is done with them; None leaves them to the handlers."""
    is_counting: bool
    """The text of a message is being received that is only counted."""
    @property
    def texts(self) -> int:
        """Such messages whose text has begun."""
    @property
    def messages(self) -> int:
        """Such messages that are complete."""
    @property
    def session(self) -> ServerSession:
        """The session that reads the wire."""
    @property
    def has_ended(self) -> bool:
        """The client has closed TLS: no more input follows."""
    @property
    def octets(self) -> int:
        """Octets received so far, as the socket had them."""
    def __init__(self, session: ServerSession, sync_handlers: dict[type, Any], owner: object) -> None:
        """Take turns for this owner; this bounds the turns of the session."""
    def advance(self) -> Event:
        """Read the input. Return the event that the task has to handle; NEED_DATA and TURN_OVER are none."""
    def take_output(self) -> bytes:
        """Return the octets to send now: replies, encrypted if there is TLS."""
    def take_event(self) -> Event | None:
        """Return the event that a turn could not handle, and forget it; None without one."""
    def feed(self, data: Buffer) -> None:
        """Take in octets that were received, and decrypted, elsewhere."""
    def feed_tls(self) -> None:
        """Decrypt what was received. Raise ssl.SSLError."""
    def close(self) -> None:
        """Release the buffer of the wire and the owner."""
