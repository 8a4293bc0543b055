"""Changes that a mail filter makes to a message: its header, its body, its sender and recipients.

The message is not rewritten. Fields of the client are octet ranges of the body that are left out or replaced when it is
read (overlay.py); what is inserted above them goes into the prefix.

A filter does not see the Received field that this server adds. Positions and counts are those of the fields that it has
seen, as they are after its earlier changes.
"""

from __future__ import annotations

from typing import Final

from penstock.mailauth._header import Header, header_field
from penstock.message import Envelope, Message, Path, Recipient
from penstock.policy.overlay import Edit, EditedBody

MOST_FIELDS: Final = 10_000
MOST_CHANGES: Final = 10_000
"""Of one filter to a message; a new body is one, in however many pieces."""
MOST_OCTETS: Final = 64 << 20
"""Of all changes of one filter to a message."""


class EditError(ValueError):
    """A change cannot be made."""


class _Field:
    """A field of the header: octets of the body, or new ones."""

    __slots__ = ("is_hidden", "name", "octets", "start", "stop")

    def __init__(self, name: bytes, octets: bytes | None, start: int = 0, stop: int = 0) -> None:
        self.name = name
        """In lower case."""
        self.octets = octets
        """None while it is as the client has sent it."""
        self.start, self.stop = start, stop
        """Position in the body; both are 0 for a new field."""
        self.is_hidden = False
        """The filter does not see it."""


def make_field(name: bytes, value: bytes, *, has_space: bool = False) -> bytes:
    """Return a field with CRLF. A value of several lines is folded, whatever the lines begin with. Raise EditError.

    `has_space`: the value has what follows the colon.
    """
    field = header_field(name, value, has_space)
    if field is None:
        raise EditError(f"{name[:100]!r} is not the name of a header field")
    return field


