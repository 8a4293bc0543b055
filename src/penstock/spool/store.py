"""The database of the spool: plain, blocking, for one thread. The tables and their meaning stand in schema.sql.

What costs
----------
Each step of SQLite gives up the interpreter and wants it back, in competition with the loop that serves the clients. So
a transaction is few steps: rows go in by statements for 64, 16, 4 and 1 of them, and out by lists of numbers. Rows get
their numbers here, in order: inserting means appending, whether a thousand messages wait or a million.

A lane knows when the first of its recipients is due, perhaps too early and never too late: finding what is due is a
look into the index of lanes and one into that of the lane, never a scan.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Final

import msgspec

from penstock.message import Body, Envelope, MessageId, Recipient
from penstock.message import Path as MailPath
from penstock.spool.bodies import BodyFiles, StoredBody, sync
from penstock.spool.entry import ATTEMPTING, DUE, Entry, LaneDue, Outcome, Put, Recovered, Row, Settlement

LOCK: Final = "lock"
"""The file in the folder that a server holds a lock on."""
PLACES: Final = 20
"""Bits of the number of a recipient that tell its place: a message has at most a million recipients."""
_VERSION: Final = 2
_WIDTHS: Final = (64, 16, 4, 1)
"""Rows of an INSERT."""
_LISTED: Final = 500
"""Numbers of an IN list."""
_LANES_KNOWN: Final = 10_000
"""Names of lanes kept in memory."""
_PAGE: Final = 16 * 1024
"""Octets of a page of the database: with 8 KiB, bodies from 4 KB on cost 10 to 40 % more."""
_CACHE_KIB: Final = 16 * 1024
_CHECKPOINT_OCTETS: Final = 16 << 20
"""Octets put into the log before they are written to their places."""
_LOG_KEPT: Final = 64 << 20
"""Octets of its file that the log keeps when it begins anew; a reader that stays for long makes it grow."""
_LOCK_WAIT: Final = 2.0
"""Seconds to wait for the lock: an operator's command has it for a moment to see whether a server runs."""
_LOOK_OCTETS: Final = 1 << 20
"""Octets put into the log before the free space is looked at."""

Parameters = tuple[str, bool, int | None, str | None, str | None, str | None, bool]
_NO_PARAMETERS: Final[Parameters] = ("7BIT", False, None, None, None, None, False)
Dsn = tuple[list[str] | None, str | None]
_Found = tuple[int, int, str, bytes | None, int, float]
"""What `Store.take` reads of a recipient."""
_encode = msgspec.json.encode
_decode_parameters = msgspec.json.Decoder(Parameters).decode
_decode_dsn = msgspec.json.Decoder(Dsn).decode

_INSERT_MESSAGE: Final = "INSERT INTO message VALUES "
_INSERT_RECIPIENT: Final = "INSERT INTO recipient VALUES "
_DEFER: Final = """
UPDATE recipient SET state = 0, due_at = ?, last_reply = ?, delay_told = ? WHERE number = ? AND state = 1
"""
_RETURN: Final = "UPDATE recipient SET state = 0, due_at = ?, attempts = attempts - 1 WHERE number = ? AND state = 1"
_LOSE: Final = "UPDATE recipient SET state = 2, last_reply = 'the message is gone: run a check' WHERE number IN"
"""Keeps what can not be attempted from being found due for ever; `penstock spool check` tells of it."""
_DROP_EMPTY: Final = """
DELETE FROM message WHERE number IN (?) AND NOT EXISTS (
    SELECT 1 FROM recipient
    WHERE recipient.number BETWEEN message.number << 20 AND (message.number << 20) + (1 << 20) - 1
) RETURNING number, body IS NULL
"""


class SpoolError(Exception):
    """The spool can not be used: another server has it, or it is of another version."""


def connect(
    path: Path, *, timeout: float = 5.0, factory: type[sqlite3.Connection] = sqlite3.Connection
) -> sqlite3.Connection:
    """Open the database. `timeout` is the seconds to wait for another process that writes.

    The connection may change its thread, but only one at a time may use it.
    """
    database = sqlite3.connect(
        path, timeout=timeout, isolation_level=None, cached_statements=256, check_same_thread=False, factory=factory
    )
    database.execute("PRAGMA synchronous = FULL")  # a commit is on stable storage when it returns
    database.execute("PRAGMA foreign_keys = OFF")
    database.execute("PRAGMA temp_store = MEMORY")
    database.execute(f"PRAGMA journal_size_limit = {_LOG_KEPT}")
    # Some builds of SQLite overwrite what is deleted with zeros, which costs a delivered message 12 % more.
    database.execute("PRAGMA secure_delete = OFF")
    return database


