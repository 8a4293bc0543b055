"""Where the journal is written: standard error, or a file that log rotation renames."""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from penstock.cli.journaling import stderr
from penstock.config import Settings
from penstock.privileges import Account


class LogFile:
    """The descriptor of the journal, which stays the same number when the file is opened again."""

    def __init__(self, settings: Settings, owner: Account | None = None) -> None:
        """Open the file that the settings name. `owner` is the account of the workers. Raise OSError."""
        name = settings.journal.file
        self._path = Path(settings.data_dir).absolute() / name if name else None
        self._owner = owner
        if self._path is None:
            self.descriptor = stderr()
            _append(self.descriptor)
        else:
            self.descriptor = self._open(self._path)

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
        """Open the file for appending; create it for the account of the workers, which open it themselves."""
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        if self._owner is not None and os.geteuid() == 0:
            try:
                os.fchown(descriptor, self._owner.uid, self._owner.gid)
            except OSError:
                os.close(descriptor)
                raise
        return descriptor


def _append(descriptor: int) -> None:
    """Have lines appended to a regular file: after copytruncate, the file would begin with a hole otherwise."""
    with suppress(OSError):
        if descriptor >= 0 and stat.S_ISREG(os.fstat(descriptor).st_mode):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)
