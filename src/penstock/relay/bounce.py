"""What a sender is told of its message: that it failed, that it takes long, that it arrived (RFC 3464, RFC 3461).

A report is mail like any other, with the null sender, so that nobody is told of a report that fails (RFC 5321 4.5.5).
It has three parts: a text for people, a table for programs, and the message, or its header.

A report on a message with addresses or a header outside of ASCII has the types of RFC 6533 and needs SMTPUTF8 itself.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from typing import Annotated, ClassVar, Final, Literal

import msgspec

from penstock.message import NULL_PATH, Envelope, Message, MessageIds, Recipient
from penstock.relay.hop import Result
from penstock.smtp.grammar import decode_xtext

Action = Literal["failed", "delayed", "delivered", "relayed"]
"""RFC 3464 2.3.3. `relayed`: the next hop has it, and knows nothing of reports. There is no `expanded`: no lists."""
Wish = Literal["SUCCESS", "FAILURE", "DELAY"]
"""What NOTIFY asks for (RFC 3461 4.1)."""

_MOST_HEADER: Final = 64 * 1024
"""Octets of a header that are read and returned."""
_MOST_LINE: Final = 998
"""Octets of a line without CR LF (RFC 5322 2.1.1)."""
_MOST_TEXT: Final = 900
"""Octets of what a peer has said; it may be one word."""
_FOLD: Final = 76
_UNFIT: Final = re.compile(rb"\x00|(?<!\r)\n|\r(?!\n)|[^\r\n]{999}")
"""What no text may have: NUL, bare line ends, lines that are too long. A peer would refuse the report for it."""
_LINE_END: Final = re.compile(rb"\r\n|\r|\n")

_SUBJECTS: Final[dict[Action, str]] = {
    "failed": "Undelivered mail returned to sender",
    "delayed": "Delayed mail, still being tried",
    "delivered": "Mail delivered",
    "relayed": "Mail relayed to a server that sends no reports",
}
_TEXTS: Final[dict[Action, str]] = {
    "failed": "Your message could not be delivered to the recipients below. It will not be tried again.",
    "delayed": "Your message could not be delivered yet to the recipients below. You need not send it again: it will "
    "be tried until {until}.",
    "delivered": "Your message was delivered to the recipients below.",
    "relayed": "Your message was handed to the mail servers of the recipients below, which do not report what becomes "
    "of it.",
}


class ReportSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Reports to senders."""

    return_most: Annotated[
        int,
        msgspec.Meta(ge=0, le=10_485_760, description="Octets of a message that is returned whole; else its header"),
    ] = 65_536


@dataclass(frozen=True, slots=True)
class TextBody:
    """A body in memory that nobody counts: that of a report."""

    text: bytes
    in_memory: ClassVar[bool] = True

    @property
    def size(self) -> int:
        """Octets of the body."""
        return len(self.text)

    def chunks(self) -> Iterator[bytes]:
        """Yield it."""
        yield self.text

    def close(self) -> None:
        """Do nothing."""


def wants(recipient: Recipient, wish: Wish) -> bool:
    """Say whether the sender wants to hear of this: of failures and delays when it did not say (RFC 3461 4.1)."""
    return wish != "SUCCESS" if recipient.notify is None else wish in recipient.notify


