"""The messages: their sizes, their dots, their marks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from penstock.load.plan import Plan, PlanError, Target
from penstock.load.texts import all_texts, made, read_folder, sizes


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


def test_a_distribution_is_drawn_the_same_for_the_same_seed() -> None:
    for spec in ("1000-50000", "lognormal:8000:1.5", "table:1000=70,50000=30"):
        drawn = [[text.size for text in all_texts(spec, None, seed, chunking=False)] for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
    assert set(sizes("table:10=1,20=0", random.Random(1))) == {10}
    assert min(sizes("100-110", random.Random(1))) >= 100


@pytest.mark.parametrize("spec", ["", "x", "-5", "10-", "lognormal:1", "table:", "table:x=1", "99999999999", "20-10"])
def test_a_size_that_is_none_is_refused(spec: str) -> None:
    with pytest.raises(PlanError, match="--size"):
        sizes(spec, random.Random(1))


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
