"""Forward-confirmed reverse DNS: whether a name of the client's address resolves to it (iprev, RFC 8601 2.7.3).

The names are looked up during the greeting and EHLO; only RCPT waits for the result.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Generator
from typing import Final

import trio

from penstock.dns import Answer, Batch, Budget, Kind, Resolver
from penstock.message import Recipient
from penstock.policy.base import Mark
from penstock.policy.check import Check, Finding, FindingOrAwaitable, Mode, Parts
from penstock.policy.evidence import Lookup, Pending, evidence_of
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
    awaits_lookups = True

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
        evidence = evidence_of(transaction)
        pending: Pending[IprevResult] = evidence.begin("iprev")
        known = find_cached(self._resolver, address)
        if known is not None:
            pending.set(known)
        else:
            evidence.look_up(_Lookup(self._resolver, address, pending), self._nursery, self._journal)

    def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> FindingOrAwaitable:  # noqa: ARG002 - the interface
        """Note the result at the first recipient; wait for it if need be."""
        if transaction.results.iprev is not None:
            return None
        pending: Pending[IprevResult] | None = evidence_of(transaction).pending("iprev")
        if pending is None or pending.is_done:
            return self._note(transaction, None if pending is None else pending.value)
        return self._await(transaction, pending)

    async def _await(self, transaction: Transaction, pending: Pending[IprevResult]) -> Finding:
        return self._note(transaction, await pending.get())

    def _note(self, transaction: Transaction, found: IprevResult | None) -> Finding:
        found = transaction.results.iprev = found or IprevResult("temperror")
        return Mark(score=self._score) if self._score and found.result in ("fail", "permerror") else None


class _Lookup(Lookup[IprevResult]):
    """The questions about the address of a client."""

    name = "fcrdns"
    asks_more = True

    def __init__(self, resolver: Resolver, address: str, pending: Pending[IprevResult]) -> None:
        super().__init__(pending)
        self._resolver = resolver
        self._steps = _steps(address)
        self._batch: Batch | None = None

    def begin(self) -> None:
        self._batch = self._resolver.begin_all([next(self._steps)], _SECONDS)

    async def finish(self, *, are_due: bool) -> None:
        if self._batch is None:
            return
        (answer,) = await self._batch.answers(are_due=are_due)
        budget = Budget(self._resolver, seconds=_SECONDS)  # its time begins now: other lookups may have taken long
        try:
            while True:
                answer = await budget.query(*self._steps.send(answer))
        except StopIteration as exc:
            self.pending.set(exc.value)

    def close(self) -> None:
        if self._batch is not None:
            self._batch.abandon()


def _steps(address: str) -> Generator[tuple[str, Kind], Answer, IprevResult]:
    """Yield the questions about an address, take their answers, and return the result."""
    kind: Kind
    if ":" in address:
        parsed = ipaddress.IPv6Address(address)
        pointer, kind, packed = parsed.reverse_pointer, "AAAA", parsed.packed
    else:  # in canonical form: parsing it would cost as much as a question
        pointer, kind = ".".join(reversed(address.split("."))) + ".in-addr.arpa", "A"
        packed = socket.inet_aton(address)
    answer = yield pointer, "PTR"
    if answer.is_failure:
        return IprevResult("temperror", cause=answer.cause)
    names = [name for name in answer.records[:_MAX_NAMES] if name]
    if not names:
        return IprevResult("permerror", cause="no PTR record")
    failed: Answer | None = None
    for name in names:
        found = yield name, kind
        if packed in found.records:
            return IprevResult("pass", name)
        failed = found if found.is_failure else failed
    if failed is not None:
        return IprevResult("temperror", cause=failed.cause)
    return IprevResult("fail", cause=f"{', '.join(names[:3])} does not lead back")


def find_cached(resolver: Resolver, address: str) -> IprevResult | None:
    """Return the result where all answers are cached; None where one has to be asked for."""
    steps = _steps(address)
    try:
        question = next(steps)
        while (answer := resolver.cached(*question)) is not None:
            question = steps.send(answer)
    except StopIteration as exc:
        result: IprevResult = exc.value
        return result
    return None
