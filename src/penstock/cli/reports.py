"""The files of reports: known to be possible before the run, and written whole or not at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import click

STDOUT: Final = Path("-")


def check_place(file: Path) -> None:
    """Raise click.UsageError where no file can be written: better before a run of an hour than behind it."""
    folder = file.parent
    if file != STDOUT and not (folder.is_dir() and os.access(file if file.exists() else folder, os.W_OK)):
        raise click.UsageError(f"{file} can not be written")


def write(file: Path, data: bytes) -> None:
    """Write a report; - is standard output. Raise click.ClickException, and leave what was there as it was."""
    try:
        if file == STDOUT:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        elif file.exists() and not file.is_file():  # a pipe or a terminal
            file.write_bytes(data)
        else:
            _write_whole(file.resolve(), data)
    except OSError as exc:
        raise click.ClickException(f"{file}: {exc.strerror}") from exc


def _write_whole(file: Path, data: bytes) -> None:
    """Put a file into its place when all of it is there."""
    new = file.with_name(f".{file.name}.new")
    try:
        new.write_bytes(data)
        new.replace(file)
    except OSError:
        new.unlink(missing_ok=True)
        raise
