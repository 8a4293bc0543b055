"""What an operator does with the spool, from another process, whether the server runs or not.

SQLite lets one process write while others read, and makes writers wait for each other; the server searches its queues
every few seconds. So what is to be changed is found first, and changed in slices with a pause between them: the clients
of the server do not notice that a million recipients are changed. Recipients that the server may have in memory are
changed by the server: it is asked to by rows of the table `instruction`, and answers within about a second. What is
being delivered at that moment is not changed, and is counted.

What an operator wants to be tried now is due at the negative of the time of asking. That sorts before all else that is
due, and tells the server that even a next hop that is backing off is to be tried (`Entry.asked_at`).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from penstock.addresses import comparable_domain
from penstock.message import Body
from penstock.spool.bodies import BodyFiles, StoredBody
from penstock.spool.entry import ATTEMPTING, DUE, HELD, STATES, HopState
from penstock.spool.store import LOCK, PLACES, SpoolError, check_version, connect

_WAIT: Final = 30.0
"""Seconds to wait for the server to finish a transaction."""
_ANSWER_WAIT: Final = 10.0
"""Seconds to wait for the server to answer instructions..."""
_ANSWER_POLL: Final = 0.05
"""...and between two looks for the answers."""
_MAX_EVENTS: Final = 10_000
"""Events that wait for the journal of the server; more are summed up in one."""
AGES: Final = (5, 10, 20, 40, 80, 160, 320, 640, 1280)
"""Upper bounds of the age groups of `QueueAdmin.ages` in minutes, as those of Postfix's qshape; one more is above."""
_PLACE: Final = (1 << PLACES) - 1
_OF_MESSAGE: Final = f"recipient.number BETWEEN message.number << {PLACES} AND (message.number << {PLACES}) + {_PLACE}"
_SLICE: Final = 1000
"""Recipients changed in one transaction."""
_PAUSE: Final = 0.02
"""Seconds between two transactions, for the server to write."""
_PAGE: Final = 2000
"""Recipients read at a time: a reader that stays for long keeps the log from being reset."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which recipients are meant: those that meet all conditions."""

    ids: tuple[str, ...] = ()
    sender: str = ""
    """A glob; "<>" is the null sender."""
    recipient: str = ""
    """A glob."""
    domain: str = ""
    """The domain of the recipient, in any spelling."""
    state: str = ""
    """ "due", "attempting" or "held"."""
    older: float | None = None
    """Minimum age of the message in seconds."""
    newer: float | None = None
    """Maximum age of the message in seconds."""

    @property
    def is_empty(self) -> bool:
        """It selects everything."""
        return self == Filter()

    def condition(self, now: float) -> tuple[str, list[object]]:
        """Return the filter as SQL over message and recipient, and its parameters; see `add_functions`."""
        terms: list[tuple[str, object]] = []
        if self.sender:
            terms.append(("lower(sender) GLOB ?", "" if self.sender == "<>" else self.sender.lower()))
        if self.recipient:
            terms.append(("lower(address) GLOB ?", self.recipient.lower()))
        if self.domain:
            terms.append(("domain_of(address) = ?", comparable_domain(self.domain)))
        if self.state:
            terms.append(("state = ?", STATES.index(self.state)))
        if self.older is not None:
            terms.append(("received_at <= ?", now - self.older))
        if self.newer is not None:
            terms.append(("received_at >= ?", now - self.newer))
        condition = " AND ".join(["1", *(term for term, _ in terms)])
        values = [value for _, value in terms]
        if self.ids:
            condition += f" AND id IN ({','.join('?' * len(self.ids))})"
            values += self.ids
        return condition, values


class Listed(NamedTuple):
    """A recipient, as `penstock spool list` shows it."""

    address: str
    state: str
    attempts: int
    due_at: float
    last_reply: str


class ListedMessage(NamedTuple):
    """A message, as `penstock spool list` shows it."""

    id: str
    sender: str
    received_at: float
    size: int
    recipients: list[Listed]
    """Those that the filter selects."""


class Stats(NamedTuple):
    """Numbers of what is in the spool."""

    messages: int
    recipients: int
    octets: int
    """Of the bodies."""
    due: int
    """Recipients that could be attempted now."""
    later: int
    """Recipients that wait for their next try."""
    attempting: int
    held: int
    oldest: float | None
    """When the oldest message was received."""
    queues: list[tuple[str, int]]
    """The domain queues with the most recipients, and how many."""


