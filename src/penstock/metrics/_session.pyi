"""Statistics of sessions, compiled; their design is described at the top of ext/metrics.pyx.

The session and the poller call them in C (see _session.pxd).
"""

from collections.abc import Callable
from typing import Any, Final

from penstock.metrics._histogram import Histogram
from penstock.transaction import Transaction

PHASES: Final[tuple[str, ...]]
"""The phases that replies and latencies are counted for.

The verbs, "unknown" for other commands, `message` (from the end of a text to its reply), `text` (from its first octet
to its last), `tls` (a handshake), `think` (the time of the client), `banner`, `unasked` (a 421 without a command).
"""
GARBLED: Final[tuple[str, ...]]
"""The corruptions of replies in a fault plan; `none`: the connection was closed instead."""
TOTALS: Final[tuple[str, ...]]
"""The names of the plain counts of `Metrics`."""
OTHER: Final = "others"
"""The name that causes beyond the limit are counted under."""

class Sequence:
    """The sequence numbers of one run that were received: a bitmap."""

    def __init__(self, run: str) -> None:
        """Start empty."""
    @property
    def run(self) -> str:
        """Name of the run."""
    @property
    def received(self) -> int:
        """Messages of the run, including duplicates."""
    @property
    def distinct(self) -> int:
        """Distinct numbers received."""
    @property
    def duplicates(self) -> int:
        """Messages whose number was received before."""
    @property
    def out_of_order(self) -> int:
        """Messages received after one with a higher number, without duplicates."""
    @property
    def lowest(self) -> int:
        """The lowest number."""
    @property
    def highest(self) -> int:
        """The highest number."""
    @property
    def examples(self) -> list[int]:
        """The first hundred duplicate numbers."""
    def __contains__(self, number: int) -> bool: ...
    def missing(self, first: int, last: int, most: int) -> tuple[int, list[int]]:
        """Return how many numbers from `first` to `last` were not received, and the first `most` of them."""

class SequenceTracker:
    """The runs that were received."""

    def __init__(self) -> None:
        """Start empty."""
    @property
    def runs(self) -> dict[str, Sequence]:
        """The runs by name."""
    @property
    def unmarked(self) -> int:
        """Messages without a tag."""
    @property
    def further(self) -> int:
        """Tags beyond the limits, which are not tracked."""
    @property
    def octets(self) -> int:
        """Octets of the bitmaps."""
    def take_changes(self) -> dict[str, Any]:
        """Return what was noted since the last call, for `add` in another process: values that msgspec can encode.

        Raise RuntimeError unless it belongs to `Metrics` with `shared`: others do not track their changes.
        """
    def add(self, changes: dict[str, Any]) -> None:
        """Add the changes of another process: a tag that both have is a duplicate."""
    def note(self, run: str, number: int) -> bool:
        """Track a tag. Return False if it is beyond the limits."""
    def mark(self, text: str) -> bool:
        """Track the tag at the end of a text, in the syntax of `penstock.sequence.parse`. Return False without one."""

