"""The built-in checks of a server, asked at each hook point by one guarded entry.

Rules
-----
1. A check finds something out; only the judge decides. It knows the mode of each check, and of each of its parts
   (`Proposal`): what one in monitor mode proposes is counted and journaled, and has no other effect.
2. Only an answer can condemn. A check that raises or misses its deadline has failed: the client gets 451, or the check
   is left out, as it declares (`Check.failure`). A failure never refuses for ever.
3. Clients in trusted networks, on unix sockets, and authenticated ones are not judged, except by checks that say so.
   Their messages lose forged Authentication-Results as well (RFC 8601 5).
4. Checks are asked in the order of MAKERS, cheap ones first; the first refusal that counts ends the asking.
5. A hook point without checks is an empty tuple, and costs nothing. A check that answers without waiting costs a call:
   there is no task, no deadline and no checkpoint.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from socket import inet_aton
from typing import Any, Final, Literal

import trio

from penstock.addresses import Network, parse_address, parse_network
from penstock.journal import EventCounters, Journal
from penstock.message import MailParameters, Message, Path, Recipient
from penstock.policy import (
    authentication,
    delegate,
    dnsbl,
    fcrdns,
    greylist,
    milter,
    pregreet,
    rates,
    rspamd,
    senderlogin,
    signing,
)
from penstock.policy.asking import WAIT, Asked, Later, Verdict, ask_in_order
from penstock.policy.base import Mark
from penstock.policy.check import Check, Edited, Mode, Parts, Proposal
from penstock.policy.evidence import Evidence, Watcher, evidence_of
from penstock.policy.scores import BEFORE_MAIL, apply_mark
from penstock.policy.settings import PolicySettings
from penstock.reply import Reply
from penstock.results import Results
from penstock.transaction import Transaction

Maker = Callable[[PolicySettings, Parts], Sequence[Check]]
MAKERS: Final[tuple[Maker, ...]] = (
    pregreet.make_checks,
    dnsbl.make_checks,
    fcrdns.make_checks,
    senderlogin.make_checks,
    authentication.make_checks,
    greylist.make_checks,
    delegate.make_checks,
    milter.make_checks,
    rspamd.make_checks,
    signing.make_checks,  # after all that changes the message
    rates.make_checks,  # last: what it takes for a message is given back if something else refuses it
)
"""What makes the checks of the settings, in the order in which they are asked."""

_WOULD_CHANGE: Final = Reply(250, "2.0.0", "The message would be changed")
_WOULD_QUARANTINE: Final = Reply(250, "2.0.0", "The message would be quarantined")
"""What checks in monitor mode propose besides refusals, for the journal."""

_FINDINGS: Final = (Reply, Mark, list, Edited)
"""What checks return that need no wait; asking whether something can be awaited costs more."""
_Told = tuple[Check, Callable[..., Any]]


class _Asker:
    """One check, as it is asked at a hook point."""

    __slots__ = ("_judge", "check")

    def __init__(self, check: Check, judge: Judge) -> None:
        self.check = check
        self._judge = judge

    async def ask(
        self, method: Callable[..., Any], hook_point: str, transaction: Transaction, *arguments: object
    ) -> Reply | None:
        """Return what counts of the verdict of the check."""
        judge, check = self._judge, self.check
        if not judge.applies(check, transaction):
            return None
        if check.awaits_lookups and hook_point == "on_rcpt":
            await evidence_of(transaction).wait()
        answer = await judge.guarded(check, method, hook_point, transaction, *arguments)
        return None if answer is None else judge.weigh(check, hook_point, transaction, answer)


class Judge:
    """The checks of a server. Attributes named like hook points hold the checks that have the hook."""

    def __init__(self, settings: PolicySettings, checks: Sequence[Check], journal: Journal) -> None:
        self.checks = tuple(checks)
        self.settings = settings
        self._journal = journal
        self._modes = modes_of(settings)
        self._counting: dict[tuple[str, str], Callable[[], None]] = {}
        """What counts the results of checks, by check and result: all have few values."""
        self._trusted: tuple[Network, ...] = tuple(map(parse_network, settings.trusted))
        self._trusted_v4 = tuple(
            (int(each.network_address), int(each.netmask)) for each in self._trusted if each.version == 4
        )
        """Numbers of networks and their masks: to parse an address costs more than to compare it."""
        askers = [_Asker(check, self) for check in checks]

        def asked(hook_point: str) -> tuple[Asked, ...]:
            return tuple(
                (each, getattr(each.check, hook_point)) for each in askers if _overrides(each.check, hook_point)
            )

        def told(hook_point: str) -> tuple[_Told, ...]:
            return tuple((check, getattr(check, hook_point)) for check in checks if _overrides(check, hook_point))

        self.connect = asked("on_connect")
        self.helo = asked("on_helo")
        self.mail = asked("on_mail")
        self.rcpt = asked("on_rcpt")
        self.message = told("on_message")
        self._mail = told("on_mail")
        self._data = told("on_data")
        self._authentication = next((each for each in checks if isinstance(each, authentication.Authentication)), None)
        self.removes_forged = self._authentication is not None
        """Messages lose the Authentication-Results fields that claim our name."""
        self._pregreet = next((each for each in checks if isinstance(each, pregreet.Pregreet)), None)
        self._refused = told("on_refused")
        self._accepted = told("on_accepted")
        self._disconnect = told("on_disconnect")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what the checks do in the background, until cancelled."""
        async with trio.open_nursery() as nursery:
            for check in self.checks:
                if type(check).run is not Check.run:
                    await nursery.start(check.run)
            task_status.started()
            await trio.sleep_forever()

    # ---- the hook points

    def pregreet_of(self, transaction: Transaction) -> tuple[pregreet.Pregreet, float] | None:
        """Return the check of what comes before the greeting, and how many seconds this client has to wait."""
        check = self._pregreet
        if check is None or not self.applies(check, transaction):
            return None
        seconds = check.seconds(transaction)
        return (check, seconds) if seconds else None

    def spoke_early(self, transaction: Transaction) -> Reply | None:
        """Judge a client that has not waited for the greeting."""
        assert self._pregreet is not None
        return self.weigh(self._pregreet, "on_connect", transaction, pregreet.REFUSAL)

    async def on_connect(self, transaction: Transaction) -> Reply | None:
        """Judge a client by its address. None is a yes."""
        return await ask_in_order(self.connect, "on_connect", transaction)

    async def on_helo(self, transaction: Transaction, name: str) -> Reply | None:
        """Judge the name a client gives itself."""
        return await ask_in_order(self.helo, "on_helo", transaction, name)

    async def on_mail(self, transaction: Transaction, sender: Path, parameters: MailParameters) -> Reply | None:
        """Judge a reverse-path."""
        return await ask_in_order(self.mail, "on_mail", transaction, sender, parameters)

    def mail_now(
        self, transaction: Transaction, sender: Path, parameters: MailParameters
    ) -> Reply | Literal[Later.WAIT] | None:
        """Judge a reverse-path as `on_mail` does, without a task; return WAIT if a check has to wait, or raises.

        Then nothing has been decided or counted, and `on_mail` asks again.
        """
        found: list[tuple[Check, Any]] = []
        for check, method in self._applying(self._mail, transaction):
            try:
                answer = method(transaction, sender, parameters)
            except Exception:  # noqa: BLE001 - `guarded` meets it again, and journals it
                return WAIT
            if answer is None:
                continue
            if not isinstance(answer, _FINDINGS) and inspect.isawaitable(answer):
                if isinstance(answer, Coroutine):
                    answer.close()
                return WAIT
            found.append((check, answer))
        if not found:
            return None
        verdict = Verdict()
        for check, answer in found:
            if verdict.take(self.weigh(check, "on_mail", transaction, answer)):
                break
        return verdict.reply

    async def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> Reply | None:
        """Judge a forward-path."""
        return await ask_in_order(self.rcpt, "on_rcpt", transaction, recipient)

    def begin(self, transaction: Transaction) -> Watcher | None:
        """Return what looks at the message that begins, if anything does."""
        evidence = evidence_of(transaction)
        evidence.watch(None)
        for _, method in self._applying(self._data, transaction):
            evidence.watch(method(transaction))
        return evidence.watcher

    async def on_message(self, transaction: Transaction, message: Message) -> tuple[Reply | None, Message]:
        """Judge a whole message. Return the verdict, and the message as the checks have changed it."""
        verdict = Verdict()
        asked = self._applying(self.message, transaction)
        reads = self._authentication
        if asked is not self.message and reads is not None and not self.applies(reads, transaction):
            refusal, message = await self.remove_forged(message)
            if refusal is not None:
                return refusal, message
        for check, method in asked:
            answer = await self.guarded(check, method, "on_message", transaction, message)
            if isinstance(answer, Edited):
                if check.mode == "enforce":
                    message = answer.message
                else:
                    self._note_monitored(transaction, check.name, "on_message", "change", _WOULD_CHANGE)
                answer = answer.verdict
            elif answer is None and check is self._authentication:  # it has failed, and is left out
                answer, message = await self.remove_forged(message)
            if answer is not None and verdict.take(self.weigh(check, "on_message", transaction, answer)):
                break
        return verdict.reply, message

    async def remove_forged(self, message: Message) -> tuple[Reply | None, Message]:
        """Return a message that is not checked, without the fields that claim our name. It may be refused."""
        check = self._authentication
        if check is None:
            return None, message
        found = await self.guarded(check, check.remove_forged, "on_message", message)
        return (None, found) if isinstance(found, Message) else (found, message)

    def conclude(self, transaction: Transaction, message: Message, verdict: Reply | None) -> None:
        """Count and journal what was found for a message, if anything was."""
        if not transaction.has_results:
            return
        results, counters = transaction.results, self._journal.counters
        if counters is not None:
            for found in found_by_check(results):
                count = self._counting.get(found)
                if count is None:
                    count = self._counting[found] = self._counting_of(counters, *found)
                count()
        if not self._journal.logs_mail:
            return
        if verdict is not None and not verdict.accepts:
            action = "reject" if verdict.is_permanent else "defer"
        else:
            action = "quarantine" if results.quarantine else "accept"
        self._journal.judged(transaction.number, transaction.peer, message.id, action, results.score, summary(results))

    def _counting_of(self, counters: EventCounters, check: str, result: str) -> Callable[[], None]:
        """Return what counts a result of a check."""
        mode = self._modes[check]
        if mode == "off":
            return lambda: None
        return counters.counting("policy_results_total", check=check, result=result, mode=mode)

    def refused(self, transaction: Transaction, hook_point: str) -> None:
        """Tell the checks that count that something was refused which they may have let pass."""
        self._tell(self._refused, "on_refused", transaction, hook_point)

    def answered(self, transaction: Transaction, message: Message, reply: Reply) -> None:
        """Tell the checks that count what the delivery has said to a message that they let pass."""
        if not reply.accepts:
            self.refused(transaction, "on_message")
            return
        self._tell(self._accepted, "on_accepted", transaction, message)

    def close(self, transaction: Transaction, evidence: Evidence) -> None:
        """Tell the checks that a connection has ended, and stop what they do for it."""
        evidence.close()
        self._tell(self._disconnect, "on_disconnect", transaction)

    def _tell(self, told: tuple[_Told, ...], hook_point: str, *arguments: object) -> None:
        """Tell checks what has happened. It has happened: a check that raises changes nothing."""
        for check, method in told:
            try:
                method(*arguments)
            except Exception as exc:  # noqa: BLE001 - a bug of a check
                self._journal.hook_failed(check.name, hook_point, f"{type(exc).__name__}: {exc}")

    # ---- one check

    def applies(self, check: Check, transaction: Transaction) -> bool:
        """Return whether a check is asked about a client."""
        if transaction.identity is not None:
            return check.judges_authenticated
        return check.judges_trusted or not self.is_trusted(transaction)

    def _applying(self, told: tuple[_Told, ...], transaction: Transaction) -> tuple[_Told, ...]:
        """Return those of some checks that are asked about a client: all of them, about most clients."""
        if transaction.identity is None and not self.is_trusted(transaction):
            return told
        return tuple(each for each in told if self.applies(each[0], transaction))

    def is_trusted(self, transaction: Transaction) -> bool:
        """Return whether a client is in a trusted network, or on a unix socket."""
        evidence = evidence_of(transaction)
        found = evidence.is_trusted
        if found is None:
            address = transaction.peer.address
            if not address:
                found = True
            elif ":" in address:
                found = any(parse_address(address) in network for network in self._trusted)
            else:
                number = int.from_bytes(inet_aton(address), "big")
                found = any(number & mask == network for network, mask in self._trusted_v4)
            evidence.is_trusted = found
        return found

    async def guarded(self, check: Check, method: Callable[..., Any], hook_point: str, *arguments: object) -> Any:
        """Return what a check finds, or what follows from its failure."""
        try:
            answer = method(*arguments)
            if answer is None or isinstance(answer, _FINDINGS) or not inspect.isawaitable(answer):
                return answer
            return await self.awaited(check, hook_point, answer)
        except Exception as exc:  # noqa: BLE001 - a bug of a check costs this answer and nothing else
            return self.failed(check, hook_point, exc)

    async def awaited(self, check: Check, hook_point: str, answer: Awaitable[Any]) -> Any:
        """Return what a check finds within its deadline, or what follows from missing it. Raise its exceptions."""
        began = trio.current_time()
        try:
            # As in pipeline.py: a `try` for exceptions of the check is outside of the scope.
            with trio.move_on_after(check.deadline):
                return await answer
        finally:
            if self._journal.counters is not None:
                seconds = trio.current_time() - began
                self._journal.counters.observe("policy_seconds", seconds, check=check.name, milestone=hook_point)
        return self.failed(check, hook_point, None)

    def failed(self, check: Check, hook_point: str, exc: Exception | None) -> Reply | None:
        """Note that a check has raised, or missed its deadline; return what follows."""
        cause = f"no answer within {check.deadline:g} s" if exc is None else f"{type(exc).__name__}: {exc}"
        self._journal.hook_failed(check.name, hook_point, cause)
        return None if check.failure is None else check.failure.because(f"{check.name}: {cause}")

    def weigh(self, check: Check, hook_point: str, transaction: Transaction, finding: object) -> Reply | None:
        """Return what counts of a finding: the most severe reply of its parts."""
        if not isinstance(finding, list):
            assert isinstance(finding, Reply | Mark | None), f"{check.name} returns {finding!r}"
            finding = [] if finding is None else [Proposal(check.name, check.mode, finding)]
        kept: Reply | None = None
        for each in finding:
            reply = self._weigh_part(each, hook_point, transaction)
            if reply is not None and (kept is None or reply.code > kept.code):
                kept = reply
        return kept

    def _weigh_part(self, part: Proposal, hook_point: str, transaction: Transaction) -> Reply | None:
        check, mode, verdict, cause = part
        is_monitored = mode != "enforce"
        if isinstance(verdict, Mark):
            kind = "quarantine" if verdict.quarantine else "mark"
            if is_monitored and verdict.quarantine:
                self._note_monitored(transaction, check, hook_point, kind, _WOULD_QUARANTINE.because(cause))
            else:
                self._count(check, kind, is_monitored=is_monitored)
            if hook_point in BEFORE_MAIL:
                evidence_of(transaction).keep_mark(check, verdict, is_monitored=is_monitored)
            else:
                apply_mark(transaction, check, verdict, is_monitored=is_monitored)
            return None
        kind = "accept" if verdict.accepts else "reject" if verdict.is_permanent else "defer"
        if is_monitored:
            self._note_monitored(transaction, check, hook_point, kind, verdict)
            return None
        self._count(check, kind, is_monitored=False)
        return verdict

    def _note_monitored(self, transaction: Transaction, check: str, hook_point: str, kind: str, reply: Reply) -> None:
        """Count and journal what a check in monitor mode would have done."""
        self._count(check, kind, is_monitored=True)
        self._journal.monitored(transaction.number, transaction.peer, check, hook_point, reply)

    def _count(self, check: str, kind: str, *, is_monitored: bool) -> None:
        if self._journal.counters is not None:
            name = "policy_would_total" if is_monitored else "policy_verdicts_total"
            self._journal.counters.count(name, check=check, verdict=kind)


