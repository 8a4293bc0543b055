"""Records how attempts ended, in batches, with the reports that follow from it.

The relay reports the end of an attempt and continues; it does not wait for the disk. What is reported within a few
milliseconds becomes one transaction of the spool, which joins those of the clients. A report enters the spool in the
transaction that removes the recipients it is about: after a crash there are both or neither.

A message from the null sender that fails is a report that cannot be delivered, or spam that looks like one. It is
journaled and dropped (RFC 5321 4.5.5, 6.1): to keep it would fill the disk with mail that is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import trio

from penstock.journal import Journal
from penstock.message import CountedBody, Message, Recipient
from penstock.relay.backoff import Backoff
from penstock.relay.bounce import Action, Reporter
from penstock.relay.hop import Outcome, Result
from penstock.spool.entry import AttemptRecord, Entry, Row
from penstock.spool.entry import Outcome as End
from penstock.spool.queue import DurableQueue

_GATHER: Final = 0.02
"""Seconds for which results are gathered: a transaction for each message of a slow client costs as much as the message.
No message waits for it; a server that is killed meanwhile delivers again what was not written."""
_MANY: Final = 256
"""Recipients whose results are written at once."""
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 30.0
"""Seconds before a spool that could not be written is tried again."""
_LAST_TRIES: Final = 3
"""Tries at shutdown."""
_BUG_PAUSE: Final = 300.0
"""Seconds until a recipient is tried again whose failure could not be reported."""

PLACES: Final = {Outcome.DELIVERED: 0, Outcome.DEFERRED: 1, Outcome.FAILED: 2}
"""What `on_result` gets for an outcome."""

DomainOf = Callable[[Recipient], str]


class _Report(NamedTuple):
    """A report to be written."""

    action: Action
    entry: Entry
    results: list[tuple[Recipient, Result]]
    rows: list[int]
    """The numbers of the recipients in `results`."""
    entries: list[Entry]
    """All entries of the message that the report covers; their bodies are closed once it is written."""


class _Overdue(NamedTuple):
    """An attempt after which a message may have to be returned, or its sender notified; as for `record`."""

    entry: Entry
    results: Sequence[Result]
    is_final: bool
    is_stopping: bool
    note: str


class AttemptRecorder:
    """Takes the results of attempts. Called in the trio thread."""

    def __init__(
        self,
        spool: DurableQueue,
        backoff: Backoff,
        reporter: Reporter,
        domain_of: DomainOf,
        journal: Journal,
        clock: Callable[[], float],
    ) -> None:
        """`domain_of` returns the domain whose queue a report waits in; `clock` returns seconds since the epoch."""
        self.backoff = backoff
        self.reporter = reporter
        self._spool = spool
        self._domain_of = domain_of
        self._journal = journal
        self._clock = clock
        self.on_put_off: Callable[[float], None] = _ignore
        """Gets the earliest time at which something that was written is due again."""
        self.on_result: Callable[[str, int, int, float], None] | None = None
        """Gets the results of attempts, for statistics: queue, 0 delivered, 1 deferred, 2 failed, recipients, age."""
        self.before_expiry: Callable[[], None] = _nothing
        """Called before a message expires or its sender is notified of a delay: may call `Backoff.put_off`."""
        self._records: list[AttemptRecord] = []
        self._overdue: list[_Overdue] = []
        self._reports: dict[tuple[int, Action], _Report] = {}
        """By message and action: one report for all recipients of a message whose attempts end together."""
        self._has_something = trio.Event()
        self._has_many = trio.Event()
        self._writing = 0
        """Recipients in the current transaction."""

    @property
    def waiting(self) -> int:
        """Recipients whose result is not written yet."""
        return len(self._records) + len(self._overdue) + self._writing

    # ---- results

    def record(
        self,
        entry: Entry,
        results: Sequence[Result],
        *,
        is_final: bool = False,
        is_stopping: bool = False,
        is_backing_off: bool = False,
    ) -> None:
        """Record how an attempt ended, with a result for each recipient. Closes the body, sooner or later.

        `is_final`: a recipient that was delivered is in a mailbox, and not on another server. `is_stopping`: what the
        hop did not answer was cut by our own shutdown; it counts as not attempted. `is_backing_off`: no hop was asked,
        the results are those of an earlier attempt.
        """
        result = results[0]
        if self.on_result is not None and not is_backing_off:
            self._count(entry, results, is_stopping)
        if len(results) == 1 and result.kind is Outcome.DELIVERED and entry.envelope.recipients[0].notify is None:
            row = entry.rows[0]
            self._records.append(AttemptRecord(row.number, row.queue, End.DELIVERED))
            if self._journal.logs_mail:
                age = self._clock() - entry.received_at
                to = entry.envelope.recipients
                self._journal.delivered(entry.id, to, result.hop, result.text, row.attempts, age)
            entry.body.close()
        else:
            ended = _Overdue(entry, results, is_final, is_stopping, "backing off: " if is_backing_off else "")
            if self._is_overdue(entry, results):
                self._overdue.append(ended)
            else:
                self._conclude(*ended)
        self._note()

    def _note(self) -> None:
        """Let results be written soon."""
        if not self._has_something.is_set():
            self._has_something.set()
        if len(self._records) >= _MANY and not self._has_many.is_set():
            self._has_many.set()

    def _count(self, entry: Entry, results: Sequence[Result], is_stopping: bool) -> None:
        assert self.on_result is not None
        age = self._clock() - entry.received_at
        for result, row in zip(results, entry.rows, strict=False):
            if not (is_stopping and result.kind is Outcome.DEFERRED and not result.is_said):  # it was no attempt
                self.on_result(row.queue, PLACES[result.kind], 1, age)

    def give_back(self, entry: Entry, when: float) -> None:
        """Record that there was no attempt after all: the recipients are due again at a time."""
        self._records += [AttemptRecord(row.number, row.queue, End.RETURNED, "", when) for row in entry.rows]
        entry.body.close()
        self._note()

    def defer(self, entry: Entry, when: float) -> None:
        """Schedule all recipients at a time, in place of other records about them."""
        reply = "internal error"
        self._records += [AttemptRecord(row.number, row.queue, End.DEFERRED, reply, when) for row in entry.rows]
        self._note()

    def _is_overdue(self, entry: Entry, results: Sequence[Result]) -> bool:
        """Return whether a message may have expired, or be late, by the time in its entry, which may be outdated."""
        now, backoff = self._clock(), self.backoff
        is_expired, is_late = backoff.is_expired(entry.received_at, now), backoff.is_late(entry.received_at, now)
        return (is_expired or (is_late and not all(row.delay_told for row in entry.rows))) and any(
            result.kind is Outcome.DEFERRED for result in results
        )

    async def _conclude_overdue(self) -> None:
        """Record the attempts for which the age matters.

        The clock may have been set since their entries were made: the spool was corrected then, and is asked. A message
        whose time it does not return counts as new: it is not returned now, but it may be at a later attempt.
        """
        if not self._overdue:
            return
        overdue, received_at = list(self._overdue), {}
        try:
            with trio.CancelScope(shield=True):
                received_at = await self._spool.received_at(sorted({each.entry.number for each in overdue}))
        except Exception as exc:  # noqa: BLE001 - a disk that fails now may work later
            self._journal.error(0, "spool", exc)
        del self._overdue[: len(overdue)]
        for each in overdue:
            entry = each.entry._replace(received_at=received_at.get(each.entry.number, self._clock()))
            try:
                self._conclude(*each._replace(entry=entry))
            except Exception as exc:  # noqa: BLE001 - a bug in one message must not end the relay
                self._journal.error(0, "relay", exc)
                self.defer(entry, self._clock() + _BUG_PAUSE)

    def _conclude(
        self,
        entry: Entry,
        results: Sequence[Result],
        is_final: bool,
        is_stopping: bool,
        note: str,
    ) -> None:
        """Record an attempt with several recipients, or one that may need a report."""
        if len(results) != len(entry.rows):
            raise ValueError(f"{len(results)} results for {len(entry.rows)} recipients")
        now = self._clock()
        has_report = False
        for recipient, row, said in zip(entry.envelope.recipients, entry.rows, results, strict=True):
            if is_stopping and said.kind is Outcome.DEFERRED and not said.is_said:
                self._records.append(AttemptRecord(row.number, row.queue, End.RETURNED, "", now))
                continue
            record, result = self._record_of(entry, row, said, now, note)
            self._records.append(record)
            action = _action(recipient, record, result, had_delay=row.delay_told, is_final=is_final)
            reports = action is not None and bool(entry.envelope.sender.text)
            if reports and action is not None:
                self._report(action, entry, recipient, row, result)
                has_report = True
            self._log(entry, recipient, row, record, result, has_report=reports)
        if not has_report:
            entry.body.close()

    def _report(self, action: Action, entry: Entry, recipient: Recipient, row: Row, result: Result) -> None:
        """Add a recipient to the report on its message."""
        report = self._reports.setdefault((entry.number, action), _Report(action, entry, [], [], [entry]))
        report.results.append((recipient, result))
        report.rows.append(row.number)
        if report.entries[-1] is not entry:
            report.entries.append(entry)

    def _record_of(self, entry: Entry, row: Row, result: Result, now: float, note: str) -> tuple[AttemptRecord, Result]:
        """Return what is written of a recipient, and the result: one that was deferred for too long has failed.

        The class of the status follows from what becomes of the recipient, as RFC 3464 2.3.4 demands: a hop may have
        said 554 to a connection, and its mail is delayed nevertheless.
        """
        if result.kind is Outcome.DELIVERED:
            return AttemptRecord(row.number, row.queue, End.DELIVERED), result
        backoff, queued_at = self.backoff, entry.received_at
        reply = note + result.text
        if result.kind is Outcome.DEFERRED:
            if backoff.is_expired(queued_at, now) or (not row.delay_told and backoff.is_late(queued_at, now)):
                self.before_expiry()  # a clock that was set a moment ago returns no mail
            if not backoff.is_expired(queued_at, now):
                told = row.delay_told or backoff.is_late(queued_at, now)
                next_try = backoff.next_try(entry.number, row.attempts, queued_at, now, delay_told=told)
                result = result._replace(status=f"4{result.status[1:]}")
                return AttemptRecord(row.number, row.queue, End.DEFERRED, reply, next_try, told), result
            # RFC 3463 3.5: delivery time expired, "useful only as a persistent transient error".
            result = result._replace(kind=Outcome.FAILED, status="4.4.7")
        else:
            result = result._replace(status=f"5{result.status[1:]}")
        return AttemptRecord(row.number, row.queue, End.FAILED, reply), result

    def _log(
        self, entry: Entry, to: Recipient, row: Row, record: AttemptRecord, result: Result, *, has_report: bool
    ) -> None:
        journal = self._journal
        if not journal.logs_mail:
            return
        now = self._clock()
        if record.outcome is End.DELIVERED:
            journal.delivered(entry.id, (to,), result.hop, result.text, row.attempts, now - entry.received_at)
        elif record.outcome is End.DEFERRED:
            journal.deferred(entry.id, (to,), result.hop, record.reply, row.attempts, record.next_try - now)
        else:
            without = "not wanted" if entry.envelope.sender.text else "null sender: dropped"
            journal.bounced(entry.id, (to,), result.hop, record.reply, row.attempts, "sent" if has_report else without)

    # ---- writing

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write results until cancelled; then call `flush` for the rest."""
        task_status.started()
        while True:
            await self._has_something.wait()
            with trio.move_on_after(_GATHER):
                await self._has_many.wait()
            await self._write()

    async def flush(self) -> None:
        """Write the rest, as far as the disk allows. What is not written is attempted again after the next start."""
        with trio.CancelScope(shield=True):
            await self._write(tries=_LAST_TRIES)

    async def _write(self, *, tries: int = 0) -> None:
        """Write what was recorded so far in one transaction. Repeat that while it fails, `tries` times if set."""
        self._has_something, self._has_many = trio.Event(), trio.Event()
        await self._conclude_overdue()
        records, self._records = self._records, []
        reports, self._reports = list(self._reports.values()), {}
        if not records:
            return
        self._writing = len(records)
        with trio.CancelScope(shield=True):  # what was recorded is only here
            made = [(report, await self._make(report)) for report in reports]
        messages = [message for _, message in made if message is not None]
        records = self._without(records, [report for report, message in made if message is None])
        pause, tried = _FIRST_PAUSE, 0
        while True:
            # The clock may have been set back since: none waits longer than any schedule allows.
            latest = self._clock() + max(self.backoff.longest_wait, _BUG_PAUSE)
            if any(each.next_try > latest for each in records):
                records = [each._replace(next_try=min(each.next_try, latest)) for each in records]
            try:
                # Whether a transaction that was cancelled has been committed is unknown.
                with trio.CancelScope(shield=True):
                    await self._spool.record(records, messages)
            except Exception as exc:  # noqa: BLE001 - whatever it is: what has ended must be written, or is done twice
                self._journal.error(0, "spool", exc)
                tried += 1
                if tried == tries:
                    self._writing = 0
                    return
                try:
                    await trio.sleep(pause)
                except trio.Cancelled:
                    self._take_back(records, reports)
                    raise
                pause = min(pause * 2, _LONGEST_PAUSE)
            else:
                break
        self._writing = 0
        for report in reports:
            for entry in report.entries:
                entry.body.close()
        again = min((each.next_try for each in records if each.next_try), default=None)
        if again is not None:
            self.on_put_off(again)

    def _take_back(self, records: list[AttemptRecord], reports: list[_Report]) -> None:
        """Keep what a cancelled `_write` has not written, for `flush`."""
        self._records[:0] = records
        for report in reports:
            later = self._reports.setdefault((report.entry.number, report.action), report)
            if later is not report:
                later.results[:0] = report.results
                later.rows[:0] = report.rows
                later.entries[:0] = report.entries
        self._writing = 0

    def _without(self, records: list[AttemptRecord], reports: Sequence[_Report]) -> list[AttemptRecord]:
        """Return the records, with the failures deferred that could not be reported: no sender is left without word."""
        failed = {row for report in reports if report.action == "failed" for row in report.rows}
        if not failed:
            return records
        when = self._clock() + _BUG_PAUSE
        return [
            record._replace(outcome=End.DEFERRED, reply=f"no report: {record.reply}", next_try=when)
            if record.row in failed
            else record
            for record in records
        ]

    async def _make(self, report: _Report) -> tuple[Message, Sequence[str]] | None:
        """Return the message of a report and its domain queues; None if there is a bug."""
        entry, now = report.entry, self._clock()
        until = self.backoff.expires(entry.received_at) if report.action == "delayed" else None
        original = Message(entry.id, entry.envelope, entry.prefix, entry.body, entry.received_at)
        is_at_hand = getattr(entry.body, "in_memory", False)

        def make() -> Message:
            return self.reporter.report(report.action, original, report.results, now, retry_until=until)

        try:
            try:
                message = make() if is_at_hand else await trio.to_thread.run_sync(make)
            except Exception as exc:  # noqa: BLE001 - if the body cannot be read, a report without it is still sent
                self._journal.error(0, "report", exc)
                original = original._replace(body=CountedBody(0))
                message = make()
            queues = [self._domain_of(to) for to in message.envelope.recipients]
        except Exception as exc:  # noqa: BLE001 - a bug in one report must not end the relay
            self._journal.error(0, "report", exc)
            return None
        self._journal.reported(message.id, entry.id, report.action, entry.envelope.sender)
        return message, queues


def _nothing() -> None:
    """Without a scheduler."""


def _ignore(_: float) -> None:
    """Without a scheduler."""


def _action(
    recipient: Recipient, record: AttemptRecord, result: Result, *, had_delay: bool, is_final: bool
) -> Action | None:
    """Return what is reported of a recipient, None for nothing (RFC 3461 5.2)."""
    if record.outcome is End.DELIVERED:
        if result.reports or not recipient.wants("SUCCESS"):
            return None
        return "delivered" if is_final else "relayed"
    if record.outcome is End.FAILED:
        return "failed" if recipient.wants("FAILURE") else None
    is_first_notice = record.delay_told and not had_delay
    return "delayed" if is_first_notice and recipient.wants("DELAY") else None
