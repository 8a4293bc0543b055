"""A kept message taken apart, as the page shows it. Everything here may meet malformed mail, and answers all the same.

Parsing takes time: for messages that are not small these functions are called in a thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from email import message_from_bytes, policy
from email.message import EmailMessage, Message
from typing import Annotated, Final, NamedTuple

import msgspec

from penstock.sink.kept import KeptMessage

_MOST_PARTS: Final = 200
_MOST_FIELDS: Final = 500
_MOST_VALUE: Final = 4000
_MOST_SHOWN: Final = 262_144
"""Characters of a text part."""
_MOST_SEARCHED: Final = 65_536
"""Octets of a message in which words are looked for."""
_IMAGES: Final = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
"""What a browser may show. No SVG: it is a program."""


class PartView(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message."""

    number: Annotated[int, msgspec.Meta(description="Where it is found: /api/messages/ID/parts/NUMBER")]
    depth: Annotated[int, msgspec.Meta(description="How many multiparts it is in")]
    type: str
    filename: str
    size: Annotated[int, msgspec.Meta(description="Octets, decoded; of a multipart 0")]
    shown_as: Annotated[str, msgspec.Meta(description="text, html, image or file; multipart for what holds others")]
    text: Annotated[str, msgspec.Meta(description="Of a text, its first 262,144 characters")] = ""


class MessageView(msgspec.Struct, frozen=True, kw_only=True):
    """A message with its header and its parts."""

    id: str
    received_at: float
    sender: str
    recipients: list[str]
    subject: str
    size: int
    is_cut: bool
    headers: list[tuple[str, str]]
    parts: list[PartView]
    trouble: Annotated[str, msgspec.Meta(description="Why it could not be read, when it could not")] = ""


class PartContent(NamedTuple):
    """A part as it is sent to a browser."""

    media_type: str
    data: bytes
    filename: str
    is_file: bool
    """To be saved, never to be shown."""


def view(message: KeptMessage) -> MessageView:
    """Take a message apart."""
    headers: list[tuple[str, str]] = []
    parts: list[PartView] = []
    trouble = ""
    try:
        parsed = message_from_bytes(message.raw, policy=policy.default)
        headers = [(name, _value(parsed, at, name)) for at, name in enumerate(parsed.keys()) if at < _MOST_FIELDS]
        parts = [_view(number, depth, part) for number, (depth, part) in enumerate(_walk(parsed))]
    except Exception as exc:  # noqa: BLE001 - the email package throws much at malformed mail
        trouble = f"{type(exc).__name__}: {exc}"
    return MessageView(
        id=message.id,
        received_at=message.received_at,
        sender=message.sender,
        recipients=list(message.recipients[:1000]),
        subject=message.subject,
        size=message.size,
        is_cut=message.is_cut,
        headers=headers,
        parts=parts,
        trouble=trouble,
    )


def _value(parsed: EmailMessage, at: int, name: str) -> str:
    """Return a field decoded, or as it is where it can not be."""
    try:
        return str(parsed.values()[at])[:_MOST_VALUE]
    except Exception:  # noqa: BLE001 - see above
        raw = [value for key, value in parsed.raw_items() if key == name]
        return str(raw[0])[:_MOST_VALUE] if raw else ""


def _walk(part: Message, depth: int = 0) -> Iterator[tuple[int, Message]]:
    """Yield a part and all within it, up to a bound, deepest 20."""
    found: list[tuple[int, Message]] = [(depth, part)]
    count = 0
    while found and count < _MOST_PARTS:
        depth, part = found.pop(0)
        count += 1
        yield depth, part
        if part.is_multipart() and depth < 20:
            within = part.get_payload()
            if isinstance(within, list):
                found[:0] = [(depth + 1, each) for each in within if isinstance(each, Message)]


def _kind(part: Message) -> str:
    kind = part.get_content_type()
    if part.is_multipart():
        return "multipart"
    if kind in _IMAGES:
        return "image"
    if part.get_content_disposition() == "attachment":
        return "file"
    if kind == "text/html":
        return "html"
    return "text" if kind.startswith("text/") else "file"


def _octets(part: Message) -> bytes:
    payload = part.get_payload(decode=True)
    return payload if isinstance(payload, bytes) else b""


def _text(part: Message, data: bytes) -> str:
    charset = part.get_content_charset("utf-8") or "utf-8"
    try:
        return data.decode(charset, "replace")
    except LookupError:
        return data.decode("utf-8", "replace")


def _view(number: int, depth: int, part: Message) -> PartView:
    kind = _kind(part)
    data = b"" if kind == "multipart" else _octets(part)
    return PartView(
        number=number,
        depth=depth,
        type=part.get_content_type(),
        filename=str(part.get_filename() or "")[:200],
        size=len(data),
        shown_as=kind,
        text=_text(part, data)[:_MOST_SHOWN].replace("\r\n", "\n") if kind == "text" else "",
    )


def content(message: KeptMessage, number: int) -> PartContent | None:
    """Return a part as it is sent to a browser; None when there is none of that number."""
    parsed = message_from_bytes(message.raw, policy=policy.default)
    for at, (_, part) in enumerate(_walk(parsed)):
        if at != number:
            continue
        kind, data = _kind(part), _octets(part)
        name = str(part.get_filename() or f"part-{number}")[:200]
        if kind == "html":
            return PartContent("text/html; charset=utf-8", _text(part, data).encode(), name, is_file=False)
        if kind == "text":
            return PartContent("text/plain; charset=utf-8", _text(part, data).encode(), name, is_file=False)
        if kind == "image":
            return PartContent(part.get_content_type(), data, name, is_file=False)
        return PartContent("application/octet-stream", data, name, is_file=True)
    return None


def find(messages: Sequence[KeptMessage], query: str, limit: int) -> list[KeptMessage]:
    """Return the first `limit` messages that have every word of a query, in whatever case.

    A word is looked for in the sender, the recipients, the subject and the decoded texts; `from:x`, `to:x` and
    `subject:x` look in these only.
    """
    words = query.casefold().split()
    return [message for _, message in zip(range(limit), _having(messages, words), strict=False)]


def _having(messages: Sequence[KeptMessage], words: Sequence[str]) -> Iterator[KeptMessage]:
    for message in messages:
        envelope = {
            "from": message.sender.casefold(),
            "to": " ".join(message.recipients).casefold(),
            "subject": message.subject.casefold(),
        }
        texts: str | None = None
        for word in words:
            where, _, rest = word.partition(":")
            if rest and where in envelope:
                if rest not in envelope[where]:
                    break
                continue
            if any(word in text for text in envelope.values()):
                continue
            if texts is None:
                texts = _searched(message)
            if word not in texts:
                break
        else:
            yield message


def _searched(message: KeptMessage) -> str:
    """Return the texts of the beginning of a message, decoded."""
    try:
        parsed = message_from_bytes(message.raw[:_MOST_SEARCHED], policy=policy.default)
        parts = [part for _, part in _walk(parsed) if _kind(part) in ("text", "html")]
        return "\n".join(_text(part, _octets(part)) for part in parts).casefold()
    except Exception:  # noqa: BLE001 - see above
        return message.raw[:_MOST_SEARCHED].decode("utf-8", "replace").casefold()
