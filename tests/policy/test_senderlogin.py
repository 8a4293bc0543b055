"""Which senders an authenticated user may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from penstock.journal import Journal, JournalSettings
from penstock.message import NO_PARAMETERS
from penstock.policy.judge import Judge
from penstock.policy.senderlogin import SenderLoginCheck, SendersError, read_senders
from penstock.policy.settings import PolicySettings, SenderLoginSettings
from penstock.reply import Reply
from tests.policy.judging import judge, make_message, make_transaction, path_of

FILE = """\
# senders
alice: alice@example.org, sales@example.org @shop.example
ROOT: *
bob@example.org : info@bücher.example
"""
REFUSED = Reply(553, "5.7.1", "You may not send from this address")


def check_for(folder: Path, file: str = FILE, **settings: object) -> SenderLoginCheck:
    (folder / "senders").write_text(file)
    wanted = SenderLoginSettings(file="senders" if file else "", **settings)  # type: ignore[arg-type]
    journal = Journal(JournalSettings())
    return SenderLoginCheck(
        wanted, "enforce", data_dir=folder, is_ours=lambda domain: domain == "example.org", journal=journal
    )


async def at_mail(check: SenderLoginCheck, identity: str | None, sender: str) -> Reply | None:
    judge_ = Judge(PolicySettings(mode="enforce"), [check], Journal(JournalSettings()))
    return await judge_.on_mail(make_transaction(identity=identity), path_of(sender), NO_PARAMETERS)


@pytest.mark.parametrize(
    ("user", "senders"),
    [
        ("alice", ["alice@example.org", "ALICE@example.org", "sales@example.org", "anything@shop.example", ""]),
        ("Alice", ["alice@example.org"]),
        ("root", ["ceo@example.org"]),
        ("bob@example.org", ["bob@example.org", "info@xn--bcher-kva.example"]),
        ("carol", ["carol@example.org"]),
        ("dave@other.example", ["dave@other.example"]),
    ],
)
async def test_users_may_use_their_own_addresses(tmp_path: Path, user: str, senders: list[str]) -> None:
    check = check_for(tmp_path)
    for sender in senders:
        assert await at_mail(check, user, sender) is None, sender


@pytest.mark.parametrize(
    ("user", "senders"),
    [
        ("alice", ["ceo@example.org", "alice@other.example", "x@sub.shop.example", "alice"]),
        ("bob@example.org", ["alice@example.org", "bob@example.com"]),
        ("carol", ["carol@other.example"]),
    ],
)
async def test_other_addresses_are_refused(tmp_path: Path, user: str, senders: list[str]) -> None:
    check = check_for(tmp_path)
    for sender in senders:
        assert await at_mail(check, user, sender) == REFUSED, sender


async def test_clients_that_are_not_authenticated_are_not_checked(tmp_path: Path) -> None:
    assert await at_mail(check_for(tmp_path), None, "ceo@example.org") is None


async def test_the_from_field_is_checked_as_well(tmp_path: Path) -> None:
    check = check_for(tmp_path)
    for author, is_allowed in {
        b"Alice <alice@example.org>": True,
        b"sales@example.org": True,
        b"The CEO <ceo@example.org>": False,
        b"alice@example.org, ceo@example.org": False,
        b'"alice@example.org" <ceo@example.org>': False,
    }.items():
        transaction = make_transaction("alice@example.org", identity="alice")
        message = make_message(transaction, b"Subject: x\r\nFrom: " + author + b"\r\n\r\ntext\r\n")
        reply, _ = await judge(check, transaction, message)
        assert (reply is None) == is_allowed, author
        assert reply is None or reply.code == 550
        assert (await judge(check_for(tmp_path, check_from=False), transaction, message))[0] is None


async def test_a_changed_file_is_read_again(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    check = check_for(tmp_path)
    assert await at_mail(check, "alice", "new@example.org") == REFUSED
    (tmp_path / "senders").write_text("alice: new@example.org\n")
    await trio.sleep(1.1)
    assert await at_mail(check, "alice", "new@example.org") is None
    (tmp_path / "senders").write_text("nonsense\n")
    await trio.sleep(1.1)
    assert await at_mail(check, "alice", "new@example.org") is None
    (tmp_path / "senders").unlink()
    await trio.sleep(1.1)
    assert await at_mail(check, "alice", "new@example.org") is None


@pytest.mark.parametrize("line", ["alice", "alice:", ": a@example.org", "alice: @", "alice: a b@example.org"])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "senders").write_text(f"# first\n{line}\n")
    with pytest.raises(SendersError, match=r"senders:2: expected"):
        read_senders(tmp_path / "senders")
