"""Worker processes: what they tell their parent, whatever ends them, and what they are told."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

import msgspec
import pytest
import trio
import trio.testing

from penstock.cli.sink import KeptOutbox
from penstock.cli.sinkworkers import PLAN, RESET, SinkFrame
from penstock.forked import Frame, WorkerError, WorkerLine, Workers, frames, shared_numbers
from penstock.sink.kept import KeptMessage
from penstock.sink.merging import WorkerReport

LARGE = SinkFrame(error="x" * (8 << 20))
"""More than a socket takes at once."""


@contextmanager
def line() -> Iterator[tuple[WorkerLine, trio.SocketStream]]:
    """Give the worker's end, and the parent's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        yield WorkerLine(theirs, shared_numbers(3)), trio.SocketStream(trio.socket.from_stdlib_socket(ours))


async def frames_of(stream: trio.SocketStream) -> list[SinkFrame]:
    return [frame async for frame in frames(stream, SinkFrame)]


async def test_a_frame_that_is_cut_by_the_end_is_complete() -> None:
    with line() as (worker, parent):
        ended = trio.Event()
        found: list[SinkFrame] = []

        async def work() -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(worker.follow, lambda: None)
                nursery.start_soon(worker.tell, LARGE)
                await trio.testing.wait_all_tasks_blocked(0.01)
                nursery.cancel_scope.cancel()
            await trio.to_thread.run_sync(worker.tell_at_end, SinkFrame(report=WorkerReport({"messages": 7})))
            worker._socket.close()
            ended.set()

        async def read() -> None:
            await trio.testing.wait_all_tasks_blocked(0.1)
            found.extend(await frames_of(parent))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(work)
                nursery.start_soon(read)
        assert found[:2] == [SinkFrame(is_ready=True), LARGE]
        assert [frame.report.counts for frame in found[2:] if frame.report is not None] == [{"messages": 7}]
        assert len(found) == 3


@pytest.mark.parametrize(
    "data", [b"\xc1", msgspec.msgpack.encode(["no", "frame"]), msgspec.msgpack.encode({"error": 7})]
)
async def test_octets_that_are_no_frame_break_the_line(data: bytes) -> None:
    with line() as (worker, parent):
        worker._socket.sendall(len(data).to_bytes(4, "big") + data)
        with pytest.raises(trio.BrokenResourceError, match="no frame"):
            await frames_of(parent)


async def test_a_frame_that_is_too_large_breaks_the_line() -> None:
    with line() as (worker, parent):
        worker._socket.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(trio.BrokenResourceError, match="too large"):
            await frames_of(parent)


def kept(number: int, octets: int) -> KeptMessage:
    return KeptMessage(f"M{number}", 1.5, "a@x", ("b@x",), octets, bytes(octets), is_cut=False)


async def test_kept_messages_reach_the_parent_when_their_worker_ends(autojump_clock: object) -> None:
    shelf = [kept(number, 600_000) for number in range(5)]

    def take() -> list[KeptMessage]:
        found = shelf[:]
        shelf.clear()
        return found

    with line() as (worker, parent):
        found: list[SinkFrame] = []
        outbox = KeptOutbox(take)
        async with trio.open_nursery() as reading:

            async def read() -> None:
                await trio.sleep(0.2)  # the line is full when the worker is cancelled
                found.extend(await frames_of(parent))

            reading.start_soon(read)
            async with trio.open_nursery() as nursery:
                await nursery.start(worker.follow, lambda: None)
                nursery.start_soon(outbox.follow, worker)
                await trio.sleep(0.15)
                nursery.cancel_scope.cancel()
            assert not shelf
            shelf.append(kept(5, 1))
            for frame in outbox.frames():
                await trio.to_thread.run_sync(worker.tell_at_end, frame)
            worker._socket.close()
    assert [each.id for frame in found for each in frame.kept] == [f"M{number}" for number in range(6)]
    assert len(found) == 5


def test_a_worker_that_missed_commands_sees_the_last_numbers() -> None:
    numbers = shared_numbers(3)
    done: list[tuple[str, int]] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        slow = WorkerLine(theirs, numbers)
        slow.commands = {
            RESET: lambda number: done.append(("reset", number)),
            PLAN: lambda number: done.append(("plan", number)),
        }
        slow.look()
        numbers[RESET] = 1
        numbers[RESET] = 2
        slow.look()
        slow.look()
        numbers[PLAN] = 1
        slow.look()
    assert done == [("reset", 2), ("plan", 1)]


def test_a_failed_worker_ends_the_others_and_is_named() -> None:
    def work(index: int, line: WorkerLine) -> Frame:
        if index == 1:
            return Frame(error="no such file", is_usage=True)
        trio.run(until_told, line)
        return Frame(is_last=True)

    async def until_told(line: WorkerLine) -> None:
        told = trio.Event()
        line.commands[0] = lambda _: told.set()
        async with trio.open_nursery() as nursery:
            await nursery.start(line.follow, told.set)
            await told.wait()
            nursery.cancel_scope.cancel()

    with closing(Workers(2, work, Frame)) as workers, pytest.raises(WorkerError, match="no such file") as failed:
        trio.run(workers.follow, lambda *_: None, lambda: None)
    assert failed.value.is_usage
    assert all(process.exitcode == 0 for process in workers._processes)


def test_a_worker_that_ends_without_its_last_frame_has_failed() -> None:
    def work(*_: object) -> Frame:
        os._exit(0)

    with closing(Workers(1, work, Frame)) as workers, pytest.raises(WorkerError, match="ended without a report"):
        trio.run(workers.follow, lambda *_: None, lambda: None)
