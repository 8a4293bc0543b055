"""Messages that are kept: the shelf, the files, the delivery."""

from __future__ import annotations

import base64
import json
import mailbox
import os
import stat
from pathlib import Path

import pytest
import trio

from penstock.message import Envelope, Message, MessageId, Recipient
from penstock.message import Path as MailPath
from penstock.metrics._session import SequenceTracker
from penstock.reply import Reply
from penstock.sink.kept import HeaderMarks, KeepSettings, KeptMessage, KeptMessages, make_keeping
from penstock.sink.stores import MboxStore
from tests.helpers import TRANSACTION

TEXT = b"Subject: =?utf-8?q?gr=C3=BC=C3=9Fe?=\r\nX-Seq: 7\r\n\r\nhello\r\nFrom here\r\n>From there\r\n"


class TextBody:
    """A body in memory."""

    def __init__(self, data: bytes) -> None:
        self.in_memory = False
        self.size = len(data)
        self._data = data

    def chunks(self) -> object:
        return iter([self._data[:10], self._data[10:]])

    def close(self) -> None:
        pass


def message(number: int = 1, text: bytes = TEXT) -> Message:
    path = MailPath("a@example.com", "a", "example.com")
    envelope = Envelope(path, (Recipient(path), Recipient(path)))
    return Message(MessageId(f"M{number:04}"), envelope, b"Received: x\r\n", TextBody(text), 1_700_000_000.0 + number)  # type: ignore[arg-type]


def kept(number: int, size: int = 10) -> KeptMessage:
    return KeptMessage(f"M{number:04}", number, "a@example.com", ("b@example.org",), size, b"x" * size)


def test_a_shelf_forgets_the_oldest_beyond_its_count() -> None:
    shelf = KeptMessages(3)
    for number in range(5):
        shelf.put(kept(number))
    assert [each.id for each in shelf.newest(10)] == ["M0004", "M0003", "M0002"]
    assert shelf.octets == 30
    assert [each.id for each in shelf.newest(1, before="M0004")] == ["M0003"]
    assert shelf.get("M0000") is None


def test_a_shelf_forgets_the_oldest_beyond_its_octets() -> None:
    shelf = KeptMessages(100, octets=40)
    for number in range(10):
        shelf.put(kept(number))
    assert len(shelf) == 4
    assert shelf.octets == 40


def test_a_message_that_fits_is_whole_however_large_it_is() -> None:
    shelf = KeptMessages(100, octets=40)
    shelf.put(kept(1))
    shelf.put(kept(2, size=40))
    (there,) = shelf.newest(9)
    assert (there.id, len(there.raw), there.is_cut) == ("M0002", 40, False)


def test_a_message_larger_than_all_room_is_cut_and_marked() -> None:
    shelf = KeptMessages(100, octets=40)
    shelf.put(kept(1, size=100))
    (there,) = shelf.newest(1)
    assert (len(there.raw), there.is_cut, there.size) == (40, True, 100)


def test_changes_are_counted() -> None:
    shelf = KeptMessages(10)
    counts = [shelf.changes]
    shelf.put(kept(1))
    counts.append(shelf.changes)
    assert shelf.mark("M0001", is_read=True)
    counts.append(shelf.changes)
    assert shelf.mark("M0001", is_read=True)
    assert not shelf.mark("M0009", is_read=True)
    assert shelf.changes == counts[-1]
    shelf.delete("M0001")
    counts.append(shelf.changes)
    shelf.clear()
    counts.append(shelf.changes)
    assert counts == sorted(set(counts))


def pages(shelf: KeptMessages, limit: int) -> list[list[str]]:
    """Read a shelf page by page, as a client does that names the last message it has."""
    found: list[list[str]] = []
    while page := shelf.newest(limit, found[-1][-1] if found else None):
        found.append([each.id for each in page])
    return found


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_pages_have_each_message_once_whatever_the_order_of_ids_is(limit: int) -> None:
    shelf = KeptMessages(10)
    for number in (2, 5, 1, 6, 3, 4):
        shelf.put(kept(number))
    found = pages(shelf, limit)
    assert [name for page in found for name in page] == ["M0004", "M0003", "M0006", "M0001", "M0005", "M0002"]
    assert [len(page) for page in found[:-1]] == [limit] * (len(found) - 1)


