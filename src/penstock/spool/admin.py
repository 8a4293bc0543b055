"""What an operator does with the spool, from another process, whether the server runs or not.

SQLite lets one process write while others read, and makes writers wait for each other; the server looks at its lanes
again every few seconds. So what is to be changed is found first, and changed in slices with a pause between them: the
clients of the server do not notice that a million recipients are put in order. Recipients that are being attempted are
not touched while a server has the spool: what becomes of them is its to say.

What an operator wants to be tried now is due at the negative of the time of asking. That sorts before all else that is
due, and tells the server that even a next hop that it leaves alone is to be tried (`Entry.asked_at`).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from penstock.message import Body
from penstock.spool.bodies import BodyFiles, StoredBody
from penstock.spool.entry import STATES
from penstock.spool.store import LOCK, PLACES, SpoolError, check_version, connect

_WAIT: Final = 30.0
"""Seconds to wait for the server to finish a transaction."""
_PLACE: Final = (1 << PLACES) - 1
_OF_MESSAGE: Final = f"recipient.number BETWEEN message.number << {PLACES} AND (message.number << {PLACES}) + {_PLACE}"
_SLICE: Final = 1000
"""Recipients that are changed in one transaction."""
_PAUSE: Final = 0.02
"""Seconds between two, for the server to come in."""
_PAGE: Final = 2000
"""Recipients that are read at a time: a reader that stays for long keeps the log from beginning anew."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which recipients are meant: those that all of it is true of."""

    ids: tuple[str, ...] = ()
    sender: str = ""
    """A glob; "<>" is the null sender."""
    recipient: str = ""
    """A glob."""
    domain: str = ""
    """The recipient's."""
    state: str = ""
    """ "due", "attempting" or "held"."""
    older: float | None = None
    """Seconds since the message came, at least."""
    newer: float | None = None
    """Seconds since the message came, at most."""

    @property
    def is_empty(self) -> bool:
        """It is true of everything."""
        return self == Filter()

    def condition(self, now: float) -> tuple[str, list[object]]:
        """Return the filter as SQL over message and recipient, and its parameters. Its `lower` has to be Python's."""
        terms: list[tuple[str, object]] = []
        if self.sender:
            terms.append(("lower(sender) GLOB ?", "" if self.sender == "<>" else self.sender.lower()))
        if self.recipient:
            terms.append(("lower(address) GLOB ?", self.recipient.lower()))
        if self.domain:
            end = f"@{self.domain.lower()}"
            terms.append((f"substr(lower(address), -{len(end)}) = ?", end))
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
    """A recipient, as a list shows it."""

    address: str
    state: str
    attempts: int
    due_at: float
    last_reply: str


class ListedMessage(NamedTuple):
    """A message, as a list shows it."""

    id: str
    sender: str
    received_at: float
    size: int
    recipients: list[Listed]
    """Those that the filter is true of."""


class Stats(NamedTuple):
    """What waits."""

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
    """When the oldest message came."""
    lanes: list[tuple[str, int]]
    """The lanes with the most recipients, and how many."""


def no_message(message_id: str) -> str:
    """Return what an operator is told who asks for a message that is not there."""
    return f"there is no message {message_id}; it may have been delivered"


