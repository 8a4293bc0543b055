"""The message numbers of `penstock load --workers`."""

from __future__ import annotations

import subprocess
import sys

from penstock.load.workers import shared_counter

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
