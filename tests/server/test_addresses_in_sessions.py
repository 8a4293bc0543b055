"""Addresses in whole sessions: tolerated irregularities are journaled, failed authentications are counted."""

from __future__ import annotations

import json
from pathlib import Path

from penstock.journal import Journal, JournalSettings
from penstock.message import Message
from tests.helpers import Recorder
from tests.server.test_connection import talking


async def test_tolerated_irregularities_are_journaled_with_the_message(tmp_path: Path) -> None:
    journal = Journal(JournalSettings(format="json"))
    async with talking(tmp_path, {}, journal=journal) as client:
        await client.ask("EHLO client", "MAIL FROM:<a..b@host_1.example> AUTH=<>", "RCPT TO:<c.@example.org>", "DATA")
        assert (await client.ask("Subject: x\r\n\r\ntext\r\n.")).startswith("250")
        await client.ask("MAIL FROM:<a@example.com>", "RCPT TO:<b@example.org>", "DATA")
        assert (await client.ask("Subject: x\r\n\r\ntext\r\n.")).startswith("250")
    records = [json.loads(line) for line in journal.drain().splitlines()]
    (tolerated,) = [record for record in records if record["event"] == "tolerated"]
    first = next(record for record in records if record["event"] == "accepted")
    assert tolerated["kinds"] == "domain-underscore,ignored-parameter,local-part-dots"
    assert tolerated["id"] == first["id"]


class StreamsNothing(Recorder):
    """A delivery that could begin before the end of the text, and does not."""

    def open(self, head: Message) -> None:
        """Begin with no message."""


async def test_a_message_that_is_not_streamed_has_one_id_and_one_line(tmp_path: Path) -> None:
    journal, recorder = Journal(JournalSettings(format="json")), StreamsNothing()
    async with talking(tmp_path, {}, journal=journal, recorder=recorder) as client:
        await client.ask("EHLO client", "MAIL FROM:<a..b@example.com>", "RCPT TO:<c@example.org>", "DATA")
        assert (await client.ask("Subject: x\r\n\r\ntext\r\n.")).startswith("250")
    records = [json.loads(line) for line in journal.drain().splitlines()]
    ids = [record["id"] for record in records if record["event"] in ("tolerated", "accepted")]
    assert len(ids) == 2
    assert ids[0] == ids[1]


async def test_every_failed_authentication_uses_up_the_budget_of_the_session(tmp_path: Path) -> None:
    settings = {"auth": {"without_tls": True}, "limits": {"auth_failures": 4}}
    async with talking(tmp_path, settings) as client:
        await client.ask("EHLO client")
        assert (await client.ask("AUTH PLAIN AGFsaWNlAHdyb25n")).startswith("535")
        assert (await client.ask("AUTH PLAIN AGFsaWNl")).startswith("501 5.5.2")
        assert (await client.ask("AUTH LOGIN", "no base64")).startswith("501 5.5.2")
        assert (await client.ask("AUTH LOGIN", "*")).startswith("501 5.0.0")
        assert (await client.reply()).startswith("421 4.7.0 Too many failed authentications")
