"""The files of a sink: what is in them, whatever the pieces a text comes in, and what it costs."""

from __future__ import annotations

import itertools
import json
import os
import stat
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from penstock.message import Envelope, Message, MessageId, Recipient
from penstock.message import Path as MailPath
from penstock.sink.kept import KeepingDelivery
from penstock.sink.stores import DumpStore, JsonLinesStore, MaildirStore, MboxStore, Store, unescape
from tests.helpers import TRANSACTION

ALICE = MailPath("alice@example.com", "alice", "example.com")
BOB = MailPath("bob@example.org", "bob", "example.org")
RECEIVED = (
    b"Received: from client.example ([IPv6:2001:db8::1])\r\n\t(using TLSv1.3 with cipher X (256 bits))\r\n"
    b"\tby mx.example.org (Penstock) with ESMTPS id 1M88XN93FV1Z00000001;\r\n\tWed, 25 Nov 2026 09:09:52 +0000\r\n"
)


class Pieces:
    """A body that comes in pieces."""

    def __init__(self, pieces: Sequence[bytes], times: int = 1) -> None:
        self.size = sum(map(len, pieces)) * times
        self._pieces = pieces
        self._times = times

    def chunks(self) -> Iterator[bytes]:
        for _ in range(self._times):
            yield from self._pieces

    def close(self) -> None:
        pass


def message(*pieces: bytes, times: int = 1, prefix: bytes = RECEIVED, envelope: Envelope | None = None) -> Message:
    envelope = envelope or Envelope(ALICE, (Recipient(BOB),))
    return Message(MessageId("M1"), envelope, prefix, Pieces(pieces, times), 1_795_597_792.5)


def text_of(store: MboxStore | DumpStore, path: Path, *messages: Message) -> bytes:
    """Write messages, and return the file."""
    store.open()
    store.write(messages)
    store.close()
    data = path.read_bytes()
    path.unlink()
    return data


LINES = st.lists(st.sampled_from([b"From x", b">From y", b"", b"a", b"\r", b"\xff", b"FromZ"]), max_size=8)


@given(lines=LINES, ends=st.sampled_from([b"\r\n", b""]), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_an_mbox_is_the_same_whatever_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ends: bytes, cuts: list[int]
) -> None:
    text = b"\r\n".join(lines) + ends
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    path = tmp_path_factory.getbasetemp() / "mbox"
    assert text_of(MboxStore(path), path, message(*pieces)) == text_of(MboxStore(path), path, message(text))


def test_a_line_of_an_mbox_may_be_longer_than_a_piece(tmp_path: Path) -> None:
    path = tmp_path / "mbox"
    long = b"x" * 700_000
    data = text_of(MboxStore(path), path, message(b"Fr", b"om ", long, long, b"From ", long, b"\r", b"\nFrom end\r\n"))
    assert data.partition(b"\n")[2] == b">From " + long + long + b"From " + long + b"\n>From end\n\n"


