"""Messages that a sink keeps, to be looked at: the last ones in memory, and all of them in files if wanted.

    last:1000             the last 1,000 in memory, together at most 64 MiB
    maildir:DIR           each in a file of its own (https://cr.yp.to/proto/maildir.html)
    mbox:FILE             one file, "From " lines between, "From " within quoted with ">" (mboxrd, RFC 4155)
    jsonl:FILE            one JSON object a line: id, received_at, sender, recipients, size, and `text` or `base64`

A message's 250 is sent when it is in the file, so a sender that hears it finds it there; but nothing is synced to the
disk, because a sink promises nothing beyond the life of the machine. What is kept is the text as it was received,
without any field of the server's own. Files hold messages of any size, but for a line of JSON, which has at most
64 MiB; in memory a message has at most 16 MiB, and is shown cut when it is longer.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from email import policy
from pathlib import Path
from typing import Final, NamedTuple

import trio

from penstock import reply as replies
from penstock.delivery.base import Delivery
from penstock.message import Message
from penstock.metrics._session import SequenceTracker
from penstock.reply import Reply
from penstock.sequence import parse_counter
from penstock.sink.messageids import MessageIdTracker
from penstock.sink.stores import JsonLinesStore, MaildirStore, MboxStore, Store, Undo
from penstock.transaction import Transaction

_MOST_OCTETS: Final = 64 << 20
_MOST_MESSAGES: Final = 100_000
_DEFAULT_MESSAGES: Final = 1000
_MOST_IN_BATCH: Final = 256
_MOST_LARGE: Final = 2
"""Messages that were too long for the memory of a session, and are read and written at a time."""
_MOST_HEADER: Final = 65_536
"""Octets of a header that are looked at."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SUBJECT: Final = re.compile(rb"^Subject:((?:[^\r\n]|\r\n[ \t])*)", re.IGNORECASE | re.MULTILINE)
_MOST_SUBJECT: Final = 2000


_TOO_LONG: Final = Reply(552, "5.3.4", "The message is too long to be kept")
_STORES: Final[dict[str, Callable[[Path], Store]]] = {
    "maildir": MaildirStore,
    "mbox": MboxStore,
    "jsonl": JsonLinesStore,
}


class KeepSettings(NamedTuple):
    """What `--keep` asks for."""

    kind: str
    """last, maildir, mbox or jsonl."""
    path: Path | None = None
    messages: int = _DEFAULT_MESSAGES
    """How many are in memory."""

    @classmethod
    def parse(cls, text: str) -> KeepSettings:
        """Read "last:1000" or "maildir:DIR". Raise ValueError that shows the forms there are."""
        kind, _, rest = text.partition(":")
        if kind == "last" and rest.isascii() and rest.isdigit() and 1 <= int(rest) <= _MOST_MESSAGES:
            return cls(kind, None, int(rest))
        if kind in _STORES and rest:
            return cls(kind, Path(rest))
        raise ValueError(f"{text!r} is none of last:N (1 to {_MOST_MESSAGES}), maildir:DIR, mbox:FILE, jsonl:FILE")


@dataclass(slots=True)
class KeptMessage:
    """A message in memory."""

    id: str
    received_at: float
    """Seconds since the epoch."""
    sender: str
    recipients: tuple[str, ...]
    size: int
    """Octets of the text as it came."""
    raw: bytes
    """The text; its beginning when `is_cut`."""
    is_cut: bool = False
    """The text was too long to be kept whole."""
    _subject: str | None = field(default=None, repr=False)

    @property
    def subject(self) -> str:
        """The Subject field, decoded; "" without one. Reads the header at the first look."""
        if self._subject is None:
            self._subject = read_subject(self.raw)
        return self._subject


def header_of(raw: bytes) -> bytes:
    """Return the header of a text, the first 64 KiB of it at most."""
    if raw.startswith(b"\r\n"):
        return b""
    end = raw.find(b"\r\n\r\n", 0, _MOST_HEADER)
    return raw[: end + 2 if end >= 0 else _MOST_HEADER]


