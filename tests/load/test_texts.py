"""The messages: sizes, dot-stuffing, sequence tags."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from penstock.load.plan import Plan, PlanError, Target
from penstock.load.schedule import Stage
from penstock.load.texts import made, read_folder, size_of, text_of
from penstock.load.units import parse_duration


@pytest.mark.parametrize("octets", [200, 1024, 4096, 100_001])
def test_a_message_has_about_the_given_size(octets: int) -> None:
    text = made(octets, chunking=False)
    assert abs(text.size - octets) <= 2
    sent = text.sent(None)
    assert sent.endswith(b"\r\n.\r\n")
    assert max(map(len, sent.split(b"\r\n"))) <= 78


def test_dots_are_stuffed_for_data_and_not_for_bdat(tmp_path: Path) -> None:
    (tmp_path / "a.eml").write_bytes(b"Subject: dots\n\n.\n..x\n")
    (stuffed,) = read_folder(tmp_path, chunking=False)
    assert stuffed.sent(None) == b"Subject: dots\r\n\r\n..\r\n...x\r\n.\r\n"
    (plain,) = read_folder(tmp_path, chunking=True)
    assert plain.sent("seq-r-1") == b"X-Penstock-Sequence: seq-r-1\r\nSubject: dots\r\n\r\n.\r\n..x\r\n"


@pytest.mark.parametrize("chunking", [False, True])
def test_a_drawn_size_gives_the_same_message_as_a_fixed_one(chunking: bool) -> None:
    text = text_of("1-3000", None, 1, chunking=chunking)
    for number in (*range(1, 100), *range(1, 50)):
        drawn = text(number)
        assert drawn == text(number)
        assert drawn.sent("seq-r-1") == made(drawn.size, chunking=chunking).sent("seq-r-1")


def test_size_depends_on_number_and_seed_alone() -> None:
    for spec in ("1000-50000", "lognormal:8000:1.5", "table:1000=70,50000=30"):
        drawn = [[size_of(spec, seed)(number) for number in range(200)] for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert size_of(spec, 1)(150) == drawn[0][150], "no other number is needed"


def test_distributions_have_their_shape() -> None:
    numbers = range(20_000)
    assert {size_of("table:10=1,20=0", 1)(number) for number in numbers} == {10}
    drawn = sorted(size_of("table:10=70,20=30", 1)(number) for number in numbers)
    assert drawn.count(20) == pytest.approx(6000, rel=0.1)
    assert {size_of("100-103", 1)(number) for number in numbers} == {100, 101, 102, 103}
    drawn = sorted(size_of("lognormal:8000:1.5", 1)(number) for number in numbers)
    assert drawn[10_000] == pytest.approx(8000, rel=0.1)
    assert drawn[16_827] == pytest.approx(8000 * math.e**1.5, rel=0.1), "one sigma above"
    assert len(set(drawn)) > 10_000, "sizes do not repeat"


def test_a_message_has_a_largest_size() -> None:
    assert max(size_of("lognormal:1000000:2.2", 1)(number) for number in range(100_000)) <= 1 << 30
    for spec in ("1073741825", "1-1073741825", "table:1=1000,1073741825=1", "lognormal:8000:5", "lognormal:8000:1e300"):
        with pytest.raises(PlanError, match="at most 1,073,741,824 octets"):
            size_of(spec, 1)


@pytest.mark.parametrize(
    "spec",
    ["", "x", "-5", "10-", "lognormal:1", "lognormal:0:1", "lognormal:nan:1", "lognormal:1:inf", "lognormal:1:2:3",
     "table:", "table:x=1", "table:5", "table:5=0", "table:-5=1", "table:5=-1,6=2", "20-10"],
)  # fmt: skip
def test_a_wrong_size_is_refused(spec: str) -> None:
    with pytest.raises(PlanError, match="--size is"):
        size_of(spec, 1)


def test_a_folder_without_messages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no \.eml files"):
        read_folder(tmp_path, chunking=False)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("127.0.0.1:2525", "127.0.0.1:2525"),
        ("mx.example.org", "mx.example.org:25"),
        ("[::1]:26", "[::1]:26"),
        ("unix:/run/lmtp", "unix:/run/lmtp"),
    ],
)
def test_targets_are_read(text: str, shown: str) -> None:
    assert str(Target.parse(text)) == shown


@pytest.mark.parametrize("text", ["", ":25", "host:port", "host:0", "host:99999"])
def test_wrong_targets_are_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Target.parse(text)


TARGET = [Target("x", 1)]


@pytest.mark.parametrize(
    "plan",
    [
        Plan(targets=TARGET),
        Plan(targets=TARGET, messages=1, ca_file=Path("x")),
        Plan(targets=TARGET, stages=[Stage(1, 1)], rate=5.0),
        Plan(targets=TARGET, stages=[Stage(1, 1)], duration=5.0),
        Plan(targets=TARGET, messages=1, rate=5.0, think=1.0),
        Plan(targets=TARGET, messages=1, warm_up=1.0),
        Plan(targets=TARGET, duration=1.0, warm_up=1.0),
        Plan(targets=TARGET, messages=5, workers=6),
        Plan(targets=TARGET, duration=5.0, sessions=2, workers=3),
    ],
)
def test_settings_that_exclude_each_other_are_refused(plan: Plan) -> None:
    with pytest.raises(PlanError, match="--"):
        plan.check()


@pytest.mark.parametrize(
    ("text", "seconds"), [("250us", 0.00025), ("50ms", 0.05), ("10s", 10), ("1.5m", 90), ("2h", 7200), ("7", 7)]
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-5s", "5 s", "5x", "1e3", "\u0665s", "800h", "nan"])
def test_wrong_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"duration|longer"):
        parse_duration(text)
