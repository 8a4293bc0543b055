"""What clients meet: each action of a rule, octet by octet."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from penstock.journal import Journal, JournalSettings
from penstock.sink.faults import AppliedFault, FaultEngine
from penstock.sink.pace import PacedStream
from penstock.sink.plan import parse_plan
from tests.sink.playing import EHLO, MAIL, RCPT, talking, took


def rule(phase: str, does: str) -> str:
    return f'[[rule]]\nname = "it"\nphase = "{phase}"\n{does}\n'


BUSY = 'reply = "450 4.2.1 Busy"'

# ---- replies

COMMANDS = {
    "ehlo": (EHLO,),
    "helo": ("HELO client.example",),
    "mail": (EHLO, MAIL),
    "rcpt": (EHLO, MAIL, RCPT),
    "data": (EHLO, MAIL, RCPT, "DATA"),
    "rset": (EHLO, "RSET"),
    "noop": ("NOOP",),
    "vrfy": (EHLO, "VRFY bob"),
    "expn": (EHLO, "EXPN list"),
    "help": ("HELP",),
    "quit": (EHLO, "QUIT"),
}


@pytest.mark.parametrize("phase", COMMANDS)
async def test_a_reply_takes_the_place_of_the_ordinary_one(tmp_path: Path, phase: str) -> None:
    async with talking(tmp_path, rule(phase, BUSY)) as talk:
        assert await talk.ask(*COMMANDS[phase]) == "450 4.2.1 Busy"
        assert talk.log.counts == {("it", phase, "reply 450 4.2.1"): 1}
        (fault,) = talk.log.last
        assert fault.session == 0
        if phase != "quit":
            assert (await talk.ask("NOOP")).startswith("450" if phase == "noop" else "250")
        else:
            assert await talk.reply() == ""


@pytest.mark.parametrize("phase", ["ehlo", "mail", "rcpt", "data"])
async def test_a_refusal_leaves_the_session_where_it_was(tmp_path: Path, phase: str) -> None:
    async with talking(tmp_path, rule(phase, BUSY + "\nmatch.first = 1")) as talk:
        *before, last = COMMANDS[phase]
        assert await talk.ask(*before, last) == "450 4.2.1 Busy"
        assert (await talk.ask(last))[:3] == ("354" if phase == "data" else "250")


async def test_a_refused_message_is_not_delivered(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("dot", 'reply = "554 5.7.1 No"\nmatch.attempts = 1')) as talk:
        assert await talk.mail() == "554 5.7.1 No"
        assert talk.recorder.delivered == []
        assert (await talk.mail()).startswith("250")
        assert len(talk.recorder.delivered) == 1


async def test_a_message_may_be_taken_although_its_client_hears_otherwise(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("dot", 'reply = "451 4.3.0 Later"\nkeeps = true')) as talk:
        assert await talk.mail() == "451 4.3.0 Later"
        assert len(talk.recorder.delivered) == 1


async def test_a_message_may_be_taken_and_the_connection_be_closed_before_the_reply(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("dot", 'end = "drop"\nkeeps = true')) as talk:
        assert await talk.mail() == ""
        assert len(talk.recorder.delivered) == 1


async def test_421_ends_the_connection(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("mail", 'reply = "421 4.7.0 Go away"')) as talk:
        assert await talk.ask(EHLO, MAIL) == "421 4.7.0 Go away"
        assert await talk.reply() == ""


@pytest.mark.parametrize("code", ["421 4.3.2 Closed", "554 5.3.2 No service"])
async def test_a_refusal_in_the_place_of_the_greeting(tmp_path: Path, code: str) -> None:
    async with talking(tmp_path, rule("banner", f'reply = "{code}"'), greeted=False) as talk:
        assert await talk.reply() == code
        assert await talk.reply() == ""


async def test_another_greeting(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("banner", 'reply = "220 2.0.0 ****"'), greeted=False) as talk:
        assert await talk.reply() == "220 2.0.0 ****"
        assert (await talk.ask(EHLO)).startswith("250")


async def test_an_accepting_reply_of_its_own(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("rcpt", 'reply = "251 2.1.5 Will forward"')) as talk:
        assert await talk.begin() == "251 2.1.5 Will forward"
        assert (await talk.ask("DATA")).startswith("354")


async def test_a_refused_bdat_is_read_to_its_end(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("data", BUSY)) as talk:
        await talk.begin()
        assert await talk.ask("BDAT 6 LAST\r\nNOOP") == "450 4.2.1 Busy"
        assert (await talk.ask("NOOP")).startswith("250")


async def test_a_refused_message_in_lmtp_has_a_reply_for_each_recipient(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("dot", BUSY), settings={"kind": "lmtp"}) as talk:
        await talk.ask("LHLO client", MAIL, RCPT, "RCPT TO:<c@example.org>", "DATA")
        assert await talk.end() == "450 4.2.1 Busy"
        assert await talk.reply() == "450 4.2.1 Busy"


@pytest.mark.parametrize("does", ['reply = "250 2.0.0 Mine"', 'reply = "450 4.2.1 Busy"\nkeeps = true'])
async def test_a_message_that_is_taken_in_lmtp_has_a_reply_for_each_recipient(tmp_path: Path, does: str) -> None:
    async with talking(tmp_path, rule("dot", does), settings={"kind": "lmtp"}) as talk:
        await talk.ask("LHLO client", MAIL, RCPT, "RCPT TO:<c@example.org>", "DATA")
        said = await talk.end()
        assert said in ("250 2.0.0 Mine", "450 4.2.1 Busy")
        assert await talk.reply() == said
        assert (await talk.ask("NOOP")).startswith("250")
        assert len(talk.recorder.delivered) == 1


async def test_a_rset_behind_bdat_still_ends_the_message(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("mail", BUSY + '\nmatch.sender = ["x@x.x"]')) as talk:
        await talk.begin()
        await talk.ask("BDAT 3\r\nx")
        assert (await talk.ask("RSET")).startswith("250")
        assert (await talk.mail()).startswith("250")


async def test_pipelined_replies_come_in_their_order(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("rcpt", BUSY + '\nmatch.recipient = ["c@*"]')) as talk:
        await talk.send(EHLO, MAIL, RCPT, "RCPT TO:<c@example.org>", "RCPT TO:<d@example.org>", "DATA")
        codes = [(await talk.reply())[:3] for _ in range(6)]
        assert codes == ["250", "250", "250", "450", "250", "354"]


# ---- the midst of a body


async def test_a_reply_right_behind_the_354(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("body", 'reply = "550 5.3.0 Stop"')) as talk:
        await talk.begin()
        assert (await talk.ask("DATA")).startswith("354")
        assert await talk.reply() == "550 5.3.0 Stop"
        assert await talk.reply() == ""
        assert talk.recorder.delivered == []


async def test_an_octet_of_the_body(tmp_path: Path) -> None:
    journal = Journal(JournalSettings())
    async with talking(tmp_path, rule("body", 'at = 100\nend = "drop"'), journal=journal) as talk:
        assert (await talk.mail(text="x" * 50)).startswith("250")
        await talk.begin()
        await talk.ask("DATA")
        await talk.send("x" * 97)
        await trio.testing.wait_all_tasks_blocked()
        assert not talk.log.last
        await talk.send("y")
        assert await talk.reply() == ""
        assert [each["body"] for each in talk.recorder.delivered] == ["x" * 50 + "\r\n"]
    assert b'"event":"lost"' in journal.drain()


async def test_several_octets_of_a_body_delay_it_one_by_one(tmp_path: Path, autojump_clock: object) -> None:
    plan = rule("body", "at = 10\ndelay = { seconds = 3 }") + rule("body", "at = 20\ndelay = { seconds = 4 }").replace(
        '"it"', '"that"'
    )
    async with talking(tmp_path, plan) as talk:
        await talk.begin()
        await talk.ask("DATA")
        seconds, reply = await took(lambda: talk.end("x" * 30))
        assert reply.startswith("250")
        assert seconds == 7


# ---- ends


@pytest.mark.parametrize("phase", ["ehlo", "mail", "rcpt", "data"])
async def test_a_drop_closes_without_a_reply(tmp_path: Path, phase: str) -> None:
    async with talking(tmp_path, rule(phase, 'end = "drop"'), tcp=True) as talk:
        *before, last = COMMANDS[phase]
        for command in before:
            await talk.ask(command)
        assert await talk.ask(last) == ""


async def test_a_drop_behind_a_reply(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("mail", BUSY + '\nend = "drop"'), tcp=True) as talk:
        assert await talk.ask(EHLO, MAIL) == "450 4.2.1 Busy"
        assert await talk.reply() == ""


async def test_a_reset_is_a_reset(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("rcpt", 'end = "reset"'), tcp=True) as talk:
        await talk.ask(EHLO, MAIL)
        with pytest.raises(trio.BrokenResourceError) as error:
            await talk.ask(RCPT)
        assert isinstance(error.value.__cause__, ConnectionResetError)


async def test_a_reset_before_the_greeting(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("connect", 'end = "reset"'), tcp=True, greeted=False) as talk:
        with pytest.raises(trio.BrokenResourceError):
            await talk.line()


async def test_a_half_close_still_reads(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("mail", 'end = "half-close"'), tcp=True) as talk:
        assert await talk.ask(EHLO, MAIL) == ""
        for _ in range(10):
            await talk.send("x" * 1000)  # nobody objects


async def test_a_half_close_is_bounded(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(tmp_path, "longest_stall = 20\n" + rule("mail", 'end = "half-close"')) as talk:
        assert await talk.ask(EHLO, MAIL) == ""
        await trio.sleep(21)
        with pytest.raises(trio.BrokenResourceError):
            await talk.send("x")


async def test_a_stall_is_silence_that_ends(tmp_path: Path, autojump_clock: object) -> None:
    plan = "longest_stall = 400\n" + rule("data", 'end = "stall"')
    async with talking(tmp_path, plan, settings={"limits": {"command_timeout": 10}}) as talk:
        await talk.begin()
        seconds, reply = await took(lambda: talk.ask("DATA"))
        assert reply == ""
        assert seconds == 400


# ---- delays


@pytest.mark.parametrize("phase", COMMANDS)
async def test_a_delay_is_before_the_reply(tmp_path: Path, phase: str, autojump_clock: object) -> None:
    async with talking(tmp_path, rule(phase, "delay = { seconds = 2.5 }")) as talk:
        *before, last = COMMANDS[phase]
        for command in before:
            await talk.ask(command)
        seconds, reply = await took(lambda: talk.ask(last))
        assert reply[:1] in "23"
        assert seconds == 2.5
        assert talk.log.last[-1] == AppliedFault("it", talk.log.last[-1].phase, "delay 2.500 s", *talk.log.last[-1][3:])


async def test_a_delayed_greeting(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(
        tmp_path,
        rule("connect", "delay = { seconds = 2 }")
        + rule("banner", "delay = { seconds = 3 }").replace('"it"', '"that"'),
        greeted=False,
    ) as talk:
        seconds, reply = await took(talk.reply)
        assert reply.startswith("220")
        assert seconds == 5


async def test_delays_add_up_and_the_first_verdict_is_the_last(tmp_path: Path, autojump_clock: object) -> None:
    plan = """
    [[rule]]
    name = "one"
    phase = "mail"
    delay = { seconds = 1 }
    [[rule]]
    name = "two"
    phase = "mail"
    delay = { seconds = 2 }
    reply = "450 4.0.0 Two"
    [[rule]]
    name = "three"
    phase = "mail"
    delay = { seconds = 4 }
    reply = "451 4.0.0 Three"
    """
    async with talking(tmp_path, plan) as talk:
        await talk.ask(EHLO)
        assert await took(lambda: talk.ask(MAIL)) == (3, "450 4.0.0 Two")
        assert [(fault.rule, fault.action) for fault in talk.log.last] == [
            ("one", "delay 1.000 s"),
            ("two", "delay 2.000 s"),
            ("two", "reply 450 4.0.0"),
        ]


async def test_the_clocks_stand_still_during_a_delay(tmp_path: Path, autojump_clock: object) -> None:
    settings = {"limits": {"command_timeout": 10, "session_timeout": 100}}
    async with talking(tmp_path, rule("mail", "delay = { seconds = 500 }"), settings=settings) as talk:
        await talk.ask(EHLO)
        assert (await talk.ask(MAIL)).startswith("250")
        await trio.sleep(5)
        assert (await talk.ask("NOOP")).startswith("250")
        assert (await talk.reply()).startswith("421 4.4.2 Idle")


async def test_what_was_said_before_a_delay_is_sent_before_it(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(tmp_path, rule("rcpt", "delay = { seconds = 9 }")) as talk:
        await talk.send(EHLO, MAIL, RCPT)
        seconds, _ = await took(talk.reply)
        assert seconds == 0
        seconds, _ = await took(talk.reply)
        assert seconds == 0
        seconds, _ = await took(talk.reply)
        assert seconds == 9


async def test_a_server_that_stops_does_not_wait_for_a_delay(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(tmp_path, rule("mail", "delay = { seconds = 500 }")) as talk:
        await talk.ask(EHLO)
        await talk.send(MAIL)
        await trio.testing.wait_all_tasks_blocked()
        talk.connection.stop(5)
        seconds, reply = await took(talk.reply)
        assert reply.startswith("421 4.3.2")
        assert seconds == 0


# ---- dress


SENDER_OK = b"250 2.1.0 Sender ok\r\n"


async def said_to_mail(tmp_path: Path, how: str, does: str = "") -> tuple[bytes, bytes]:
    """Return what comes for MAIL that is dressed, and what comes for a NOOP behind it."""
    async with talking(tmp_path, rule("mail", f'dress = "{how}"\n{does}')) as talk:
        await talk.ask(EHLO)
        await talk.send(MAIL)
        await trio.testing.wait_all_tasks_blocked()
        data = bytes(await talk.stream.receive_some(1 << 20))
        await talk.send("NOOP")
        return data, await talk.line()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("wrong-code", b"354 2.1.0 Sender ok\r\n"),
        ("too-long", SENDER_OK[:-2] + b" " + b"x" * (2000 - len(SENDER_OK) - 1) + b"\r\n"),
        ("many-lines", SENDER_OK.replace(b"250 ", b"250-") * 999 + SENDER_OK),
        ("unfinished", b"250-2.1.0 Sender ok\r\n"),
        ("non-ascii", b"250 2.1.0 Sender ok Gr\xfc\xdfe \xe2\x82\r\n"),
        ("bare-lf", b"250 2.1.0 Sender ok\n"),
        ("no-line-end", b"250 2.1.0 Sender ok"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_reply_is_corrupted_and_the_next_is_not(tmp_path: Path, how: str, expected: bytes) -> None:
    assert await said_to_mail(tmp_path, how) == (expected, b"250 2.0.0 Ok\r\n")


async def test_garbage_is_the_same_with_the_same_seed(tmp_path: Path) -> None:
    first, _ = await said_to_mail(tmp_path, "garbage")
    again, _ = await said_to_mail(tmp_path, "garbage")
    assert first == again
    assert len(first) == 66
    assert not first.startswith(b"250")


async def test_a_refusal_can_be_dressed(tmp_path: Path) -> None:
    assert (await said_to_mail(tmp_path, "bare-lf", BUSY))[0] == b"450 4.2.1 Busy\n"


async def test_a_dressed_message_is_delivered(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("dot", 'dress = "bare-lf"')) as talk:
        assert (await talk.mail()).startswith("250")
        assert len(talk.recorder.delivered) == 1


# ---- pace


class Noting(trio.abc.Stream):
    """A stream that notes what is sent for itself."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.sent.append(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        pass

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return b"x" * (max_bytes or 100_000)

    async def aclose(self) -> None:
        pass