def read_subject(raw: bytes) -> str:
    """Return the Subject of a text, at most 500 characters, decoded from at most 2,000 octets: sessions wait for it."""
    found = _SUBJECT.search(header_of(raw))
    if found is None:
        return ""
    try:
        field = found[1][:_MOST_SUBJECT].decode("ascii", "surrogateescape")
        return str(policy.default.header_fetch_parse("Subject", field)).strip()[:500]
    except Exception as exc:  # noqa: BLE001 - the email package throws much at malformed fields
        return f"(unreadable: {type(exc).__name__})"


# ---- in memory


class Shelf:
    """The last messages, bounded in count and octets. One that alone is more than a quarter of that is kept cut."""

    def __init__(self, count: int = _DEFAULT_MESSAGES, octets: int = _MOST_OCTETS) -> None:
        if count < 1 or octets < 4:
            raise ValueError("a shelf has room for at least one message")
        self.count = count
        """Messages there is room for."""
        self.longest = octets // 4
        """Octets of a message that are kept."""
        self._most = octets
        self._put = 0
        """Messages that were ever put here: the place of the last one."""
        self._messages: dict[str, tuple[int, KeptMessage]] = {}
        """Each with its place, by their ids."""
        self._deleted: dict[str, int] = {}
        """The places of the last ones that were deleted, as many as there is room for messages."""
        self.octets = 0
        """Octets that are kept."""

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: KeptMessage) -> None:
        """Keep a message, and forget the oldest where there is no room."""
        if len(message.raw) > self.longest:
            message.raw = message.raw[: self.longest]
            message.is_cut = True
        self._put += 1
        self._messages[message.id] = (self._put, message)
        self.octets += len(message.raw)
        while len(self._messages) > self.count or self.octets > self._most:
            self._take(next(iter(self._messages)))

    def get(self, name: str) -> KeptMessage | None:
        """Return a message by its id."""
        _, message = self._messages.get(name, (0, None))
        return message

    def delete(self, name: str) -> bool:
        """Forget a message. Return False when it is not there."""
        place = self._take(name)
        if place:
            self._deleted[name] = place
            if len(self._deleted) > self.count:
                del self._deleted[next(iter(self._deleted))]
        return place > 0

    def _take(self, name: str) -> int:
        """Take a message away, and return its place; 0 when it is not there."""
        place, gone = self._messages.pop(name, (0, None))
        if gone is not None:
            self.octets -= len(gone.raw)
        return place

    def clear(self) -> int:
        """Forget all messages, and return how many they were."""
        count = len(self._messages)
        self._messages.clear()
        self._deleted.clear()
        self.octets = 0
        return count

    def newest(self, limit: int, before: str | None = None) -> list[KeptMessage]:
        """Return up to `limit` messages, the newest first; those that were put before a message when it is named.

        One that was deleted still has its place. All there are came later than one that was pushed out, and none
        before one that was never there, or is not among the last that were deleted.
        """
        end = self._put + 1
        if before is not None:
            end, _ = self._messages.get(before, (self._deleted.get(before, 0), None))
        found = (message for place, message in reversed(self._messages.values()) if place < end)
        return list(itertools.islice(found, limit))


# ---- the delivery


class HeaderMarks:
    """Takes the mark of each message out of a header field that the user names."""

    def __init__(self, name: str, book: Callable[[], SequenceTracker]) -> None:
        """Raise ValueError when there can be no such field."""
        if not re.fullmatch(r"[!-9;-~]{1,70}", name):
            raise ValueError(f"{name!r} is no name of a header field")
        self._field = re.compile(
            rb"^" + re.escape(name.encode()) + rb":(?:[ \t]|\r\n[ \t])*([^\r\n]*)", re.IGNORECASE | re.MULTILINE
        )
        self._book = book

    def take(self, raw: bytes) -> None:
        """Take the mark of a message that is accepted."""
        found = self._field.search(header_of(raw))
        counter = None if found is None else parse_counter(found[1].decode("ascii", "replace"))
        if counter is None:
            self._book().mark("")
        else:
            self._book().note(*counter)


class _Waiting:
    """A message that waits to be written to the files."""

    __slots__ = ("kept", "message", "reply", "written")

    def __init__(self, message: Message, kept: KeptMessage) -> None:
        self.message = message
        self.kept = kept
        self.written = trio.Event()
        self.reply: Reply | None = None


