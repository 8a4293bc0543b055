"""What the compiled pump shows. The theory stands at the top of ext/pump.pyx."""

from typing import Any

from typing_extensions import Buffer

from penstock.delivery.base import Discards
from penstock.net._poller import Taker
from penstock.net.tls import TlsTurns
from penstock.smtp.events import Event
from penstock.smtp.server import ServerSession

class Pump(Taker):
    """Takes the turns of one connection."""

    sync_handlers: dict[type, Any]
    """The events that need no task: called with the owner and the event, they return False to leave it to the task."""
    tls: TlsTurns | None
    """TLS between the socket and the wire; None without it, or where a stream does it."""
    counting: Discards | None
    """The delivery that counts messages, where nothing else is wanted of them; None leaves them to the handlers."""
    is_counting: bool
    """The text of a message is being received that is only counted."""
    @property
    def texts(self) -> int:
        """Texts of such messages begun so far."""
    @property
    def messages(self) -> int:
        """Such messages so far."""
    @property
    def session(self) -> ServerSession:
        """The session that reads the wire."""
    @property
    def has_ended(self) -> bool:
        """The client has ended TLS: nothing more comes."""
    @property
    def octets(self) -> int:
        """Octets received so far, as the socket had them."""
    def __init__(self, session: ServerSession, sync_handlers: dict[type, Any], owner: object) -> None:
        """Take turns for this owner; from now on the session's turns are bounded."""
    def advance(self) -> Event:
        """Read the input. Return the event that the task has to handle; NEED_DATA and TURN_OVER are none."""
    def take_output(self) -> bytes:
        """Return what has to be sent now: replies, and what TLS has to say."""
    def take_event(self) -> Event | None:
        """Return the event that a turn could not handle, and forget it; None without one."""
    def feed(self, data: Buffer) -> None:
        """Take in octets that were received, and decrypted, elsewhere."""
    def feed_tls(self) -> None:
        """Decrypt what was received. Raise ssl.SSLError."""
    def recv(self, fd: int) -> int:
        """Receive for the next turn; see `Wire.recv`."""
    def turn(self, received: int) -> bytes | None:
        """Take a turn outside of the poller. Return what is to be sent, None to leave the rest to the task."""
    def close(self) -> None:
        """Give the buffer of the wire back, and let the owner go."""
