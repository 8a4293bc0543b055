"""Statistics of several workers: the sum is what one process would have counted."""

from __future__ import annotations

import msgspec

from penstock.metrics._histogram import Histogram
from penstock.metrics._session import Metrics
from penstock.sink.merging import Merging, Second, WorkerReport
from penstock.sink.report import FaultCount, Sample
from penstock.sink.statistics import Expectation, Statistics


def counted(*tags: str, latencies: tuple[int, ...] = ()) -> Metrics:
    """Return metrics of one session for each tag."""
    metrics = Metrics()
    for tag in tags:
        metrics.new_session().ended("QUIT", 100)
        metrics.sequences.mark(tag)
    for ns in latencies:
        metrics.latency("MAIL").record(ns)
    metrics.turned_away(b"421 4.7.0 Too many\r\n")
    return metrics


def sample(at: float, messages: int, **codes: int) -> Sample:
    names = ("replies", "sessions", "connected", "received", "octets", "faults")
    return Sample(
        at=at, seconds=1.0, messages=messages, codes=codes, **dict.fromkeys(names, messages),
        **dict.fromkeys(("p50", "p90", "p99", "max", "reply_p50", "reply_p99"), 0),
    )  # fmt: skip


def second(at: float, *latencies: int, **codes: int) -> Second:
    histogram = Histogram()
    for ns in latencies:
        histogram.record(ns)
    return Second(sample(at, len(latencies), **codes), histogram.to_dict(), histogram.to_dict())


def test_metrics_of_two_workers_add_up_to_those_of_one() -> None:
    marks = [f"seq-run-{n}" for n in range(1, 200)]
    whole, first, other = counted(*marks, latencies=(1000, 2000, 3000)), counted(*marks[::2]), counted(*marks[1::2])
    first.latency("MAIL").record(1000)
    for ns in (2000, 3000):
        other.latency("MAIL").record(ns)
    merged = Metrics()
    for each in (first, other):
        merged.add(msgspec.msgpack.decode(msgspec.msgpack.encode(each.state()), strict=False))
    assert merged.latency("MAIL").to_dict() == whole.latency("MAIL").to_dict()
    assert (merged.sessions, merged.received) == (whole.sessions + 1, whole.received)
    assert merged.ends == {"QUIT": 199, "turned away": 2}
    assert merged.counted() == [("banner", 421, "4.7.0", None, 2)]
    run = merged.sequences.runs["run"]
    assert (run.received, run.distinct, run.duplicates) == (199, 199, 0)
    assert (run.lowest, run.highest, run.missing(1, 199, 10)) == (1, 199, (0, []))


def test_a_message_that_came_to_two_workers_is_a_duplicate() -> None:
    merged = Metrics()
    for each in (counted("seq-r-1", "seq-r-2", "seq-r-2", "nothing"), counted("seq-r-2", "seq-r-5000000")):
        merged.add(each.state())
    run = merged.sequences.runs["r"]
    assert (run.received, run.distinct, run.duplicates, sorted(run.examples)) == (5, 3, 2, [2, 2])
    assert run.highest == 5_000_000
    assert run.missing(1, 6, 10) == (4, [3, 4, 5, 6])
    assert merged.sequences.unmarked == 1


def test_a_second_is_complete_when_all_workers_have_reported_it() -> None:
    merging = Merging(2, None)
    assert merging.add_second(0, second(1.0, 1000, 2000, **{"250": 3})) == []
    assert merging.add_second(0, second(2.0, 5000)) == []
    (first,) = merging.add_second(1, second(1.1, 4000, **{"250": 1, "450": 2}))
    assert (first.at, first.messages, first.codes, first.max) == (1.1, 3, {"250": 4, "450": 2}, 4000)
    merging.add_report(1, WorkerReport({"messages": 1}))
    merging.add_report(0, WorkerReport({"messages": 4}, rest=second(2.5, 7000)))
    assert [each.messages for each in merging.samples] == [3, 1, 1]
    assert (merging.messages, dict(merging.counts)) == (5, {"messages": 5})


def test_the_report_has_the_faults_of_all_workers() -> None:
    metrics = Metrics()
    merging = Merging(2, metrics)
    fault = FaultCount(rule="magic", phase="rcpt", action="reply 450 4.2.2", count=2)
    statistics = Statistics(metrics, merging, faults=merging, expectation=Expectation(messages=2), listen=["x"])
    for number in range(2):
        merging.add_report(number, WorkerReport({}, counted(f"seq-r-{number + 1}").state(), [fault]))
    report = statistics.report()
    assert [(each.rule, each.count) for each in report.faults] == [("magic", 4)]
    assert [(run.received, run.missing) for run in report.sequences.runs] == [(2, 0)]
    assert report.messages.accepted == 0
    merging.reset()
    assert merging.counted() == []
