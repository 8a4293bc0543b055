"""Deliveries: the contract, and what a Maildir promises."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import trio

from penstock.delivery import maildirfiles
from penstock.delivery.discard import DiscardDelivery
from penstock.delivery.maildir import MaildirDelivery, MaildirSettings
from penstock.delivery.maildirfiles import MaildirFiles, make_maildir
from penstock.message import Message
from penstock.reply import Reply
from penstock.spool.bodies import StoredBody
from tests.contracts.delivery import check_delivery, make_message
from tests.helpers import TRANSACTION


def maildir(folder: Path, path: str = "maildir") -> MaildirDelivery:
    return MaildirDelivery(MaildirSettings(path=path), folder)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


async def test_every_delivery_keeps_the_contract(tmp_path: Path) -> None:
    await check_delivery(DiscardDelivery())
    await check_delivery(maildir(tmp_path))
    await check_delivery(maildir(tmp_path, "{domain}/{local}"))


async def test_a_discarded_message_is_counted() -> None:
    delivery = DiscardDelivery()
    await delivery.accept(make_message(b"12345", recipients=("a@b", "c@d")), TRANSACTION)
    assert (delivery.messages, delivery.recipients, delivery.octets) == (1, 2, 5)


async def test_a_message_is_in_new_byte_for_byte(tmp_path: Path) -> None:
    body = b"Subject: x\r\n\r\n.\r\n\0\xff\nFrom here\r\n"
    await maildir(tmp_path).accept(make_message(body, recipients=("b@example.org", "c@example.org")), TRANSACTION)
    (path,) = files(tmp_path)
    assert path.parent == tmp_path / "maildir" / "new"
    assert path.read_bytes() == (
        b"Return-Path: <a@example.com>\r\nDelivered-To: b@example.org\r\nDelivered-To: c@example.org\r\n"
        b"Received: by test\r\n" + body
    )


async def test_each_folder_gets_one_copy_with_its_recipients(tmp_path: Path) -> None:
    recipients = ("b@example.org", "c@example.org", "B@EXAMPLE.org", "d@example.net")
    await maildir(tmp_path, "{domain}/{local}").accept(make_message(b"x", recipients=recipients), TRANSACTION)
    folders = [str(path.relative_to(tmp_path).parent) for path in files(tmp_path)]
    assert folders == ["example.net/d/new", "example.org/b/new", "example.org/c/new"]
    (b_copy,) = files(tmp_path / "example.org" / "b")
    assert b_copy.read_bytes().count(b"Delivered-To:") == 2


@pytest.mark.parametrize(
    "local", ["../../etc", "..", ".", ".hidden", "a/b", "a\0b", "x" * 300, "~root", "{domain}", "\n"]
)
def test_no_recipient_leads_out_of_the_folder(tmp_path: Path, local: str) -> None:
    message = make_message()
    path = message.envelope.sender._replace(local=local, domain="example.org")
    folder = maildir(tmp_path, "{domain}/{local}").folder_of(path)
    names = folder.relative_to(tmp_path / "example.org").parts
    assert names
    for name in names:
        assert not name.startswith(".")
        assert "\0" not in name
        assert len(name) <= 255


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("o'brien", "o_brien"),
        ("a/b", "a_b"),
        ("a%2fb", "a/b"),
        ("..", "__"),
        (".a", "_a"),
        ("", "postmaster"),
        ("", "%00"),
        ("\u00fc", "_"),
        ("x" * 300, "x" * 301),
        ("x" * 300, "x" * 200),
        ("x" * 200 + "/" + "y", "x" * 200 + "%" + "y"),
        ("x" * 200 + "%", "x" * 200),
    ],
)
def test_different_local_parts_have_different_folders(tmp_path: Path, one: str, other: str) -> None:
    delivery, sender = maildir(tmp_path, "{domain}/{local}"), make_message().envelope.sender
    folders = [delivery.folder_of(sender._replace(local=local, domain="example.org")) for local in (one, other)]
    assert folders[0] != folders[1]
    for folder, local in zip(folders, (one, other), strict=True):
        name = str(folder.relative_to(tmp_path / "example.org")).replace("%/", "")
        assert unquote("" if name == "%00" else name) == local


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
async def test_a_full_disk_is_temporary_for_the_client(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = maildir(tmp_path)
    monkeypatch.setattr(maildirfiles, "publish", lambda *_: [number])
    reply = await delivery.accept(in_memory(b"x"), TRANSACTION)
    assert (reply.code, reply.status) == (452, "4.3.1")


async def test_other_trouble_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = maildir(tmp_path)
    monkeypatch.setattr(maildirfiles, "publish", lambda *_: [errno.EIO])
    with pytest.raises(OSError, match="Input/output error"):
        await delivery.accept(in_memory(b"x"), TRANSACTION)


def in_memory(*pieces: bytes, recipients: tuple[str, ...] = ("b@example.org",)) -> Message:
    """Return a message as a connection hands over most: its body can be read without blocking."""
    message = make_message(recipients=recipients)
    return message._replace(body=StoredBody(b"".join(pieces)))


async def test_messages_that_come_together_are_written_together(tmp_path: Path) -> None:
    delivery = maildir(tmp_path, "{local}")
    batches: list[int] = []
    write = delivery._files.write

    def note(messages: Sequence[Any]) -> list[str | Exception]:
        batches.append(len(messages))
        return write(messages)

    delivery._files.write = note  # type: ignore[method-assign]
    replies: list[Reply] = []

    async def accept(number: int) -> None:
        recipients = (f"u{number % 7}@x", f"v{number}@x")
        replies.append(await delivery.accept(in_memory(b"%d" % number, recipients=recipients), TRANSACTION))

    async with trio.open_nursery() as nursery:
        for number in range(300):
            nursery.start_soon(accept, number)
    assert {reply.code for reply in replies} == {250}
    assert len(files(tmp_path)) == 600
    assert sum(batches) == 300
    assert max(batches) > 1
    await delivery.aclose()


async def test_a_folder_that_is_removed_is_created_again(tmp_path: Path) -> None:
    delivery = maildir(tmp_path)
    await delivery.start()
    shutil.rmtree(tmp_path / "maildir")
    assert (await delivery.accept(in_memory(b"x"), TRANSACTION)).code == 250
    assert len(files(tmp_path)) == 1


async def test_what_was_begun_is_finished_before_the_delivery_is_closed(tmp_path: Path) -> None:
    delivery = maildir(tmp_path)
    ended: list[Any] = []
    for number in range(20):
        delivery.deliver_later(in_memory(b"%d" % number), ended.append)
    await delivery.aclose()
    assert len(ended) == len(files(tmp_path)) == 20
    with pytest.raises(trio.ClosedResourceError):
        delivery.deliver_later(in_memory(b"late"), ended.append)


@contextmanager
def few_descriptors(count: int) -> Iterator[None]:
    """Leave this process a number of unused descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_more_files_than_descriptors_are_written_in_turn(tmp_path: Path) -> None:
    delivery = maildir(tmp_path)
    await delivery.start()
    ended: list[Any] = []
    with few_descriptors(12):
        for number in range(40):
            delivery.deliver_later(in_memory(b"%d" % number), ended.append)
        await delivery.aclose()
    assert [result.unwrap().code for result in ended] == [250] * 40


