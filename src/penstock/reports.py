"""Reports for the owners of domains: counted until midnight UTC, kept in a file, sent as messages.

policy/aggregate.py counts what was found about messages (DMARC, RFC 9990), relay/tlsreport.py connections (TLS, RFC
8460). A day that is closed has its own counts: no message or connection is in two reports.
"""

from __future__ import annotations

import base64
import gzip
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any, ClassVar, Final

import msgspec
import trio

from penstock.files import write_atomically
from penstock.journal import Journal
from penstock.message import Envelope, Message, MessageId, MessageIds, Recipient
from penstock.message import Path as MailPath

Send = Callable[[Message], Awaitable[None]]
"""Puts a message into the queue."""
_DAY: Final = 86_400
_SAVE: Final = 60.0
"""Seconds between two copies of the counts to the file."""
_LINE: Final = 76


@dataclass(frozen=True, slots=True)
class TextBody:
    """A body in memory, outside any budget: that of a report."""

    text: bytes
    in_memory: ClassVar[bool] = True

    @property
    def size(self) -> int:
        """Octets of the body."""
        return len(self.text)

    def chunks(self) -> Iterator[bytes]:
        """Yield the body in one piece."""
        yield self.text

    def close(self) -> None:
        """Do nothing."""


class DailyReports(ABC):
    """Counts, and sends the reports of a day."""

    name: ClassVar[str]
    """For the journal."""

    def __init__(
        self,
        send: Send,
        journal: Journal,
        *,
        hostname: str,
        contact: str,
        file: Path,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`contact` is the sender of the reports, `file` keeps the counts across restarts."""
        self._send = send
        self._journal = journal
        self._hostname = hostname
        self._contact = contact
        self._file = file
        self._clock = clock
        self._ids = MessageIds()
        self._begin = int(clock())
        """When the day that is counted began, in seconds since 1970."""
        self._is_changed = False
        """The counts differ from those in the file."""

    async def run(self) -> None:
        """Save the counts periodically, and send the reports after midnight, until cancelled."""
        await self._load()
        try:
            while True:
                midnight = int(self._clock() // _DAY) * _DAY
                if midnight > self._begin:
                    self.close(midnight)
                await self.send_reports()
                await self._save()
                await trio.sleep(_SAVE)
        finally:
            with trio.CancelScope(shield=True):
                await self._save()

    @abstractmethod
    def close(self, end: int) -> None:
        """End the day that is counted, and begin another one."""

    @abstractmethod
    async def send_reports(self) -> int:
        """Send the reports of closed days whose time has come. Return the number of messages.

        What cannot be sent is kept for another try.
        """

    # ---- the file

    @abstractmethod
    def _encode(self) -> bytes:
        """Return all counts as JSON."""

    @abstractmethod
    def _decode(self, octets: bytes) -> Any:
        """Read what `_encode` has made, in a thread. Raise ValueError or MsgspecError."""

    @abstractmethod
    def _restore(self, saved: Any) -> None:
        """Add the counts of the file to those that were made meanwhile."""

    async def _load(self) -> None:
        """Read the file."""
        try:
            saved = await trio.to_thread.run_sync(self._read)
        except FileNotFoundError:
            return
        except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as exc:
            self._journal.hook_failed(self.name, "load", f"{self._file}: {exc}")
            return
        self._restore(saved)

    def _read(self) -> Any:
        return self._decode(self._file.read_bytes())

    async def _save(self) -> bool:
        """Write the file if something has changed. Return False if that fails."""
        if not self._is_changed:
            return True
        self._is_changed = False
        octets = self._encode()
        is_saved = False
        try:
            await trio.to_thread.run_sync(write_atomically, self._file, octets)
            is_saved = True
        except OSError as exc:
            self._journal.hook_failed(self.name, "save", f"{self._file}: {exc}")
        finally:
            self._is_changed |= not is_saved
        return is_saved

    # ---- the messages

    def _message(self, message_id: MessageId, domain: str, to: Recipient, content: Sequence[str]) -> Message:
        """Return the message with a report on a domain; `content` are the other lines of it, from the header on."""
        report_id = self._report_id(message_id)
        lines = [
            f"From: <{self._contact}>",
            f"To: <{to.path.text}>",
            f"Subject: Report Domain: {domain} Submitter: {self._hostname}",
            f" Report-ID: <{report_id}>",
            f"Date: {formatdate(self._clock()).replace('-0000', '+0000')}",
            f"Message-ID: <{report_id}>",
            "Auto-Submitted: auto-generated",
            "MIME-Version: 1.0",
            *content,
            "",
        ]
        sender = MailPath(self._contact, *self._contact.rsplit("@", 1))
        envelope = Envelope(sender, (to._replace(notify=frozenset({"NEVER"})),))
        return Message(message_id, envelope, b"", TextBody("\r\n".join(lines).encode()), self._clock())

    def _report_id(self, message_id: MessageId) -> str:
        return f"{message_id}@{self._hostname}"


def compressed(report: bytes, end: int) -> bytes:
    """Return a report on a day that ends then, compressed; the same report always gives the same octets."""
    return gzip.compress(report, mtime=end)


def in_base64(octets: bytes) -> Iterator[str]:
    """Yield the lines of an attachment in base64."""
    encoded = base64.b64encode(octets).decode()
    return (encoded[at : at + _LINE] for at in range(0, len(encoded), _LINE))
