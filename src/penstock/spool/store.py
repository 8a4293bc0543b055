"""The database of the spool: plain, blocking, for one thread. schema.sql and operator.sql describe the tables.

Cost
----
Each step of SQLite releases the interpreter lock and takes it again, in competition with the loop that serves the
clients. So a transaction has few steps: rows are inserted by statements for 64, 16, 4 and 1 of them, and deleted by
lists of numbers. Rows get their numbers here, in order: inserting means appending, with a thousand messages or a
million.

The row of a domain queue has the time its first recipient is due, perhaps too early and never too late: finding what is
due is a look-up in the index of queues and one in that of the queue, never a scan.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Final

import msgspec

from penstock.files import make_folders, open_private, sync_folder
from penstock.message import Body, Envelope, MessageId, Recipient
from penstock.message import Path as MailPath
from penstock.spool.bodies import BodyFiles, StoredBody
from penstock.spool.entry import (
    ATTEMPTING,
    DUE,
    HELD,
    AdminEvent,
    AdminInput,
    AttemptRecord,
    ClockJump,
    Entry,
    HopState,
    Instruction,
    Outcome,
    Put,
    QueueDue,
    Recovered,
    Row,
)

LOCK: Final = "lock"
"""The file in the folder that a server keeps locked."""
PLACES: Final = 20
"""Bits of the number of a recipient that are its place in the message: at most a million recipients."""
_VERSION: Final = 3
# Read here, and not at their first use: a worker that has become another user may be unable to read them.
_SCHEMA: Final = resources.files("penstock.spool").joinpath("schema.sql").read_text()
_OPERATOR: Final = resources.files("penstock.spool").joinpath("operator.sql").read_text()
_RENAMES: Final = """
ALTER TABLE lane RENAME TO queue;
ALTER TABLE recipient RENAME COLUMN lane TO queue;
DROP INDEX lane_due;
CREATE INDEX queue_due ON queue (due_at) WHERE due_at IS NOT NULL;
"""
"""From version 2, which had other names for the domain queues."""
_WIDTHS: Final = (64, 16, 4, 1)
"""Rows of an INSERT."""
_LISTED: Final = 500
"""Numbers of an IN list."""
_QUEUES_KNOWN: Final = 10_000
"""Names of domain queues kept in memory."""
_PAGE: Final = 16 * 1024
"""Octets of a page of the database: with 8 KiB, bodies from 4 KB on cost 10 to 40 % more."""
_CACHE_KIB: Final = 16 * 1024
_CHECKPOINT_OCTETS: Final = 16 << 20
"""Octets written to the log before a checkpoint."""
_ROW: Final = 1000
"""Octets that a change of a row counts for in the log."""
_LOG_KEPT: Final = 64 << 20
"""Octets the log file keeps when it is reset; a reader that stays for long makes it grow."""
_LOCK_WAIT: Final = 2.0
"""Seconds to wait for the lock: an operator's command takes it for a moment to see whether a server runs."""
_CHECK_OCTETS: Final = 1 << 20
"""Octets written to the log between two checks of the free space."""

Parameters = tuple[str, bool, int | None, str | None, str | None, str | None, bool]
_NO_PARAMETERS: Final[Parameters] = ("7BIT", False, None, None, None, None, False)
Dsn = tuple[list[str] | None, str | None]
_Found = tuple[int, int, str, bytes | None, int, float, str]
"""What `Store.take` reads of a recipient; the last is the name of its queue."""
_encode = msgspec.json.encode
_decode_parameters = msgspec.json.Decoder(Parameters).decode
_decode_dsn = msgspec.json.Decoder(Dsn).decode

