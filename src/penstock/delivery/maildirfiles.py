"""Files of messages in Maildirs (https://cr.yp.to/proto/maildir.html), many at a time. Blocks; for one thread.

A message is written to `tmp`, synced, renamed to `new`, and the folder is synced. Where the recipients' folders differ,
each gets a copy; all copies are on the disk before the first of them is renamed, so that a disk that fills up refuses
the message for all of them and leaves nothing half-written. What many messages share is done once (ext/files.pyx).
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from penstock._files import publish
from penstock.files import make_folders, sync_folder, write_all
from penstock.message import Message

_FOLDERS: Final = ("tmp", "new", "cur")
_STALE: Final = 36 * 3600
"""Seconds after which a file in tmp has no writer any more (the Maildir convention)."""
_AGAIN: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EMFILE, errno.ENFILE})
"""Errors of a message in a batch that may succeed alone: its folder is created, and it needs few descriptors."""
_MOST_OPEN: Final = 64
"""Files with a body from the disk whose descriptors are open at the same time; others are synced one by one."""


class Copy(NamedTuple):
    """A file of a message."""

    folder: Path
    """The Maildir."""
    head: bytes
    """The header fields above the body."""


class MaildirFiles:
    """Creates files with unique names."""

    def __init__(self, *, is_synced: bool) -> None:
        """With `is_synced`, what was written is on stable storage."""
        self._is_synced = is_synced
        self._numbers = itertools.count()
        # The convention writes / and : of a host name as octal numbers.
        self._host = socket.gethostname().replace("/", r"\057").replace(":", r"\072")

    def write(self, messages: Sequence[tuple[Message, Sequence[Copy]]]) -> list[str | Exception]:
        """Write messages, each with all its copies or with none. Return the name of its files, or why it failed."""
        names = [self._unique_name(message) for message, _ in messages]
        results = self._write(messages, names)
        for place, failure in enumerate(results):
            if isinstance(failure, OSError) and failure.errno in _AGAIN:
                results[place] = self._write_alone(messages[place], names[place])
        return [failure or name for failure, name in zip(results, names, strict=True)]

    def _unique_name(self, message: Message) -> str:
        """Return a unique name: time, process, counter and message id, host."""
        now = time.time_ns()
        unique = f"M{now // 1000 % 1_000_000}P{os.getpid()}Q{next(self._numbers)}I{message.id}"
        return f"{now // 1_000_000_000}.{unique}.{self._host}"

    def _write_alone(self, message: tuple[Message, Sequence[Copy]], name: str) -> Exception | None:
        """Write a message after creating the folders that are missing."""
        try:
            for copy in message[1]:
                make_maildir(copy.folder, is_synced=self._is_synced)
        except OSError as exc:
            return exc
        return self._write([message], [name], 0)[0]

    def _write(
        self, messages: Sequence[tuple[Message, Sequence[Copy]]], names: Sequence[str], most: int = _MOST_OPEN
    ) -> list[Exception | None]:
        folders: list[tuple[bytes, bytes]] = []
        numbers: dict[Path, int] = {}
        files: list[tuple[int, int, bytes, list[bytes] | int]] = []
        failures: list[Exception | None] = []
        for group, ((message, copies), name) in enumerate(zip(messages, names, strict=True)):
            failure: Exception | None = None
            try:
                contents = self._contents(message, copies, name, most)
            except Exception as exc:  # noqa: BLE001 - a body that cannot be read must not affect other messages
                failure, contents = exc, ()
            failures.append(failure)
            for copy, content in zip(copies, contents, strict=False):
                number = numbers.setdefault(copy.folder, len(folders))
                if number == len(folders):
                    folder = os.fsencode(copy.folder)
                    folders.append((folder + b"/tmp", folder + b"/new"))
                files.append((number, group, name.encode(), content))
                most -= isinstance(content, int) and content >= 0
        for group, error in enumerate(publish(folders, files, len(messages), self._is_synced)):
            if error:
                failures[group] = OSError(error, os.strerror(error), str(messages[group][1][0].folder))
        return failures

    def _contents(self, message: Message, copies: Sequence[Copy], name: str, most: int) -> Sequence[list[bytes] | int]:
        """Return the octets of each copy; descriptors of files in `tmp` if the body has to be read from the disk.

        After `most` descriptors it is -1 for files that are synced and closed.
        """
        if getattr(message.body, "in_memory", False):
            return [[copy.head, *message.body.chunks()] for copy in copies]
        descriptors: list[int] = []
        try:
            for copy in copies:
                path = copy.folder / "tmp" / name
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                descriptors.append(descriptor)
                write_all(descriptor, itertools.chain((copy.head,), message.body.chunks()))
                if len(descriptors) > most:
                    if self._is_synced:
                        os.fdatasync(descriptor)
                    descriptors[-1] = -1
                    os.close(descriptor)
        except BaseException:
            for copy, descriptor in zip(copies, descriptors, strict=False):
                if descriptor >= 0:
                    os.close(descriptor)
                with suppress(OSError):
                    (copy.folder / "tmp" / name).unlink()
            raise
        return descriptors


def make_maildir(folder: Path, *, is_synced: bool = True) -> None:
    """Create a Maildir if it is missing; with `is_synced` so that it survives a power failure. Raise OSError."""
    if all((folder / name).is_dir() for name in _FOLDERS):
        return
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    for name in _FOLDERS:
        make_folders(folder / name)
    if is_synced:
        for made in (folder, *(parent.parent for parent in missing)):
            sync_folder(made)


def sweep(folder: Path) -> None:
    """Remove the files that a crash has left unfinished in the `tmp` of a Maildir. Raise OSError."""
    oldest = time.time() - _STALE
    for path in (folder / "tmp").iterdir():
        with suppress(FileNotFoundError):  # others deliver meanwhile
            if path.stat().st_mtime < oldest:
                path.unlink()
