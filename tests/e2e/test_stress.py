"""The short form of bench/stress.py: nothing leaks, whatever clients do."""

from __future__ import annotations

from pathlib import Path

import trio
from bench.stress import stress


def test_connections_that_come_break_and_go_leak_nothing(tmp_path: Path) -> None:
    report = trio.run(stress, tmp_path, 3.0, 40, 7)
    assert report.connections > 200
    assert report.delivered > 20
    assert report.leaks == {}
