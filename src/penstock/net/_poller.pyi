"""The compiled poller; its design is described at the top of ext/poller.pyx."""

from collections.abc import Callable
from typing import Final

from trio.lowlevel import Task
from typing_extensions import Buffer

from penstock.metrics._session import Metrics

HAS_EPOLL: Final[bool]
"""There is an epoll on this platform; without it a `Poller` cannot be made."""

SHORTAGES: Final[frozenset[int]]
"""The errors of `accept` that say that there are too few descriptors, or too little memory, for now."""

class Protocol:
    """Takes the turns of a connection.

    A class that inherits it has three methods, which the poller calls:

    recv(fd)                receives for the next turn, and returns the octets received, 0 at the end of the stream, -1
                            when there is nothing; raises OSError
    data_received(received) handles the octets received: returns what is to be sent, b"" for nothing, None to end the
                            turns and wake the task that waits for that
    connection_lost(received, failure)      where no task waits: the turns have ended with the octets received last, 0
                            at the end of the stream, -1 when something is unsent, or with what was raised
    """

    wants_turn: bool
    """A turn has left input unparsed, so that others get their turns: it continues in the next round.

    When the turns end in between, the task that gets the rest continues itself.
    """

class Watch:
    """The readiness of one socket, and the task that waits for it."""

    def __init__(self, fd: int) -> None:
        """Watch a descriptor that is taken for writable and not for readable."""
    @property
    def fd(self) -> int:
        """The descriptor."""
    is_readable: bool
    """Input was reported, and may still be there: receive before you wait. Unset, what is there will be reported."""
    is_writable: bool
    """No send has found the socket full since the last edge."""
    has_hung_up: bool
    """The peer has closed, or the connection broke: receive until you find the end."""
    reader: Task | None
    """The task to wake when the socket becomes readable, or when the turns of `protocol` end."""
    writer: Task | None
    """The task to wake when the socket becomes writable."""
    protocol: Protocol | None
    """What takes turns, in place of waking `reader`. The wait of the reader ends with the octets received, 0 at the end
    of the stream, or -1 when `unsent` has to be sent, a turn without octets has ended the turns, or it was
    interrupted."""
    unsent: bytes | None
    """The unsent part of the output of a turn."""

class Poller:
    """The epoll set of a worker."""

    def __init__(self) -> None:
        """Raise OSError when there are no descriptors left."""
    @property
    def fd(self) -> int:
        """The descriptor of the set: readable when `poll` has something to do."""
    metrics: Metrics | None
    """Called at the start and end of each round, the clocks of all session metrics; None without metrics."""
    def __len__(self) -> int:
        """Return how many sockets are watched."""
    def watch(self, fd: int) -> Watch:
        """Register a non-blocking socket, once. Raise OSError."""
    def look_for_room(self, watch: Watch) -> None:
        """Request that `is_writable` is set, and `writer` woken, when a full socket is writable. Raise OSError.

        Input that is there is reported again, too.
        """
    def look_again(self, watch: Watch) -> None:
        """Have the next `poll` find what the socket is ready for, such as input that has arrived. Raise OSError."""
    def listen(
        self, fd: int, accepted: Callable[[int, str, int], object], shortage: Callable[[OSError], object]
    ) -> None:
        """Accept the connections of a listening socket in `poll`, up to 64 at a time.

        `accepted` gets what `accept` returns and must not raise. When descriptors run out, the socket is ignored from
        then on and `shortage` gets the error. Raise OSError.
        """
    def ignore(self, fd: int) -> None:
        """Accept no more connections of a listening socket; do nothing for one that is ignored already."""
    def forget(self, watch: Watch) -> None:
        """Remove a socket that is about to be closed."""
    def poll(self) -> int:
        """Handle the sockets that have become ready: take their turns, or wake their tasks.

        Asks the kernel again, for up to a millisecond, until nothing is ready: the tasks that are woken have their turn
        together. Return 0 when nothing is ready, and no socket has more to give.
        """
    def close(self) -> None:
        """Close the set."""

class Socket:
    """A non-blocking socket, perhaps watched by a poller: what `SocketStream` does without waiting."""

    eof_sent: bool
    """The end of the stream was sent: nothing can be sent after it."""
    def __init__(self, fd: int, poller: Poller | None = None) -> None:
        """Take over a non-blocking socket. Raise OSError when it cannot be watched."""
    @property
    def fd(self) -> int:
        """The descriptor; -1 when it is closed."""
    @property
    def poller(self) -> Poller | None:
        """The poller that watches it."""
    @property
    def watch(self) -> Watch | None:
        """Its readiness; None without a poller."""
    def send_nowait(self, data: Buffer, start: int = 0) -> int:
        """Send from `start` on what the socket takes at once. Return how many octets that were, perhaps none.

        Raise BrokenResourceError when the connection is lost, ClosedResourceError when it was closed here.
        """
    def send_and_close_nowait(self, data: bytes) -> int:
        """Send and close: both leave in one packet. Return how many octets were sent; fewer than all: it is open still.

        A lost connection counts as sent: there is no reader.
        """
    def replace(self, fd: int) -> None:
        """Close the socket and go on with another, non-blocking one. Raise OSError when that cannot be watched.

        A task that waits for the turns of the first waits for those of the second. Needs a poller.
        """

    def interrupt(self) -> None:
        """Wake the task that waits for the end of the turns; otherwise do nothing."""
    def close_nowait(self) -> None:
        """Close the socket; a task that waits on it gets ClosedResourceError."""

class Timer:
    """A timer of the kernel, to be watched like a socket: readable once its time has come. It is its own receiver."""

    def __init__(self) -> None:
        """Raise OSError when there are no descriptors left."""
    @property
    def fd(self) -> int:
        """The descriptor, -1 when it was closed."""
    def set(self, at: int) -> None:
        """Set the time (`time.perf_counter_ns`) of the timer; a time in the past fires at once."""
    def recv(self, fd: int, octets: int = ..., /) -> int:
        """Read the timer: 8 if it has fired, -1 if not."""
    def close(self) -> None:
        """Close the descriptor, once the poller has forgotten it."""

def accept(fd: int, /) -> tuple[int, str, int] | None:
    """Accept a connection: descriptor (non-blocking), IP address ("" for a unix socket) and port; None for none."""

def open_connection(address: str, port: int) -> tuple[int, int]:
    """Begin a TCP connection to an IP address. Return the descriptor (non-blocking), and 0 if the connection is made.

    Otherwise the second value is the error code of connect(2), EINPROGRESS if it is being made. Raise OSError.
    """

def now() -> int:
    """Return the clock of `time.perf_counter_ns`."""

def send(fd: int, data: Buffer, start: int = 0) -> int:
    """Send data from `start` on. Return the octets that were taken, -1 when the socket is full. Raise OSError."""

def recv(fd: int, octets: int) -> bytes | None:
    """Receive up to `octets` octets: b"" at the end of the stream, None when there is nothing. Raise OSError."""

def close(fd: int) -> None:
    """Close a descriptor."""

def shutdown(fd: int) -> None:
    """Send the end of the stream. Raise OSError."""
