"""The messages: their sizes, their dots, their marks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from penstock.load.plan import Plan, PlanError, Target
from penstock.load.texts import made, read_folder, size_of, text_of


@pytest.mark.parametrize("octets", [200, 1024, 4096, 100_001])
def test_a_text_has_about_the_size_that_was_asked_for(octets: int) -> None:
    text = made(octets, chunking=False)
    assert abs(text.size - octets) <= 2
    sent = text.sent(None)
    assert sent.endswith(b"\r\n.\r\n")
    assert max(map(len, sent.split(b"\r\n"))) <= 78


def test_dots_are_stuffed_for_data_and_left_alone_for_bdat(tmp_path: Path) -> None:
    (tmp_path / "a.eml").write_bytes(b"Subject: dots\n\n.\n..x\n")
    (stuffed,) = read_folder(tmp_path, chunking=False)
    assert stuffed.sent(None) == b"Subject: dots\r\n\r\n..\r\n...x\r\n.\r\n"
    (plain,) = read_folder(tmp_path, chunking=True)
    assert plain.sent("seq-r-1") == b"X-Penstock-Sequence: seq-r-1\r\nSubject: dots\r\n\r\n.\r\n..x\r\n"


@pytest.mark.parametrize("chunking", [False, True])
def test_a_text_that_was_drawn_is_the_one_that_is_made(chunking: bool) -> None:
    text = text_of("1-3000", None, 1, chunking=chunking)
    for number in (*range(1, 100), *range(1, 50)):
        drawn = text(number)
        assert drawn == text(number)
        assert drawn.sent("seq-r-1") == made(drawn.size, chunking=chunking).sent("seq-r-1")


def test_the_size_of_a_message_is_decided_by_its_number_and_the_seed() -> None:
    for spec in ("1000-50000", "lognormal:8000:1.5", "table:1000=70,50000=30"):
        drawn = [[size_of(spec, seed)(number) for number in range(200)] for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert size_of(spec, 1)(150) == drawn[0][150], "whoever has the number needs no others"


def test_a_distribution_is_drawn_as_it_was_told() -> None:
    numbers = range(20_000)
    assert {size_of("table:10=1,20=0", 1)(number) for number in numbers} == {10}
    drawn = sorted(size_of("table:10=70,20=30", 1)(number) for number in numbers)
    assert drawn.count(20) == pytest.approx(6000, rel=0.1)
    assert {size_of("100-103", 1)(number) for number in numbers} == {100, 101, 102, 103}
    drawn = sorted(size_of("lognormal:8000:1.5", 1)(number) for number in numbers)
    assert drawn[10_000] == pytest.approx(8000, rel=0.1)
    assert drawn[16_827] == pytest.approx(8000 * math.e**1.5, rel=0.1), "one sigma above"
    assert len(set(drawn)) > 10_000, "sizes do not come again"


def test_a_text_has_a_largest_size() -> None:
    assert max(size_of("lognormal:1000000:2.2", 1)(number) for number in range(100_000)) <= 1 << 30
    for spec in ("1073741825", "1-1073741825", "table:1=1000,1073741825=1", "lognormal:8000:5", "lognormal:8000:1e300"):
        with pytest.raises(PlanError, match="at most 1,073,741,824 octets"):
            size_of(spec, 1)


@pytest.mark.parametrize(
    "spec",
    ["", "x", "-5", "10-", "lognormal:1", "lognormal:0:1", "lognormal:nan:1", "lognormal:1:inf", "lognormal:1:2:3",
     "table:", "table:x=1", "table:5", "table:5=0", "table:-5=1", "table:5=-1,6=2", "20-10"],
)  # fmt: skip
def test_a_size_that_is_none_is_refused(spec: str) -> None:
    with pytest.raises(PlanError, match="--size is"):
        size_of(spec, 1)


def test_a_folder_without_messages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no \.eml"):
        read_folder(tmp_path, chunking=False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("127.0.0.1:2525", "127.0.0.1:2525"),
        ("mx.example.org", "mx.example.org:25"),
        ("[::1]:26", "[::1]:26"),
        ("unix:/run/lmtp", "unix:/run/lmtp"),
    ],
)
def test_targets_are_read(text: str, told: str) -> None:
    assert str(Target.parse(text)) == told


@pytest.mark.parametrize("text", ["", ":25", "host:port", "host:0", "host:99999"])
def test_targets_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Target.parse(text)


def test_a_plan_that_does_not_fit_together_is_refused() -> None:
    for plan in (
        Plan(targets=[Target("x", 1)]),
        Plan(targets=[Target("x", 1)], messages=1, ca_file=Path("x")),
    ):
        with pytest.raises(PlanError):
            plan.check()
