"""A fault plan: TOML with rules of when a sink misbehaves, and how.

    seed = 7

    [[rule]]
    name = "busy"
    phase = "rcpt"
    match = { recipient = ["*@slow.example"], probability = 0.2 }
    delay = { uniform = [0.5, 2.0] }
    reply = "450 4.2.1 Mailbox busy, try again later"

The classes below are the whole reference: `penstock sink --describe-faults` prints it. How rules go together, and what
of it is the same again with the same seed, is told by penstock.sink.faults.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

from penstock import schema
from penstock.addresses import parse_network
from penstock.reply import Reply
from penstock.schema import Meta, SchemaError, Struct

Phase = Literal[
    "connect",
    "banner",
    "ehlo",
    "helo",
    "starttls",
    "auth",
    "mail",
    "rcpt",
    "data",
    "body",
    "dot",
    "rset",
    "noop",
    "vrfy",
    "expn",
    "help",
    "quit",
]
PHASES: Final[tuple[Phase, ...]] = get_args(Phase)
_OF_A_MESSAGE: Final = frozenset({"mail", "rcpt", "data", "body", "dot"})
"""Phases in which there is a sender."""
_OF_RECIPIENTS: Final = _OF_A_MESSAGE - {"mail"}
"""Phases in which there is a recipient."""
_TLS_PHASES: Final = frozenset({"connect", "starttls"})
_REPLY: Final = re.compile(r"([2-5][0-9]{2})(?: ([245]\.[0-9]{1,3}\.[0-9]{1,3}))?(?: (.*))?\Z", re.DOTALL)
_LONGEST: Final = 86_400.0
_Seconds = Annotated[float, Meta(ge=0, le=_LONGEST)]

TlsFault = Literal["refuse", "wrong-name", "expired", "alert", "stall", "plaintext", "tls-1.2"]
Ending = Literal["drop", "reset", "half-close", "stall"]
Dress = Literal["wrong-code", "too-long", "many-lines", "unfinished", "non-ascii", "bare-lf", "no-line-end", "garbage"]
Per = Literal["address", "sender", "sender-domain", "recipient", "recipient-domain", "everybody"]


def reply_of(text: str) -> Reply:
    """Read "450 4.2.2 Mailbox full"; the status and the text may be left out. 421 ends the connection.

    Raise ValueError when the text has no such form.
    """
    found = _REPLY.match(text)
    if found is None:
        raise ValueError(f'a reply looks like "450 4.2.2 Mailbox full", "450 Busy" or "450", not {text!r}')
    code, status, words = int(found[1]), found[2], found[3]
    if status is None and code not in _WITHOUT_STATUS:
        status = f"{code // 100}.0.0"
    return Reply(code, status, words or _WORDS.get(code, "A fault that was asked for"), closes=code == 421)


_WITHOUT_STATUS: Final = frozenset({220, 334, 354})
_WORDS: Final = {
    220: "Ready",
    250: "Ok",
    354: "End data with <CR><LF>.<CR><LF>",
    421: "Service not available, closing",
    450: "Mailbox unavailable, please try again later",
    451: "Temporary failure, please try again later",
    452: "Insufficient system storage, please try again later",
    454: "Temporary failure, please try again later",
    550: "Mailbox unavailable",
    552: "Mailbox full",
    554: "Transaction failed",
}


class MatchSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whom and when a rule is for. All keys that are given have to hold; none is always."""

    network: Annotated[tuple[str, ...], Meta(description="The client's address is in one of these networks")] = ()
    hello: Annotated[
        tuple[str, ...], Meta(description="The client's EHLO name is like one of these, * is any text")
    ] = ()
    sender: Annotated[
        tuple[str, ...], Meta(description='The sender is like one of these ("" is the null sender); from phase mail on')
    ] = ()
    recipient: Annotated[tuple[str, ...], Meta(description="A recipient is like one of these; from phase rcpt on")] = ()
    tls: Annotated[bool | None, Meta(description="Only inside (true) or outside (false) of TLS")] = None
    sequence: Annotated[
        tuple[int, int] | None,
        Meta(description="First and last number of the messages, where [identity] finds their numbers"),
    ] = None
    every: Annotated[int, Meta(ge=1, description="One in so many; exactly every k-th where there is a number")] = 1
    probability: Annotated[float, Meta(ge=0, le=1, description="From the seed, not from chance")] = 1.0
    attempts: Annotated[
        int, Meta(ge=0, description="Only the first attempts of the same message, 1 is its first; 0 is all")
    ] = 0
    first: Annotated[
        int, Meta(ge=0, description="Only the first so many that all of the above holds for; 0 is all. By arrival")
    ] = 0
    after: Annotated[
        int, Meta(ge=0, description="Not for the first so many that all of the above holds for. By arrival")
    ] = 0
    since: Annotated[float, Meta(ge=0, description="Seconds since the plan's start. By the clock")] = 0.0
    until: Annotated[float, Meta(ge=0, description="Seconds since the plan's start; 0 is for ever. By the clock")] = 0.0

    def __post_init__(self) -> None:
        for network in self.network:
            parse_network(network)
        if self.until and self.until <= self.since:
            raise ValueError("until is later than since")
        if self.sequence is not None and self.sequence[0] > self.sequence[1]:
            raise ValueError("sequence is [first, last]")


class OutageSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A condition: out of order for a while, again and again. By the clock."""

    down: Annotated[float, Meta(gt=0, le=_LONGEST, description="Seconds it lasts")]
    every: Annotated[float, Meta(gt=0, le=_LONGEST, description="Seconds from one beginning to the next")]
    begin: Annotated[float, Meta(ge=0, le=_LONGEST, description="Seconds from the plan's start to the first one")] = 0.0

    def __post_init__(self) -> None:
        if self.down > self.every:
            raise ValueError("down is at most every")


class RateSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A condition: a bucket of tokens is empty. Each that it is asked about takes one. By the clock."""

    per: Annotated[Per, Meta(description="Whose bucket it is")] = "address"
    count: Annotated[float, Meta(gt=0, description="Tokens that come into the bucket")]
    seconds: Annotated[float, Meta(gt=0, le=_LONGEST, description="within so many seconds")] = 1.0
    burst: Annotated[
        float, Meta(ge=0, description="Tokens it holds at most, and at first; 0 is as many as count, at least 1")
    ] = 0.0


class GreylistSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A condition: this address, this sender and a recipient were not seen before, or too short ago. By the clock."""

    wait: Annotated[float, Meta(ge=0, le=_LONGEST, description="Seconds until the triplet is let through")] = 60.0
    forget: Annotated[float, Meta(gt=0, le=_LONGEST, description="Seconds after which it is new again")] = 14_400.0


class MailboxSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A condition: a mailbox is full of what was let through at the dot. By arrival; for phases rcpt and dot."""

    per: Annotated[
        Literal["recipient", "recipient-domain"], Meta(description="Who has a mailbox: each address, or each domain")
    ] = "recipient-domain"
    octets: Annotated[int, Meta(ge=0, description="Octets it holds; 0 is any number")] = 0
    messages: Annotated[int, Meta(ge=0, description="Messages it holds; 0 is any number")] = 0

    def __post_init__(self) -> None:
        if not self.octets and not self.messages:
            raise ValueError("a mailbox needs octets or messages")


class DelaySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the client waits. One of the first four keys; what is drawn comes from the seed."""

    seconds: Annotated[_Seconds | None, Meta(description="Always as long")] = None
    uniform: Annotated[tuple[float, float] | None, Meta(description="Between two numbers of seconds")] = None
    exponential: Annotated[_Seconds | None, Meta(description="Exponential, with this mean")] = None
    percentiles: Annotated[
        tuple[tuple[float, float], ...] | None,
        Meta(description="[[50, 0.1], [90, 1.5], [99, 10]]: percentile and seconds, straight lines between them"),
    ] = None
    odds: Annotated[
        int, Meta(ge=0, le=99, description="Times as often as a die of 0 to 99 is cast up to this or more; 0 is once")
    ] = 0
    longest: Annotated[float, Meta(gt=0, le=_LONGEST, description="Seconds it is at most")] = 3600.0

    def __post_init__(self) -> None:
        kinds = (self.seconds, self.uniform, self.exponential, self.percentiles)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("a delay has one of seconds, uniform, exponential, percentiles")
        if self.uniform is not None and not 0 <= self.uniform[0] <= self.uniform[1] <= _LONGEST:
            raise ValueError("uniform is [least, most], in seconds")
        if self.percentiles is not None:
            _check_percentiles(self.percentiles)


def _check_percentiles(table: tuple[tuple[float, float], ...]) -> None:
    ranks, seconds = [rank for rank, _ in table], [second for _, second in table]
    if not table or ranks != sorted(set(ranks)) or not 0 <= ranks[0] <= ranks[-1] <= 100:
        raise ValueError("percentiles are 0 to 100, each greater than the one before")
    if seconds != sorted(seconds) or not 0 <= seconds[0] <= seconds[-1] <= _LONGEST:
        raise ValueError(f"the seconds of percentiles are 0 to {_LONGEST:g}, none less than the one before")


class RuleSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rule: a phase, conditions, and what is done when all of them hold.

    `reply`, `dress`, `end` and `tls` are verdicts: the first rule of a phase that has one is the last that is looked
    at. `delay`, `read_rate`, `write_rate` and `split` leave the matter to the rules behind.
    """

    name: Annotated[str, Meta(max_length=64, description="What receipts call it; phase and number when empty")] = ""
    phase: Annotated[
        Phase,
        Meta(
            description="What the client has just done: connect (before anything), banner, ehlo (and LHLO), helo, "
            "starttls, auth, mail, rcpt, data (and the first BDAT, which has no reply of its own to be dressed), body, "
            "dot (the end of the text), rset, noop, vrfy, expn, help, quit"
        ),
    ]
    at: Annotated[int, Meta(ge=0, description="Octet of the body; 0 is right behind the 354. For phase body")] = 0
    reply: Annotated[
        str,
        Meta(
            description='"450 4.2.2 Mailbox full": said in the place of the ordinary reply; a 4yz or 5yz refuses. 421 '
            "ends the connection, and so does every reply in the midst of a body"
        ),
    ] = ""
    dress: Annotated[
        Dress | None,
        Meta(
            description="The reply, ordinary or not, goes out wrong: wrong-code (a code out of place), too-long (2,000 "
            "octets), many-lines (1,000 lines), unfinished (its last line never comes), non-ascii (Latin-1, and UTF-8 "
            "cut in the middle), bare-lf, no-line-end, garbage (octets from the seed)"
        ),
    ] = None
    end: Annotated[
        Ending | None,
        Meta(
            description="The end of the connection, behind the reply if there is one: drop (close), reset (RST), "
            "half-close (FIN, and what still comes is read), stall (silence, until longest_stall)"
        ),
    ] = None
    tls: Annotated[
        TlsFault | None,
        Meta(
            description="For phase starttls, or connect where TLS is implicit: refuse (454), wrong-name, expired, "
            "alert (a fatal one behind the handshake), stall (in the handshake), plaintext (a reply in its place), "
            "tls-1.2 (nothing newer)"
        ),
    ] = None
    keeps: Annotated[
        bool,
        Meta(description="The message counts as taken, although its client hears otherwise; for phase dot (RFC 1047)"),
    ] = False
    delay: Annotated[DelaySettings | None, Meta(description="Before all else; delays of several rules add up")] = None
    read_rate: Annotated[int, Meta(ge=0, description="Octets a second read from now on; 0 is no limit")] = 0
    write_rate: Annotated[int, Meta(ge=0, description="Octets a second sent from now on; 0 is no limit")] = 0
    split: Annotated[bool, Meta(description="Each octet is sent for itself from now on")] = False
    match: MatchSettings = MatchSettings()
    outage: Annotated[OutageSettings | None, Meta(description="Without a verdict: 421 4.3.2")] = None
    rate: Annotated[RateSettings | None, Meta(description="Without a verdict: 421 4.7.0")] = None
    greylist: Annotated[GreylistSettings | None, Meta(description="Without a verdict: 451 4.7.1")] = None
    mailbox: Annotated[MailboxSettings | None, Meta(description="Without a verdict: 452 4.2.2")] = None

    def __post_init__(self) -> None:
        if self.reply:
            reply_of(self.reply)
        self._check_verdict()
        self._check_phase()

    @property
    def verdict(self) -> str:
        """The reply that the rule says; "" when it has none."""
        if self.reply or self.has_verdict:
            return self.reply
        if self.outage is not None:
            return "421 4.3.2 Out of order, please try again later"
        if self.rate is not None:
            return "421 4.7.0 Too fast, please try again later"
        if self.greylist is not None:
            return "451 4.7.1 Greylisted, please try again later"
        return "452 4.2.2 Mailbox full" if self.mailbox is not None else ""

    @property
    def has_verdict(self) -> bool:
        """The rule itself says what becomes of the matter."""
        return bool(self.reply) or self.dress is not None or self.end is not None or self.tls is not None

    def _check_verdict(self) -> None:
        does = self.verdict or self.has_verdict or self.delay is not None or self.read_rate or self.write_rate
        if not does and not self.split:
            raise ValueError(
                "a rule needs something to do: reply, dress, end, tls, delay, read_rate, write_rate, split, or one of "
                "outage, rate, greylist, mailbox"
            )
        if self.tls is not None and (self.reply or self.dress is not None or self.end is not None):
            raise ValueError("tls stands alone: no reply, dress or end beside it")
        if self.phase == "connect" and (self.reply or self.dress is not None):
            raise ValueError("nothing is said in phase connect; a reply in place of the greeting is for phase banner")

    def _check_phase(self) -> None:
        phase, match = self.phase, self.match
        if self.at and phase != "body":
            raise ValueError("at is for phase body")
        if phase == "body" and self.dress is not None and not self.reply:
            raise ValueError("in phase body there is no reply to dress, unless reply says one")
        if self.keeps and phase != "dot":
            raise ValueError("keeps is for phase dot")
        if self.tls is not None and phase not in _TLS_PHASES:
            raise ValueError("tls is for phase starttls, and for connect where TLS is implicit")
        if (match.sender or match.sequence) and phase not in _OF_A_MESSAGE:
            raise ValueError(f"there is no sender in phase {phase}")
        if match.recipient and phase not in _OF_RECIPIENTS:
            raise ValueError(f"there is no recipient in phase {phase}")
        if self.greylist is not None and phase not in _OF_RECIPIENTS:
            raise ValueError("greylist is for phase rcpt, or a later one of a message")
        if self.mailbox is not None and phase not in ("rcpt", "dot"):
            raise ValueError("mailbox is for phases rcpt and dot")
        if self.rate is not None:
            if self.rate.per.startswith("sender") and phase not in _OF_A_MESSAGE:
                raise ValueError(f"there is no sender in phase {phase}")
            if self.rate.per.startswith("recipient") and phase not in _OF_RECIPIENTS:
                raise ValueError(f"there is no recipient in phase {phase}")


class IdentitySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where messages have a number of their own, by which the seed knows them again."""

    where: Annotated[
        Literal["sender", "recipient", "header", "nowhere"],
        Meta(
            description="seq-RUN-NUMBER at the end of the local part, as `penstock load` writes it; in a header it is "
            "known in phase dot only"
        ),
    ] = "sender"
    header: Annotated[str, Meta(pattern="^[!-9;-~]+$", description="The field, where it stands in the header")] = (
        "X-Penstock-Sequence"
    )
    any_counter: Annotated[bool, Meta(description="Any digits at the end are a number, too")] = False


class PlanSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fault plan."""

    seed: Annotated[
        int,
        Meta(
            ge=0, le=(1 << 63) - 1, description="What probabilities and delays are drawn from; --seed has the last word"
        ),
    ] = 0
    longest_stall: Annotated[
        float, Meta(gt=0, le=_LONGEST, description="Seconds after which a stall ends in a close")
    ] = 300.0
    remember: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000_000,
            description="Messages, clients, triplets and mailboxes that attempts, greylists and limits are known of; "
            "the oldest are forgotten",
        ),
    ] = 100_000
    identity: IdentitySettings = IdentitySettings()
    rule: Annotated[tuple[RuleSettings, ...], Meta(max_length=1000, description="Looked at in this order")] = ()

    def __post_init__(self) -> None:
        names = [rule.name for rule in self.rule if rule.name]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two rules have the name {twice!r}")

    def names(self) -> list[str]:
        """Return what receipts call the rules."""
        return [rule.name or f"{rule.phase}-{number}" for number, rule in enumerate(self.rule, 1)]


NO_PLAN: Final = PlanSettings()


class PlanError(ValueError):
    """What is wrong with a plan; the text names the key and the right form."""


def parse_plan(text: str) -> PlanSettings:
    """Read a plan from TOML. Raise PlanError."""
    try:
        return schema.convert(schema.parse_table(text), PlanSettings)
    except SchemaError as exc:
        raise PlanError(str(exc)) from exc


def load_plan(path: Path) -> PlanSettings:
    """Read a plan from a file. Raise PlanError, with the file and the key."""
    try:
        return parse_plan(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise PlanError(f"{path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise PlanError(f"{path}: a plan is UTF-8 text") from exc
    except PlanError as exc:
        raise PlanError(f"{path}: {exc}") from exc


def glob(patterns: tuple[str, ...]) -> re.Pattern[str] | None:
    """Return what matches any of the patterns, whatever the case; None for none."""
    if not patterns:
        return None
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns), re.IGNORECASE)
