"""Magic recipients: grammar and effect; ordinary recipients are not affected."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from penstock.sink.magic import GRAMMAR, WATCHED_PREFIXES, Magic, settings_of
from tests.sink.playing import EHLO, MAIL, talking, took


@pytest.mark.parametrize(
    ("recipient", "reply"),
    [
        ("450@x.example", "450 4.0.0 Requested by the recipient"),
        ("450-4.2.2@x.example", "450 4.2.2 Requested by the recipient"),
        ("550-5.1.1+tag@x.example", "550 5.1.1 Requested by the recipient"),
        ("rcpt-552-5.2.2@x.example", "552 5.2.2 Requested by the recipient"),
        ("greylist@x.example", "451 4.7.1 Greylisted, please try again later"),
        ("flaky-100@x.example", "451 4.0.0 Temporary failure, please try again later"),
    ],
)
async def test_a_magic_recipient_is_refused_as_requested(tmp_path: Path, recipient: str, reply: str) -> None:
    async with talking(tmp_path, has_magic=True) as talk:
        assert await talk.begin("b@example.org", recipient) == reply
        assert (await talk.ask("DATA")).startswith("354")
        assert (await talk.end()).startswith("250")
        assert talk.recorder.delivered[0]["recipients"] == "b@example.org"
        (fault,) = talk.log.last
        assert (fault.rule, fault.phase, fault.recipient) == ("magic", "rcpt", recipient)


async def test_a_magic_recipient_affects_the_whole_message(tmp_path: Path) -> None:
    async with talking(tmp_path, has_magic=True) as talk:
        assert (await talk.begin("dot-451@x", "b@example.org"))[:3] == "250"
        await talk.ask("DATA")
        assert await talk.end() == "451 4.0.0 Requested by the recipient"
        assert (await talk.begin("data-452-4.3.1@x"))[:3] == "250"
        assert await talk.ask("DATA") == "452 4.3.1 Requested by the recipient"
        assert (await talk.ask("RSET"))[:3] == "250"
        assert (await talk.mail())[:3] == "250"
        assert len(talk.recorder.delivered) == 1


async def test_a_magic_recipient_requests_a_reply_in_the_body(tmp_path: Path) -> None:
    async with talking(tmp_path, has_magic=True) as talk:
        await talk.begin("body-550@x")
        assert (await talk.ask("DATA"))[:3] == "354"
        assert (await talk.reply())[:3] == "550"
        assert await talk.reply() == ""


async def test_421_ends_the_connection(tmp_path: Path) -> None:
    async with talking(tmp_path, has_magic=True) as talk:
        assert (await talk.begin("421@x"))[:3] == "421"
        assert await talk.reply() == ""


@pytest.mark.parametrize(("recipient", "seconds"), [("delay-2s@x", 2), ("delay-2@x", 2), ("delay-1500ms@x", 1.5)])
async def test_a_magic_recipient_requests_a_delay(
    tmp_path: Path, recipient: str, seconds: float, autojump_clock: object
) -> None:
    async with talking(tmp_path, has_magic=True) as talk:
        taken, reply = await took(lambda: talk.begin(recipient))
        assert reply[:3] == "250"
        assert taken == seconds


async def test_delays_of_recipients_add_up_and_the_first_verdict_counts(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(tmp_path, has_magic=True) as talk:
        await talk.begin("dot-delay-2s@x", "dot-delay-3s@x", "dot-550@x", "dot-451@x")
        await talk.ask("DATA")
        taken, reply = await took(talk.end)
        assert reply[:3] == "550"
        assert taken == 5


async def test_the_plan_precedes_magic_recipients(tmp_path: Path) -> None:
    plan = '[[rule]]\nphase = "rcpt"\nreply = "452 4.5.3 Full"\nmatch.recipient = ["450@*"]'
    async with talking(tmp_path, plan, has_magic=True) as talk:
        assert await talk.begin("450@x") == "452 4.5.3 Full"
        assert (await talk.ask("RCPT TO:<451@x>"))[:3] == "451"


@pytest.mark.parametrize(("recipient", "ends"), [("drop@x", True), ("half-close@x", True), ("dot-drop@x", False)])
async def test_a_magic_recipient_requests_a_drop(tmp_path: Path, recipient: str, ends: bool) -> None:
    async with talking(tmp_path, has_magic=True, tcp=True) as talk:
        assert (await talk.begin(recipient) == "") is ends
        if not ends:
            await talk.ask("DATA")
            assert await talk.end() == ""


async def test_a_magic_recipient_requests_a_reset(tmp_path: Path) -> None:
    async with talking(tmp_path, has_magic=True, tcp=True) as talk:
        await talk.ask(EHLO, MAIL)
        with pytest.raises(trio.BrokenResourceError):
            await talk.ask("RCPT TO:<reset@x>")


@pytest.mark.parametrize(("recipient", "seconds"), [("stall@x", 300), ("stall-7s@x", 7)])
async def test_a_magic_recipient_requests_a_stall(
    tmp_path: Path, recipient: str, seconds: float, autojump_clock: object
) -> None:
    async with talking(tmp_path, has_magic=True) as talk:
        await talk.ask(EHLO, MAIL)
        assert await took(lambda: talk.ask(f"RCPT TO:<{recipient}>")) == (seconds, "")


async def test_a_magic_greylist_accepts_the_second_attempt(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(tmp_path, has_magic=True) as talk:
        assert (await talk.begin("greylist-10s@x"))[:3] == "451"
        assert (await talk.ask("RCPT TO:<greylist-10s@x>"))[:3] == "451"
        await trio.sleep(10)
        assert (await talk.ask("RCPT TO:<greylist-10s@x>"))[:3] == "250"


async def test_a_magic_recipient_requests_slow_reading(tmp_path: Path, autojump_clock: object) -> None:
    async with talking(tmp_path, has_magic=True) as talk:
        await talk.begin("data-slow-100@x")
        await talk.ask("DATA")
        taken, reply = await took(lambda: talk.end("x" * 500))
        assert reply[:3] == "250"
        assert 5 <= taken <= 6


async def test_a_magic_recipient_requests_garbage(tmp_path: Path) -> None:
    async with talking(tmp_path, has_magic=True) as talk:
        await talk.ask(EHLO, MAIL)
        await talk.send("RCPT TO:<garbage@x>")
        assert not (await talk.line()).startswith(b"250")


@pytest.mark.parametrize(
    "local",
    [
        "bob",
        "4",
        "42",
        "450x",
        "4500",
        "350",
        "450-5.1.1",
        "450-4.2",
        "delay-",
        "delay-2m",
        "delay",
        "drops",
        "dropbox",
        "dot-",
        "dot-bob",
        "stall-",
        "flaky-101",
        "flaky-",
        "slow-0",
        "quit-drop",
        "body-garbage",
        "",
        "DROP",
        "reset.password",
        "٤٥٠",
    ],
)
def test_similar_recipients_are_not_magic(local: str) -> None:
    assert settings_of(local) is None


async def test_recipients_with_a_magic_prefix_are_accepted(tmp_path: Path) -> None:
    async with talking(tmp_path, has_magic=True) as talk:
        for recipient in ("dropbox@x", "42@x", "reset.password@x", "data-team@x"):
            assert (await talk.begin(recipient))[:3] == "250"
        assert talk.connection.session.auto_accept, "the connection has faults"


async def test_without_magic_all_recipients_are_ordinary(tmp_path: Path) -> None:
    async with talking(tmp_path) as talk:
        assert (await talk.begin("drop@x", "450@x"))[:3] == "250"


def test_watched_prefixes_cover_all_magic_recipients() -> None:
    faults = ["450", "550-5.1.1", "drop", "reset", "half-close", "stall", "stall-1s", "delay-1", "greylist", "flaky-1"]
    faults += ["slow-1", "garbage"]
    for fault in faults:
        for phase in ("", "rcpt-", "dot-"):
            assert settings_of(phase + fault) is not None, phase + fault
            assert (phase + fault).startswith(WATCHED_PREFIXES)


def test_the_grammar_lists_every_fault() -> None:
    for prefix in WATCHED_PREFIXES:
        if not prefix.isdigit() and prefix not in ("rcpt-", "data-", "body-", "dot-"):
            assert prefix in GRAMMAR


def test_the_cache_of_recipients_is_bounded() -> None:
    magic = Magic()
    for number in range(10_000):
        magic.rule(f"delay-{number}")
    assert len(magic._known) == 4096
    assert magic.rule("greylist+a") is magic.rule("greylist+b")
