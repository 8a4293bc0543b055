"""`penstock load --workers`: the numbers of the messages, and the sum of what the workers count."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from typing import Any

from penstock.load.counts import Counts
from penstock.load.plan import Plan
from penstock.load.workers import LoadFrame, WorkerGroup, shared_counter

DRAW = """
import sys
from penstock.load.workers import numbers
following = numbers(int(sys.argv[1]))
sys.stdin.readline()
print(*[following() for _ in range(50_000)])
"""


def test_processes_never_draw_the_same_number() -> None:
    with shared_counter() as counter:
        command = [sys.executable, "-c", DRAW, str(counter.fileno())]
        pipe = subprocess.PIPE
        processes = [
            subprocess.Popen(command, stdin=pipe, stdout=pipe, pass_fds=[counter.fileno()], text=True) for _ in range(3)
        ]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        drawn = [int(number) for process in processes for number in process.communicate(timeout=60)[0].split()]
    assert sorted(drawn) == list(range(1, 150_001))


class Reporting:
    """Counts as a worker does, and reports what it has counted."""

    def __init__(self) -> None:
        self.counts = Counts()

    def frame(self, accepted: int, *, is_last: bool = False) -> LoadFrame:
        """Accept messages for one second."""
        self.counts.accepted += accepted
        self.counts.ended = (self.counts.ended or self.counts.begun) + 1
        interval = self.counts.tick(1, is_last=True)
        return LoadFrame(
            report=self.counts.as_report() | {"timeline": []}, interval=interval.to_dict(), is_last=is_last
        )


def so_far(group: WorkerGroup) -> tuple[Any, ...] | None:
    found = group.so_far()
    return None if found is None else (found["accepted"], round(found["seconds"], 6), round(found["rate"], 6))


def test_a_run_is_judged_by_seconds_that_all_workers_have_reported() -> None:
    first, second = Reporting(), Reporting()
    with closing(WorkerGroup(Plan(targets=[], sessions=2, messages=9, workers=2), is_judged=True)) as group:
        group._take(0, first.frame(100))
        group._take(0, first.frame(100))
        assert so_far(group) is None
        group._take(1, second.frame(50))
        assert so_far(group) == (150, 1, 150), "the first worker is a second ahead"
        group._take(1, second.frame(50))
        assert so_far(group) == (300, 2, 150)
        group._take(0, first.frame(7, is_last=True))
        assert so_far(group) == (300, 2, 150)
        group._take(1, second.frame(50))
        group._take(1, second.frame(50))
        assert so_far(group) == (407, 4, 101.75), "what a worker that has ended has counted remains"
