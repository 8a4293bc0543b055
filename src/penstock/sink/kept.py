"""Messages that a sink keeps: the last ones in memory, and all of them in files if wanted.

    last:1000             the last 1,000 in memory, together at most 128 MiB
    maildir:DIR           each in a file of its own (https://cr.yp.to/proto/maildir.html)
    mbox:FILE             one file, "From " lines between, "From " within quoted with ">" (mboxrd, RFC 4155)
    jsonl:FILE            one JSON object per line: id, received_at, sender, recipients, size, and `text` or `base64`

The 250 is sent after the message was written, so a sender that reads it finds the message in the file. Nothing is
synced to the disk: a sink promises nothing beyond the life of the machine. What is kept is the text as it was received,
without header fields of the server. Files take messages of any size, except a line of JSON: at most 64 MiB. A message
of more than 128 MiB does not fit into memory: its first MiB is kept there, and the message is marked as cut.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import trio

from penstock import reply as replies
from penstock.delivery.base import Delivery
from penstock.files import is_disk_full
from penstock.message import Message
from penstock.metrics._session import SequenceTracker
from penstock.reply import Reply
from penstock.sequence import parse_counter
from penstock.sink.messageids import MessageIdTracker
from penstock.sink.stores import JsonLinesStore, MaildirStore, MboxStore, Store, Undo
from penstock.transaction import Transaction

_MAX_OCTETS: Final = 128 << 20
"""Octets of all messages in memory."""
_MAX_MESSAGES: Final = 100_000
_DEFAULT_MESSAGES: Final = 1000
_MAX_BATCH: Final = 256
"""Messages that are written together."""
_MAX_READERS: Final = 2
"""Bodies in files that are read and written at a time."""
_CUT_AT: Final = 1 << 20
"""Octets that are kept of a message that does not fit into memory."""
_MAX_HEADER: Final = 65_536
"""Octets of a header that are searched."""
_TOO_LONG: Final = Reply(552, "5.3.4", "The message is too long to be kept")
_STORES: Final[dict[str, Callable[[Path], Store]]] = {
    "maildir": MaildirStore,
    "mbox": MboxStore,
    "jsonl": JsonLinesStore,
}


class KeepSettings(NamedTuple):
    """The value of `--keep`."""

    kind: str
    """last, maildir, mbox or jsonl."""
    path: Path | None = None
    messages: int = _DEFAULT_MESSAGES
    """Messages in memory."""

    @classmethod
    def parse(cls, text: str) -> KeepSettings:
        """Read "last:1000" or "maildir:DIR". Raise ValueError that shows the valid forms."""
        kind, _, rest = text.partition(":")
        if kind == "last" and rest.isascii() and rest.isdigit() and 1 <= int(rest) <= _MAX_MESSAGES:
            return cls(kind, None, int(rest))
        if kind in _STORES and rest:
            return cls(kind, Path(rest))
        raise ValueError(
            f"cannot keep {text!r}: expected last:N (N from 1 to {_MAX_MESSAGES}), maildir:DIR, mbox:FILE or jsonl:FILE"
        )


@dataclass(slots=True)
class KeptMessage:
    """A message in memory."""

    id: str
    received_at: float
    """Seconds since the epoch."""
    sender: str
    recipients: tuple[str, ...]
    size: int
    """Octets of the message as it was received."""
    raw: bytes = field(repr=False)
    """The message as it was received; its first octets when `is_cut`."""
    is_cut: bool = False
    """The message is larger than the memory for all messages."""
    is_read: bool = False
    """It was opened on the page."""
    summary: object = field(default=None, repr=False)
    """The columns of a list: filled in by penstock.sink.web.view, once."""


def header_of(raw: bytes) -> bytes:
    """Return the header of a message, the first 64 KiB of it at most."""
    if raw.startswith(b"\r\n"):
        return b""
    end = raw.find(b"\r\n\r\n", 0, _MAX_HEADER)
    return raw[: end + 2 if end >= 0 else _MAX_HEADER]


# ---- in memory


class KeptMessages:
    """The last messages, bounded in count and octets: the oldest are removed first."""

    def __init__(self, count: int = _DEFAULT_MESSAGES, octets: int = _MAX_OCTETS) -> None:
        if count < 1 or octets < 1:
            raise ValueError("at least one message and one octet must fit")
        self.count = count
        """Messages there is room for."""
        self.room = octets
        """Octets there is room for."""
        self._put = 0
        """Messages that were ever put here: the place of the last one."""
        self._messages: dict[str, tuple[int, KeptMessage]] = {}
        """Each with its place, by id."""
        self._deleted: dict[str, int] = {}
        """The places of the last deleted messages, at most `count`."""
        self.octets = 0
        """Octets that are kept."""
        self.changes = 0
        """Goes up with each message that comes, is deleted, or is marked as read."""

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: KeptMessage) -> None:
        """Keep a message, and drop the oldest ones to make room. One larger than all room is cut, and marked."""
        if len(message.raw) > self.room:
            message.raw = message.raw[: min(_CUT_AT, self.room)]
            message.is_cut = True
        self._put += 1
        self.changes += 1
        self._messages[message.id] = (self._put, message)
        self.octets += len(message.raw)
        while len(self._messages) > self.count or self.octets > self.room:
            self._remove(next(iter(self._messages)))

    def get(self, name: str) -> KeptMessage | None:
        """Return a message by its id."""
        _, message = self._messages.get(name, (0, None))
        return message

    def mark(self, name: str, *, is_read: bool) -> bool:
        """Mark a message as read or unread. Return False when it is not there."""
        message = self.get(name)
        if message is None:
            return False
        self.changes += message.is_read is not is_read
        message.is_read = is_read
        return True

    def delete(self, name: str) -> bool:
        """Delete a message. Return False when it is not there."""
        place = self._remove(name)
        if place:
            self.changes += 1
            self._deleted[name] = place
            if len(self._deleted) > self.count:
                del self._deleted[next(iter(self._deleted))]
        return place > 0

    def _remove(self, name: str) -> int:
        """Remove a message, and return its place; 0 when it is not there."""
        place, gone = self._messages.pop(name, (0, None))
        if gone is not None:
            self.octets -= len(gone.raw)
        return place

    def clear(self) -> int:
        """Delete all messages, and return their number."""
        count = len(self._messages)
        self._messages.clear()
        self._deleted.clear()
        self.octets = 0
        self.changes += 1
        return count

    def take(self) -> list[KeptMessage]:
        """Return all messages, the oldest first, and keep none."""
        found = [message for _, message in self._messages.values()]
        self.clear()
        return found

    def newest(self, limit: int, before: str | None = None) -> list[KeptMessage]:
        """Return up to `limit` messages, the newest first; with `before`, those put before the message of that id.

        A deleted message still has its place. Nothing is before a message that had to make room, that was never there,
        or that is not among the last deleted ones.
        """
        end = self._put + 1
        if before is not None:
            end, _ = self._messages.get(before, (self._deleted.get(before, 0), None))
        found = (message for place, message in reversed(self._messages.values()) if place < end)
        return list(itertools.islice(found, limit))


# ---- the delivery


class HeaderMarks:
    """Reads the sequence tag of each message from a header field that the user names."""

    def __init__(self, name: str, sequences: Callable[[], SequenceTracker]) -> None:
        """Raise ValueError when the name cannot be one of a header field (RFC 5322 3.6.8)."""
        if not re.fullmatch(r"[!-9;-~]{1,70}", name):
            raise ValueError(f"{name!r} is not a header field name")
        self._field = re.compile(
            rb"^" + re.escape(name.encode()) + rb":(?:[ \t]|\r\n[ \t])*([^\r\n]*)", re.IGNORECASE | re.MULTILINE
        )
        self._tracker = sequences

    def take(self, raw: bytes) -> None:
        """Record the tag of an accepted message."""
        found = self._field.search(header_of(raw))
        counter = None if found is None else parse_counter(found[1].decode("ascii", "replace"))
        if counter is None:
            self._tracker().mark("")
        else:
            self._tracker().note(*counter)


class _Waiting:
    """A message that waits to be written to the files."""

    __slots__ = ("kept", "message", "reply", "written")

    def __init__(self, message: Message, kept: KeptMessage) -> None:
        self.message = message
        self.kept = kept
        self.written = trio.Event()
        self.reply: Reply | None = None


class KeepingDelivery(Delivery):
    """Keeps messages in memory and in files (penstock.delivery.base). Its 250 promises that they are there."""

    def __init__(
        self,
        shelf: KeptMessages | None,
        stores: Sequence[Store] = (),
        marks: HeaderMarks | None = None,
        message_ids: MessageIdTracker | None = None,
    ) -> None:
        self.shelf = shelf
        self._stores = stores
        self._marks = marks
        self.message_ids = message_ids
        """Counts the Message-IDs of kept messages."""
        self._max_octets = min((store.most_octets for store in stores if store.most_octets is not None), default=None)
        self._waiting: list[_Waiting] = []
        self._work = trio.Event()
        self._is_closing = False
        self._has_finished: trio.Event | None = None
        """Set when the files are closed; None before they are opened."""
        self._readers = trio.Semaphore(_MAX_READERS)
        self.failures = 0
        """Messages that could not be written."""
        self.last_failure = ""

    async def start(self) -> None:
        """Open the files. Raise OSError."""
        for store in self._stores:
            await trio.to_thread.run_sync(store.open)
        if self._stores:
            self._has_finished = trio.Event()
            trio.lowlevel.spawn_system_task(self._write_all)

    async def accept(self, message: Message, transaction: Transaction) -> Reply:  # noqa: ARG002 - the interface
        """Keep a message. A body that lies in a file is read in a thread, two of them at a time."""
        if getattr(message.body, "in_memory", False):
            kept = self._read(message)
        else:
            async with self._readers:
                kept = await trio.to_thread.run_sync(self._read, message)
        if self._max_octets is not None and kept.size > self._max_octets:
            return _TOO_LONG.because(f"a line of JSON holds at most {self._max_octets} octets of text")
        if not self._stores:
            return self._kept(kept)
        waiting = _Waiting(message, kept)
        self._waiting.append(waiting)
        self._work.set()
        # Shielded: the thread that writes reads the body, which its owner closes when this returns or raises.
        with trio.CancelScope(shield=True):
            await waiting.written.wait()
        assert waiting.reply is not None
        return waiting.reply

    def _read(self, message: Message) -> KeptMessage:
        """Return a message as it is kept in memory, with as much of its text as is wanted. May read the disk."""
        envelope, size = message.envelope, message.body.size
        recipients = tuple(recipient.path.text for recipient in envelope.recipients)
        raw = _beginning(message.body.chunks(), self._wanted(size))
        return KeptMessage(
            message.id, message.received_at, envelope.sender.text, recipients, size, raw, is_cut=len(raw) < size
        )

    def _wanted(self, size: int) -> int:
        """Return how many octets of a message are wanted in memory."""
        if self.shelf is None:
            return _MAX_HEADER if self._marks is not None or self.message_ids is not None else 0
        return size if size <= self.shelf.room else min(_CUT_AT, self.shelf.room)

    def _kept(self, message: KeptMessage) -> Reply:
        """Make a message visible that was written to all files."""
        if self._marks is not None:
            self._marks.take(message.raw)
        if self.message_ids is not None:
            self.message_ids.note(message.sender, header_of(message.raw))
        if self.shelf is not None:
            self.shelf.put(message)
        return Reply(250, "2.0.0", f"Ok: kept as {message.id}")

    async def _write_all(self) -> None:
        """Write waiting messages until `aclose`. A system task: it outlives the sessions and the worker."""
        assert self._has_finished is not None
        while self._waiting or not self._is_closing:
            await self._work.wait()
            self._work = trio.Event()
            while self._waiting:
                batch, self._waiting = self._waiting[:_MAX_BATCH], self._waiting[_MAX_BATCH:]
                await self._write(batch)
        for store in self._stores:
            await trio.to_thread.run_sync(store.close)
        self._has_finished.set()

    async def _write(self, batch: Sequence[_Waiting]) -> None:
        """Write messages, each to all files or to none, and answer them. One that cannot be written fails alone."""
        failure = await self._write_together(batch)
        if failure is not None and len(batch) > 1:
            for each in batch:
                await self._write([each])
            return
        self.failures += failure is not None
        for each in batch:
            each.reply = failure or self._kept(each.kept)
            each.written.set()

    async def _write_together(self, batch: Sequence[_Waiting]) -> Reply | None:
        """Write messages to all files, or to none. Return why that failed."""
        messages = [each.message for each in batch]
        undos: list[Undo] = []
        try:
            for store in self._stores:
                undos.append(await trio.to_thread.run_sync(store.write, messages))  # noqa: PERF401 - one may raise
        except Exception as exc:  # noqa: BLE001 - whatever it is, these messages were not kept
            self.last_failure = str(exc)
            for undo in reversed(undos):
                with contextlib.suppress(OSError):  # a message without a 250 may stay: its client retries
                    await trio.to_thread.run_sync(undo)
            return (replies.DISK_FULL if is_disk_full(exc) else replies.TRY_LATER).because(str(exc))
        return None

    async def aclose(self) -> None:
        """Write what is waiting, and close the files."""
        self._is_closing = True
        self._work.set()
        if self._has_finished is not None:
            await self._has_finished.wait()


def _beginning(chunks: Iterable[bytes], most: int) -> bytes:
    """Return the first octets of a text."""
    found: list[bytes] = []
    for chunk in chunks if most else ():
        found.append(chunk[:most])
        most -= len(found[-1])
        if not most:
            break
    return b"".join(found)


def make_keeping(
    settings: Sequence[KeepSettings],
    marks: HeaderMarks | None,
    stores: Sequence[Store] = (),
    message_ids: MessageIdTracker | None = None,
) -> KeepingDelivery:
    """Return the delivery that keeps what the settings ask for, in further stores too, and reads tags from a header."""
    counts = [each.messages for each in settings if each.kind == "last"]
    shelf = KeptMessages(max(counts, default=_DEFAULT_MESSAGES)) if settings else None
    asked = [_STORES[each.kind](each.path) for each in settings if each.path is not None]
    return KeepingDelivery(shelf, [*asked, *stores], marks, message_ids)