def test_what_is_before_a_deleted_message_is_what_it_was() -> None:
    shelf = KeptMessages(3)
    for number in (3, 1, 2):
        shelf.put(kept(number))
    shelf.delete("M0001")
    assert [each.id for each in shelf.newest(10, before="M0001")] == ["M0003"]
    shelf.put(kept(0))
    assert [each.id for each in shelf.newest(10, before="M0001")] == ["M0003"]


def test_nothing_is_before_a_message_that_was_pushed_out_or_never_there() -> None:
    shelf = KeptMessages(2)
    for number in (9, 2, 1):
        shelf.put(kept(number))
    for gone in ("M0009", "M9999", "", "\udc00"):
        assert shelf.newest(10, before=gone) == []
    shelf.clear()
    shelf.put(kept(3))
    assert shelf.newest(10, before="M0001") == []


def test_a_shelf_knows_no_more_deleted_messages_than_it_has_room_for() -> None:
    shelf = KeptMessages(3)
    shelf.put(kept(0))
    for number in range(1, 6):
        shelf.put(kept(number))
        shelf.delete(f"M{number:04}")
    assert [bool(shelf.newest(1, before=f"M{number:04}")) for number in range(1, 6)] == [False, False, True, True, True]


def test_a_shelf_forgets_what_it_is_told_to() -> None:
    shelf = KeptMessages(3)
    shelf.put(kept(1))
    shelf.put(kept(2))
    assert shelf.delete("M0001")
    assert not shelf.delete("M0001")
    assert shelf.clear() == 1
    assert shelf.octets == len(shelf) == 0


@pytest.mark.parametrize("text", ["", "last", "last:", "last:0", "last:100001", "last:x", "maildir:", "mbox", "zip:x"])
def test_a_malformed_setting_shows_the_valid_forms(text: str) -> None:
    with pytest.raises(ValueError, match="last:N"):
        KeepSettings.parse(text)


async def keep(what: str, *texts: bytes) -> list[Reply]:
    """Give messages to a delivery, and return its replies."""
    delivery = make_keeping([KeepSettings.parse(what)], None)
    await delivery.start()
    replies = [await delivery.accept(message(number, text), TRANSACTION) for number, text in enumerate(texts)]
    await delivery.aclose()
    return replies


async def test_a_maildir_has_each_message_as_it_came(tmp_path: Path) -> None:
    replies = await keep(f"maildir:{tmp_path / 'mail'}", TEXT, b"two\r\n", b"three\r\n")
    assert [reply.code for reply in replies] == [250, 250, 250]
    assert {path.read_bytes() for path in (tmp_path / "mail" / "new").iterdir()} == {TEXT, b"two\r\n", b"three\r\n"}
    assert list((tmp_path / "mail" / "tmp").iterdir()) == []


async def test_an_mbox_is_read_by_others(tmp_path: Path) -> None:
    await keep(f"mbox:{tmp_path / 'box'}", TEXT, b"no end of line", TEXT)
    data = (tmp_path / "box").read_bytes()
    assert b"\n>From here\n>>From there\n" in data
    box = mailbox.mbox(tmp_path / "box")
    assert len(box) == 3
    assert next(iter(box)).get_from() == "a@example.com Tue Nov 14 22:13:20 2023"
    box.close()


async def test_json_lines_hold_text_or_base64(tmp_path: Path) -> None:
    await keep(f"jsonl:{tmp_path / 'lines'}", TEXT, b"\xff\xfe")
    first, second = (json.loads(line) for line in (tmp_path / "lines").read_text().splitlines())
    assert first["text"].encode() == TEXT
    assert first["recipients"] == ["a@example.com", "a@example.com"]
    assert base64.b64decode(second["base64"]) == b"\xff\xfe"


async def test_files_grow_behind_what_they_have(tmp_path: Path) -> None:
    await keep(f"jsonl:{tmp_path / 'lines'}", b"one")
    await keep(f"jsonl:{tmp_path / 'lines'}", b"two")
    assert len((tmp_path / "lines").read_text().splitlines()) == 2


async def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        await keep(f"mbox:{tmp_path / 'nowhere' / 'box'}", TEXT)


