"""SPF, DKIM, DMARC and ARC of messages, and the Authentication-Results field (penstock.mailauth).

SPF is checked at MAIL. The header is read as soon as it is complete; keys and policies are asked for while the body
still arrives, and the body is hashed piece by piece. The rest is done at the end of the message: nothing is read twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import trio

from penstock.addresses import comparable_domain
from penstock.dns import Budget, Kind, Resolver
from penstock.journal import Journal
from penstock.mailauth import Decision, DecisionSettings, Findings, Judgement, MessageCheck, MethodResult, Told, spf
from penstock.mailauth.decision import NOTHING, Decisions, decide
from penstock.mailauth.header import Field, Header
from penstock.mailauth.results import NAME, forged_fields
from penstock.mailauth.spf import SpfResult
from penstock.message import MailParameters, Message, Path
from penstock.policy.aggregate import Reporter
from penstock.policy.base import Mark
from penstock.policy.check import (
    Check,
    Edited,
    Finding,
    FindingOrAwaitable,
    MessageFinding,
    MessageFindingOrAwaitable,
    Mode,
    Parts,
    Proposal,
)
from penstock.policy.evidence import Evidence, evidence_of, run_guarded
from penstock.policy.milter import split_body
from penstock.policy.overlay import Edit, EditedBody
from penstock.policy.settings import DmarcSettings, PolicySettings
from penstock.reply import Reply
from penstock.results import IprevResult
from penstock.transaction import Transaction

_SECONDS: Final = 20.0
"""Time for all questions at MAIL, and again for those at the end of the message (RFC 7208 4.6.4)."""
_MONITOR_SECONDS: Final = 5.0
"""The same where nothing is refused: mail must not wait long for what changes nothing."""
_MAX_HEADER: Final = 1 << 18
"""Maximum octets of a header; a longer one cannot be judged, and is refused."""
TOO_LONG: Final = Reply(550, "5.6.0", "The header is too long to be read", cause="header too long")
_MAX_HELD: Final = 64 << 20
"""Octets of the headers of all messages that are arriving; beyond them the check of a message has failed."""
_SHARE: Final = 1 << 15
"""Octets of the header of one message that are kept in any case while less than `_MAX_HELD` is; more of them are kept
until half of it is."""


def decision_settings(policy: PolicySettings) -> DecisionSettings:
    """Return how much each of SPF, DKIM and DMARC may decide."""
    dmarc = policy.dmarc or DmarcSettings()
    on_fail = dmarc.on_fail
    return DecisionSettings(
        spf=policy.mode_of(policy.spf, by_default=True),
        dkim=policy.mode_of(policy.dkim, by_default=True),
        dmarc=policy.mode_of(policy.dmarc, by_default=True),
        require_aligned=policy.dkim is not None and policy.dkim.require_aligned,
        on_fail={"reject": on_fail.reject, "quarantine": on_fail.quarantine, "none": on_fail.none},
        temperror=dmarc.temperror,
        trusted_sealers=frozenset(map(comparable_domain, dmarc.trusted_sealers)),
    )


def make_checks(policy: PolicySettings, parts: Parts) -> list[Check]:
    """Return the check, unless all of it is off."""
    settings = decision_settings(policy)
    modes = (settings.spf, settings.dkim, settings.dmarc, policy.mode_of(policy.fcrdns))
    if set(modes) == {"off"}:
        return []
    check = Authentication(settings, parts)
    if policy.dmarc is not None and policy.dmarc.reports == "daily" and parts.send is not None:
        check.reporter = Reporter(
            parts.resolver,
            parts.send,
            parts.journal,
            hostname=parts.hostname,
            contact=policy.dmarc.contact,
            file=parts.data_dir / f"{parts.spool_name}.dmarc.json",
        )
    return [check]


class _MessageWatcher:
    """Reads a message while it arrives (penstock.policy.evidence.Watcher)."""

    __slots__ = ("_authentication", "_check", "_error", "_held", "_scope", "_start", "budget", "is_too_long")

    def __init__(self, authentication: Authentication) -> None:
        self._authentication = authentication
        self._start = b""
        self._check: MessageCheck | None = None
        self._error: Exception | None = None
        self._scope: trio.CancelScope | None = None
        """That of the questions asked ahead, once they are asked."""
        self.budget: Budget | None = None
        """That of the message, once something was asked."""
        self._held = 0
        """Octets of a header that are counted in `Authentication.held`."""
        self.is_too_long = False
        """The header is longer than what is read."""

    def feed(self, chunk: bytes) -> None:
        """Take the next octets of the message."""
        if self._error is not None:
            return
        try:
            self._feed(chunk)
        except Exception as exc:  # noqa: BLE001 - the connection goes on; `finish` raises it
            self.close()
            self._error = exc

    def _feed(self, chunk: bytes) -> None:
        check = self._check
        if check is not None:
            if self._scope is None:  # the body comes in several pieces: time to ask meanwhile
                self._scope = trio.CancelScope()
                self.budget = self._authentication.ask_ahead(check, self._scope)
            check.feed(chunk)
            return
        before = len(self._start)
        start = self._start + chunk if before else chunk
        if start.startswith(b"\r\n"):
            end, body = 0, 2
        else:
            found = start.find(b"\r\n\r\n", max(0, before - 3))
            end, body = found + 2, found + 4
            if found < 0:
                if len(start) <= _MAX_HEADER:
                    self._hold(len(start))
                    self._start = start
                    return
                self.is_too_long = True
                end = body = len(start)
        self._start = b""
        self._hold(end)
        self._check = self._authentication.open(start[:end])
        self._check.feed(memoryview(start)[body:])

    def _hold(self, octets: int) -> None:
        """Count the octets of the header that are kept. Raise MemoryError if all messages together keep too many.

        Clients that keep long headers unfinished must not take the check away from ordinary messages.
        """
        authentication = self._authentication
        authentication.held += octets - self._held
        self._held = octets
        if authentication.held > (_MAX_HELD // 2 if octets > _SHARE else _MAX_HELD):
            raise MemoryError("the headers of all messages that are arriving are too large")

    def close(self) -> None:
        """Give the header back, and stop what is asked for the message."""
        if self._scope is not None:
            self._scope.cancel()
        self._authentication.held -= self._held
        self._held = 0
        self._start = b""
        self._check = None

    def finish(self) -> MessageCheck:
        """Return the checks of the whole message. Raise their exceptions."""
        if self._error is not None:
            raise self._error
        if self._check is None:  # a message without a body, and without the empty line
            self._check = self._authentication.open(self._start)
        return self._check


class Authentication(Check):
    """The check. Each of its parts has a mode of its own; the header field is written in any."""

    name = "authentication"
    mode = "enforce"

    def __init__(self, settings: DecisionSettings, parts: Parts, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        is_enforced = "enforce" in (settings.spf, settings.dkim, settings.dmarc)
        if not is_enforced:
            self.failure = None  # it refuses nothing, and neither does its failure
        self._seconds = _SECONDS if is_enforced else _MONITOR_SECONDS
        self.deadline = 2 * self._seconds
        self._hostname = parts.hostname
        self._resolver: Resolver = parts.resolver
        self._journal: Journal = parts.journal
        self._clock = clock
        self._nursery: trio.Nursery | None = None
        self.held = 0
        """Octets of the headers of messages that are arriving."""
        self.reporter: Reporter | None = None
        """What sends reports to the owners of domains."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the tasks that ask ahead."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self.reporter is not None:
                nursery.start_soon(run_guarded, self._journal, self.name, self.reporter.run)
            task_status.started()
            await trio.sleep_forever()

    def on_mail(self, transaction: Transaction, sender: Path, parameters: MailParameters) -> FindingOrAwaitable:  # noqa: ARG002 - the interface
        """Check SPF. Without DMARC it may refuse. It waits only if answers have to be asked for."""
        if self._settings.spf == "off":
            return None
        asked: dict[str, Any] = {
            "address": transaction.peer.address,
            "sender": f"{sender.local}@{sender.domain}" if sender.domain else "",
            "helo": transaction.hello,
            "receiver": self._hostname,
            "now": int(self._clock()),
        }
        found = spf.check_known(self._resolver.cached, **asked)
        return self._ask_spf(transaction, asked) if found is None else self._note_spf(transaction, found)

    async def _ask_spf(self, transaction: Transaction, asked: dict[str, Any]) -> Finding:
        query = Budget(self._resolver, seconds=self._seconds).query
        return self._note_spf(transaction, await spf.check(query, **asked))

    def _note_spf(self, transaction: Transaction, found: SpfResult) -> Finding:
        transaction.results.spf = found
        if self._settings.dmarc != "off":
            return None
        only_spf = DecisionSettings(spf=self._settings.spf, dkim="off", dmarc="off", temperror=self._settings.temperror)
        return _proposals(decide(Findings((), 0, found), only_spf))

    def on_data(self, transaction: Transaction) -> _MessageWatcher:  # noqa: ARG002 - the interface
        """Return what reads the message."""
        return _MessageWatcher(self)

    def open(self, header: bytes) -> MessageCheck:
        """Begin the checks of a message whose header is complete."""
        return MessageCheck(header, self._settings, now=int(self._clock()))

    def ask_ahead(self, check: MessageCheck, scope: trio.CancelScope) -> Budget | None:
        """Ask for keys and policies, so that the answers are there at the end of the message.

        Return the budget of the message, if something is asked. Cancelling the scope ends the questions.
        """
        hints = [hint for hint in check.hints if self._resolver.cached(*hint) is None]
        if not hints or self._nursery is None:
            return None
        budget = Budget(self._resolver, seconds=self._seconds)
        self._nursery.start_soon(run_guarded, self._journal, self.name, _ask_ahead, budget, hints, scope)
        return budget

    def on_message(self, transaction: Transaction, message: Message) -> MessageFindingOrAwaitable:
        """Finish the checks, decide, add our header field and leave out those that claim our name."""
        evidence = evidence_of(transaction)
        watcher = evidence.watcher
        assert isinstance(watcher, _MessageWatcher)
        try:
            finding = self._judge_now(transaction, evidence, watcher, message)
        except BaseException:
            evidence.watch(None)
            raise
        if finding is None:
            return self._judge(transaction, evidence, watcher, message)
        evidence.watch(None)
        return finding

    def _judge_now(
        self, transaction: Transaction, evidence: Evidence, watcher: _MessageWatcher, message: Message
    ) -> MessageFinding:
        """Judge a message about which all is known; return None where something has to be waited for."""
        check = watcher.finish()
        pending = evidence.pending("iprev")
        if pending is not None and not pending.is_done:
            return None
        iprev = None if pending is None else pending.value or IprevResult("temperror")
        judgement = check.finish_known(self._resolver.cached, self._told(transaction, message, iprev))
        return None if judgement is None else self._conclude(transaction, message, judgement, watcher, iprev)

    def _told(self, transaction: Transaction, message: Message, iprev: IprevResult | None) -> Told:
        return Told(
            self._hostname,
            transaction.results.spf,
            message.envelope.sender.ascii_text,
            transaction.hello,
            iprev_method(iprev, transaction.peer.address),
        )

    async def remove_forged(self, message: Message) -> Message | Reply:
        """Leave out the fields that claim our name, of a message that is not checked (RFC 8601 5)."""
        octets, end = await split_body(message)
        if octets and end == len(octets) and end < message.body.size:  # without any, what was sent is no header
            return TOO_LONG
        if NAME not in octets.lower():
            return message
        return _without(message, forged_fields(Header(octets), self._hostname))

    async def _judge(
        self, transaction: Transaction, evidence: Evidence, watcher: _MessageWatcher, message: Message
    ) -> MessageFinding:
        """Judge a message, and ask what is not known."""
        try:
            check = watcher.finish()
            iprev = await _iprev_of(evidence)
            budget = watcher.budget or Budget(self._resolver, seconds=self._seconds)
            budget.restart(self._seconds)
            await budget.ask_ahead(check.hints)
            told = self._told(transaction, message, iprev)
            judgement = check.finish_known(self._resolver.cached, told) or await check.finish(
                budget.query, **told._asdict()
            )
        finally:
            evidence.watch(None)
        return self._conclude(transaction, message, judgement, watcher, iprev)

    def _conclude(
        self,
        transaction: Transaction,
        message: Message,
        judgement: Judgement,
        watcher: _MessageWatcher,
        iprev: IprevResult | None,
    ) -> MessageFinding:
        """Note the results, and return what they mean for the message."""
        results = transaction.results
        results.iprev = iprev
        _, _, _, results.dkim, results.dmarc = judgement.findings
        results.arc = judgement.arc
        decisions = judgement.decisions
        if watcher.is_too_long:  # in every mode: fields that claim our name could not be left out
            refusal = Decision("reject", "from", 550, "5.6.0", TOO_LONG.text, TOO_LONG.cause)
            decisions = Decisions(refusal, decisions.monitored)
        if self.reporter is not None and decisions.enforced.action != "defer":  # a deferred message comes again
            sender = message.envelope.sender.domain
            self.reporter.count(transaction.peer.address, sender, results, decisions.enforced)
        prefix = judgement.header_field + message.prefix
        message = Message(message.id, message.envelope, prefix, message.body, message.received_at)
        return Edited(_without(message, judgement.forged), None if decisions is NOTHING else _proposals(decisions))


