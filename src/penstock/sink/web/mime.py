"""A kept message taken apart, as the page shows it. Everything here may meet malformed mail, and answers all the same.

Parsing takes time, and the size of a message does not say how much: these functions are called in a thread.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterator, Sequence
from email import message_from_bytes, policy
from email.message import Message
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from penstock.sink.kept import KeptMessage, header_of

_MOST_PARTS: Final = 200
_MOST_FIELDS: Final = 500
_MOST_VALUE: Final = 4000
_MOST_READ: Final = 8000
"""Characters of a field that are decoded: for addresses that takes the square of their length."""
_MOST_DECODED: Final = 65_536
"""Characters of all fields that are decoded; the fields behind them are shown as they are."""
_MOST_SHOWN: Final = 262_144
"""Characters of a text part."""
_MOST_SEARCHED: Final = 65_536
"""Octets of a message in which words are looked for."""
_IMAGES: Final = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
"""What a browser may show. No SVG: it is a program."""
_NO_CHARSETS: Final = frozenset({"idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape"})
"""Codecs of Python that are for other things than mail. Punycode takes the square of the length."""
_EXTENDED: Final = re.compile(r";[^;=*]*+\*[^;=]*+=[^;]*+")
"""A parameter of RFC 2231."""
_NO_WORDS: Final = frozenset({"from:", "to:", "subject:"})


class _Lenient(policy.EmailPolicy):
    """Reads fields so that none of them throws while a message is taken apart."""

    def header_fetch_parse(self, name: str, value: str) -> Any:
        """Return the beginning of a field; without its extended parameters where it can not be read."""
        try:
            return super().header_fetch_parse(name, value[:_MOST_READ])
        except Exception:  # noqa: BLE001 - the email package throws much at malformed mail
            return _EXTENDED.sub("", value[:_MOST_READ])


_LENIENT: Final = _Lenient()


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


def without_surrogates(text: str) -> str:
    """Return a text that can be encoded: some charsets and encoded words decode to halves of a character."""
    return text.encode("utf-8", "replace").decode()


def view(message: KeptMessage) -> MessageView:
    """Take a message apart."""
    headers: list[tuple[str, str]] = []
    parts: list[PartView] = []
    trouble = ""
    try:
        parsed = _parsed(message.raw)
        headers = _fields(parsed)
        parts = [_view(number, depth, part) for number, (depth, part) in enumerate(_walk(parsed))]
    except Exception as exc:  # noqa: BLE001 - see above
        trouble = without_surrogates(f"{type(exc).__name__}: {exc}")
    return MessageView(
        id=message.id,
        received_at=message.received_at,
        sender=without_surrogates(message.sender),
        recipients=[without_surrogates(each) for each in message.recipients[:1000]],
        subject=without_surrogates(message.subject),
        size=message.size,
        is_cut=message.is_cut,
        headers=headers,
        parts=parts,
        trouble=trouble,
    )


def _parsed(raw: bytes) -> Message:
    return message_from_bytes(raw, policy=_LENIENT)


def _fields(parsed: Message) -> list[tuple[str, str]]:
    """Return the first fields decoded, or as they are where they can not be."""
    fields: list[tuple[str, str]] = []
    decoded = 0
    for name, raw in itertools.islice(parsed.raw_items(), _MOST_FIELDS):
        text = str(raw)
        decoded += min(len(text), _MOST_READ)
        if decoded <= _MOST_DECODED:
            text = _value(name, text)
        fields.append((without_surrogates(name), without_surrogates(text[:_MOST_VALUE])))
    return fields


def _value(name: str, raw: str) -> str:
    try:
        return str(policy.default.header_fetch_parse(name, raw[:_MOST_READ]))
    except Exception:  # noqa: BLE001 - see above
        return raw


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
    """Return a text decoded; as UTF-8 when its charset is none."""
    try:
        charset = part.get_content_charset("utf-8") or "utf-8"
        if codecs.lookup(charset).name not in _NO_CHARSETS:
            return without_surrogates(data.decode(charset, "replace"))
    except (LookupError, ValueError):
        pass
    return data.decode("utf-8", "replace")


def _filename(part: Message) -> str:
    """Return the name of a file; "" when it has none, or none that can be read."""
    try:
        return without_surrogates(str(part.get_filename() or ""))[:200]
    except Exception:  # noqa: BLE001 - see above
        return ""


def _view(number: int, depth: int, part: Message) -> PartView:
    """Return a part as it is shown; as a file without octets when it can not be read, so that others are shown."""
    try:
        return _read(number, depth, part)
    except Exception:  # noqa: BLE001 - see above
        kind = "application/octet-stream"
        return PartView(number=number, depth=depth, type=kind, filename="", size=0, shown_as="file")


def _read(number: int, depth: int, part: Message) -> PartView:
    kind = _kind(part)
    data = b"" if kind == "multipart" else _octets(part)
    return PartView(
        number=number,
        depth=depth,
        type=without_surrogates(part.get_content_type()),
        filename=_filename(part),
        size=len(data),
        shown_as=kind,
        text=_text(part, data)[:_MOST_SHOWN].replace("\r\n", "\n") if kind == "text" else "",
    )


def content(message: KeptMessage, number: int) -> PartContent | None:
    """Return a part as it is sent to a browser; None when there is none of that number."""
    for at, (_, part) in enumerate(_walk(_parsed(message.raw))):
        if at != number:
            continue
        kind, data = _kind(part), _octets(part)
        name = _filename(part) or f"part-{number}"
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
    `subject:x` look in these only. With nothing behind the colon they are no words yet, and are ignored.
    """
    words = [word for word in query.casefold().split() if word not in _NO_WORDS]
    return [message for _, message in zip(range(limit), _having(messages, words), strict=False)]


def _having(messages: Sequence[KeptMessage], words: Sequence[str]) -> Iterator[KeptMessage]:
    for message in messages:
        envelope = {
            "from": without_surrogates(message.sender).casefold(),
            "to": without_surrogates(" ".join(message.recipients)).casefold(),
            "subject": without_surrogates(message.subject).casefold(),
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
    """Return the texts of the beginning of a message, decoded; all behind its header when it can not be read."""
    raw = message.raw[:_MOST_SEARCHED]
    try:
        parts = [part for _, part in _walk(_parsed(raw))]
    except Exception:  # noqa: BLE001 - see above
        return raw[len(header_of(raw)) :].decode("utf-8", "replace").casefold()
    return "\n".join(map(_words, parts)).casefold()


def _words(part: Message) -> str:
    """Return the text of a part; "" when it has none, or none that can be read."""
    try:
        return _text(part, _octets(part)) if _kind(part) in ("text", "html") else ""
    except Exception:  # noqa: BLE001 - see above
        return ""
