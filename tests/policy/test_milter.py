"""The milter client against a filter that does what the tests tell it."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest
import trio

from penstock.message import NO_PARAMETERS, Message, Recipient
from penstock.policy import filters
from penstock.policy.evidence import evidence_of
from penstock.policy.milter import MilterCheck
from penstock.policy.milterwire import Reader, packet
from penstock.policy.settings import MilterSettings
from penstock.reply import CHECK_FAILED, Reply
from penstock.transaction import Transaction
from tests.policy.fakemilter import FakeMilter, answer
from tests.policy.judging import (
    HEADER,
    PREFIX,
    TEXT,
    count_in,
    counted,
    judge,
    judge_with,
    make_message,
    make_transaction,
    octets_of,
    path_of,
)

NO_REPLIES = 0xFF080
"""All NR steps, as rspamd asks for them."""
OWN, _, RECEIVED = PREFIX.partition(b"\r\n")
OWN += b"\r\n"


def check_for(milter: FakeMilter, mode: str = "enforce", *, can_hold: bool = True, **settings: object) -> MilterCheck:
    wanted = msgspec.convert({"address": milter.address, **settings}, MilterSettings)
    return MilterCheck(wanted, "monitor" if mode == "monitor" else "enforce", "mx.example.org", can_hold=can_hold)


async def asked(
    milter: FakeMilter, transaction: Transaction | None = None, message: Message | None = None
) -> tuple[Reply | None, Message]:
    async with milter.serving():
        return await judge(check_for(milter), transaction, message)


def indexed(code: bytes, index: int, name: bytes, value: bytes) -> bytes:
    return answer(code, struct.pack("!I", index), name, b"\0", value, b"\0")


async def changed(
    *changes: bytes, decision: bytes = b"a", body: bytes = HEADER + b"\r\n" + TEXT, prefix: bytes = PREFIX
) -> Message:
    milter = FakeMilter(NO_REPLIES, {b"E": b"".join(changes) + answer(decision)})
    transaction = make_transaction()
    reply, message = await asked(milter, transaction, make_message(transaction, body, prefix=prefix))
    assert reply is None
    return message


class Client:
    """A client whose messages a filter is asked about as their envelopes arrive."""

    def __init__(self, check: MilterCheck) -> None:
        self.check = check
        self.judge, self.journal = judge_with(check, check.mode)
        self.transaction = make_transaction()
        self.transaction.recipients = []

    async def mail(self, sender: str = "alice@example.com") -> Reply | None:
        self.transaction.recipients = []
        self.transaction.sender = path_of(sender)
        return await self.judge.on_mail(self.transaction, path_of(sender), NO_PARAMETERS)

    async def rcpt(self, *addresses: str) -> list[int]:
        """Name recipients; return the codes of the replies."""
        codes = []
        for address in addresses:
            refusal = await self.judge.on_rcpt(self.transaction, Recipient(path_of(address)))
            codes.append(250 if refusal is None else refusal.code)
            if refusal is None:
                self.transaction.recipients.append(Recipient(path_of(address)))
        return codes

    async def message(self) -> Reply | None:
        return (await self.judge.on_message(self.transaction, make_message(self.transaction)))[0]


@asynccontextmanager
async def connected(milter: FakeMilter, mode: str = "enforce") -> AsyncIterator[Client]:
    """Serve, and wait until the check knows what the filter replies to."""
    async with milter.serving(), trio.open_nursery() as nursery:
        client = Client(check_for(milter, mode))
        await nursery.start(client.check.run)
        while not milter.probes:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked(0.01)
        milter.seen.clear()
        yield client
        client.judge.close(client.transaction, evidence_of(client.transaction))
        nursery.cancel_scope.cancel()


async def test_a_filter_refuses_one_recipient_of_two() -> None:
    milter = FakeMilter(answers={b"R<bob@example.org>\0": answer(b"y", b"550 5.1.1 no bob\0")}, keeps=False)
    async with connected(milter) as client:
        for _ in range(2):
            assert await client.mail() is None
            assert await client.rcpt("bob@example.org", "carol@example.org") == [550, 250]
            assert await client.message() is None
    commands = re.sub(rb"[LB]+", b"-", milter.commands())
    assert commands == b"OCHMRRT-N-E" + b"MRRT-N-E", "one connection, and nothing is sent twice"


@pytest.mark.parametrize("step", [b"C", b"H", b"M"])
async def test_a_filter_refuses_a_client_or_a_sender_at_mail(step: bytes) -> None:
    async with connected(FakeMilter(answers={step: answer(b"r")}, keeps=False)) as client:
        for _ in range(2):
            refusal = await client.mail()
            assert refusal is not None
            assert (refusal.code, refusal.status) == (550, "5.7.1")


async def test_an_envelope_that_was_given_up_is_aborted() -> None:
    milter = FakeMilter(keeps=False)
    async with connected(milter) as client:
        await client.mail()
        await client.rcpt("bob@example.org")
        await client.mail("carol@example.com")
        await client.rcpt("bob@example.org")
        assert await client.message() is None
    assert milter.commands().startswith(b"OCHMRAMRT")


@pytest.mark.parametrize("code", [b"a", b"d"])
async def test_what_a_filter_accepts_or_discards_at_rcpt_is_told_no_more(code: bytes) -> None:
    milter = FakeMilter(answers={b"R": answer(code)}, keeps=False)
    async with connected(milter) as client:
        await client.mail()
        assert await client.rcpt("bob@example.org", "carol@example.org") == [250, 250]
        assert await client.message() is None
        assert client.transaction.quarantine == ("hold" if code == b"d" else "")
    assert milter.commands() == b"OCHMRA"


async def test_other_recipients_than_those_told_are_told_again() -> None:
    milter = FakeMilter(keeps=False)
    async with connected(milter) as client:
        await client.mail()
        await client.rcpt("bob@example.org", "carol@example.org")
        del client.transaction.recipients[0]  # another check has refused it
        assert await client.message() is None
    recipients = [each for each in milter.seen if each[:1] == b"R"]
    assert recipients == [b"R<bob@example.org>\0", b"R<carol@example.org>\0", b"R<carol@example.org>\0"]


@pytest.mark.parametrize("breaks", ["close", "cut", "nonsense", "hang"])
@pytest.mark.parametrize("step", [b"M", b"R", b"T"])
async def test_a_step_that_fails_decides_nothing(
    step: bytes, breaks: str, autojump_clock: trio.testing.MockClock
) -> None:
    milter = FakeMilter(keeps=False)
    async with connected(milter) as client:
        milter.break_at, milter.breaks = step, breaks
        assert await client.mail() is None
        assert await client.rcpt("bob@example.org") == [250]
        if step != b"T":
            milter.break_at = b""
            assert await client.message() is None, "it is asked about all of it at the end"
        else:
            refusal = await client.message()
            assert refusal is not None
            assert refusal.code == 451


async def test_a_filter_that_hangs_at_the_text_is_not_asked_again(autojump_clock: trio.testing.MockClock) -> None:
    milter = FakeMilter(keeps=False)
    async with connected(milter) as client:
        await client.mail()
        await client.rcpt("bob@example.org")
        milter.break_at, milter.breaks = b"T", "hang"
        asked, start = milter.connections, trio.current_time()
        refusal = await client.message()
        assert refusal is not None
        assert refusal.code == 451
        assert trio.current_time() - start <= client.check._deadline + 0.1
        assert milter.connections == asked


@pytest.mark.parametrize("step", [b"M", b"R"])
async def test_steps_that_hang_again_and_again_cost_no_time(
    step: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    milter = FakeMilter(keeps=False)
    async with connected(milter) as client:
        milter.break_at, milter.breaks = step, "hang"
        for _ in range(5):
            assert await client.mail() is None
            assert await client.rcpt("bob@example.org") == [250]
        start = trio.current_time()
        for _ in range(20):
            assert await client.mail() is None
            assert await client.rcpt("bob@example.org") == [250]
        assert trio.current_time() == start
        milter.break_at = b""
        await trio.sleep(31)
        assert await client.mail() is None
        assert await client.rcpt("bob@example.org") == [250]
        assert await client.message() is None


async def test_connections_of_clients_that_come_together_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(filters, "_MOST_LENT", 3)
    milter = FakeMilter(keeps=False)
    async with connected(milter) as first:
        others = [Client(first.check) for _ in range(10)]
        before = milter.connections
        async with trio.open_nursery() as nursery:
            for each in others:
                nursery.start_soon(each.mail)
        assert milter.connections - before == 3
        for each in others:
            each.judge.close(each.transaction, evidence_of(each.transaction))
        await first.mail()
        assert milter.connections - before == 4, "those that were given back can be lent again"


async def test_a_connection_that_cannot_be_opened_is_not_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "_MOST_LENT", 1)
    milter = FakeMilter(keeps=False)
    async with connected(milter) as client:
        milter.break_at, milter.breaks = b"C", "close"
        assert await client.mail() is None
        milter.break_at = b""
        milter.seen.clear()
        assert await client.mail() is None
        assert milter.commands() == b"OCHM"


async def test_in_monitor_mode_a_filter_is_asked_at_the_end() -> None:
    milter = FakeMilter(answers={b"R": answer(b"r")}, keeps=False)
    async with connected(milter, "monitor") as client:
        await client.mail()
        assert await client.rcpt("bob@example.org") == [250]
        assert milter.seen == []
        assert await client.message() is None


# ---- what a filter sees


@pytest.mark.parametrize("piece", [1, 7, 65_536])
@pytest.mark.parametrize("steps", [0, NO_REPLIES], ids=["all replies", "no replies"])
async def test_a_filter_sees_the_whole_message(steps: int, piece: int) -> None:
    milter = FakeMilter(steps)
    transaction = make_transaction("alice@example.com", "bob@example.org", "carol@example.org")
    reply, message = await asked(milter, transaction, make_message(transaction, piece=piece))
    assert reply is None
    assert octets_of(message) == PREFIX + HEADER + b"\r\n" + TEXT
    assert re.sub(b"B+", b"B", milter.commands()).removesuffix(b"K") == b"OCHMRRTLLLLLLNBE"
    seen = [each for each in milter.seen if each[:1] != b"D"]
    assert seen[1] == b"C[198.51.100.1]\x004" + struct.pack("!H", 40_000) + b"198.51.100.1\0"
    assert seen[2] == b"Hclient.example\0"
    assert seen[3] == b"M<alice@example.com>\0"
    assert seen[4:6] == [b"R<bob@example.org>\0", b"R<carol@example.org>\0"]
    assert seen[7] == b"LAuthentication-Results\0mx.example.org; spf=none\0", "but not our Received field"
    assert seen[10] == b"LSubject\0a\n folded one\0"
    assert b"".join(each[1:] for each in seen if each[:1] == b"B") == TEXT
    macros = b"".join(each for each in milter.seen if each[:1] == b"D")
    for macro in (b"DCj\0mx.example.org\0", b"DH{tls_version}\0TLSv1.3\0", b"DMi\x001M8KRQ663CFG00000045\0"):
        assert macro in macros


async def test_a_filter_does_not_see_what_it_does_not_want() -> None:
    milter = FakeMilter(0x1F | 0x20 | 0x40 | 0x200)
    await asked(milter)
    assert milter.commands().removesuffix(b"K") == b"OE"


async def test_leading_blanks_are_kept_for_filters_that_ask() -> None:
    milter = FakeMilter(NO_REPLIES | 0x100000, {b"E": answer(b"h", b"X-New\0 kept\0") + answer(b"c")})
    _, message = await asked(milter)
    assert b"LTo\0 bob@example.org\0" in milter.seen
    assert octets_of(message) == PREFIX + HEADER + b"X-New: kept\r\n\r\n" + TEXT


async def test_a_filter_that_has_seen_enough_of_the_body_is_sent_no_more() -> None:
    milter = FakeMilter(0x400, {b"B": answer(b"s")})
    transaction = make_transaction()
    await asked(milter, transaction, make_message(transaction, HEADER + b"\r\n" + TEXT * 10_000))
    assert milter.commands().count(b"B") == 1


@pytest.mark.parametrize("keeps", [True, False])
async def test_connections_are_kept_if_the_filter_can(keeps: bool) -> None:
    milter = FakeMilter(NO_REPLIES, {b"E": answer(b"r")}, keeps=keeps)
    async with milter.serving(), trio.open_nursery() as nursery:
        check = check_for(milter)
        await nursery.start(check.run)
        while not milter.probes:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked(0.01)
        milter.seen.clear()
        for _ in range(5):
            reply, _ = await judge(check)
            assert reply is not None
            assert reply.code == 550
        assert milter.commands().count(b"O") == (1 if keeps else 5)
        nursery.cancel_scope.cancel()


async def test_progress_of_a_filter_does_not_say_that_it_keeps_connections() -> None:
    milter = FakeMilter(NO_REPLIES, {b"C": answer(b"p") + answer(b"c")}, keeps=False)
    async with milter.serving():
        check = check_for(milter)
        (address,) = check._pool.addresses
        assert await check._keeps_connections(address) is False


async def test_a_filter_that_comes_later_is_found_out_then(autojump_clock: trio.testing.MockClock) -> None:
    milter = FakeMilter(NO_REPLIES)
    async with milter.serving(), trio.open_nursery() as nursery:
        milter.break_at, milter.breaks = b"O", "hang"
        check = check_for(milter)
        await nursery.start(check.run)
        await trio.sleep(5)
        milter.break_at = b""
        for _ in range(2):
            assert (await judge(check))[0] is None
            await trio.sleep(5)
        assert milter.probes == 1
        nursery.cancel_scope.cancel()


async def test_a_kept_connection_that_was_closed_is_replaced() -> None:
    milter = FakeMilter(NO_REPLIES)
    async with milter.serving() as address:
        check = check_for(milter)
        check._pool.reusable.update(check._pool.addresses)
        assert (await judge(check))[0] is None
        milter.keeps = False
        assert (await judge(check))[0] is None
        assert address
    assert milter.connections == 2


# ---- what a filter decides


@pytest.mark.parametrize("step", [b"C", b"H", b"M", b"R", b"T", b"L", b"N", b"B", b"E"])
async def test_a_filter_may_decide_at_each_step(step: bytes) -> None:
    expected = {
        b"a": None,
        b"r": "550 5.7.1",
        b"t": "451 4.7.1",
        b"y550 5.7.9 No%% way\0": "550 5.7.9 No% way",
        b"y451-4.2.1 Come\r\n451 4.2.1 again\0": "451-4.2.1 Come",
        b"y421 Bye\0": "421 4.7.1 Bye",
    }
    for decision, text in expected.items():
        milter = FakeMilter(0, {step: answer(b"p") + answer(decision)})
        reply, message = await asked(milter)
        assert octets_of(message) == PREFIX + HEADER + b"\r\n" + TEXT
        assert (reply is None) == (text is None)
        assert reply is None or reply.encoded.decode().startswith(text or "")
        assert reply is None or reply.closes == (reply.code == 421)


@pytest.mark.parametrize("step", [b"R", b"E"])
async def test_discarded_and_quarantined_mail_is_held(step: bytes) -> None:
    for decision in (answer(b"d"), answer(b"q", b"a virus\0") + answer(b"c") if step == b"E" else answer(b"d")):
        transaction = make_transaction()
        reply, message = await asked(FakeMilter(0, {step: decision}), transaction)
        assert reply is None
        assert transaction.quarantine == "hold"
        assert octets_of(message) == PREFIX + HEADER + b"\r\n" + TEXT


async def test_mail_that_cannot_be_held_is_refused() -> None:
    milter = FakeMilter(0, {b"E": answer(b"d")})
    async with milter.serving():
        reply, _ = await judge(check_for(milter, can_hold=False))
        assert reply is not None
        assert reply.code == 550


async def test_mail_without_recipients_is_held_as_it_came() -> None:
    milter = FakeMilter(0, {b"E": answer(b"-", b"<bob@example.org>\0") + answer(b"h", b"X\0y\0") + answer(b"c")})
    transaction = make_transaction()
    reply, message = await asked(milter, transaction)
    assert reply is None
    assert transaction.quarantine == "hold"
    assert [str(each) for each in message.envelope.recipients] == ["bob@example.org"]
    assert octets_of(message) == PREFIX + HEADER + b"\r\n" + TEXT


# ---- what a filter changes


async def test_fields_are_added_inserted_changed_and_deleted() -> None:
    message = await changed(
        answer(b"h", b"X-Added\0at the end\0"),
        indexed(b"i", 0, b"X-Top", b"a\nb\n c\n"),
        indexed(b"i", 1, b"DKIM-Signature", b"v=1"),
        indexed(b"i", 4, b"X-After-From", b"x"),
        indexed(b"m", 2, b"x-old", b"changed"),
        indexed(b"m", 1, b"X-OLD", b""),
        indexed(b"m", 1, b"To", b"somebody@else.example"),
        indexed(b"m", 7, b"X-Absent", b"added"),
        indexed(b"m", 7, b"X-Absent-Too", b""),
    )
    assert octets_of(message) == (
        OWN + b"DKIM-Signature: v=1\r\nX-Top: a\r\n\tb\r\n c\r\n" + RECEIVED
        + b"From: Alice <alice@example.com>\r\nX-After-From: x\r\nTo: somebody@else.example\r\n"
        b"Subject: a\r\n folded one\r\nx-old: changed\r\nX-Added: at the end\r\nX-Absent: added\r\n\r\n" + TEXT
    )  # fmt: skip


async def test_changes_of_a_filter_apply_to_its_earlier_ones() -> None:
    message = await changed(
        indexed(b"m", 1, b"X-Old", b""),
        indexed(b"m", 1, b"X-Old", b""),
        answer(b"h", b"X-Old\0three\0"),
        indexed(b"m", 1, b"X-Old", b"four"),
        indexed(b"i", 1, b"X-Gone", b"x"),
        indexed(b"m", 1, b"X-Gone", b""),
    )
    assert octets_of(message).count(b"X-Old: four\r\n\r\n") == 1
    assert octets_of(message).lower().count(b"x-old") == 1
    assert b"X-Gone" not in octets_of(message)


async def test_our_own_authentication_results_stay() -> None:
    message = await changed(
        indexed(b"m", 1, b"Authentication-Results", b""), indexed(b"i", 0, b"Authentication-Results", b"other; x=y")
    )
    assert octets_of(message).startswith(OWN + b"Authentication-Results: other; x=y\r\n" + RECEIVED)


async def test_the_body_is_replaced() -> None:
    message = await changed(answer(b"b", b"new "), answer(b"b", b"text\r\n"), answer(b"h", b"X\0y\0"))
    assert octets_of(message) == PREFIX + HEADER + b"X: y\r\n\r\nnew text\r\n"


@pytest.mark.parametrize(
    ("body", "prefix", "expected"),
    [
        (b"\r\ntext\r\n", PREFIX, PREFIX + b"X: y\r\n\r\nnew"),
        (b"no header\r\n", PREFIX + b"\r\n", PREFIX + b"X: y\r\n\r\nnew"),
        (b"", PREFIX, PREFIX + b"X: y\r\n\r\nnew"),
        (b"Subject: x\r\n", PREFIX, PREFIX + b"Subject: x\r\nX: y\r\n\r\nnew"),
    ],
    ids=["empty header", "no header", "nothing", "no body"],
)
async def test_odd_messages_can_be_changed(body: bytes, prefix: bytes, expected: bytes) -> None:
    message = await changed(answer(b"h", b"X\0y\0"), answer(b"b", b"new"), body=body, prefix=prefix)
    assert octets_of(message) == expected


async def test_sender_and_recipients_are_changed() -> None:
    message = await changed(
        answer(b"e", b"<new@sender.example>\0SIZE=1\0"),
        answer(b"+", b"<carol@example.org>\0"),
        answer(b"2", b"<dave@example.org>\0NOTIFY=NEVER\0"),
        answer(b"+", b"carol@example.org\0"),
        answer(b"-", b"<bob@example.org>\0"),
    )
    assert message.envelope.sender.text == "new@sender.example"
    assert [str(each) for each in message.envelope.recipients] == ["carol@example.org", "dave@example.org"]
    assert (await changed(answer(b"e", b"<>\0"))).envelope.sender.text == ""


async def test_nothing_is_changed_in_monitor_mode() -> None:
    milter = FakeMilter(0, {b"E": answer(b"h", b"X\0y\0") + answer(b"-", b"<bob@example.org>\0") + answer(b"r")})
    async with milter.serving():
        check = check_for(milter, "monitor")
        transaction = make_transaction()
        asking, journal = judge_with(check, "monitor")
        counters = count_in(journal)
        reply, message = await asking.on_message(transaction, make_message(transaction))
    assert reply is None
    assert transaction.quarantine == ""
    assert octets_of(message) == PREFIX + HEADER + b"\r\n" + TEXT
    assert len(message.envelope.recipients) == 1
    assert counted(counters, "policy_would_total") == {f'{{check="{check.name}",verdict="reject"}}': 1}
    assert b'"monitored"' in journal.drain()


async def test_what_would_be_done_is_journaled_in_monitor_mode() -> None:
    for changes, text in (
        (answer(b"h", b"X\0y\0") + answer(b"c"), b"would be changed"),
        (answer(b"d"), b"would be quarantined"),
    ):
        milter = FakeMilter(0, {b"E": changes})
        async with milter.serving():
            asking, journal = judge_with(check_for(milter, "monitor"), "monitor")
            transaction = make_transaction()
            await asking.on_message(transaction, make_message(transaction))
            assert text in journal.drain()
            assert transaction.quarantine == ""


# ---- hostile filters

STEPS = [b"O", b"C", b"H", b"M", b"R", b"T", b"L", b"N", b"B", b"E"]


@pytest.mark.parametrize("size", [1, 64])
def test_progress_of_a_filter_is_no_answer(size: int) -> None:
    reader, octets = Reader(), packet(b"p") + packet(b"c") + packet(b"p")
    for at in range(0, len(octets), size):
        reader.feed(octets[at : at + size])
    assert reader.next() == (b"c", b"")
    assert reader.is_empty


@pytest.mark.parametrize("breaks", ["close", "cut", "hang", "nonsense", "progress"])
async def test_a_filter_that_breaks_at_any_step_defers_mail(
    breaks: str, autojump_clock: trio.testing.MockClock
) -> None:
    for step in STEPS:
        milter = FakeMilter(0)
        milter.break_at, milter.breaks = step, breaks
        async with milter.serving():
            start = trio.current_time()
            check = check_for(milter, deadline=7)
            reply, message = await judge(check)
            assert reply == CHECK_FAILED, step
            assert octets_of(message) == PREFIX + HEADER + b"\r\n" + TEXT
            assert trio.current_time() - start <= 7.1
            accepting = check_for(milter, deadline=7, fail="accept")
            assert (await judge(accepting))[0] is None
            monitoring = check_for(milter, "monitor", deadline=7)
            assert (await judge(monitoring))[0] is None


@pytest.mark.parametrize(
    "packets",
    [
        answer(b"X"),
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
        answer(b"h", b"bad name\0x\0") + answer(b"c"),
        answer(b"i", b"\0") + answer(b"c"),
        answer(b"+", b"<@@>\0") + answer(b"c"),
        answer(b"y", b"250 fine\0"),
        answer(b"y", b"\xff\0"),
        answer(b"4"),
        answer(b"h", b"X\0y\0") * 10_002 + answer(b"c"),
        answer(b"b", bytes(1 << 20)) * 65 + answer(b"c"),
    ],
    ids=lambda packets: repr(packets[:12]),
)
async def test_packets_that_make_no_sense_defer_mail(packets: bytes) -> None:
    reply, message = await asked(FakeMilter(0, {b"E": packets}))
    assert reply == CHECK_FAILED
    assert octets_of(message) == PREFIX + HEADER + b"\r\n" + TEXT


class Flood(FakeMilter):
    """A filter that sends one packet again and again, faster than it can be read, from a thread of its own."""

    def __init__(self, packet: bytes) -> None:
        super().__init__(NO_REPLIES)
        self.packet = packet

    async def _answer(self, stream: trio.SocketStream, code: bytes, command: bytes) -> bool:
        if code != b"E":
            return await super()._answer(stream, code, command)
        await trio.to_thread.run_sync(self._send, stream.socket.detach())
        return False

    def _send(self, fd: int) -> None:
        with socket.socket(fileno=fd) as sock, suppress(OSError):  # until the other side closes
            sock.setblocking(True)
            while True:
                sock.sendall(self.packet * 10_000)


@pytest.mark.parametrize(
    "packet",
    [answer(b"p"), answer(b"q", b"x\0"), answer(b"e", b"<a@b.example>\0"), answer(b"-", b"<a@b.example>\0"),
     answer(b"b"), indexed(b"m", 1, b"X-Unknown", b"")],
    ids=lambda packet: repr(packet[4:5]),
)  # fmt: skip
async def test_a_filter_that_sends_without_end_misses_its_deadline(packet: bytes) -> None:
    milter = Flood(packet)
    async with milter.serving():
        reply, message = await judge(check_for(milter, deadline=0.3))
    assert reply == CHECK_FAILED
    assert octets_of(message) == PREFIX + HEADER + b"\r\n" + TEXT


async def test_a_filter_that_asks_for_unknown_steps_is_not_used() -> None:
    for steps in (0x800, 0x800000):
        assert (await asked(FakeMilter(steps)))[0] == CHECK_FAILED


async def test_the_next_address_is_tried_and_dead_ones_are_skipped() -> None:
    milter = FakeMilter(NO_REPLIES, {b"E": answer(b"r")})
    async with milter.serving():
        dead = FakeMilter(0)
        async with dead.serving():
            pass
        check = check_for(milter, address=[dead.address, milter.address])
        for _ in range(7):
            reply, _ = await judge(check)
            assert reply is not None
            assert reply.code == 550


async def test_a_dead_filter_costs_no_time_after_a_while(autojump_clock: trio.testing.MockClock) -> None:
    milter = FakeMilter(0)
    milter.break_at, milter.breaks = b"C", "hang"
    async with milter.serving():
        check = check_for(milter, deadline=10)
        for _ in range(5):
            assert (await judge(check))[0] == CHECK_FAILED
        start = trio.current_time()
        for _ in range(50):
            assert (await judge(check))[0] == CHECK_FAILED
        assert trio.current_time() == start
        milter.break_at = b""
        await trio.sleep(31)
        assert (await judge(check))[0] is None
