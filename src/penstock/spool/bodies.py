"""Bodies that are too large for the database: one file each, synced before its row is written.

The folders of the files are created and synced when the spool is opened, and stay: a file is on stable storage once it
and its own folder are synced, whatever else is written at the same time.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import outcome
import trio

from penstock.files import make_folders, sync_folder, write_all
from penstock.message import Body, Linkable

_CHUNK: Final = 128 * 1024
_FOLDERS: Final = 100
"""Folders that the files are spread over: of a million files, 10,000 are in each."""
_THREADS: Final = 8
"""Files written, synced and removed at a time."""


class StoredBody:
    """A body read from the database."""

    __slots__ = ("_data", "size")
    in_memory = True

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def chunks(self) -> Iterator[bytes]:
        """Yield the body in one piece."""
        return iter((self._data,))

    def close(self) -> None:
        """Release the memory."""
        self._data = b""


class FiledBody:
    """A body in a file of its own, opened when it is read."""

    __slots__ = ("_path", "size")

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self.size = size

    def chunks(self) -> Iterator[bytes]:
        """Yield the body in pieces of 128 KiB. Blocks on the disk. Raise OSError."""
        left = self.size
        with self._path.open("rb", buffering=0) as file:
            while left > 0:
                chunk = file.read(min(_CHUNK, left))
                if not chunk:
                    raise OSError(errno.EIO, f"{self._path} is shorter than its message")
                left -= len(chunk)
                yield chunk

    def close(self) -> None:
        """Do nothing: the file belongs to the spool."""


class BodyFiles:
    """The folder of the body files, named by the number of the message. All methods block on the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        """Create the folders on stable storage. Raise OSError."""
        folders = [self._folder / f"{number:02d}" for number in range(_FOLDERS)]
        if all(folder.is_dir() for folder in folders):
            return
        for folder in folders:
            make_folders(folder)
        sync_folder(self._folder)
        sync_folder(self._folder.parent)

    def path(self, number: int) -> Path:
        """Return the file of a message."""
        return self._folder / f"{number % _FOLDERS:02d}" / str(number)

    def body(self, number: int, size: int) -> FiledBody:
        """Return the body of a message."""
        return FiledBody(self.path(number), size)

    def write(self, number: int, body: Body) -> None:
        """Write a body to stable storage. Raise OSError; then nothing is left behind."""
        path = self.path(number)
        try:
            if not (isinstance(body, Linkable) and body.link(path)):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                try:
                    write_all(descriptor, body.chunks())
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            sync_folder(path.parent)
        except BaseException:
            self.remove(number)
            raise

    def remove(self, number: int) -> None:
        """Remove the file of a finished message. If that fails, the next start removes it."""
        with suppress(OSError):
            self.path(number).unlink(missing_ok=True)

    def numbers(self) -> Iterator[int]:
        """Yield the numbers of all files; -1 for a file that is not ours."""
        if not self._folder.is_dir():
            return
        for folder in self._folder.iterdir():
            for path in folder.iterdir():
                yield int(path.name) if path.name.isdecimal() else -1

    def sweep(self, kept: Collection[int]) -> int:
        """Remove the files without a message. Return how many."""
        stray = [number for number in self.numbers() if number >= 0 and number not in kept]
        for number in stray:
            self.remove(number)
        return len(stray)


Done = Callable[[outcome.Outcome[None]], None]


class BodyThreads:
    """The threads that write and remove files, a few at a time. Called in the trio thread."""

    def __init__(self, files: BodyFiles, report_bug: Callable[[Exception], None]) -> None:
        """`report_bug` gets the exceptions of `done` callbacks."""
        self._files = files
        self._report_bug = report_bug
        self._token: trio.lowlevel.TrioToken
        self._wanted: deque[tuple[Callable[[], None], Done]] = deque()
        self._running = 0
        self._idle = trio.Event()

    def start(self) -> None:
        """Store the trio token; call it in the trio loop."""
        self._token = trio.lowlevel.current_trio_token()

    @property
    def waiting(self) -> int:
        """Files that are being written or removed, or wait for it."""
        return len(self._wanted) + self._running

    async def write(self, number: int, body: Body) -> None:
        """Write a body to stable storage. Raise OSError. Cannot be cancelled."""
        self.write_later(number, body, partial(trio.lowlevel.reschedule, trio.lowlevel.current_task()))
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)

    def write_later(self, number: int, body: Body, done: Done) -> None:
        """Write a body to stable storage, then call `done` in the trio thread, with an OSError if it failed."""
        self._wanted.append((partial(self._files.write, number, body), done))
        self._begin()

    def remove_later(self, number: int) -> None:
        """Remove the file of a finished message."""
        self._wanted.append((partial(self._files.remove, number), lambda _: None))
        self._begin()

    async def aclose(self) -> None:
        """Wait until everything is done."""
        while self.waiting:
            self._idle = trio.Event()
            await self._idle.wait()

    def _begin(self) -> None:
        while self._wanted and self._running < _THREADS:
            act, done = self._wanted.popleft()
            self._running += 1
            over = partial(self._over_soon, done)
            try:
                trio.lowlevel.start_thread_soon(act, over)
            except RuntimeError as exc:  # no thread available
                over(outcome.Error(exc))

    def _over_soon(self, done: Done, result: outcome.Outcome[None]) -> None:
        """Report to the trio thread."""
        self._token.run_sync_soon(self._over, done, result)

    def _over(self, done: Done, result: outcome.Outcome[None]) -> None:
        self._running -= 1
        self._begin()
        if not self.waiting:
            self._idle.set()
        try:
            done(result)
        except Exception as exc:  # noqa: BLE001 - a bug in one callback must not affect the others
            self._report_bug(exc)