_TAKEN: Final = "SELECT recipient.number, attempts, address, dsn, delay_told, recipient.due_at"
INSERT_MESSAGE: Final = "INSERT INTO message VALUES "
INSERT_RECIPIENT: Final = "INSERT INTO recipient VALUES "
_DEFER: Final = """
UPDATE recipient SET state = 0, due_at = ?, last_reply = ?, delay_told = ? WHERE number = ? AND state = 1
"""
_RETURN: Final = "UPDATE recipient SET state = 0, due_at = ?, attempts = attempts - 1 WHERE number = ? AND state = 1"
_LOSE: Final = (
    "UPDATE recipient SET state = 2, last_reply = 'message missing: see penstock spool check' WHERE number IN"
)
"""Holds what cannot be attempted, so that it is not found due again and again; `penstock spool check` reports it."""
_MAX_INSTRUCTIONS: Final = 5000
"""Instructions and events of operators that are read at a time."""
_RESCHEDULED: Final = 10_000
"""Recipients rescheduled in one statement after a clock jump."""
_SHIFTED: Final = 2000
"""Messages whose time is corrected at a time, so that new ones need not wait for all."""
_DROP_EMPTY: Final = """
DELETE FROM message WHERE number IN (?) AND NOT EXISTS (
    SELECT 1 FROM recipient
    WHERE recipient.number BETWEEN message.number << 20 AND (message.number << 20) + (1 << 20) - 1
) RETURNING number, body IS NULL
"""


class SpoolError(Exception):
    """The spool cannot be used: another server has it, or it has another version."""


def connect(
    path: Path, *, timeout: float = 5.0, factory: type[sqlite3.Connection] = sqlite3.Connection
) -> sqlite3.Connection:
    """Open the database. `timeout` is how many seconds to wait for another process that writes.

    Any thread may use the connection, one at a time.
    """
    database = sqlite3.connect(
        path, timeout=timeout, isolation_level=None, cached_statements=256, check_same_thread=False, factory=factory
    )
    try:
        database.execute("PRAGMA synchronous = FULL")  # a commit is on stable storage when it returns
        database.execute("PRAGMA foreign_keys = OFF")
        database.execute("PRAGMA temp_store = MEMORY")
        database.execute(f"PRAGMA journal_size_limit = {_LOG_KEPT}")
        # Some builds of SQLite overwrite deleted data with zeros, which makes a delivered message 12 % more expensive.
        database.execute("PRAGMA secure_delete = OFF")
    except BaseException:  # it is no database, for example
        database.close()
        raise
    return database


def prepare(database: sqlite3.Connection, path: Path) -> None:
    """Create the tables of a new spool, upgrade an old one. Raise SpoolError for a version this program cannot read."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version == 0:
        database.execute(f"PRAGMA page_size = {_PAGE}")
        database.execute("PRAGMA journal_mode = WAL")
    if version in (0, 2):
        tables = _SCHEMA if version == 0 else _RENAMES
        database.executescript(f"BEGIN IMMEDIATE;\n{tables}\n{_OPERATOR}\nCOMMIT;")
    check_version(database, path)
    database.execute("PRAGMA journal_mode = WAL")
    # SQLite converts it to pages of the size that it knows, which is 4 KiB until it has read the database.
    database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")


def check_version(database: sqlite3.Connection, path: Path) -> None:
    """Raise SpoolError if a spool has another version."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version != _VERSION:
        hint = "; start the server once to upgrade it" if version == 2 else ""
        raise SpoolError(f"{path} has version {version}, expected {_VERSION}{hint}")