class Change(NamedTuple):
    """How many recipients a command changed."""

    changed: int
    busy: int = 0
    """Those that were not changed, because they were being delivered."""
    pending: int = 0
    """Those that will be changed when the server runs."""

    def plus(self, other: Change) -> Change:
        """Return the sums."""
        return Change(self.changed + other.changed, self.busy + other.busy, self.pending + other.pending)


class Ages(NamedTuple):
    """The recipients of a domain by the age of their messages."""

    domain: str
    counts: list[int]
    """One more than `AGES`."""


def add_functions(database: sqlite3.Connection) -> None:
    """Add the functions that filters use."""
    # That of SQLite is limited to ASCII, which addresses are not (RFC 6531).
    database.create_function("lower", 1, str.lower, deterministic=True)
    database.create_function("domain_of", 1, _domain_of, deterministic=True)


def _domain_of(address: str) -> str:
    """Return the canonical form of the domain of an address, which keeps the spelling of the client."""
    _, at, domain = address.rpartition("@")
    return comparable_domain(domain) if at else ""


def no_message(message_id: str) -> str:
    """Return the error for an unknown message id."""
    return f"no message {message_id} in the spool; it may have been delivered"


class QueueAdmin:
    """A spool, for an operator. Use `opened`."""

    def __init__(self, folder: Path, database: sqlite3.Connection, clock: Callable[[], float]) -> None:
        self._folder = folder
        self._database = database
        self._files = BodyFiles(folder / "bodies")
        self._clock = clock

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, clock: Callable[[], float] = time.time) -> Iterator[QueueAdmin]:
        """Open the spool in a folder. Raise SpoolError if it does not exist or has another version."""
        path = folder / "spool.db"
        if not path.exists():
            raise SpoolError(f"no spool in {folder}")
        with closing(connect(path, timeout=_WAIT)) as database:
            check_version(database, path)
            add_functions(database)
            yield cls(folder, database, clock)

    # ---- reading

    @property
    def is_empty(self) -> bool:
        """There are no messages."""
        return self._one("SELECT 1 FROM message LIMIT 1", ()) is None

    def find(self, what: Filter, limit: int) -> Iterator[ListedMessage]:
        """Yield messages, the oldest first, at most `limit` unless that is 0."""
        found: ListedMessage | None = None
        count = 0
        for row in self._rows(what):
            if found is None or row[1] != found.id:
                if found is not None:
                    yield found
                    count += 1
                    if count == limit:
                        return
                found = ListedMessage(row[1], row[2], row[3], row[4], [])
            found.recipients.append(Listed(row[5], STATES[row[6]], row[7], abs(row[8]), row[9]))
        if found is not None:
            yield found

    def _rows(self, what: Filter, which: str = "1") -> Iterator[tuple[Any, ...]]:
        """Yield the listed columns of recipients, after their number, a page at a time. Bodies are not read."""
        condition, values = what.condition(self._clock())
        place = -1
        while True:
            page = self._database.execute(
                "SELECT recipient.number, id, sender, received_at, size, address, state, attempts, due_at, last_reply"
                f" FROM message INDEXED BY message_listed CROSS JOIN recipient NOT INDEXED ON {_OF_MESSAGE}"
                f" WHERE message.number >= ? AND recipient.number > ? AND {which} AND {condition}"
                " ORDER BY message.number, recipient.number LIMIT ?",
                [max(place, 0) >> PLACES, place, *values, _PAGE],
            ).fetchall()
            yield from page
            if len(page) < _PAGE:
                return
            place = page[-1][0]

    def text(self, message_id: str) -> tuple[bytes, Body]:
        """Return the header fields added to a message, and its body. Raise SpoolError if it is not in the spool."""
        row = self._database.execute(
            "SELECT number, size, prefix, body FROM message WHERE number ="
            " (SELECT number FROM message INDEXED BY message_listed WHERE id = ?)",
            (message_id,),
        ).fetchone()
        if row is None:
            raise SpoolError(no_message(message_id))
        number, size, prefix, data = row
        return prefix, self._files.body(number, size) if data is None else StoredBody(data)

    def stats(self, queues: int = 10) -> Stats:
        """Count messages and recipients."""
        execute = self._database.execute
        messages, octets, oldest = execute(
            "SELECT count(*), coalesce(sum(size), 0), min(received_at) FROM message INDEXED BY message_listed"
        ).fetchone()
        counts: dict[int, int] = dict(execute("SELECT state, count(*) FROM recipient GROUP BY state").fetchall())
        (due,) = execute("SELECT count(*) FROM recipient WHERE state = 0 AND due_at <= ?", (self._clock(),)).fetchone()
        fullest = execute(
            "SELECT name, count(*) FROM recipient JOIN queue ON queue.number = recipient.queue"
            " GROUP BY queue.number ORDER BY 2 DESC LIMIT ?",
            (queues,),
        ).fetchall()
        return Stats(
            messages,
            sum(counts.values()),
            octets,
            due,
            counts.get(0, 0) - due,
            counts.get(1, 0),
            counts.get(2, 0),
            oldest,
            fullest,
        )

    def ages(self, limit: int = 0) -> list[Ages]:
        """Return the recipients by domain and age, the domain with the most first; at most `limit` unless that is 0."""
        minutes = f"({self._clock()!r} - received_at) / 60"
        group = " ".join(f"WHEN {minutes} < {bound} THEN {place}" for place, bound in enumerate(AGES))
        found: dict[str, list[int]] = {}
        for domain, place, count in self._database.execute(
            f"SELECT name, CASE {group} ELSE {len(AGES)} END, count(*) FROM recipient"
            f" JOIN message INDEXED BY message_listed ON message.number = recipient.number >> {PLACES}"
            " JOIN queue ON queue.number = recipient.queue GROUP BY 1, 2"
        ):
            found.setdefault(domain, [0] * (len(AGES) + 1))[place] = count
        ages = sorted((Ages(*each) for each in found.items()), key=lambda each: (-sum(each.counts), each.domain))
        return ages[:limit] if limit else ages

    def hops(self) -> list[HopState]:
        """Return the next hops that are backing off; none if no server runs."""
        if not self.has_server():
            return []
        return [HopState(*row) for row in self._database.execute("SELECT name, since, until, reason FROM hop")]

    def suspended(self) -> list[str]:
        """Return the domains and next hops that are suspended."""
        return [name for (name,) in self._database.execute("SELECT name FROM suspended ORDER BY name")]

    def unknown(self, ids: Sequence[str]) -> list[str]:
        """Return those of the message ids that are not in the spool."""
        statement = "SELECT 1 FROM message INDEXED BY message_listed WHERE id = ?"
        return [each for each in ids if self._one(statement, (each,)) is None]

    # ---- changing

    def retry(self, what: Filter) -> Change:
        """Let recipients that wait be due now."""
        return self._change("retry", "state = 0, due_at = ?", [-self._clock()], self._at_rest(DUE), what)

    def hold(self, what: Filter) -> Change:
        """Let recipients wait until they are released."""
        return self._change("hold", "state = 2", [], self._at_rest(DUE), what)

    def release(self, what: Filter) -> Change:
        """Let recipients that are held be due now."""
        return self._change("release", "state = 0, due_at = ?", [-self._clock()], [HELD], what)

    def drop(self, what: Filter) -> Change:
        """Delete recipients, and messages that have none left, without a report to the sender."""
        return self._change("drop", "", [], self._at_rest(DUE, HELD), what)

    def bounce(self, what: Filter) -> Change:
        """Have the server return recipients to their sender now. Without a server, it does so when it is started."""
        numbers = [row[0] for row in self._rows(what)]
        self._note_events("bounce", numbers)
        return self._instruct("bounce", numbers)

    def suspend(self, name: str) -> bool:
        """Send nothing to a domain, or to a next hop by host or full name. Return False if that was so already."""
        values = (comparable_domain(name),)
        return self._database.execute("INSERT OR IGNORE INTO suspended VALUES (?)", values).rowcount > 0

    def resume(self, name: str) -> bool:
        """Undo `suspend`. Return False if the name was not suspended."""
        return self._database.execute("DELETE FROM suspended WHERE name = ?", (comparable_domain(name),)).rowcount > 0

    def _at_rest(self, *states: int) -> list[int]:
        """Return the states in which recipients can be changed here: without a server, nothing is being attempted."""
        return [*states] if self.has_server() else [*states, ATTEMPTING]

    def _change(self, action: str, change: str, values: Sequence[object], states: list[int], what: Filter) -> Change:
        """Change recipients in these states, and have the server change those it may have in memory."""
        which = f"state IN ({','.join(map(str, states))})"
        count = 0
        for numbers in self._slices(what, which):
            with self._transaction():
                among = f"number IN ({','.join('?' * len(numbers))})"
                where = f"WHERE {among} AND {which}"
                changing = self._numbers(f"SELECT number FROM recipient {where}", numbers)
                self._write_events(action, changing)
                if action == "drop":
                    filed = self._delete(changing)
                else:
                    filed = []
                    self._database.execute(f"UPDATE recipient SET {change} {where}", [*values, *numbers])
                    self._refresh_queues(self._queues_of(numbers))
                count += len(changing)
            for number in filed:
                self._files.remove(number)
        done = Change(count)
        if action != "release" and ATTEMPTING not in states:
            numbers = [row[0] for row in self._rows(what, f"state = {ATTEMPTING}")]
            answer = self._instruct(action, numbers)
            if answer.changed:
                self._note_events(action, numbers, answer.changed)
            done = done.plus(answer)
        return done

    def _delete(self, numbers: Sequence[int]) -> list[int]:
        """Delete recipients, and messages without any. Return the numbers of the body files to be removed."""
        queues = self._queues_of(numbers)
        self._database.executemany("DELETE FROM recipient WHERE number = ?", [(number,) for number in numbers])
        messages = sorted({number >> PLACES for number in numbers})
        empty = [number for number in messages if self._is_empty(number)]
        filed = self._without_body(empty)
        self._database.executemany("DELETE FROM message WHERE number = ?", [(number,) for number in empty])
        self._refresh_queues(queues)
        return filed

    def _instruct(self, action: str, numbers: Sequence[int]) -> Change:
        """Have the server do something with recipients, and wait for its answer."""
        with self._transaction():
            self._database.executemany(
                "INSERT OR REPLACE INTO instruction VALUES (?, ?, NULL)", [(number, action) for number in numbers]
            )
        deadline = time.monotonic() + _ANSWER_WAIT
        while numbers and self.has_server():
            waiting = self._one("SELECT 1 FROM instruction WHERE is_done IS NULL AND action = ? LIMIT 1", (action,))
            if waiting is None or time.monotonic() >= deadline:
                break
            time.sleep(_ANSWER_POLL)
        answers: list[int | None] = []
        with self._transaction():
            for number in numbers:
                row = self._database.execute(
                    "SELECT is_done FROM instruction WHERE recipient = ?", (number,)
                ).fetchone()
                answers.append(0 if row is None else row[0])
            keeps = action == "bounce" and not self.has_server()
            if not keeps:
                self._database.executemany(
                    "DELETE FROM instruction WHERE recipient = ?", [(number,) for number in numbers]
                )
        changed, unanswered = answers.count(1), answers.count(None)
        if keeps:
            return Change(changed, len(numbers) - changed - unanswered, unanswered)
        return Change(changed, len(numbers) - changed)

    def _note_events(self, action: str, numbers: Sequence[int], changed: int | None = None) -> None:
        """Write events for the journal of the server; one sum if the recipients are not known one by one."""
        with self._transaction():
            if changed is not None and changed < len(numbers):
                self._database.execute(
                    "INSERT INTO admin_event (action, id, recipients) VALUES (?, '', ?)", (action, changed)
                )
            else:
                self._write_events(action, numbers)

    def _write_events(self, action: str, numbers: Sequence[int]) -> None:
        counts = Counter(number >> PLACES for number in numbers)
        (waiting,) = self._database.execute("SELECT count(*) FROM admin_event").fetchone()
        events: list[tuple[str, str, int]] = []
        for number, count in counts.items():
            if waiting + len(events) >= _MAX_EVENTS:
                events.append((action, "", counts.total() - sum(each[2] for each in events)))
                break
            row = self._database.execute("SELECT id FROM message WHERE number = ?", (number,)).fetchone()
            events.append((action, "" if row is None else row[0], count))
        self._database.executemany("INSERT INTO admin_event (action, id, recipients) VALUES (?, ?, ?)", events)

    def _numbers(self, statement: str, values: Sequence[object]) -> list[int]:
        return [number for (number,) in self._database.execute(statement, values)]

    def _slices(self, what: Filter, which: str) -> Iterator[list[int]]:
        """Yield the numbers of recipients, some at a time, with a pause for a server that wants to write."""
        numbers = [row[0] for row in self._rows(what, which)]
        for start in range(0, len(numbers), _SLICE):
            if start:
                time.sleep(_PAUSE)
            yield numbers[start : start + _SLICE]

    def has_server(self) -> bool:
        """Return whether a server has the spool open."""
        descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        finally:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    def _is_empty(self, number: int) -> bool:
        first = number << PLACES
        between = (first, first + _PLACE)
        return self._one("SELECT 1 FROM recipient WHERE number BETWEEN ? AND ? LIMIT 1", between) is None

    def _without_body(self, numbers: Sequence[int]) -> list[int]:
        statement = "SELECT 1 FROM message WHERE number = ? AND body IS NULL"
        return [number for number in numbers if self._one(statement, (number,)) is not None]

    def _one(self, statement: str, values: Sequence[Any]) -> object:
        return self._database.execute(statement, values).fetchone()

    def _queues_of(self, numbers: Sequence[int]) -> list[int]:
        among = ",".join("?" * len(numbers))
        found = self._database.execute(f"SELECT DISTINCT queue FROM recipient WHERE number IN ({among})", numbers)
        return [queue for (queue,) in found]

    def _refresh_queues(self, queues: Sequence[int]) -> None:
        """Recompute when queues are due."""
        self._database.executemany(
            "UPDATE queue SET due_at = (SELECT min(due_at) FROM recipient WHERE queue = ? AND state = 0)"
            " WHERE number = ?",
            [(queue, queue) for queue in queues],
        )

    # ---- checking

    def check(self) -> Iterator[str]:
        """Yield a line for each inconsistency."""
        for (line,) in self._database.execute("PRAGMA integrity_check"):
            if line != "ok":
                yield f"database: {line}"
        yield from self._check_rows()
        yield from self._check_files()

    def _check_rows(self) -> Iterator[str]:
        questions = {
            "recipients without a message": "SELECT count(*) FROM recipient WHERE NOT EXISTS"
            f" (SELECT 1 FROM message WHERE message.number = recipient.number >> {PLACES})",
            "messages without a recipient": "SELECT count(*) FROM message WHERE NOT EXISTS"
            f" (SELECT 1 FROM recipient WHERE recipient.number BETWEEN message.number << {PLACES}"
            f" AND (message.number << {PLACES}) + {_PLACE})",
            "recipients without a queue": "SELECT count(*) FROM recipient"
            " WHERE queue NOT IN (SELECT number FROM queue)",
            "queues that would be found due too late": "SELECT count(*) FROM queue WHERE coalesce(due_at, 1e300) >"
            " (SELECT min(due_at) FROM recipient WHERE recipient.queue = queue.number AND state = 0)",
            "recipients in an unknown state": "SELECT count(*) FROM recipient WHERE state NOT IN (0, 1, 2)",
        }
        for what, question in questions.items():
            (count,) = self._database.execute(question).fetchone()
            if count and not (what.startswith("queues") and self.has_server()):  # a server postpones queues on purpose
                yield f"{what}: {count}"

    def _check_files(self) -> Iterator[str]:
        with self._transaction():
            expected = dict(self._database.execute("SELECT number, size FROM message WHERE body IS NULL").fetchall())
        for number, size in expected.items():
            try:
                found = self._files.path(number).stat().st_size
            except OSError:
                if self._one("SELECT 1 FROM message WHERE number = ?", (number,)) is not None:
                    yield f"the body file of message number {number} is missing"
                continue
            if found != size:
                yield f"the body of message number {number} has {found} octets, expected {size}"
        if not self.has_server():
            stray = sum(number not in expected for number in self._files.numbers())
            if stray:
                yield f"body files without a message: {stray}; the next start removes them"