def make_checks(settings: PolicySettings, parts: Parts) -> list[Check]:
    """Return the checks that the settings ask for, in the order of MAKERS."""
    return [check for make in MAKERS for check in make(settings, parts)]


def _overrides(check: Check, hook_point: str) -> bool:
    return getattr(type(check), hook_point) is not getattr(Check, hook_point)


def modes_of(policy: PolicySettings) -> dict[str, Mode]:
    """Return the modes of the checks whose results are counted."""
    lists = {policy.mode_of(each) for each in policy.dnsbl}
    return {
        "fcrdns": policy.mode_of(policy.fcrdns),
        "dnsbl": "enforce" if "enforce" in lists else "monitor",
        "spf": policy.mode_of(policy.spf, by_default=True),
        "dkim": policy.mode_of(policy.dkim, by_default=True),
        "dmarc": policy.mode_of(policy.dmarc, by_default=True),
        "arc": "monitor",  # it decides nothing
    }


def found_by_check(results: Results) -> list[tuple[str, str]]:
    """Return the names of checks with what they have found, for the statistics: both have few values."""
    found: list[tuple[str, str]] = []
    if results.iprev is not None:
        found.append(("fcrdns", results.iprev.result))
    if results.dnsbl is not None:
        found.append(("dnsbl", "listed" if results.dnsbl.listings else "unlisted"))
    if results.spf is not None:
        found.append(("spf", results.spf.result))
    dmarc, arc, dkim = results.dmarc, results.arc, results.dkim
    if dmarc is not None or arc is not None:  # the message was read
        found += [("dkim", each.result) for each in dkim]
        if not dkim:
            found.append(("dkim", "none"))
    if dmarc is not None:
        found.append(("dmarc", dmarc.result))
    if arc is not None:
        found.append(("arc", arc.result))
    return found


def summary(results: Results) -> str:
    """Return what was found in a line: "iprev=pass,spf=pass,dkim=pass:example.org,dmarc=pass"."""
    found: list[str] = []
    if results.iprev is not None:
        found.append("iprev=" + results.iprev.result)
    if results.spf is not None:
        found.append("spf=" + results.spf.result)
    found += ["dkim=" + each.result + ":" + each.domain for each in results.dkim]
    if results.dmarc is not None:
        found.append("dmarc=" + results.dmarc.result)
    if results.arc is not None and results.arc.result != "none":
        found.append("arc=" + results.arc.result)
    if results.scores:
        found += [f"{name}={score:g}" for name, score in results.scores.items()]
    if results.monitored_scores:
        found += [f"({name}={score:g})" for name, score in results.monitored_scores.items()]
    return ",".join(found)
