"""What the compiled part of the session shows. The theory stands at the top of ext/session.pyx."""

from collections.abc import Callable
from typing import Any, Final, Self

from penstock.metrics._session import SessionMetrics
from penstock.reply import Reply
from penstock.smtp._wire import Wire
from penstock.smtp.events import Event
from penstock.smtp.extensions import Extensions
from penstock.smtp.states import Rules, State, Table
from penstock.transaction import Transaction

AUTO_ACCEPT_HELLO: Final = 1
"""The driver accepts every Hello."""
AUTO_ACCEPT_MAIL: Final = 2
"""The driver accepts every Mail."""
AUTO_ACCEPT_RCPT: Final = 4
"""The driver accepts every Rcpt."""
AUTO_ACCEPT_QUIT: Final = 8
"""The driver need not hear of a Quit where there is no body to forget."""

SENDS: Final = -1
"""What an observer is called with when what it finds in the out-buffer is about to be sent."""

class SessionCore:
    """The state of a session and its commonest path. What is not plain it leaves to ServerSession."""

    def __init__(self, offer: Extensions, wire: Wire, transaction: Transaction, unasked: int = 0) -> None:
        """`unasked` are the events that are accepted without asking."""
    @property
    def offer(self) -> Extensions:
        """What the session offers."""
    @property
    def wire(self) -> Wire:
        """Its input."""
    @property
    def transaction(self) -> Transaction:
        """What is known so far."""
    commands: int
    """Lines so far, whatever they were: what tells a client that talks from one that drips."""
    errors: int
    """Commands answered with 5yz so far."""
    unknown: int
    """Recipients refused with 5yz so far."""
    last_verb: int
    """The number of the last verb, for the journal."""
    has_quit: bool
    unasked: int
    observer: Callable[[int], None] | None
    """Called with each token of the wire before it is obeyed, and with SENDS before the replies are taken: for who
    wants to tell what was said."""
    watched_prefixes: tuple[str, ...] | None
    """Beginnings of local parts that the driver is asked about, whatever `unasked` says. In ASCII, none empty."""
    metrics: SessionMetrics | None
    """Notes what was answered with what, and when; None notes nothing."""
    _mails: int
    _out: list[bytes]
    _state: State
    _table: Table
    _rules: Rules
    _event: Event | None
    _answered: Callable[[Any, Reply], None] | None
    intercepted_verbs: frozenset[int]
    """The numbers of verbs that are put to the driver as a Command, of `INTERCEPTABLE_VERBS`."""
    _auth_failures: int
    _chunk_is_last: bool
    _chunk_refusal: Reply | None
    def fresh(self, wire: Wire, transaction: Transaction) -> Self:
        """Return a new session that is made like this one, which has not begun yet.

        Its wire is a fresh one of this one's. Costs a fraction of making a session from an offer.
        """
    def greet(self, refusal: Reply | None = None) -> None:
        """Say the greeting of RFC 5321 4.2, or in its place a refusal: 421 or 554, then the session ends."""
    def data_to_send(self) -> bytes:
        """Return the replies made since the last call, and forget them."""
    def next_event(self) -> Event:
        """Return what the client wants next. Raise RuntimeError while an event waits for its answer.

        With NEED_DATA the wire has been put to rest: it holds no more than what it waits for the end of.
        """
    def reply(self, reply: Reply) -> None:
        """Answer the last event; see each event for what its answers mean. Raise RuntimeError without one."""
    def _enter(self, state: State) -> None: ...
    def _emit(self, encoded: bytes) -> None:
        """Send a reply as it is. Every reply passes here."""
    def _say(self, reply: Reply) -> None:
        """Send a reply; end the session when it says so, or when the budget of errors is used up."""
    def _text_begins(self) -> None: ...
    def _answers_unasked(self) -> None: ...
    def _message_taken(self) -> None: ...
    def _end_transaction(self) -> None: ...
    def _mail_answered(self, reply: Reply) -> None: ...
    def _rcpt_answered(self, reply: Reply) -> None: ...
    def _data_answered(self, reply: Reply) -> None: ...
    def _message_answered(self, reply: Reply) -> None: ...
