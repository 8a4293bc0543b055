"""Files that a sink keeps messages in: a Maildir, an mbox, JSON lines, and the dumps of Postfix's smtp-sink.

One thread writes for all sessions, many messages at a time. What is written is the text as it was received; only dumps
have header fields of the server. A text is read in pieces, so that its length costs no memory; a line of JSON is built
in memory, and has a bound. After a failed write a file is as long as before. New files have mode 0600, whatever
the umask allows, and the folders of a Maildir 0700: mail is private.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, cast

import msgspec

from penstock.delivery.maildirfiles import Copy, MaildirFiles, make_maildir
from penstock.files import make_folders, open_private
from penstock.message import Message, Recipient

_FROM: Final = re.compile(rb"^(>*From )", re.MULTILINE)
_LONG: Final = 1 << 20
"""Octets of a line that is written in several pieces."""
_MAX_LINE: Final = 64 << 20
"""Octets of the text in a line of JSON."""


Undo = Callable[[], None]
"""Removes messages that were written, because another store could not write them. Raises OSError."""


class Store(ABC):
    """Where one thread writes messages to."""

    most_octets: int | None = None
    """Octets of a text it accepts; None for any number."""

    def open(self) -> None:  # noqa: B027 - the names of some files depend on the time
        """Open or create the files. Raise OSError with the path."""

    @abstractmethod
    def write(self, messages: Sequence[Message]) -> Undo:
        """Write messages so that others can read them, all or none. Return what removes them. Raise OSError."""

    def close(self) -> None:  # noqa: B027 - most are closed after each message
        """Close the files."""


class MaildirStore(Store):
    """A Maildir (https://cr.yp.to/proto/maildir.html)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = MaildirFiles(is_synced=False)

    def open(self) -> None:
        """Create the folders."""
        make_maildir(self._path, is_synced=False)

    def write(self, messages: Sequence[Message]) -> Undo:
        """Write a file for each."""
        copies = (Copy(self._path, b""),)
        written = self._files.write([(message, copies) for message in messages])
        undos: list[Undo] = [
            partial((self._path / "new" / name).unlink, missing_ok=True) for name in written if isinstance(name, str)
        ]
        undo = partial(_undo_all, undos)  # a mail reader may have moved some of them
        failure = next((each for each in written if isinstance(each, Exception)), None)
        if failure is not None:
            undo()
            raise failure
        return undo


class _FileStore(Store):
    """One file that grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def open(self) -> None:
        """Open the file to append to it."""
        self._file = _open_private(self._path, "ab")

    def write(self, messages: Sequence[Message]) -> Undo:
        """Append the messages."""
        assert self._file is not None
        with _locked(self._file):
            before = _append(self._file, itertools.chain.from_iterable(map(self._pieces, messages)))
            after = os.fstat(self._file.fileno()).st_size
        return partial(_remove, self._file, before, after)

    def _pieces(self, message: Message) -> Iterable[bytes]:
        raise NotImplementedError

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class MboxStore(_FileStore):
    """An mbox file: lines ended by LF, "From " at the beginning of one quoted with ">" (mboxrd, RFC 4155)."""

    def _pieces(self, message: Message) -> Iterator[bytes]:
        when = time.strftime("%a %b %d %H:%M:%S %Y", time.gmtime(message.received_at))
        sender = re.sub(r"[\s\x00-\x1f\x7f]", "_", message.envelope.sender.text) or "MAILER-DAEMON"
        yield f"From {sender} {when}\n".encode()
        last = b"\n"
        for piece, begins_line in _lines(message.body.chunks()):
            start = 0 if begins_line else piece.find(b"\n") + 1 or len(piece)
            yield piece[:start] + _FROM.sub(rb">\1", piece[start:])
            last = piece[-1:]
        yield b"\n" if last == b"\n" else b"\n\n"


class JsonLinesStore(_FileStore):
    """A file of JSON objects, one per line."""

    most_octets = _MAX_LINE

    def _pieces(self, message: Message) -> Iterator[bytes]:
        envelope, raw = message.envelope, b"".join(message.body.chunks())
        record: dict[str, object] = {
            "id": message.id,
            "received_at": round(message.received_at, 3),
            "sender": envelope.sender.text,
            "recipients": [recipient.path.text for recipient in envelope.recipients],
            "size": len(raw),
        }
        try:
            record["text"] = raw.decode()
        except UnicodeDecodeError:
            record["base64"] = base64.b64encode(raw).decode()
        yield msgspec.json.encode(record) + b"\n"


# ---- the dumps of smtp-sink

_RECEIVED: Final = re.compile(
    rb"Received: from (?P<hello>\S*) \(\[(?P<address>[^\]]*)\]\)(?s:.*?)"
    rb"\r\n\tby (?P<host>\S+) \(.*?\) with (?P<with>\S+)"
)
"""The field above the body (penstock.server.received)."""
_ESCAPE: Final = re.compile(r"\\([0-7]{1,3}|[abfnrtv\\])")
_CONTROLS: Final = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\"}


def unescape(text: str) -> bytes:
    r"""Return what a text with the escapes of C means: \n, \t, \101 ..."""

    def meaning(found: re.Match[str]) -> str:
        return _CONTROLS.get(found[1]) or chr(int(found[1], 8) & 0xFF)

    return _ESCAPE.sub(meaning, text).encode("latin-1", "replace")


class DumpStore(Store):
    """The files of smtp-sink's -d (one for each message) and -D (one for many): see "DUMP FILE FORMAT" in smtp-sink(1).

    The parameters of MAIL and RCPT are written in a fixed order, not in that of the client.
    """

    def __init__(self, template: str, *, is_single: bool, start: bytes = b"") -> None:
        """`template` is expanded by strftime(3), in local time; `start` is written before each message."""
        self._template = template
        self._is_single = is_single
        self._start = start

    def write(self, messages: Sequence[Message]) -> Undo:
        """Write each message."""
        return _each(messages, self._write)

    def _write(self, message: Message) -> Undo:
        path, number = time.strftime(self._template, time.localtime(message.received_at)), os.urandom(8).hex()
        folder, slash, _ = path.rpartition("/")
        if slash:  # "dump/" is a folder: the name of the file is the number
            make_folders(Path(folder or "/"))
        if not self._is_single:
            with _open_private(Path(path), "ab") as file:
                size = _append(file, self._pieces(message, number))
            return partial(os.truncate, path, size)
        unique = Path(path + number)
        with _open_private(unique, "xb") as file:
            try:
                _write_all(file, self._pieces(message, number))
            except OSError:
                unique.unlink(missing_ok=True)
                raise
        return unique.unlink

    def _pieces(self, message: Message, number: str) -> Iterator[bytes]:
        yield self._start
        yield _head_of(message, number)
        last = b"\n"
        for piece, _ in _lines(message.body.chunks()):
            yield piece
            last = piece[-1:]
        yield b"\n" if last == b"\n" else b"\n\n"


def _head_of(message: Message, number: str) -> bytes:
    """Return the header fields that smtp-sink writes above a message."""
    envelope = message.envelope
    found = _RECEIVED.match(message.prefix)
    assert found is not None
    hello, address, host, protocol = (found[name].decode() for name in ("hello", "address", "host", "with"))
    protocol = "LMTP" if "LMTP" in protocol else "SMTP" if protocol == "SMTP" else "ESMTP"
    mail = [f"<{envelope.sender.text}>"]
    mail += [f"SIZE={envelope.size}"] if envelope.size is not None else []
    mail += [f"BODY={envelope.body_type}"] if envelope.body_type != "7BIT" else []
    mail += ["SMTPUTF8"] if envelope.smtputf8 else []
    mail += [f"RET={envelope.ret}"] if envelope.ret is not None else []
    mail += [f"ENVID={envelope.envid}"] if envelope.envid is not None else []
    mail += ["REQUIRETLS"] if envelope.requiretls else []
    date = format_datetime(datetime.fromtimestamp(int(message.received_at), UTC))
    lines = [
        f"X-Client-Addr: {address.replace('IPv6:', 'ipv6:')}",
        f"X-Client-Proto: {protocol}",
        *([f"X-Helo-Args: {hello}"] if hello else []),
        f"X-Mail-Args: {' '.join(mail)}",
        *(f"X-Rcpt-Args: {_rcpt_of(recipient)}" for recipient in envelope.recipients),
        f"Received: from {hello or address} ([{address}])",
        f"\tby {host} (Penstock) with {protocol} id {number};",
        f"\t{date} (UTC)",
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def _rcpt_of(recipient: Recipient) -> str:
    notify = f" NOTIFY={','.join(sorted(recipient.notify))}" if recipient.notify else ""
    return f"<{recipient.path.text}>{notify}{f' ORCPT={recipient.orcpt}' if recipient.orcpt is not None else ''}"


# ---- pieces


def _each(messages: Sequence[Message], write: Callable[[Message], Undo]) -> Undo:
    """Write one message after the other. Return what removes all of them, the last one first."""
    undos: list[Undo] = []
    try:
        for message in messages:
            undos.append(write(message))  # noqa: PERF401 - one may raise
    except OSError:
        _undo_all(undos)
        raise
    return partial(_undo_all, undos)


def _undo_all(undos: list[Undo]) -> None:
    """Call all of them, the last one first."""
    while undos:
        undos.pop()()


def _lines(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield a text with LF instead of CR LF, in pieces, and whether each begins a line.

    A piece ends with a line, unless the line is very long or the last one.
    """
    rest, begins_line = b"", True
    for chunk in chunks:
        rest += chunk
        end = rest.rfind(b"\n") + 1
        if not end and len(rest) > _LONG:
            end = len(rest) - 1  # not between CR and LF
        if end:
            yield rest[:end].replace(b"\r\n", b"\n"), begins_line
            begins_line = rest[end - 1 : end] == b"\n"
            rest = rest[end:]
    if rest:
        yield rest, begins_line


def _write_all(file: BinaryIO, pieces: Iterable[bytes]) -> None:
    """Write pieces, small ones together."""
    for data in _gathered(pieces):
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]


