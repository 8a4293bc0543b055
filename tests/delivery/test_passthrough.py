"""What the journal has of a message that a next hop took for some of its recipients."""

from __future__ import annotations

import json

import pytest
import trio

from penstock.delivery.base import Delivery
from penstock.delivery.passthrough import PassthroughDelivery, PassthroughSettings
from penstock.journal import Journal, JournalSettings
from penstock.message import Message
from penstock.relay.ahead import Callahead
from penstock.relay.pool import Pool
from penstock.reply import Reply
from penstock.transaction import Transaction
from tests.contracts.delivery import make_message
from tests.helpers import TRANSACTION
from tests.relay.fake import FakeHop, serving
from tests.relay.test_ahead import Map


class Spooled(Delivery):
    """The delivery behind."""

    needs_body = True

    def __init__(self) -> None:
        self.to: list[str] = []

    async def start(self) -> None:
        """Nothing to start."""

    async def aclose(self) -> None:
        """Nothing to close."""

    async def accept(self, message: Message, transaction: Transaction) -> Reply:
        await trio.lowlevel.checkpoint()
        self.to += [str(to) for to in message.envelope.recipients]
        return Reply(250, "2.0.0", "Ok: spooled")


@pytest.mark.parametrize(
    ("answers", "delivered"),
    [
        (["550 5.1.1 who?", "250 2.1.5 ok", "451 4.2.0 later"], ["b@x.org"]),
        (["250 2.1.5 ok", "550 5.1.1 who?", "250 2.1.5 ok"], ["a@x.org", "c@x.org"]),
        (["451 4.2.0 later"] * 3, []),
        (["250 2.1.5 ok"] * 3, []),  # "passed on as", says the 250
    ],
)
async def test_accepted_recipients_are_delivered_and_the_rest_spooled(
    nursery: trio.Nursery, answers: list[str], delivered: list[str]
) -> None:
    journal = Journal(JournalSettings(format="json"))
    pool = Pool(journal=journal)
    await nursery.start(pool.run)
    hop, spooled = FakeHop(RCPT=answers, TEXT="250 2.0.0 queued as 4711"), Spooled()
    message = make_message(recipients=("a@x.org", "b@x.org", "c@x.org"))
    async with serving(hop):
        delivery = PassthroughDelivery(Callahead(pool, Map(hop.hop())), spooled, PassthroughSettings())
        flow = delivery.open(message)
        assert flow is not None
        await flow.feed(b"Subject: x\r\n")
        assert (await flow.finish(message, TRANSACTION)).accepts
        await pool.aclose()
    lines = [json.loads(line) for line in journal.drain().splitlines()]
    told = [(line["id"], line["to"], line["hop"], line["reply"]) for line in lines if line["event"] == "delivered"]
    hop_name = f"127.0.0.1:{hop.port}"
    assert told == [(message.id, [to], hop_name, "250 2.0.0 queued as 4711") for to in delivered]
    taken = delivered or (["a@x.org", "b@x.org", "c@x.org"] if answers[0].startswith("250") else [])
    assert sorted([*spooled.to, *taken]) == ["a@x.org", "b@x.org", "c@x.org"]
