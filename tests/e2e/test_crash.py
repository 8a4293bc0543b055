"""What was answered with 250 arrives, whatever is killed, filled up, broken or cut: the short form of bench.crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bench.crash import SCENARIOS, run

PLAYED = [name for name in SCENARIOS if name != "full" or os.geteuid() == 0]
"""Filling a disk up needs a file system of its own, and mounting one needs root."""


@pytest.mark.parametrize("scenario", PLAYED)
def test_no_harm_loses_or_damages_mail(tmp_path: Path, scenario: str) -> None:
    assert run(scenario, 2, 7, tmp_path) == []
