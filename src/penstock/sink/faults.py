"""The fault engine: decides at each phase of a session which faults to inject. No I/O.

How rules are combined
----------------------
1. At each phase, the rules of that phase are evaluated in the order of the plan. Replies requested by `fail_next` come
   before them, faults requested by magic recipients after them (penstock.sink.magic).
2. A matching rule adds its delay to those of the others and sets the pace of the connection (read_rate, write_rate,
   split; the last rule wins). Then the next rule is evaluated.
3. The first matching rule with a verdict (reply, dress, end, tls, or the reply of a condition) ends the evaluation.
4. The decision is carried out in this order: pace, delay, reply or corrupted reply, end of the connection.

What the same seed repeats
--------------------------
`every`, `probability`, `attempts` and random delays depend on the seed, the name of the rule and the identity of *what*
is decided, never on time or on earlier decisions. The same seed and the same input therefore give the same faults, in
one session or in two hundred. The identity is

    connect, banner     the client address, and which of its connections this is
    ehlo to auth,       the address, the EHLO name, and how often this pair has reached this phase
      rset to quit
    mail                the sequence number, otherwise the sender  }
    rcpt                the number, otherwise the sender; the recipient } and which attempt, or which of several equal
    data, body, dot     the number, otherwise sender and recipients }     ones, this is

A message is numbered if [identity] finds a number: `penstock load` writes one into the sender. Unnumbered messages with
the same sender and recipients are equal: how many of them are hit is repeated, but not which. Every attempt is decided
separately, so a message that was hit may pass when it is sent again.

`first`, `after` and mailboxes depend on the order of arrival: how many are hit is repeated, which ones depends on the
order. `since`, `until`, outages, rates and greylists depend on the clock.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import trio

from penstock import sequence
from penstock.addresses import parse_address, parse_network
from penstock.reply import Reply
from penstock.sequence import Mark
from penstock.sink.memory import Buckets, Counters, Mailboxes, Triplets
from penstock.sink.plan import (
    NO_PLAN,
    PHASES,
    Corruption,
    DelaySettings,
    Ending,
    IdentitySettings,
    Per,
    Phase,
    PlanSettings,
    RuleSettings,
    TlsFault,
    glob,
    reply_of,
)

_ALL: Final = 1 << 64
_MAX_KEPT: Final = 1000
_MAX_COUNTED: Final = 10_000
_MAX_FORCED: Final = 1_000_000
_PHASE_OF: Final[dict[str, Phase]] = {**{phase: phase for phase in PHASES}, ".": "dot", "lhlo": "ehlo"}


class AppliedFault(NamedTuple):
    """One injected fault, for the statistics."""

    rule: str
    """Name of the rule; "fail-next" or "magic" for faults that are not from the plan."""
    phase: Phase
    action: str
    """What was injected: "reply 450 4.2.1", "delay 1.250 s", "reset"."""
    session: int
    """Number of the connection."""
    sender: str = ""
    recipient: str = ""
    """The recipient in phase rcpt, the first one in later phases."""
    sequence: str = ""
    """Sequence tag of the message, if it has one."""
    message_id: str = ""
    """Message-ID of the message, if its header has arrived and the log wants it."""


@dataclass
class FaultLog:
    """Fault statistics in memory: counts, and the last thousand faults."""

    counts: Counter[tuple[str, Phase, str]] = field(default_factory=Counter)
    """Faults by rule, phase and action; delays of any length are one action."""
    last: deque[AppliedFault] = field(default_factory=lambda: deque(maxlen=_MAX_KEPT))

    def on_fault(self, fault: AppliedFault) -> None:
        """Count the fault and keep it. Called by the session: must not block."""
        key = (fault.rule, fault.phase, "delay" if fault.action.startswith("delay") else fault.action)
        if key not in self.counts and len(self.counts) >= _MAX_COUNTED:
            key = (fault.rule, fault.phase, "other")  # magic recipients can request any number of different replies
        self.counts[key] += 1
        self.last.append(fault)

    @property
    def wants_message_ids(self) -> bool:
        """Faults need the Message-ID of their message, for which the header of every message is read."""
        return False

    def clear(self) -> None:
        """Drop all counts and faults."""
        self.counts.clear()
        self.last.clear()


@dataclass(slots=True)
class Occasion:
    """Input of a decision: what is known about a session at a phase."""

    phase: Phase
    address: str
    """Client address; "" for a unix socket."""
    session: int = 0
    hello: str = ""
    is_tls: bool = False
    sender: str | None = None
    """None outside a transaction; "" is the null sender."""
    recipients: tuple[str, ...] = ()
    """Accepted recipients; in phase rcpt, the one being decided."""
    octets: int = 0
    """Size of the message: declared (SIZE=) in phase rcpt, counted in phase dot; 0 if unknown."""
    header: str = ""
    """Value of the header field that [identity] names."""
    message_id: str = ""
    """Message-ID, if the log wants it."""
    at: int = 0
    """Offset in the body."""
    is_chunk: bool = False
    """Phase data of a BDAT command, which has no reply before its octets are received."""

    def mark(self, identity: IdentitySettings) -> Mark | None:
        """Return the sequence tag of the message."""
        if self.sender is None:
            return None
        read = sequence.parse_counter if identity.any_counter else sequence.parse
        if identity.where == "sender":
            return read(self.sender.rpartition("@")[0])
        if identity.where == "recipient":
            found = (read(recipient.rpartition("@")[0]) for recipient in self.recipients)
            return next((each for each in found if each is not None), None)
        return read(self.header) if identity.where == "header" else None

    def subject(self, per: Per) -> str:
        """Return the key that a limit is counted by."""
        recipient = self.recipients[0] if self.recipients else ""
        return {
            "address": self.address,
            "sender": (self.sender or "").lower(),
            "sender-domain": (self.sender or "").rpartition("@")[2].lower(),
            "recipient": recipient.lower(),
            "recipient-domain": recipient.rpartition("@")[2].lower(),
            "everybody": "",
        }[per]


class _Identity(NamedTuple):
    """Identity of a decision."""

    draw: tuple[str, ...]
    """Names that random values depend on."""
    number: int
    """Occurrence, 1 for the first."""
    start: int | None
    """Sequence number; None without one."""


def _identify(occasion: Occasion, mark: Mark | None, counters: Counters) -> _Identity:
    """Return the identity of a decision, and count its occurrence."""
    phase = occasion.phase
    start: int | None = None
    if occasion.sender is None:
        parts: tuple[str, ...] = (occasion.address,)
        if phase in ("connect", "banner"):
            start = 1
        else:
            parts += (occasion.hello,)
        return _Identity((phase, *parts), counters.next((phase, *parts)), start)
    recipients = () if phase == "mail" else occasion.recipients
    if mark is None:
        parts = (phase, occasion.sender, *recipients)
        return _Identity(parts, counters.next((*parts, occasion.at)), None)
    recipients = recipients if phase == "rcpt" else ()
    # Random values do not depend on the run: the same messages in another run get the same faults.
    count = counters.next((phase, mark.run, mark.number, *recipients, occasion.at))
    return _Identity((phase, f"#{mark.number}", *(_without_run(each) for each in recipients)), count, mark.number)


def _without_run(recipient: str) -> str:
    """Return a recipient without its sequence tag, which contains the run."""
    local, _, domain = recipient.rpartition("@")
    mark = sequence.parse(local)
    return recipient if mark is None else f"{local.removesuffix(str(mark))}@{domain}"


class Draws:
    """Pseudo-random numbers that depend only on the seed and on names."""

    __slots__ = ("_key",)

    def __init__(self, seed: int) -> None:
        self._key = seed.to_bytes(8, "big")

    def draw(self, rule: str, purpose: str, identity: _Identity) -> int:
        """Return 64 bits."""
        text = "\0".join((rule, purpose, str(identity.number), *identity.draw))
        return self._hash(text)

    def offset(self, rule: str, identity: _Identity) -> int:
        """Return 64 bits that are equal for all occurrences."""
        return self._hash("\0".join((rule, "every", *identity.draw)))

    def _hash(self, text: str) -> int:
        data = text.encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._key).digest(), "big")


def seconds_of(delay: DelaySettings, drawn: int, dice: int) -> float:
    """Return the seconds of a delay for 64 random bits, and 64 more for its repetitions."""
    part = drawn / _ALL
    if delay.seconds is not None:
        seconds = delay.seconds
    elif delay.uniform is not None:
        least, most = delay.uniform
        seconds = least + (most - least) * part
    elif delay.exponential is not None:
        seconds = -delay.exponential * math.log1p(-part)
    else:
        assert delay.percentiles is not None
        seconds = _interpolate(delay.percentiles, part * 100)
    if delay.odds:
        seconds *= 1 + int(math.log1p(-dice / _ALL) / math.log(delay.odds / 100))
    return min(seconds, delay.longest)


def _interpolate(table: Sequence[tuple[float, float]], rank: float) -> float:
    before_rank, before = 0.0, table[0][1]
    for next_rank, seconds in table:
        if rank <= next_rank:
            width = next_rank - before_rank
            return seconds if not width else before + (seconds - before) * (rank - before_rank) / width
        before_rank, before = next_rank, seconds
    return before


@dataclass(slots=True)
class Decision:
    """The faults of one phase."""

    delay: float = 0.0
    read_rate: int = 0
    write_rate: int = 0
    split: bool = False
    reply: Reply | None = None
    corruption: Corruption | None = None
    end: Ending | None = None
    tls: TlsFault | None = None
    keeps: bool = False
    random_bits: int = 0
    """Random bits from the seed, for garbage."""
    has_verdict: bool = False

    @property
    def sets_pace(self) -> bool:
        """The decision sets the pace of the connection."""
        return bool(self.read_rate or self.write_rate or self.split)


class Rule:
    """A rule with the state of its conditions."""

    def __init__(self, name: str, settings: RuleSettings, remember: int) -> None:
        self.name = name
        self.phase = settings.phase
        self.settings = settings
        match = settings.match
        self.reply = reply_of(settings.verdict) if settings.verdict else None
        self.has_verdict = self.reply is not None or settings.has_verdict
        self._needs_reply = settings.dress is not None or (
            self.reply is not None and (self.reply.accepts or settings.end is not None)
        )
        """The rule changes or needs a reply that is sent immediately."""
        delay = settings.delay
        self.is_drawn = delay is not None and (delay.seconds is None or bool(delay.odds))
        self.needs_identity = (
            match.every > 1 or match.probability < 1 or bool(match.attempts) or self.is_drawn
        ) or settings.dress == "garbage"
        self._networks = tuple(parse_network(network) for network in match.network)
        self._hello, self._sender, self._recipient = glob(match.hello), glob(match.sender), glob(match.recipient)
        self._held = 0
        rate, grey, box = settings.rate, settings.greylist, settings.mailbox
        burst = 0.0 if rate is None else max(rate.burst or rate.count, 1.0)
        self._buckets = None if rate is None else Buckets(rate.count / rate.seconds, burst, remember)
        self._triplets = None if grey is None else Triplets(grey.wait, grey.forget, remember)
        self.mailboxes = None if box is None else Mailboxes(box.octets, box.messages, remember)

    def holds(
        self,
        occasion: Occasion,
        mark: Mark | None,
        identity: _Identity | None,
        draws: Draws,
        now: float,
        started: float,
    ) -> bool:
        """Return True if all conditions hold. Those that count are evaluated only if the others hold."""
        return (
            not (occasion.is_chunk and self._needs_reply)
            and self._is_for(occasion, mark)
            and self._is_time(now - started)
            and (identity is None or self._is_drawn(identity, draws))
            and self._is_turn()
            and self._is_limited(occasion, now)
        )

    def _is_for(self, occasion: Occasion, mark: Mark | None) -> bool:
        match = self.settings.match
        if self._networks:
            if not occasion.address:
                return False
            address = parse_address(occasion.address)
            if not any(address in network for network in self._networks):
                return False
        if self._hello is not None and not self._hello.match(occasion.hello):
            return False
        if self._sender is not None and (occasion.sender is None or not self._sender.match(occasion.sender)):
            return False
        if self._recipient is not None and not any(map(self._recipient.match, occasion.recipients)):
            return False
        if match.tls is not None and match.tls is not occasion.is_tls:
            return False
        if match.sequence is None:
            return True
        return mark is not None and match.sequence[0] <= mark.number <= match.sequence[1]

    def _is_time(self, now: float) -> bool:
        match, outage = self.settings.match, self.settings.outage
        if now < match.since or (match.until and now >= match.until):
            return False
        return outage is None or (now >= outage.begin and (now - outage.begin) % outage.every < outage.down)

    def _is_drawn(self, identity: _Identity, draws: Draws) -> bool:
        match = self.settings.match
        if match.attempts and identity.number > match.attempts:
            return False
        if match.every > 1:
            start = identity.start if identity.start is not None else draws.offset(self.name, identity)
            if (start + identity.number - 1) % match.every:
                return False
        return match.probability >= 1 or draws.draw(self.name, "probability", identity) < match.probability * _ALL

    def _is_turn(self) -> bool:
        match = self.settings.match
        if not match.first and not match.after:
            return True
        self._held += 1
        return self._held > match.after and (not match.first or self._held <= match.after + match.first)

    def _is_limited(self, occasion: Occasion, now: float) -> bool:
        rate, box = self.settings.rate, self.settings.mailbox
        if self._buckets is not None:
            assert rate is not None
            return not self._buckets.take(occasion.subject(rate.per), now)
        if self._triplets is not None:
            triplets, sender = self._triplets, (occasion.sender or "").lower()
            keys = [(occasion.address, sender, recipient.lower()) for recipient in occasion.recipients]
            are_new = [
                triplets.is_new(key, now) for key in keys
            ]  # all triplets are recorded, not only up to the first new one
            return any(are_new)
        if self.mailboxes is not None:
            assert box is not None
            return any(self.mailboxes.is_full(key, occasion.octets) for key in mailbox_keys(box.per, occasion))
        return True

    def seconds(self, identity: _Identity | None, draws: Draws) -> float:
        """Return the delay."""
        delay = self.settings.delay
        if delay is None:
            return 0.0
        if identity is None or not self.is_drawn:
            return min(delay.seconds or 0.0, delay.longest)
        return seconds_of(delay, draws.draw(self.name, "delay", identity), draws.draw(self.name, "dice", identity))

    def actions(self, delay: float) -> list[str]:
        """Return the actions of the rule, as reports name them."""
        settings = self.settings
        actions = [f"delay {delay:.3f} s"] if settings.delay is not None else []
        actions += [f"read {settings.read_rate}/s"] if settings.read_rate else []
        actions += [f"write {settings.write_rate}/s"] if settings.write_rate else []
        actions += ["split"] if settings.split else []
        if self.reply is not None:
            actions.append(f"reply {self.reply.code} {self.reply.status or ''}".rstrip())
        actions += [settings.dress] if settings.dress is not None else []
        actions += [settings.end] if settings.end is not None else []
        actions += [f"tls {settings.tls}"] if settings.tls is not None else []
        return actions


def mailbox_keys(per: Per, occasion: Occasion) -> set[str]:
    """Return the keys of the mailboxes that a message is stored in."""
    if per == "recipient":
        return {recipient.lower() for recipient in occasion.recipients}
    return {recipient.rpartition("@")[2].lower() for recipient in occasion.recipients}


class _Forced:
    """A reply that the next commands of a phase receive, before any rule of the plan."""

    __slots__ = ("left", "reply")

    def __init__(self, reply: Reply, left: int) -> None:
        self.reply = reply
        self.left = left


class _Loaded:
    """A plan with the state of its rules."""

    def __init__(self, settings: PlanSettings) -> None:
        self.settings = settings
        rules = [
            Rule(name, rule, settings.remember) for name, rule in zip(settings.names(), settings.rule, strict=True)
        ]
        self.rules: dict[Phase, tuple[Rule, ...]] = {
            phase: tuple(rule for rule in rules if rule.phase == phase) for phase in PHASES
        }
        self.mailboxes = tuple(rule for rule in rules if rule.mailboxes is not None)
        self.draws = Draws(settings.seed)
        self.counters = Counters(settings.remember)
        self.started: float | None = None


class Follower(Protocol):
    """A connection that asks the engine."""

    def follow(self) -> None:
        """Check again whether faults are possible. May be called from any thread."""


class FaultEngine:
    """Decides about faults. The methods that change it may be called at any time and from any thread."""

    def __init__(
        self,
        plan: PlanSettings = NO_PLAN,
        *,
        receipts: FaultLog | None = None,
        has_magic: bool = False,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        """`has_magic`: recipients may request faults. `clock` returns seconds; the sessions' thread calls it."""
        self.receipts = receipts if receipts is not None else FaultLog()
        self.has_magic = has_magic
        self._clock = clock
        self._loaded = _Loaded(plan)
        self._forced: dict[Phase, deque[_Forced]] = {phase: deque() for phase in PHASES}
        self._forcing = threading.Lock()
        """Guards `_forced`: tests and sessions use it in different threads."""
        self.is_armed = bool(plan.rule)
        """Faults are possible, so sessions have to ask."""
        self.followers: set[Follower] = set()
        """Open connections to notify of changes. Each one adds and removes itself."""

    # ---- changing the plan

    @property
    def plan(self) -> PlanSettings:
        """The plan in force."""
        return self._loaded.settings

    def load(self, plan: PlanSettings) -> None:
        """Activate a plan, also for open sessions. It starts with the next decision."""
        self._loaded = _Loaded(plan)
        self._notify()

    def reset(self) -> None:
        """Restart the plan: counters, limits and start time. Pending `fail_next` requests are dropped."""
        for waiting in self._forced.values():
            waiting.clear()
        self.load(self.plan)

    def fail_next(self, phase: str, reply: Reply | str | int, count: int = 1) -> None:
        """Answer the next `count` commands of a phase with this reply: `fail_next("RCPT", 452)`.

        Phases are named as in a plan, in any case of letters; "." is the dot. Raise ValueError for an unknown phase, an
        invalid reply, or a count that is not between 1 and 1,000,000.
        """
        name = _PHASE_OF.get(phase.lower())
        if name is None or name in ("connect", "body"):
            known = ", ".join(each for each in PHASES if each not in ("connect", "body"))
            raise ValueError(f"unknown phase {phase!r}; expected one of: {known}")
        if count not in range(1, _MAX_FORCED + 1):  # also refuses 1.5
            raise ValueError(f"count must be between 1 and {_MAX_FORCED}, not {count}")
        wanted = reply if isinstance(reply, Reply) else reply_of(str(reply))
        with self._forcing:
            self._forced[name].append(_Forced(wanted, count))
        self._notify()

    def pending(self) -> dict[str, int]:
        """Return how many commands of each phase `fail_next` will still answer."""
        left = {phase: sum(each.left for each in list(waiting)) for phase, waiting in self._forced.items()}
        return {phase: count for phase, count in left.items() if count}

    def _notify(self) -> None:
        with self._forcing:
            self._update_armed()
        for follower in list(self.followers):
            follower.follow()

    def _update_armed(self) -> None:
        self.is_armed = bool(self._loaded.settings.rule) or any(self._forced.values())

    # ---- for sessions

    def stops(self) -> list[int]:
        """Return the offsets in a body at which rules apply, in increasing order."""
        return sorted({rule.settings.at for rule in self._loaded.rules["body"]})

    @property
    def header(self) -> str:
        """Header field with the sequence number; "" if the number is elsewhere."""
        identity = self._loaded.settings.identity
        return identity.header if identity.where == "header" else ""

    @property
    def longest_stall(self) -> float:
        """Seconds after which a stalled connection is closed."""
        return self._loaded.settings.longest_stall

    def decide(self, occasion: Occasion, magic: Sequence[Rule] = ()) -> Decision | None:
        """Return the faults of a phase; None for none. `magic` are the rules requested by recipients."""
        phase, loaded = occasion.phase, self._loaded
        mark = occasion.mark(loaded.settings.identity)
        forced = self._take_forced(phase)
        if forced is not None:
            self._note(occasion, mark, "fail-next", [f"reply {forced.code} {forced.status or ''}".rstrip()])
            return Decision(reply=forced, has_verdict=True)
        rules: Sequence[Rule] = (*loaded.rules[phase], *magic) if magic else loaded.rules[phase]
        if phase == "body":
            rules = [rule for rule in rules if rule.settings.at == occasion.at]
        if not rules:
            return None
        now = self._clock()
        if loaded.started is None:
            loaded.started = now
        identity = None
        if any(rule.needs_identity for rule in rules):
            identity = _identify(occasion, mark, loaded.counters)
        decision: Decision | None = None
        for rule in rules:
            if not rule.holds(occasion, mark, identity, loaded.draws, now, loaded.started):
                continue
            decision = decision or Decision()
            self._apply(rule, decision, occasion, mark, identity)
            if rule.has_verdict:
                break
        return decision

    def _apply(
        self, rule: Rule, decision: Decision, occasion: Occasion, mark: Mark | None, identity: _Identity | None
    ) -> None:
        """Add the faults of a rule to a decision, and record them."""
        settings, draws = rule.settings, self._loaded.draws
        delay = rule.seconds(identity, draws)
        decision.delay += delay
        decision.read_rate = settings.read_rate or decision.read_rate
        decision.write_rate = settings.write_rate or decision.write_rate
        decision.split = settings.split or decision.split
        if rule.has_verdict:
            decision.has_verdict = True
            decision.reply = rule.reply
            decision.corruption, decision.end, decision.tls = settings.dress, settings.end, settings.tls
            decision.keeps = settings.keeps
            if identity is not None and settings.dress == "garbage":
                decision.random_bits = draws.draw(rule.name, "garbage", identity)
        self._note(occasion, mark, rule.name, rule.actions(delay))

    def taken(self, occasion: Occasion) -> None:
        """Store an accepted message in the mailboxes."""
        for rule in self._loaded.mailboxes:
            assert rule.mailboxes is not None
            assert rule.settings.mailbox is not None
            for key in mailbox_keys(rule.settings.mailbox.per, occasion):
                rule.mailboxes.add(key, occasion.octets)

    def _take_forced(self, phase: Phase) -> Reply | None:
        waiting = self._forced[phase]
        if not waiting:
            return None
        with self._forcing:
            if not waiting:  # reset by another thread in the meantime
                return None
            forced = waiting[0]
            forced.left -= 1
            if not forced.left:
                waiting.popleft()
                self._update_armed()
            return forced.reply

    def _note(self, occasion: Occasion, mark: Mark | None, rule: str, actions: Sequence[str]) -> None:
        recipient = occasion.recipients[0] if occasion.recipients else ""
        sender = occasion.sender or ""
        for action in actions:
            self.receipts.on_fault(
                AppliedFault(
                    rule,
                    occasion.phase,
                    action,
                    occasion.session,
                    sender,
                    recipient,
                    str(mark or ""),
                    occasion.message_id,
                )
            )
