"""What the compiled wire shows. The theory stands at the top of ext/wire.pyx."""

from collections.abc import Sequence
from typing import Final

from typing_extensions import Buffer

NEED_DATA: Final = 0
"""Nothing can be decided before more octets come."""
COMMAND: Final = 1
"""A command line: see `Wire.verb` and `Wire.argument`. In the mode of `expect_line`, a line in `argument`."""
LINE_TOO_LONG: Final = 2
"""A command line beyond the limit was dropped up to its end."""
LINE_BAD_END: Final = 3
"""A command line ended in a bare LF, or held a bare CR."""
LINE_NUL: Final = 4
"""A command line held a NUL."""
CHUNK: Final = 5
"""A piece of the body: see `Wire.chunk`."""
TEXT_END: Final = 6
"""The end of the data, or of the octets of a BDAT chunk. Commands follow."""
TEXT_BROKEN: Final = 7
"""A refused text came to an end that only the sender believes in (LF . LF): nothing behind it may be obeyed."""
VIOLATION: Final = 8
"""The text has broken a rule, for the first time: see `Wire.violation`. What was got of it is void."""

BARE_LF: Final = 2
BARE_CR: Final = 3
NUL: Final = 4
LONG_LINE: Final = 5
TOO_BIG: Final = 6

MAX_BUFFER: Final[int]
"""Octets a wire holds at most."""
HAS_VECTORS: Final[bool]
"""The scanner was compiled with vector instructions."""
VERBS: Final[tuple[str, ...]]
"""The verbs by number; 0 is an unknown one, "HTTP" any method of HTTP."""

def blocks_in_use() -> int:
    """Return how many buffers all wires of the process hold: 0 when none has octets waiting."""

class Wire:
    """The reading side of one connection: octets in, tokens out."""

    def __init__(
        self,
        *,
        line_limit: int = 2048,
        text_line_limit: int = 998,
        max_octets: int = 0,
        reject: Sequence[str] = ("bare_lf", "bare_cr", "nul", "long_line"),
        normalize: Sequence[str] = (),
        vectors: bool = True,
    ) -> None:
        """Make a wire that waits for commands.

        `line_limit` counts the CRLF (RFC 5321 4.5.3.1.4), `text_line_limit` does not (4.5.3.1.6, at least 64).
        `max_octets` bounds a body, 0 is no bound. `reject` and `normalize` name what to do about "bare_lf", "bare_cr",
        "nul" and "long_line" in a text; what neither names is let through. `vectors=False` scans octet by octet.
        """

    def fresh(self) -> Wire:
        """Return a new wire with the settings of this one: cheaper than reading them again."""

    verb: int
    """The place of the last verb in VERBS."""
    argument: bytes
    """What follows the verb, without the white space around it; after an unknown verb, the whole line."""
    chunk: bytes
    """The last piece of the body."""
    violation: int
    """What is wrong with the text: BARE_LF, BARE_CR, NUL, LONG_LINE, TOO_BIG, or 0."""
    octets: int
    """Octets of the body so far: un-stuffed, without the end of the data (RFC 1870 5)."""
    discard: bool
    """Make no chunks: the body is only counted."""
    @property
    def waiting(self) -> int:
        """Octets that were fed and not yet looked at, or only in vain."""

    def feed(self, data: Buffer) -> None:
        """Copy octets in. Raise BufferError when more than MAX_BUFFER would wait."""

    def recv(self, fd: int, octets: int = 65536) -> int:
        """Receive from a non-blocking socket straight into the buffer.

        Return the octets received, 0 at the end of the stream, -1 when there is nothing to receive. Raise OSError.
        """

    def rest(self) -> None:
        """Give the buffer back, but for what waits in it: call this before waiting for the peer."""

    def drop_input(self) -> int:
        """Forget what was fed and not looked at (RFC 3207 4.2). Return how many octets that were."""

    def set_line_limit(self, octets: int) -> None:
        """Bound the lines from now on."""

    def expect_commands(self) -> None:
        """Read command lines."""

    def expect_line(self) -> None:
        """Read lines as they are, into `argument`."""

    def expect_text(self) -> None:
        """Read the text behind a 354, then commands again."""

    def expect_octets(
        self, octets: int, *, last: bool = True, text: bool = True, first: bool = True, drop: bool = False
    ) -> None:
        """Read the octets of a BDAT chunk, then commands again.

        `text` looks at its lines as DATA would; `first` begins a message, otherwise the last chunk is continued;
        `last` ends it; `drop` keeps nothing.
        """

    def next(self) -> int:
        """Return the next token."""
