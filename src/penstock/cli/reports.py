"""Report files: checked before the run, and written completely or not at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import click

from penstock.files import write_atomically

STDOUT: Final = Path("-")


def check_place(file: Path) -> None:
    """Raise click.UsageError if the file cannot be written: better before a run of an hour than after it."""
    folder = file.parent
    if file != STDOUT and not (folder.is_dir() and os.access(file if file.exists() else folder, os.W_OK)):
        raise click.UsageError(f"{file} cannot be written")


def write(file: Path, data: bytes) -> None:
    """Write a report; - is standard output. Raise click.ClickException; an existing file then stays as it was."""
    try:
        if file == STDOUT:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        elif file.exists() and not file.is_file():  # a pipe or a terminal
            file.write_bytes(data)
        else:
            write_atomically(file.resolve(), data, mode=None)
    except OSError as exc:
        raise click.ClickException(f"{file}: {exc.strerror}") from exc
