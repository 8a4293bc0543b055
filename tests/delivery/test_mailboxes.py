"""Which mail is written to mailboxes before its 250, and what goes into the spool instead."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from penstock.delivery.base import Delivery
from penstock.delivery.maildir import MaildirDelivery, MaildirSettings
from penstock.delivery.spool import Mailboxes, SpoolDelivery
from penstock.message import Message, Recipient
from penstock.reply import Reply
from penstock.spool.bodies import StoredBody
from penstock.spool.diskspace import DiskSpace
from penstock.spool.spool import Spool, SpoolSettings
from penstock.transaction import Transaction
from tests.contracts.delivery import check_delivery, make_message
from tests.delivery.test_spool_delivery import Relay
from tests.helpers import PEER, TRANSACTION, Recorder


class Local(Relay):
    """A relay for which local.org has mailboxes here."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[str] = []

    def domain_of(self, recipient: Recipient) -> str:
        return recipient.path.domain or "local.org"

    def are_mailboxes(self, queues: Sequence[str]) -> bool:
        return set(queues) == {"local.org"}

    def qualified(self, recipient: Recipient) -> Recipient:
        path = recipient.path
        return recipient._replace(path=path._replace(text=f"{path.local}@local.org", domain="local.org"))

    def note_filed(self, message: Message, queues: Sequence[str], reply: Reply) -> None:
        self.counted += queues


def message_to(*recipients: str, notify: str = "") -> Message:
    message = make_message(recipients=recipients)
    found = tuple(to._replace(notify=frozenset({notify}) if notify else None) for to in message.envelope.recipients)
    envelope = message.envelope._replace(recipients=found)
    return message._replace(envelope=envelope, body=StoredBody(b"Subject: x\r\n\r\nbody\r\n"))


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[Spool]:
    spool = Spool(SpoolSettings(), tmp_path / "spool")
    (tmp_path / "spool").mkdir()
    await spool.start()
    yield spool
    await spool.aclose()


def delivery_into(spool: Spool, mailboxes: Delivery, relay: Local | None = None) -> SpoolDelivery:
    relay = relay or Local()
    space = DiskSpace(Path(), reserve_octets=0, reserve_inodes=0)
    return SpoolDelivery(spool, relay, space, Mailboxes(mailboxes, relay))


async def places(spool: Spool, message: Message, transaction: Transaction = TRANSACTION) -> tuple[int, int]:
    """Return how many copies of a message went to the mailboxes, and how many messages are in the spool."""
    mailboxes = Recorder()
    assert (await delivery_into(spool, mailboxes).accept(message, transaction)).accepts
    return len(mailboxes.delivered), await spool.count()


async def test_mail_for_mailboxes_is_written_there(spool: Spool) -> None:
    assert await places(spool, message_to("a@local.org", "b@local.org")) == (1, 0)


async def test_mail_with_a_spam_tag_is_written_there(spool: Spool) -> None:
    transaction = Transaction(PEER)
    transaction.results.quarantine = "tag"
    assert await places(spool, message_to("a@local.org"), transaction) == (1, 0)


@pytest.mark.parametrize("quarantine", ["hold", "route:spam"])
async def test_mail_in_quarantine_goes_into_the_spool(spool: Spool, quarantine: str) -> None:
    transaction = Transaction(PEER)
    transaction.results.quarantine = quarantine
    assert await places(spool, message_to("a@local.org"), transaction) == (0, 1)


async def test_mail_that_is_for_a_next_hop_too_goes_into_the_spool_for_all(spool: Spool) -> None:
    assert await places(spool, message_to("a@local.org", "b@example.org")) == (0, 1)


async def test_mail_whose_delivery_is_to_be_reported_goes_into_the_spool(spool: Spool) -> None:
    assert await places(spool, message_to("a@local.org", notify="FAILURE")) == (1, 0)
    assert await places(spool, message_to("a@local.org", notify="SUCCESS")) == (0, 1)


async def test_mail_that_is_not_in_memory_goes_into_the_spool(spool: Spool) -> None:
    message = make_message(b"text", recipients=("a@local.org",))
    assert not getattr(message.body, "in_memory", False)
    assert await places(spool, message) == (0, 1)


@pytest.mark.parametrize("kind", ["full", "broken"])
async def test_what_cannot_be_written_goes_into_the_spool(spool: Spool, kind: str) -> None:
    delivery = delivery_into(spool, Recorder(kind))
    assert (await delivery.accept(message_to("a@local.org"), TRANSACTION)).accepts
    assert await spool.count() == 1


async def test_postmaster_without_a_domain_has_the_mailbox_of_our_postmaster(spool: Spool, tmp_path: Path) -> None:
    delivery = delivery_into(spool, MaildirDelivery(MaildirSettings(path="{domain}/{local}"), tmp_path))
    await delivery.start()
    message = message_to("a@local.org")
    postmaster = Recipient(message.envelope.sender._replace(text="postmaster", local="postmaster", domain=""))
    envelope = message.envelope._replace(recipients=(postmaster,))
    assert (await delivery.accept(message._replace(envelope=envelope), TRANSACTION)).accepts
    await delivery.aclose()
    (file,) = (tmp_path / "local.org" / "postmaster" / "new").iterdir()
    assert b"Delivered-To: postmaster@local.org\r\n" in file.read_bytes()
    assert await spool.count() == 0


async def test_a_recipient_that_is_named_twice_gets_one_copy_and_counts_once(spool: Spool) -> None:
    mailboxes, relay = Recorder(), Local()
    await delivery_into(spool, mailboxes, relay).accept(message_to("a@local.org", "a@local.org"), TRANSACTION)
    assert [each["recipients"] for each in mailboxes.delivered] == ["a@local.org"]
    assert relay.counted == ["local.org"]


async def test_it_keeps_the_contract_of_a_delivery(spool: Spool, tmp_path: Path) -> None:
    await check_delivery(delivery_into(spool, MaildirDelivery(MaildirSettings(), tmp_path)))
