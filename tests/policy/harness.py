"""Built-in checks with a name server on the loopback, without a server around them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from penstock.dns import Resolver
from penstock.journal import Journal, JournalSettings
from penstock.message import MailParameters, Recipient
from penstock.message import Path as MailPath
from penstock.policy.check import Check, Parts
from penstock.policy.judge import Judge
from penstock.policy.settings import PolicySettings
from penstock.reply import Reply
from penstock.transaction import Peer, Transaction
from tests.dns.lying import Lying, resolving

Maker = Callable[[PolicySettings, Parts], Sequence[Check]]


class Judged:
    """A running judge with some checks."""

    def __init__(self, judge: Judge, journal: Journal, resolver: Resolver) -> None:
        self.judge = judge
        self.journal = journal
        self.resolver = resolver

    def events(self) -> str:
        """Return the lines of the journal since the last call."""
        return self.journal.drain().decode()

    async def connect(self, address: str = "192.0.2.1") -> tuple[Transaction, Reply | None]:
        """Let a client connect; return its transaction and the verdict."""
        transaction = Transaction(Peer(address, 4711), "main", hello="client.example")
        return transaction, await self.judge.on_connect(transaction)

    async def mail(self, transaction: Transaction, sender: str = "joe@example.com") -> Reply | None:
        local, _, domain = sender.rpartition("@")
        path = MailPath(sender, local, domain)
        verdict = await self.judge.on_mail(transaction, path, MailParameters())
        if verdict is None:
            transaction.sender = path
        return verdict

    async def rcpt(self, transaction: Transaction, recipient: str = "bob@example.org") -> Reply | None:
        local, _, domain = recipient.rpartition("@")
        to = Recipient(MailPath(recipient, local, domain))
        verdict = await self.judge.on_rcpt(transaction, to)
        if verdict is None:
            transaction.recipients.append(to)
        return verdict


@asynccontextmanager
async def judging(make: Maker, lying: Lying, policy: dict[str, Any], **resolver: Any) -> AsyncIterator[Judged]:
    """Run checks with these [policy] settings, in enforce mode unless they say otherwise."""
    settings = msgspec.convert({"mode": "enforce", **policy}, PolicySettings)
    journal = Journal(JournalSettings())
    async with resolving(lying, **resolver) as dns, trio.open_nursery() as nursery:
        parts = Parts("mx.example.org", dns, journal, Path(), lambda domain: domain == "example.org")
        judge = Judge(settings, make(settings, parts), journal)
        await nursery.start(judge.run)
        yield Judged(judge, journal, dns)
        nursery.cancel_scope.cancel()
