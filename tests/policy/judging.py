"""Messages for checks, and a judge that asks one check."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import msgspec

from penstock.journal import Journal, JournalSettings
from penstock.message import Envelope, Message, MessageId, Path, Recipient
from penstock.metrics.counters import Counters
from penstock.metrics.segment import private_segment
from penstock.policy.check import Check, Parts
from penstock.policy.judge import Judge
from penstock.policy.settings import PolicySettings
from penstock.reply import Reply
from penstock.state import State
from penstock.transaction import Peer, TlsInfo, Transaction

HEADER = (
    b"From: Alice <alice@example.com>\r\nTo: bob@example.org\r\nSubject: a\r\n folded one\r\nX-Old: 1\r\nX-Old: 2\r\n"
)
TEXT = b"Hello\r\n\r\nand goodbye\r\n"
PREFIX = b"Authentication-Results: mx.example.org; spf=none\r\nReceived: from client\r\n\tby mx.example.org\r\n"


def make_parts(folder: FilePath = FilePath(), state: State | None = None) -> Parts:
    """Return parts for checks that ask no DNS."""
    resolver: Any = None
    journal = Journal(JournalSettings())
    return Parts("mx.example.org", resolver, journal, folder, lambda domain: domain == "example.org", state=state)


def path_of(address: str) -> Path:
    local, _, domain = address.partition("@")
    return Path(address, local, domain)


@dataclass
class Text:
    """A body in memory, in pieces."""

    octets: bytes
    piece: int = 65_536
    in_memory: bool = True

    @property
    def size(self) -> int:
        return len(self.octets)

    def chunks(self) -> Iterator[bytes]:
        for at in range(0, len(self.octets), self.piece):
            yield self.octets[at : at + self.piece]

    def close(self) -> None:
        pass


def make_transaction(
    sender: str = "alice@example.com", *recipients: str, identity: str | None = None, address: str = "198.51.100.1"
) -> Transaction:
    transaction = Transaction(
        Peer(address, 40_000, "192.0.2.25", 25),
        "public",
        hello="client.example",
        is_esmtp=True,
        tls=TlsInfo("TLSv1.3", "TLS_AES_256_GCM_SHA384", 256),
        identity=identity,
    )
    transaction.sender = path_of(sender)
    transaction.recipients = [Recipient(path_of(each)) for each in recipients or ("bob@example.org",)]
    return transaction


def make_message(
    transaction: Transaction, body: bytes = HEADER + b"\r\n" + TEXT, *, prefix: bytes = PREFIX, piece: int = 65_536
) -> Message:
    envelope: Envelope = transaction.envelope()
    return Message(MessageId("1M8KRQ663CFG00000045"), envelope, prefix, Text(body, piece), time.time())


def octets_of(message: Message) -> bytes:
    """Return a message as a delivery reads it, and check that its size is right."""
    octets = message.prefix + b"".join(message.body.chunks())
    assert len(octets) == message.size
    return octets


def count_in(journal: Journal) -> Counters:
    """Have what a judge does counted, as a worker does."""
    segment = private_segment()
    page = segment.page(segment.claim())
    page.start(os.getpid())
    journal.counters = Counters(page)
    return journal.counters


def counted(counters: Counters, family: str) -> dict[str, int]:
    """Return the series of a family that are not 0: {'{check="spf"}': 2}."""
    found = {name.removeprefix(family): value for _, name, value in counters.page.series() if name.startswith(family)}
    return {name: value for name, value in found.items() if isinstance(value, int) and value}


def judge_with(check: Check, mode: str = "enforce") -> tuple[Judge, Journal]:
    journal = Journal(JournalSettings())
    return Judge(msgspec.convert({"mode": mode}, PolicySettings), [check], journal), journal


async def judge(
    check: Check, transaction: Transaction | None = None, message: Message | None = None
) -> tuple[Reply | None, Message]:
    """Ask one check about a message, as a server does."""
    transaction = transaction or make_transaction()
    return await judge_with(check)[0].on_message(transaction, message or make_message(transaction))
