"""Header fields and the canonical forms of DKIM (RFC 6376 3.4). The source is ext/mailauth.pyx."""

from collections.abc import Callable

from typing_extensions import Buffer

def split_header(header: bytes) -> list[tuple[bytes, int, int, int]]:
    """Return (name in lower case, start, colon, stop) of each field; a line without a colon is a field without name."""

def relaxed_field(name: bytes, value: bytes) -> bytes:
    """Return a field in the relaxed form, with its CRLF (RFC 6376 3.4.2); `name` is in lower case already."""

def without_signature(value: bytes) -> bytes:
    """Return the value of a signature field without the value of its first b= (RFC 6376 3.7)."""

class BodyCanonicalizer:
    """The body in its canonical form, handed to a function in pieces of at most 8 KiB."""

    def __init__(self, sink: Callable[[memoryview], object], relaxed: bool) -> None: ...
    def feed(self, data: Buffer) -> None:
        """Take the next piece of the body."""

    def finish(self) -> None:
        """Take the end of the body: it ends in one CRLF, and an empty relaxed body is empty (RFC 6376 3.4.3, 3.4.4)."""
