"""What has become of attempts: written down in batches, with the reports that follow from it.

Whoever attempts a message says how that ended, and goes on; nobody waits for the disk. What has been said meanwhile
becomes one transaction of the spool, which joins those of the clients. A report enters the spool in the transaction
that removes what it is about: after a crash there are both or neither.

A message from the null sender that fails is a report that nobody takes, or spam that looks like one. It is journaled
and dropped (RFC 5321 4.5.5, 6.1): to keep it would fill the disk with what nobody will ever read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import trio

from penstock.journal import Journal
from penstock.message import CountedBody, Message, Recipient
from penstock.relay.backoff import Backoff
from penstock.relay.bounce import Action, Reporter, wants
from penstock.relay.hop import Outcome, Result
from penstock.spool.entry import Entry, Row, Settlement
from penstock.spool.entry import Outcome as End
from penstock.spool.spool import Spool

_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 30.0
"""Seconds before a spool that could not be written is tried again."""
_LAST_TRIES: Final = 3
"""How often that is done at the end."""

LaneOf = Callable[[Recipient], str]


class _Report(NamedTuple):
    """A report that is to be written."""

    action: Action
    entry: Entry
    told: list[tuple[Recipient, Result]]


class Ledger:
    """Takes in how attempts have ended. All of it in one trio loop."""

    def __init__(
        self,
        spool: Spool,
        backoff: Backoff,
        reporter: Reporter,
        lane_of: LaneOf,
        journal: Journal,
        clock: Callable[[], float],
    ) -> None:
        """`lane_of` says in which lane a report waits; `clock` tells seconds since the epoch."""
        self._spool = spool
        self._backoff = backoff
        self._reporter = reporter
        self._lane_of = lane_of
        self._journal = journal
        self._clock = clock
        self.put_off_until: Callable[[float], None] = _nobody_waits
        """Told the earliest time at which something is due again that was written."""
        self._settlements: list[Settlement] = []
        self._reports: list[_Report] = []
        self._has_something = trio.Event()
        self._writing = 0
        """Recipients in the transaction that is under way."""

    @property
    def waiting(self) -> int:
        """Recipients whose end is not written yet."""
        return len(self._settlements) + self._writing

    # ---- what is said of an attempt

    def finish(self, entry: Entry, results: Sequence[Result], *, is_final: bool = False) -> None:
        """Note how an attempt has ended, a result for each recipient. Closes the body, sooner or later.

        `is_final`: a recipient who has it has it in a mailbox, and not on a further server.
        """
        result = results[0]
        if len(results) == 1 and result.kind is Outcome.DELIVERED and entry.envelope.recipients[0].notify is None:
            row = entry.rows[0]
            self._settlements.append(Settlement(row.number, row.lane, End.DELIVERED))
            if self._journal.logs_mail:
                age = self._clock() - entry.received_at
                to = entry.envelope.recipients
                self._journal.delivered(entry.id, to, result.hop, result.text, row.attempts, age)
            entry.body.close()
        else:
            self._conclude(entry, results, is_final=is_final)
        if not self._has_something.is_set():
            self._has_something.set()

    def give_back(self, entry: Entry, when: float) -> None:
        """Note that there was no attempt after all: it is due again at a time."""
        self._settlements += [Settlement(row.number, row.lane, End.RETURNED, "", when) for row in entry.rows]
        entry.body.close()
        self._has_something.set()

    def put_off(self, entry: Entry, when: float) -> None:
        """Have all recipients tried again at a time, whatever else was noted of them."""
        reply = "an error on our side"
        self._settlements += [Settlement(row.number, row.lane, End.DEFERRED, reply, when) for row in entry.rows]
        self._has_something.set()

    def _conclude(self, entry: Entry, results: Sequence[Result], *, is_final: bool) -> None:
        """Note how an attempt has ended that has several recipients, or whose sender may have to hear of it."""
        if len(results) != len(entry.rows):
            raise ValueError(f"{len(results)} results for {len(entry.rows)} recipients")
        now = self._clock()
        reports: dict[Action, _Report] = {}
        for recipient, row, said in zip(entry.envelope.recipients, entry.rows, results, strict=True):
            settlement, result = self._settle(entry, row, said, now)
            self._settlements.append(settlement)
            action = _action(recipient, settlement, result, had_delay=row.delay_told, is_final=is_final)
            has_report = action is not None and bool(entry.envelope.sender.text)
            if has_report and action is not None:
                reports.setdefault(action, _Report(action, entry, [])).told.append((recipient, result))
            self._log(entry, recipient, row, settlement, result, has_report=has_report)
        if reports:
            self._reports += reports.values()
        else:
            entry.body.close()

    def _settle(self, entry: Entry, row: Row, result: Result, now: float) -> tuple[Settlement, Result]:
        """Return what is written of a recipient, and the result: one that was deferred for too long has failed."""
        if result.kind is Outcome.DELIVERED:
            return Settlement(row.number, row.lane, End.DELIVERED), result
        backoff, queued_at = self._backoff, entry.received_at
        if result.kind is Outcome.DEFERRED:
            if not backoff.is_expired(queued_at, now):
                next_try = backoff.next_try(entry.number, row.attempts, queued_at, now)
                told = row.delay_told or backoff.is_late(queued_at, now)
                return Settlement(row.number, row.lane, End.DEFERRED, result.text, next_try, told), result
            result = result._replace(kind=Outcome.FAILED, status="4.4.7")  # RFC 3463 3.5: delivery time expired
        return Settlement(row.number, row.lane, End.FAILED, result.text), result

    def _log(
        self, entry: Entry, to: Recipient, row: Row, settlement: Settlement, result: Result, *, has_report: bool
    ) -> None:
        journal = self._journal
        if not journal.logs_mail:
            return
        now = self._clock()
        if settlement.outcome is End.DELIVERED:
            journal.delivered(entry.id, (to,), result.hop, result.text, row.attempts, now - entry.received_at)
        elif settlement.outcome is End.DEFERRED:
            wait = settlement.next_try - now
            journal.deferred(entry.id, (to,), result.hop, result.text, row.attempts, wait)
        else:
            nobody = "not wanted" if entry.envelope.sender.text else "null sender: dropped"
            journal.bounced(entry.id, (to,), result.hop, result.text, row.attempts, "sent" if has_report else nobody)

    # ---- writing

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write what is said until cancelled; then `flush` what is left."""
        task_status.started()
        while True:
            await self._has_something.wait()
            await self._write()

    async def flush(self) -> None:
        """Write what is left, as far as the disk allows. What is not written is attempted again, after the start."""
        with trio.CancelScope(shield=True):
            await self._write(tries=_LAST_TRIES)

    async def _write(self, *, tries: int = 0) -> None:
        """Write what was said so far in one transaction; again and again while that fails, or so many times."""
        self._has_something = trio.Event()
        settlements, self._settlements = self._settlements, []
        reports, self._reports = self._reports, []
        if not settlements:
            return
        self._writing = len(settlements)
        messages = [await self._make(report) for report in reports]
        addressed = [(message, [self._lane_of(to) for to in message.envelope.recipients]) for message in messages]
        pause, tried = _FIRST_PAUSE, 0
        while True:
            try:
                # Whether a transaction that was cancelled has been committed, nobody knows.
                with trio.CancelScope(shield=True):
                    await self._spool.settle(settlements, addressed)
            except Exception as exc:  # noqa: BLE001 - whatever it is: what has ended must be written, or is done twice
                self._journal.error(0, "spool", exc)
                tried += 1
                if tried == tries:
                    self._writing = 0
                    return
                await trio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
            else:
                break
        self._writing = 0
        for report in reports:
            report.entry.body.close()
        again = min((each.next_try for each in settlements if each.next_try), default=None)
        if again is not None:
            self.put_off_until(again)

    async def _make(self, report: _Report) -> Message:
        """Return the message of a report."""
        entry, now = report.entry, self._clock()
        until = self._backoff.expires(entry.received_at) if report.action == "delayed" else None
        original = Message(entry.id, entry.envelope, entry.prefix, entry.body, entry.received_at)
        is_at_hand = getattr(entry.body, "in_memory", False)

        def make() -> Message:
            return self._reporter.report(report.action, original, report.told, now, retry_until=until)

        try:
            message = make() if is_at_hand else await trio.to_thread.run_sync(make)
        except Exception as exc:  # noqa: BLE001 - a body that can not be read is no reason to say nothing
            self._journal.error(0, "report", exc)
            original = original._replace(body=CountedBody(0))
            message = make()
        self._journal.reported(message.id, entry.id, report.action, entry.envelope.sender)
        return message


def _nobody_waits(_: float) -> None:
    """There is no scheduler."""


def _action(
    recipient: Recipient, settlement: Settlement, result: Result, *, had_delay: bool, is_final: bool
) -> Action | None:
    """Return what the sender is told of a recipient, None for nothing (RFC 3461 5.2)."""
    if settlement.outcome is End.DELIVERED:
        if result.reports or not wants(recipient, "SUCCESS"):
            return None
        return "delivered" if is_final else "relayed"
    if settlement.outcome is End.FAILED:
        return "failed" if wants(recipient, "FAILURE") else None
    is_news = settlement.delay_told and not had_delay
    return "delayed" if is_news and wants(recipient, "DELAY") else None
