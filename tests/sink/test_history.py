"""The whole run in a bounded number of samples."""

from __future__ import annotations

import httpx
import pytest
import trio
import trio.testing

from penstock.metrics._session import Metrics
from penstock.sink.report import Sample
from penstock.sink.statistics import Statistics
from penstock.sink.web.app import make_app
from penstock.sink.web.history import MAX_POINTS, History, merge
from penstock.sink.web.serve import bind_web, serve_web
from tests.sink.test_statistics import Clock, receipts


def take(statistics: Statistics, clock: Clock, seconds: int, history: History | None = None) -> None:
    for _ in range(seconds):
        clock.now += 1
        statistics.take_sample()
        if history is not None:
            history.update()


@pytest.mark.parametrize("seconds", [1, MAX_POINTS - 1, MAX_POINTS, MAX_POINTS + 1, 5000])
def test_each_second_is_in_one_point(seconds: int) -> None:
    statistics, clock, _, _ = receipts(Metrics())
    history = History(statistics)
    take(statistics, clock, seconds, history)
    points = history.points
    assert len(points) <= MAX_POINTS
    assert sum(point.seconds for point in points) == seconds
    assert points[-1].at == seconds
    ends = [point.at for point in points]
    assert ends == sorted(set(ends))
    assert {point.seconds for point in points[:-1]} <= {history.span}


def test_a_reset_begins_a_new_run() -> None:
    statistics, clock, _, _ = receipts(Metrics())
    history = History(statistics)
    take(statistics, clock, 2000, history)
    statistics.reset()
    history.update()
    assert history.points == []
    take(statistics, clock, 3, history)
    assert ([point.at for point in history.points], history.span) == ([1, 2, 3], 1)


def test_counts_are_added_and_latencies_are_the_worst() -> None:
    def sample(at: float, messages: int, p99: int, codes: dict[str, int]) -> Sample:
        return Sample(
            at=at, seconds=1, messages=messages, replies=messages, sessions=messages, connected=1, received=2, octets=3,
            faults=4, codes=codes, p50=1, p90=2, p99=p99, max=p99, reply_p50=1, reply_p99=2,
        )  # fmt: skip

    merged = merge([sample(1, 5, 900, {"250": 1}), sample(2, 3, 100, {"250": 2, "450": 1})])
    assert (merged.at, merged.seconds, merged.messages, merged.sessions) == (2, 2, 8, 5)
    assert (merged.p99, merged.faults, merged.codes) == (900, 8, {"250": 3, "450": 1})


async def test_a_served_page_has_samples_that_the_statistics_have_dropped() -> None:
    statistics, clock, _, _ = receipts(Metrics())
    sockets = bind_web("127.0.0.1:0", None)
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_web, make_app(statistics), sockets)
            for _ in range(7):
                await trio.testing.wait_all_tasks_blocked()
                take(statistics, clock, 100)
            async with httpx.AsyncClient() as client:
                history = (await client.get(f"{url}/api/history")).json()
            nursery.cancel_scope.cancel()
    assert len(statistics.samples) == 600
    assert sum(each["seconds"] for each in history["samples"]) == 700
