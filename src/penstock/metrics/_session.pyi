"""What the compiled totals shows. The theory stands at the top of ext/totals.pyx.

The session and the poller call a totals in C (see _session.pxd): `SessionCore.session`, `Poller.totals`.
"""

from collections.abc import Callable
from typing import Any, Final

from penstock.metrics._histogram import Histogram
from penstock.transaction import Transaction

PHASES: Final[tuple[str, ...]]
"""What replies are counted and clocks are read for.

The verbs, "unknown" for what is none; and `message` (what follows the end of a text), `text` (its first octet to its
last), `tls` (a handshake), `think` (the client's own time), `banner`, `unasked` (a 421 that answers nothing).
"""
GARBLED: Final[tuple[str, ...]]
"""How a reply may go out wrong: a dress of a fault plan, or `none`, the end of the connection in its place."""
TOTALS: Final[tuple[str, ...]]
"""The plain counts of `Metrics`, by their names."""
OTHER: Final = "others"
"""What causes of further kinds are counted as."""

class Sequence:
    """The marks of one run that have arrived: a bitmap."""

    def __init__(self, run: str) -> None:
        """Know of none."""
    @property
    def run(self) -> str:
        """What the run is called."""
    @property
    def received(self) -> int:
        """Messages of the run, duplicates among them."""
    @property
    def distinct(self) -> int:
        """Numbers that have come at least once."""
    @property
    def duplicates(self) -> int:
        """Messages whose number had come before."""
    @property
    def out_of_order(self) -> int:
        """Messages that came behind one with a higher number, and were no duplicates."""
    @property
    def lowest(self) -> int:
        """The lowest number."""
    @property
    def highest(self) -> int:
        """The highest number."""
    @property
    def examples(self) -> list[int]:
        """The first hundred numbers that came again."""
    def __contains__(self, number: int) -> bool: ...
    def state(self) -> dict[str, Any]:
        """Return everything, the bitmap as octets."""
    def missing(self, first: int, last: int, most: int) -> tuple[int, list[int]]:
        """Return how many numbers from `first` to `last` have not come, and the first `most` of them."""

class SequenceTracker:
    """The runs that have arrived."""

    def __init__(self) -> None:
        """Know of none."""
    @property
    def runs(self) -> dict[str, Sequence]:
        """By their names."""
    @property
    def unmarked(self) -> int:
        """Messages without a mark."""
    @property
    def further(self) -> int:
        """Marks that there was no room to tell apart."""
    @property
    def octets(self) -> int:
        """What the bitmaps take."""
    def state(self) -> dict[str, Any]:
        """Return everything, for `add` in another process."""
    def add(self, state: dict[str, Any]) -> None:
        """Add what another process has tracked: a tag that both have is a duplicate."""
    def note(self, run: str, number: int) -> bool:
        """Take a mark. Return False when there is no room to tell it apart."""
    def mark(self, text: str) -> bool:
        """Take the mark at the end of a text, as `penstock.sequence.parse` reads it. Return False without one."""

