"""The search of kept mail.

    words             each is found somewhere in the message, in any case
    "two words"       next to each other
    -word             nowhere in the message; works with all of these
    from:x            the sender of the envelope, or From: addresses and names
    to:x  cc:x        the recipients of the envelope, To, Cc and Bcc; cc: only Cc
    subject:x  message-id:x  attachment:x (file names)
    has:attachment    is:read  is:unread
    size:>1M          also <, >=, <=; k, M and G are powers of 1,000
    after:2026-11-28  received on that day or later; before:2026-11-29: before that day. In the sink's time zone

A word without a field is looked for in the envelope, in all header fields, in the names of attachments, and in the
texts: their first 256 KiB in a message. "http://x" is a word: what is no field has no meaning before a colon.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from typing import Final, NamedTuple

from penstock.sink.kept import KeptMessage
from penstock.sink.web import charset, fields, mime
from penstock.sink.web.charset import without_surrogates
from penstock.sink.web.fields import value_of
from penstock.sink.web.mime import Work
from penstock.sink.web.view import attachments, shown_as, subject_of

MAX_QUERY: Final = 200
_MAX_TEXT: Final = 262_144
"""Octets of the texts of a message in which words are looked for."""
_TERM: Final = re.compile(r'(-?)(?:([A-Za-z-]+):)?(?:"([^"]*)"?|(\S+))?')
_SIZE: Final = re.compile(r"(>=|<=|>|<|)([0-9]{1,12}(?:\.[0-9]{1,3})?)([kmg]?)b?", re.IGNORECASE)
_UNITS: Final = {"": 1, "k": 1000, "m": 1_000_000, "g": 1_000_000_000}
_ALIASES: Final = {"filename": "attachment", "id": "message-id"}
_TEXT_FIELDS: Final = ("from", "to", "cc", "subject", "message-id", "attachment")
_EXAMPLES: Final = {"has": "attachment", "is": "unread", "size": ">1M", "before": "2026-11-29", "after": "2026-11-28"}
_MARKUP: Final = re.compile(r"<[^<>]*>|&#[0-9]{20,}")
"""Tags, and character references that stand for none: html.unescape fails for thousands of digits."""


class QueryError(ValueError):
    """A query has a form that has no meaning; the text shows the right one."""


class _Searched:
    """A message, read as far as the terms of a query need it."""

    def __init__(self, message: KeptMessage, work: Work) -> None:
        self.message = message
        self._work = work

    @cached_property
    def _structure(self) -> mime.Structure:
        return mime.read(self.message.raw, self._work)

    @cached_property
    def attachments(self) -> int:
        return len(attachments(self._structure))

    @cached_property
    def fields(self) -> dict[str, str]:
        """The texts of the fields that a query can name."""
        message, header = self.message, self._structure.parts[0].fields
        values = {name: self._addresses(name) for name in ("from", "to", "cc", "bcc")}
        recipients = " ".join(message.recipients)
        return {
            "from": fold(f"{message.sender}\n{values['from']}"),
            "to": fold(f"{recipients}\n{values['to']}\n{values['cc']}\n{values['bcc']}"),
            "cc": fold(values["cc"]),
            "subject": fold(subject_of(header)),
            "message-id": fold(value_of(header, "message-id")),
            "attachment": fold("\n".join(part.filename for part in self._structure.parts)),
        }

    def _addresses(self, name: str) -> str:
        found = (each.value for each in self._structure.parts[0].fields if each.name.lower() == name)
        return "\n".join(address.text for value in found for address in fields.read_addresses(value))

    @cached_property
    def everything(self) -> str:
        """All texts in which a word without a field is looked for."""
        parts = self._structure.parts
        headers = (f"{each.name}: {each.text}" for part in parts if part.number == part.within for each in part.fields)
        return "\n".join([*self.fields.values(), fold("\n".join(headers)), *map(fold, self._texts())])

    def _texts(self) -> Iterator[str]:
        room = _MAX_TEXT
        for part in self._structure.parts:
            kind = shown_as(part)
            if room > 0 and kind in ("text", "html", "calendar"):
                data = part.content(self._work, room)
                room -= len(data)
                text = charset.decode(data, part.charset, is_cut=room <= 0)
                yield text
                if kind == "html":
                    yield html.unescape(_MARKUP.sub(" ", text))


class _Term(NamedTuple):
    is_negated: bool
    matches: Callable[[_Searched], bool]


class Query:
    """A query that was read."""

    def __init__(self, text: str) -> None:
        """Raise QueryError."""
        if len(text) > MAX_QUERY:
            raise QueryError(f"a query has at most {MAX_QUERY} characters")
        self._terms = list(_terms(text))

    @property
    def is_empty(self) -> bool:
        """Every message matches."""
        return not self._terms

    def find(self, messages: Sequence[KeptMessage], limit: int, work: Work) -> list[KeptMessage]:
        """Return the first messages that match. Takes time: call it in a thread."""
        found: list[KeptMessage] = []
        for message in messages:
            work.pause()
            searched = _Searched(message, work)
            if all(term.matches(searched) is not term.is_negated for term in self._terms):
                found.append(message)
                if len(found) >= limit:
                    break
        return found


def fold(text: str) -> str:
    """Return a text as it is compared: without case, with each white space as one blank."""
    return " ".join(unicodedata.normalize("NFC", without_surrogates(text)).casefold().split())


def _terms(text: str) -> Iterator[_Term]:
    for found in _TERM.finditer(text):
        negation, name, phrase, word = found.groups()
        value = phrase if phrase is not None else word or ""
        name = _ALIASES.get((name or "").lower(), (name or "").lower())
        if name and name not in (*_TEXT_FIELDS, "has", "is", "size", "before", "after"):
            name, value = "", f"{found[2]}:{value}"
        if name and not value:
            raise QueryError(
                f"{name}: needs a value right after the colon, such as {name}:{_EXAMPLES.get(name, 'word')}"
            )
        if value:
            yield _Term(negation == "-", _matcher(name, value))


def _matcher(name: str, value: str) -> Callable[[_Searched], bool]:
    wanted = fold(value)
    if name in _TEXT_FIELDS:
        return lambda searched: wanted in searched.fields[name]
    if name == "has":
        return _has(wanted)
    if name == "is":
        return _is(wanted)
    if name == "size":
        return _size(value)
    if name in ("before", "after"):
        moment = _moment(name, value)
        if name == "before":
            return lambda searched: searched.message.received_at < moment
        return lambda searched: searched.message.received_at >= moment
    return lambda searched: wanted in searched.everything


def _has(wanted: str) -> Callable[[_Searched], bool]:
    if wanted not in ("attachment", "attachments"):
        raise QueryError(f"has:{wanted} is unknown; expected has:attachment")
    return lambda searched: searched.attachments > 0


def _is(wanted: str) -> Callable[[_Searched], bool]:
    if wanted not in ("read", "unread"):
        raise QueryError(f"is:{wanted} is unknown; expected is:read or is:unread")
    return lambda searched: searched.message.is_read is (wanted == "read")


def _size(value: str) -> Callable[[_Searched], bool]:
    found = _SIZE.fullmatch(value)
    if found is None:
        raise QueryError(f"size:{value} is no size; expected one like size:>1M, size:<=20k or size:500")
    octets = float(found[2]) * _UNITS[found[3].lower()]
    compare: dict[str, Callable[[float], bool]] = {
        ">": lambda size: size > octets,
        "<": lambda size: size < octets,
        ">=": lambda size: size >= octets,
        "<=": lambda size: size <= octets,
        "": lambda size: size == octets,
    }
    is_so = compare[found[1]]
    return lambda searched: is_so(searched.message.size)


def _moment(name: str, value: str) -> float:
    try:
        return datetime.fromisoformat(value).timestamp()
    except (ValueError, OverflowError, OSError):
        raise QueryError(f"{name}:{value} is no date; expected one like {name}:2026-11-29") from None