async def test_a_message_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    delivery = make_keeping([KeepSettings.parse("mbox:/dev/full")], None)
    store = delivery._stores[0]
    assert isinstance(store, MboxStore)
    store._path = tmp_path / "box"
    await delivery.start()
    assert store._file is not None
    store._file.close()
    store._file = Path("/dev/full").open("r+b", buffering=0)  # noqa: SIM115, ASYNC230
    reply = await delivery.accept(message(), TRANSACTION)
    await delivery.aclose()
    assert reply.code in (451, 452)
    assert delivery.shelf is not None
    assert len(delivery.shelf) == 0


async def test_messages_on_the_shelf_are_answered_at_once() -> None:
    delivery = make_keeping([KeepSettings.parse("last:2")], None)
    await delivery.start()
    for number in range(3):
        assert (await delivery.accept(message(number), TRANSACTION)).accepts
    assert delivery.shelf is not None
    assert len(delivery.shelf) == 2
    await delivery.aclose()


async def test_many_messages_are_written_together(tmp_path: Path) -> None:
    delivery = make_keeping([KeepSettings.parse(f"jsonl:{tmp_path / 'lines'}")], None)
    await delivery.start()
    async with trio.open_nursery() as nursery:
        for number in range(1000):
            nursery.start_soon(delivery.accept, message(number, b"x"), TRANSACTION)
    await delivery.aclose()
    assert len((tmp_path / "lines").read_text().splitlines()) == 1000


def test_marks_are_taken_from_a_field_of_the_header() -> None:
    book = SequenceTracker()
    marks = HeaderMarks("x-seq", lambda: book)
    marks.take(TEXT)
    marks.take(b"Subject: x\r\n\r\nX-Seq: 8\r\n")
    marks.take(b"X-Seq: nothing\r\n\r\n")
    marks.take(b"X-Seq: seq-k3-9\r\n\r\n")
    assert {name: run.highest for name, run in book.runs.items()} == {"": 7, "k3": 9}
    assert book.unmarked == 2


@pytest.mark.parametrize("name", ["", "X Seq", "X:Seq", "X\r\n", "ü"])
def test_a_malformed_field_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="header field name"):
        HeaderMarks(name, SequenceTracker)


async def test_a_text_that_is_too_long_for_a_line_of_json_is_refused(tmp_path: Path) -> None:
    delivery = make_keeping([KeepSettings.parse(f"jsonl:{tmp_path / 'lines'}")], None)
    delivery._max_octets = 10
    await delivery.start()
    replies = [
        await delivery.accept(message(n, text), TRANSACTION) for n, text in ((1, b"0123456789"), (2, b"0123456789a"))
    ]
    await delivery.aclose()
    assert [reply.code for reply in replies] == [250, 552]
    assert len((tmp_path / "lines").read_text().splitlines()) == 1


async def test_a_message_too_large_for_memory_is_whole_in_a_file(tmp_path: Path) -> None:
    delivery = make_keeping([KeepSettings.parse(f"maildir:{tmp_path / 'mail'}")], None)
    assert delivery.shelf is not None
    delivery.shelf.room = 15
    await delivery.start()
    assert (await delivery.accept(message(1, TEXT), TRANSACTION)).code == 250
    await delivery.aclose()
    (shown,) = delivery.shelf.newest(1)
    assert (shown.raw, shown.is_cut, shown.size) == (TEXT[:15], True, len(TEXT))
    (path,) = (tmp_path / "mail" / "new").iterdir()
    assert path.read_bytes() == TEXT


@pytest.mark.parametrize("kind", ["maildir", "mbox", "jsonl"])
async def test_kept_mail_can_be_read_by_its_owner_only(tmp_path: Path, kind: str) -> None:
    before = os.umask(0)
    try:
        await keep(f"{kind}:{tmp_path / 'kept'}", TEXT)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o600]


async def test_a_message_whose_session_is_cancelled_is_written(tmp_path: Path) -> None:
    """The thread that writes reads the body, which the session closes when `accept` ends."""
    delivery = make_keeping([KeepSettings.parse(f"jsonl:{tmp_path / 'lines'}")], None)
    await delivery.start()
    with trio.CancelScope() as scope:
        body = TextBody(TEXT)
        body.in_memory = True
        sent = message(1)._replace(body=body)  # type: ignore[arg-type]
        scope.cancel()
        assert (await delivery.accept(sent, TRANSACTION)).code == 250
    await delivery.aclose()
    assert len((tmp_path / "lines").read_text().splitlines()) == 1
