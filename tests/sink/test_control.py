"""What the HTTP API asks an engine for, and what `--describe-faults` prints."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from penstock.sink.control import FaultAdmin, FaultFile, describe_faults, to_toml
from penstock.sink.faults import AppliedFault, FaultEngine, FaultLog, Occasion
from penstock.sink.plan import PHASES, PlanSettings, parse_plan
from penstock.sink.report import FaultCount

PLAN = """
seed = 5
[identity]
where = "recipient"
[[rule]]
name = "busy"
phase = "rcpt"
reply = "450 4.2.1 Busy"
delay = { percentiles = [[50, 0.1], [99, 2.5]] }
match = { recipient = ["*@a", "*@b"], probability = 0.5, sequence = [1, 9] }
[[rule]]
phase = "connect"
end = "reset"
outage = { down = 30, every = 300 }
"""


def admin_of(plan: str = "", seed: int | None = None) -> tuple[FaultAdmin, FaultEngine]:
    log = FaultLog()
    engine = FaultEngine(parse_plan(plan), receipts=log, clock=lambda: 0.0)
    return FaultAdmin(engine, log, seed=seed), engine


def test_a_plan_goes_to_toml_and_back() -> None:
    plan = parse_plan(PLAN)
    assert parse_plan(to_toml(plan)) == plan
    assert to_toml(PlanSettings()) == ""
    assert "longest_stall" not in to_toml(plan)


def test_a_plan_is_replaced() -> None:
    admin, engine = admin_of()
    assert admin.plan() == ""
    admin.replace(PLAN)
    assert engine.plan == parse_plan(PLAN)
    assert parse_plan(admin.plan()) == engine.plan
    with pytest.raises(ValueError, match=r"rule\[0\]\.phase: unknown value 'x'; expected one of: connect, banner"):
        admin.replace("[[rule]]\nphase = 'x'")
    assert engine.plan == parse_plan(PLAN)


def test_the_seed_of_the_command_line_has_the_last_word() -> None:
    admin, engine = admin_of(seed=9)
    admin.replace(PLAN)
    assert engine.plan.seed == 9


def test_faults_are_counted_and_forgotten() -> None:
    admin, engine = admin_of('[[rule]]\nname = "x"\nphase = "noop"\nreply = "450"')
    for _ in range(3):
        engine.decide(Occasion("noop", "192.0.2.1"))
    admin.fail_next("NOOP", "451", 2)
    assert admin.pending() == {"noop": 2}
    assert admin.counted() == [FaultCount(rule="x", phase="noop", action="reply 450 4.0.0", count=3)]
    admin.reset()
    assert admin.counted() == []
    assert admin.pending() == {}


def test_the_description_is_a_plan_that_means_the_defaults() -> None:
    text = describe_faults()
    assert parse_plan(text) == PlanSettings()
    for word in (*PHASES, "What the same seed repeats", "How rules are combined", "greylist", "dot-451@", "[[rule]]"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 122


def test_the_rules_of_the_description_can_be_used() -> None:
    lines = describe_faults().partition("# ----")[0].splitlines()
    rule = [line[1:] for line in lines if line.startswith(("#[[rule]]", "#at =", "#keeps", "#split", "#read_rate"))]
    text = "\n".join([*rule, 'phase = "dot"', 'reply = "450"'])
    assert parse_plan(text) == parse_plan('[[rule]]\nphase = "dot"\nreply = "450"')


def test_a_log_on_a_full_disk_does_not_stop_the_sink() -> None:
    log = FaultFile(Path("/dev/full"))
    fault = AppliedFault("x", "mail", "reply 450", 1, "a@b", "", "")
    for _ in range(1000):
        log.on_fault(fault)
    with pytest.raises(OSError, match="No space left"):
        log.close()
    assert sum(log.counts.values()) == 1000


class FullAfterPart(io.FileIO):
    """A file whose disk becomes full within a write."""

    def write(self, data: Any) -> int:
        return super().write(data[: len(data) * 2 // 3])


def test_a_log_on_a_full_disk_ends_with_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    log = FaultFile(path)
    log._file.close()
    log._file = FullAfterPart(path, "wb")
    for number in range(4):
        log.on_fault(AppliedFault("x", "mail", "reply 450", number, "a@b", "", ""))
    with pytest.raises(OSError, match="No space left"):
        log.close()
    written = path.read_bytes()
    assert written.endswith(b"}\n")
    assert [json.loads(line)["session"] for line in written.splitlines()] == [0, 1]