async def test_a_split_stream_sends_octet_by_octet() -> None:
    stream = Noting()
    await PacedStream(stream, split=True).send_all(b"250\r\n")
    assert stream.sent == [b"2", b"5", b"0", b"\r", b"\n"]


async def test_split_replies_are_whole_in_the_end(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("ehlo", "split = true")) as talk:
        assert (await talk.mail()).startswith("250")


async def test_a_slow_write(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(tmp_path, rule("mail", "write_rate = 10")) as talk:
        await talk.ask(EHLO)
        seconds, reply = await took(lambda: talk.ask(MAIL))
        assert reply == "250 2.1.0 Sender ok"
        assert 1.9 <= seconds <= 2.2


async def test_a_slow_read(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(tmp_path, rule("data", "read_rate = 1000")) as talk:
        await talk.begin()
        await talk.ask("DATA")
        seconds, reply = await took(lambda: talk.end("\r\n".join(["x" * 98] * 100)))
        assert reply.startswith("250")
        assert 9.9 <= seconds <= 10.2


async def test_a_pace_on_a_socket_goes_on_to_the_end(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("mail", "read_rate = 10_000_000\nsplit = true"), tcp=True) as talk:
        for _ in range(3):
            assert (await talk.mail()).startswith("250")
        assert (await talk.ask("QUIT")).startswith("221")
        assert await talk.reply() == ""


# ---- changed at run time


async def test_a_plan_is_put_in_force_in_open_sessions(tmp_path: Path) -> None:
    async with talking(tmp_path) as talk:
        assert (await talk.mail()).startswith("250")
        talk.engine.load(parse_plan(rule("rcpt", BUSY)))
        assert await talk.begin() == "450 4.2.1 Busy"
        talk.engine.load(parse_plan(""))
        assert (await talk.mail()).startswith("250")


async def test_fail_next_fails_the_next(tmp_path: Path) -> None:
    async with talking(tmp_path) as talk:
        talk.engine.fail_next("RCPT", 452, 2)
        assert talk.engine.pending() == {"rcpt": 2}
        assert await talk.begin() == "452 4.0.0 Insufficient system storage, please try again later"
        assert (await talk.ask(RCPT))[:3] == "452"
        assert (await talk.ask(RCPT))[:3] == "250"
        assert talk.engine.pending() == {}
        assert talk.log.last[0] == AppliedFault(
            "fail-next", "rcpt", "reply 452 4.0.0", 0, "a@example.com", "b@example.org", ""
        )


async def test_fail_next_comes_before_the_plan(tmp_path: Path) -> None:
    async with talking(tmp_path, rule("dot", BUSY)) as talk:
        talk.engine.fail_next(".", "554 5.6.0 Not like this")
        assert await talk.mail() == "554 5.6.0 Not like this"
        assert await talk.mail() == "450 4.2.1 Busy"


async def test_fail_next_fails_a_greeting(tmp_path: Path) -> None:
    engine = FaultEngine()
    engine.fail_next("banner", 421)
    async with talking(tmp_path, engine=engine, greeted=False) as talk:
        assert (await talk.reply())[:3] == "421"


async def test_a_connection_that_has_ended_is_not_told_any_more(tmp_path: Path) -> None:
    async with talking(tmp_path) as talk:
        await talk.ask("QUIT")
        await trio.testing.wait_all_tasks_blocked()
        assert not talk.engine.followers


@pytest.mark.parametrize("end", ["RSET", EHLO])
async def test_a_fault_of_an_aborted_text_does_not_meet_the_next_one(tmp_path: Path, end: str) -> None:
    plan = rule("body", BUSY + "\nat = 20")
    async with talking(tmp_path, plan) as talk:
        await talk.begin()
        assert (await talk.ask("BDAT 5\r\n123")).startswith("250")
        talk.engine.load(parse_plan(""))
        assert (await talk.ask(end)).startswith("250")
        await talk.ask(MAIL, RCPT, "BDAT 5\r\n123")
        talk.engine.load(parse_plan(plan))  # too late for the text that has begun
        assert (await talk.ask("BDAT 30 LAST\r\n" + "x" * 28)).startswith("250")
        assert not talk.log.last


async def test_a_number_in_an_aborted_header_is_not_that_of_the_next_text(tmp_path: Path) -> None:
    plan = '[identity]\nwhere = "header"\nheader = "X-Number"\n' + rule("dot", BUSY + "\nmatch.every = 1")
    async with talking(tmp_path, plan) as talk:
        await talk.begin()
        await talk.ask("BDAT 19\r\nX-Number: seq-r-1")
        talk.engine.load(parse_plan(""))
        await talk.ask("RSET", MAIL, RCPT, "BDAT 5\r\n123")
        talk.engine.load(parse_plan(plan))
        assert (await talk.ask("BDAT 5 LAST\r\nxyz")).startswith("450")
        assert [fault.sequence for fault in talk.log.last] == [""]


async def test_calm_sessions_are_accepted_in_compiled_code(tmp_path: Path) -> None:
    async with talking(tmp_path, has_magic=True, settings={"wire": {"bare_lf": "accept"}}) as talk:
        session = talk.connection.session
        assert session.auto_accept
        await talk.mail()
        assert session.auto_accept
        talk.engine.fail_next("noop", 450)
        assert not session.auto_accept


@pytest.mark.parametrize(
    "does", ['dress = "wrong-code"', 'reply = "250 2.0.0 Fine"', 'reply = "450"\nend = "drop"', 'dress = "garbage"']
)
async def test_a_bdat_has_no_reply_that_could_go_wrong_before_its_octets(tmp_path: Path, does: str) -> None:
    async with talking(tmp_path, rule("data", does)) as talk:
        await talk.begin()
        assert await talk.ask("BDAT 6\r\nabcd") == "250 2.0.0 6 octets received"
        assert not talk.log.last
