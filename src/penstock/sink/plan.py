"""Fault plans: TOML files whose rules say when a sink misbehaves, and how.

    seed = 7

    [[rule]]
    name = "busy"
    phase = "rcpt"
    match = { recipient = ["*@slow.example"], probability = 0.2 }
    delay = { uniform = [0.5, 2.0] }
    reply = "450 4.2.1 Mailbox busy, try again later"

The classes below are the reference that `penstock sink --describe-faults` prints. penstock.sink.faults describes how
rules are combined, and what the same seed repeats.
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
"""Phases with a sender."""
_OF_RECIPIENTS: Final = _OF_A_MESSAGE - {"mail"}
"""Phases with recipients."""
_TLS_PHASES: Final = frozenset({"connect", "starttls"})
_REPLY: Final = re.compile(r"([2-5][0-9]{2})(?: ([245]\.[0-9]{1,3}\.[0-9]{1,3}))?(?: (.*))?\Z", re.DOTALL)
_LONGEST: Final = 86_400.0
_Seconds = Annotated[float, Meta(ge=0, le=_LONGEST)]

TlsFault = Literal["refuse", "wrong-name", "expired", "alert", "stall", "plaintext", "tls-1.2"]
Ending = Literal["drop", "reset", "half-close", "stall"]
Corruption = Literal[
    "wrong-code", "too-long", "many-lines", "unfinished", "non-ascii", "bare-lf", "no-line-end", "garbage"
]
Per = Literal["address", "sender", "sender-domain", "recipient", "recipient-domain", "everybody"]


def reply_of(text: str) -> Reply:
    """Parse a reply such as "450 4.2.2 Mailbox full"; status and text are optional. 421 also closes the connection.

    Raise ValueError for any other form.
    """
    found = _REPLY.match(text)
    if found is None:
        raise ValueError(f'expected a reply such as "450 4.2.2 Mailbox full" or "450", not {text!r}')
    code, status, words = int(found[1]), found[2], found[3]
    if status is None and code not in _WITHOUT_STATUS:
        status = f"{code // 100}.0.0"
    return Reply(code, status, words or _TEXTS.get(code, "Injected fault"), closes=code == 421)


_WITHOUT_STATUS: Final = frozenset({220, 334, 354})
_TEXTS: Final = {
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
    """When a rule applies: all given keys must match. Without keys, always."""

    network: Annotated[tuple[str, ...], Meta(description="Networks of the client")] = ()
    hello: Annotated[tuple[str, ...], Meta(description="Patterns of the EHLO name; * matches any text")] = ()
    sender: Annotated[
        tuple[str, ...], Meta(description='Patterns of the sender; "" is the null sender. From phase mail on')
    ] = ()
    recipient: Annotated[
        tuple[str, ...], Meta(description="Patterns; one recipient must match. From phase rcpt on")
    ] = ()
    tls: Annotated[bool | None, Meta(description="Only with TLS (true) or without (false)")] = None
    sequence: Annotated[
        tuple[int, int] | None,
        Meta(description="[first, last] sequence number of the message; see [identity]"),
    ] = None
    every: Annotated[int, Meta(ge=1, description="Every Nth message; exactly, if messages are numbered")] = 1
    probability: Annotated[float, Meta(ge=0, le=1, description="Probability, drawn from the seed")] = 1.0
    attempts: Annotated[int, Meta(ge=0, description="Only the first N attempts of the same message; 0: all")] = 0
    first: Annotated[
        int, Meta(ge=0, description="Only the first N that match all keys above; 0: all. By order of arrival")
    ] = 0
    after: Annotated[int, Meta(ge=0, description="Not the first N that match all keys above. By order of arrival")] = 0
    since: Annotated[float, Meta(ge=0, description="Seconds after the start of the plan. By the clock")] = 0.0
    until: Annotated[float, Meta(ge=0, description="Seconds after the start of the plan; 0: no end. By the clock")] = (
        0.0
    )

    def __post_init__(self) -> None:
        for network in self.network:
            parse_network(network)
        if self.until and self.until <= self.since:
            raise ValueError("until must be greater than since")
        if self.sequence is not None and self.sequence[0] > self.sequence[1]:
            raise ValueError("sequence must be [first, last]")


class OutageSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Condition: a periodic outage. By the clock."""

    down: Annotated[float, Meta(gt=0, le=_LONGEST, description="Duration in seconds")]
    every: Annotated[float, Meta(gt=0, le=_LONGEST, description="Seconds from the start of one outage to the next")]
    begin: Annotated[
        float, Meta(ge=0, le=_LONGEST, description="Seconds from the start of the plan to the first outage")
    ] = 0.0

    def __post_init__(self) -> None:
        if self.down > self.every:
            raise ValueError("down must not be greater than every")


class RateSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Condition: a rate limit (token bucket) is exceeded. By the clock."""

    per: Annotated[Per, Meta(description="What the limit is counted for")] = "address"
    count: Annotated[float, Meta(gt=0, description="Allowed number")]
    seconds: Annotated[float, Meta(gt=0, le=_LONGEST, description="per this many seconds")] = 1.0
    burst: Annotated[float, Meta(ge=0, description="Burst size; 0: the same as count, at least 1")] = 0.0


class GreylistSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Condition: greylisting; the triplet of client address, sender and recipient is new. By the clock."""

    wait: Annotated[float, Meta(ge=0, le=_LONGEST, description="Seconds before a triplet is accepted")] = 60.0
    forget: Annotated[float, Meta(gt=0, le=_LONGEST, description="Seconds after which a triplet is new again")] = (
        14_400.0
    )


class MailboxSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Condition: a mailbox is full of accepted messages. By order of arrival; phases rcpt and dot."""

    per: Annotated[
        Literal["recipient", "recipient-domain"], Meta(description="One mailbox for each address, or for each domain")
    ] = "recipient-domain"
    octets: Annotated[int, Meta(ge=0, description="Capacity in octets; 0: unlimited")] = 0
    messages: Annotated[int, Meta(ge=0, description="Capacity in messages; 0: unlimited")] = 0

    def __post_init__(self) -> None:
        if not self.octets and not self.messages:
            raise ValueError("set octets or messages")


class DelaySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the client waits: one of the first four keys. Random values are drawn from the seed."""

    seconds: Annotated[_Seconds | None, Meta(description="Fixed number of seconds")] = None
    uniform: Annotated[tuple[float, float] | None, Meta(description="[least, most] seconds, uniformly distributed")] = (
        None
    )
    exponential: Annotated[_Seconds | None, Meta(description="Mean of an exponential distribution, in seconds")] = None
    percentiles: Annotated[
        tuple[tuple[float, float], ...] | None,
        Meta(description="[[50, 0.1], [90, 1.5], [99, 10]]: percentiles and seconds, with linear interpolation"),
    ] = None
    odds: Annotated[
        int, Meta(ge=0, le=99, description="Percent chance of each further repetition of the delay; 0: no repetition")
    ] = 0
    longest: Annotated[float, Meta(gt=0, le=_LONGEST, description="Maximum in seconds")] = 3600.0

    def __post_init__(self) -> None:
        kinds = (self.seconds, self.uniform, self.exponential, self.percentiles)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("set exactly one of seconds, uniform, exponential, percentiles")
        if self.uniform is not None and not 0 <= self.uniform[0] <= self.uniform[1] <= _LONGEST:
            raise ValueError(f"uniform must be [least, most] seconds, at most {_LONGEST:g}")
        if self.percentiles is not None:
            _check_percentiles(self.percentiles)


def _check_percentiles(table: tuple[tuple[float, float], ...]) -> None:
    ranks, seconds = [rank for rank, _ in table], [second for _, second in table]
    if not table or ranks != sorted(set(ranks)) or not 0 <= ranks[0] <= ranks[-1] <= 100:
        raise ValueError("percentiles must be between 0 and 100, in increasing order")
    if seconds != sorted(seconds) or not 0 <= seconds[0] <= seconds[-1] <= _LONGEST:
        raise ValueError(f"the seconds of percentiles must be between 0 and {_LONGEST:g}, in increasing order")


class RuleSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rule: a phase, conditions, and the faults to inject if all conditions hold.

    `reply`, `dress`, `end` and `tls` are verdicts: the first matching rule with a verdict ends the evaluation of its
    phase. After a rule with only `delay`, `read_rate`, `write_rate` or `split`, evaluation continues.
    """

    name: Annotated[str, Meta(max_length=64, description="Name in reports; phase and number if empty")] = ""
    phase: Annotated[
        Phase,
        Meta(
            description="Point of the session: connect (before the greeting), banner, ehlo (and LHLO), helo, starttls, "
            "auth, mail, rcpt, data (and the first BDAT, whose reply cannot be changed), body, dot (end of the text), "
            "rset, noop, vrfy, expn, help, quit"
        ),
    ]
    at: Annotated[
        int, Meta(ge=0, description="Offset in the body at which the rule applies; 0: right after the 354. Phase body")
    ] = 0
    reply: Annotated[
        str,
        Meta(
            description='Reply instead of the ordinary one, such as "450 4.2.2 Mailbox full"; 4xx and 5xx refuse. 421 '
            "also closes the connection, and so does any reply in phase body"
        ),
    ] = ""
    dress: Annotated[
        Corruption | None,
        Meta(
            description="Corrupt the reply: wrong-code (an unexpected code), too-long (2,000 octets), many-lines "
            "(1,000 lines), unfinished (the last line is missing), non-ascii (Latin-1 and truncated UTF-8), bare-lf, "
            "no-line-end, garbage (random octets from the seed)"
        ),
    ] = None
    end: Annotated[
        Ending | None,
        Meta(
            description="End the connection, after the reply if there is one: drop (close), reset (RST), half-close "
            "(FIN, then read on), stall (no reply, until longest_stall)"
        ),
    ] = None
    tls: Annotated[
        TlsFault | None,
        Meta(
            description="TLS fault, in phase starttls, or connect with implicit TLS: refuse (454), wrong-name, "
            "expired, alert (fatal, after the handshake), stall (during the handshake), plaintext (a reply instead "
            "of the handshake), tls-1.2 (no newer version)"
        ),
    ] = None
    keeps: Annotated[
        bool,
        Meta(description="Accept the message although the client receives another reply; phase dot (RFC 1047)"),
    ] = False
    delay: Annotated[DelaySettings | None, Meta(description="Applied first; delays of several rules add up")] = None
    read_rate: Annotated[int, Meta(ge=0, description="Octets per second to read from now on; 0: unlimited")] = 0
    write_rate: Annotated[int, Meta(ge=0, description="Octets per second to send from now on; 0: unlimited")] = 0
    split: Annotated[bool, Meta(description="Send every octet separately from now on")] = False
    match: MatchSettings = MatchSettings()
    outage: Annotated[OutageSettings | None, Meta(description="Without a verdict: reply 421 4.3.2")] = None
    rate: Annotated[RateSettings | None, Meta(description="Without a verdict: reply 421 4.7.0")] = None
    greylist: Annotated[GreylistSettings | None, Meta(description="Without a verdict: reply 451 4.7.1")] = None
    mailbox: Annotated[MailboxSettings | None, Meta(description="Without a verdict: reply 452 4.2.2")] = None

    def __post_init__(self) -> None:
        if self.reply:
            reply_of(self.reply)
        self._check_verdict()
        self._check_phase()

    @property
    def counting_condition(self) -> str:
        """The first condition that counts or remembers messages, so that processes cannot share it; "" for none."""
        match = self.match
        counts = {"match.first": match.first, "match.after": match.after, "match.attempts": match.attempts}
        remembers = {"rate": self.rate, "greylist": self.greylist, "mailbox": self.mailbox}
        return next((name for name, value in {**counts, **remembers}.items() if value), "")

    @property
    def verdict(self) -> str:
        """The reply of the rule; "" if it has none."""
        if self.reply or self.has_verdict:
            return self.reply
        if self.outage is not None:
            return "421 4.3.2 Service not available, please try again later"
        if self.rate is not None:
            return "421 4.7.0 Rate limit exceeded, please try again later"
        if self.greylist is not None:
            return "451 4.7.1 Greylisted, please try again later"
        return "452 4.2.2 Mailbox full" if self.mailbox is not None else ""

    @property
    def has_verdict(self) -> bool:
        """The rule has a verdict of its own, not only that of a condition."""
        return bool(self.reply) or self.dress is not None or self.end is not None or self.tls is not None

    def _check_verdict(self) -> None:
        does = self.verdict or self.has_verdict or self.delay is not None or self.read_rate or self.write_rate
        if not does and not self.split:
            raise ValueError(
                "the rule does nothing; set one of reply, dress, end, tls, delay, read_rate, write_rate, split, "
                "outage, rate, greylist, mailbox"
            )
        if self.tls is not None and (self.reply or self.dress is not None or self.end is not None):
            raise ValueError("tls cannot be combined with reply, dress or end")
        if self.phase == "connect" and (self.reply or self.dress is not None):
            raise ValueError("phase connect has no reply; use phase banner to replace the greeting")

    def _check_phase(self) -> None:
        phase, match = self.phase, self.match
        if self.at and phase != "body":
            raise ValueError('at requires phase = "body"')
        if phase == "body" and self.dress is not None and not self.reply:
            raise ValueError("dress requires reply in phase body, which has no reply of its own")
        if self.keeps and phase != "dot":
            raise ValueError('keeps requires phase = "dot"')
        if self.tls is not None and phase not in _TLS_PHASES:
            raise ValueError("tls requires phase starttls, or connect with implicit TLS")
        if (match.sender or match.sequence) and phase not in _OF_A_MESSAGE:
            raise ValueError(f"phase {phase} has no sender")
        if match.recipient and phase not in _OF_RECIPIENTS:
            raise ValueError(f"phase {phase} has no recipient")
        if self.greylist is not None and phase not in _OF_RECIPIENTS:
            raise ValueError("greylist requires phase rcpt, data, body or dot")
        if self.mailbox is not None and phase not in ("rcpt", "dot"):
            raise ValueError("mailbox requires phase rcpt or dot")
        if self.rate is not None:
            if self.rate.per.startswith("sender") and phase not in _OF_A_MESSAGE:
                raise ValueError(f"phase {phase} has no sender")
            if self.rate.per.startswith("recipient") and phase not in _OF_RECIPIENTS:
                raise ValueError(f"phase {phase} has no recipient")


class IdentitySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where to find the sequence number of a message, by which the seed recognizes it."""

    where: Annotated[
        Literal["sender", "recipient", "header", "nowhere"],
        Meta(
            description="Place of seq-RUN-NUMBER: the end of the local part, as `penstock load` writes it, or a header "
            "field, which is known in phase dot only"
        ),
    ] = "sender"
    header: Annotated[str, Meta(pattern="^[!-9;-~]+$", description='Header field, for where = "header"')] = (
        "X-Penstock-Sequence"
    )
    any_counter: Annotated[bool, Meta(description="Also use any digits at the end as a number")] = False


class PlanSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fault plan."""

    seed: Annotated[
        int,
        Meta(ge=0, le=(1 << 63) - 1, description="Random seed of probabilities and delays; --seed overrides it"),
    ] = 0
    longest_stall: Annotated[
        float, Meta(gt=0, le=_LONGEST, description="Seconds after which a stalled connection is closed")
    ] = 300.0
    remember: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000_000,
            description="Number of messages, clients, triplets and mailboxes to remember for attempts, greylists and "
            "limits; the oldest are forgotten",
        ),
    ] = 100_000
    identity: IdentitySettings = IdentitySettings()
    rule: Annotated[
        tuple[RuleSettings, ...], Meta(max_length=1000, description="May be repeated; evaluated in this order.")
    ] = ()

    def __post_init__(self) -> None:
        names = [rule.name for rule in self.rule if rule.name]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two rules are named {twice!r}")

    def names(self) -> list[str]:
        """Return the names of the rules in reports."""
        return [rule.name or f"{rule.phase}-{number}" for number, rule in enumerate(self.rule, 1)]


NO_PLAN: Final = PlanSettings()


class PlanError(ValueError):
    """A plan cannot be used. The text names the key and the right form."""


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
        raise PlanError(f"{path}: not UTF-8 text: {exc.reason} at offset {exc.start}") from exc
    except PlanError as exc:
        raise PlanError(f"{path}: {exc}") from exc


def glob(patterns: tuple[str, ...]) -> re.Pattern[str] | None:
    """Return a regular expression for any of the patterns, ignoring case; None without patterns."""
    if not patterns:
        return None
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns), re.IGNORECASE)