class Reporter:
    """Writes reports in the name of a server."""

    def __init__(self, settings: ReportSettings, hostname: str, ids: MessageIds) -> None:
        self._return_most = settings.return_most
        self._hostname = hostname
        self._ids = ids

    def report(
        self,
        action: Action,
        original: Message,
        told: Sequence[tuple[Recipient, Result]],
        now: float,
        *,
        retry_until: float | None = None,
    ) -> Message:
        """Return the report to the sender of a message, who must not be the null one.

        Reads the body: may block on the disk.
        """
        envelope = original.envelope
        assert envelope.sender.text, "never a report to the null sender"
        full = action == "failed" and envelope.ret != "HDRS" and original.size <= self._return_most
        returned = _whole(original) if full else b""
        if not returned or envelope.body_type == "BINARYMIME" or _UNFIT.search(returned):
            full, returned = False, _header_of(original)
        is_global = envelope.smtputf8 and not (returned.isascii() and _is_ascii(envelope.sender.text, told))
        report = _Report(action, original, told, now, retry_until, self._hostname, is_global=is_global)
        message_id = self._ids.next()
        boundary = f"=_{message_id}"
        while boundary.encode() in returned:
            boundary += "_"
        text = report.text(message_id, boundary, returned, full=full)
        body_type = "7BIT" if text.isascii() else "8BITMIME"
        to = Envelope(NULL_PATH, (Recipient(envelope.sender),), body_type, smtputf8=is_global)
        return Message(message_id, to, b"", TextBody(text), now)


@dataclass(frozen=True, slots=True)
class _Report:
    """What one report is made of."""

    action: Action
    original: Message
    told: Sequence[tuple[Recipient, Result]]
    now: float
    retry_until: float | None
    hostname: str
    is_global: bool
    """Not ASCII: the types of RFC 6533."""

    def text(self, message_id: str, boundary: str, returned: bytes, *, full: bool) -> bytes:
        """Return the header and the body of the report."""
        kind = "global" if self.is_global else "rfc822"
        status_type = "message/global-delivery-status" if self.is_global else "message/delivery-status"
        headers_type = "message/global-headers" if self.is_global else "text/rfc822-headers"
        returned_type = f"message/{kind}" if full else headers_type
        parts = [
            (f"text/plain; charset={'utf-8' if self.is_global else 'us-ascii'}", "Notification", self._for_people()),
            (status_type, "Delivery report", self._for_programs()),
        ]
        lines = [*self._header(message_id, boundary, status_type.removeprefix("message/")), ""]
        for content_type, description, content in parts:
            encoding = "7bit" if content.isascii() else "8bit"
            lines += [f"--{boundary}", *_part_header(content_type, description, encoding), "", content]
        encoding = "7bit" if returned.isascii() else "8bit"
        description = "Undelivered message" if full else "Message header"
        lines += [f"--{boundary}", *_part_header(returned_type, description, encoding), "", ""]
        head = "\r\n".join(lines).encode()
        return head + returned + f"\r\n--{boundary}--\r\n".encode()

    def _header(self, message_id: str, boundary: str, report_type: str) -> list[str]:
        sender = self.original.envelope.sender.text
        return [
            f"Date: {_date(self.now)}",
            f"From: Mail Delivery System <MAILER-DAEMON@{self.hostname}>",
            f"To: <{sender}>",
            f"Subject: {_SUBJECTS[self.action]}",
            f"Message-ID: <{message_id}@{self.hostname}>",
            "Auto-Submitted: auto-replied",  # RFC 3834 5
            "MIME-Version: 1.0",
            # RFC 6522 3: the report-type is the subtype of the second part.
            f'Content-Type: multipart/report; report-type={report_type};\r\n\tboundary="{boundary}"',
        ]

    def _for_people(self) -> str:
        until = "" if self.retry_until is None else _date(self.retry_until)
        lines = [f"This is the mail system at {self.hostname}.", ""]
        lines += textwrap.wrap(_TEXTS[self.action].format(until=until), _FOLD)
        for recipient, result in self.told:
            lines.append("")
            said = f"{result.hop} said: {result.text}" if result.is_said and result.hop else result.text
            lines += _folded(f"<{recipient.path.text}>: {self._fit(said)}", "    ")
        return "\r\n".join([*lines, ""])

    def _for_programs(self) -> str:
        """Return the fields of RFC 3464 2.2 and 2.3."""
        envid = decode_xtext(self.original.envelope.envid or "")
        lines = [f"Original-Envelope-Id: {envid}"] if envid else []
        lines += [f"Reporting-MTA: dns; {self.hostname}", f"Arrival-Date: {_date(self.original.received_at)}"]
        for recipient, result in self.told:
            lines += ["", *self._fields_of(recipient, result)]
        return "\r\n".join([*lines, ""])

    def _fields_of(self, recipient: Recipient, result: Result) -> Iterator[str]:
        address = recipient.path.text
        if recipient.orcpt:
            yield f"Original-Recipient: {_decoded_orcpt(recipient.orcpt)}"
        yield f"Final-Recipient: {'rfc822' if address.isascii() else 'utf-8'}; {address}"
        yield f"Action: {self.action}"
        yield f"Status: {result.status}"
        if result.is_said and result.hop:
            yield f"Remote-MTA: {_remote_mta(result.hop)}"
        if result.text and self.action in ("failed", "delayed"):
            kind = "smtp" if result.is_said else "x-penstock"
            yield "\r\n".join(_folded(f"Diagnostic-Code: {kind}; {self._fit(result.text)}"))
        yield f"Last-Attempt-Date: {_date(self.now)}"
        if self.retry_until is not None:
            yield f"Will-Retry-Until: {_date(self.retry_until)}"

    def _fit(self, text: str) -> str:
        """Return a text of a peer as this report may show it: one line, in ASCII unless the report is global."""
        line = "".join(c if c.isprintable() else "?" for c in text)
        octets = line.encode("utf-8" if self.is_global else "ascii", "replace")
        return octets[:_MOST_TEXT].decode(errors="ignore")