@pytest.mark.parametrize("is_large", [False, True])
async def test_own_maildirs_need_few_descriptors(tmp_path: Path, is_large: bool) -> None:
    message = in_memory(b"body", recipients=tuple(f"u{number}@x" for number in range(400)))
    if is_large:  # its body is read from the disk
        message = message._replace(body=make_message(b"body").body)
    copies = maildir(tmp_path, "{local}")._copies(message)
    for copy in copies:
        make_maildir(copy.folder, is_synced=False)
    with few_descriptors(12):
        first, second = MaildirFiles(is_synced=False).write([(message, copies), (in_memory(b"other"), copies)])
    assert isinstance(first, str)
    assert isinstance(second, str)
    assert len(files(tmp_path)) == 800


def test_one_bad_folder_keeps_back_the_copies_of_all(tmp_path: Path) -> None:
    message = in_memory(b"body", recipients=tuple(f"u{number}@x" for number in range(200)))
    copies = maildir(tmp_path, "{local}")._copies(message)
    for copy in copies:
        make_maildir(copy.folder, is_synced=False)
    shutil.rmtree(copies[-1].folder / "new")
    (copies[-1].folder / "new").touch()
    (result,) = MaildirFiles(is_synced=False).write([(message, copies)])
    assert isinstance(result, OSError)
    assert files(tmp_path) == [copies[-1].folder / "new"]


class Unreadable:
    """A body whose file breaks in the middle."""

    size = 100

    def chunks(self) -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.EIO, "the temporary file is gone")

    def close(self) -> None:
        pass


async def test_an_unreadable_body_leaves_no_file(tmp_path: Path) -> None:
    delivery = maildir(tmp_path)
    whole = make_message()
    message = Message(whole.id, whole.envelope, whole.prefix, Unreadable(), 0.0)
    with pytest.raises(OSError, match="gone"):
        await delivery.accept(message, TRANSACTION)
    assert files(tmp_path) == []


async def test_what_a_crash_has_left_is_swept(tmp_path: Path) -> None:
    delivery = maildir(tmp_path)
    await delivery.start()
    old, young = tmp_path / "maildir" / "tmp" / "old", tmp_path / "maildir" / "tmp" / "young"
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    await delivery.start()
    assert files(tmp_path) == [young]
