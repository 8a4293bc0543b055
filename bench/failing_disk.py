"""A disk that fails: a library for LD_PRELOAD, built with the C compiler that Penstock needs anyway.

While the switch file exists, one in 40 writes, syncs and truncations of files below a folder fails with EIO or ENOSPC,
chosen by a random seed; some failing writes are torn: half of the data is written.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define ONE_IN 40

static unsigned state;

static int is_ours(int fd)
{
    char link[64], path[4096];
    const char *folder = getenv("FAILING_FOLDER");
    ssize_t n;
    if (folder == NULL || access(getenv("FAILING_SWITCH"), F_OK) != 0)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    n = readlink(link, path, sizeof path - 1);
    if (n <= 0)
        return 0;
    path[n] = 0;
    return strncmp(path, folder, strlen(folder)) == 0;
}

static int fails(int fd)
{
    int saved = errno;
    unsigned draw;
    if (!is_ours(fd)) {
        errno = saved;
        return 0;
    }
    if (state == 0)
        state = (unsigned) strtoul(getenv("FAILING_SEED"), NULL, 10) | 1;
    state ^= state << 13; state ^= state >> 17; state ^= state << 5;  /* xorshift */
    draw = state % ONE_IN;
    errno = saved;
    if (draw != 0)
        return 0;
    errno = state & 1024 ? EIO : ENOSPC;
    return 1;
}

#define REAL(type, name) static type (*real)(); if (!real) real = (type (*)()) dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *data, size_t size)
{
    REAL(ssize_t, "write");
    return fails(fd) ? -1 : real(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *pieces, int count)
{
    REAL(ssize_t, "writev");
    return fails(fd) ? -1 : real(fd, pieces, count);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place)
{
    REAL(ssize_t, "pwrite64");
    if (fails(fd)) {
        if (size > 512)
            real(fd, data, size / 2, place);  /* a torn write */
        return -1;
    }
    return real(fd, data, size, place);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t place) { return pwrite64(fd, data, size, place); }
int fsync(int fd) { REAL(int, "fsync"); return fails(fd) ? -1 : real(fd); }
int fdatasync(int fd) { REAL(int, "fdatasync"); return fails(fd) ? -1 : real(fd); }
int ftruncate64(int fd, off64_t size) { REAL(int, "ftruncate64"); return fails(fd) ? -1 : real(fd, size); }
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }
"""


class FailingWrites:
    """The library and its switch. `environment` is for the program whose writes have to fail."""

    def __init__(self, scratch: Path, folder: Path, seed: int) -> None:
        """Writes below `folder` fail; the library is built in `scratch`. Raise CalledProcessError."""
        source, library = scratch / "failing.c", scratch / "failing.so"
        source.write_text(_SOURCE)
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(source), "-ldl"], check=True)
        self._switch = scratch / "failing"
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAILING_FOLDER": str(folder),
            "FAILING_SWITCH": str(self._switch),
            "FAILING_SEED": str(seed),
        }

    def begin(self) -> None:
        """Let writes fail from now on."""
        self._switch.touch()

    def end(self) -> None:
        """Let writes succeed again."""
        self._switch.unlink()
