"""Deliveries: the contract, and what a Maildir promises."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from penstock.delivery.discard import DiscardDelivery
from penstock.delivery.maildir import MaildirDelivery, MaildirSettings
from penstock.message import Message
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


async def test_a_message_stands_in_new_byte_for_byte(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_full_disk_refuses_for_all_and_leaves_nothing(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = maildir(tmp_path, "{local}")
    await delivery.accept(make_message(b"first", recipients=("b@x", "c@x")), TRANSACTION)
    before = files(tmp_path)
    fsync = os.fsync
    calls = iter(range(100))

    def full_at_the_second_copy(descriptor: int) -> None:
        if next(calls) == 1:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_second_copy)
    reply = await delivery.accept(make_message(b"second", recipients=("b@x", "c@x")), TRANSACTION)
    assert (reply.code, reply.status) == (452, "4.3.1")
    assert files(tmp_path) == before


async def test_other_trouble_is_raised_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = maildir(tmp_path)

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    await delivery.start()
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        await delivery.accept(make_message(b"x"), TRANSACTION)
    assert files(tmp_path) == []


class Unreadable:
    """A body whose file breaks in the middle."""

    size = 100

    def chunks(self) -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.EIO, "the temporary file is gone")

    def close(self) -> None:
        pass


async def test_a_body_that_can_not_be_read_leaves_nothing(tmp_path: Path) -> None:
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
