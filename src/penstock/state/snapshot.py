"""The copy of the tables in an SQLite file.

State is worth little to an operator: at worst, clients wait for greylisting once more. So a file that cannot be read is
put aside and a new one is begun, and what cannot be written now is written later; neither stops the mail.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

from penstock.state.tables import Changes, Greylisted, Tables

FILE: Final = "state.db"
"""Name of the snapshot in the state directory."""
_VERSION: Final = 1
_BATCH: Final = 1000
"""Entries that are written in one transaction: it bounds how long the interpreter is busy with them."""
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS buckets (key TEXT PRIMARY KEY, full_at INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS greylist (
    key TEXT PRIMARY KEY, first INTEGER NOT NULL, expires INTEGER NOT NULL, has_passed INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS saved (id INTEGER PRIMARY KEY CHECK (id = 0), at INTEGER NOT NULL);
"""
T = TypeVar("T")


class Snapshot:
    """The file. Blocks on the disk; used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, tables: Tables) -> str:
        """Fill the tables from the file, if there is one. Return its error, "" without one.

        Raise OSError or sqlite3.Error if the file can be neither used nor put aside.
        """
        try:
            self._load(tables)
        except sqlite3.OperationalError:
            raise  # the disk, or a lock: the file may be all right
        except sqlite3.DatabaseError as exc:
            aside = self._path.with_name(f"{self._path.name}.damaged")
            for suffix in ("-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            self._path.replace(aside)
            self._load(tables)
            return f"{self._path}: {exc}; greylisting and rates start empty, the file was renamed to {aside.name}"
        return ""

    def _load(self, tables: Tables) -> None:
        if not self._path.exists():
            return
        # The clock may have been set back since: times are kept as far from now as they were from the last save.
        with closing(self._open()) as database:
            (saved_at,) = database.execute("SELECT max(at) FROM saved").fetchone()
            shift = 0 if saved_at is None else min(0, tables.now() - saved_at)
            buckets = database.execute("SELECT key, full_at FROM buckets")
            greylist = database.execute("SELECT key, first, expires, has_passed FROM greylist")
            tables.load(
                ((key, full_at + shift) for key, full_at in buckets),
                (
                    (key, Greylisted(first + shift, expires + shift, bool(has_passed)))
                    for key, first, expires, has_passed in greylist
                ),
            )

    def save(self, tables: Tables, changes: Changes) -> None:
        """Write the entries that have changed. Raise sqlite3.Error or OSError; then some of them may be written."""
        with closing(self._open()) as database:
            for keys in _batches(changes.buckets):
                with database:
                    database.execute("BEGIN IMMEDIATE")
                    _save_buckets(database, tables, keys)
            for keys in _batches(changes.greylist):
                with database:
                    database.execute("BEGIN IMMEDIATE")
                    _save_greylist(database, tables, keys)
            with database:
                database.execute("REPLACE INTO saved VALUES (0, ?)", (tables.now(),))

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)  # it has addresses of people
        try:
            if os.geteuid() == 0:  # a supervisor that has not given up root; SQLite gives its other files to this owner
                owner = self._path.parent.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
        finally:
            os.close(descriptor)
        database = sqlite3.connect(self._path, timeout=5.0, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            _check_version(database)
            database.executescript(f"{_SCHEMA} PRAGMA user_version = {_VERSION};")
        except BaseException:
            database.close()
            raise
        return database


def _check_version(database: sqlite3.Connection) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version not in (0, _VERSION):
        raise sqlite3.DatabaseError(f"written by another version of Penstock ({version})")


def _batches(keys: Sequence[T]) -> Iterator[list[T]]:
    remaining = iter(keys)
    while batch := list(islice(remaining, _BATCH)):
        yield batch


def _save_buckets(database: sqlite3.Connection, tables: Tables, keys: Sequence[str]) -> None:
    found = [(key, tables.bucket(key)) for key in keys]
    database.executemany("REPLACE INTO buckets VALUES (?, ?)", [each for each in found if each[1] is not None])
    database.executemany("DELETE FROM buckets WHERE key = ?", [(key,) for key, full_at in found if full_at is None])


def _save_greylist(database: sqlite3.Connection, tables: Tables, keys: Sequence[str]) -> None:
    found = [(key, tables.greylisted(key)) for key in keys]
    rows = [(key, *entry) for key, entry in found if entry is not None]
    database.executemany("REPLACE INTO greylist VALUES (?, ?, ?, ?)", rows)
    database.executemany("DELETE FROM greylist WHERE key = ?", [(key,) for key, entry in found if entry is None])
