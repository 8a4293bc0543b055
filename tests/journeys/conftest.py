"""Journeys talk to real peers. Those whose program is not installed are not collected, and the header says so.

With PENSTOCK_PEERS=required, as in .ci/run, a missing program is an error.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

PROGRAMS = {
    "test_swaks.py": ["swaks"],
    "test_postfix.py": ["postfix", "smtp-source"],
    "test_page.py": ["chromium", "chromedriver"],
    "test_gateway.py": ["smtp-source", "smtp-sink"],
    "test_sink_faults.py": ["postfix", "swaks"],
}
"""What a file of journeys needs from Debian's packages."""


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def missing(name: str) -> list[str]:
    """Return the programs a file needs and this machine has not."""
    found = [program for program in PROGRAMS.get(name, []) if _find(program) is None]
    if "postfix" in PROGRAMS.get(name, []) and os.geteuid() != 0:
        found.append("root (Postfix starts as nobody else)")
    return found


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what can not run here."""
    lacking = missing(collection_path.name)
    if lacking and os.environ.get("PENSTOCK_PEERS") == "required":
        raise pytest.UsageError(f"{collection_path.name} needs {', '.join(lacking)}")
    return True if lacking else None


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [
        f"not collected: journeys/{name}, for want of {', '.join(lacking)}"
        for name in PROGRAMS
        if (lacking := missing(name))
    ]
