"""What the receipts have of replies that go out wrong, and of the messages they are for: what the client could know."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, get_args

import pytest
import trio

from penstock._tally import GARBLED, Tally
from penstock.assemble import Given, assemble
from penstock.config import parse
from penstock.journal import Journal, JournalSettings
from penstock.sink.connection import faulty
from penstock.sink.dress import readable
from penstock.sink.faults import FaultEngine
from penstock.sink.plan import Dress
from penstock.sink.report import MessageCounts
from tests.inbound.test_deferred import Later
from tests.parts import Replies
from tests.sink.playing import EHLO, MAIL, RCPT, Talk, talking
from tests.sink.test_receipts import receipts


def rule(phase: str, does: str) -> str:
    return f'[[rule]]\nname = "it"\nphase = "{phase}"\n{does}\n'


def replies(tally: Tally, phase: str) -> dict[str, int]:
    """Return what went out in a phase: "250 2.0.0", "0 None garbage"."""
    return {
        f"{code} {status}{f' {garbled}' if garbled else ''}": count
        for name, code, status, garbled, count in tally.counted()
        if name == phase
    }


def messages(tally: Tally) -> MessageCounts:
    return receipts(tally)[0].report().messages


def fates(tally: Tally) -> tuple[int, int, int, int]:
    """Return what became of the messages: accepted, unheard, refused, lost."""
    made = messages(tally)
    return made.accepted, made.unheard, made.refused, made.lost


@asynccontextmanager
async def counted(folder: Path, plan: str, **settings: Any) -> AsyncIterator[tuple[Talk, Tally]]:
    tally = Tally()
    async with talking(folder, plan, tally=tally, **settings) as talk:
        yield talk, tally


async def send(talk: Talk, hello: str = EHLO) -> None:
    """Send a message, and wait until the sink has answered it or ended."""
    for line in (hello, MAIL, RCPT, "DATA"):
        await talk.ask(line)
    await talk.send("Hello", ".")
    await trio.testing.wait_all_tasks_blocked()


def test_every_dress_has_a_kind_of_its_own_in_the_tally() -> None:
    assert set(get_args(Dress)) | {"none"} == set(GARBLED)


@pytest.mark.parametrize(
    ("said", "can_be_read"),
    [
        (b"250 Ok\r\n", [b"250 Ok\r\n"]),
        (b"250 Ok\n", [b"250 Ok\n"]),
        (b"250\r\n", [b"250\r\n"]),
        (b"250-a\r\n250 b\r\n450 c\r\n", [b"250-a\r\n250 b\r\n", b"450 c\r\n"]),
        (b"250 Ok", [b""]),
        (b"250-a\r\n", [b""]),
        (b"250 a\r\n250-b\r\n", [b"250 a\r\n", b""]),
        (b"650 a\r\n", [b""]),
        (b"\xff\n\x00", [b""]),
        (b"", []),
    ],
)
def test_what_can_be_read_is_a_whole_reply(said: bytes, can_be_read: list[bytes]) -> None:
    assert readable(said) == can_be_read


@pytest.mark.parametrize(
    ("how", "reply", "is_heard"),
    [
        ("too-long", "250 2.0.0 too-long", True),
        ("many-lines", "250 2.0.0 many-lines", True),
        ("non-ascii", "250 2.0.0 non-ascii", True),
        ("bare-lf", "250 2.0.0 bare-lf", True),
        ("wrong-code", "354 None wrong-code", False),
        ("unfinished", "0 None unfinished", False),
        ("no-line-end", "0 None no-line-end", False),
        ("garbage", "0 None garbage", False),
    ],
)
async def test_a_dressed_reply_to_a_message_is_counted_as_it_went_out(
    tmp_path: Path, how: str, reply: str, is_heard: bool
) -> None:
    async with counted(tmp_path, rule("dot", f'dress = "{how}"')) as (talk, tally):
        await send(talk)
        assert replies(tally, "message") == {reply: 1}
        assert fates(tally) == ((1, 0, 0, 0) if is_heard else (0, 1, 0, 0))
        assert (messages(tally).recipients, tally.sequences.unmarked) == (1, 1)
        assert tally.latency("message").count == 1


@pytest.mark.parametrize("end", ["drop", "half-close", "stall"])
async def test_an_end_in_the_place_of_a_reply_to_a_message_that_is_kept(tmp_path: Path, end: str) -> None:
    async with counted(tmp_path, rule("dot", f'end = "{end}"\nkeeps = true')) as (talk, tally):
        await send(talk)
        assert replies(tally, "message") == {"0 None none": 1}
        assert fates(tally) == (0, 1, 0, 0)
        assert tally.latency("message").count == 0


async def test_a_reset_behind_the_dot_of_a_message_that_is_not_kept_loses_it(tmp_path: Path) -> None:
    async with counted(tmp_path, rule("dot", 'end = "reset"'), tcp=True) as (talk, tally):
        for line in (EHLO, MAIL, RCPT, "DATA"):
            await talk.ask(line)
        with pytest.raises(trio.BrokenResourceError):
            await talk.end()
        await trio.testing.wait_all_tasks_blocked()
        assert replies(tally, "message") == {"0 None none": 1}
        assert fates(tally) == (0, 0, 0, 1)
        assert list(tally.lost) == ["connection lost: a fault: reset"]


async def test_a_refusal_of_a_message_that_is_kept_leaves_its_client_in_the_dark(tmp_path: Path) -> None:
    async with counted(tmp_path, rule("dot", 'reply = "451 4.3.0 Later"\nkeeps = true')) as (talk, tally):
        await send(talk)
        assert replies(tally, "message") == {"451 4.3.0": 1}
        assert fates(tally) == (0, 1, 0, 0)


@pytest.mark.parametrize(
    ("does", "reply"),
    [
        ("", "451 4.3.0"),
        ('dress = "garbage"', "0 None garbage"),
        ('dress = "wrong-code"', "250 None wrong-code"),
        ('end = "drop"', "451 4.3.0"),
    ],
)
async def test_a_refusal_is_one_whatever_went_out(tmp_path: Path, does: str, reply: str) -> None:
    async with counted(tmp_path, rule("dot", f'reply = "451 4.3.0 Later"\n{does}')) as (talk, tally):
        await send(talk)
        assert replies(tally, "message") == {reply: 1}
        assert fates(tally) == (0, 0, 1, 0)


@pytest.mark.parametrize(("reply", "is_heard"), [("250 2.0.0 Fine", True), ("354 More", False)])
async def test_another_reply_counts_in_the_place_of_the_ordinary_one(
    tmp_path: Path, reply: str, is_heard: bool
) -> None:
    async with counted(tmp_path, rule("dot", f'reply = "{reply}"\nend = "drop"')) as (talk, tally):
        await send(talk)
        assert list(replies(tally, "message")) == ["250 2.0.0" if is_heard else "354 None"]
        assert fates(tally) == ((1, 0, 0, 0) if is_heard else (0, 1, 0, 0))


async def test_a_dressed_message_in_lmtp_is_accepted_when_one_recipient_heard_so(tmp_path: Path) -> None:
    plan = rule("dot", 'dress = "unfinished"\nmatch.attempts = 1')
    async with counted(tmp_path, plan, settings={"kind": "lmtp"}) as (talk, tally):
        await talk.ask("LHLO client", MAIL, RCPT, "RCPT TO:<c@example.org>", "DATA")
        await talk.send("Hello", ".")
        await trio.testing.wait_all_tasks_blocked()
        assert replies(tally, "message") == {"250 2.0.0": 1, "0 None unfinished": 1}
        assert fates(tally) == (1, 0, 0, 0)


COMMANDS = {"ehlo": [EHLO], "mail": [EHLO, MAIL], "rcpt": [EHLO, MAIL, RCPT], "quit": [EHLO, "QUIT"], "noop": ["NOOP"]}


@pytest.mark.parametrize("phase", COMMANDS)
@pytest.mark.parametrize(
    ("does", "reply"),
    [
        ('dress = "garbage"', "0 None garbage"),
        ('end = "drop"', "0 None none"),
        ('reply = "450 4.2.1 Busy"', "450 4.2.1"),
        ("delay = { seconds = 3 }", ""),
    ],
)
async def test_each_command_has_one_reply_in_the_receipts(
    tmp_path: Path, autojump_clock: object, phase: str, does: str, reply: str
) -> None:
    async with counted(tmp_path, rule(phase, does)) as (talk, tally):
        *before, last = COMMANDS[phase]
        for line in before:
            await talk.ask(line)
        await talk.send(last)
        await talk.line()
        made = replies(tally, last.split(" ")[0])
        assert list(made.values()) == [1]
        assert (reply or "2") in next(iter(made))
        assert tally.replies == len(before) + 1 + (not made.get("0 None none"))  # the greeting among them
        assert tally.latency(last.split(" ")[0]).count == (not made.get("0 None none"))


async def test_octets_are_those_that_went_out(tmp_path: Path) -> None:
    plan = rule("noop", 'dress = "too-long"') + rule("quit", 'reply = "221 2.0.0 Bye!"').replace('"it"', '"that"')
    async with counted(tmp_path, plan) as (talk, tally):
        before = tally.sent
        await talk.ask("NOOP")
        assert tally.sent == before + 2000
        await talk.ask("QUIT")
        assert tally.sent == before + 2000 + len(b"221 2.0.0 Bye!\r\n")


@pytest.mark.parametrize(
    ("plan", "reply"),
    [
        (rule("connect", 'end = "drop"'), "0 None none"),
        (rule("banner", 'end = "drop"'), "0 None none"),
        (rule("banner", 'reply = "554 5.3.2 No"'), "554 5.3.2"),
        (rule("banner", 'reply = "220 Hello"'), "220 None"),
        (rule("banner", 'dress = "no-line-end"'), "0 None no-line-end"),
    ],
)
async def test_a_greeting_is_counted_as_it_went_out(tmp_path: Path, plan: str, reply: str) -> None:
    async with counted(tmp_path, plan, greeted=False) as (_, tally):
        await trio.testing.wait_all_tasks_blocked()
        assert replies(tally, "banner") == {reply: 1}
        assert replies(tally, "unasked") == {}


async def test_what_ends_a_body_answers_nothing(tmp_path: Path) -> None:
    async with counted(tmp_path, rule("body", 'end = "drop"')) as (talk, tally):
        await talk.begin()
        await talk.send("DATA")
        assert (await talk.reply()).startswith("354")
        assert await talk.reply() == ""
        assert [phase for phase, _, _, garbled, _ in tally.counted() if garbled] == []
        assert fates(tally) == (0, 0, 0, 1)


async def test_ordinary_replies_behind_a_garbled_one_are_counted_as_before(tmp_path: Path) -> None:
    async with counted(tmp_path, rule("mail", 'dress = "bare-lf"\nmatch.first = 1')) as (talk, tally):
        for _ in range(2):
            await send(talk)
        assert replies(tally, "MAIL") == {"250 2.1.0": 1, "250 2.1.0 bare-lf": 1}
        assert fates(tally) == (2, 0, 0, 0)


async def test_counters_that_start_over_amid_a_fault_stay_right(tmp_path: Path, autojump_clock: object) -> None:
    async with counted(tmp_path, rule("quit", "delay = { seconds = 3 }")) as (talk, tally):
        await talk.send("QUIT")
        await trio.testing.wait_all_tasks_blocked()
        tally.reset()
        assert (await talk.reply()).startswith("221")
        assert replies(tally, "QUIT") == {"221 2.0.0": 1}
        assert tally.replies == 1


async def test_a_message_that_is_settled_when_its_client_has_left_is_unheard(tmp_path: Path) -> None:
    tally, engine, delivery = Tally(), FaultEngine(), Later()
    listener = '[[listener]]\naddress = "127.0.0.1:0"\ntls.mode = "none"\n'
    settings = parse(f'data_dir = "{tmp_path}"\ndomains = ["example.org"]\n{listener}')
    given = Given(delivery=delivery, tally=tally)
    parts = assemble(settings, Journal(JournalSettings()), lambda _: None, given=given, kind=faulty(engine))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(parts.worker.run)
            async with await trio.open_tcp_stream("127.0.0.1", parts.doors[0].local_address[1]) as stream:
                said = Replies(stream)
                await stream.send_all(f"{EHLO}\r\n{MAIL}\r\n{RCPT}\r\nDATA\r\n".encode())
                for _ in range(5):
                    await said.next()
                await stream.send_all(b"Hello\r\n.\r\n")
                await delivery.came()
                (connection,) = engine.followers
                connection.abort()  # type: ignore[attr-defined]  # a follower of these tests is a connection
                delivery.settle()
            parts.worker.stop()
    assert fates(tally) == (0, 1, 0, 0)
    assert (tally.recipients, tally.text_octets, tally.sequences.unmarked) == (1, 7, 1)


DELAYED = {
    "connect": "banner", "banner": "banner", "ehlo": "EHLO", "mail": "MAIL", "rcpt": "RCPT", "data": "DATA",
    "dot": "message", "rset": "RSET", "noop": "NOOP", "vrfy": "VRFY", "quit": "QUIT",
}  # fmt: skip
"""Phases of a plan, and what receipts call them."""


@pytest.mark.parametrize(
    ("phase", "does"),
    [
        *((phase, "") for phase in DELAYED),
        *((phase, 'reply = "450 no"\n') for phase in DELAYED if phase != "connect"),
        *((phase, 'dress = "bare-lf"\n') for phase in DELAYED if phase != "connect"),
    ],
)
@pytest.mark.parametrize("tcp", [False, True])
async def test_a_delay_is_part_of_the_latency(tmp_path: Path, phase: str, does: str, tcp: bool) -> None:
    async with counted(tmp_path, rule(phase, f"{does}delay.seconds = 0.02"), tcp=tcp, greeted=False) as (talk, tally):
        await talk.reply()
        with suppress(trio.BrokenResourceError):
            for line in (EHLO, MAIL, RCPT, "DATA", "Hello\r\n.", "RSET", "NOOP", "VRFY x", "QUIT"):
                await talk.ask(line)
    latency = tally.latency(DELAYED[phase])
    assert latency.count > 0
    assert latency.min >= 20e6


STRICT = {"wire": {"bare_lf": "reject"}, "max_size": 1000}


@pytest.mark.parametrize(
    "lines",
    [
        ["DATA", "bare\nlf\r\n."],
        ["DATA", f"{'x' * 2000}\r\n."],
        ["BDAT 5 LAST\r\na\nb"],
        ["BDAT 5\r\na\nb"],
        ["BDAT 5\r\na\nb", "RSET"],
        ["BDAT 5\r\na\nb", "BDAT 2 LAST\r\n"],
    ],
)
async def test_a_text_that_breaks_a_rule_is_refused_once(tmp_path: Path, lines: list[str]) -> None:
    async with counted(tmp_path, "", settings=STRICT) as (talk, tally):
        await talk.begin()
        for line in lines:
            await talk.ask(line)
        assert fates(tally) == (0, 0, 1, 0)


async def test_a_text_that_breaks_a_rule_and_does_not_end_is_lost(tmp_path: Path) -> None:
    async with counted(tmp_path, "", settings=STRICT) as (talk, tally):
        await talk.begin()
        await talk.ask("DATA")
        await talk.send("bare\nlf")
        await talk.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert fates(tally) == (0, 0, 0, 1)


async def test_a_text_that_its_client_gives_up_is_lost(tmp_path: Path) -> None:
    async with counted(tmp_path, "") as (talk, tally):
        await talk.begin()
        await talk.ask("BDAT 5\r\nabc")
        await talk.ask("RSET")
        assert fates(tally) == (0, 0, 0, 1)


@pytest.mark.parametrize(("reply", "refused"), [("450 4.2.1 Busy", 1), ("421 4.3.2 Later", 1), ("250 2.0.0 Fine", 0)])
async def test_a_reply_in_the_midst_of_a_text_refuses_it(tmp_path: Path, reply: str, refused: int) -> None:
    async with counted(tmp_path, rule("body", f'reply = "{reply}"')) as (talk, tally):
        await talk.begin()
        await talk.ask("DATA")
        assert await talk.reply() == reply
        await trio.testing.wait_all_tasks_blocked()
        assert fates(tally) == (0, 0, refused, 1 - refused)


@pytest.mark.parametrize(
    ("lines", "phase"),
    [
        (["DATA", "Hello\r\n."], "text"),
        (["BDAT 7\r\nabcde"], "BDAT"),
        (["BDAT 7 LAST\r\nabcde"], "message"),
        (["BDAT 3\r\na", "BDAT 7\r\nabcde"], "BDAT"),
    ],
)
@pytest.mark.parametrize("at", [0, 5])
async def test_a_delay_in_a_text_is_part_of_its_latency(tmp_path: Path, lines: list[str], phase: str, at: int) -> None:
    async with counted(tmp_path, rule("body", f"at = {at}\ndelay.seconds = 0.02")) as (talk, tally):
        await talk.begin()
        for line in lines:
            await talk.ask(line)
        assert max(tally.latency(each).max for each in (phase, "text", "message")) >= 20e6


async def test_a_client_that_just_leaves_is_told_from_one_that_is_sent_away(tmp_path: Path) -> None:
    async with counted(tmp_path, "") as (talk, tally):
        await talk.ask(EHLO)
        await talk.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert tally.ends == {"the client closed the connection": 1}
