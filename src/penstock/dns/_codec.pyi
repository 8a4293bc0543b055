"""DNS messages (RFC 1035 4, RFC 6891), the UDP sockets they are exchanged by, and the cache of answers: ext/dns.pyx."""

import socket
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

A = TypeVar("A")
Decoded = tuple[int, bool, bool, bool, str, tuple[Any, ...], int | None]
"""See `decode_response`."""

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

    A failure without a question section is a response as well: the reply to a query that a server cannot parse.
    """

def decode_response(wire: bytes, query: bytes) -> Decoded:
    """Return (rcode, truncated, authentic, recursive, name, records, ttl) of a response to a query.

    `name` is that at the end of the aliases. `ttl` is that of the answer, or of its absence; None when an absence
    came without an SOA and must not be kept (RFC 2308 5). `recursive` is False for a referral to other servers.
    Records: A and AAAA as 4 and 16 octets, TXT as joined octets, PTR, NS and CNAME as names, MX as (preference,
    name), TLSA as (usage, selector, matching type, data), others as octets. Raise MalformedMessageError.
    """

class Cache(Generic[A]):
    """Answers by name and kind; the one that was used the longest time ago is the first to go. Times are in seconds."""

    hits: int
    """Answers that were found."""
    def __init__(
        self,
        answer: type[A],
        clock: Callable[[], float],
        *,
        most: int,
        least: float,
        longest: float,
        negative: float,
        stale: float,
    ) -> None:
        """`answer` is the class of the answers, `penstock.dns.Answer`.

        At most `most` answers are kept: from `least` to `longest`, absences up to `negative`. `stale` is how much
        longer they may serve while no server answers.
        """

    @staticmethod
    def key(name: str, kind: str) -> tuple[str, Any]:
        """Return what a question is found under: the name in lower case without its final dot, and the kind."""

    def find(self, key: tuple[str, str]) -> A | None:
        """Return the answer to a question, None without one that is valid."""

    def get(self, name: str, kind: str) -> A | None:
        """Return the answer to a question, None without one that is valid."""

    def keep(self, key: tuple[str, str], answer: A, seconds: float, stale: float) -> None:
        """Keep an answer for some seconds, and as a stale one for some more."""

    def keep_response(self, key: tuple[str, str], response: Decoded, is_trusted: bool, longest: float) -> A | None:
        """Return the answer in a response, and keep it for `longest` seconds at most.

        None if the response names an alias that has to be asked for. `is_trusted`: the AD bit is believed.
        """

    def stale_answer(self, key: tuple[str, str], seconds: float) -> A | None:
        """Return an expired answer that may serve while no server answers, and serve it for some seconds; or None."""

    def clear(self) -> None:
        """Forget all answers."""

class UdpPool:
    """The connected UDP sockets to one server: each is used by one query at a time, and again by others, at random.

    A socket is replaced after a random number of queries, and closed when its query was not answered.
    """

    open_socket: Callable[[], socket.socket]
    """Called for a new socket, non-blocking and connected."""
    most: int
    """Queries under way; more raise OSError (EMFILE)."""
    @property
    def busy(self) -> set[UdpQuery]:
        """Return the queries that wait for a response."""

    def __init__(self, open_socket: Callable[[], socket.socket], most: int, began: Callable[[], object]) -> None:
        """`began` is called when a query is sent and none was under way."""

    def number(self) -> int:
        """Return a random number for the id of a query."""

    def send(self, name: str, kind: int, edns: bool, deadline: float) -> UdpQuery:
        """Send a query with a random id; return what waits for the response. Raise OSError, ValueError."""

    def expire(self, now: float) -> None:
        """Wake the tasks whose queries are over, with trio.ClosedResourceError."""

    def close(self) -> None:
        """Close the sockets; tasks that wait for a response are woken, and `send` raises OSError."""

class UdpQuery:
    """A query that was sent, and the socket on which its response is waited for: until then, or until it is given up.

    Afterwards the socket belongs to another query, and nothing that is called here has an effect on it.
    """

    @property
    def fd(self) -> int:
        """Return the descriptor to wait for, -1 once it belongs to another query."""

    @property
    def deadline(self) -> float:
        """Return when the query ends, in the clock of trio."""

    @property
    def is_expired(self) -> bool:
        """The query is over."""

    @property
    def is_due(self) -> bool:
        """Return whether `receive` has something to return that need not be waited for, or the query is over."""

    def answer(self, cache: Cache[A], key: tuple[str, Any], is_trusted: bool) -> A | None:
        """Receive, and return what the response answers, kept in a cache as by `Cache.keep_response`.

        None without a response, and for one that does not answer the question; `receive` returns that one, and raises
        the errors.
        """

    def receive(self) -> Decoded | None:
        """Return the response as `decode_response` does, "truncated" if it is unreadable; None until it arrives.

        With a response, the socket is free for other queries. Datagrams that are no response are dropped. Raise
        OSError; `abandon` must follow then.
        """

    def abandon(self) -> None:
        """Give the query up, and close the socket; nothing once the response was received."""
