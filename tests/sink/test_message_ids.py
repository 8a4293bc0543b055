"""Duplicates by Message-ID."""

from __future__ import annotations

import pytest

from penstock.sink.messageids import MessageIdOutbox, MessageIdTracker, message_id_of


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (b"Message-ID: <1@x.example>\r\n", "<1@x.example>"),
        (b"Subject: x\r\nmessage-id:<1@x.example> \r\nTo: y\r\n", "<1@x.example>"),
        (b"Message-ID:\r\n <1@x.example>\r\n", "<1@x.example>"),
        (b"Message-Id: <1@x.example>\nTo: y\n", "<1@x.example>"),
        (b"X-Message-ID: <1@x.example>\r\n", ""),
        (b"Message-ID:\r\nTo: y\r\n", ""),
        (b"", ""),
    ],
)
def test_a_message_id_is_found_in_a_header(header: bytes, found: str) -> None:
    assert message_id_of(header) == found


def test_messages_without_a_sequence_tag_are_told_apart() -> None:
    ids = MessageIdTracker()
    for sender, number in (("a@x", 1), ("b@x", 2), ("a@x", 1), ("seq-run-1@x", 1), ("seq-run-1@x", 1)):
        ids.note(sender, b"Message-ID: <%d@x.example>\r\n" % number)
    ids.note("", b"Subject: none\r\n")
    assert (ids.distinct, ids.duplicates, ids.missing_id, ids.further) == (2, 1, 1, 0)
    assert ids.examples == ["<1@x.example>"]
    ids.reset()
    assert (ids.distinct, ids.duplicates, ids.missing_id, ids.examples) == (0, 0, 0, [])


def test_the_table_of_message_ids_is_bounded() -> None:
    ids = MessageIdTracker(max_ids=10)
    for number in [*range(15), 3, 12]:
        ids.note("a@x", b"Message-ID: <%d@x.example>\r\n" % number)
    assert (ids.distinct, ids.duplicates, ids.further) == (10, 1, 6)


def test_message_ids_of_several_workers_are_counted_together() -> None:
    ids, outbox = MessageIdTracker(), MessageIdOutbox(max_ids=3)
    for number in (1, 2):
        outbox.note("a@x", b"Message-ID: <%d@x.example>\r\n" % number)
    outbox.note("a@x", b"")
    outbox.note("a@x", b"Message-ID: <3@x.example>\r\n")
    assert outbox.take() == (["<1@x.example>", "<2@x.example>", ""], 1)
    assert outbox.take() == ([], 0)
    for each in ("<1@x.example>", "<1@x.example>", "<2@x.example>", ""):
        ids.add(each)
    assert (ids.distinct, ids.duplicates, ids.missing_id) == (2, 1, 1)
