"""Statistics of several workers: the sum is what one process would have counted."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from penstock.forked import shared_numbers
from penstock.metrics._histogram import Histogram
from penstock.metrics._session import Metrics, SequenceTracker
from penstock.sink.kept import KeptMessage
from penstock.sink.merging import KeptCopy, Merging, Second, WorkerReport
from penstock.sink.messageids import MessageIdTracker
from penstock.sink.report import FaultCount, Sample
from penstock.sink.statistics import Expectation, Statistics


def counted(*tags: str, latencies: tuple[int, ...] = ()) -> Metrics:
    """Return metrics of one session for each tag."""
    metrics = Metrics(shared=shared_numbers(2))
    for tag in tags:
        metrics.new_session().ended("QUIT", 100)
        metrics.sequences.mark(tag)
    for ns in latencies:
        metrics.latency("MAIL").record(ns)
    metrics.count_refused_connection(b"421 4.7.0 Too many\r\n")
    return metrics


def sent(value: Any) -> Any:
    """Return a value as the parent receives it."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), strict=False)


def report_of(metrics: Metrics) -> dict[str, Any]:
    """Return what a worker reports of its metrics."""
    return {"metrics": metrics.state(), "tags": metrics.sequences.take_changes()}


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
        merged.add(sent(each.state()))
        merged.sequences.add(sent(each.sequences.take_changes()))
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
        merged.sequences.add(each.sequences.take_changes())
    run = merged.sequences.runs["r"]
    assert (run.received, run.distinct, run.duplicates, sorted(run.examples)) == (5, 3, 2, [2, 2])
    assert run.highest == 5_000_000
    assert run.missing(1, 6, 10) == (4, [3, 4, 5, 6])
    assert merged.sequences.unmarked == 1


def test_a_second_is_complete_when_all_workers_have_reported_it() -> None:
    merging = Merging(2)
    assert merging.add_second(0, second(1.0, 1000, 2000, **{"250": 3})) == []
    assert merging.add_second(0, second(2.0, 5000)) == []
    (first,) = merging.add_second(1, second(1.1, 4000, **{"250": 1, "450": 2}))
    assert (first.at, first.messages, first.codes, first.max) == (1.1, 3, {"250": 4, "450": 2}, 4000)
    rest = merging.add_report(1, WorkerReport({"messages": 1}))
    rest += merging.add_report(0, WorkerReport({"messages": 4}, rest=second(2.5, 7000)))
    assert [each.messages for each in rest] == [1, 1]
    assert (merging.messages, dict(merging.counts)) == (5, {"messages": 5})


def test_the_report_has_the_faults_of_all_workers() -> None:
    merging = Merging(2)
    fault = FaultCount(rule="magic", phase="rcpt", action="reply 450 4.2.2", count=2)
    for number in range(2):
        merging.add_report(number, WorkerReport({}, **report_of(counted(f"seq-r-{number + 1}")), faults=[fault]))
    expectation = Expectation(messages=2)
    report = Statistics(merging.metrics(), merging, faults=merging, expectation=expectation, listen=["x"]).report()
    assert [(each.rule, each.count) for each in report.faults] == [("magic", 4)]
    assert [(run.received, run.missing) for run in report.sequences.runs] == [(2, 0)]
    assert report.messages.accepted == 0


def test_a_reset_forgets_what_workers_counted_before_they_heard_of_it() -> None:
    heard: list[str] = []
    ids = MessageIdTracker()
    merging = Merging(1, ids, lambda: heard.append("reset"))
    old, new = (
        msgspec.structs.replace(second(1.0, 1000), generation=generation, **report_of(counted(tag)), message_ids=[tag])
        for generation, tag in ((0, "seq-old-1"), (1, "seq-new-1"))
    )
    assert len(merging.add_second(0, old)) == 1
    merging.reset()
    ids.reset()
    assert (heard, merging.metrics().sessions) == (["reset"], 0)
    assert merging.add_second(0, old) == []
    assert len(merging.add_second(0, new)) == 1
    assert list(merging.metrics().sequences.runs) == ["new"]
    assert (ids.distinct, merging.messages) == (1, 1)


