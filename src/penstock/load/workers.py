"""`--workers N`: several processes that share one run.

Each process (penstock.forked) runs every N-th session and every N-th message of the schedule. Message numbers come from
one counter, so they have no gaps, however fast each process is. The parent adds up what the processes count
(penstock.load.counts).
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import IO, Any, Final

import trio

from penstock.forked import ABORT, END, Frame, WorkerLine, Workers
from penstock.load.counts import Counts, Interval
from penstock.load.generator import Generator
from penstock.load.plan import Plan, PlanError

_GO: Final = 1
"""Place of the number that starts the run."""


class LoadFrame(Frame):
    """What a worker tells the parent."""

    interval: dict[str, Any] | None = None
    report: dict[str, Any] | None = None
    """What it has counted so far (`Counts.as_report`), without a timeline."""
    warm_up: dict[str, Any] | None = None


class WorkerGroup:
    """A run of several processes. Made before trio runs, because it forks."""

    def __init__(self, plan: Plan, *, is_judged: bool = False) -> None:
        """Start the processes; with `is_judged`, `so_far` is asked. Raise PlanError, OSError."""
        plan.check()
        self.plan = plan
        self.counts = Counts()
        self.warm_up: Counts | None = None
        self.open_sessions = 0
        self.accepted = 0
        """Accepted messages so far."""
        self.failed = 0
        self._intervals: dict[int, Interval] = {}
        """Seconds that not all workers have reported yet, by number."""
        self._reported = dict.fromkeys(range(plan.workers), 0)
        """Seconds that each running worker has reported."""
        self._reports: dict[int, dict[int, dict[str, Any]]] = {}
        """What each worker had counted at the end of these seconds, if the run is judged."""
        self._final: dict[int, dict[str, Any]] = {}
        """What each worker that has ended has counted."""
        self._judged: Collection[dict[str, Any]] = ()
        """What the workers had counted at the end of the last second that all of them have reported."""
        with shared_counter() as counter:
            number = numbers(counter.fileno())

            def work(index: int, line: WorkerLine) -> Frame:
                return _work(replace(plan, worker=index), line, number, is_judged=is_judged)

            self._workers = Workers(plan.workers, work, LoadFrame, numbers=2)
        self.stop, self.abort, self.close = self._workers.stop, self._workers.abort, self._workers.close

    async def resolve(self) -> None:
        """Do nothing: each worker resolves the targets before it is ready."""
        await trio.lowlevel.checkpoint()

    async def run(self) -> Counts:
        """Run until all workers have ended, and return the sum of their counts. Raise WorkerError."""
        await self._workers.follow(self._take, self._start)
        for report in self._final.values():
            self.counts.add(report)
        rest = [self._intervals[number] for number in sorted(self._intervals)]
        for interval in rest:
            self.counts.timeline.append(interval, is_last=interval is rest[-1])
        return self.counts

    def so_far(self) -> dict[str, Any] | None:
        """Return what was counted until a second that all workers have reported; None before the first one."""
        counts = Counts()
        for report in self._judged:
            counts.add(report)
        return counts.as_report() if self._judged else None

    def _start(self) -> None:
        self.counts = Counts()
        self._workers.tell(_GO, 1)

    def _take(self, index: int, frame: LoadFrame) -> None:
        if frame.warm_up is not None:
            self.warm_up = self.warm_up or Counts()
            self.warm_up.add(frame.warm_up)
        if frame.interval is not None:
            self._add(index, Interval.from_dict(frame.interval), frame.report)
        if frame.is_last:
            assert frame.report is not None
            self._final[index] = frame.report
            del self._reported[index]
        self._complete()

    def _add(self, index: int, interval: Interval, report: dict[str, Any] | None) -> None:
        """Add a second of a worker."""
        number = self._reported[index]
        if report is not None:
            self._reports.setdefault(number, {})[index] = report
        self._reported[index] += 1
        self.accepted += interval.accepted
        self.failed += interval.failed
        if number in self._intervals:
            self._intervals[number].add(interval)
        else:
            self._intervals[number] = interval

    def _complete(self) -> None:
        """Move the seconds that all running workers have reported to the timeline."""
        behind = min(self._reported.values(), default=0)
        while self._intervals and (first := min(self._intervals)) < behind:
            interval = self._intervals.pop(first)
            self._judged = (self._final | self._reports.pop(first, {})).values()
            self.counts.timeline.append(interval)
            self.open_sessions = interval.sessions


# ---- in the worker


def shared_counter() -> IO[bytes]:
    """Return a file for `numbers()`. Raise OSError."""
    return tempfile.TemporaryFile()


def numbers(counter: int) -> Callable[[], int]:
    """Return a function that counts across all processes that inherited the descriptor of `shared_counter()`.

    They share the offset of one open file, to which lseek(2) adds atomically. That holds for a regular file only: Linux
    does not lock the offset of a memfd, and two processes would get the same number.
    """

    def following() -> int:
        return os.lseek(counter, 1, os.SEEK_CUR)

    return following


def _work(plan: Plan, line: WorkerLine, number: Callable[[], int], *, is_judged: bool) -> LoadFrame:
    """Be a worker: run a share of the plan and report to the parent."""
    # A terminal sends ^C, and SIGHUP when it closes, to all processes; the parent passes on what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        return trio.run(_run, plan, line, number, is_judged)
    except (PlanError, OSError) as exc:
        return LoadFrame(error=str(exc), is_usage=True)


async def _run(plan: Plan, line: WorkerLine, number: Callable[[], int], is_judged: bool) -> LoadFrame:
    async def on_interval(interval: Interval) -> None:
        report = _report_of(generator.counts) if is_judged else None
        await line.tell(LoadFrame(interval=interval.to_dict(), report=report))

    generator = Generator(plan, number=number, on_interval=on_interval)
    await generator.resolve()
    may_run = trio.Event()

    def end(wanted: int = ABORT) -> None:
        generator.abort() if wanted == ABORT else generator.stop()
        may_run.set()

    line.commands = {_GO: lambda _: may_run.set(), END: end}
    async with trio.open_nursery() as nursery:
        await nursery.start(line.follow, end)
        await may_run.wait()
        await generator.run()
        nursery.cancel_scope.cancel()
    interval, warm_up = generator.last_interval, generator.warm_up
    assert interval is not None
    return LoadFrame(
        is_last=True,
        report=_report_of(generator.counts),
        warm_up=None if warm_up is None else _report_of(warm_up),
        interval=interval.to_dict(),
    )


def _report_of(counts: Counts) -> dict[str, Any]:
    return counts.as_report() | {"timeline": []}
