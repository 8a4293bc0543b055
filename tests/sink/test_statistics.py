"""Samples, the report, sequence tags in recipients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from penstock.message import NULL_PATH, Path, Recipient
from penstock.metrics._session import Metrics
from penstock.sequence import Mark
from penstock.sink.report import FaultCount, Report, decode, encode, json_schema
from penstock.sink.statistics import Expectation, RecipientMarks, Statistics
from penstock.transaction import Peer, Transaction


class Traffic:
    octets_under_way = 0


class Faults:
    def __init__(self) -> None:
        self.count = 0

    def counted(self) -> Sequence[FaultCount]:
        return [FaultCount(rule="busy", phase="rcpt", action="reply 450 4.2.1", count=self.count)]

    def reset(self) -> None:
        self.count = 0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def receipts(metrics: Metrics, expected: int | None = None) -> tuple[Statistics, Clock, Faults, Traffic]:
    clock, faults, traffic = Clock(), Faults(), Traffic()
    made = Statistics(
        metrics,
        traffic,
        faults=faults,
        expectation=Expectation("sender", expected),
        listen=["127.0.0.1:25"],
        clock=clock,
    )
    return made, clock, faults, traffic


def test_a_sample_is_the_difference_to_the_last_one() -> None:
    metrics = Metrics()
    made, clock, faults, traffic = receipts(metrics)
    metrics.count_refused_connection(b"421 4.3.2 Too many\r\n")
    faults.count = 3
    traffic.octets_under_way = 50
    clock.now += 1
    first = made.take_sample()
    assert (first.at, first.seconds, first.connected, first.faults, first.received) == (1, 1, 1, 3, 50)
    assert first.codes == {"421": 1}
    metrics.count_refused_connection(b"421 4.3.2 Too many\r\n")
    metrics.count_refused_connection(b"421 4.3.2 Too many\r\n")
    clock.now += 2
    second = made.take_sample()
    assert (second.at, second.seconds, second.connected, second.faults, second.received) == (3, 2, 2, 0, 0)
    assert second.codes == {"421": 2}
    assert list(made.samples) == [first, second]


def test_only_ten_minutes_of_samples_are_kept() -> None:
    made, clock, _, _ = receipts(Metrics())
    for _ in range(700):
        clock.now += 1
        made.take_sample()
    assert len(made.samples) == 600
    assert made.taken == 700
    assert made.samples[-1].at == 700


def test_a_reset_restarts_octets_of_open_connections() -> None:
    metrics = Metrics()
    made, clock, faults, traffic = receipts(metrics)
    session = metrics.new_session()
    traffic.octets_under_way = 100
    faults.count = 2
    clock.now += 1
    made.take_sample()
    made.reset()
    assert (made.received, faults.count, made.generation, len(made.samples)) == (0, 0, 1, 0)
    traffic.octets_under_way = 130
    assert made.received == 30
    traffic.octets_under_way = 0
    session.ended("QUIT", 130)
    assert made.received == 30
    assert made.report().sessions.open == 0


def test_a_report_survives_encoding() -> None:
    metrics = Metrics()
    metrics.count_refused_connection(b"421 4.3.2 Too many\r\n")
    made, clock, _, _ = receipts(metrics)
    clock.now += 1
    made.take_sample()
    report = made.report()
    assert decode(encode(report)) == report
    assert report.replies[0].phase == "banner"
    assert report.faults[0].rule == "busy"
    assert report.made_by.startswith("penstock ")
    assert made.report(is_full=False).samples == []


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", "not a report"), (b"{}", "not a report"), (b'{"schema":"other"}', "not a report")],
)
def test_other_json_is_not_a_report(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        decode(data)


def test_a_report_of_another_version_is_refused() -> None:
    report = receipts(Metrics())[0].report()
    other = encode(report).replace(b'"version": 1', b'"version": 2')
    with pytest.raises(ValueError, match="version 2"):
        decode(other)


def test_the_schema_describes_every_key_of_the_report() -> None:
    text = json_schema().decode()
    for name in Report.__struct_fields__:
        assert f'"{name}"' in text


def test_missing_is_counted_up_to_what_was_expected() -> None:
    metrics = Metrics()
    for number in (1, 2, 4, 4):
        metrics.sequences.note("a", number)
    run = receipts(metrics)[0].report().sequences.runs[0]
    assert (run.first, run.missing, run.missing_examples, run.duplicates, run.duplicate_examples) == (1, 1, [3], 1, [4])
    run = receipts(metrics, expected=6)[0].report().sequences.runs[0]
    assert (run.missing, run.missing_examples) == (3, [3, 5, 6])


def test_a_run_with_number_zero_starts_there() -> None:
    metrics = Metrics()
    for number in (0, 1, 2):
        metrics.sequences.note("a", number)
    run = receipts(metrics, expected=3)[0].report().sequences.runs[0]
    assert (run.first, run.missing) == (0, 0)


def transaction_to(*recipients: str) -> Transaction:
    made = Transaction(Peer("192.0.2.1", 1), "x")
    made.sender = NULL_PATH
    for text in recipients:
        local, _, domain = text.partition("@")
        made.recipients.append(Recipient(Path(text, local, domain)))
    return made


def test_a_pattern_finds_the_tag_in_a_recipient() -> None:
    marks = RecipientMarks(r"(?P<run>[a-z]+)-(?P<number>\d+)@")
    assert marks(transaction_to("x@example.org", "load-17@example.org")) == Mark("load", 17)
    assert marks(transaction_to("x@example.org")) is None
    assert RecipientMarks(r"^u([0-9]+)@")(transaction_to("u5@example.org")) == Mark("", 5)
    assert RecipientMarks(r"(?P<run>[a-z]+)([0-9]+)@")(transaction_to("u5@example.org")) == Mark("u", 5)


@pytest.mark.parametrize("pattern", ["(", "[0-9]+"])
def test_an_unusable_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError):
        RecipientMarks(pattern)