def prepare(database: sqlite3.Connection, path: Path) -> None:
    """Make the tables of a new spool. Raise SpoolError when an old one is of another version."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version == 0:
        database.execute(f"PRAGMA page_size = {_PAGE}")
        database.execute("PRAGMA journal_mode = WAL")
        schema = resources.files("penstock.spool").joinpath("schema.sql").read_text()
        database.executescript(f"BEGIN IMMEDIATE;\n{schema}\nCOMMIT;")
    check_version(database, path)
    database.execute("PRAGMA journal_mode = WAL")
    # SQLite makes pages of it with the size that it knows, which is 4 KiB until it has read the database.
    database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")


def check_version(database: sqlite3.Connection, path: Path) -> None:
    """Raise SpoolError when a spool is of another version."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version != _VERSION:
        raise SpoolError(f"{path} was written by another version of Penstock ({version}; this one reads {_VERSION})")


class Checkpoints:
    """Writes what stands in the log to its places in the database, beside the transactions.

    SQLite would do that within a commit, and hundreds of clients would wait for it. Here a thread with a connection of
    its own does most of it, which no transaction waits for; what was logged meanwhile is little, and done between two
    transactions. Then the log begins anew.
    """

    def __init__(self, path: Path, database: sqlite3.Connection) -> None:
        self._folder = path.parent
        self._database = database
        self._beside = connect(path)
        self._thread: threading.Thread | None = None
        self._most = _CHECKPOINT_OCTETS
        self._looked_at = 0
        self.logged = 0
        """Octets that went into the log since it began, about."""

    def look(self) -> None:
        """Do what is due. To be called between transactions."""
        if self._thread is None:
            if self.logged - self._looked_at >= _LOOK_OCTETS:
                self._look_at_disk()
            if self.logged >= self._most:
                thread = threading.Thread(target=_checkpoint, args=(self._beside,), name="penstock-checkpoint")
                with suppress(RuntimeError):  # no thread to be had; asked for again after the next transaction
                    thread.start()
                    self._thread = thread
        elif not self._thread.is_alive():
            self._thread.join()
            self._thread = None
            _checkpoint(self._database)
            self.logged = self._looked_at = 0

    def _look_at_disk(self) -> None:
        """Let the log take an eighth of what is free at most: what it fills, the database can not grow into."""
        self._looked_at = self.logged
        with suppress(OSError):
            found = os.statvfs(self._folder)
            self._most = min(_CHECKPOINT_OCTETS, found.f_bavail * found.f_frsize // 8)

    def relieve(self) -> None:
        """Empty the log and give its space back: for a disk that is full, which the log may have filled itself."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        _checkpoint(self._database, "TRUNCATE")
        self.logged = self._looked_at = 0

    def close(self) -> None:
        """Wait for what is under way."""
        if self._thread is not None:
            self._thread.join()
        self._beside.close()


def _checkpoint(database: sqlite3.Connection, how: str = "PASSIVE") -> None:
    with suppress(sqlite3.Error):  # a full disk, say: the log goes on, and the next time is soon
        database.execute(f"PRAGMA wal_checkpoint({how})").fetchone()


class Store:
    """The spool of one server. Everything but `open` and `close` belongs into a `transaction`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files = BodyFiles(folder / "bodies")
        self._lanes: dict[str, int] = {}
        self._opened = ExitStack()
        """What is to be closed, the last first."""
        self._database: sqlite3.Connection
        self._next_number = 1
        self.puts = 0
        """Messages put so far."""
        self._next_lane = 1

    # ---- opening and closing

    def open(self) -> Recovered:
        """Open the spool and make good what a crash has left. Raise OSError, sqlite3.Error, SpoolError."""
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            sync(self._folder.parent)
        self._take_lock()
        try:
            self.files.prepare()
            path = self._folder / "spool.db"
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
            (last,) = execute("SELECT max(number) FROM lane").fetchone()
            self._next_lane = (last or 0) + 1
            # An attempt is recorded before it is made. Of those that were under way nobody knows how they ended: they
            # are made again, and a next hop that had taken the message gets it twice (RFC 1047).
            interrupted = execute("UPDATE recipient SET state = ? WHERE state = ?", (DUE, ATTEMPTING)).rowcount
            self._settle_lanes()
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
                    raise SpoolError(f"another server has the spool {self._folder}") from exc
                time.sleep(0.05)
            else:
                self._opened.callback(os.close, descriptor)
                return

    def _settle_lanes(self) -> None:
        """Let every lane know when it is due, and forget those that have nothing left."""
        self._database.execute(
            "UPDATE lane SET due_at ="
            " (SELECT min(due_at) FROM recipient WHERE recipient.lane = lane.number AND state = 0)"
        )
        self._database.execute("DELETE FROM lane WHERE number NOT IN (SELECT DISTINCT lane FROM recipient)")
        self._lanes.clear()

    def close(self) -> None:
        """Close the spool. Closing it again does nothing."""
        self._opened.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what the block has done, or nothing of it. Raise sqlite3.Error, and what the block raises."""
        self._roll_back()
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            self._lanes.clear()  # a lane may have been made that is no more
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        """Undo what is not committed. SQLite has done so itself after most errors of the disk."""
        with suppress(sqlite3.Error):  # the next transaction tries again
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    def tidy(self) -> None:
        """Do what is due between two transactions. Raises nothing: what could not be done is done later."""
        self.checkpoints.look()

    # ---- putting

    def new_number(self) -> int:
        """Return the number of a message that is to be put."""
        number = self._next_number
        self._next_number += 1
        return number

    def put(self, puts: Sequence[Put], now: float) -> None:
        """Write messages and their recipients."""
        messages: list[object] = []
        recipients: list[object] = []
        due: dict[int, float] = {}
        for put in puts:
            _add_message(messages, put)
            state, attempts = (ATTEMPTING, 1) if put.is_taken else (DUE, 0)
            first = put.number << PLACES
            for place, (recipient, name) in enumerate(zip(put.message.envelope.recipients, put.lanes, strict=True)):
                lane = self._lane(name)
                if not put.is_taken:
                    due[lane] = now
                dsn = None
                if recipient.notify is not None or recipient.orcpt is not None:
                    dsn = _encode((None if recipient.notify is None else sorted(recipient.notify), recipient.orcpt))
                recipients += (first + place, lane, state, now, attempts, recipient.path.text, dsn, "", 0)
            self.checkpoints.logged += put.message.body.size + 1000
        self.puts += len(puts)
        self._insert(_INSERT_MESSAGE, 8, messages)
        self._insert(_INSERT_RECIPIENT, 9, recipients)
        for lane, when in due.items():
            self._make_due(lane, when)

    def _insert(self, statement: str, columns: int, values: list[object]) -> None:
        """Insert rows by statements for many of them."""
        row = f"({','.join('?' * columns)})"
        start, left = 0, len(values) // columns
        for width in _WIDTHS:
            while left >= width:
                end = start + width * columns
                self._database.execute(statement + ",".join([row] * width), values[start:end])
                start, left = end, left - width

    # ---- lanes

    def _lane(self, name: str) -> int:
        number = self._lanes.get(name)
        if number is None:
            found = self._database.execute("SELECT number FROM lane WHERE name = ?", (name,)).fetchone()
            if found is None:
                number = self._next_lane
                self._next_lane += 1
                self._database.execute("INSERT INTO lane VALUES (?, ?, NULL)", (number, name))
            else:
                number = int(found[0])
            if len(self._lanes) >= _LANES_KNOWN:
                self._lanes.clear()
            self._lanes[name] = number
        return number

    def _make_due(self, lane: int, when: float) -> None:
        self._database.execute(
            "UPDATE lane SET due_at = ? WHERE number = ? AND (due_at IS NULL OR due_at > ?)", (when, lane, when)
        )

    def due_lanes(self, now: float, limit: int, until: float = 0.0) -> list[LaneDue]:
        """Return lanes that have something due, the earliest first. They are not found again before `until`."""
        found = self._database.execute(
            "SELECT name, due_at FROM lane WHERE due_at <= ? ORDER BY due_at, number LIMIT ?", (now, limit)
        ).fetchall()
        if found and until > now:
            self._database.execute(
                "UPDATE lane SET due_at = ? WHERE number IN"
                " (SELECT number FROM lane WHERE due_at <= ? ORDER BY due_at, number LIMIT ?)",
                (until, now, limit),
            )
        return [LaneDue(*row) for row in found]

    def next_due(self) -> float | None:
        """Return when the first lane is due, None when nothing waits."""
        due_at: float | None = self._database.execute(
            "SELECT min(due_at) FROM lane WHERE due_at IS NOT NULL"
        ).fetchone()[0]
        return due_at

    def _look_again(self, lane: int, now: float, until: float) -> None:
        self._database.execute(
            "UPDATE lane SET due_at = (SELECT CASE WHEN min(due_at) <= ? THEN max(min(due_at), ?) ELSE min(due_at) END"
            " FROM recipient WHERE lane = ? AND state = 0) WHERE number = ?",
            (now, until, lane, lane),
        )

    # ---- taking

    def take(self, name: str, now: float, limit: int, octets: int, until: float = 0.0) -> list[Entry]:
        """Take out what a lane has due: at most so many recipients, and bodies of so many octets, but at least one.

        The attempt is recorded: once the transaction is committed it may be made. What else is due is not found by
        `due_lanes` before `until`.
        """
        lane = self._lane(name)
        execute = self._database.execute
        found = execute(
            "SELECT number, attempts, address, dsn, delay_told, due_at FROM recipient"
            " WHERE lane = ? AND state = 0 AND due_at <= ? ORDER BY due_at, number LIMIT ?",
            (lane, now, limit),
        ).fetchall()
        groups: dict[int, list[_Found]] = {}
        for row in found:
            groups.setdefault(row[0] >> PLACES, []).append(row)
        entries: list[Entry] = []
        for number, rows in groups.items():
            if entries and octets <= 0:
                break
            entry = self._entry(name, number, rows)
            if entry is None:
                self._for_each(_LOSE, [row[0] for row in rows])
                continue
            octets -= entry.size
            entries.append(entry)
        taken = [row.number for entry in entries for row in entry.rows]
        self._for_each("UPDATE recipient SET state = 1, attempts = attempts + 1 WHERE number IN", taken)
        self._look_again(lane, now, until)
        return entries

    def _entry(self, lane: str, number: int, rows: list[_Found]) -> Entry | None:
        """Return a message for some of its recipients, None when it is gone or not as it was written."""
        found = self._database.execute("SELECT * FROM message WHERE number = ?", (number,)).fetchone()
        if found is None:
            return None
        _, message_id, sender, parameters, received_at, size, prefix, data = found
        try:
            recipients = tuple(_recipient(address, dsn) for _, _, address, dsn, _, _ in rows)
            rest = _NO_PARAMETERS if parameters is None else _decode_parameters(parameters)
        except msgspec.MsgspecError:
            return None
        return Entry(
            number,
            MessageId(message_id),
            lane,
            Envelope(_path(sender), recipients, *rest),
            tuple(Row(row, attempts + 1, bool(told), lane) for row, attempts, _, _, told, _ in rows),
            prefix,
            self.body(number, size, data),
            received_at,
            max(0.0, -min(row[5] for row in rows)),  # see QueueAdmin
        )

    def body(self, number: int, size: int, data: bytes | None) -> Body:
        """Return the body of a message: its data, or the file it is in."""
        return self.files.body(number, size) if data is None else StoredBody(data)

    def _for_each(self, statement: str, numbers: Sequence[int]) -> None:
        """Execute a statement that ends with IN for lists of numbers."""
        for start in range(0, len(numbers), _LISTED):
            part = numbers[start : start + _LISTED]
            self._database.execute(f"{statement} ({','.join('?' * len(part))})", part)

    # ---- settling

    def settle(self, settlements: Iterable[Settlement]) -> list[int]:
        """Write what has become of attempts. Return the numbers of messages that are over; see `finish`."""
        gone: list[int] = []
        touched: dict[str, float] = {}
        for row, lane, outcome, reply, next_try, delay_told in settlements:
            if outcome is Outcome.DEFERRED:
                self._database.execute(_DEFER, (next_try, reply, delay_told, row))
            elif outcome is Outcome.RETURNED:
                self._database.execute(_RETURN, (next_try, row))
            else:
                gone.append(row)
                continue
            touched[lane] = min(next_try, touched.get(lane, next_try))
        for lane, when in touched.items():
            self._make_due(self._lane(lane), when)
        self.checkpoints.logged += len(gone) * 1000
        if not gone:
            return []
        self._for_each("DELETE FROM recipient WHERE number IN", gone)
        return self.drop_empty({row >> PLACES for row in gone})

    def drop_empty(self, numbers: Iterable[int]) -> list[int]:
        """Delete those of the messages that have no recipient left. Return the numbers of those with a body file."""
        filed: list[int] = []
        for part in _parts(sorted(numbers)):
            statement = _DROP_EMPTY.replace("(?)", f"({','.join('?' * len(part))})")
            filed += [number for number, is_filed in self._database.execute(statement, part) if is_filed]
        return filed


def _add_message(values: list[object], put: Put) -> None:
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


def _parts(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), _LISTED):
        yield numbers[start : start + _LISTED]


def _path(text: str) -> MailPath:
    """Read a path that was checked when it came."""
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