# ---- pieces


def _part_header(content_type: str, description: str, encoding: str) -> list[str]:
    fields = [f"Content-Type: {content_type}", f"Content-Description: {description}"]
    return fields if encoding == "7bit" else [*fields, f"Content-Transfer-Encoding: {encoding}"]


def _date(when: float) -> str:
    return formatdate(when).replace("-0000", "+0000")


def _folded(text: str, indent: str = " ") -> list[str]:
    """Return a field, or a text, in lines of 76, broken at blanks."""
    return textwrap.wrap(text, _FOLD, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _decoded_orcpt(orcpt: str) -> str:
    """Return ORCPT as a report shows it: the type, and the address without xtext (RFC 3461 6.3)."""
    kind, _, address = orcpt.partition(";")
    decoded = None if kind.lower() == "utf-8" else decode_xtext(address)
    return f"{kind}; {decoded or address}"


def _remote_mta(hop: str) -> str:
    """Return the field value for a hop's name, "mx.example.org[192.0.2.1]:25" or "unix:/run/lmtp"."""
    if hop.startswith("unix:"):
        return f"x-unix; {hop.removeprefix('unix:')}"
    host = hop.partition("[")[0] or hop
    return f"dns; {host.rpartition(':')[0] or host}" if host == hop else f"dns; {host}"


def _is_ascii(sender: str, told: Sequence[tuple[Recipient, Result]]) -> bool:
    return sender.isascii() and all(recipient.path.text.isascii() for recipient, _ in told)


def _whole(original: Message) -> bytes:
    return b"".join([original.prefix, *original.body.chunks()])


def _header_of(original: Message) -> bytes:
    """Return the header of a message with the fields that were added here, mended where it is unfit."""
    head = original.prefix
    if not head.endswith(b"\r\n"):
        head += b"\r\n" if head else b""
    start = len(head)
    for chunk in original.body.chunks():
        head += chunk[: _MOST_HEADER + start - len(head)]
        if b"\r\n\r\n" in head or head.startswith(b"\r\n", start) or len(head) >= _MOST_HEADER + start:
            break
    end = start if head.startswith(b"\r\n", start) else head.find(b"\r\n\r\n") + 2
    head = head[:end] if end >= 2 else head
    if _UNFIT.search(head):
        lines = _LINE_END.split(head.replace(b"\x00", b""))
        head = b"\r\n".join(line[:_MOST_LINE] for line in lines if line) + b"\r\n"
    return head
