"""Delivery into Maildirs (https://cr.yp.to/proto/maildir.html).

A message is written to `tmp`, synced, renamed to `new`, and the folder is synced: only then does the client hear 250.
Where the recipients' folders differ, each gets a copy; all copies are on the disk before the first of them is renamed,
so that a disk that fills up refuses the message for all of them and leaves nothing half-written.

The body stands in the file byte for byte, its line ends CR LF.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final

import msgspec
import trio

from penstock import reply as replies
from penstock.delivery.base import Delivery
from penstock.message import Message
from penstock.message import Path as MailPath
from penstock.reply import Reply
from penstock.transaction import Transaction

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_STALE: Final = 36 * 3600
"""Seconds after which a file in tmp has no writer any more (the Maildir convention)."""
_FOLDERS: Final = ("tmp", "new", "cur")
_UNSAFE: Final = re.compile(rb"[^A-Za-z0-9_@+=.,~-]")
_LONGEST_NAME: Final = 200
"""Octets of a folder's name; file systems allow 255."""


class MaildirSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Delivery into Maildirs: on stable storage before the 250."""

    path: Annotated[
        str,
        msgspec.Meta(
            description="The Maildir, relative to data_dir; {domain} and {local} are those of the recipient",
            min_length=1,
        ),
    ] = "maildir"
    writers: Annotated[int, msgspec.Meta(ge=1, le=256, description="Messages that are being synced at a time")] = 16


class MaildirDelivery(Delivery):
    """Delivers into Maildirs below a folder. Its 250 promises that the message survives a power failure."""

    def __init__(self, settings: MaildirSettings, data_dir: Path) -> None:
        self._template = settings.path
        self._data_dir = data_dir
        self._limiter = trio.CapacityLimiter(settings.writers)
        self._numbers = itertools.count()
        # The convention writes / and : of a host name as octal numbers.
        self._host = socket.gethostname().replace("/", r"\057").replace(":", r"\072")

    async def start(self) -> None:
        """Make the folder that needs no recipient, and sweep what a crash has left. Raise OSError."""
        if "{" not in self._template:
            folder = self._data_dir / self._template
            await trio.to_thread.run_sync(_make_maildir, folder)
            await trio.to_thread.run_sync(_sweep, folder / "tmp")

    async def accept(self, message: Message, transaction: Transaction) -> Reply:  # noqa: ARG002 - the interface
        """Deliver to all recipients, or to none: 452 4.3.1 when the disk is full, OSError for other errors."""
        return await self.deliver(message)

    async def deliver(self, message: Message) -> Reply:
        """Deliver a message that has come from the spool. Return and raise what `accept` does."""
        copies = self._copies(message)
        try:
            await trio.to_thread.run_sync(self._deliver, message, copies, limiter=self._limiter)
        except OSError as exc:
            if exc.errno in _FULL:
                return replies.DISK_FULL.because(str(exc))
            raise
        return Reply(250, "2.0.0", f"Ok: delivered as {message.id}")

    def folder_of(self, recipient: MailPath) -> Path:
        """Return the Maildir of a recipient. Two recipients never share one by accident, and no name leads out of it.

        Local parts are compared without case, as in Postfix.
        """
        local, domain = _escape(recipient.local.lower()), _escape(recipient.domain or "localhost")
        # Not str.format: the template is no format string.
        path = self._template.replace("{domain}", domain).replace("{local}", local)
        return self._data_dir / path

    def _copies(self, message: Message) -> dict[Path, list[MailPath]]:
        copies: dict[Path, list[MailPath]] = {}
        for recipient in message.envelope.recipients:
            copies.setdefault(self.folder_of(recipient.path), []).append(recipient.path)
        return copies

    def _unique_name(self, message: Message) -> str:
        """Return a name that no other delivery has: time, process, counter and message id, host."""
        now = time.time_ns()
        unique = f"M{now // 1000 % 1_000_000}P{os.getpid()}Q{next(self._numbers)}I{message.id}"
        return f"{now // 1_000_000_000}.{unique}.{self._host}"

    def _deliver(self, message: Message, copies: dict[Path, list[MailPath]]) -> None:
        """Write all copies, then rename them all. Runs in a thread."""
        name = self._unique_name(message)
        written: list[Path] = []
        try:
            for folder, recipients in copies.items():
                _make_maildir(folder)
                written.append(folder)
                _write_copy(folder / "tmp" / name, message, recipients)
        except BaseException:
            for folder in written:
                (folder / "tmp" / name).unlink(missing_ok=True)
            raise
        for folder in written:
            (folder / "tmp" / name).rename(folder / "new" / name)
        for folder in written:
            _sync_folder(folder / "new")


def _escape(name: str) -> str:
    """Return a name as a relative path, from which it can be read back.

    Octets other than ASCII letters, digits and `@+=.,~_-` become %XX, and so does a dot in front. A long name is split
    into several folders whose names end in %, which no other name does: a file name has at most 255 octets.
    """
    if not name:
        return "%00"  # the local part of ""@example.org; a local part has no NUL
    escaped = _UNSAFE.sub(lambda found: f"%{found[0][0]:02X}".encode(), name.encode()).decode()
    if escaped.startswith("."):
        escaped = f"%2E{escaped[1:]}"
    parts = [escaped[start : start + _LONGEST_NAME] for start in range(0, len(escaped), _LONGEST_NAME)]
    return "%/".join(parts)


def _write_copy(path: Path, message: Message, recipients: Iterable[MailPath]) -> None:
    head = f"Return-Path: <{message.envelope.sender}>\r\n"  # RFC 5321 4.4: at final delivery, and once
    head += "".join(f"Delivered-To: {recipient}\r\n" for recipient in recipients)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb", buffering=64 * 1024) as file:  # noqa: PTH123 - of a descriptor
        file.write(head.encode())
        file.write(message.prefix)
        file.writelines(message.body.chunks())
        file.flush()
        os.fsync(file.fileno())


def _make_maildir(folder: Path) -> None:
    """Make a Maildir where there is none, so that it survives a power failure."""
    if (folder / "new").is_dir():
        return
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    for name in _FOLDERS:
        (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    for made in (folder, *(parent.parent for parent in missing)):
        _sync_folder(made)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove the files that a crash has left unfinished."""
    oldest = time.time() - _STALE
    for path in folder.iterdir():
        if path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)
