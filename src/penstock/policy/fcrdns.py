"""Forward-confirmed reverse DNS: whether a name of the client's address leads back to it (iprev, RFC 8601 2.7.3).

The names are looked up while the client is greeted and says EHLO; only RCPT waits for them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Generator
from typing import Final

import trio

from penstock.dns import Answer, Budget, Kind, Resolver
from penstock.message import Recipient
from penstock.policy.base import Mark
from penstock.policy.check import Check, Finding, FindingOrAwaitable, Mode, Parts
from penstock.policy.evidence import Pending, evidence_of, run_guarded
from penstock.policy.settings import FcrdnsSettings, PolicySettings
from penstock.results import IprevResult
from penstock.transaction import Transaction

_SECONDS: Final = 3.0
_MAX_NAMES: Final = 10
"""Names of an address that are looked at, as in RFC 7208 5.5."""


def make_checks(policy: PolicySettings, parts: Parts) -> list[Check]:
    """Return the check, if its table is there."""
    mode = policy.mode_of(policy.fcrdns)
    return [] if policy.fcrdns is None or mode == "off" else [Fcrdns(policy.fcrdns, mode, parts)]


class Fcrdns(Check):
    """The check. A failure of the DNS adds no score."""

    name = "fcrdns"
    failure = None

    def __init__(self, settings: FcrdnsSettings, mode: Mode, parts: Parts) -> None:
        self.mode = mode
        self._score = settings.score
        self._resolver = parts.resolver
        self._journal = parts.journal
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the tasks that ask."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def on_connect(self, transaction: Transaction) -> None:
        """Begin to ask. Cached answers need no task."""
        assert self._nursery is not None
        address = transaction.peer.address
        pending: Pending[IprevResult] = evidence_of(transaction).begin("iprev")
        known = find_cached(self._resolver, address)
        if known is not None:
            pending.set(known)
        else:
            self._nursery.start_soon(run_guarded, self._journal, self.name, pending.run, self._find, address)

    async def _find(self, address: str) -> IprevResult:
        return await find_iprev(Budget(self._resolver, seconds=_SECONDS), address)

    def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> FindingOrAwaitable:  # noqa: ARG002 - the interface
        """Wait for the result at the first recipient, and note it."""
        return None if transaction.results.iprev is not None else self._note(transaction)

    async def _note(self, transaction: Transaction) -> Finding:
        pending: Pending[IprevResult] | None = evidence_of(transaction).pending("iprev")
        found = None if pending is None else await pending.get()
        found = transaction.results.iprev = found or IprevResult("temperror")
        return Mark(score=self._score) if self._score and found.result in ("fail", "permerror") else None


def _steps(address: str) -> Generator[tuple[str, Kind], Answer, IprevResult]:
    """Yield the questions about an address, take their answers, and return the result."""
    parsed = ipaddress.ip_address(address)
    kind: Kind = "A" if parsed.version == 4 else "AAAA"
    answer = yield parsed.reverse_pointer, "PTR"
    if answer.is_failure:
        return IprevResult("temperror", cause=answer.cause)
    names = [name for name in answer.records[:_MAX_NAMES] if name]
    if not names:
        return IprevResult("permerror", cause="no PTR record")
    failed: Answer | None = None
    for name in names:
        found = yield name, kind
        if parsed.packed in found.records:
            return IprevResult("pass", name)
        failed = found if found.is_failure else failed
    if failed is not None:
        return IprevResult("temperror", cause=failed.cause)
    return IprevResult("fail", cause=f"{', '.join(names[:3])} does not lead back")


async def find_iprev(budget: Budget, address: str) -> IprevResult:
    """Return whether a name of an address leads back to it."""
    steps = _steps(address)
    try:
        question = next(steps)
        while True:
            question = steps.send(await budget.query(*question))
    except StopIteration as exc:
        result: IprevResult = exc.value
        return result


def find_cached(resolver: Resolver, address: str) -> IprevResult | None:
    """Return the same where all answers are cached; None where one has to be asked for."""
    steps = _steps(address)
    try:
        question = next(steps)
        while (answer := resolver.cached(*question)) is not None:
            question = steps.send(answer)
    except StopIteration as exc:
        result: IprevResult = exc.value
        return result
    return None
