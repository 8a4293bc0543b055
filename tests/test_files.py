"""Files are written whole, and keep what belongs to the administrator."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from penstock.files import remove_leftovers, write_atomically


@pytest.mark.parametrize(("mode", "kept"), [(0o600, 0o600), (0o640, 0o640), (0o644, 0o640)])
def test_a_replaced_file_keeps_its_owner_and_its_group(tmp_path: Path, mode: int, kept: int) -> None:
    path = tmp_path / "users"
    path.write_bytes(b"old")
    path.chmod(mode)
    owner = (os.getuid(), os.getgid())
    if os.getuid() == 0:
        owner = (65_534, 65_533)
        os.chown(path, *owner)
    else:
        kept = 0o600
    write_atomically(path, b"new", keep_owner=True)
    found = path.stat()
    assert (path.read_bytes(), found.st_mode & 0o777, (found.st_uid, found.st_gid)) == (b"new", kept, owner)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_must_not_be_replaced_stays(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_atomically(path, b"new", replace=False)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, young, running, old, other = (
        tmp_path / name
        for name in (
            f".state.json.{dead.pid}.0123abcd.new",
            f".users.{dead.pid}.0123abcd.new",
            f".state.json.{os.getpid()}.0123abcd.new",
            f".state.db.{os.getpid()}.89abcdef.new",
            "mail.new",
        )
    )
    for path in (left, young, running, old, other):
        path.touch()
    os.utime(old, (0, 0))
    os.utime(left, (time.time() - 120,) * 2)
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([young, running, other]), "the process of a young one may be hidden"
    remove_leftovers(tmp_path / "missing")