class MessageEditor:
    """Collects the changes to a message; `apply` returns the changed one."""

    def __init__(self, message: Message, header: bytes) -> None:
        """`header` are the lines of the body before its empty line, with CRLF; b"" if the body has no header."""
        self._message = message
        self._header = header
        self._header_octets = len(header)
        self._tail = b"\r\n" if message.prefix.endswith(b"\r\n\r\n") else b""
        """An empty line at the end of the prefix: the body has no header."""
        self._added: list[bytes] = []
        """Fields at the end of the header, while there is no other change: most filters only add some."""
        self._is_split = False
        self._fields: list[_Field] = []
        """Those of the prefix come first. Empty until they are needed."""
        self._in_prefix = 0
        self._has_results = False
        """The first field is our Authentication-Results."""
        self._body: bytearray | None = None
        self._octets = 0
        self._changes = 0
        self._sender: Path | None = None
        self._recipients = message.envelope.recipients
        self.has_changed = False

    def _split(self) -> None:
        """Find the fields."""
        if self._is_split:
            return
        self._is_split = True
        prefix = self._message.prefix.removesuffix(b"\r\n") if self._tail else self._message.prefix
        for found in Header(prefix).fields:
            field = _Field(found.name, prefix[found.start : found.stop])
            field.is_hidden = found.name == b"received"
            self._fields.append(field)
        self._in_prefix = len(self._fields)
        self._has_results = bool(self._fields) and self._fields[0].name == b"authentication-results"
        self._fields += [_Field(found.name, None, found.start, found.stop) for found in Header(self._header).fields]
        self._fields += [_Field(_name_of(field), field) for field in self._added]
        self._added.clear()

    def _count(self, octets: int, *, is_piece: bool = False) -> None:
        """Note a change; `is_piece`: it goes on with the one before. Raise EditError for too many."""
        self.has_changed = True
        self._octets += octets
        self._changes += not is_piece
        if self._octets > MOST_OCTETS or len(self._fields) + len(self._added) > MOST_FIELDS:
            raise EditError(f"more than {MOST_FIELDS} fields, or changes of more than {MOST_OCTETS >> 20} MB")
        if self._changes > MOST_CHANGES:
            raise EditError(f"more than {MOST_CHANGES} changes")

    # ---- the header

    def add(self, field: bytes) -> None:
        """Add a field at the end of the header."""
        self._count(len(field))
        if self._is_split:
            self._fields.append(_Field(_name_of(field), field))
        else:
            self._added.append(field)

    def insert(self, index: int, field: bytes) -> None:
        """Insert a field after the first `index` fields, but never above our Authentication-Results."""
        self._count(len(field))
        self._split()
        at, left = 0, max(index, self._has_results)
        while left and at < len(self._fields):
            left -= not self._fields[at].is_hidden
            at += 1
        if at <= self._in_prefix:
            self._in_prefix += 1
        self._fields.insert(at, _Field(_name_of(field), field))

    def change(self, name: bytes, index: int, field: bytes) -> None:
        """Replace the occurrence number `index` (from 1) of a field; with b"", delete it.

        Without such an occurrence, the field is added. Our own Authentication-Results stays as it is.
        """
        self._count(len(field))
        self._split()
        wanted = name.lower()
        found = [each for each in self._fields if each.name == wanted and not each.is_hidden]
        if 0 < index <= len(found):
            changed = found[index - 1]
            if self._has_results and changed is self._fields[0]:
                return
            if field:
                changed.octets = field
            elif changed.stop:
                changed.octets, changed.name, changed.is_hidden = b"", b"", True
            else:
                at = self._fields.index(changed)
                del self._fields[at]
                self._in_prefix -= at < self._in_prefix
        elif field:
            self.add(field)

    # ---- body and envelope

    def replace_body(self, octets: bytes) -> None:
        """Replace the body; further octets are added to the new one."""
        self._count(len(octets), is_piece=self._body is not None)
        if self._body is None:
            self._body = bytearray()
        self._body += octets

    def change_sender(self, sender: Path) -> None:
        """Change the envelope sender."""
        self._count(0)
        self._sender = sender

    def add_recipient(self, recipient: Path) -> None:
        """Add a recipient; one that is there already is not added again."""
        self._count(len(recipient.text))
        if recipient not in [each.path for each in self._recipients]:
            self._recipients += (Recipient(recipient),)

    def delete_recipient(self, recipient: Path) -> None:
        """Delete a recipient."""
        self._count(0)
        self._recipients = tuple(each for each in self._recipients if _key(each.path) != _key(recipient))

    @property
    def has_recipients(self) -> bool:
        """Any recipient is left."""
        return bool(self._recipients)

    # ---- the result

    def apply(self) -> Message:
        """Return the changed message."""
        message = self._message
        if not self.has_changed:
            return message
        prefix, edits, at, inserted = self._edit_header()
        if inserted and self._tail:
            prefix += inserted
        elif inserted:
            edits.append(Edit(at, at, inserted))
        body = message.body
        if self._body is not None:
            edits.append(self._new_body(at))
        if edits:
            body = EditedBody(body, edits)
        return message._replace(prefix=prefix + self._tail, body=body, envelope=self._envelope(message.envelope))

    def _edit_header(self) -> tuple[bytes, list[Edit], int, bytes]:
        """Return the prefix, the edits of the header in the body, where that ends, and what is inserted there."""
        if not self._is_split:
            prefix = self._message.prefix.removesuffix(self._tail)
            return prefix, [], self._header_octets, b"".join(self._added)
        edits: list[Edit] = []
        at, inserted = 0, list[bytes]()
        for field in self._fields[self._in_prefix :]:
            if not field.stop:
                inserted.append(field.octets or b"")
                continue
            if inserted or field.octets is not None:
                stop = field.stop if field.octets is not None else field.start
                edits.append(Edit(field.start, stop, b"".join([*inserted, field.octets or b""])))
                inserted.clear()
            at = field.stop
        prefix = b"".join([field.octets or b"" for field in self._fields[: self._in_prefix]])
        return prefix, edits, at, b"".join(inserted)

    def _new_body(self, header_end: int) -> Edit:
        octets = bytes(self._body or b"")
        size = self._message.body.size
        if self._tail:
            return Edit(0, size, octets)
        return Edit(max(header_end, self._header_octets), size, b"\r\n" + octets)

    def _envelope(self, envelope: Envelope) -> Envelope:
        sender = envelope.sender if self._sender is None else self._sender
        if sender is envelope.sender and self._recipients is envelope.recipients:
            return envelope
        return envelope._replace(sender=sender, recipients=self._recipients)


def end_of_results(prefix: bytes) -> int:
    """Return where our Authentication-Results ends, 0 without one: it is the first of the fields that we add."""
    if not prefix.startswith(b"Authentication-Results:"):
        return 0
    end = prefix.find(b"\r\n") + 2
    while prefix[end : end + 1] in (b"\t", b" "):  # a folded line
        end = prefix.find(b"\r\n", end) + 2
    return end


def _name_of(field: bytes) -> bytes:
    return field.partition(b":")[0].lower()


def _key(path: Path) -> tuple[str, str]:
    return path.local, path.domain