def test_the_report_of_a_worker_that_did_not_hear_of_a_reset_is_dropped() -> None:
    merging = Merging(1)
    merging.reset()
    fault = FaultCount(rule="magic", phase="rcpt", action="reply 450 4.2.2", count=2)
    merging.add_report(
        0, WorkerReport({"messages": 1}, **report_of(counted("seq-r-1")), faults=[fault], rest=second(1.0, 1000))
    )
    assert (merging.metrics().sessions, list(merging.counted())) == (0, [])
    assert merging.counts["messages"] == 1


def test_a_kept_message_comes_to_the_parent_as_it_is() -> None:
    message = KeptMessage("M1", 1.5, "j\udcfcrgen@x", ("b@x", "m\u00fcller@x"), 9, b"text", is_cut=True)
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(KeptCopy.of(message)), type=KeptCopy)
    assert copy.message() == message


def test_only_new_sequence_tags_are_sent() -> None:
    metrics, merging = counted("seq-r-1", "seq-r-1", "seq-r-40000", "nothing"), Merging(1)
    sizes = []
    for tags in ((), (), ("seq-r-2", "seq-r-1")):
        for tag in tags:
            metrics.sequences.mark(tag)
        report = sent(report_of(metrics))
        sizes.append([len(run["pages"]) for run in report["tags"]["runs"]])
        merging.add_second(0, msgspec.structs.replace(second(1.0, 1000), **report))
    run, mine = merging.metrics().sequences.runs["r"], metrics.sequences.runs["r"]
    assert sizes == [[2], [], [1]]
    assert (run.received, run.distinct, run.duplicates, run.out_of_order) == (5, 3, 2, 1)
    assert (mine.received, mine.distinct, mine.duplicates, mine.out_of_order) == (5, 3, 2, 1)
    assert (run.lowest, run.highest, run.examples) == (1, 40_000, [1, 1])
    assert merging.metrics().sequences.unmarked == 1


def test_only_shared_metrics_track_the_changes_of_their_tags() -> None:
    for metrics in (Metrics(), Metrics(sequences=SequenceTracker())):
        metrics.sequences.mark("seq-r-1")
        with pytest.raises(RuntimeError, match="shared counters"):
            metrics.sequences.take_changes()


def test_a_run_beyond_the_limit_of_runs_is_counted_as_such() -> None:
    merged = Metrics()
    for number in range(65):
        merged.sequences.add(counted(f"seq-r{number}-1", f"seq-r{number}-2").sequences.take_changes())
    assert (len(merged.sequences.runs), merged.sequences.further) == (64, 2)


def test_the_peak_of_sessions_is_that_of_all_workers_together() -> None:
    shared = shared_numbers(2)
    one, other = Metrics(shared=shared), Metrics(shared=shared)
    for metrics in (one, other, one):
        opened = [each.new_session() for each in (metrics, other)]
        for session in opened:
            session.ended("QUIT", 0)
    left = other.new_session()
    merged = Metrics()
    for metrics in (one, other):
        merged.add(metrics.state())
    assert (merged.sessions, merged.open_sessions, merged.peak_sessions) == (7, 1, 2)
    for metrics in (one, other):
        metrics.reset()
    assert (one.peak_sessions, other.peak_sessions) == (1, 1)
    left.ended("QUIT", 0)


def test_missing_numbers_are_counted_without_a_walk_over_all() -> None:
    found = Metrics().sequences
    for number in (*range(1, 1000), 1001, 400_000_000):
        found.note("r", number)
    run = found.runs["r"]
    assert run.missing(1, 400_000_000, 3) == (399_999_000 - 1, [1000, 1002, 1003])
    assert run.missing(1, 1002, 9) == (2, [1000, 1002])
    assert run.missing(5, 999, 9) == (0, [])
    assert run.missing(0, 64, 9) == (1, [0])
    assert run.missing(400_000_000, 400_000_003, 9) == (3, [400_000_001, 400_000_002, 400_000_003])
    assert run.missing(1, 10**12, 1) == (10**12 - 1001, [1000])