@pytest.mark.parametrize("kind", ["maildir", "mbox", "dump"])
def test_a_text_of_100_megabytes_costs_no_memory(tmp_path: Path, kind: str) -> None:
    body = message(b"0123456789abcde\r\n" * 10_000, times=590)
    stores: dict[str, MaildirStore | MboxStore | DumpStore] = {
        "maildir": MaildirStore(tmp_path / "mail"),
        "mbox": MboxStore(tmp_path / "box"),
        "dump": DumpStore(str(tmp_path / "dump"), is_single=False),
    }
    store = stores[kind]
    store.open()
    tracemalloc.start()
    try:
        store.write([body])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        store.close()
    assert peak < 16 << 20
    (size,) = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert size >= (body.body.size if kind == "maildir" else body.body.size * 16 // 17)


def test_a_dump_has_the_fields_of_smtp_sink(tmp_path: Path) -> None:
    envelope = Envelope(
        ALICE,
        (Recipient(BOB, frozenset({"NEVER"})), Recipient(ALICE, None, "rfc822;a@b")),
        "8BITMIME",
        smtputf8=True,
        size=99,
        ret="HDRS",
        envid="x+2B",
    )
    store = DumpStore(str(tmp_path / "%Y/all"), is_single=False, start=b"-- \n")
    data = text_of(store, tmp_path / "2026" / "all", message(b"Subject: x\r\n\r\nFrom here", envelope=envelope))
    head, _, rest = data.decode().partition(" id ")
    assert head == (
        "-- \n"
        "X-Client-Addr: ipv6:2001:db8::1\n"
        "X-Client-Proto: ESMTP\n"
        "X-Helo-Args: client.example\n"
        "X-Mail-Args: <alice@example.com> SIZE=99 BODY=8BITMIME SMTPUTF8 RET=HDRS ENVID=x+2B\n"
        "X-Rcpt-Args: <bob@example.org> NOTIFY=NEVER\n"
        "X-Rcpt-Args: <alice@example.com> ORCPT=rfc822;a@b\n"
        "Received: from client.example ([IPv6:2001:db8::1])\n"
        "\tby mx.example.org (Penstock) with ESMTP"
    )
    assert rest[16:] == ";\n\tWed, 25 Nov 2026 09:09:52 +0000 (UTC)\nSubject: x\n\nFrom here\n\n"


def test_each_message_has_a_file_of_its_own(tmp_path: Path) -> None:
    store = DumpStore(str(tmp_path / "%H/%M."), is_single=True)
    store.write([message(b"x\r\n")] * 20)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 20


@pytest.mark.parametrize(
    ("text", "meaning"), [("From", b"From"), (r"--\t\n\101\\", b"--\t\nA\\"), (r"\0", b"\0"), (r"\q", rb"\q")]
)
def test_the_escapes_of_c_are_known(text: str, meaning: bytes) -> None:
    assert unescape(text) == meaning


def test_a_json_line_is_one_line(tmp_path: Path) -> None:
    store = JsonLinesStore(tmp_path / "lines")
    store.open()
    store.write([message(b"x\ny")])
    store.close()
    (line,) = (tmp_path / "lines").read_text().splitlines()
    assert json.loads(line)["text"] == "x\ny"


class Broken(Pieces):
    """A body that cannot be read."""

    def chunks(self) -> Iterator[bytes]:
        yield b"half"
        raise OSError("gone")


def stores_in(folder: Path) -> list[Store]:
    folder.mkdir(exist_ok=True)
    return [
        MaildirStore(folder / "maildir"),
        MboxStore(folder / "mbox"),
        JsonLinesStore(folder / "jsonl"),
        DumpStore(str(folder / "one" / "dump."), is_single=True),
        DumpStore(str(folder / "many"), is_single=False),
    ]


@pytest.mark.parametrize("number", range(5))
def test_what_one_store_has_written_is_taken_back_when_another_fails(tmp_path: Path, number: int) -> None:
    store = stores_in(tmp_path)[number]
    store.open()
    store.write([message(b"first\r\n")])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    undo = store.write([message(b"second\r\n"), message(b"third\r\n")])
    undo()
    with pytest.raises(OSError, match="gone"):
        store.write([message(b"fourth\r\n"), message(b"")._replace(body=Broken([b"x"]))])
    store.close()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


async def test_a_refused_message_is_in_no_file(tmp_path: Path) -> None:
    delivery = KeepingDelivery(None, [MboxStore(tmp_path / "mbox"), JsonLinesStore(Path("/dev/full"))])
    await delivery.start()
    reply = await delivery.accept(message(b"x\r\n"), TRANSACTION)
    await delivery.aclose()
    assert (reply.code, reply.status) == (452, "4.3.1")
    assert (tmp_path / "mbox").read_bytes() == b""
    assert (delivery.failures, delivery.last_failure) == (1, "[Errno 28] No space left on device")


async def test_a_message_that_cannot_be_kept_affects_no_other(tmp_path: Path) -> None:
    delivery = KeepingDelivery(None, [MaildirStore(tmp_path / "maildir"), MboxStore(tmp_path / "mbox")])
    await delivery.start()
    codes: dict[int, int] = {}

    async def accept(number: int) -> None:
        each = message(b"%d\r\n" % number)
        if number == 3:
            each = each._replace(body=Broken([b"x"]))
        codes[number] = (await delivery.accept(each, TRANSACTION)).code

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(accept, number)
    await delivery.aclose()
    assert codes == {number: 451 if number == 3 else 250 for number in range(10)}
    assert len(list((tmp_path / "maildir" / "new").iterdir())) == 9
    assert (tmp_path / "mbox").read_bytes().count(b"From ") == 9
    assert delivery.failures == 1


def test_a_template_that_ends_with_a_slash_is_a_folder(tmp_path: Path) -> None:
    DumpStore(f"{tmp_path}/%Y/", is_single=True).write([message(b"x\r\n")])
    (file,) = (tmp_path / "2026").iterdir()
    assert file.read_bytes().endswith(b"x\n\n")


def test_dumps_can_be_read_by_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        DumpStore(str(tmp_path / "one."), is_single=True).write([message(b"x\r\n")])
        DumpStore(str(tmp_path / "many"), is_single=False).write([message(b"x\r\n")])
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()] == [0o600, 0o600]
