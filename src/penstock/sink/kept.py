"""Messages that a sink keeps, to be looked at: the last ones in memory, and all of them in files if wanted.

    last:1000             the last 1,000 in memory, together at most 64 MiB
    maildir:DIR           each in a file of its own (https://cr.yp.to/proto/maildir.html)
    mbox:FILE             one file, "From " lines between, "From " within quoted with ">" (mboxrd, RFC 4155)
    jsonl:FILE            one JSON object a line: id, received_at, sender, recipients, size, and `text` or `base64`

A message's 250 is sent when it is in the file, so a sender that hears it finds it there; but nothing is synced to the
disk, because a sink promises nothing beyond the life of the machine. Files are written by one thread for all sessions,
many messages at a time. What is kept is the text as it was received, without any field of the server's own.
"""

from __future__ import annotations

import base64
import errno
import itertools
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email import policy
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, Protocol

import msgspec
import trio

from penstock import reply as replies
from penstock._tally import SequenceBook
from penstock.message import Message
from penstock.reply import Reply
from penstock.sequence import parse_counter

_MOST_OCTETS: Final = 64 << 20
_MOST_MESSAGES: Final = 100_000
_DEFAULT_MESSAGES: Final = 1000
_MOST_IN_BATCH: Final = 256
_MOST_LARGE: Final = 2
"""Messages that were too long for the memory of a session, and are in memory all the same while they are written."""
MAX_SIZE: Final = 64 << 20
"""Octets a message may have that is to be kept."""
_MOST_HEADER: Final = 65_536
"""Octets of a header that are looked at."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FROM: Final = re.compile(rb"^(>*From )", re.MULTILINE)
_HEADERS: Final = BytesHeaderParser(policy=policy.default)


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
    """Return the Subject of a text, at most 500 characters."""
    try:
        return str(_HEADERS.parsebytes(header_of(raw)).get("Subject", ""))[:500]
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
        self._most = octets
        self._messages: dict[str, KeptMessage] = {}
        self.octets = 0
        """Octets that are kept."""

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: KeptMessage) -> None:
        """Keep a message, and forget the oldest where there is no room."""
        if len(message.raw) > self._most // 4:
            message.raw = message.raw[: self._most // 4]
            message.is_cut = True
        self._messages[message.id] = message
        self.octets += len(message.raw)
        while len(self._messages) > self.count or self.octets > self._most:
            self.delete(next(iter(self._messages)))

    def get(self, name: str) -> KeptMessage | None:
        """Return a message by its id."""
        return self._messages.get(name)

    def delete(self, name: str) -> bool:
        """Forget a message. Return False when it is not there."""
        gone = self._messages.pop(name, None)
        if gone is not None:
            self.octets -= len(gone.raw)
        return gone is not None

    def clear(self) -> int:
        """Forget all messages, and return how many they were."""
        count = len(self._messages)
        self._messages.clear()
        self.octets = 0
        return count

    def newest(self, limit: int, before: str | None = None) -> list[KeptMessage]:
        """Return up to `limit` messages, the newest first; those that came before a message when it is named."""
        found = reversed(self._messages.values())
        if before is not None:
            found_before = itertools.dropwhile(lambda each: each.id >= before, found)
            return list(itertools.islice(found_before, limit))
        return list(itertools.islice(found, limit))


# ---- in files


class Store(Protocol):
    """Where messages are written to, by one thread."""

    def open(self) -> None:
        """Make what is needed. Raise OSError with the path."""

    def write(self, messages: Sequence[KeptMessage]) -> None:
        """Write messages so that others can read them. Raise OSError."""

    def close(self) -> None:
        """Give everything back."""


class MaildirStore:
    """A Maildir."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._numbers = itertools.count()
        self._host = socket.gethostname().replace("/", r"\057").replace(":", r"\072")

    def open(self) -> None:
        """Make the folders."""
        for name in ("tmp", "new", "cur"):
            (self._path / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    def write(self, messages: Sequence[KeptMessage]) -> None:
        """Write a file for each."""
        for message in messages:
            name = f"{int(message.received_at)}.P{os.getpid()}Q{next(self._numbers)}I{message.id}.{self._host}"
            unfinished = self._path / "tmp" / name
            unfinished.write_bytes(message.raw)
            unfinished.rename(self._path / "new" / name)

    def close(self) -> None:
        """Do nothing."""


class _FileStore:
    """One file that grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def open(self) -> None:
        """Open the file behind what it has."""
        self._file = self._path.open("ab", buffering=0)

    def write(self, messages: Sequence[KeptMessage]) -> None:
        """Append the messages, all of them or none."""
        assert self._file is not None
        data = memoryview(b"".join(self._encoded(message) for message in messages))
        size = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            os.ftruncate(self._file.fileno(), size)
            raise

    def _encoded(self, message: KeptMessage) -> bytes:
        raise NotImplementedError

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class MboxStore(_FileStore):
    """An mbox file, lines ended by LF."""

    def _encoded(self, message: KeptMessage) -> bytes:
        when = time.strftime("%a %b %d %H:%M:%S %Y", time.gmtime(message.received_at))
        sender = re.sub(r"[\s\x00-\x1f\x7f]", "_", message.sender) or "MAILER-DAEMON"
        text = _FROM.sub(rb">\1", message.raw.replace(b"\r\n", b"\n"))
        end = b"\n" if text.endswith(b"\n") else b"\n\n"
        return f"From {sender} {when}\n".encode() + text + end


class JsonLinesStore(_FileStore):
    """A file of JSON objects, one a line."""

    def _encoded(self, message: KeptMessage) -> bytes:
        record: dict[str, object] = {
            "id": message.id,
            "received_at": round(message.received_at, 3),
            "sender": message.sender,
            "recipients": message.recipients,
            "size": message.size,
        }
        try:
            record["text"] = message.raw.decode()
        except UnicodeDecodeError:
            record["base64"] = base64.b64encode(message.raw).decode()
        return msgspec.json.encode(record) + b"\n"


_STORES: Final[dict[str, Callable[[Path], Store]]] = {
    "maildir": MaildirStore,
    "mbox": MboxStore,
    "jsonl": JsonLinesStore,
}


# ---- the delivery


class HeaderMarks:
    """Takes the mark of each message out of a header field that the user names."""

    def __init__(self, name: str, book: Callable[[], SequenceBook]) -> None:
        """Raise ValueError when there can be no such field."""
        if not re.fullmatch(r"[!-9;-~]{1,70}", name):
            raise ValueError(f"{name!r} is no name of a header field")
        self._field = re.compile(rb"^" + re.escape(name.encode()) + rb":[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
        self._book = book

    def take(self, raw: bytes) -> None:
        """Take the mark of a message that is accepted."""
        found = self._field.search(header_of(raw))
        counter = None if found is None else parse_counter(found[1].decode("ascii", "replace"))
        if counter is None:
            self._book().mark("")
        else:
            self._book().note(*counter)


class KeepingDelivery:
    """Keeps messages, on a shelf and in files (penstock.delivery.base). Its 250 promises that they are there."""

    needs_body = True

    def __init__(self, shelf: Shelf | None, stores: Sequence[Store] = (), marks: HeaderMarks | None = None) -> None:
        self.shelf = shelf
        self._stores = stores
        self._marks = marks
        self._waiting: list[tuple[KeptMessage, Callable[[Reply], None]]] = []
        self._work = trio.Event()
        self._is_closing = False
        self._has_finished: trio.Event | None = None
        """Set when the files are closed; None before they are opened."""
        self._in_memory = trio.Semaphore(_MOST_LARGE)

    async def start(self) -> None:
        """Open the files. Raise OSError."""
        for store in self._stores:
            await trio.to_thread.run_sync(store.open)
        if self._stores:
            self._has_finished = trio.Event()
            trio.lowlevel.spawn_system_task(self._write_all)

    async def accept(self, message: Message) -> Reply:
        """Keep a message whose body may lie in a file; two of those are read at a time."""
        answered = trio.Event()
        answers: list[Reply] = []

        def done(reply: Reply) -> None:
            answers.append(reply)
            answered.set()

        async with self._in_memory:
            raw = await trio.to_thread.run_sync(_text_of, message)
            self._keep(message, raw, done)
            await answered.wait()
        return answers[0]

    def accept_later(self, message: Message, done: Callable[[Reply], None]) -> None:
        """Keep a message whose body is in memory."""
        self._keep(message, _text_of(message), done)

    def _keep(self, message: Message, raw: bytes, done: Callable[[Reply], None]) -> None:
        envelope = message.envelope
        recipients = tuple(recipient.path.text for recipient in envelope.recipients)
        kept = KeptMessage(message.id, message.received_at, envelope.sender.text, recipients, len(raw), raw)
        if not self._stores:
            done(self._kept(kept))
            return
        self._waiting.append((kept, done))
        self._work.set()

    def _kept(self, message: KeptMessage) -> Reply:
        """Show a message that is where it should be."""
        if self._marks is not None:
            self._marks.take(message.raw)
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

    async def _write(self, batch: Sequence[tuple[KeptMessage, Callable[[Reply], None]]]) -> None:
        """Write messages to all files, and answer them."""
        failure: Reply | None = None
        messages = [message for message, _ in batch]
        try:
            for store in self._stores:
                await trio.to_thread.run_sync(store.write, messages)
        except Exception as exc:  # noqa: BLE001 - whatever it is, these messages were not kept
            is_full = isinstance(exc, OSError) and exc.errno in _FULL
            failure = (replies.DISK_FULL if is_full else replies.TRY_LATER).because(str(exc))
        for message, done in batch:
            done(failure or self._kept(message))

    async def aclose(self) -> None:
        """Write what is waiting, and close the files."""
        self._is_closing = True
        self._work.set()
        if self._has_finished is not None:
            await self._has_finished.wait()


def _text_of(message: Message) -> bytes:
    return b"".join(message.body.chunks())


def make_keeping(settings: Sequence[KeepSettings], marks: HeaderMarks | None) -> KeepingDelivery:
    """Return the delivery that keeps what the settings ask for, and takes the marks of a header."""
    counts = [each.messages for each in settings if each.kind == "last"]
    shelf = Shelf(max(counts, default=_DEFAULT_MESSAGES)) if settings else None
    stores = [_STORES[each.kind](each.path) for each in settings if each.path is not None]
    return KeepingDelivery(shelf, stores, marks)
