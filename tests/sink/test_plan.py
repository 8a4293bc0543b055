"""Fault plans: every mistake is reported with its key, and the classes describe themselves."""

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
        ("rules = []", "rules: unknown key (did you mean rule?); expected one of: identity, longest_stall"),
        ("seed = -1", "seed: expected an integer >= 0"),
        ("longest_stall = 0", "longest_stall: expected a number > 0"),
        ("remember = 0", "remember: expected an integer >= 1"),
        (
            "identity.where = 'there'",
            "identity.where: unknown value 'there' (did you mean nowhere?); expected one of: sender, recipient, header",
        ),
        ("identity.header = 'a b'", "identity.header: expected a string matching"),
        (RULE, "rule[0].phase: required key is missing"),
        (
            RULE + "phase = 'mial'",
            "rule[0].phase: unknown value 'mial' (did you mean mail?); expected one of: connect, banner, ehlo, helo, ",
        ),
        (RULE + "phase = 3", "rule[0].phase: unknown value 3; expected one of: connect, banner"),
        (RULE + f"phase = '{'x' * 50}'", f"rule[0].phase: unknown value '{'x' * 40}...'; expected"),
        (RULE + "phase = 'mail'", "rule[0]: the rule does nothing; set one of reply, dress"),
        (RULE + "phase = 'mail'\nreply = '600 No'", "rule[0]: expected a reply such as"),
        (RULE + "phase = 'mail'\nreply = 'No'", "rule[0]: expected a reply such as"),
        (
            RULE + "phase = 'mail'\nreply = '450 5.1.1 No'",
            "rule[0]: expected an enhanced status code such as '4.1.1' for 450",
        ),
        (RULE + "phase = 'mail'\nat = 5\nreply = '450'", "rule[0]: at requires phase = "),
        (RULE + "phase = 'mail'\nkeeps = true\nreply = '450'", "rule[0]: keeps requires phase = "),
        (RULE + "phase = 'mail'\ntls = 'refuse'", "rule[0]: tls requires phase starttls"),
        (RULE + "phase = 'starttls'\ntls = 'refuse'\nreply = '450'", "rule[0]: tls cannot be combined with"),
        (RULE + "phase = 'connect'\nreply = '421'", "rule[0]: phase connect has no reply"),
        (RULE + "phase = 'body'\ndress = 'garbage'", "rule[0]: dress requires reply in phase body"),
        (
            RULE + "phase = 'mail'\ndress = 'pink'",
            "rule[0].dress: unknown value 'pink'; expected one of: wrong-code, too-long",
        ),
        (
            RULE + "phase = 'mail'\nend = 'nicely'",
            "rule[0].end: unknown value 'nicely'; expected one of: drop, reset, half-close, stall",
        ),
        (
            RULE + "phase = 'starttls'\ntls = 'old'",
            "rule[0].tls: unknown value 'old'; expected one of: refuse, wrong-name",
        ),
        (RULE + "phase = 'mail'\nrate = { count = 1, per = 'hour' }", "rule[0].rate.per: unknown value 'hour"),
        (RULE + "phase = 'mail'\nread_rate = -1", "rule[0].read_rate: expected an integer >= 0"),
        (RULE + "phase = 'ehlo'\nreply = '450'\nmatch.sender = ['x']", "rule[0]: phase ehlo has no sender"),
        (RULE + "phase = 'mail'\nreply = '450'\nmatch.recipient = ['x']", "phase mail has no recipient"),
        (RULE + "phase = 'mail'\nreply = '450'\nmatch.sendr = ['x']", "rule[0].match.sendr: unknown key"),
        (RULE + "phase = 'mail'\nreply = '450'\nmatch.network = ['1.2.3.4/8']", "rule[0].match: 1.2.3.4/8 has host"),
        (RULE + "phase = 'mail'\nreply = '450'\nmatch.probability = 2", "rule[0].match.probability: expected a number"),
        (RULE + "phase = 'mail'\nreply = '450'\nmatch.every = 0", "rule[0].match.every: expected an integer >= 1"),
        (
            RULE + "phase = 'mail'\nreply = '450'\nmatch = { since = 5, until = 4 }",
            "rule[0].match: until must be greater",
        ),
        (
            RULE + "phase = 'mail'\nreply = '450'\nmatch.sequence = [5, 4]",
            "rule[0].match: sequence must be [first, last]",
        ),
        (RULE + "phase = 'mail'\ndelay = {}", "rule[0].delay: set exactly one of"),
        (RULE + "phase = 'mail'\ndelay = { seconds = 1, uniform = [1, 2] }", "rule[0].delay: set exactly one of"),
        (RULE + "phase = 'mail'\ndelay = { seconds = -1 }", "rule[0].delay.seconds: expected a number >= 0"),
        (RULE + "phase = 'mail'\ndelay = { uniform = [2, 1] }", "rule[0].delay: uniform must be [least, most]"),
        (
            RULE + "phase = 'mail'\ndelay = { percentiles = [[90, 1], [50, 2]] }",
            "rule[0].delay: percentiles must be between 0 and",
        ),
        (RULE + "phase = 'mail'\ndelay = { percentiles = [[50, 2], [90, 1]] }", "rule[0].delay: the seconds of"),
        (
            RULE + "phase = 'mail'\noutage = { down = 5, every = 4 }",
            "rule[0].outage: down must not be greater than every",
        ),
        (RULE + "phase = 'mail'\nrate = { count = 0 }", "rule[0].rate.count: expected a number > 0"),
        (RULE + "phase = 'ehlo'\nrate = { count = 1, per = 'sender' }", "rule[0]: phase ehlo has no sender"),
        (RULE + "phase = 'mail'\nrate = { count = 1, per = 'recipient' }", "phase mail has no recipient"),
        (RULE + "phase = 'mail'\ngreylist = {}", "rule[0]: greylist requires phase rcpt"),
        (RULE + "phase = 'mail'\nmailbox.octets = 1", "rule[0]: mailbox requires phase rcpt or dot"),
        (RULE + "phase = 'rcpt'\nmailbox = {}", "rule[0].mailbox: set octets or messages"),
        (2 * (RULE + "name = 'x'\nphase = 'mail'\nreply = '450'\n"), "two rules are named 'x'"),
        ("x = ", "invalid TOML"),
    ],
)
def test_a_mistake_is_reported_with_its_key(toml: str, expected: str) -> None:
    with pytest.raises(PlanError) as error:
        parse_plan(toml)
    assert expected in str(error.value)


def test_errors_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    with pytest.raises(PlanError, match=r"plan\.toml: No such file"):
        load_plan(file)
    file.write_bytes(b"\xff")
    with pytest.raises(PlanError, match="UTF-8"):
        load_plan(file)
    file.write_text("x = 1")
    with pytest.raises(PlanError, match=r"plan\.toml: x: unknown key"):
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
        ("571 5.7.1", Reply(571, "5.7.1", "Injected fault")),
    ],
)
def test_a_reply_is_parsed_with_optional_status_and_text(text: str, expected: Reply) -> None:
    assert reply_of(text) == expected


def test_the_description_reads_back_as_the_defaults() -> None:
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


def test_a_plan_survives_conversion_to_a_table() -> None:
    plan = parse_plan(RULE + 'phase = "rcpt"\nmatch = { recipient = ["x@*"], sequence = [1, 5] }\nreply = "450"')
    assert msgspec.convert(msgspec.to_builtins(plan), PlanSettings) == plan
