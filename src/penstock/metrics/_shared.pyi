"""Counters and limits in shared memory of all processes of a server; see the top of ext/shared.pyx.

Kinds of series: "c" a counter, "g" a gauge; histograms of "s" nanoseconds, "o" octets, "n" numbers. Kinds of keys in
the table: any letter but "n" (connections of networks) and "r" (rates), as its number.
"""

from collections.abc import Callable
from typing import Final

from typing_extensions import Buffer

from penstock.metrics._session import Metrics, SessionMetrics

BUCKETS: Final = 48
"""Buckets of a histogram, two for each octave."""

FIRST_OCTAVE: Final[dict[str, int]]
"""By kind of a histogram: the power of two (nanoseconds, octets, a number) below which all values share a bucket."""

def segment_octets(pages: int) -> int:
    """Return the size of a segment. Raise ValueError if it cannot have as many pages."""

def bucket_bounds(kind: str) -> list[int]:
    """Return the least value above each bucket of a histogram, except for the last bucket, which has no bound."""

class Segment:
    """The memory that all processes of a server share."""

    def __init__(self, buffer: Buffer, count: int = 0, key: bytes = b"") -> None:
        """Use a segment in a buffer; with `count` pages and a `key` of 16 octets, make it first. Raise ValueError."""
    count: int
    """Pages it has."""
    def page(self, index: int) -> Page:
        """Return a page. Raise ValueError without one of this number."""
    @property
    def in_use(self) -> list[int]:
        """The pages of workers that are alive, or have not been freed yet."""
    def claim(self) -> int:
        """Return a page that no worker has, for one that is about to start. Raise ValueError without one."""
    def free(self, index: int) -> None:
        """Take back the page of a worker that has ended, with all that it had open."""
    @property
    def open(self) -> int:
        """Connections that all workers have open."""

class Page:
    """What one worker counts. Everything but `receive`, `release` and what is read belongs to that worker."""

    def __init__(self, segment: Segment, index: int) -> None:
        """Use `Segment.page`."""
    segment: Segment
    index: int
    overflow: int
    """Series for which there was no cell."""
    def start(self, pid: int) -> None:
        """Reset: no series, nothing in the mailbox. `pid` is the process that writes the page."""
    @property
    def pid(self) -> int:
        """The process that writes the page."""
    def register(self, kind: str, name: str) -> int:
        """Return the cell of a series, the same one for the same series."""
    def add(self, cell: int, n: int = 1) -> None:
        """Add to a cell."""
    def put(self, cell: int, value: int) -> None:
        """Set a gauge."""
    def get(self, cell: int) -> int:
        """Return the value of a cell."""
    def observe(self, cell: int, first: int, value: int) -> None:
        """Add a value to a histogram whose first bucket is the octave `first` (see FIRST_OCTAVE)."""
    def series(self) -> list[tuple[str, str, int | list[int]]]:
        """Return kind, name and value of all series; a histogram has the counts of its buckets, then the sum."""
    def beat(self) -> None:
        """Give a sign of life."""
    @property
    def silence(self) -> float:
        """Seconds since the last sign of life; 0 before the first."""
    def send(self, text: bytes) -> bool:
        """Put a text into the mailbox. Return False if it is too long, or the last one was not taken yet."""
    def receive(self) -> bytes:
        """Take the text out of the mailbox; b"" without one."""
    def release(self) -> None:
        """Take out all that a worker had open which has ended. What it counted lately still counts for limits."""

class SharedTable:
    """Counts by key of all workers together; this process writes its own page. `now` is `time.monotonic()`."""

    def __init__(self, page: Page) -> None:
        """Count in this page."""
    def enter(self, key: str, most: int, rate: float, now: float) -> int:
        """Count a connection in and return 0; 1 if `most` are open, 2 if there were `rate` in the last minute."""
    def leave(self, key: str) -> None:
        """Count a connection out."""
    @property
    def total(self) -> int:
        """Connections that all workers have open."""
    def count_total(self, n: int) -> None:
        """Add to the connections of this worker."""
    def opened(self, kind: int, key: str) -> int:
        """Return how many things of a key all workers have open."""
    def open_more(self, kind: int, key: str, n: int, now: float) -> None:
        """Count `n` things of a key in, or out if negative."""
    def count(self, kind: int, key: str, seconds: float, now: float) -> float:
        """Return how many events a key has had in the last `seconds`."""
    def happen(self, kind: int, key: str, n: int, seconds: float, now: float) -> None:
        """Count `n` events of a key, or take them back if negative."""
    def forget(self, kind: int, key: str, seconds: float, now: float) -> None:
        """Make the sum of all events of a key 0."""
    def available(self, key: str, rate: float, burst: float) -> float:
        """Return how many things the bucket of a key, filled with `rate` per second, would give now."""
    def take(self, key: str, rate: float, burst: float) -> bool:
        """Take one thing out of the bucket of a key. Return False if it is empty."""

class SessionTotals(Metrics):
    """What the sessions of a worker count in its page: a few additions for each reply."""

    def __init__(self, page: Page, code_cell: Callable[[int], int], verb_cell: Callable[[str, int], int]) -> None:
        """`code_cell(code)` and `verb_cell(verb, class)` return the cells of replies_total and commands_total."""
    page: Page

class ListenerTotals:
    """What the sessions of one listener count."""

    def __init__(
        self,
        totals: SessionTotals,
        sessions: int,
        accepted: int,
        end_cell: Callable[[str], int],
        refused: Callable[[str, bytes], None],
    ) -> None:
        """`sessions` and `accepted` are the cells of the open connections and of the accepted messages.

        `end_cell(cause)` returns the cell of an end; `refused(phase, reply)` is called for each refused message (phase
        "message"), recipient ("rcpt"), and handshake that failed ("tls", without a reply).
        """
    totals: SessionTotals
    def new_session(self) -> CountedSession:
        """Count a connection in, and return what notes its replies."""
    def count_refused_connection(self, encoded: bytes) -> None:
        """Count a connection that was refused before it had a session."""

class CountedSession(SessionMetrics):
    """One session of a server."""

    def begin_tls(self) -> None:
        """A handshake begins."""
    def end_tls(self) -> None:
        """It has come to its end."""
    def expect_refusal(self) -> None:
        """The message under way will be refused."""
    def lose_message(self, cause: str) -> None:
        """A message that had begun will not end."""
    def pause_text(self) -> None:
        """The client is not read for a while."""
    def ended(self, cause: str, received: int) -> None:
        """Count the connection out. Does nothing the second time."""
