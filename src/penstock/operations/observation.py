"""The shared memory of a server, and what is read from it: one `Observation` in the supervisor or the only process.

    observation = Observation(settings, workers=2)
    page = observation.claim()          a worker is about to start; it inherits `observation.descriptor`
    observation.ended(page)             it has ended: its counts are kept, what it had open is gone

A worker: `counters = start_counting(attach_segment(descriptor), page)`, then `keep_reporting` in its loop.
"""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from penstock import __version__
from penstock.app import Server
from penstock.config import Settings
from penstock.control import Control
from penstock.metrics._shared import Segment
from penstock.metrics.collect import Collector, Sums
from penstock.metrics.counters import Counters
from penstock.metrics.exposition import render
from penstock.metrics.families import series
from penstock.metrics.segment import pages_for, private_segment, shared_segment
from penstock.operations.depth import SpoolDepth
from penstock.privileges import Account
from penstock.spool.spool import Spool

_INTERVAL: Final = 1.0
"""Seconds between two reports of a worker."""
_MOST_WORKERS: Final = 64
"""Workers for which there is memory, unless the server is started with more."""
_PAGE_OCTETS: Final = resource.getpagesize()
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class Observation:
    """The counters of all workers of a server."""

    def __init__(self, settings: Settings, *, workers: int = 0, account: Account | None = None) -> None:
        """With `workers` they are processes of their own; 0 is a server of one process. Raise OSError.

        `account` is that of the workers, if it is not that of this process: the state directory belongs to it.
        """
        self.account = account
        self.descriptor: int | None = None
        """Of the segment, for workers to inherit; `close` closes it."""
        self.most_workers: Final = max(workers, _MOST_WORKERS)
        """Workers that there may be after a reload."""
        if workers:
            self.segment, self.descriptor = shared_segment(pages_for(self.most_workers))
        else:
            self.segment = private_segment()
        self.collector = Collector(self.segment, destinations=settings.metrics.destinations)
        self.depth = SpoolDepth(settings, account) if settings.delivery.has_relay else None
        self._started = time.time()

    def close(self) -> None:
        """Close the descriptor."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    @property
    def inherited(self) -> int:
        """The descriptor that workers inherit."""
        assert self.descriptor is not None, "a server of one process"
        return self.descriptor

    def claim(self) -> int:
        """Return the page of a worker that is about to start. Raise ValueError when all are in use."""
        return self.segment.claim()

    @contextmanager
    def claimed(self) -> Iterator[int]:
        """Yield the page of a worker that is started in the block; if that fails, it is free again."""
        page = self.claim()
        try:
            yield page
        except BaseException:
            self.segment.free(page)
            raise

    def ended(self, page: int) -> None:
        """Keep what a worker has counted that has ended, and count out what it had open."""
        self.collector.retire(page)

    async def run(self) -> None:
        """Take the reports of the workers once a second, until cancelled."""
        while True:
            self.collector.update()
            await trio.sleep(_INTERVAL)

    async def sums(self, control: Control) -> Sums:
        """Return all series."""
        found = self.collector.sums()
        if self.depth is not None:
            found.update(await self.depth.series(self.collector.most))
        counters = control.counters
        for result, count in counters.reloads.items():
            found["c", series("reload_total", {"result": result})] = count
        for reason, count in counters.restarts.items():
            found["c", series("worker_restarts_total", {"reason": reason})] = count
        found["g", "reload_last_success_seconds"] = int(counters.last_reload_success)
        found["g", "workers"] = len(self.segment.in_use)
        found["g", "draining"] = 0 if control.is_ready else 1
        labels = {"version": __version__, "python": platform.python_version()}
        found["g", series("build_info", labels)] = 1
        return found

    def by_process(self) -> dict[str, dict[str, int | list[int]]]:
        """Return the series of each worker, by its process id."""
        found = {}
        for index in self.segment.in_use:
            values = {name: value for (_, name), value in self.collector.of_page(index).items()}
            found[str(self.segment.page(index).pid)] = values
        return found

    async def text(self, control: Control) -> str:
        """Return all metrics in the text format of Prometheus."""
        pids = [os.getpid(), *(self.segment.page(index).pid for index in self.segment.in_use)]
        process = {**process_values(set(pids)), "process_start_time_seconds": round(self._started, 3)}
        return render(await self.sums(control), process)


def start_counting(segment: Segment, page: int) -> Counters:
    """Return the counters of a worker, which is this process."""
    own = segment.page(page)
    own.start(os.getpid())
    return Counters(own)


async def keep_reporting(server: Server, counters: Counters) -> None:
    """Set the gauges of a worker, and report to the supervisor, once a second until cancelled."""
    while True:
        report(server, counters)
        await trio.sleep(_INTERVAL)


def report(server: Server, counters: Counters) -> None:
    """Set the gauges of a worker, and report to the supervisor."""
    budget = {id(bound.listener.budget): bound.listener.budget.used for bound in server.listeners}
    counters.set("body_memory_octets", sum(budget.values()))
    for bound in server.listeners:
        if bound.listener.certificate_not_after:
            name, ends = bound.listener.name, bound.listener.certificate_not_after
            counters.set("tls_certificate_not_after_seconds", ends, listener=name)
    hops: dict[str, tuple[int, int]] = {}
    if server.gateway is not None:
        if isinstance(server.gateway.spool, Spool):
            counters.set("spool_waiting", server.gateway.spool.waiting)
        hops = server.gateway.pool.hop_states()
    counters.report(hops)


def process_values(pids: Iterable[int]) -> dict[str, float]:
    """Return the sums over processes that Prometheus calls process_*. A process that has ended counts nothing."""
    cpu, resident, virtual, descriptors = 0.0, 0, 0, 0
    for pid in pids:
        with suppress(OSError, IndexError, ValueError):
            place = Path(f"/proc/{pid}")
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            cpu += (int(fields[11]) + int(fields[12])) / _TICKS
            virtual += int(fields[20])
            resident += int(fields[21]) * _PAGE_OCTETS
            descriptors += sum(1 for _ in (place / "fd").iterdir())
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "process_cpu_seconds_total": round(cpu, 2),
        "process_resident_memory_bytes": resident,
        "process_virtual_memory_bytes": virtual,
        "process_open_fds": descriptors,
        "process_max_fds": limit,
    }