def _gathered(pieces: Iterable[bytes]) -> Iterator[bytes]:
    waiting: list[bytes] = []
    octets = 0
    for piece in pieces:
        waiting.append(piece)
        octets += len(piece)
        if octets >= _LONG:
            yield b"".join(waiting)
            waiting, octets = [], 0
    yield b"".join(waiting)


def _open_private(path: Path, mode: str) -> BinaryIO:
    """Open a file for unbuffered writing; a new one can be read by its owner only (mode 0600), whatever the umask."""
    return cast("BinaryIO", open(path, mode, buffering=0, opener=open_private))


@contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    """Lock a file that other processes may append to. Not all file systems and devices can."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def _remove(file: BinaryIO, before: int, after: int) -> None:
    """Cut off what was appended, unless another process has appended to it since. Raise OSError."""
    with _locked(file):
        if os.fstat(file.fileno()).st_size == after:
            os.ftruncate(file.fileno(), before)


def _append(file: BinaryIO, pieces: Iterable[bytes]) -> int:
    """Append pieces to a file, all of them or none. Return its previous length."""
    size = os.fstat(file.fileno()).st_size
    try:
        _write_all(file, pieces)
    except OSError:
        with suppress(OSError):  # a device has no length
            os.ftruncate(file.fileno(), size)
        raise
    return size
