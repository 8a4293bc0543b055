"""When the disk fails, nothing accepted is lost, nothing refused is kept, and the spool continues."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest

from penstock.spool import store
from penstock.spool.entry import Outcome
from tests.contracts.delivery import make_message
from tests.spool.test_spool import NOW, opened, settled, take_all, text_of


class Faulty(sqlite3.Connection):
    """A database that fails at a step, before or after executing it."""

    left: ClassVar[int] = -1
    """Steps until the failure; negative: no failure."""
    is_after: ClassVar[bool] = False
    hit: ClassVar[str] = ""
    """The statement that failed."""

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        """Execute a statement, or fail."""
        cls = Faulty
        cls.left -= 1
        if cls.left != 0 or sql == "ROLLBACK":
            return super().execute(sql, *parameters)
        cls.hit = sql
        if cls.is_after:
            super().execute(sql, *parameters)
        raise sqlite3.OperationalError("disk I/O error")

    @classmethod
    @contextmanager
    def failing(cls, step: int, *, is_after: bool) -> Iterator[None]:
        """Fail once, after a number of steps."""
        cls.left, cls.is_after, cls.hit = step, is_after, ""
        try:
            yield
        finally:
            cls.left = -1


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> type[Faulty]:
    """Make every database able to fail."""
    monkeypatch.setattr(store, "connect", partial(store.connect, factory=Faulty))
    return Faulty


@pytest.mark.parametrize("is_after", [False, True])
async def test_a_put_that_fails_at_any_step_is_written_or_refused(
    tmp_path: Path, faulty: type[Faulty], is_after: bool
) -> None:
    accepted: set[str] = set()
    doubtful: set[str] = set()
    statements: list[str] = []
    step = 0
    async with opened(tmp_path) as spool:
        while True:
            step += 1
            message = make_message(b"%d" % step)
            with faulty.failing(step, is_after=is_after):
                try:
                    await spool.put(message, [f"queue{step}", "x"][: len(message.envelope.recipients)])
                    accepted.add(message.id)
                except sqlite3.OperationalError:
                    if faulty.hit == "COMMIT" and is_after:
                        doubtful.add(message.id)
            if not faulty.hit:
                break
            statements.append(faulty.hit)
            message = make_message(b"the spool goes on")
            await spool.put(message, ["x"] * len(message.envelope.recipients))
            accepted.add(message.id)
    assert {"BEGIN IMMEDIATE", "COMMIT"} <= set(statements)
    assert len(statements) >= 6
    async with opened(tmp_path) as spool:
        found = {str(entry.id) for entry in await take_all(spool)}
    assert accepted <= found
    assert found <= accepted | doubtful


@pytest.mark.parametrize("is_after", [False, True])
async def test_a_record_is_written_completely_or_not(tmp_path: Path, faulty: type[Faulty], is_after: bool) -> None:
    step = 0
    async with opened(tmp_path) as spool:
        while True:
            step += 1
            (entry,) = await spool.put(make_message(b"x", recipients=("a@x",)), ["x"], is_taken=True)
            bounce = make_message(b"bounce %d" % step, recipients=("b@back",))
            ends = settled(entry, Outcome.FAILED, "550 no")
            with faulty.failing(step, is_after=is_after):
                try:
                    await spool.record(ends, [(bounce, ["back"])])
                    is_written = True
                except sqlite3.OperationalError:
                    is_written = is_after and faulty.hit == "COMMIT"
            reports = [text_of(entry).decode() for entry in await take_all(spool)]
            assert [report.endswith(f"bounce {step}") for report in reports] == [True] * is_written
            rows = await spool._committer.do(
                lambda it, row=ends[0].row: it._database.execute(  # type: ignore[misc]
                    "SELECT state FROM recipient WHERE number = ?", (row,)
                ).fetchall()
            )
            assert rows == ([] if is_written else [(1,)])
            if not faulty.hit:
                break
            await spool.record(ends)  # again, as the recorder does
    assert step > 5


FILLING = """
import resource, sys, trio
from pathlib import Path
from penstock.spool.spool import Spool, SpoolSettings
from tests.contracts.delivery import make_message

folder, kind, octets = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ballast = folder / "ballast"

async def main():
    if kind == "limit":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    else:
        ballast.write_bytes(bytes(1_000_000))
    spool = Spool(SpoolSettings(body_in_file=600_000 if kind == "limit" else 30_000), folder / "spool")
    await spool.start()
    accepted, refused = [], []
    while len(refused) < 3:
        message = make_message(b"%d " % len(accepted) * (octets // 4))
        try:
            await spool.put(message, ["x"] * len(message.envelope.recipients))
            accepted.append(message.id)
        except Exception as exc:
            refused.append(f"{type(exc).__name__}: {exc}")
        assert len(accepted) < 10_000, "the disk does not fill up"
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    else:
        ballast.unlink()
    for _ in range(3):
        message = make_message(b"there is room again")
        await spool.put(message, ["x"] * len(message.envelope.recipients))
        accepted.append(message.id)
    entries = await spool.take("x", 2e9, 100_000, 1 << 40)
    for entry in entries:
        assert sum(len(chunk) for chunk in entry.body.chunks()) == entry.body.size
    assert {entry.id for entry in entries} == set(accepted), "what was accepted is there, what was refused is not"
    await spool.aclose()
    print(*refused, sep="\\n")

trio.run(main)
"""


@contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """Mount a file system of 4 MB on a folder, if permitted. Yield the kind of limit in force."""
    mount = shutil.which("mount") or "mount"
    command = [mount, "-t", "tmpfs", "-o", "size=4m", "penstock-test", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        yield "limit"
        return
    try:
        yield "tmpfs"
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, kind: str, octets: int) -> str:
    command = [sys.executable, "-c", FILLING, str(folder), kind, str(octets)]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("octets", [1_000, 40_000])
def test_a_full_disk_loses_nothing_and_is_used_again(tmp_path: Path, octets: int) -> None:
    with small_disk(tmp_path) as kind:
        refused = fill(tmp_path, kind, octets)
    if kind == "tmpfs":
        assert "full" in refused or "No space left" in refused


def test_a_write_that_fails_loses_nothing(tmp_path: Path) -> None:
    assert "disk I/O error" in fill(tmp_path, "limit", 1_000)


async def test_a_checkpoint_that_fails_is_made_later(tmp_path: Path, faulty: type[Faulty]) -> None:
    async with opened(tmp_path) as spool:
        spool._store.checkpoints.logged = 1 << 30
        with faulty.failing(1, is_after=False):
            store._checkpoint(spool._store.checkpoints._beside)
        assert "wal_checkpoint" in faulty.hit
        message = make_message(b"x")
        await spool.put(message, ["x"] * len(message.envelope.recipients))
        assert len(await take_all(spool, NOW)) == 1