class Metrics:
    """The counts of all sessions of a worker. Takes some 500 KB."""

    def __init__(
        self, *, source: Callable[[Transaction], tuple[str, int] | None] | None = None, reads_marks: bool = True
    ) -> None:
        """Count nothing yet. `source` finds the mark of an accepted message in its transaction.

        Without one it is the sender's local part, which is read in C. Where `reads_marks` is false, another component
        takes the marks to `sequences`.
        """
    @property
    def reads_marks(self) -> bool:
        """The marks of accepted messages are looked for here."""
    @property
    def source(self) -> Callable[[Transaction], tuple[str, int] | None] | None:
        """What finds the mark of a message."""
    @property
    def sequences(self) -> SequenceTracker:
        """The marks that have arrived."""
    @property
    def recent_messages(self) -> Histogram:
        """Latencies of phase `message` since `forget_recent`."""
    @property
    def recent_replies(self) -> Histogram:
        """Latencies of all replies since then."""
    @property
    def sessions(self) -> int:
        """Connections so far, those that were turned away among them."""
    @property
    def open_sessions(self) -> int:
        """Connections that are open."""
    @property
    def peak_sessions(self) -> int:
        """The most that were open at a time."""
    @property
    def received(self) -> int:
        """Octets that closed connections have sent us, as they came from the socket."""
    @property
    def sent(self) -> int:
        """Octets of replies, before TLS."""
    @property
    def replies(self) -> int:
        """Replies so far."""
    @property
    def accepted(self) -> int:
        """Messages that were taken, and whose clients could read a 2yz."""
    @property
    def unheard(self) -> int:
        """Messages that were taken, and whose clients could not: a fault stood in the place of the 2yz."""
    @property
    def refused(self) -> int:
        """Refusals of messages after their text, whatever the client heard of them; in LMTP one a recipient."""
    @property
    def recipients(self) -> int:
        """Recipients of messages that were taken."""
    @property
    def text_octets(self) -> int:
        """Octets of the bodies of messages that were taken, un-stuffed."""
    @property
    def tls_failed(self) -> int:
        """Handshakes that came to nothing."""
    @property
    def ends(self) -> dict[str, int]:
        """Why connections ended, and how many."""
    @property
    def lost(self) -> dict[str, int]:
        """Why messages ended that had begun, and how many."""
    @property
    def further(self) -> int:
        """Replies of further kinds than there is room for."""
    def reset(self) -> None:
        """Start over. Sessions that are open stay counted as open."""
    def forget_recent(self) -> None:
        """Start `recent_messages` and `recent_replies` over."""
    def new_session(self) -> SessionMetrics:
        """Count a connection in, and return what notes its clocks. The banner's clock starts now."""
    def turned_away(self, encoded: bytes) -> None:
        """Count a connection that was refused before it had a session."""
    def latency(self, phase: str) -> Histogram:
        """Return the latencies of a phase. Raise ValueError when there is no such phase."""
    def state(self) -> dict[str, Any]:
        """Return everything that was counted, for `add` in another process: values that msgspec can encode."""
    def add(self, state: dict[str, Any]) -> None:
        """Add what another process has counted.

        Exact, but for `peak_sessions`: the peaks are added, whether or not they were at the same time.
        """

    def counted(self) -> list[tuple[str, int, str | None, str | None, int]]:
        """Return phase, code (0 for what has none), enhanced status, garbling and count of every kind of reply."""

class SessionMetrics:
    """The clocks of one session. Made by `Metrics.session`."""

    @property
    def totals(self) -> Metrics:
        """Where it counts."""
    phase: int
    """The place in PHASES of what is being answered."""
    def hold(self) -> None:
        """Count no replies until `says`: the client will hear something else."""
    def says(self, replies: list[tuple[bytes, str | None]]) -> None:
        """Count what the client hears in the place of the replies since `hold`, as far as it can read it.

        Each has what it is of GARBLED, None when nothing is wrong; an empty one is a reply without a code. What was
        taken meanwhile is accepted when one of them is a 2yz.
        """
    def sends(self, octets: int) -> None:
        """Note that what `says` was told is about to be sent."""
    def takes_back(self, encoded: bytes) -> None:
        """Count a reply to what is being answered out again. To be called before it is taken from the session."""
    def takes_unheard(self, transaction: Transaction, octets: int) -> None:
        """Count a message that was taken when its client had left."""
    def tls_begins(self) -> None:
        """A handshake begins."""
    def tls_begun(self) -> None:
        """It has come to its end."""
    def pauses_text(self) -> None:
        """Have a wait in the midst of a text counted as its own, or as that of the octets that are there."""
    def dooms(self) -> None:
        """Have the next refusal counted as that of a message; as lost, if the connection ends before there is one."""
    def loses(self, cause: str) -> None:
        """Count a message that had begun and will not end."""
    def ended(self, cause: str, received: int) -> None:
        """Count the end of the connection and the octets it has sent. Does nothing the second time."""
