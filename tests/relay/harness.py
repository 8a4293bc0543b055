"""A scheduler on a real spool, with next hops that are scripted and a clock that is set by hand."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import outcome
import trio

from penstock.delivery.spool import SpoolDelivery
from penstock.dns.exchangers import Exchanger, MailExchangers, ResolveError
from penstock.journal import Journal, JournalSettings
from penstock.message import Body, Envelope, Message, MessageIds, Recipient
from penstock.message import Path as MailPath
from penstock.relay.backoff import Backoff, RetrySettings
from penstock.relay.bounce import Reporter, ReportSettings
from penstock.relay.hop import Hop, NextHopUnavailable, Outcome, Result
from penstock.relay.job import Done
from penstock.relay.operators import Operators
from penstock.relay.pool import Pool
from penstock.relay.recorder import AttemptRecorder
from penstock.relay.route import Routes, RouteSettings
from penstock.relay.scheduler import RelaySettings, Scheduler
from penstock.reply import Reply
from penstock.reports import TextBody
from penstock.spool.diskspace import DiskSpace
from penstock.spool.spool import Spool, SpoolSettings
from tests.helpers import TRANSACTION

START = 1_700_000_000.0
IDS = MessageIds()
DELIVERED = Result(Outcome.DELIVERED, "250 2.0.0 Ok", "2.0.0", "hop:25")
BUSY = Result(Outcome.DEFERRED, "450 4.2.1 Busy", "4.2.1", "hop:25")
REFUSED = Result(Outcome.FAILED, "550 5.1.1 No such user", "5.1.1", "hop:25")

Answer = Result | NextHopUnavailable | Exception | list[Result] | None
"""What a hop makes of a message; None keeps it waiting."""


def path_of(text: str) -> MailPath:
    local, _, domain = text.rpartition("@")
    return MailPath(text, local, domain)


def message_of(
    *recipients: str | Recipient, sender: str = "alice@example.com", at: float = START, body: bytes = b"", **fields: Any
) -> Message:
    to = tuple(each if isinstance(each, Recipient) else Recipient(path_of(each)) for each in recipients)
    envelope = Envelope(path_of(sender), to)._replace(**fields)
    text = body or b"Subject: Hello\r\n\r\nHow are you?\r\n"
    return Message(IDS.next(), envelope, b"Received: from test\r\n", TextBody(text), at)


@dataclass
class Sent:
    """A message that a hop was given."""

    hop: Hop
    envelope: Envelope
    text: bytes
    done: Done

    @property
    def to(self) -> list[str]:
        return [str(to) for to in self.envelope.recipients]


@dataclass
class FakePool:
    """Next hops that answer as `answer` says, at once or when they are told to."""

    answer: Callable[[Sent], Answer] = lambda _: DELIVERED
    down: dict[str, float] = field(default_factory=dict)
    """Hosts that are left alone, until when in trio's time."""
    backing_off: list[tuple[Hop, float, str]] = field(default_factory=list)
    """What `hops_down` says."""
    most: int = 1000
    sent: list[Sent] = field(default_factory=list)
    open: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    """Messages under way to a host, and the most there were."""

    def room(self, hop: Hop) -> int:
        return 0 if self.down_until(hop) else self.most - self.open.get(hop.host, 0)

    def hops_down(self) -> list[tuple[Hop, float, str]]:
        return self.backing_off

    def down_until(self, hop: Hop) -> float:
        return self.down.get(hop.host, 0.0)

    def try_again(self, hop: Hop, asked_at: float) -> bool:
        return False

    def deliver_later(self, hop: Hop, envelope: Envelope, prefix: bytes, body: Body, size: int, done: Done) -> None:
        if self.down_until(hop):
            raise NextHopUnavailable(hop.name, "left alone")
        sent = Sent(hop, envelope, b"".join([prefix, *body.chunks()]), done)
        assert size == len(sent.text)
        self.sent.append(sent)
        self.open[hop.host] = self.open.get(hop.host, 0) + 1
        self.peak[hop.host] = max(self.peak.get(hop.host, 0), self.open[hop.host])
        answer = self.answer(sent)
        if answer is not None:
            self.reply(sent, answer)

    def reply(self, sent: Sent, answer: Answer) -> None:
        self.open[sent.hop.host] -= 1
        if isinstance(answer, Exception) and not isinstance(answer, NextHopUnavailable):
            raise answer
        if isinstance(answer, Result):
            answer = [answer] * len(sent.envelope.recipients)
        assert answer is not None
        sent.done(answer)

    def to(self, domain: str) -> list[Sent]:
        """Return what was sent to a domain."""
        return [sent for sent in self.sent if sent.envelope.recipients[0].path.domain == domain]


class FakeResolver:
    """The DNS as a table."""

    def __init__(self, table: dict[str, list[Exchanger] | ResolveError]) -> None:
        self.table = table
        self.asked: list[str] = []

    async def exchangers(self, domain: str) -> list[Exchanger]:
        self.asked.append(domain)
        await trio.lowlevel.checkpoint()
        found = self.table[domain]
        if isinstance(found, ResolveError):
            raise found
        return found