async def _ask_ahead(budget: Budget, questions: Sequence[tuple[str, Kind]], scope: trio.CancelScope) -> None:
    with scope:
        await budget.ask_ahead(questions)


def _without(message: Message, fields: Sequence[Field]) -> Message:
    """Return a message without fields of its header."""
    if not fields:
        return message
    return message._replace(body=EditedBody(message.body, [Edit(field.start, field.stop) for field in fields]))


def _proposals(decisions: Decisions) -> list[Proposal] | None:
    """Return what the parts of the check propose that may decide, and those that monitor."""
    parts: tuple[tuple[Decision, Mode], ...] = ((decisions.enforced, "enforce"), (decisions.monitored, "monitor"))
    found: list[Proposal] = []
    for decision, mode in parts:
        if decision.action != "accept":
            found.append(Proposal(decision.check, mode, _verdict(decision), decision.cause))
    return found or None


def _verdict(decision: Decision) -> Reply | Mark:
    if decision.action == "quarantine":
        return Mark(quarantine=True)
    return Reply(decision.code, decision.status, decision.text, cause=decision.cause)


async def _iprev_of(evidence: Evidence) -> IprevResult | None:
    """Return what the check of the client's name has found, if it is made."""
    pending = evidence.pending("iprev")
    return None if pending is None else await pending.get() or IprevResult("temperror")


def iprev_method(iprev: IprevResult | None, address: str) -> Sequence[MethodResult]:
    """Return the first result of the field, if that check was made."""
    return () if iprev is None else (MethodResult("iprev", iprev.result, (("smtp.remote-ip", address),)),)
