"""The supervisor with workers that are small programs."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence

import pytest
import trio

from penstock.supervisor import Launch, Supervisor, WorkerError

PREAMBLE = """
import os, signal, socket, sys
index, line = int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
"""
PATIENT = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
line.sendall(b"ready\\n")
try:
    while line.recv(100): pass
except ConnectionResetError: pass
sys.exit(3)
"""


def program(text: str) -> Launch:
    def launch(index: int, line: int) -> tuple[Sequence[str], Sequence[int]]:
        return [sys.executable, "-c", PREAMBLE + text, str(index), str(line)], [line]

    return launch


@pytest.fixture(autouse=True)
def patience() -> object:
    """Stop what hangs."""
    signal.alarm(120)
    yield
    signal.alarm(0)


async def test_all_workers_run_and_end_when_they_are_asked_to() -> None:
    supervisor = Supervisor(program(PATIENT), (0, 1, 5))
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        assert list(supervisor.processes) == [0, 1, 5]
        supervisor.stop()
    assert supervisor.processes == {}


@pytest.mark.parametrize("lived", [0, 100], ids=["soon", "at once"])
async def test_a_killed_worker_is_started_again(lived: float) -> None:
    again = trio.Event()
    ended: list[tuple[int, int]] = []

    def restarted(index: int, code: int) -> None:
        ended.append((index, code))
        again.set()

    supervisor = Supervisor(program(PATIENT), (0, 1), restarted=restarted, clock=lambda: len(ended) * lived)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        killed = supervisor.processes[0]
        os.kill(killed, signal.SIGKILL)
        await again.wait()
        while len(supervisor.processes) < 2:
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert killed not in supervisor.processes.values()
        supervisor.stop()
    assert ended == [(0, -signal.SIGKILL)]


async def test_a_worker_that_can_not_start_ends_the_supervisor() -> None:
    supervisor = Supervisor(program("sys.exit(2)"), (0, 1))
    with pytest.raises(ExceptionGroup) as caught:
        await supervisor.run()
    group = caught.value.subgroup(WorkerError)
    assert group is not None
    assert "before it was ready" in str(group.exceptions[0])


async def test_a_stop_during_the_start_is_obeyed() -> None:
    supervisor = Supervisor(program("import time; time.sleep(60)"), (0, 1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.run)
        await trio.testing.wait_all_tasks_blocked(0.01)
        supervisor.stop()


async def test_a_cancelled_supervisor_leaves_no_worker_behind() -> None:
    supervisor = Supervisor(program(PATIENT), (0, 1))
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        pids = supervisor.processes.values()
        nursery.cancel_scope.cancel()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_worker_hears_when_the_supervisor_has_died() -> None:
    # A supervisor in a process of its own would be no better than the socket pair it holds: closing it is its death.
    ours, theirs = socket.socketpair()
    command, descriptors = program(PATIENT)(0, theirs.fileno())
    process = await trio.lowlevel.open_process(command, pass_fds=descriptors)
    theirs.close()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    assert await stream.receive_some() == b"ready\n"
    await stream.aclose()
    assert await process.wait() == 3
