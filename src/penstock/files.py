"""Atomic writes to stable storage, errors of a full disk, locks: one implementation for every package."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_TEMPORARY: Final = re.compile(r"\..+\.([0-9]+)\.[0-9a-f]{8}\.new", re.DOTALL)
"""Names of the files that `write_atomically` makes: with the number of the process."""
_OLD: Final = 3600.0
"""Seconds that no write takes."""
_YOUNG: Final = 60.0
"""Seconds in which a file stays in any case: /proc may hide the process of another user, or of a container."""
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


def make_folders(folder: Path, mode: int = 0o700) -> None:
    """Make a folder and its missing parents, all with this mode whatever the umask. Raise OSError.

    `Path.mkdir` would give the parents the mode that the umask allows.
    """
    for each in (*reversed(folder.parents), folder):
        if not each.is_dir():
            each.mkdir(mode=mode, exist_ok=True)


def open_private(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file that only its owner can read when it is created: an `opener` of `open`. Raise OSError."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def write_all(descriptor: int, pieces: Iterable[bytes]) -> None:
    """Write all octets of the pieces to a descriptor. Blocks. Raise OSError."""
    for piece in pieces:
        view = memoryview(piece)
        while view:
            view = view[os.write(descriptor, view) :]


def write_atomically(
    path: Path, data: bytes, *, mode: int | None = 0o600, replace: bool = True, keep_owner: bool = False
) -> None:
    """Write a file as a whole: readers and a crash see the old file or the new one, never a part.

    The mode is that of any new file if `mode` is None. With `keep_owner`, a replaced file keeps its owner and group,
    and remains readable for a group that is not ours. Returns once the content and its folder entry are on stable
    storage. Raise OSError, also FileExistsError if the file exists and `replace` is false; nothing is left behind.
    Whatever fails before the last step, the sync of the folder, leaves the old file unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o666 if mode is None else mode)
    try:
        try:
            if mode is not None:
                os.fchmod(descriptor, mode)  # whatever the umask
            if keep_owner:
                _keep_owner(descriptor, path)
            write_all(descriptor, (data,))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if replace:
            temporary.replace(path)
        else:
            path.hardlink_to(temporary)
            temporary.unlink()
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(*folders: Path) -> None:
    """Remove what processes that were killed in `write_atomically` have left in folders. It blocks, and never raises.

    Files of processes that are running stay, unless they are old: the number of a process is used again. So do those of
    the last minute.
    """
    for folder in folders:
        with suppress(OSError):
            for path in list(folder.iterdir()):
                found = _TEMPORARY.fullmatch(path.name)
                with suppress(OSError):
                    if found is not None and not _is_being_written(path, found[1]):
                        path.unlink()


def _is_being_written(path: Path, process: str) -> bool:
    age = time.time() - path.stat().st_mtime
    return age < (_OLD if Path(f"/proc/{process}").exists() else _YOUNG)


def _keep_owner(descriptor: int, path: Path) -> None:
    """Give a new file the owner and the group of the one it replaces."""
    with suppress(FileNotFoundError):
        old, new = path.stat(), os.fstat(descriptor)
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            os.fchown(descriptor, old.st_uid, old.st_gid)
        if old.st_gid != new.st_gid:
            os.fchmod(descriptor, new.st_mode & 0o777 | old.st_mode & 0o040)


@contextmanager
def memory_file(data: bytes) -> Iterator[int]:
    """Yield the descriptor of a file that exists in memory only, to be read from its beginning."""
    descriptor = os.memfd_create("penstock", os.MFD_CLOEXEC)
    try:
        write_all(descriptor, (data,))
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes and threads that lock it; wait for them. Raise OSError.

    Hold it for short work only. The kernel releases the lock of a process that dies.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
