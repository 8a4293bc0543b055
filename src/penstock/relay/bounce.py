"""Reports to senders: delivery failed, is delayed, or succeeded (RFC 3464, RFC 3461).

A report is a message from the null sender, so that no report is made of a report that fails (RFC 5321 4.5.5). It has
three parts: a text for the reader, the fields of RFC 3464 for programs, and the message, or its header.

A report on a message with addresses or a header outside ASCII has the types of RFC 6533 and needs SMTPUTF8 itself.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from typing import Annotated, Final, Literal

import msgspec

from penstock.message import NULL_PATH, Envelope, Message, MessageIds, Recipient
from penstock.relay.hop import Result
from penstock.reports import TextBody
from penstock.smtp.grammar import decode_xtext

Action = Literal["failed", "delayed", "delivered", "relayed"]
"""RFC 3464 2.3.3. `relayed`: accepted by a next hop without DSN. `expanded` is not used: there are no lists."""

_MAX_HEADER: Final = 64 * 1024
"""Octets of a header that are read and returned at most."""
_MAX_LINE: Final = 998
"""Octets of a line without CR LF (RFC 5322 2.1.1)."""
_MAX_TEXT: Final = 900
"""Octets of a reply of a next hop; it may be a single word."""
_FOLD: Final = 76
_UNSAFE: Final = re.compile(rb"\x00|(?<!\r)\n|\r(?!\n)")
"""NUL and bare line ends: a server may refuse the report because of them, as because of long lines."""
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
        msgspec.Meta(ge=0, le=10_485_760, description="Larger messages (octets) are returned with their header only"),
    ] = 65_536


class Reporter:
    """Writes the reports of a server."""

    def __init__(
        self,
        settings: ReportSettings,
        hostname: str,
        ids: MessageIds,
        sign: Callable[[Message], Message] | None = None,
    ) -> None:
        """`sign` adds the DKIM signatures of our own domain."""
        self._sign = sign
        self._hostname = hostname
        self._ids = ids
        self.use(settings)

    def use(self, settings: ReportSettings) -> None:
        """Write later reports by other settings."""
        self._return_most = settings.return_most

    def report(
        self,
        action: Action,
        original: Message,
        results: Sequence[tuple[Recipient, Result]],
        now: float,
        *,
        retry_until: float | None = None,
    ) -> Message:
        """Return the report to the sender of a message, which must not be the null sender.

        Reads the body: may block on the disk.
        """
        envelope = original.envelope
        assert envelope.sender.text, "never a report to the null sender"
        full = action == "failed" and envelope.ret != "HDRS" and original.size <= self._return_most
        returned = _whole(original) if full else b""
        if not returned or envelope.body_type == "BINARYMIME" or _is_unsafe(returned):
            full, returned = False, _header_of(original)
        is_global = envelope.smtputf8 and not (returned.isascii() and _is_ascii(envelope.sender.text, results))
        report = _Report(action, original, results, now, retry_until, self._hostname, is_global=is_global)
        message_id = self._ids.next()
        boundary = f"=_{message_id}"
        while boundary.encode() in returned:
            boundary += "_"
        text = report.text(message_id, boundary, returned, full=full)
        body_type = "7BIT" if text.isascii() else "8BITMIME"
        to = Envelope(NULL_PATH, (Recipient(envelope.sender),), body_type, smtputf8=is_global)
        made = Message(message_id, to, b"", TextBody(text), now)
        return made if self._sign is None else self._sign(made)


@dataclass(frozen=True, slots=True)
class _Report:
    """The data of one report."""

    action: Action
    original: Message
    results: Sequence[tuple[Recipient, Result]]
    now: float
    retry_until: float | None
    hostname: str
    is_global: bool
    """It is not ASCII: the types of RFC 6533 are used."""

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
        for recipient, result in self.results:
            lines.append("")
            said = f"{result.hop} said: {result.text}" if result.is_said and result.hop else result.text
            lines += _folded(f"<{recipient.path.text}>: {self._fit(said)}", "    ")
        return "\r\n".join([*lines, ""])

    def _for_programs(self) -> str:
        """Return the fields of RFC 3464 2.2 and 2.3."""
        envid = decode_xtext(self.original.envelope.envid or "")
        lines = [f"Original-Envelope-Id: {envid}"] if envid else []
        lines += [f"Reporting-MTA: dns; {self.hostname}", f"Arrival-Date: {_date(self.original.received_at)}"]
        for recipient, result in self.results:
            lines += ["", *self._fields_of(recipient, result)]
        return "\r\n".join([*lines, ""])

    def _fields_of(self, recipient: Recipient, result: Result) -> Iterator[str]:
        address = recipient.path.text
        if recipient.orcpt:
            yield f"Original-Recipient: {_decoded_orcpt(recipient.orcpt)}"
        yield f"Final-Recipient: {'rfc822' if address.isascii() else 'utf-8'}; {address}"
        yield f"Action: {self.action}"
        yield f"Status: {_status(self.action, result.status)}"
        if result.is_said and result.hop:  # RFC 3464 2.3.5: the server that reported it, not one that was never reached
            yield f"Remote-MTA: {_remote_mta(result.hop)}"
        if result.text and self.action in ("failed", "delayed"):
            kind = "smtp" if result.is_said else "x-penstock"
            yield "\r\n".join(_folded(f"Diagnostic-Code: {kind}; {self._fit(result.text)}"))
        yield f"Last-Attempt-Date: {_date(self.now)}"
        if self.retry_until is not None:
            yield f"Will-Retry-Until: {_date(self.retry_until)}"

    def _fit(self, text: str) -> str:
        """Return a reply as this report may contain it: one line, in ASCII unless the report is internationalized."""
        line = "".join(c if c.isprintable() else "?" for c in text)
        octets = line.encode("utf-8" if self.is_global else "ascii", "replace")
        return octets[:_MAX_TEXT].decode(errors="ignore")


# ---- pieces


_CLASSES: Final[dict[Action, str]] = {"failed": "54", "delayed": "4", "delivered": "2", "relayed": "2"}
"""The classes of a status that fit an action (RFC 3464 2.3.4); 4.x.x of a failure: it was tried until it expired."""


def _status(action: Action, status: str) -> str:
    return status if status[:1] in _CLASSES[action] else f"{_CLASSES[action][0]}{status[1:]}"


def _part_header(content_type: str, description: str, encoding: str) -> list[str]:
    fields = [f"Content-Type: {content_type}", f"Content-Description: {description}"]
    return fields if encoding == "7bit" else [*fields, f"Content-Transfer-Encoding: {encoding}"]


def _date(when: float) -> str:
    return formatdate(when).replace("-0000", "+0000")


def _folded(text: str, indent: str = " ") -> list[str]:
    """Return a field, or a text, in lines of 76 characters, broken at spaces."""
    return textwrap.wrap(text, _FOLD, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _decoded_orcpt(orcpt: str) -> str:
    """Return ORCPT in the form of a report: the type, and the address without xtext (RFC 3461 6.3)."""
    kind, _, address = orcpt.partition(";")
    decoded = None if kind.lower() == "utf-8" else decode_xtext(address)
    return f"{kind}; {decoded or address}"


def _remote_mta(hop: str) -> str:
    """Return the field value for the name of a hop, "mx.example.org[192.0.2.1]:25" or "unix:/run/lmtp"."""
    if hop.startswith("unix:"):
        return f"x-unix; {hop.removeprefix('unix:')}"
    host = hop.partition("[")[0] or hop
    return f"dns; {host.rpartition(':')[0] or host}" if host == hop else f"dns; {host}"


def _is_ascii(sender: str, results: Sequence[tuple[Recipient, Result]]) -> bool:
    return sender.isascii() and all(recipient.path.text.isascii() for recipient, _ in results)


def _whole(original: Message) -> bytes:
    return b"".join([original.prefix, *original.body.chunks()])


def _header_of(original: Message) -> bytes:
    """Return the header of a message with the fields that were added here, without octets that are not allowed."""
    head = original.prefix
    if not head.endswith(b"\r\n"):
        head += b"\r\n" if head else b""
    start = len(head)
    for chunk in original.body.chunks():
        head += chunk[: _MAX_HEADER + start - len(head)]
        if b"\r\n\r\n" in head or head.startswith(b"\r\n", start) or len(head) >= _MAX_HEADER + start:
            break
    end = start if head.startswith(b"\r\n", start) else head.find(b"\r\n\r\n") + 2
    head = head[:end] if end >= 2 else head
    if _is_unsafe(head):
        lines = _LINE_END.split(head.replace(b"\x00", b""))
        head = b"\r\n".join(line[:_MAX_LINE] for line in lines if line) + b"\r\n"
    return head


def _is_unsafe(octets: bytes) -> bool:
    """Say whether a server may refuse a report that returns these octets. Linear in their number."""
    return _UNSAFE.search(octets) is not None or any(len(line) > _MAX_LINE for line in octets.split(b"\r\n"))
