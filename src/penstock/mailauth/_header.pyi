"""Header fields and the canonical forms of DKIM (RFC 6376 3.4). The source is ext/mailauth.pyx."""

from collections.abc import Callable

from typing_extensions import Buffer

class Field:
    """Where a field stands in the header."""

    @property
    def name(self) -> bytes:
        """In lower case; empty for a line without a colon."""
    @property
    def start(self) -> int:
        """Where it begins."""
    @property
    def colon(self) -> int:
        """Where its colon is; `start` without one."""
    @property
    def stop(self) -> int:
        """Behind its last line end."""

class Header:
    """A header, split once and read by all checks."""

    def __init__(self, octets: bytes) -> None:
        """`octets` are the lines of the header, without the empty line behind them."""
    @property
    def octets(self) -> bytes:
        """The lines."""
    @property
    def fields(self) -> list[Field]:
        """All fields, from top to bottom."""
    @property
    def by_name(self) -> dict[bytes, list[Field]]:
        """The fields of a name, from top to bottom."""
    def value(self, field: Field) -> bytes:
        """Return what follows the colon, without the last line end."""
    def raw(self, field: Field) -> bytes:
        """Return the whole field without its last line end."""
    def relaxed(self, field: Field) -> bytes:
        """Return the field in the relaxed form, with CRLF (RFC 6376 3.4.2)."""
    def select(self, names: list[bytes]) -> list[Field]:
        """Return the fields that a list of names means: those of a name from the bottom up (RFC 6376 5.4.2)."""
    def signed(self, names: list[bytes], own: Field, relaxed: bool) -> bytes:
        """Return what a signature field signs: the fields that it names, then itself without b= (RFC 6376 3.7)."""
    def own(self, field: Field, relaxed: bool) -> bytes:
        """Return a signature field without the value of its b=, and without its last line end (RFC 6376 3.7)."""

def split_tags(value: bytes) -> dict[str, str] | None:
    """Return a tag list (RFC 6376 3.2) as a dict; None for a malformed one. Values are stripped, and not unfolded."""

def squeeze(text: str) -> str:
    """Return a text without blanks and folds; the same object if it has none."""

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
