"""Header fields and the canonical forms of DKIM (RFC 6376 3.4). The source is ext/mailauth.pyx."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from typing_extensions import Buffer

T = TypeVar("T")

class Field:
    """Position of a field in the header."""

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
        """`octets` are the lines of the header, without the empty line after them."""
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

def decode_base64(text: str) -> bytes | None:
    """Return the octets of base64 with blanks in it; None if it is malformed."""

def simple_mailbox(value: bytes) -> str | None:
    """Return the address in a From field of one ASCII mailbox without comments; None if it is anything else."""

def quote(text: str) -> str:
    """Return a value as a token or a quoted string (RFC 8601 2.2); octets that are not printable ASCII become "?".

    At most 320 characters of it are used.
    """

def authentication_results(authserv_id: str, results: Iterable[tuple[str, str, tuple[tuple[str, str], ...]]]) -> bytes:
    """Return the field with its CRLF, folded; "none" if there are no results (RFC 8601 2.2).

    Each result is a method, its result, and properties with their values; those without a value are left out.
    """

def relaxed_field(name: bytes, value: bytes) -> bytes:
    """Return a field in the relaxed form, with its CRLF (RFC 6376 3.4.2); `name` is in lower case already."""

def without_signature(value: bytes) -> bytes:
    """Return the value of a signature field without the value of its first b= (RFC 6376 3.7)."""

class BodyCanonicalizer:
    """The body in its canonical form, handed to a function in pieces of at most 8 KiB."""

    def __init__(self, sink: Callable[[memoryview], object], relaxed: bool, wide: bool = True) -> None:
        """`wide`: use the widest vectors that the processor has; the result is the same without."""

    def feed(self, data: Buffer) -> None:
        """Take the next piece of the body."""

    def finish(self) -> None:
        """Take the end of the body: it ends in one CRLF, and an empty relaxed body is empty (RFC 6376 3.4.3, 3.4.4)."""

def milter_headers(octets: bytes, keeps_blank: bool) -> list[bytes]:
    """Return SMFIC_HEADER of the milter protocol for each field of a header: its name and its value, each ended by NUL.

    Lines of a value are separated by LF, as sendmail has them; `keeps_blank`: it keeps the blank after the colon.
    """

def header_field(name: bytes, value: bytes, has_space: bool) -> bytes | None:
    """Return a field with CRLF; None if the name is none. A value of several lines is folded, whatever they begin with.

    `has_space`: the value has what follows the colon.
    """

def milter_packet(code: bytes, *parts: bytes) -> bytes:
    """Return a packet of the milter protocol: its length, its code of one octet, and its data."""

def milter_text(value: str) -> bytes:
    """Return a string as the milter protocol has it, ended by NUL; those in it are left out."""

def milter_macros(code: bytes, values: Iterable[tuple[str, str]]) -> bytes:
    """Return SMFIC_MACRO for the command that follows; macros without a value are left out, b"" for none."""

def milter_split(octets: bytes, packet: type[T], most: int) -> tuple[list[T], int, int]:
    """Return the packets at the beginning of octets, how many octets they have, and the length of one that is invalid.

    Each packet is made as a `packet`, a named tuple of its code and its data; those about progress (SMFIR_PROGRESS) are
    left out. A length is invalid if it is 0 or above `most`; -1 if all are valid.
    """