@dataclass
class Mailboxes:
    """The delivery on this machine."""

    answer: Reply | Exception = field(default_factory=lambda: Reply(250, "2.0.0", "Ok"))
    got: list[Message] = field(default_factory=list)

    def deliver_later(self, message: Message, done: Callable[[outcome.Outcome[Reply]], None]) -> None:
        def answer() -> None:
            if isinstance(self.answer, Exception):
                done(outcome.Error(self.answer))
            else:
                self.got.append(message)
                done(outcome.Value(self.answer))

        trio.lowlevel.current_trio_token().run_sync_soon(answer)


@dataclass
class Relay:
    """What a test has in its hands."""

    spool: Spool
    pool: FakePool
    scheduler: Scheduler
    recorder: AttemptRecorder
    delivery: SpoolDelivery
    journal: Journal
    local: Mailboxes
    operators: Operators
    now: float = START
    set_by: float = 0.0
    """By how many seconds the clock was set."""

    async def accept(self, *messages: Message) -> None:
        """Take messages as they come from clients."""
        for message in messages:
            assert (await self.delivery.accept(message, TRANSACTION)).accepts

    async def quiet(self) -> None:
        """Wait until nothing is due or under way, and all is written."""

        def count(store: Any) -> int:
            found = store._database.execute(
                "SELECT count(*) FROM recipient WHERE state = 1 OR (state = 0 AND due_at <= ?)", (self.now,)
            )
            return int(found.fetchone()[0])

        with trio.fail_after(30):
            while self.scheduler.held or self.recorder.waiting or await self.spool._committer.do(count):  # noqa: ASYNC110 - there is no event
                await trio.sleep(0.001)

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(30):
            while not condition():  # noqa: ASYNC110 - any condition
                await trio.sleep(0.001)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        self.scheduler.look()

    async def set_clock(self, seconds: float) -> None:
        """Set the clock forward, or back, and let the server notice."""
        await self.scheduler.check_clock()
        self.now += seconds
        self.set_by += seconds
        await self.scheduler.check_clock()

    async def quiet_but_due(self) -> None:
        """Wait until nothing is in flight, and all is written."""
        await self.until(lambda: not self.scheduler.held and not self.recorder.waiting)

    async def waiting(self) -> list[tuple[str, str, int, float]]:
        """Return (address, last reply, attempts, seconds until due) of all that is in the spool."""

        def look(store: Any) -> list[tuple[str, str, int, float]]:
            found = store._database.execute("SELECT address, last_reply, attempts, due_at, state FROM recipient")
            return [(address, reply, attempts, due - self.now) for address, reply, attempts, due, _ in found]

        return sorted(await self.spool._committer.do(look))

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the events of the journal since the last call."""
        lines = [json.loads(line) for line in self.journal.drain().splitlines()]
        return [line for line in lines if not kinds or line["event"] in kinds]


@asynccontextmanager
async def relaying(
    folder: Path,
    pool: FakePool | None = None,
    *,
    routes: Sequence[dict[str, Any]] = ({"next_hop": "smtp://hop"},),
    dns: dict[str, list[Exchanger] | ResolveError] | None = None,
    hosts: dict[str, list[str]] | None = None,
    runs: bool = True,
    jitter: float = 0.0,
    **settings: Any,
) -> AsyncIterator[Relay]:
    """Run a relay until the end of the block. `settings` are those of [relay]."""
    pool = pool or FakePool()

    async def lookup(host: str) -> list[str]:
        await trio.lowlevel.checkpoint()
        if hosts is not None and host not in hosts:
            raise OSError(f"unknown host {host}")
        return ["192.0.2.9"] if hosts is None else hosts[host]

    relay_settings = msgspec.convert(settings, RelaySettings)
    spool = Spool(SpoolSettings(), folder, lambda: relay.now)
    resolver = cast(MailExchangers, FakeResolver(dns or {}))
    table = Routes(
        msgspec.convert(routes, tuple[RouteSettings, ...]),
        data_dir=folder,
        resolver=resolver,
        own_domain="mx.example.org",
        lookup=lookup,
    )
    journal = Journal(JournalSettings(format="json"))
    backoff = Backoff(msgspec.structs.replace(relay_settings.retry, jitter=jitter))
    reporter = Reporter(ReportSettings(), "mx.example.org", MessageIds())
    recorder = AttemptRecorder(spool, backoff, reporter, table.domain_of, journal, lambda: relay.now)
    local = Mailboxes()
    scheduler = Scheduler(
        relay_settings,
        spool,
        cast(Pool, pool),
        table,
        recorder,
        journal,
        local=local,
        clock=lambda: relay.now,
        steady_clock=lambda: relay.now - relay.set_by,
    )
    space = DiskSpace(folder, reserve_octets=0, reserve_inodes=0)
    relay = Relay(
        spool,
        pool,
        scheduler,
        recorder,
        SpoolDelivery(spool, scheduler, space),
        journal,
        local,
        Operators(scheduler, recorder),
    )
    await spool.start()
    await table.resolve_all()
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(recorder.run)
            if runs:
                await nursery.start(scheduler.run)
                nursery.start_soon(relay.operators.run)
            yield relay
            nursery.cancel_scope.cancel()
        scheduler.close()
        await recorder.flush()
    finally:
        await spool.aclose()


assert RetrySettings().schedule[0] == 60
