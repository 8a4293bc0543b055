"""Writes batches of messages into Maildirs while system calls fail: a program for a process of its own.

`run` builds a library for LD_PRELOAD and starts the program, which executes all cases and prints what became of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penstock.delivery.maildirfiles import Copy, MaildirFiles
from tests.contracts.delivery import make_message

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* FAILING is "call:errno first last": these calls of a function fail, counted from 0. Setting it starts anew. */
static int fails(const char *call)
{
    static char before[64];
    static int count;
    char name[32];
    int number, first, last, at;
    const char *plan = getenv("FAILING");
    if (plan == NULL || sscanf(plan, "%31[^:]:%d %d %d", name, &number, &first, &last) != 4)
        return 0;
    if (strcmp(plan, before) != 0) {
        snprintf(before, sizeof before, "%s", plan);
        count = 0;
    }
    if (strcmp(name, call) != 0)
        return 0;
    at = count++;
    if (at < first || at > last)
        return 0;
    errno = number;
    return 1;
}

#define REAL(name) static int (*real)(); if (!real) real = (int (*)()) dlsym(RTLD_NEXT, name)

ssize_t writev(int fd, const struct iovec *pieces, int count)
{
    static ssize_t (*real)();
    if (!real) real = (ssize_t (*)()) dlsym(RTLD_NEXT, "writev");
    return fails("writev") ? -1 : real(fd, pieces, count);
}
static int open_with(const char *name, const char *path, int flags, int mode)
{
    int (*real)() = (int (*)()) dlsym(RTLD_NEXT, name);
    return (flags & O_DIRECTORY) && fails("open a folder") ? -1 : real(path, flags, mode);
}
#define MODE(after) va_list list; int mode; va_start(list, after); mode = va_arg(list, int); va_end(list)
int open(const char *path, int flags, ...) { MODE(flags); return open_with("open", path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags); return open_with("open64", path, flags, mode); }
int fsync(int fd) { REAL("fsync"); return fails("fsync") ? -1 : real(fd); }
int fdatasync(int fd) { REAL("fdatasync"); return fails("fdatasync") ? -1 : real(fd); }
int syncfs(int fd)
{
    REAL("syncfs");
    /* Without a plan for it, it says that it failed: then each file is synced. */
    return fails("syncfs") || getenv("WITHOUT_SYNCFS") ? -1 : real(fd);
}
int renameat(int from, const char *name, int to, const char *new_name)
{
    REAL("renameat");
    return fails("renameat") ? -1 : real(from, name, to, new_name);
}
"""


@dataclass(frozen=True)
class Case:
    """A batch, and the calls that fail: the name, the error, and the first and last failing call."""

    failing: tuple[str, int, int, int] | None
    messages: int = 6
    folders: int = 1
    """Folders of each message."""
    without_syncfs: bool = False


@dataclass(frozen=True)
class Ended:
    """What became of a batch."""

    errors: list[int]
    """The error of each message, 0 without one."""
    new: int
    """Files in `new`, and..."""
    tmp: int
    """...left in `tmp`."""


def run(cases: dict[str, Case], scratch: Path) -> dict[str, Ended]:
    """Execute cases in a process whose system calls fail."""
    source, library = scratch / "failing.c", scratch / "failing.so"
    source.write_text(_SOURCE)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", str(library), str(source), "-ldl"], check=True)
    words = json.dumps({name: asdict(case) for name, case in cases.items()})
    done = subprocess.run(
        [sys.executable, "-m", "tests.delivery.failing", str(scratch)],
        input=words,
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return {name: Ended(**ended) for name, ended in json.loads(done.stdout).items()}


def _play(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    folders = [folder / str(number) for number in range(case["folders"])]
    files = MaildirFiles(is_synced=True)
    copies = [Copy(each, b"Delivered-To: x\r\n") for each in folders]
    files.write([(make_message(b"first"), copies)])  # creates the folders
    messages = [(make_message(b"%d" % number), copies) for number in range(case["messages"])]
    for message, _ in messages:
        message.body.in_memory = True  # type: ignore[attr-defined]
    if case["without_syncfs"]:
        os.environ["WITHOUT_SYNCFS"] = "1"
    if case["failing"]:
        name, *numbers = case["failing"]
        os.environ["FAILING"] = f"{name}:{' '.join(map(str, numbers))}"
    ended = files.write(messages)
    for name in ("FAILING", "WITHOUT_SYNCFS"):
        os.environ.pop(name, None)
    return asdict(
        Ended(
            [_error_of(each) for each in ended],
            sum(len(list((each / "new").iterdir())) for each in folders) - len(folders),
            sum(len(list((each / "tmp").iterdir())) for each in folders),
        )
    )


def _error_of(ended: str | Exception) -> int:
    return 0 if isinstance(ended, str) else (isinstance(ended, OSError) and ended.errno) or -1


def main() -> None:
    """Execute the cases of standard input."""
    cases = json.load(sys.stdin)
    json.dump({name: _play(Path(sys.argv[1]) / name, case) for name, case in cases.items()}, sys.stdout)


if __name__ == "__main__":
    main()
