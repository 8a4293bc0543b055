"""Delivery into Maildirs: a message is on stable storage before its client hears 250.

One thread writes for all sessions and for the relay (penstock.delivery.maildirfiles). It takes all messages that came
since it last looked, and makes them durable together: a single message is written at once, and under load a batch is
what came in while the one before was synced. There is no timer. A message that cannot be written affects no other one.

The body stands in the file byte for byte, its line ends CR LF.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec
import outcome
import trio

from penstock import reply as replies
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
            description="The Maildir, relative to data_dir; {domain} and {local} are those of the recipient",
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
        self._most = settings.writers
        self._files = MaildirFiles(is_synced=True)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._token: trio.lowlevel.TrioToken
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._over = trio.Event()

    async def start(self) -> None:
        """Create the folder that needs no recipient, and sweep what a crash has left. Raise OSError."""
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
        if self._is_closed:
            raise trio.ClosedResourceError("the delivery is closed")
        if self._thread is None:
            self._token = trio.lowlevel.current_trio_token()
            thread = threading.Thread(target=self._work, name="penstock-maildir", daemon=True)
            thread.start()
            self._thread = thread
        self._jobs.put(_Job(message, done))

    async def aclose(self) -> None:
        """Deliver what was begun."""
        self._is_closed = True
        if self._thread is not None:
            self._jobs.put(None)
            with trio.CancelScope(shield=True):
                await self._over.wait()

    # ---- folders

    def folder_of(self, recipient: MailPath) -> Path:
        """Return the Maildir of a recipient. Two recipients never share one by accident, and no name leads out of it.

        Local parts are compared without case, as in Postfix.
        """
        if self._shared is not None:
            return self._shared
        local, domain = _escape(recipient.local.lower()), _escape(recipient.domain or "localhost")
        # Not str.format: the template is no format string.
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

    def _work(self) -> None:
        is_last = False
        while not is_last:
            batch, is_last = self._next_batch()
            if batch:
                results = self._write(batch)
                with suppress(trio.RunFinishedError):  # the loop has crashed, and no task waits any more
                    self._token.run_sync_soon(_answer, batch, results)
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._over.set)

    def _next_batch(self) -> tuple[list[_Job], bool]:
        """Wait for a message; return it with those that are already there, and whether it was the last batch."""
        batch: list[_Job] = []
        octets = _BATCH_OCTETS
        job = self._jobs.get()
        while job is not None:
            batch.append(job)
            octets -= job.message.size
            if len(batch) >= self._most or octets <= 0 or self._jobs.empty():
                break
            job = self._jobs.get_nowait()
        return batch, job is None

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


def _answer(batch: list[_Job], results: list[outcome.Outcome[Reply]]) -> None:
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
