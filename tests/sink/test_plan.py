"""A plan is strict and telling, and described by its own classes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from penstock import schema
from penstock.reply import Reply
from penstock.sink.plan import PHASES, PlanError, PlanSettings, RuleSettings, load_plan, parse_plan, reply_of

RULE = "[[rule]]\n"


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("rules = []", "rules: there is no such key; here may stand: identity, longest_stall"),
        ("seed = -1", "seed: Expected `int` >= 0"),
        ("longest_stall = 0", "longest_stall: Expected `float` > 0"),
        ("remember = 0", "remember: Expected `int` >= 1"),
        (
            "identity.where = 'there'",
            "identity.where: there is no 'there'; here may stand: sender, recipient, header, nowhere",
        ),
        ("identity.header = 'a b'", "identity.header: Expected `str` matching"),
        (RULE, "rule[0]: Object missing required field `phase`"),
        (RULE + "phase = 'mial'", "rule[0].phase: there is no 'mial'; here may stand: connect, banner, ehlo, helo, "),
        (RULE + "phase = 3", "rule[0].phase: Expected `str`, got `int`; here may stand: connect, banner"),
        (RULE + f"phase = '{'x' * 50}'", f"rule[0].phase: there is no '{'x' * 40}'; here"),
        (RULE + "phase = 'mail'", "rule[0]: a rule needs something to do: reply, dress"),
        (RULE + "phase = 'mail'\nreply = '600 No'", "rule[0]: a reply looks like"),
        (RULE + "phase = 'mail'\nreply = 'No'", "rule[0]: a reply looks like"),
        (RULE + "phase = 'mail'\nreply = '450 5.1.1 No'", "rule[0]: an enhanced status code for 450"),
        (RULE + "phase = 'mail'\nat = 5\nreply = '450'", "rule[0]: at is for phase body"),
        (RULE + "phase = 'mail'\nkeeps = true\nreply = '450'", "rule[0]: keeps is for phase dot"),
        (RULE + "phase = 'mail'\ntls = 'refuse'", "rule[0]: tls is for phase starttls"),
        (RULE + "phase = 'starttls'\ntls = 'refuse'\nreply = '450'", "rule[0]: tls stands alone"),
        (RULE + "phase = 'connect'\nreply = '421'", "rule[0]: nothing is said in phase connect"),
        (RULE + "phase = 'body'\ndress = 'garbage'", "rule[0]: in phase body there is no reply to dress"),
        (
            RULE + "phase = 'mail'\ndress = 'pink'",
            "rule[0].dress: there is no 'pink'; here may stand: wrong-code, too-long",
        ),
        (
            RULE + "phase = 'mail'\nend = 'nicely'",
            "rule[0].end: there is no 'nicely'; here may stand: drop, reset, half-close, stall",
        ),
        (
            RULE + "phase = 'starttls'\ntls = 'old'",
            "rule[0].tls: there is no 'old'; here may stand: refuse, wrong-name",
        ),
        (RULE + "phase = 'mail'\nrate = { count = 1, per = 'hour' }", "rule[0].rate.per: there is no 'hour'; here may"),
        (RULE + "phase = 'mail'\nread_rate = -1", "rule[0].read_rate: Expected `int` >= 0"),
        (RULE + "phase = 'ehlo'\nreply = '450'\nmatch.sender = ['x']", "rule[0]: there is no sender in phase ehlo"),
        (RULE + "phase = 'mail'\nreply = '450'\nmatch.recipient = ['x']", "there is no recipient in phase mail"),
        (RULE + "phase = 'mail'\nreply = '450'\nmatch.sendr = ['x']", "rule[0].match.sendr: there is no such key"),
        (RULE + "phase = 'mail'\nreply = '450'\nmatch.network = ['1.2.3.4/8']", "rule[0].match: 1.2.3.4/8 has host"),
        (RULE + "phase = 'mail'\nreply = '450'\nmatch.probability = 2", "rule[0].match.probability: Expected `float`"),
        (RULE + "phase = 'mail'\nreply = '450'\nmatch.every = 0", "rule[0].match.every: Expected `int` >= 1"),
        (RULE + "phase = 'mail'\nreply = '450'\nmatch = { since = 5, until = 4 }", "rule[0].match: until is later"),
        (RULE + "phase = 'mail'\nreply = '450'\nmatch.sequence = [5, 4]", "rule[0].match: sequence is [first, last]"),
        (RULE + "phase = 'mail'\ndelay = {}", "rule[0].delay: a delay has one of"),
        (RULE + "phase = 'mail'\ndelay = { seconds = 1, uniform = [1, 2] }", "rule[0].delay: a delay has one of"),
        (RULE + "phase = 'mail'\ndelay = { seconds = -1 }", "rule[0].delay.seconds: Expected `float` >= 0"),
        (RULE + "phase = 'mail'\ndelay = { uniform = [2, 1] }", "rule[0].delay: uniform is [least, most]"),
        (RULE + "phase = 'mail'\ndelay = { percentiles = [[90, 1], [50, 2]] }", "rule[0].delay: percentiles are 0 to"),
        (RULE + "phase = 'mail'\ndelay = { percentiles = [[50, 2], [90, 1]] }", "rule[0].delay: the seconds of"),
        (RULE + "phase = 'mail'\noutage = { down = 5, every = 4 }", "rule[0].outage: down is at most every"),
        (RULE + "phase = 'mail'\nrate = { count = 0 }", "rule[0].rate.count: Expected `float` > 0"),
        (RULE + "phase = 'ehlo'\nrate = { count = 1, per = 'sender' }", "rule[0]: there is no sender in phase ehlo"),
        (RULE + "phase = 'mail'\nrate = { count = 1, per = 'recipient' }", "there is no recipient in phase mail"),
        (RULE + "phase = 'mail'\ngreylist = {}", "rule[0]: greylist is for phase rcpt"),
        (RULE + "phase = 'mail'\nmailbox.octets = 1", "rule[0]: mailbox is for phases rcpt and dot"),
        (RULE + "phase = 'rcpt'\nmailbox = {}", "rule[0].mailbox: a mailbox needs octets or messages"),
        (2 * (RULE + "name = 'x'\nphase = 'mail'\nreply = '450'\n"), "two rules have the name 'x'"),
        ("x = ", "this is not TOML"),
    ],
)
def test_a_mistake_is_told_by_its_key(toml: str, expected: str) -> None:
    with pytest.raises(PlanError) as error:
        parse_plan(toml)
    assert expected in str(error.value)


def test_a_file_names_itself_in_errors(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    with pytest.raises(PlanError, match=r"plan\.toml: No such file"):
        load_plan(file)
    file.write_bytes(b"\xff")
    with pytest.raises(PlanError, match="UTF-8"):
        load_plan(file)
    file.write_text("x = 1")
    with pytest.raises(PlanError, match=r"plan\.toml: x: there is no such key"):
        load_plan(file)
    file.write_text("seed = 3")
    assert load_plan(file).seed == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("450 4.2.2 Mailbox full", Reply(450, "4.2.2", "Mailbox full")),
        ("450 Busy", Reply(450, "4.0.0", "Busy")),
        ("550", Reply(550, "5.0.0", "Mailbox unavailable")),
        ("354", Reply(354, None, "End data with <CR><LF>.<CR><LF>")),
        ("421 4.7.0 Slow\ndown", Reply(421, "4.7.0", "Slow\ndown", closes=True)),
        ("571 5.7.1", Reply(571, "5.7.1", "A fault that was asked for")),
    ],
)
def test_a_reply_is_read_as_it_is_said(text: str, expected: Reply) -> None:
    assert reply_of(text) == expected


def test_the_description_is_a_file_that_means_the_defaults() -> None:
    text = schema.describe(PlanSettings)
    assert parse_plan(text) == PlanSettings()
    assert max(map(len, text.splitlines())) <= 120
    commented = [line.removeprefix("#") for line in text.splitlines() if line.startswith(("#[", "#name", "#phase"))]
    assert "[[rule]]" in commented
    assert "[rule.match]" in commented


def test_every_key_of_a_rule_is_described() -> None:
    text = schema.describe(PlanSettings)
    for field in msgspec.structs.fields(RuleSettings):
        assert f"#{field.name} =" in text or f"#[rule.{field.name}]" in text, field.name
    for phase in PHASES:
        assert phase in text


def test_a_plan_goes_to_a_table_and_back() -> None:
    plan = parse_plan(RULE + 'phase = "rcpt"\nmatch = { recipient = ["x@*"], sequence = [1, 5] }\nreply = "450"')
    assert msgspec.convert(msgspec.to_builtins(plan), PlanSettings) == plan
