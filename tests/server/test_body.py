"""Bodies: in memory up to a bound, then in a file, whatever the disk does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from penstock.server.body import BodyCollector, BodySettings, FileBody, MemoryBody, MemoryBudget, count_received

UNDER_WAY = 128 * 1024
SETTINGS = BodySettings(memory_per_message=100)


def collector(folder: Path, budget: MemoryBudget | None = None) -> BodyCollector:
    return BodyCollector(SETTINGS, budget or MemoryBudget(1000), folder)


async def fill(target: BodyCollector, *chunks: bytes) -> None:
    for chunk in chunks:
        if not target.add_nowait(chunk):
            await target.add(chunk)


async def test_a_small_body_stays_in_memory(tmp_path: Path) -> None:
    budget = MemoryBudget(1000)
    target = collector(tmp_path, budget)
    await fill(target, b"a" * 60, b"b" * 40)
    assert budget.used == 100
    body = await target.finish()
    assert isinstance(body, MemoryBody)
    assert list(body.chunks()) == list(body.chunks()) == [b"a" * 60, b"b" * 40]
    body.close()
    body.close()
    assert budget.used == 0


async def test_a_large_body_goes_to_a_file_without_a_name(tmp_path: Path) -> None:
    budget = MemoryBudget(1000)
    target = collector(tmp_path, budget)
    pieces = [bytes([i]) * 60 for i in range(50)]
    await fill(target, *pieces)
    body = await target.finish()
    assert isinstance(body, FileBody)
    assert body.size == 3000
    assert budget.used == 0
    assert b"".join(body.chunks()) == b"".join(body.chunks()) == b"".join(pieces)
    assert list(tmp_path.iterdir()) == []
    body.close()
    body.close()
    with pytest.raises(ValueError, match="closed"):
        list(body.chunks())


async def test_the_budget_is_shared_by_all(tmp_path: Path) -> None:
    budget = MemoryBudget(150)
    collectors = [collector(tmp_path, budget) for _ in range(10)]
    for number, target in enumerate(collectors):
        await fill(target, b"x" * 90)
        assert budget.used == 90 + number * UNDER_WAY  # those in a file still have something under way
    bodies = [await target.finish() for target in collectors]
    assert [type(body) for body in bodies] == [MemoryBody] + [FileBody] * 9
    for body in bodies:
        assert b"".join(body.chunks()) == b"x" * 90
        body.close()
    assert budget.used == 0


async def test_a_discarded_body_gives_everything_back(tmp_path: Path) -> None:
    budget = MemoryBudget(1000)
    for size in (50, 500):
        before = len(os.listdir("/proc/self/fd"))
        target = collector(tmp_path, budget)
        await fill(target, b"x" * size)
        target.discard()
        target.discard()
        assert budget.used == 0
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 452), (errno.EDQUOT, 452), (errno.EIO, 451)])
async def test_a_failing_disk_is_reported_at_the_end(
    tmp_path: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = MemoryBudget(1000)
    target = collector(tmp_path, budget)
    write = os.write
    calls = iter(range(100))

    def failing(descriptor: int, data: bytes) -> int:
        if next(calls) >= 2:
            raise OSError(number, os.strerror(number))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", failing)
    await fill(target, *[b"x" * 60] * 20)
    assert target.failure is not None
    assert target.failure.code == code
    assert os.strerror(number) in target.failure.cause
    body = await target.finish()
    assert body.size == 0
    assert budget.used == 0
    body.close()


async def test_a_missing_folder_is_reported_at_the_end(tmp_path: Path) -> None:
    target = collector(tmp_path / "gone")
    await fill(target, b"x" * 200)
    assert target.failure is not None
    assert target.failure.code == 451


@pytest.mark.parametrize(
    ("head", "count"),
    [
        (b"", 0),
        (b"\r\nReceived: x\r\n", 0),
        (b"Received: a\r\nReceived: b\r\n\r\nReceived: c\r\n", 2),
        (b"received: a\r\nRECEIVED : b\r\nX-Received: c\r\n\tReceived: d\r\n", 2),
        (b"Subject: Received: x\r\nReceived: a", 1),
    ],
)
async def test_hops_are_the_received_fields_of_the_header(head: bytes, count: int, tmp_path: Path) -> None:
    assert count_received(head) == count
    for rest in (b"", b"\r\n\r\n" + b"x" * 500):  # in memory, in a file
        target = collector(tmp_path)
        await fill(target, *[bytes([octet]) for octet in head], rest)
        assert target.received_fields() == count
        target.discard()


@pytest.mark.parametrize("pieces", [1, 3, 40])
async def test_hops_are_counted_in_a_header_written_in_pieces(pieces: int, tmp_path: Path) -> None:
    target = BodyCollector(BodySettings(memory_per_message=0), MemoryBudget(0), tmp_path)
    head = b"Received: a\r\n" * 30 + b"Subject: x\r\n\r\nReceived: not a field\r\n"
    size = -(-len(head) // pieces)
    await fill(target, *(head[at : at + size] for at in range(0, len(head), size)))
    assert target.received_fields() == 30
    target.discard()
