"""The compiled wire. ext/wire.pyx begins with its theory."""

from collections.abc import Sequence
from typing import Final

from typing_extensions import Buffer

NEED_DATA: Final = 0
"""More octets are needed."""
COMMAND: Final = 1
"""A command line: see `Wire.verb` and `Wire.argument`. After `expect_line`: a line in `argument`."""
LINE_TOO_LONG: Final = 2
"""A command line longer than the limit was dropped."""
LINE_BAD_END: Final = 3
"""A command line ended in a bare LF or contained a bare CR."""
LINE_NUL: Final = 4
"""A command line contained a NUL."""
CHUNK: Final = 5
"""A part of the body: see `Wire.chunk`."""
TEXT_END: Final = 6
"""The end of the data, or of the octets of a BDAT chunk. Commands follow."""
TEXT_BROKEN: Final = 7
"""A refused text has LF . LF, which its sender may consider its end: nothing after it may be executed."""
VIOLATION: Final = 8
"""The text has broken a rule: see `Wire.violation`. Returned once for a text; the chunks so far are void."""

BARE_LF: Final = 2
BARE_CR: Final = 3
NUL: Final = 4
LONG_LINE: Final = 5
TOO_BIG: Final = 6

MAX_BUFFER: Final[int]
"""Maximum unparsed octets of a wire."""
HAS_VECTORS: Final[bool]
"""The scanner was compiled with vector instructions."""
VERBS: Final[tuple[str, ...]]
"""The verbs by number: 0 is an unknown verb, "HTTP" any HTTP method."""

def blocks_in_use() -> int:
    """Return the number of buffers of all wires of the process: 0 if none has unparsed octets."""

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

        `line_limit` includes the CRLF (RFC 5321 4.5.3.1.4), `text_line_limit` does not (4.5.3.1.6, at least 64).
        `max_octets` is the maximum size of a body, 0 for no limit. `reject` and `normalize` list some of "bare_lf",
        "bare_cr", "nul" and "long_line"; those in neither are accepted. `vectors=False` scans octet by octet.
        """

    def fresh(self) -> Wire:
        """Return a new wire with the same settings; cheaper than the constructor."""

    verb: int
    """Index of the last verb in VERBS."""
    argument: bytes
    """The text after the verb, without surrounding white space; for an unknown verb, the whole line."""
    chunk: bytes
    """The last part of the body."""
    violation: int
    """The rule that the text has broken: BARE_LF, BARE_CR, NUL, LONG_LINE, TOO_BIG, or 0."""
    octets: int
    """Octets of the body so far: un-stuffed, without the end of the data (RFC 1870 5)."""
    discard: bool
    """Make no chunks: the body is only counted."""
    @property
    def waiting(self) -> int:
        """Octets that were fed and not consumed."""

    def feed(self, data: Buffer) -> None:
        """Copy octets in. Raise BufferError if more than MAX_BUFFER would be waiting."""

    def recv(self, fd: int, octets: int = 65536) -> int:
        """Receive from a non-blocking socket straight into the buffer.

        Return the octets received, 0 at the end of the stream, -1 if there is nothing to receive. Raise OSError.
        """

    def rest(self) -> None:
        """Release the buffer, or move what waits to a small one. Call this before waiting for the peer."""

    def drop_input(self) -> int:
        """Drop the unparsed input (RFC 3207 4.2). Return how many octets it had."""

    def set_line_limit(self, octets: int) -> None:
        """Set the maximum length of lines from now on."""

    def expect_commands(self) -> None:
        """Read command lines."""

    def expect_line(self) -> None:
        """Read whole lines into `argument`."""

    def expect_text(self) -> None:
        """Read the text after a 354, then commands again."""

    def expect_octets(
        self, octets: int, *, last: bool = True, text: bool = True, first: bool = True, drop: bool = False
    ) -> None:
        """Read the octets of a BDAT chunk, then commands again.

        `text` checks its lines as for DATA; `first` begins a message, otherwise the chunk continues it; `last` ends the
        message; `drop` keeps nothing.
        """

    def next(self) -> int:
        """Return the next token."""
