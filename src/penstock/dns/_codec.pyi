"""DNS messages (RFC 1035 4, RFC 6891): queries are written, responses are read. The source is ext/dns.pyx."""

from typing import Any, Final

MAX_ALIASES: Final[int]
"""Aliases that may lead from one to the next in a response."""
MAX_RECORDS: Final[int]
"""Records of a response, of all sections."""
MAX_PAYLOAD: Final[int]
"""Octets of a response by UDP that a query announces (RFC 6891 6.2.3)."""

NOERROR: Final = 0
FORMERR: Final = 1
SERVFAIL: Final = 2
NXDOMAIN: Final = 3
NOTIMP: Final = 4
REFUSED: Final = 5

class MalformedMessageError(ValueError):
    """A response that breaks the format, or does not belong to the question."""

def encode_query(ident: int, name: str, kind: int, edns: bool = True) -> bytes:
    """Return a recursive query of class IN that asks for the AD bit (RFC 6840 5.7).

    Raise ValueError for a name with an empty label, a label above 63 octets, or above 253 octets in all.
    """

def is_response_to(wire: bytes, query: bytes) -> bool:
    """Say whether a message is a response to a query: its id, its QR bit and its question, in letters of any case.

    A failure without a question section is a response as well: servers that cannot read a query say so like this.
    """

def decode_response(wire: bytes, query: bytes) -> tuple[int, bool, bool, bool, str, tuple[Any, ...], int | None]:
    """Return (rcode, truncated, authentic, recursive, name, records, ttl) of a response to a query.

    `name` is that at the end of the aliases. `ttl` is that of the answer, or of its absence; None when an absence
    came without an SOA and must not be kept (RFC 2308 5). `recursive` is False for a referral to other servers.
    Records: A and AAAA as 4 and 16 octets, TXT as joined octets, PTR, NS and CNAME as names, MX as (preference,
    name), TLSA as (usage, selector, matching type, data), others as octets. Raise MalformedMessageError.
    """
