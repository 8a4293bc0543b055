"""Which mail is written to mailboxes before its 250, and what goes into the spool instead."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest
import trio

from penstock.delivery.maildir import MaildirDelivery, MaildirSettings
from penstock.delivery.spool import SpoolDelivery
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

    def note_delivered(self, message: Message, queues: Sequence[str], reply: Reply) -> None:
        self.counted += queues


class Mailboxes(Recorder):
    """Mailboxes on a disk that has been writing for a while."""

    busy_for = 0.0


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


def delivery_into(spool: Spool, mailboxes: Mailboxes | MaildirDelivery, relay: Local | None = None) -> SpoolDelivery:
    return SpoolDelivery(spool, relay or Local(), DiskSpace(Path(), reserve_octets=0, reserve_inodes=0), mailboxes)


async def places(
    spool: Spool, message: Message, transaction: Transaction = TRANSACTION, *, busy_for: float = 0.0
) -> tuple[int, int]:
    """Return how many copies of a message went to the mailboxes, and how many messages are in the spool."""
    mailboxes = Mailboxes()
    mailboxes.busy_for = busy_for
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


async def test_large_mail_and_mail_for_many_goes_into_the_spool(spool: Spool) -> None:
    """So that the clients whose mail is written together need not wait for it."""
    assert await places(spool, message_to(*(f"r{n}@local.org" for n in range(50)))) == (1, 0)
    many = message_to(*(f"r{n}@local.org" for n in range(51)))
    large = message_to("a@local.org", "b@local.org")._replace(body=StoredBody(bytes(600_000)))
    assert await places(spool, many) == (0, 1)
    assert await places(spool, large) == (0, 2)


async def test_mail_goes_into_the_spool_while_the_disk_of_the_mailboxes_hangs(spool: Spool) -> None:
    assert await places(spool, message_to("a@local.org"), busy_for=0.9) == (1, 0)
    assert await places(spool, message_to("a@local.org"), busy_for=1.1) == (0, 1)


class SlowBody(StoredBody):
    """A body that is only there when it was released."""

    released = threading.Event()

    def chunks(self) -> Iterator[bytes]:
        assert self.released.wait(60)
        return super().chunks()


async def test_a_maildir_delivery_knows_for_how_long_it_has_been_writing(tmp_path: Path) -> None:
    delivery, body = MaildirDelivery(MaildirSettings(), tmp_path), SlowBody(b"text")
    async with trio.open_nursery() as nursery:
        assert delivery.busy_for == 0
        nursery.start_soon(delivery.accept, message_to("a@local.org")._replace(body=body), TRANSACTION)
        with trio.fail_after(60):
            while not delivery.busy_for:
                await trio.lowlevel.checkpoint()
        body.released.set()
    await delivery.aclose()
    assert delivery.busy_for == 0


@pytest.mark.parametrize(
    ("kind", "cause"), [("full", "Insufficient system storage"), ("broken", "OSError: the disk is on fire")]
)
async def test_what_cannot_be_written_is_spooled_and_the_reply_says_why(spool: Spool, kind: str, cause: str) -> None:
    reply = await delivery_into(spool, Mailboxes(kind)).accept(message_to("a@local.org"), TRANSACTION)
    assert reply.accepts
    assert reply.cause.startswith("the mailbox could not be written: ")
    assert cause in reply.cause
    assert await spool.count() == 1


async def test_mail_for_postmaster_without_a_domain_goes_into_the_spool(spool: Spool) -> None:
    message = message_to("a@local.org")
    postmaster = Recipient(message.envelope.sender._replace(text="postmaster", local="postmaster", domain=""))
    envelope = message.envelope._replace(recipients=(postmaster,))
    assert await places(spool, message._replace(envelope=envelope)) == (0, 1)


async def test_a_recipient_that_is_named_twice_gets_one_copy_and_counts_once(spool: Spool) -> None:
    mailboxes, relay = Mailboxes(), Local()
    await delivery_into(spool, mailboxes, relay).accept(message_to("a@local.org", "a@local.org"), TRANSACTION)
    assert [each["recipients"] for each in mailboxes.delivered] == ["a@local.org"]
    assert relay.counted == ["local.org"]


async def test_it_keeps_the_contract_of_a_delivery(spool: Spool, tmp_path: Path) -> None:
    await check_delivery(delivery_into(spool, MaildirDelivery(MaildirSettings(), tmp_path)))
