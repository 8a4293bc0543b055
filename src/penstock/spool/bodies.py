"""Bodies that are too large for the database: a file each, synced before its row is written."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from penstock.message import Body

_CHUNK: Final = 128 * 1024


class StoredBody:
    """A body that was read from the database."""

    __slots__ = ("_data", "size")
    in_memory = True

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def chunks(self) -> Iterator[bytes]:
        """Yield it in one piece."""
        return iter((self._data,))

    def close(self) -> None:
        """Let it go."""
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
    """The folder of the files, each named by the number of its message."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, number: int) -> Path:
        """Return the file of a message: a thousand share a folder, so that none grows without end."""
        return self._folder / f"{number // 1000:08d}" / str(number)

    def body(self, number: int, size: int) -> FiledBody:
        """Return the body of a message."""
        return FiledBody(self.path(number), size)

    def write(self, number: int, body: Body) -> None:
        """Write a body to stable storage. Raise OSError, and leave nothing behind then."""
        path = self.path(number)
        is_new = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123 - of a descriptor
                for chunk in body.chunks():
                    view = memoryview(chunk)
                    while view:
                        view = view[file.write(view) :]
                os.fsync(file.fileno())
            _sync(path.parent)
            if is_new:
                _sync(self._folder)
        except BaseException:
            self.remove(number)
            raise

    def remove(self, number: int) -> None:
        """Remove the file of a message that is over. A failure is swept up at the next start."""
        with suppress(OSError):
            self.path(number).unlink(missing_ok=True)

    def numbers(self) -> Iterator[int]:
        """Yield the numbers of all files there are; what is no file of ours is -1."""
        if not self._folder.is_dir():
            return
        for folder in self._folder.iterdir():
            for path in folder.iterdir():
                yield int(path.name) if path.name.isdecimal() else -1

    def sweep(self, kept: Collection[int]) -> int:
        """Remove the files of messages that are not there, and empty folders. Return how many files that were."""
        stray = [number for number in self.numbers() if number >= 0 and number not in kept]
        for number in stray:
            self.remove(number)
        if self._folder.is_dir():
            for folder in self._folder.iterdir():
                with suppress(OSError):  # not empty
                    folder.rmdir()
        return len(stray)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
