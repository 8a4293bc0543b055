"""Files on stable storage, and what a full disk looks like: one implementation for every package."""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Final

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_disk_full(exc: BaseException) -> bool:
    """Return whether an error means that no space is left: the disk, a quota, the file size limit, SQLITE_FULL."""
    if isinstance(exc, sqlite3.Error):
        return getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return isinstance(exc, OSError) and exc.errno in _FULL


def sync_folder(folder: Path) -> None:
    """Write the entries of a folder to stable storage. Raise OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes, *, mode: int | None = 0o600) -> None:
    """Replace a file by one with this content: readers and a crash see the old file or the new one, never a part.

    The mode is that of any new file if `mode` is None. Returns once the content and its folder entry are on stable
    storage. Raise OSError; then the old file is unchanged and nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o666 if mode is None else mode)
    try:
        with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123 - of a descriptor
            if mode is not None:
                os.fchmod(file.fileno(), mode)  # whatever the umask, and the file left by a crash
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
