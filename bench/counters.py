"""The cost of counters and limits in shared memory: one process, and two that write at the same time.

python -m bench.counters [--rounds 5]

Bounds: a counter 60 ns, enter and leave of a network 300 ns with 2 writers. A call from Python is part of all figures.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.synchronize
import statistics
import time
from collections.abc import Callable

from bench.measure import machine
from penstock.metrics._shared import FIRST_OCTAVE, Page, Segment, SharedTable
from penstock.metrics.segment import shared_segment

_CALLS = 200_000
_NETWORKS = [f"10.{number >> 8}.{number & 255}.1" for number in range(1024)]


def count(page: Page) -> None:
    """Add to a counter."""
    cell, add = page.register("c", "bench_total"), page.add
    for _ in range(_CALLS):
        add(cell)


def observe(page: Page) -> None:
    """Add to a histogram."""
    cell, add, first = page.register("s", "bench_seconds"), page.observe, FIRST_OCTAVE["s"]
    for _ in range(_CALLS):
        add(cell, first, 1_234_567)


def same_network(page: Page) -> None:
    """Enter and leave one network."""
    _enter(page, _NETWORKS[:1])


def networks(page: Page) -> None:
    """Enter and leave 1,024 networks in turn."""
    _enter(page, _NETWORKS)


def _enter(page: Page, keys: list[str]) -> None:
    table, now = SharedTable(page), time.monotonic()
    enter, leave = table.enter, table.leave
    for _ in range(_CALLS // len(keys)):
        for key in keys:
            enter(key, 1000, 1e9, now)
            leave(key)


CASES: dict[str, Callable[[Page], None]] = {
    "counter": count,
    "histogram": observe,
    "enter + leave, same network": same_network,
    "enter + leave, 1,024 networks": networks,
}


def _cpu_of(work: Callable[[Page], None], page: Page) -> float:
    """Return the nanoseconds of CPU of a call: others use the machine as well."""
    began = time.process_time()
    work(page)
    return (time.process_time() - began) / _CALLS * 1e9


def _in_process(
    work: Callable[[Page], None],
    segment: Segment,
    index: int,
    start: multiprocessing.synchronize.Barrier,
    results: multiprocessing.SimpleQueue[float],
) -> None:
    page = segment.page(index)
    page.start(index + 1)
    start.wait()
    results.put(_cpu_of(work, page))


def measure(work: Callable[[Page], None], writers: int) -> float:
    """Return the nanoseconds of a call, the slowest of the writers."""
    context = multiprocessing.get_context("fork")
    segment, _ = shared_segment(2)
    start = context.Barrier(writers)
    results: multiprocessing.SimpleQueue[float] = context.SimpleQueue()
    pages = [segment.claim() for _ in range(writers)]
    processes = [context.Process(target=_in_process, args=(work, segment, page, start, results)) for page in pages]
    for process in processes:
        process.start()
    found: list[float] = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return max(found)


def main() -> None:
    """Print medians of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{machine()}; nanoseconds of CPU of a call")
    print(f"{'':32}{'1 writer':>10}{'2 writers':>11}")
    for name, work in CASES.items():
        one, two = (statistics.median(measure(work, writers) for _ in range(rounds)) for writers in (1, 2))
        print(f"{name:32}{one:10.0f}{two:11.0f}")


if __name__ == "__main__":
    main()