class KeepingDelivery(Delivery):
    """Keeps messages, on a shelf and in files (penstock.delivery.base). Its 250 promises that they are there."""

    def __init__(
        self,
        shelf: Shelf | None,
        stores: Sequence[Store] = (),
        marks: HeaderMarks | None = None,
        message_ids: MessageIdTracker | None = None,
    ) -> None:
        self.shelf = shelf
        self._stores = stores
        self._marks = marks
        self._message_ids = message_ids
        self._looked_at = shelf.longest if shelf is not None else _MOST_HEADER if marks or message_ids else 0
        """Octets of a text that are wanted in memory."""
        self._most_octets = min((store.most_octets for store in stores if store.most_octets is not None), default=None)
        self._waiting: list[_Waiting] = []
        self._work = trio.Event()
        self._is_closing = False
        self._has_finished: trio.Event | None = None
        """Set when the files are closed; None before they are opened."""
        self._large = trio.Semaphore(_MOST_LARGE)
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
            async with self._large:
                kept = await trio.to_thread.run_sync(self._read, message)
        if self._most_octets is not None and kept.size > self._most_octets:
            return _TOO_LONG.because(f"a line of JSON has at most {self._most_octets} octets of text")
        if not self._stores:
            return self._kept(kept)
        waiting = _Waiting(message, kept)
        self._waiting.append(waiting)
        self._work.set()
        await waiting.written.wait()
        assert waiting.reply is not None
        return waiting.reply

    def _read(self, message: Message) -> KeptMessage:
        """Return a message as the shelf has it, its text as far as that is looked at. May read the disk."""
        envelope, size = message.envelope, message.body.size
        recipients = tuple(recipient.path.text for recipient in envelope.recipients)
        raw = _beginning(message.body.chunks(), self._looked_at)
        return KeptMessage(
            message.id, message.received_at, envelope.sender.text, recipients, size, raw, is_cut=len(raw) < size
        )

    def _kept(self, message: KeptMessage) -> Reply:
        """Show a message that is where it should be."""
        if self._marks is not None:
            self._marks.take(message.raw)
        if self._message_ids is not None:
            self._message_ids.note(message.sender, header_of(message.raw))
        if self.shelf is not None:
            self.shelf.put(message)
        return Reply(250, "2.0.0", f"Ok: kept as {message.id}")

    async def _write_all(self) -> None:
        """Write what comes, until `aclose`. A system task: the sessions and the worker end before it."""
        assert self._has_finished is not None
        while self._waiting or not self._is_closing:
            await self._work.wait()
            self._work = trio.Event()
            while self._waiting:
                batch, self._waiting = self._waiting[:_MOST_IN_BATCH], self._waiting[_MOST_IN_BATCH:]
                await self._write(batch)
        for store in self._stores:
            await trio.to_thread.run_sync(store.close)
        self._has_finished.set()

    async def _write(self, batch: Sequence[_Waiting]) -> None:
        """Write messages to all files, or to none, and answer them."""
        failure: Reply | None = None
        messages = [each.message for each in batch]
        undos: list[Undo] = []
        try:
            for store in self._stores:
                undos.append(await trio.to_thread.run_sync(store.write, messages))  # noqa: PERF401 - one may throw
        except Exception as exc:  # noqa: BLE001 - whatever it is, these messages were not kept
            is_full = isinstance(exc, OSError) and exc.errno in _FULL
            failure = (replies.DISK_FULL if is_full else replies.TRY_LATER).because(str(exc))
            self.failures += len(batch)
            self.last_failure = str(exc)
            for undo in reversed(undos):
                with contextlib.suppress(OSError):  # it stays there, as a message does whose 250 nobody hears
                    await trio.to_thread.run_sync(undo)
        for each in batch:
            each.reply = failure or self._kept(each.kept)
            each.written.set()

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
    """Return the delivery that keeps what the settings ask for, in further stores, too, and takes a header's marks."""
    counts = [each.messages for each in settings if each.kind == "last"]
    shelf = Shelf(max(counts, default=_DEFAULT_MESSAGES)) if settings else None
    asked = [_STORES[each.kind](each.path) for each in settings if each.path is not None]
    return KeepingDelivery(shelf, [*asked, *stores], marks, message_ids)