class Checkpoints:
    """Checkpoints the write-ahead log beside the transactions.

    SQLite would do that within a commit, and hundreds of clients would wait for it. Here a thread with a connection of
    its own does most of it, and no transaction waits for it; what was logged meanwhile is little, and is checkpointed
    between two transactions. Then the log is reset.
    """

    def __init__(self, path: Path, database: sqlite3.Connection) -> None:
        self._folder = path.parent
        self._database = database
        self._beside = connect(path)
        self._thread: threading.Thread | None = None
        self._limit = _CHECKPOINT_OCTETS
        self._checked_at = 0
        self.logged = 0
        """Octets written to the log since it was reset, approximately."""

    def step(self) -> None:
        """Start or finish a checkpoint if it is time. Called between transactions."""
        if self._thread is None:
            if self.logged - self._checked_at >= _CHECK_OCTETS:
                self._check_disk()
            if self.logged >= self._limit:
                thread = threading.Thread(target=_checkpoint, args=(self._beside,), name="penstock-checkpoint")
                with suppress(RuntimeError):  # no thread available; tried again after the next transaction
                    thread.start()
                    self._thread = thread
        elif not self._thread.is_alive():
            self._thread.join()
            self._thread = None
            _checkpoint(self._database)
            self.logged = self._checked_at = 0

    def _check_disk(self) -> None:
        """Limit the log to an eighth of the free space: the database cannot grow into what the log occupies."""
        self._checked_at = self.logged
        with suppress(OSError):
            found = os.statvfs(self._folder)
            self._limit = min(_CHECKPOINT_OCTETS, found.f_bavail * found.f_frsize // 8)

    def relieve(self) -> None:
        """Empty the log and free its space: for a full disk, which the log itself may have filled."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        _checkpoint(self._database, "TRUNCATE")
        self.logged = self._checked_at = 0

    def close(self) -> None:
        """Wait for the checkpoint in progress."""
        if self._thread is not None:
            self._thread.join()
        self._beside.close()


def _checkpoint(database: sqlite3.Connection, how: str = "PASSIVE") -> None:
    with suppress(sqlite3.Error):  # a full disk, for example: the log stays in use, and the next checkpoint is soon
        database.execute(f"PRAGMA wal_checkpoint({how})").fetchone()


class Store:
    """The spool of one server. Everything except `open` and `close` is called within a `transaction`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files = BodyFiles(folder / "bodies")
        self._queues: dict[str, int] = {}
        self._opened = ExitStack()
        """What is to be closed, in reverse order."""
        self._database: sqlite3.Connection
        self._next_number = 1
        self.puts = 0
        """Messages written so far."""
        self._next_queue = 1

    # ---- opening and closing

    def open(self) -> Recovered:
        """Open the spool and recover from a crash. Raise OSError, sqlite3.Error or SpoolError."""
        if not self._folder.is_dir():
            make_folders(self._folder)
            sync_folder(self._folder.parent)
        self._take_lock()
        try:
            self.files.prepare()
            path = self._folder / "spool.db"
            os.close(open_private(path, os.O_RDWR | os.O_CREAT))  # SQLite would create it for all to read
            self._database = connect(path)
            self._opened.callback(self._database.close)
            prepare(self._database, path)
            self._database.execute("PRAGMA wal_autocheckpoint = 0")  # see Checkpoints
            self.checkpoints = Checkpoints(path, self._database)
            self._opened.callback(self.checkpoints.close)
            return self._recover()
        except BaseException:
            self.close()
            raise

    def _recover(self) -> Recovered:
        execute = self._database.execute
        with self.transaction():
            (last,) = execute("SELECT max(number) FROM message").fetchone()
            self._next_number = (last or 0) + 1
            (last,) = execute("SELECT max(number) FROM queue").fetchone()
            self._next_queue = (last or 0) + 1
            # An attempt is recorded before it is made. How those in progress ended is unknown: they are made again, and
            # a next hop that had accepted the message gets it twice (RFC 1047).
            interrupted = execute("UPDATE recipient SET state = ? WHERE state = ?", (DUE, ATTEMPTING)).rowcount
            self.refresh_queues()
            execute("DELETE FROM instruction WHERE is_done IS NOT NULL")  # of commands that were interrupted
            execute("DELETE FROM hop")
            (messages,) = execute("SELECT count(*) FROM message INDEXED BY message_listed").fetchone()
            kept = {number for (number,) in execute("SELECT number FROM message WHERE body IS NULL")}
        return Recovered(messages, interrupted, self.files.sweep(kept))

    def _take_lock(self) -> None:
        descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _LOCK_WAIT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    raise SpoolError(f"another server has the spool {self._folder} open") from exc
                time.sleep(0.05)
            else:
                self._opened.callback(os.close, descriptor)
                return

    def refresh_queues(self) -> None:
        """Recompute when every queue is due, and delete the empty ones."""
        self._database.execute(
            "UPDATE queue SET due_at ="
            " (SELECT min(due_at) FROM recipient WHERE recipient.queue = queue.number AND state = 0)"
        )
        self._database.execute("DELETE FROM queue WHERE number NOT IN (SELECT DISTINCT queue FROM recipient)")
        self._queues.clear()

    def close(self) -> None:
        """Close the spool. Closing it again does nothing."""
        self._opened.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what the block does, or nothing of it. Raise sqlite3.Error, and what the block raises."""
        self._roll_back()
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            self._queues.clear()  # one may have been created that no longer exists
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        """Undo what is not committed. SQLite has already done so after most disk errors."""
        with suppress(sqlite3.Error):  # the next transaction tries again
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    def tidy(self) -> None:
        """Do the housekeeping between two transactions. Raises nothing: what fails is tried again later."""
        self.checkpoints.step()

    # ---- putting

    def new_number(self) -> int:
        """Return the number for a new message."""
        number = self._next_number
        self._next_number += 1
        return number

    @property
    def newest(self) -> int:
        """The number of the newest message."""
        return self._next_number - 1

    def put(self, puts: Sequence[Put], now: float) -> None:
        """Write messages and their recipients."""
        messages: list[object] = []
        recipients: list[object] = []
        due: dict[int, float] = {}
        for put in puts:
            add_message(messages, put)
            state, attempts = (ATTEMPTING, 1) if put.is_taken else (HELD if put.is_held else DUE, 0)
            first = put.number << PLACES
            for place, (recipient, name) in enumerate(zip(put.message.envelope.recipients, put.queues, strict=True)):
                queue = self._queue(name)
                if state == DUE:
                    due[queue] = now
                dsn = encode_dsn(recipient)
                recipients += (first + place, queue, state, now, attempts, recipient.path.text, dsn, "", 0)
            self.checkpoints.logged += put.message.body.size + _ROW
        self.puts += len(puts)
        self._insert(INSERT_MESSAGE, 8, messages)
        self._insert(INSERT_RECIPIENT, 9, recipients)
        for queue, when in due.items():
            self._make_due(queue, when)

    def _insert(self, statement: str, columns: int, values: list[object]) -> None:
        """Insert rows, many by one statement."""
        row = f"({','.join('?' * columns)})"
        start, left = 0, len(values) // columns
        for width in _WIDTHS:
            while left >= width:
                end = start + width * columns
                self._database.execute(statement + ",".join([row] * width), values[start:end])
                start, left = end, left - width

    # ---- domain queues

    def _queue(self, name: str) -> int:
        number = self._queues.get(name)
        if number is None:
            found = self._database.execute("SELECT number FROM queue WHERE name = ?", (name,)).fetchone()
            if found is None:
                number = self._next_queue
                self._next_queue += 1
                self._database.execute("INSERT INTO queue VALUES (?, ?, NULL)", (number, name))
            else:
                number = int(found[0])
            if len(self._queues) >= _QUEUES_KNOWN:
                self._queues.clear()
            self._queues[name] = number
        return number

    def _make_due(self, queue: int, when: float) -> None:
        self._database.execute(
            "UPDATE queue SET due_at = ? WHERE number = ? AND (due_at IS NULL OR due_at > ?)", (when, queue, when)
        )

    def due_queues(self, now: float, limit: int, until: float = 0.0) -> list[QueueDue]:
        """Return queues with recipients due, the earliest first. They are not found again before `until`."""
        found = self._database.execute(
            "SELECT name, due_at FROM queue WHERE due_at <= ? ORDER BY due_at, number LIMIT ?", (now, limit)
        ).fetchall()
        if found and until > now:
            self._database.execute(
                "UPDATE queue SET due_at = ? WHERE number IN"
                " (SELECT number FROM queue WHERE due_at <= ? ORDER BY due_at, number LIMIT ?)",
                (until, now, limit),
            )
        return [QueueDue(*row) for row in found]

    def next_due(self) -> float | None:
        """Return when the first queue is due, None if nothing waits."""
        due_at: float | None = self._database.execute(
            "SELECT min(due_at) FROM queue WHERE due_at IS NOT NULL"
        ).fetchone()[0]
        return due_at

    def _postpone(self, queue: int, now: float, until: float) -> None:
        """Let a queue be found due when its next recipient is, but not before `until` if that is due already."""
        self._database.execute(
            "UPDATE queue SET due_at = (SELECT CASE WHEN min(due_at) <= ? THEN max(min(due_at), ?) ELSE min(due_at) END"
            " FROM recipient WHERE queue = ? AND state = 0) WHERE number = ?",
            (now, until, queue, queue),
        )

    # ---- taking

    def take(
        self,
        name: str,
        now: float,
        limit: int,
        octets: int,
        until: float = 0.0,
        same_route: Callable[[str], bool] | None = None,
    ) -> list[Entry]:
        """Take what a queue has due: about `limit` recipients and bodies of `octets` octets, but at least one message.

        With `same_route`, recipients of the same messages that are due in other queues are taken too, if it is true of
        the name of that queue: the next hop gets such a message once. The attempts are recorded: they may be made once
        the transaction is committed. What else is due is not found by `due_queues` before `until`.
        """
        queue = self._queue(name)
        found = self._database.execute(
            f"{_TAKEN}, ? FROM recipient WHERE queue = ? AND state = 0 AND due_at <= ? ORDER BY due_at, number LIMIT ?",
            (name, queue, now, limit),
        ).fetchall()
        groups: dict[int, list[_Found]] = {}
        for row in found:
            groups.setdefault(row[0] >> PLACES, []).append(row)
        entries: list[Entry] = []
        for number, rows in groups.items():
            if entries and octets <= 0:
                break
            others = [] if same_route is None else self._due_elsewhere(number, queue, now, same_route)
            entry = self._entry(name, number, sorted(rows + others) if others else rows)
            if entry is None:
                self._for_each(_LOSE, [row[0] for row in rows])
                continue
            octets -= entry.size
            entries.append(entry)
        taken = _rows_of(entries)
        self._for_each("UPDATE recipient SET state = 1, attempts = attempts + 1 WHERE number IN", taken)
        self.checkpoints.logged += len(taken) * _ROW
        self._postpone(queue, now, until)
        return entries

    def _due_elsewhere(self, number: int, queue: int, now: float, same_route: Callable[[str], bool]) -> list[_Found]:
        """Return the recipients of a message that are due in other queues with the same route."""
        first = number << PLACES
        found = self._database.execute(
            f"{_TAKEN}, name FROM recipient NOT INDEXED JOIN queue ON queue.number = recipient.queue"
            " WHERE recipient.number BETWEEN ? AND ? AND queue != ? AND state = 0 AND recipient.due_at <= ?",
            (first, first + (1 << PLACES) - 1, queue, now),
        ).fetchall()
        return [row for row in found if same_route(row[6])]

    def _entry(self, queue: str, number: int, rows: list[_Found]) -> Entry | None:
        """Return a message with some of its recipients, None if it is missing or malformed."""
        found = self._database.execute("SELECT * FROM message WHERE number = ?", (number,)).fetchone()
        if found is None:
            return None
        _, message_id, sender, parameters, received_at, size, prefix, data = found
        try:
            recipients = tuple(_recipient(row[2], row[3]) for row in rows)
            rest = _NO_PARAMETERS if parameters is None else _decode_parameters(parameters)
        except (msgspec.MsgspecError, RecursionError):
            return None
        return Entry(
            number,
            MessageId(message_id),
            queue,
            Envelope(_path(sender), recipients, *rest),
            tuple(Row(row, attempts + 1, bool(told), name) for row, attempts, _, _, told, _, name in rows),
            prefix,
            self.body(number, size, data),
            received_at,
            max(0.0, -min(row[5] for row in rows)),  # see QueueAdmin
        )

    def body(self, number: int, size: int, data: bytes | None) -> Body:
        """Return the body of a message: its data, or the file it is stored in."""
        return self.files.body(number, size) if data is None else StoredBody(data)

    def _for_each(self, statement: str, numbers: Sequence[int]) -> None:
        """Execute a statement that ends with IN for lists of numbers."""
        for start in range(0, len(numbers), _LISTED):
            part = numbers[start : start + _LISTED]
            self._database.execute(f"{statement} ({','.join('?' * len(part))})", part)

    # ---- recording

    def record(self, records: Iterable[AttemptRecord]) -> list[int]:
        """Write how attempts ended. Return the numbers of messages that are finished and had a body file."""
        gone: list[int] = []
        touched: dict[str, float] = {}
        for row, queue, outcome, reply, next_try, delay_told in records:
            self.checkpoints.logged += _ROW
            if outcome is Outcome.DEFERRED:
                self._database.execute(_DEFER, (next_try, reply, delay_told, row))
            elif outcome is Outcome.RETURNED:
                self._database.execute(_RETURN, (next_try, row))
            else:
                gone.append(row)
                continue
            touched[queue] = min(next_try, touched.get(queue, next_try))
        for queue, when in touched.items():
            self._make_due(self._queue(queue), when)
        return self._delete(gone)

    def _delete(self, rows: Sequence[int]) -> list[int]:
        """Delete recipients, and messages without any. Return the numbers of those messages that had a body file."""
        if not rows:
            return []
        self._for_each("DELETE FROM recipient WHERE number IN", rows)
        return self.drop_empty({row >> PLACES for row in rows})

    # ---- what operators ask for

    def count_messages(self) -> int:
        """Return the number of messages."""
        found = self._database.execute("SELECT count(*) FROM message INDEXED BY message_listed").fetchone()
        return int(found[0])

    def admin_input(self) -> AdminInput:
        """Return what operators have asked for since the last look. Events are removed, instructions are not."""
        execute = self._database.execute
        instructions = execute(
            "SELECT instruction.recipient, action, state, coalesce(name, '') FROM instruction"
            " LEFT JOIN recipient ON recipient.number = instruction.recipient"
            " LEFT JOIN queue ON queue.number = recipient.queue WHERE is_done IS NULL LIMIT ?",
            (_MAX_INSTRUCTIONS,),
        ).fetchall()
        events = execute(
            "SELECT number, action, id, recipients FROM admin_event ORDER BY number LIMIT ?", (_MAX_INSTRUCTIONS,)
        ).fetchall()
        self._for_each("DELETE FROM admin_event WHERE number IN", [number for number, *_ in events])
        suspended = frozenset(name for (name,) in execute("SELECT name FROM suspended"))
        return AdminInput(
            [Instruction(*row) for row in instructions], [AdminEvent(*event) for _, *event in events], suspended
        )

    def carry_out(self, action: str, withdrawn: Sequence[int], at_rest: Sequence[int], now: float) -> list[int]:
        """Do what an operator asked for with recipients, and answer the instructions.

        Those that were withdrawn are not being delivered, whatever their state says. Those that were at rest may have
        been taken meanwhile: then they are not changed. Return the numbers of messages that are finished and had a body
        file.
        """
        busy: set[int] = set()
        for part in _parts(at_rest):
            among = ",".join("?" * len(part))
            statement = f"SELECT number FROM recipient WHERE number IN ({among}) AND state = {ATTEMPTING}"
            busy.update(number for (number,) in self._database.execute(statement, part))
        rows = sorted({*withdrawn, *(row for row in at_rest if row not in busy)})
        self.answer(sorted(busy), is_done=False)
        self.answer(rows, is_done=True)
        if action == "drop":
            return self._delete(rows)
        # What a retry asks for is due at a negative time: see QueueAdmin.
        change = f"state = {HELD}" if action == "hold" else f"state = {DUE}, due_at = {-now!r}"
        uncounted = f"attempts = attempts - (state = {ATTEMPTING})"
        self._for_each(f"UPDATE recipient SET {uncounted}, {change} WHERE number IN", rows)
        if action != "hold":
            for part in _parts(rows):
                among = ",".join("?" * len(part))
                found = self._database.execute(f"SELECT DISTINCT queue FROM recipient WHERE number IN ({among})", part)
                for (queue,) in found.fetchall():
                    self._make_due(queue, -now)
        return []

    def answer(self, rows: Sequence[int], *, is_done: bool) -> None:
        """Answer instructions."""
        self._for_each(f"UPDATE instruction SET is_done = {int(is_done)} WHERE recipient IN", rows)

    def take_rows(self, rows: Sequence[int]) -> list[Entry]:
        """Take recipients that wait, whenever they are due. It does not count as an attempt."""
        entries: list[Entry] = []
        for part in _parts(rows):
            among = ",".join("?" * len(part))
            found = self._database.execute(
                f"{_TAKEN}, name FROM recipient JOIN queue ON queue.number = recipient.queue"
                f" WHERE recipient.number IN ({among}) AND state != {ATTEMPTING} ORDER BY recipient.number",
                part,
            ).fetchall()
            groups: dict[int, list[_Found]] = {}
            for row in found:
                groups.setdefault(row[0] >> PLACES, []).append((row[0], row[1] - 1, *row[2:]))
            for number, each in groups.items():
                entry = self._entry(each[0][6], number, each)
                if entry is not None:
                    entries.append(entry)
        self._for_each(f"UPDATE recipient SET state = {ATTEMPTING} WHERE number IN", _rows_of(entries))
        return entries

    def write_hops(self, hops: Sequence[HopState]) -> None:
        """Write the next hops that are backing off, in place of those before."""
        self._database.execute("DELETE FROM hop")
        for hop in hops:
            self._database.execute("INSERT OR REPLACE INTO hop VALUES (?, ?, ?, ?)", hop)

    def reschedule(self, now: float, waits: Sequence[float], longest: float) -> int:
        """Give recipients that are due more than `longest` seconds from now a time of their schedule. Return how many.

        `waits` has the seconds after the first attempt, the second and so on, none above `longest`; the last is for all
        others.
        """
        cases = " ".join(f"WHEN {number} THEN {wait!r}" for number, wait in enumerate([waits[0], *waits[:-1]]))
        count = 0
        while True:
            changed = self._database.execute(
                f"UPDATE recipient SET due_at = ? + CASE attempts {cases} ELSE {waits[-1]!r} END WHERE number IN"
                " (SELECT number FROM recipient INDEXED BY recipient_due WHERE state = 0 AND due_at > ? LIMIT ?)",
                (now, now + longest, _RESCHEDULED),
            ).rowcount
            count += changed
            self.checkpoints.logged += changed * _ROW
            if changed < _RESCHEDULED:
                break
        self.refresh_queues()
        return count

    def shift_received(self, jump: ClockJump, after: int) -> int:
        """Correct when some messages were received, after a jump of the clock. Return the number of the last one.

        Messages up to the number `after` are done. All are when the number of the newest one is returned.

        After a jump back, only those are corrected that lie in the future: others may come from a node of a cluster
        whose clock is right, and would be returned too early.
        """
        if jump.seconds > 0:
            changed, bound = "received_at <= ?", jump.noticed_at - jump.seconds
        else:
            changed, bound = "received_at > ?", jump.noticed_at
        found = self._database.execute(
            "SELECT number FROM message INDEXED BY message_listed"
            f" WHERE number > ? AND number <= ? AND {changed} ORDER BY number LIMIT ?",
            (after, jump.newest, bound, _SHIFTED),
        ).fetchall()
        if not found:
            return jump.newest
        self._database.execute(
            f"UPDATE message SET received_at = received_at + ? WHERE number BETWEEN ? AND ? AND {changed}",
            (jump.seconds, found[0][0], found[-1][0], bound),
        )
        self.checkpoints.logged += len(found) * _PAGE  # with its body, a message has a page of its own, or several
        return int(found[-1][0])

    def received_at(self, numbers: Sequence[int]) -> dict[int, float]:
        """Return when messages were received, by their numbers, as far as they are here."""
        found: dict[int, float] = {}
        for part in _parts(numbers):
            among = ",".join("?" * len(part))
            statement = f"SELECT number, received_at FROM message WHERE number IN ({among})"
            found.update(self._database.execute(statement, part))
        return found

    def drop_empty(self, numbers: Iterable[int]) -> list[int]:
        """Delete the messages among these that have no recipient left. Return those with a body file."""
        filed: list[int] = []
        for part in _parts(sorted(numbers)):
            statement = _DROP_EMPTY.replace("(?)", f"({','.join('?' * len(part))})")
            filed += [number for number, is_filed in self._database.execute(statement, part) if is_filed]
        return filed


def add_message(values: list[object], put: Put) -> None:
    """Append the columns of a message."""
    message, envelope = put.message, put.message.envelope
    parameters = envelope[2:]
    values += (
        put.number,
        message.id,
        envelope.sender.text,
        None if parameters == _NO_PARAMETERS else _encode(parameters),
        message.received_at,
        message.body.size,
        message.prefix,
        put.data,
    )


def encode_dsn(recipient: Recipient) -> bytes | None:
    """Return the column `dsn` of a recipient."""
    if recipient.notify is None and recipient.orcpt is None:
        return None
    return _encode((None if recipient.notify is None else sorted(recipient.notify), recipient.orcpt))


def _rows_of(entries: Sequence[Entry]) -> list[int]:
    return [row.number for entry in entries for row in entry.rows]


def _parts(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), _LISTED):
        yield numbers[start : start + _LISTED]


def _path(text: str) -> MailPath:
    """Parse a path that was checked when it was received."""
    local, _, domain = text.rpartition("@")
    if not local:
        local, domain = text, ""
    if local.startswith('"'):
        local = local[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    return MailPath(text, local, domain.lower())


def _recipient(address: str, dsn: bytes | None) -> Recipient:
    if dsn is None:
        return Recipient(_path(address))
    notify, orcpt = _decode_dsn(dsn)
    return Recipient(_path(address), None if notify is None else frozenset(notify), orcpt)
