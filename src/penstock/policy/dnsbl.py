"""Lists of addresses in the DNS: blocklists, and lists of good senders (RFC 5782).

Rules
-----
1. Only an answer that is in the `answers` of a list counts. A timeout, SERVFAIL, or an open breaker is no result: the
   list is left out.
2. 127.255.255.*, 127.0.0.1 and everything outside 127.0.0.0/8 is an error of ours (a blocked resolver, a list that has
   gone): it can never condemn. The list is not used until it has passed its self-test again.
3. A list is used while 127.0.0.2 is listed and 127.0.0.1 is not (RFC 5782 5). That is asked at the start, and every
   hour.
4. The lists are asked while the client is greeted and says EHLO; only RCPT waits for them. The refusal at RCPT names
   the sender and the recipient in the journal, and mail for postmaster and abuse gets through.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

import trio

from penstock.addresses import comparable_domain
from penstock.breaker import Breaker
from penstock.dns import Answer, Batch, Budget, Kind, Resolver
from penstock.journal import Journal
from penstock.message import Recipient
from penstock.policy.base import Mark
from penstock.policy.check import Check, Finding, FindingOrAwaitable, Parts, Proposal
from penstock.policy.evidence import Lookup, Pending, evidence_of, run_guarded
from penstock.policy.settings import DnsblSettings, PolicySettings
from penstock.reply import Reply
from penstock.results import DnsblResult, Listing
from penstock.transaction import Transaction

_SECONDS: Final = 3.0
"""What the answers of all lists may take."""
_SELF_TEST: Final = 3600.0
_RETRY: Final = (1.0, 5.0, 30.0, 60.0)
"""Seconds after a self-test that has failed until the next one; the last is repeated."""
_FIRST_TEST: Final = 2.0
"""Seconds that the start of the server waits for the first self-tests."""
_BREAKER: Final = (5, 60.0)
"""Questions in a row without an answer after which a list is left out, and for how many seconds."""
_EXEMPT: Final = frozenset({"postmaster", "abuse"})
_MAX_TEXT: Final = 200
_NO_ANSWER: Final = "no answer to the self-test:"
_DEFAULT_ANSWERS: Final = {"127.0.0.2-127.0.0.254": 10.0}
_PART: Final = re.compile(r"\*|[0-9]{1,3}(?:-[0-9]{1,3})?")
_LOOPBACK: Final = 127 << 24
_NOT_LISTED: Final = DnsblResult()


class Pattern(NamedTuple):
    """A range of addresses, or a range for each of the four numbers; see `parse_pattern`."""

    low: int
    high: int
    parts: tuple[tuple[int, int], ...] = ()

    def matches(self, address: int) -> bool:
        """Return whether an IPv4 address is in it."""
        if not self.parts:
            return self.low <= address <= self.high
        octets = address.to_bytes(4, "big")
        return all(low <= octet <= high for octet, (low, high) in zip(octets, self.parts, strict=True))


def parse_pattern(text: str) -> Pattern:
    """Read "127.0.0.2", "127.0.0.2-127.0.0.9" or "127.0.*.1-3". Raise ValueError."""
    low, dash, high = text.partition("-")
    try:
        if "*" not in text and (not dash or high.count(".") == 3):
            first = int(ipaddress.IPv4Address(low))
            last = int(ipaddress.IPv4Address(high)) if dash else first
            if _LOOPBACK <= first <= last < _LOOPBACK + (1 << 24):
                return Pattern(first, last)
        else:
            parts = tuple(map(_parse_part, text.split(".")))
            if len(parts) == 4 and parts[0] == (127, 127):
                return Pattern(0, 0, parts)
    except ValueError:
        pass
    raise ValueError(f"{text!r} is not 127.0.0.2, 127.0.0.2-127.0.0.9 or 127.0.*.1-3, within 127.0.0.0/8")


def _parse_part(text: str) -> tuple[int, int]:
    if _PART.fullmatch(text) is None:
        raise ValueError(text)
    if text == "*":
        return 0, 255
    low, _, high = text.partition("-")
    first, last = int(low), int(high or low)
    if not first <= last <= 255:
        raise ValueError(text)
    return first, last


def is_error(address: int) -> bool:
    """Return whether an answer is an error message of a list, or no answer of a list at all."""
    return address >> 24 != 127 or address == _LOOPBACK + 1 or address >> 8 == _LOOPBACK + 0xFFFF00 >> 8


class _List:
    """One list and its state."""

    def __init__(self, settings: DnsblSettings, *, is_enforced: bool) -> None:
        """Raise ValueError for patterns that are none."""
        self.zone = comparable_domain(settings.zone)
        self.is_enforced = is_enforced
        self.breaker = Breaker(*_BREAKER, _BREAKER[1])
        self.is_usable = False
        """It has passed its self-test."""
        self.problem: str | None = None
        """Why it is not usable, as it was journaled."""
        self.failed = trio.Event()
        """An answer was an error: it is not usable."""
        self._scores = [(parse_pattern(text), score) for text, score in (settings.answers or _DEFAULT_ANSWERS).items()]

    def listing(self, answer: Answer) -> Listing | None:
        """Return what an answer means; None: not listed. Raise _BadAnswerError for an error."""
        addresses = [int.from_bytes(record, "big") for record in answer.records]
        bad = next(filter(is_error, addresses), None)
        if bad is not None:
            raise _BadAnswerError(f"the list has answered {ipaddress.IPv4Address(bad)}")
        score = sum(score for pattern, score in self._scores if any(map(pattern.matches, addresses)))
        if not any(pattern.matches(address) for pattern, _ in self._scores for address in addresses):
            return None
        return Listing(self.zone, tuple(str(ipaddress.IPv4Address(each)) for each in addresses), score)


class _BadAnswerError(Exception):
    """An answer that is an error message."""


def reversed_name(address: str) -> str:
    """Return the name of an address in a list: 2.0.0.127, or 32 nibbles (RFC 5782 2.1, 2.4)."""
    if ":" not in address:  # in canonical form: parsing it would cost as much as a question
        return ".".join(reversed(address.split(".")))
    return ipaddress.IPv6Address(address).reverse_pointer.removesuffix(".ip6.arpa")


async def find_problem(resolver: Resolver, zone: str) -> str:
    """Make the self-test of a list: 127.0.0.2 is listed, 127.0.0.1 is not (RFC 5782 5). Return the error, or ""."""
    listed = await resolver.query(f"2.0.0.127.{zone}", "A")
    unlisted = await resolver.query(f"1.0.0.127.{zone}", "A")
    if listed.is_failure or unlisted.is_failure:
        return f"{_NO_ANSWER} {listed.cause or unlisted.cause}"
    if not listed.records:
        return "127.0.0.2 is not listed"
    if unlisted.records:
        return "127.0.0.1 is listed"
    if any(is_error(int.from_bytes(record, "big")) for record in listed.records):
        return f"it has answered {', '.join(str(ipaddress.IPv4Address(record)) for record in listed.records)}"
    return ""


def make_checks(policy: PolicySettings, parts: Parts) -> list[Check]:
    """Return the check of all lists, if there are any. Raise ValueError for patterns that are none."""
    modes = [(each, policy.mode_of(each)) for each in policy.dnsbl]
    lists = [_List(each, is_enforced=mode == "enforce") for each, mode in modes if mode != "off"]
    return [Dnsbl(lists, policy, parts)] if lists else []


class _Lookup(Lookup[DnsblResult]):
    """The question about a client to all lists."""

    name = "dnsbl"

    def __init__(
        self,
        check: Dnsbl,
        asked: Sequence[_List],
        questions: Sequence[tuple[str, Kind]],
        pending: Pending[DnsblResult],
    ) -> None:
        super().__init__(pending)
        self._check = check
        self._asked = asked
        self._questions = questions
        self._batch: Batch | None = None

    def begin(self) -> None:
        self._batch = self._check.ask(self._asked, self._questions)

    async def finish(self, *, are_due: bool) -> None:
        if self._batch is not None:
            self.pending.set(self._check.take(self._asked, await self._batch.answers(are_due=are_due)))

    def close(self) -> None:
        if self._batch is not None:
            self._batch.abandon()
            if not self.pending.is_done:  # nothing was learnt about the lists
                for each in self._asked:
                    each.breaker.abandon()


class Dnsbl(Check):
    """All lists together. What those propose that may decide, and what all would together, are two proposals."""

    name = "dnsbl"
    mode = "enforce"
    failure = None
    awaits_lookups = True
    deadline = 2 * _SECONDS

    def __init__(self, lists: Sequence[_List], policy: PolicySettings, parts: Parts) -> None:
        self._lists = lists
        self._reject_above = policy.reject_above
        self._at_connect = policy.dnsbl_at.reject == "connect"
        self._resolver: Resolver = parts.resolver
        self._journal: Journal = parts.journal
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Test the lists, and run the tasks that ask. `started` when each was tested once, or after two seconds."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            with trio.move_on_after(_FIRST_TEST):
                async with trio.open_nursery() as first:
                    for each in self._lists:
                        first.start_soon(run_guarded, self._journal, self.name, self._test, each)
            for each in self._lists:
                nursery.start_soon(run_guarded, self._journal, self.name, self._keep_testing, each)
            task_status.started()
            await trio.sleep_forever()

    # ---- the self-test

    async def _keep_testing(self, each: _List) -> None:
        failures = 0
        while True:
            if each.is_usable:
                failures = 0
                with trio.move_on_after(_SELF_TEST):
                    await each.failed.wait()
                    each.failed = trio.Event()
                    failures = len(_RETRY)
            if not each.is_usable:
                await trio.sleep(_RETRY[min(failures, len(_RETRY) - 1)])
                failures += 1
            await run_guarded(self._journal, self.name, self._test, each)

    async def _test(self, each: _List) -> None:
        """Test a list. Without an answer, it stays what it was."""
        problem = await find_problem(self._resolver, each.zone)
        if not (each.is_usable and problem.startswith(_NO_ANSWER)):
            self._set_usable(each, problem)

    def _set_usable(self, each: _List, problem: str) -> None:
        """Use a list, or not because of a problem, and journal a change."""
        was_usable, each.is_usable = each.is_usable, not problem
        if problem and problem != each.problem:
            self._journal.list_failed(each.zone, problem)
        if not problem and not was_usable:
            self._journal.list_works(each.zone)
        each.problem = problem

    # ---- clients

    def on_connect(self, transaction: Transaction) -> FindingOrAwaitable:
        """Begin to ask; where listed clients get no greeting, wait for the answers. Cached answers need no task."""
        assert self._nursery is not None
        evidence = evidence_of(transaction)
        pending: Pending[DnsblResult] = evidence.begin("dnsbl")
        name, now = reversed_name(transaction.peer.address), trio.current_time()
        asked = [each for each in self._lists if each.is_usable and not each.breaker.blocks(now)]
        questions: list[tuple[str, Kind]] = [(f"{name}.{each.zone}", "A") for each in asked]
        known = [self._resolver.cached(*question) for question in questions]
        answers = [each for each in known if each is not None]
        if len(answers) == len(asked):
            pending.set(self._result(asked, answers))
        else:
            evidence.look_up(_Lookup(self, asked, questions, pending), self._nursery, self._journal)
        return self._judge_connection(transaction, pending) if self._at_connect else None

    def ask(self, asked: Sequence[_List], questions: Sequence[tuple[str, Kind]]) -> Batch:
        """Ask lists at once, each its question."""
        for each in asked:
            each.breaker.probe()
        return self._resolver.begin_all(questions, _SECONDS)

    def take(self, asked: Sequence[_List], answers: Sequence[Answer]) -> DnsblResult:
        """Return the result. Lists that have not answered in time are left out."""
        for each, answer in zip(asked, answers, strict=True):
            if answer.status == "failed":
                if each.breaker.failed(trio.current_time()):
                    self._journal.list_failed(each.zone, "no answers")
            elif each.breaker.succeeded():
                self._journal.list_works(each.zone)
        return self._result(asked, answers)

    def _result(self, asked: Sequence[_List], answers: Sequence[Answer]) -> DnsblResult:
        """Return what answers mean. A list whose answer is an error is not used any more."""
        found: list[Listing] = []
        for each, answer in zip(asked, answers, strict=True):
            if not answer.records:
                continue
            try:
                listing = each.listing(answer)
            except _BadAnswerError as exc:
                self._set_usable(each, str(exc))
                each.failed.set()
                continue
            if listing is not None:
                found.append(listing)
        return DnsblResult(tuple(found)) if found else _NOT_LISTED

    async def _judge_connection(self, transaction: Transaction, pending: Pending[DnsblResult]) -> Finding:
        found = await pending.get() or _NOT_LISTED
        refusal = await self._refusal(transaction, found)
        return None if refusal is None else [refusal]

    def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> FindingOrAwaitable:
        """Refuse a listed client. Its score is added once for a message, for the first recipient that is not exempt."""
        if recipient.path.local.lower() in _EXEMPT:
            return None
        evidence = evidence_of(transaction)
        pending: Pending[DnsblResult] | None = evidence.pending("dnsbl")
        if pending is None:
            return None
        if pending.is_done and not (pending.value or _NOT_LISTED).listings:
            transaction.results.dnsbl = _NOT_LISTED
            return None
        return self._judge_recipient(transaction, pending)

    async def _judge_recipient(self, transaction: Transaction, pending: Pending[DnsblResult]) -> Finding:
        found = await pending.get() or _NOT_LISTED
        is_first = transaction.results.dnsbl is None
        transaction.results.dnsbl = found
        refusal = await self._refusal(transaction, found)
        if not is_first or (refusal is not None and refusal.mode == "enforce"):
            return None if refusal is None else [refusal]
        enforced = self._score_of(found.listings, enforced=True)
        monitored = self._score_of(found.listings) - enforced
        proposals = [] if refusal is None else [refusal]
        if enforced:
            proposals.append(Proposal(self.name, "enforce", Mark(score=enforced)))
        if monitored:
            proposals.append(Proposal(self.name, "monitor", Mark(score=monitored)))
        return proposals or None

    def _score_of(self, listings: Sequence[Listing], *, enforced: bool = False) -> float:
        if not listings:
            return 0
        zones = {each.zone for each in self._lists if each.is_enforced or not enforced}
        return sum(each.score for each in listings if each.zone in zones)

    async def _refusal(self, transaction: Transaction, found: DnsblResult) -> Proposal | None:
        """Return the refusal of a client whose score is too high, in monitor mode if it needs lists that are."""
        enforced, everything = self._score_of(found.listings, enforced=True), self._score_of(found.listings)
        if max(enforced, everything) < self._reject_above:
            return None
        worst = max(found.listings, key=lambda each: each.score)
        text = await self._text_of(transaction.peer.address, worst.zone)
        causes = ", ".join(f"{each.zone}={'|'.join(each.answers)} ({each.score:g})" for each in found.listings)
        what = f"Client host {transaction.peer.literal} blocked using {worst.zone}"
        reply = Reply(554, "5.7.1", f"{what}; {text}" if text else what, cause=causes)
        return Proposal(self.name, "enforce" if enforced >= self._reject_above else "monitor", reply)

    async def _text_of(self, address: str, zone: str) -> str:
        """Return the reason that a list publishes (TXT), as printable ASCII."""
        answer: Answer | None = None
        with trio.move_on_after(_SECONDS):
            budget = Budget(self._resolver, seconds=_SECONDS)
            answer = await budget.query(f"{reversed_name(address)}.{zone}", "TXT")
        if answer is None or not answer.records:
            return ""
        text = answer.records[0].decode("latin-1")[:_MAX_TEXT]
        return "".join(char if " " <= char <= "~" else "?" for char in text)