class Metrics:
    """The counts of all sessions of a worker. Takes some 500 KB."""

    def __init__(
        self,
        *,
        source: Callable[[Transaction], tuple[str, int] | None] | None = None,
        reads_marks: bool = True,
        shared: memoryview | None = None,
        sequences: SequenceTracker | None = None,
    ) -> None:
        """`source` returns the tag of an accepted message from its transaction.

        By default it is read from the local part of the sender, in C. If `reads_marks` is false, another component
        adds the tags to `sequences`. `shared` is for one of several processes: two numbers of 64 bits, zero at first,
        in memory that all of them share; they count their open sessions and the peak there. `sequences` are the tags
        that were received so far.
        """
    @property
    def reads_marks(self) -> bool:
        """Tags of accepted messages are read here."""
    @property
    def source(self) -> Callable[[Transaction], tuple[str, int] | None] | None:
        """Returns the tag of a message."""
    @property
    def sequences(self) -> SequenceTracker:
        """The tags that were received."""
    @property
    def recent_messages(self) -> Histogram:
        """Latencies of phase `message` since `forget_recent`."""
    @property
    def recent_replies(self) -> Histogram:
        """Latencies of all replies since then."""
    @property
    def sessions(self) -> int:
        """Connections so far, including refused ones."""
    @property
    def open_sessions(self) -> int:
        """Connections that are open."""
    @property
    def peak_sessions(self) -> int:
        """Maximum number of simultaneous connections, of all processes that share their numbers."""
    @property
    def received(self) -> int:
        """Octets received on closed connections, as read from the socket."""
    @property
    def sent(self) -> int:
        """Octets of replies, before TLS."""
    @property
    def replies(self) -> int:
        """Replies so far."""
    @property
    def accepted(self) -> int:
        """Accepted messages with a readable 2xx reply."""
    @property
    def unheard(self) -> int:
        """Accepted messages whose clients received no readable 2xx reply because of a fault."""
    @property
    def refused(self) -> int:
        """Messages refused after their text, with or without a readable reply; in LMTP one for each recipient."""
    @property
    def recipients(self) -> int:
        """Recipients of accepted messages."""
    @property
    def text_octets(self) -> int:
        """Octets of the bodies of accepted messages, without dot-stuffing."""
    @property
    def tls_failed(self) -> int:
        """Failed TLS handshakes."""
    @property
    def ends(self) -> dict[str, int]:
        """Connections by the cause of their end."""
    @property
    def lost(self) -> dict[str, int]:
        """Lost messages by cause."""
    @property
    def further(self) -> int:
        """Replies of kinds beyond the limit."""
    def reset(self) -> None:
        """Reset all counts. Open sessions remain counted as open."""
    def forget_recent(self) -> None:
        """Reset `recent_messages` and `recent_replies`."""
    def new_session(self) -> SessionMetrics:
        """Count a new connection, and return its metrics. The latency of the banner starts now."""
    def count_refused_connection(self, encoded: bytes) -> None:
        """Count a connection that was refused before it had a session."""
    def latency(self, phase: str) -> Histogram:
        """Return the latencies of a phase. Raise ValueError when there is no such phase."""
    def state(self) -> dict[str, Any]:
        """Return everything that was counted but the tags, for `add` in another process: msgspec can encode it."""
    def add(self, state: dict[str, Any]) -> None:
        """Add what another process has counted. The peak of sessions is the higher one: the processes share theirs."""
    def counted(self) -> list[tuple[str, int, str | None, str | None, int]]:
        """Return phase, code (0: none), enhanced status, corruption and count of every kind of reply."""

class SessionMetrics:
    """The latencies and counts of one session. Made by `Metrics.new_session`."""

    @property
    def totals(self) -> Metrics:
        """The metrics that it adds to."""
    phase: int
    """Index in PHASES of the command that is being answered."""
    def suspend(self) -> None:
        """Count no replies until `count_replies`: a fault replaces them."""
    def count_replies(self, replies: list[tuple[bytes, str | None]]) -> None:
        """Count the replies that are sent in place of those since `suspend`.

        Each has its corruption (one of GARBLED, None if intact); an empty one is a reply without a code. A message that
        was accepted since `suspend` counts as accepted if one of the replies is a readable 2xx.
        """
    def before_sending(self, octets: int) -> None:
        """Note that the replies of `count_replies` are about to be sent."""
    def uncount(self, encoded: bytes) -> None:
        """Undo the count of a reply. To be called before its output is taken from the session."""
    def begin_tls(self) -> None:
        """A handshake begins."""
    def end_tls(self) -> None:
        """A handshake has ended."""
    def pause_text(self) -> None:
        """Have a wait in the midst of a text counted as its own, or as that of the octets that are there."""
    def expect_refusal(self) -> None:
        """Count the next refusal as that of a message, or the message as lost if the connection ends before."""
    def lose_message(self, cause: str) -> None:
        """Count a message whose text has begun and will not end."""
    def ended(self, cause: str, received: int) -> None:
        """Count the end of the connection and the octets received. Further calls do nothing."""
