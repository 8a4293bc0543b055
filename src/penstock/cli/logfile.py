"""Where the journal is written: standard error, or a file that log rotation renames."""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from penstock.cli.signals import stderr
from penstock.config import Settings
from penstock.privileges import Account, acting_as


class LogFile:
    """The descriptor of the journal, which stays the same number when the file is opened again."""

    def __init__(self, settings: Settings, owner: Account | None = None) -> None:
        """Open the file that the settings name. `owner` is the account of the workers. Raise OSError."""
        self._path = _path_of(settings)
        self._owner = owner
        if self._path is None:
            self.descriptor = stderr()
            _append(self.descriptor)
        else:
            self.descriptor = self._open(self._path)

    def move(self, settings: Settings) -> None:
        """Write to the file of other settings, unless one of both is standard error. Raise OSError."""
        path = _path_of(settings)
        if path is not None and self._path is not None and path != self._path:
            self._path = path
            self.reopen()

    def reopen(self) -> None:
        """Write to the file that has the name now; standard error stays as it is. Raise OSError."""
        if self._path is None:
            return
        new = self._open(self._path)
        try:
            os.dup2(new, self.descriptor, inheritable=False)  # at once: the thread that writes notices nothing
        finally:
            os.close(new)

    def _open(self, path: Path) -> int:
        """Open the file for appending, as the account of the workers, which open it themselves."""
        try:
            with acting_as(self._owner):
                return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as exc:
            raise OSError(exc.errno, f"journal.file: {path}: {exc.strerror}") from exc


def _path_of(settings: Settings) -> Path | None:
    """Return the file of the journal; None for standard error."""
    name = settings.journal.file
    return Path(settings.data_dir).absolute() / name if name else None


def _append(descriptor: int) -> None:
    """Have lines appended to a regular file: after copytruncate, the file would begin with a hole otherwise."""
    with suppress(OSError):
        if descriptor >= 0 and stat.S_ISREG(os.fstat(descriptor).st_mode):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)
