"""The built-in checks of a server, asked at each hook point by one guarded entry.

Rules
-----
1. A check finds something out; only the judge decides. It knows the mode of each check: what one in monitor mode
   proposes is counted and journaled, and has no other effect.
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
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import trio

from penstock.addresses import Network, parse_address, parse_network
from penstock.journal import Journal
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
from penstock.policy.base import Mark
from penstock.policy.check import HOOK_POINTS, Check, Edited, Parts
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

_Asked = tuple[Check, Callable[..., Any]]


class Judge:
    """The checks of a server. Attributes named like hook points hold the checks that have the hook."""

    def __init__(self, settings: PolicySettings, checks: Sequence[Check], journal: Journal) -> None:
        self.checks = tuple(checks)
        self.settings = settings
        self.counts: Counter[tuple[str, str, str]] = Counter()
        """How often a check has proposed something: (check, mode, "refuse", "mark", "edit" or "failure")."""
        self._journal = journal
        self._trusted: tuple[Network, ...] = tuple(map(parse_network, settings.trusted))
        found = {
            point: tuple((each, getattr(each, point)) for each in checks if _overrides(each, point))
            for point in HOOK_POINTS
        }
        self.connect: tuple[_Asked, ...] = found["on_connect"]
        self.helo: tuple[_Asked, ...] = found["on_helo"]
        self.mail: tuple[_Asked, ...] = found["on_mail"]
        self.rcpt: tuple[_Asked, ...] = found["on_rcpt"]
        self.message: tuple[_Asked, ...] = found["on_message"]
        self._data = found["on_data"]
        self._authentication = next((each for each in checks if isinstance(each, authentication.Authentication)), None)
        self.removes_forged = self._authentication is not None
        """Messages lose the Authentication-Results fields that claim our name."""
        self._pregreet = next((each for each in checks if isinstance(each, pregreet.Pregreet)), None)
        self._refused = found["on_refused"]
        self._accepted = found["on_accepted"]
        self._disconnect = found["on_disconnect"]

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
        if check is None or not self._applies(check, transaction, evidence_of(transaction)):
            return None
        seconds = check.seconds(transaction)
        return (check, seconds) if seconds else None

    async def on_connect(self, transaction: Transaction) -> Reply | None:
        """Judge a client by its address. None is a yes."""
        return await self._ask(self.connect, "on_connect", transaction)

    async def on_helo(self, transaction: Transaction, name: str) -> Reply | None:
        """Judge the name a client gives itself."""
        return await self._ask(self.helo, "on_helo", transaction, name)

    async def on_mail(self, transaction: Transaction, sender: Path, parameters: MailParameters) -> Reply | None:
        """Judge a reverse-path."""
        return await self._ask(self.mail, "on_mail", transaction, sender, parameters)

    async def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> Reply | None:
        """Judge a forward-path."""
        return await self._ask(self.rcpt, "on_rcpt", transaction, recipient)

    def begin(self, transaction: Transaction) -> Watcher | None:
        """Return what looks at the message that begins, if anything does."""
        evidence = evidence_of(transaction)
        evidence.watch(None)
        for check, method in self._data:
            if self._applies(check, transaction, evidence):
                evidence.watch(method(transaction))
        return evidence.watcher

    async def on_message(self, transaction: Transaction, message: Message) -> tuple[Reply | None, Message]:
        """Judge a whole message. Return the verdict, and the message as the checks have changed it."""
        kept: Reply | None = None
        evidence = evidence_of(transaction)
        if self._authentication is not None and not self._applies(self._authentication, transaction, evidence):
            refusal, message = await self.remove_forged(message)
            if refusal is not None:
                return refusal, message
        for check, method in self.message:
            if not self._applies(check, transaction, evidence):
                continue
            answer = await self._guarded(check, method, "on_message", transaction, message)
            if isinstance(answer, Edited):
                self.counts[check.name, check.mode, "edit"] += 1
                if check.mode == "enforce":
                    message = answer.message
                else:
                    self._journal.monitored(
                        transaction.number, transaction.peer, check.name, "on_message", _WOULD_CHANGE
                    )
                answer = answer.verdict
            elif answer is None and check is self._authentication:  # it has failed, and is left out
                answer, message = await self.remove_forged(message)
            reply = self._weigh(check, "on_message", transaction, evidence, answer)
            if reply is not None:
                if not reply.accepts:
                    return reply, message
                kept = reply
        return kept, message

    async def remove_forged(self, message: Message) -> tuple[Reply | None, Message]:
        """Return a message that is not checked, without the fields that claim our name. It may be refused."""
        check = self._authentication
        if check is None:
            return None, message
        found = await self._guarded(check, check.remove_forged, "on_message", message)
        return (None, found) if isinstance(found, Message) else (found, message)

    def conclude(self, transaction: Transaction, message: Message, verdict: Reply | None) -> None:
        """Journal what was found for a message, if anything was."""
        if not transaction.has_results or not self._journal.logs_mail:
            return
        results = transaction.results
        if verdict is not None and not verdict.accepts:
            action = "reject" if verdict.is_permanent else "defer"
        else:
            action = "quarantine" if results.quarantine else "accept"
        self._journal.judged(transaction.number, transaction.peer, message.id, action, results.score, summary(results))

    def take_header_field(self, transaction: Transaction) -> bytes:
        """Return the Authentication-Results field of a message, b"" without one."""
        evidence = evidence_of(transaction)
        field, evidence.header_field = evidence.header_field, b""
        return field

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

    def _tell(self, told: tuple[_Asked, ...], hook_point: str, *arguments: object) -> None:
        """Tell checks what has happened. It has happened: a check that raises changes nothing."""
        for check, method in told:
            try:
                method(*arguments)
            except Exception as exc:  # noqa: BLE001 - a bug of a check
                self.counts[check.name, check.mode, "failure"] += 1
                self._journal.hook_failed(check.name, hook_point, f"{type(exc).__name__}: {exc}")

    # ---- one check

    async def _ask(
        self, asked: tuple[_Asked, ...], hook_point: str, transaction: Transaction, *arguments: object
    ) -> Reply | None:
        """Ask checks in order. The first refusal ends this; an accepting reply is kept unless another refuses."""
        kept: Reply | None = None
        evidence = evidence_of(transaction)
        for check, method in asked:
            if not self._applies(check, transaction, evidence):
                continue
            answer = await self._guarded(check, method, hook_point, transaction, *arguments)
            reply = self._weigh(check, hook_point, transaction, evidence, answer)
            if reply is not None:
                if not reply.accepts:
                    return reply
                kept = reply
        return kept

    def _applies(self, check: Check, transaction: Transaction, evidence: Evidence) -> bool:
        """Return whether a check is asked about a client."""
        if transaction.identity is not None:
            return check.judges_authenticated
        return check.judges_trusted or not self.is_trusted(transaction, evidence)

    def is_trusted(self, transaction: Transaction, evidence: Evidence) -> bool:
        """Return whether a client is in a trusted network, or on a unix socket."""
        found = evidence.is_trusted
        if found is None:
            address = transaction.peer.address
            found = not address or any(parse_address(address) in network for network in self._trusted)
            evidence.is_trusted = found
        return found

    def judges(self, transaction: Transaction) -> bool:
        """Return whether a client is judged by the checks that are not about trusted or authenticated ones."""
        return transaction.identity is None and not self.is_trusted(transaction, evidence_of(transaction))

    async def _guarded(self, check: Check, method: Callable[..., Any], hook_point: str, *arguments: object) -> Any:
        """Return what a check finds, or what follows from its failure."""
        cause = f"no answer within {check.deadline:g} s"
        try:
            answer = method(*arguments)
            if not inspect.isawaitable(answer):
                return answer
            # As in pipeline.py: the `try` is outside of the scope.
            with trio.move_on_after(check.deadline):
                return await answer
        except Exception as exc:  # noqa: BLE001 - a bug of a check costs this answer and nothing else
            cause = f"{type(exc).__name__}: {exc}"
        self.counts[check.name, check.mode, "failure"] += 1
        self._journal.hook_failed(check.name, hook_point, cause)
        return None if check.failure is None else check.failure.because(f"{check.name}: {cause}")

    def _weigh(
        self, check: Check, hook_point: str, transaction: Transaction, evidence: Evidence, answer: object
    ) -> Reply | None:
        """Return what counts of a finding."""
        if answer is None:
            return None
        is_monitored = check.mode != "enforce"
        if isinstance(answer, Mark):
            self.counts[check.name, check.mode, "mark"] += 1
            if is_monitored and answer.quarantine:
                self._journal.monitored(transaction.number, transaction.peer, check.name, hook_point, _WOULD_QUARANTINE)
            if hook_point in BEFORE_MAIL:
                evidence.keep_mark(check.name, answer, is_monitored=is_monitored)
            else:
                apply_mark(transaction, check.name, answer, is_monitored=is_monitored)
            return None
        assert isinstance(answer, Reply), f"{check.name} returns {answer!r}"
        if not answer.accepts:
            self.counts[check.name, check.mode, "refuse"] += 1
        if is_monitored:
            self._journal.monitored(transaction.number, transaction.peer, check.name, hook_point, answer)
            return None
        return answer


def make_checks(settings: PolicySettings, parts: Parts) -> list[Check]:
    """Return the checks that the settings ask for, in the order of MAKERS."""
    return [check for make in MAKERS for check in make(settings, parts)]


def _overrides(check: Check, hook_point: str) -> bool:
    return getattr(type(check), hook_point) is not getattr(Check, hook_point)


def summary(results: Results) -> str:
    """Return what was found in a line: "iprev=pass,spf=pass,dkim=pass:example.org,dmarc=pass"."""
    found: list[str] = []
    if results.iprev is not None:
        found.append(f"iprev={results.iprev.result}")
    if results.spf is not None:
        found.append(f"spf={results.spf.result}")
    found += [f"dkim={each.result}:{each.domain}" for each in results.dkim]
    if results.dmarc is not None:
        found.append(f"dmarc={results.dmarc.result}")
    if results.arc is not None and results.arc.result != "none":
        found.append(f"arc={results.arc.result}")
    found += [f"{name}={score:g}" for name, score in results.scores.items()]
    found += [f"({name}={score:g})" for name, score in results.monitored_scores.items()]
    return ",".join(found)
