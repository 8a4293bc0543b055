"""Snapshots: the text and the HTML of a message in files beside the test, to be compared in later runs."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from penstock.testing.inbox import ReceivedMessage

FOLDER: Final = "__snapshots__"
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.-]+")
_MAX_NAME: Final = 100
_MAX_DIFF: Final = 200
"""Lines of a difference that are shown."""


class Snapshots:
    """The snapshots of one test: the fixture `smtp_snapshot`. Call it with a message."""

    def __init__(self, file: Path, test: str, *, update: bool) -> None:
        """`file` and `test` are the test's file and name. With `update`, write files rather than compare."""
        self._folder = file.parent / FOLDER / file.stem
        self._test = test
        self._update = update
        self._used: dict[str, int] = {}

    def __call__(self, message: ReceivedMessage, name: str = "", *, replace: Mapping[str, str] | None = None) -> None:
        """Compare the text and the HTML of a message with the snapshot, NAME.txt and NAME.html.

        `name` tells several snapshots of a test apart; without one they are numbered. `replace` maps regular
        expressions to what is written in place of a match: dates, tokens and ids that differ from run to run. Raise
        AssertionError with the difference, or if there is no snapshot yet.
        """
        stem = _file_name(f"{self._test}-{name}" if name else self._test)
        self._used[stem] = count = self._used.get(stem, 0) + 1
        if count > 1:
            stem += f".{count}"
        for suffix, text in ((".txt", message.text), (".html", message.html)):
            for pattern, replacement in (replace or {}).items():
                text = re.sub(pattern, replacement, text)  # noqa: PLW2901 - one after the other
            self._check(self._folder / (stem + suffix), text)

    def _check(self, file: Path, text: str) -> None:
        """Compare a text with a file; no text is no file."""
        if self._update:
            if text:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8", newline="\n")
            else:
                file.unlink(missing_ok=True)
            return
        known = file.read_text(encoding="utf-8") if file.exists() else ""
        if known == text:
            return
        how = "to accept the new text, run pytest with --smtp-snapshot-update"
        if not file.exists():
            raise AssertionError(f"there is no snapshot {file}; {how}")
        lines = difflib.unified_diff(known.splitlines(), text.splitlines(), str(file), "received", lineterm="")
        shown = [line for line, _ in zip(lines, range(_MAX_DIFF), strict=False)]
        raise AssertionError("\n".join([f"the message differs from its snapshot; {how}", *shown]))


def _file_name(text: str) -> str:
    """Return a file name for a test; a digest tells names apart that would become the same."""
    safe = _UNSAFE.sub("_", text)
    if safe == text and len(safe) <= _MAX_NAME:
        return safe
    return f"{safe[:_MAX_NAME]}-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:8]}"
