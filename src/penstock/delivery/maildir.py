"""Delivery into Maildirs: a message is on stable storage before its client receives 250.

One thread writes for all sessions and for the relay (penstock.delivery.maildirfiles), and makes all messages durable
together that came while it wrote others (penstock.batches). A message that cannot be written affects no other one.

The file contains the body byte for byte, with CR LF as line ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec
import outcome
import trio

from penstock import reply as replies
from penstock.batches import BatchThread
from penstock.delivery.base import Delivery
from penstock.delivery.maildirfiles import Copy, MaildirFiles, make_maildir, sweep
from penstock.files import is_disk_full
from penstock.message import Message
from penstock.message import Path as MailPath
from penstock.reply import Reply
from penstock.transaction import Transaction

_BATCH_OCTETS: Final = 16 << 20
"""Octets of the messages that are written together: it bounds how long the first of them waits for the others."""
_UNSAFE: Final = re.compile(rb"[^A-Za-z0-9_@+=.,~-]")
_LONGEST_NAME: Final = 200
"""Octets of a folder's name; file systems allow 255."""

Done = Callable[[outcome.Outcome[Reply]], None]


class MaildirSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Delivery into Maildirs: on stable storage before the 250."""

    path: Annotated[
        str,
        msgspec.Meta(
            description="The Maildir, relative to data_dir; {domain} and {local} are replaced by the parts of the "
            "recipient",
            min_length=1,
        ),
    ] = "maildir"
    writers: Annotated[int, msgspec.Meta(ge=1, le=256, description="Messages that are written and synced together")] = (
        256
    )


class _Job(NamedTuple):
    """A message to be written."""

    message: Message
    done: Done


class MaildirDelivery(Delivery):
    """Delivers into Maildirs below a folder. Its 250 promises that the message survives a power failure."""

    def __init__(self, settings: MaildirSettings, data_dir: Path) -> None:
        self._template = settings.path
        self._data_dir = data_dir
        self._shared = None if "{" in settings.path else data_dir / settings.path
        """The Maildir of all recipients; None if they have their own."""
        self._files = MaildirFiles(is_synced=True)
        self._thread: BatchThread[_Job, outcome.Outcome[Reply]] = BatchThread(
            "penstock-maildir",
            self._write,
            _answer,
            lambda job: job.message.size,
            most=settings.writers,
            most_octets=_BATCH_OCTETS,
        )

    async def start(self) -> None:
        """Create a folder that all recipients share, and remove unfinished files of a crash. Raise OSError."""
        if self._shared is not None:
            await trio.to_thread.run_sync(make_maildir, self._shared)
            await trio.to_thread.run_sync(sweep, self._shared)

    async def accept(self, message: Message, transaction: Transaction) -> Reply:  # noqa: ARG002 - the interface
        """Deliver to all recipients, or to none: 452 4.3.1 when the disk is full, OSError for other errors."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.deliver_later(message, partial(trio.lowlevel.reschedule, trio.lowlevel.current_task()))
        # Not cancelled: the thread reads the body, which its owner closes when this returns or raises.
        reply: Reply = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        return reply

    def deliver_later(self, message: Message, done: Done) -> None:
        """Deliver a message, and call `done` in the trio thread with what `accept` returns or raises.

        The body is needed until then. Raise trio.ClosedResourceError after `aclose`, RuntimeError if there is no
        thread.
        """
        self._thread.put(_Job(message, done))

    @property
    def busy_for(self) -> float:
        """Seconds for which the messages that are being written have been: many if the disk is slow, or hangs."""
        return self._thread.busy_for

    async def aclose(self) -> None:
        """Finish the deliveries in progress."""
        await self._thread.aclose()

    # ---- folders

    def folder_of(self, recipient: MailPath) -> Path:
        """Return the Maildir of a recipient. Different recipients have different ones, all of them in `data_dir`.

        Local parts are compared without case, as in Postfix.
        """
        if self._shared is not None:
            return self._shared
        local, domain = _escape(recipient.local.lower()), _escape(recipient.domain or "localhost")
        # Not str.format, in which other braces have a meaning.
        path = self._template.replace("{domain}", domain).replace("{local}", local)
        return self._data_dir / path

    def _copies(self, message: Message) -> list[Copy]:
        """Return the files of a message, one for each folder."""
        recipients: dict[Path, list[MailPath]] = {}
        for recipient in message.envelope.recipients:
            recipients.setdefault(self.folder_of(recipient.path), []).append(recipient.path)
        # RFC 5321 4.4: Return-Path at final delivery, and once.
        sender = f"Return-Path: <{message.envelope.sender}>\r\n"
        return [
            Copy(folder, (sender + "".join(f"Delivered-To: {path}\r\n" for path in paths)).encode() + message.prefix)
            for folder, paths in recipients.items()
        ]

    # ---- the thread

    def _write(self, batch: list[_Job]) -> list[outcome.Outcome[Reply]]:
        """Write a batch; whatever happens, there is a result for each message."""
        try:
            written = self._files.write([(job.message, self._copies(job.message)) for job in batch])
        except Exception as exc:  # noqa: BLE001 - a bug; the tasks that wait must be answered
            if len(batch) == 1:
                return [outcome.Error(exc)]
            return [result for job in batch for result in self._write([job])]
        return [_result(job, name_or_failure) for job, name_or_failure in zip(batch, written, strict=True)]


def _result(job: _Job, written: str | Exception) -> outcome.Outcome[Reply]:
    if isinstance(written, str):
        return outcome.Value(Reply(250, "2.0.0", f"Ok: delivered as {job.message.id}"))
    if is_disk_full(written):
        return outcome.Value(replies.DISK_FULL.because(str(written)))
    return outcome.Error(written)


def _answer(batch: list[_Job], results: Sequence[outcome.Outcome[Reply]]) -> None:
    """Call back for all messages of a batch. Runs in the trio thread."""
    for job, result in zip(batch, results, strict=True):
        job.done(result)


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
