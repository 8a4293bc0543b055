"""The keeper: a thread of the supervisor that owns the tables, for all workers.

Each worker inherits one end of a socket pair; the keeper has the other. It answers one question after
the other, so every operation is atomic. That is a thread and not a process of its own because it ends when the
supervisor ends, and so do the workers: there is no state in which workers run without it. It survives workers, and
their restarts.

Tried and dropped: SQLite shared by the workers (57 to 88 us for each operation and stalls of 100 ms with two writers),
shared memory (a worker that is killed leaves its locks behind).
"""

from __future__ import annotations

import select
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

from penstock.state.local import PAUSE, SAVE_INTERVAL, SWEEP
from penstock.state.snapshot import Snapshot
from penstock.state.tables import Changes, Tables
from penstock.state.wire import (
    MOST_OCTETS,
    Answer,
    Available,
    GiveBack,
    Greylist,
    Learn,
    Note,
    Take,
    decode_question,
    encode,
)


class Keeper:
    """Owns the tables: a context manager that starts and stops it. `connect` each worker."""

    def __init__(
        self,
        path: Path,
        report: Callable[[str], None],
        *,
        tables: Tables | None = None,
        interval: float = SAVE_INTERVAL,
    ) -> None:
        """`path` is the snapshot. `report` is called with an error in one line, by any thread."""
        self._tables = Tables() if tables is None else tables
        self._snapshot = Snapshot(path)
        self._report = report
        self._interval = interval
        self._poll = select.poll()
        self._sockets: dict[int, socket.socket] = {}
        """Those of the workers, by descriptor."""
        self._wake, self._woken = socket.socketpair()
        self._lock = threading.Lock()
        self._new: list[socket.socket] = []
        self._buffer = memoryview(bytearray(MOST_OCTETS))
        """A new buffer for each question would cost more than the rest."""
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="state", daemon=True)
        self._saver = ThreadPoolExecutor(1, "state-snapshot")
        self._saving: tuple[Future[None], Changes] | None = None
        self._save_at = time.monotonic() + interval
        self._is_failing = False

    def __enter__(self) -> Keeper:
        """Load the snapshot and start the thread.

        Raise OSError or sqlite3.Error if the snapshot can be neither used nor put aside.
        """
        problem = self._snapshot.load(self._tables)
        if problem:
            self._report(problem)
        self._woken.setblocking(False)
        self._poll.register(self._woken, select.POLLIN)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread, and save changes. Blocks."""
        self._is_stopping = True
        self._wake.send(b"\0")
        self._thread.join()
        self._saver.shutdown()
        for each in (self._wake, self._woken, *self._new):
            each.close()
        changes = self._tables.take_changes()
        if changes:
            try:
                self._snapshot.save(self._tables, changes)
            except (OSError, sqlite3.Error) as exc:
                self._report(f"greylisting and rates cannot be saved: {exc}")

    def connect(self) -> socket.socket:
        """Return the end of a worker: the worker inherits it, and the caller closes it then. Any thread may call it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        for each in (ours, theirs):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_OCTETS)
        with self._lock:
            self._new.append(ours)
        self._wake.send(b"\0")
        return theirs

    # ---- the thread

    def _run(self) -> None:
        while not self._is_stopping:
            wait = self._save_at - time.monotonic()
            for descriptor, _ in self._poll.poll(max(0.0, wait * 1000)):
                sock = self._sockets.get(descriptor)
                if sock is None:
                    self._accept()
                else:
                    self._serve(sock)
            if wait <= 0:
                self._save()
        if self._saving is not None:
            self._finish_save(*self._saving)
        for sock in self._sockets.values():
            sock.close()

    def _accept(self) -> None:
        self._woken.recv(4096)
        with self._lock:
            new, self._new = self._new, []
        for each in new:
            self._sockets[each.fileno()] = each
            self._poll.register(each, select.POLLIN)

    def _serve(self, sock: socket.socket) -> None:
        """Answer one question of a worker; when it has ended, forget it."""
        try:
            octets = sock.recv_into(self._buffer)
            if octets:
                question = decode_question(self._buffer[:octets])
                if isinstance(question, GiveBack):
                    self._tables.give_back(question.charges)
                elif isinstance(question, Note):
                    self._tables.note(question.charges)
                elif isinstance(question, Learn):
                    self._tables.learn(question.entries)
                else:
                    sock.send(encode(Answer(question.number, self._answer(question))))
                return
        except BlockingIOError:  # a worker that reads no answers does not get this one
            return
        except OSError:
            pass  # it was killed
        except (msgspec.MsgspecError, RecursionError, ArithmeticError) as exc:
            self._report(f"a worker has asked for what cannot be: {exc}")
        self._poll.unregister(sock)
        del self._sockets[sock.fileno()]
        sock.close()

    def _answer(self, question: Available | Take | Greylist) -> int:
        if isinstance(question, Take):
            return self._tables.take(question.charges)
        if isinstance(question, Available):
            return self._tables.available(question.charges)
        passes = self._tables.passes
        wait = self._tables.greylist(question.key, question.times)
        if self._tables.passes != passes:  # a pass is saved soon
            self._save_at = min(self._save_at, time.monotonic() + PAUSE)
        return wait

    # ---- snapshots

    def _save(self) -> None:
        """Start saving changes, unless a save is in progress."""
        self._save_at = time.monotonic() + self._interval
        if self._saving is not None:
            if not self._saving[0].done():
                self._save_at = time.monotonic() + PAUSE
                return
            self._finish_save(*self._saving)
        self._tables.sweep(SWEEP)
        changes = self._tables.take_changes()
        if changes:
            self._saving = self._saver.submit(self._snapshot.save, self._tables, changes), changes

    def _finish_save(self, future: Future[None], changes: Changes) -> None:
        self._saving = None
        exc = future.exception()  # waits
        if exc is None:
            self._is_failing = False
            return
        self._tables.mark_changed(changes)
        if not self._is_failing:  # once, until it works again
            self._report(f"greylisting and rates cannot be saved: {exc}")
        self._is_failing = True
