"""The memory that all workers share: series, limits, mail."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from penstock.metrics._shared import BUCKETS, FIRST_OCTAVE, Page, Segment, SharedTable, bucket_bounds
from penstock.metrics.collect import Collector
from penstock.metrics.segment import attach_segment, private_segment, shared_segment

FAILURES = ord("f")


def started(segment: Segment) -> Page:
    page = segment.page(segment.claim())
    page.start(os.getpid())
    return page


def two_tables() -> tuple[Segment, SharedTable, SharedTable]:
    """Return a segment, and the tables of two workers."""
    segment = private_segment(2)
    return segment, SharedTable(started(segment)), SharedTable(started(segment))


def test_a_page_names_its_series() -> None:
    page = started(private_segment())
    cell = page.register("c", 'x_total{a="1"}')
    assert page.register("c", 'x_total{a="1"}') == cell
    page.add(cell)
    page.add(cell, 5)
    page.put(page.register("g", "y"), -3)
    page.observe(page.register("n", "z"), FIRST_OCTAVE["n"], 6)
    histogram = [0] * (BUCKETS + 1)
    histogram[bucket_bounds("n").index(8)] = 1
    histogram[BUCKETS] = 6
    assert page.series() == [("c", 'x_total{a="1"}', 6), ("g", "y", -3), ("n", "z", histogram)]


@pytest.mark.parametrize("kind", "son")
def test_a_value_is_in_the_bucket_of_its_bounds(kind: str) -> None:
    page = started(private_segment())
    bounds = bucket_bounds(kind)
    assert bounds == sorted(set(bounds)) and len(bounds) == BUCKETS - 1
    for place, bound in enumerate(bounds):
        cell = page.register(kind, f"h{place}")
        page.observe(cell, FIRST_OCTAVE[kind], bound - 1)
        page.observe(cell, FIRST_OCTAVE[kind], bound)
        counts = page.series()[place][2]
        assert isinstance(counts, list)
        assert counts[place : place + 2] == [1, 1]


def test_series_without_space_are_counted_nowhere() -> None:
    page = started(private_segment())
    cells = [page.register("c", f"x{number}") for number in range(10_000)]
    for cell in cells:
        page.add(cell)
    found = page.series()
    assert page.overflow == 10_000 - len(found) > 0
    assert all(value == 1 for _, _, value in found)


def test_sums_survive_the_death_of_a_worker_and_gauges_do_not() -> None:
    segment = private_segment(2)
    collector = Collector(segment)
    for _ in range(3):
        page = started(segment)
        page.add(page.register("c", "messages_accepted_total"), 10)
        page.put(page.register("g", "sessions"), 4)
        page.observe(page.register("s", "accept_seconds"), FIRST_OCTAVE["s"], 10_000)
        assert collector.sums()["g", "sessions"] == 4
        collector.retire(page.index)
    sums = collector.sums()
    assert sums["c", "messages_accepted_total"] == 30
    assert ("g", "sessions") not in sums
    assert sum(sums["s", "accept_seconds"][:BUCKETS]) == 3  # type: ignore[index]


def test_the_limit_of_a_network_counts_all_workers() -> None:
    _, one, two = two_tables()
    entered = [each.enter("192.0.2.1", 10, 1e9, 1000.0) for _ in range(5) for each in (one, two)]
    assert entered == [0] * 10
    assert [one.enter("192.0.2.1", 10, 1e9, 1000.0), two.enter("192.0.2.1", 10, 1e9, 1000.0)] == [1, 1]
    assert one.enter("192.0.2.2", 10, 1e9, 1000.0) == 0
    two.leave("192.0.2.1")
    assert [one.enter("192.0.2.1", 10, 1e9, 1000.0), one.enter("192.0.2.1", 10, 1e9, 1000.0)] == [0, 1]


def test_a_killed_worker_leaves_nothing_open() -> None:
    segment, one, two = two_tables()
    for _ in range(9):
        two.enter("192.0.2.1", 10, 1e9, 1000.0)
        two.count_total(1)
    one.enter("192.0.2.1", 10, 1e9, 1000.0)
    assert one.enter("192.0.2.1", 10, 1e9, 1000.0) == 1
    segment.free(1)
    assert (one.opened(ord("n"), "192.0.2.1"), one.total) == (1, 0)
    assert [one.enter("192.0.2.1", 10, 1e9, 1000.0) for _ in range(10)] == [0] * 9 + [1]


def test_what_a_killed_worker_has_counted_lately_still_counts() -> None:
    segment, one, two = two_tables()
    for _ in range(20):
        two.enter("192.0.2.1", 100, 20, 1000.0)
        two.leave("192.0.2.1")
    segment.free(1)
    again = SharedTable(started(segment))
    assert (one.enter("192.0.2.1", 100, 20, 1000.0), again.enter("192.0.2.1", 100, 20, 1000.0)) == (2, 2)
    assert one.enter("192.0.2.1", 100, 20, 1130.0) == 0


def test_events_leave_the_window_gradually() -> None:
    _, one, two = two_tables()
    for _ in range(10):
        one.happen(FAILURES, "alice", 1, 600, 599.0)
    assert two.count(FAILURES, "alice", 600, 599.5) == 10
    assert two.count(FAILURES, "alice", 600, 900.0) == pytest.approx(5)
    assert two.count(FAILURES, "alice", 600, 1200.0) == 0


def test_a_success_resets_the_counts_of_all_workers() -> None:
    _, one, two = two_tables()
    for now in (500.0, 700.0):
        for _ in range(3):
            one.happen(FAILURES, "alice", 1, 600, now)
            two.happen(FAILURES, "alice", 1, 600, now)
    two.forget(FAILURES, "alice", 600, 710.0)
    assert one.count(FAILURES, "alice", 600, 710.0) == two.count(FAILURES, "alice", 600, 1100.0) == 0
    one.happen(FAILURES, "alice", 1, 600, 711.0)
    assert two.count(FAILURES, "alice", 600, 711.0) == 1


def test_an_undone_failure_leaves_the_window_it_was_counted_in() -> None:
    _, one, _ = two_tables()
    one.happen(FAILURES, "alice", 1, 600, 599.0)
    one.happen(FAILURES, "alice", -1, 600, 601.0)
    assert one.count(FAILURES, "alice", 600, 601.0) == 0


def test_a_full_table_forgets_what_would_end_first_and_nothing_open() -> None:
    _, one, _ = two_tables()
    one.enter("192.0.2.1", 10, 1e9, 1000.0)
    for number in range(200_000):
        one.happen(FAILURES, str(number), 1, 60, 1000.0 + number / 1000)
    assert one.opened(ord("n"), "192.0.2.1") == 1
    kept = sum(one.count(FAILURES, str(number), 60, 1200.0) > 0 for number in range(199_000, 200_000))
    assert kept > 990


def test_workers_draw_from_one_bucket() -> None:
    _, one, two = two_tables()
    taken = [each.take("hop", 0.001, 4) for _ in range(3) for each in (one, two)]
    assert taken == [True] * 4 + [False] * 2
    assert two.available("hop", 0.001, 4) < 1
    assert two.available("other hop", 0.001, 4) == 4


def test_threads_and_processes_see_the_same_memory() -> None:
    segment, descriptor = shared_segment(2)
    page = started(segment)
    other = attach_segment(descriptor)
    cell = page.register("c", "x_total")

    def count() -> None:
        for _ in range(10_000):
            page.add(cell)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(count) for _ in range(4)]:
            done.result()
    assert other.page(page.index).series() == [("c", "x_total", 40_000)]
    assert other.in_use == [0]


def test_the_mailbox_takes_one_text_at_a_time() -> None:
    segment = private_segment()
    page = started(segment)
    assert page.receive() == b""
    assert (page.send(b"one"), page.send(b"two")) == (True, False)
    assert (page.receive(), page.receive()) == (b"one", b"")
    assert not page.send(b"x" * 262_145)
    assert page.send(b"x" * 262_144)
    assert len(page.receive()) == 262_144


def test_a_segment_refuses_pages_that_it_has_not() -> None:
    segment = private_segment(2)
    claimed = [segment.claim(), segment.claim()]
    assert claimed == [0, 1]
    with pytest.raises(ValueError, match="all 2 pages are in use"):
        segment.claim()
    with pytest.raises(ValueError, match="no page 2"):
        segment.page(2)
    with pytest.raises(ValueError, match="1 to 1024 pages"):
        private_segment(1025)
    with pytest.raises(ValueError, match="smaller"), suppress(IndexError):
        Segment(bytearray(b"\x05" + bytes(100_000)))
    page = segment.page(0)
    for call in (page.add, page.get):
        with pytest.raises(IndexError):
            call(8192)
