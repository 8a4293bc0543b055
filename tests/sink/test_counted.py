"""What the receipts have of replies that go out wrong, and of the messages they are for: what the client could know."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, get_args

import pytest
import trio

from penstock.metrics._session import GARBLED, Metrics
from penstock.sink.corrupt import complete_replies
from penstock.sink.plan import Corruption
from penstock.sink.report import MessageCounts
from tests.sink.playing import EHLO, MAIL, RCPT, Talk, talking
from tests.sink.test_statistics import receipts


def rule(phase: str, does: str) -> str:
    return f'[[rule]]\nname = "it"\nphase = "{phase}"\n{does}\n'


def replies(metrics: Metrics, phase: str) -> dict[str, int]:
    """Return what went out in a phase: "250 2.0.0", "0 None garbage"."""
    return {
        f"{code} {status}{f' {garbled}' if garbled else ''}": count
        for name, code, status, garbled, count in metrics.counted()
        if name == phase
    }


def messages(metrics: Metrics) -> MessageCounts:
    return receipts(metrics)[0].report().messages


def fates(metrics: Metrics) -> tuple[int, int, int, int]:
    """Return what became of the messages: accepted, unheard, refused, lost."""
    made = messages(metrics)
    return made.accepted, made.unheard, made.refused, made.lost


@asynccontextmanager
async def counted(folder: Path, plan: str, **settings: Any) -> AsyncIterator[tuple[Talk, Metrics]]:
    metrics = Metrics()
    async with talking(folder, plan, metrics=metrics, **settings) as talk:
        yield talk, metrics


async def send(talk: Talk, hello: str = EHLO) -> None:
    """Send a message, and wait until the sink has answered it or ended."""
    for line in (hello, MAIL, RCPT, "DATA"):
        await talk.ask(line)
    await talk.send("Hello", ".")
    await trio.testing.wait_all_tasks_blocked()


def test_every_dress_has_a_kind_of_its_own_in_the_tally() -> None:
    assert set(get_args(Corruption)) | {"none"} == set(GARBLED)


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
    assert complete_replies(said) == can_be_read


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
    async with counted(tmp_path, rule("dot", f'dress = "{how}"')) as (talk, metrics):
        await send(talk)
        assert replies(metrics, "message") == {reply: 1}
        assert fates(metrics) == ((1, 0, 0, 0) if is_heard else (0, 1, 0, 0))
        assert (messages(metrics).recipients, metrics.sequences.unmarked) == (1, 1)
        assert metrics.latency("message").count == 1


@pytest.mark.parametrize("end", ["drop", "half-close", "stall"])
async def test_an_end_in_the_place_of_a_reply_to_a_message_that_is_kept(tmp_path: Path, end: str) -> None:
    async with counted(tmp_path, rule("dot", f'end = "{end}"\nkeeps = true')) as (talk, metrics):
        await send(talk)
        assert replies(metrics, "message") == {"0 None none": 1}
        assert fates(metrics) == (0, 1, 0, 0)
        assert metrics.latency("message").count == 0


async def test_a_reset_behind_the_dot_of_a_message_that_is_not_kept_loses_it(tmp_path: Path) -> None:
    async with counted(tmp_path, rule("dot", 'end = "reset"'), tcp=True) as (talk, metrics):
        for line in (EHLO, MAIL, RCPT, "DATA"):
            await talk.ask(line)
        with pytest.raises(trio.BrokenResourceError):
            await talk.end()
        await trio.testing.wait_all_tasks_blocked()
        assert replies(metrics, "message") == {"0 None none": 1}
        assert fates(metrics) == (0, 0, 0, 1)
        assert list(metrics.lost) == ["connection lost: a fault: reset"]


async def test_a_refusal_of_a_message_that_is_kept_leaves_its_client_in_the_dark(tmp_path: Path) -> None:
    async with counted(tmp_path, rule("dot", 'reply = "451 4.3.0 Later"\nkeeps = true')) as (talk, metrics):
        await send(talk)
        assert replies(metrics, "message") == {"451 4.3.0": 1}
        assert fates(metrics) == (0, 1, 0, 0)


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
    async with counted(tmp_path, rule("dot", f'reply = "451 4.3.0 Later"\n{does}')) as (talk, metrics):
        await send(talk)
        assert replies(metrics, "message") == {reply: 1}
        assert fates(metrics) == (0, 0, 1, 0)


@pytest.mark.parametrize(("reply", "is_heard"), [("250 2.0.0 Fine", True), ("354 More", False)])
async def test_another_reply_counts_in_the_place_of_the_ordinary_one(
    tmp_path: Path, reply: str, is_heard: bool
) -> None:
    async with counted(tmp_path, rule("dot", f'reply = "{reply}"\nend = "drop"')) as (talk, metrics):
        await send(talk)
        assert list(replies(metrics, "message")) == ["250 2.0.0" if is_heard else "354 None"]
        assert fates(metrics) == ((1, 0, 0, 0) if is_heard else (0, 1, 0, 0))


async def test_a_dressed_message_in_lmtp_is_accepted_when_one_recipient_heard_so(tmp_path: Path) -> None:
    plan = rule("dot", 'dress = "unfinished"\nmatch.attempts = 1')
    async with counted(tmp_path, plan, settings={"kind": "lmtp"}) as (talk, metrics):
        await talk.ask("LHLO client", MAIL, RCPT, "RCPT TO:<c@example.org>", "DATA")
        await talk.send("Hello", ".")
        await trio.testing.wait_all_tasks_blocked()
        assert replies(metrics, "message") == {"250 2.0.0": 1, "0 None unfinished": 1}
        assert fates(metrics) == (1, 0, 0, 0)


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
    async with counted(tmp_path, rule(phase, does)) as (talk, metrics):
        *before, last = COMMANDS[phase]
        for line in before:
            await talk.ask(line)
        await talk.send(last)
        await talk.line()
        made = replies(metrics, last.split(" ")[0])
        assert list(made.values()) == [1]
        assert (reply or "2") in next(iter(made))
        assert metrics.replies == len(before) + 1 + (not made.get("0 None none"))  # the greeting among them
        assert metrics.latency(last.split(" ")[0]).count == (not made.get("0 None none"))


async def test_octets_are_those_that_went_out(tmp_path: Path) -> None:
    plan = rule("noop", 'dress = "too-long"') + rule("quit", 'reply = "221 2.0.0 Bye!"').replace('"it"', '"that"')
    async with counted(tmp_path, plan) as (talk, metrics):
        before = metrics.sent
        await talk.ask("NOOP")
        assert metrics.sent == before + 2000
        await talk.ask("QUIT")
        assert metrics.sent == before + 2000 + len(b"221 2.0.0 Bye!\r\n")


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
    async with counted(tmp_path, plan, greeted=False) as (_, metrics):
        await trio.testing.wait_all_tasks_blocked()
        assert replies(metrics, "banner") == {reply: 1}
        assert replies(metrics, "unasked") == {}


async def test_what_ends_a_body_answers_nothing(tmp_path: Path) -> None:
    async with counted(tmp_path, rule("body", 'end = "drop"')) as (talk, metrics):
        await talk.begin()
        await talk.send("DATA")
        assert (await talk.reply()).startswith("354")
        assert await talk.reply() == ""
        assert [phase for phase, _, _, garbled, _ in metrics.counted() if garbled] == []
        assert fates(metrics) == (0, 0, 0, 1)


async def test_ordinary_replies_behind_a_garbled_one_are_counted_as_before(tmp_path: Path) -> None:
    async with counted(tmp_path, rule("mail", 'dress = "bare-lf"\nmatch.first = 1')) as (talk, metrics):
        for _ in range(2):
            await send(talk)
        assert replies(metrics, "MAIL") == {"250 2.1.0": 1, "250 2.1.0 bare-lf": 1}
        assert fates(metrics) == (2, 0, 0, 0)


async def test_counters_that_start_over_amid_a_fault_stay_right(tmp_path: Path, autojump_clock: object) -> None:
    async with counted(tmp_path, rule("quit", "delay = { seconds = 3 }")) as (talk, metrics):
        await talk.send("QUIT")
        await trio.testing.wait_all_tasks_blocked()
        metrics.reset()
        assert (await talk.reply()).startswith("221")
        assert replies(metrics, "QUIT") == {"221 2.0.0": 1}
        assert metrics.replies == 1


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
    async with counted(tmp_path, rule(phase, f"{does}delay.seconds = 0.02"), tcp=tcp, greeted=False) as (talk, metrics):
        await talk.reply()
        with suppress(trio.BrokenResourceError):
            for line in (EHLO, MAIL, RCPT, "DATA", "Hello\r\n.", "RSET", "NOOP", "VRFY x", "QUIT"):
                await talk.ask(line)
    latency = metrics.latency(DELAYED[phase])
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
    async with counted(tmp_path, "", settings=STRICT) as (talk, metrics):
        await talk.begin()
        for line in lines:
            await talk.ask(line)
        assert fates(metrics) == (0, 0, 1, 0)


async def test_a_text_that_breaks_a_rule_and_does_not_end_is_lost(tmp_path: Path) -> None:
    async with counted(tmp_path, "", settings=STRICT) as (talk, metrics):
        await talk.begin()
        await talk.ask("DATA")
        await talk.send("bare\nlf")
        await talk.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert fates(metrics) == (0, 0, 0, 1)


async def test_a_text_that_its_client_gives_up_is_lost(tmp_path: Path) -> None:
    async with counted(tmp_path, "") as (talk, metrics):
        await talk.begin()
        await talk.ask("BDAT 5\r\nabc")
        await talk.ask("RSET")
        assert fates(metrics) == (0, 0, 0, 1)


@pytest.mark.parametrize(("reply", "refused"), [("450 4.2.1 Busy", 1), ("421 4.3.2 Later", 1), ("250 2.0.0 Fine", 0)])
async def test_a_reply_in_the_midst_of_a_text_refuses_it(tmp_path: Path, reply: str, refused: int) -> None:
    async with counted(tmp_path, rule("body", f'reply = "{reply}"')) as (talk, metrics):
        await talk.begin()
        await talk.ask("DATA")
        assert await talk.reply() == reply
        await trio.testing.wait_all_tasks_blocked()
        assert fates(metrics) == (0, 0, refused, 1 - refused)


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
    async with counted(tmp_path, rule("body", f"at = {at}\ndelay.seconds = 0.02")) as (talk, metrics):
        await talk.begin()
        for line in lines:
            await talk.ask(line)
        assert max(metrics.latency(each).max for each in (phase, "text", "message")) >= 20e6


async def test_a_client_that_just_leaves_is_told_from_one_that_is_sent_away(tmp_path: Path) -> None:
    async with counted(tmp_path, "") as (talk, metrics):
        await talk.ask(EHLO)
        await talk.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert metrics.ends == {"the client closed the connection": 1}
