"""The short form of the sink's fuzzer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.faults import one


@pytest.mark.parametrize("seed", range(0, 120, 20))
def test_the_invariants_hold_for_random_plans_and_dialogs(seed: int, tmp_path: Path) -> None:
    for each in range(seed, seed + 20):
        one(each, tmp_path)