class QueueAdmin:
    """A spool that is looked at and put in order. Use `opened`."""

    def __init__(self, folder: Path, database: sqlite3.Connection, clock: Callable[[], float]) -> None:
        self._folder = folder
        self._database = database
        self._files = BodyFiles(folder / "bodies")
        self._clock = clock

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, clock: Callable[[], float] = time.time) -> Iterator[QueueAdmin]:
        """Open the spool in a folder. Raise SpoolError when there is none, or one of another version."""
        path = folder / "spool.db"
        if not path.exists():
            raise SpoolError(f"there is no spool in {folder}")
        with closing(connect(path, timeout=_WAIT)) as database:
            check_version(database, path)
            # That of SQLite knows ASCII alone, and addresses are more than that (RFC 6531).
            database.create_function("lower", 1, str.lower, deterministic=True)
            yield cls(folder, database, clock)

    # ---- looking

    @property
    def is_empty(self) -> bool:
        """Nothing waits."""
        return self._one("SELECT 1 FROM message LIMIT 1", ()) is None

    def find(self, what: Filter, limit: int) -> Iterator[ListedMessage]:
        """Yield messages, the oldest first, at most so many; a limit of 0 is none."""
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
        """Yield what is listed of recipients, the number before it, a page at a time. Bodies are not read."""
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
        """Return the fields that were added to a message, and its body. Raise SpoolError when it is not there."""
        row = self._database.execute(
            "SELECT number, size, prefix, body FROM message WHERE number ="
            " (SELECT number FROM message INDEXED BY message_listed WHERE id = ?)",
            (message_id,),
        ).fetchone()
        if row is None:
            raise SpoolError(no_message(message_id))
        number, size, prefix, data = row
        return prefix, self._files.body(number, size) if data is None else StoredBody(data)

    def stats(self, lanes: int = 10) -> Stats:
        """Count what waits."""
        execute = self._database.execute
        messages, octets, oldest = execute(
            "SELECT count(*), coalesce(sum(size), 0), min(received_at) FROM message INDEXED BY message_listed"
        ).fetchone()
        counts: dict[int, int] = dict(execute("SELECT state, count(*) FROM recipient GROUP BY state").fetchall())
        (due,) = execute("SELECT count(*) FROM recipient WHERE state = 0 AND due_at <= ?", (self._clock(),)).fetchone()
        fullest = execute(
            "SELECT name, count(*) FROM recipient JOIN lane ON lane.number = recipient.lane"
            " GROUP BY lane.number ORDER BY 2 DESC LIMIT ?",
            (lanes,),
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

    # ---- putting in order

    def retry(self, what: Filter) -> int:
        """Let recipients that wait be due now. Return how many there were."""
        return self._change("due_at = ?", [-self._clock()], "state = 0", what)

    def hold(self, what: Filter) -> int:
        """Let recipients wait until they are released. Return how many there were."""
        return self._change("state = 2", [], "state = 0", what)

    def release(self, what: Filter) -> int:
        """Let recipients that are held be due now. Return how many there were."""
        return self._change("state = 0, due_at = ?", [-self._clock()], "state = 2", what)

    def _change(self, change: str, values: Sequence[object], which: str, what: Filter) -> int:
        count = 0
        for numbers in self._slices(what, which):
            with self._transaction():
                among = f"number IN ({','.join('?' * len(numbers))})"
                changed = self._database.execute(
                    f"UPDATE recipient SET {change} WHERE {among} AND {which}", [*values, *numbers]
                )
                count += changed.rowcount
                self._look_at_lanes(self._lanes_of(numbers))
        return count

    def drop(self, what: Filter) -> int:
        """Delete recipients, and messages that have none left; nobody is told. Return how many recipients."""
        which = "state != 1" if self.has_server() else "1"
        count = 0
        for numbers in self._slices(what, which):
            with self._transaction():
                lanes = self._lanes_of(numbers)
                among = f"number IN ({','.join('?' * len(numbers))})"
                count += self._database.execute(f"DELETE FROM recipient WHERE {among} AND {which}", numbers).rowcount
                messages = sorted({number >> PLACES for number in numbers})
                empty = [number for number in messages if self._is_empty(number)]
                filed = self._without_body(empty)
                self._database.executemany("DELETE FROM message WHERE number = ?", [(number,) for number in empty])
                self._look_at_lanes(lanes)
            for number in filed:
                self._files.remove(number)
        return count

    def _slices(self, what: Filter, which: str) -> Iterator[list[int]]:
        """Yield the numbers of recipients, some at a time, with a pause when a server may want to write."""
        numbers = [row[0] for row in self._rows(what, which)]
        for start in range(0, len(numbers), _SLICE):
            if start:
                time.sleep(_PAUSE)
            yield numbers[start : start + _SLICE]

    def has_server(self) -> bool:
        """Say whether a server has the spool."""
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

    def _lanes_of(self, numbers: Sequence[int]) -> list[int]:
        among = ",".join("?" * len(numbers))
        found = self._database.execute(f"SELECT DISTINCT lane FROM recipient WHERE number IN ({among})", numbers)
        return [lane for (lane,) in found]

    def _look_at_lanes(self, lanes: Sequence[int]) -> None:
        """Let lanes know when they are due."""
        self._database.executemany(
            "UPDATE lane SET due_at = (SELECT min(due_at) FROM recipient WHERE lane = ? AND state = 0)"
            " WHERE number = ?",
            [(lane, lane) for lane in lanes],
        )

    # ---- checking

    def check(self) -> Iterator[str]:
        """Yield what is wrong, a line each; nothing when all is well."""
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
            "recipients without a lane": "SELECT count(*) FROM recipient WHERE lane NOT IN (SELECT number FROM lane)",
            "lanes that would be found due too late": "SELECT count(*) FROM lane WHERE coalesce(due_at, 1e300) >"
            " (SELECT min(due_at) FROM recipient WHERE recipient.lane = lane.number AND state = 0)",
            "recipients in an unknown state": "SELECT count(*) FROM recipient WHERE state NOT IN (0, 1, 2)",
        }
        for what, question in questions.items():
            (count,) = self._database.execute(question).fetchone()
            if count and not (what.startswith("lanes") and self.has_server()):  # a server postpones lanes on purpose
                yield f"{what}: {count}"

    def _check_files(self) -> Iterator[str]:
        with self._transaction():
            expected = dict(self._database.execute("SELECT number, size FROM message WHERE body IS NULL").fetchall())
        for number, size in expected.items():
            try:
                found = self._files.path(number).stat().st_size
            except OSError:
                if self._one("SELECT 1 FROM message WHERE number = ?", (number,)) is not None:
                    yield f"the body of message number {number} is gone"
                continue
            if found != size:
                yield f"the body of message number {number} has {found} octets in place of {size}"
        if not self.has_server():
            stray = sum(number not in expected for number in self._files.numbers())
            if stray:
                yield f"files of bodies without a message: {stray}; the next start sweeps them"
