"""What the page and the HTTP API show of a kept message.

Reading a message takes time, and its size does not say how much: these functions run in a thread (see `mime.Work`).
What they return has bounds that do not depend on the message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Final, Literal, NamedTuple

import msgspec

from penstock.sink.kept import KeptMessage
from penstock.sink.web import charset, fields, mime
from penstock.sink.web.charset import without_surrogates
from penstock.sink.web.fields import Field, read_addresses, value_of
from penstock.sink.web.html import has_remote_content
from penstock.sink.web.mime import Part, Structure, Work

MAX_RECIPIENTS: Final = 1000
MAX_LISTED_RECIPIENTS: Final = 100
_MAX_SHOWN_FIELDS: Final = 500
_MAX_VALUE: Final = 4000
"""Characters of a header field."""
_MAX_SUBJECT: Final = 500
_MAX_TEXT: Final = 262_144
"""Octets of a text part."""
_MAX_TEXTS: Final = 1 << 20
"""Octets of all text parts."""
_MAX_FACTS: Final = 100
_IMAGES: Final = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp", "image/avif"})
"""What browsers show and run no scripts in: no SVG."""
_TEXTS: Final = frozenset(
    {
        "message/delivery-status",
        "message/disposition-notification",
        "message/feedback-report",
        "message/global-delivery-status",
        "message/global-disposition-notification",
        "message/external-body",
        "message/partial",
        "application/json",
        "application/xml",
        "application/pgp-encrypted",
        "application/pgp-signature",
    }
)
"""What is readable as text beside text/*."""
_EVENT_LINES: Final = {
    "METHOD": "Method",
    "SUMMARY": "Summary",
    "DTSTART": "Start",
    "DTEND": "End",
    "LOCATION": "Location",
    "ORGANIZER": "Organizer",
    "ATTENDEE": "Attendee",
    "STATUS": "Status",
    "RRULE": "Repeats",
}
"""Lines of a calendar (RFC 5545) that are shown as facts."""
_EVENT_LINE: Final = re.compile(r'([A-Z-]+)((?:;[^:;"]*(?:"[^"]*")?)*):(.*)')
_EXTENSIONS: Final = {
    "text/plain": ".txt",
    "text/html": ".html",
    "text/calendar": ".ics",
    "application/ics": ".ics",
    "message/delivery-status": ".txt",
}
_STAMP: Final = re.compile(r"(\d{4})(\d\d)(\d\d)(?:T(\d\d)(\d\d)(\d\d)(Z?))?\Z")

Meta = msgspec.Meta
Kind = Literal["multipart", "message", "text", "html", "calendar", "image", "pdf", "file"]


class AddressView(msgspec.Struct, frozen=True, kw_only=True):
    """An address of a header field."""

    name: str
    address: str


class MessageLine(msgspec.Struct, frozen=True, kw_only=True):
    """A message in a list."""

    id: str
    received_at: Annotated[float, Meta(description="Seconds since the epoch")]
    sender: Annotated[str, Meta(description="Of the envelope; empty for the null sender")]
    author: Annotated[AddressView, Meta(description="The first address of From")]
    recipients: Annotated[list[str], Meta(description="Of the envelope, the first 100")]
    recipient_count: int
    subject: str
    size: Annotated[int, Meta(description="Octets")]
    attachments: Annotated[int, Meta(description="Parts that are files")]
    is_read: bool
    is_cut: Annotated[bool, Meta(description="Only its beginning is kept: it is larger than all room for mail")]


class PartView(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message."""

    number: Annotated[int, Meta(description="Where it is found: /api/messages/ID/parts/NUMBER")]
    depth: Annotated[int, Meta(description="How many containers it is in")]
    within: Annotated[int, Meta(description="0, or the number of the embedded message it belongs to")]
    type: str
    charset: Annotated[str, Meta(description="As the part names it; may be empty")]
    encoding: Annotated[str, Meta(description="Content-Transfer-Encoding; may be empty")]
    disposition: str
    filename: str
    content_id: Annotated[str, Meta(description="Without angle brackets; may be empty")]
    size: Annotated[int, Meta(description="Octets of what /parts/NUMBER returns")]
    is_attachment: bool
    is_whole: Annotated[bool, Meta(description="False when the end of the part is not kept")]
    shown_as: Kind
    facts: Annotated[list[tuple[str, str]], Meta(description="Of an event its times and people, of a message its head")]
    text: Annotated[str, Meta(description="Of a text its beginning: at most 256 KiB, 1 MiB in all texts together")]
    is_text_whole: bool
    has_remote_content: Annotated[bool, Meta(description="This HTML loads something from the network")]


class MessageView(msgspec.Struct, frozen=True, kw_only=True):
    """A message with its header and its parts."""

    id: str
    received_at: float
    sender: str
    recipients: Annotated[list[str], Meta(description="Of the envelope, the first 1,000")]
    recipient_count: int
    subject: str
    size: int
    is_read: bool
    is_cut: bool
    headers: Annotated[list[tuple[str, str]], Meta(description="The first 500 fields, decoded")]
    parts: list[PartView]
    trouble: Annotated[str, Meta(description="What of the message is not shown; empty when all of it is")]


class Summary(NamedTuple):
    """What a list shows of a message, beside its envelope."""

    author: AddressView
    subject: str
    attachments: int


class PartContent(NamedTuple):
    """A part as it is sent to a browser."""

    part: Part
    media_type: str
    data: bytes
    filename: str
    is_inline: bool
    """A browser may show it."""


def summary(message: KeptMessage, work: Work) -> Summary:
    """Return what a list shows. Reads the message once."""
    if not isinstance(message.summary, Summary):
        structure = mime.read(message.raw, work)
        header = structure.parts[0].fields
        author = next(iter(read_addresses(value_of(header, "from"))), fields.Address("", ""))
        message.summary = Summary(
            AddressView(name=author.name[:_MAX_VALUE], address=author.address[:_MAX_VALUE]),
            subject_of(header),
            len(attachments(structure)),
        )
    return message.summary


def subject_of(header: Sequence[Field]) -> str:
    """Return the decoded Subject field; "" without one."""
    return " ".join(fields.decode_words(value_of(header, "subject")).split())[:_MAX_SUBJECT]


def line(message: KeptMessage, work: Work) -> MessageLine:
    """Return a message as a list shows it."""
    about = summary(message, work)
    return MessageLine(
        id=message.id,
        received_at=message.received_at,
        sender=without_surrogates(message.sender),
        author=about.author,
        recipients=[without_surrogates(each) for each in message.recipients[:MAX_LISTED_RECIPIENTS]],
        recipient_count=len(message.recipients),
        subject=about.subject,
        size=message.size,
        attachments=about.attachments,
        is_read=message.is_read,
        is_cut=message.is_cut,
    )


def view(message: KeptMessage, work: Work) -> MessageView:
    """Return a message with its header and its parts."""
    structure = mime.read(message.raw, work)
    header = structure.parts[0].fields
    return MessageView(
        id=message.id,
        received_at=message.received_at,
        sender=without_surrogates(message.sender),
        recipients=[without_surrogates(each) for each in message.recipients[:MAX_RECIPIENTS]],
        recipient_count=len(message.recipients),
        subject=subject_of(header),
        size=message.size,
        is_read=message.is_read,
        is_cut=message.is_cut,
        headers=[(each.name, each.text[:_MAX_VALUE]) for each in header[:_MAX_SHOWN_FIELDS]],
        parts=list(_views(message, structure, work)),
        trouble=_trouble(message, structure, len(header)),
    )


def _trouble(message: KeptMessage, structure: Structure, count: int) -> str:
    found = []
    if message.is_cut:
        found.append(f"Only the first {len(message.raw):,} of {message.size:,} octets are kept.")
    if structure.is_partial:
        found.append(
            f"Not all parts are listed: at most {mime.MAX_PARTS:,} are, in at most {mime.MAX_DEPTH} levels. "
            "What is beyond is in its container."
        )
    if count > _MAX_SHOWN_FIELDS:
        found.append(f"{count - _MAX_SHOWN_FIELDS:,} more header fields are in the raw message.")
    return " ".join(found)


def _views(message: KeptMessage, structure: Structure, work: Work) -> Iterator[PartView]:
    room, files = _MAX_TEXTS, attachments(structure)
    for part in structure.parts:
        kind, size = shown_as(part), part.size(work)
        has_text = kind in ("text", "html", "calendar")
        wanted = min(_MAX_TEXT, room) if has_text else 0
        data = part.content(work, wanted) if wanted else b""
        room -= len(data)
        text = charset.decode(data, part.charset, is_cut=len(data) < size).replace("\r\n", "\n") if data else ""
        yield PartView(
            number=part.number,
            depth=part.depth,
            within=part.within,
            type=part.type,
            charset=part.charset,
            encoding=part.encoding,
            disposition=part.disposition,
            filename=part.filename,
            content_id=part.content_id,
            size=size,
            is_attachment=part.number in files,
            is_whole=is_whole(message, part),
            shown_as=kind,
            facts=_facts(part, structure, text),
            text=text,
            is_text_whole=not has_text or len(data) == size,
            has_remote_content=kind == "html" and has_remote_content(text),
        )


def is_whole(message: KeptMessage, part: Part) -> bool:
    """Return whether all octets of a part are kept."""
    return not message.is_cut or (part.data is message.raw and part.end < len(message.raw))


def shown_as(part: Part) -> Kind:
    """Say how a browser shows a part."""
    kind = part.type
    if part.has_parts:
        return "multipart" if kind.startswith("multipart/") else "message"
    if kind in _IMAGES:
        return "image"
    if kind == "application/pdf":
        return "pdf"
    if kind == "text/html":
        return "html"
    if kind in ("text/calendar", "application/ics"):
        return "calendar"
    is_text = kind.startswith(("text/", "multipart/")) or kind.endswith(("+json", "+xml")) or kind in _TEXTS
    return "text" if is_text and kind != "image/svg+xml" else "file"


def attachments(structure: Structure) -> set[int]:
    """Return the numbers of the parts that are files: neither a text of a message nor an image within its HTML."""
    with_html = {part.within for part in structure.parts if shown_as(part) == "html"}
    return {part.number for part in structure.parts if _is_file(part, has_html=part.within in with_html)}


def _is_file(part: Part, *, has_html: bool) -> bool:
    if part.type.startswith("multipart/"):
        return False
    if part.disposition == "attachment" or (part.has_parts and part.number > 0):
        return True
    if shown_as(part) in ("text", "html", "calendar"):
        is_body = part.number == part.within or part.disposition == "inline"
        return part.filename != "" and not is_body
    return not part.has_parts and not (part.content_id and has_html)


# ---- facts


def _facts(part: Part, structure: Structure, text: str) -> list[tuple[str, str]]:
    if shown_as(part) == "calendar":
        return list(_event(text))
    if part.has_parts and not part.type.startswith("multipart/"):
        header = structure.parts[part.number + 1].fields if part.number + 1 < len(structure.parts) else []
        shown = ((name, fields.decode_words(value_of(header, name.lower()))) for name in ("From", "To", "Cc", "Date"))
        found = [("Subject", subject_of(header)), *((name, value[:_MAX_VALUE]) for name, value in shown)]
        return [(name, value) for name, value in found if value]
    return []


def _event(text: str) -> Iterator[tuple[str, str]]:
    """Yield what an invitation says (RFC 5545): unfolded, unescaped, of the first event."""
    unfolded = re.sub(r"\n[ \t]", "", text)
    is_event, count = False, 0
    for row in unfolded.split("\n"):
        if row == "END:VEVENT" or count >= _MAX_FACTS:
            return
        is_event = is_event or row == "BEGIN:VEVENT"
        found = _EVENT_LINE.match(row.strip())
        if found is None or found[1] not in _EVENT_LINES or not (is_event or found[1] == "METHOD"):
            continue
        count += 1
        yield _EVENT_LINES[found[1]], _event_value(found[1], found[2], found[3])


def _event_value(name: str, parameters: str, value: str) -> str:
    if name in ("ORGANIZER", "ATTENDEE"):
        common = re.search(r';CN=(?:"([^"]*)"|([^;:]*))', parameters)
        address = re.sub(r"(?i)^mailto:", "", value)
        return fields.Address((common[1] or common[2]) if common else "", address).text
    if name in ("DTSTART", "DTEND") and (stamp := _STAMP.match(value)):
        year, month, day, hour, minute, _, zone = stamp.groups()
        named = re.search(r";TZID=([^;]*)", parameters)
        where = " UTC" if zone else f" {named[1]}" if named else ""
        return f"{year}-{month}-{day}" + (f" {hour}:{minute}{where}" if hour else "")
    return re.sub(r"\\([\\;,nN])", lambda escape: "\n" if escape[1] in "nN" else escape[1], value)[:_MAX_VALUE]


# ---- parts


def content(message: KeptMessage, number: int, work: Work) -> PartContent | None:
    """Return a part whole, as its sender encoded it; None if no part has that number."""
    structure = mime.read(message.raw, work)
    if number >= len(structure.parts):
        return None
    part = structure.parts[number]
    data, kind = part.content(work), shown_as(part)
    name = part.filename or _name_of(part, structure)
    media_type = "application/octet-stream"
    if kind in ("image", "pdf"):
        media_type = part.type
    elif kind in ("text", "calendar", "html"):
        label = charset.name_of(data[:_MAX_TEXT], part.charset, is_cut=len(data) > _MAX_TEXT)
        media_type = f"text/{'html' if kind == 'html' else 'plain'}; charset={label}"
    return PartContent(part, media_type, data, name, media_type != "application/octet-stream")


def _name_of(part: Part, structure: Structure) -> str:
    """Return the name of a file that its sender gave none."""
    if part.type.startswith("message/") and part.has_parts and part.number + 1 < len(structure.parts):
        subject = re.sub(r"[\\/:*?\"<>|]", "_", fields.file_name(subject_of(structure.parts[part.number + 1].fields)))
        return f"{subject or f'message-{part.number}'}.eml"
    return f"part-{part.number}{_EXTENSIONS.get(part.type, '')}"
