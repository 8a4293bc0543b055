"""The supervisor with workers that are small programs."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import trio

from penstock.supervisor import Supervisor, WorkerError

PREAMBLE = """
import json, os, signal, socket, sys
index, line = int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
def say(**word): line.sendall(json.dumps(word).encode() + b"\\n")
"""
PATIENT = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
say(report={"messages": 7})
say(ready={"index": index, "pid": os.getpid()})
try:
    while line.recv(100): pass
except ConnectionResetError: pass
sys.exit(3)
"""


def program(text: str) -> Any:
    def launch(index: int, line: int) -> tuple[Sequence[str], Sequence[int]]:
        return [sys.executable, "-c", PREAMBLE + text, str(index), str(line)], [line]

    return launch


@pytest.fixture
async def patience() -> Any:
    with trio.fail_after(60):
        yield


async def test_all_workers_run_and_end_when_they_are_asked_to(patience: None) -> None:
    supervisor = Supervisor(program(PATIENT), 3)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        assert sorted(word["index"] for word in supervisor.ready) == [0, 1, 2]
        assert sorted(word["pid"] for word in supervisor.ready) == sorted(supervisor.processes)
        supervisor.stop()
    assert supervisor.processes == []
    assert sum(report["messages"] for report in supervisor.reports()) == 21
    assert supervisor.restarts == 0


async def test_a_killed_worker_is_started_again_and_what_it_had_counted_stays(patience: None) -> None:
    again = trio.Event()
    ended: list[tuple[int, int]] = []

    def restarted(index: int, code: int) -> None:
        ended.append((index, code))
        again.set()

    supervisor = Supervisor(program(PATIENT), 2, restarted=restarted, clock=lambda: float(len(ended)) * 100)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        killed = supervisor.processes[0]
        os.kill(killed, signal.SIGKILL)
        await again.wait()
        while len(supervisor.ready) < 3 or len(list(supervisor.reports())) < 3:
            await trio.lowlevel.checkpoint()
        assert killed not in supervisor.processes
        assert len(supervisor.processes) == 2
        supervisor.stop()
    assert ended == [(0, -signal.SIGKILL)]
    assert supervisor.restarts == 1
    assert sum(report["messages"] for report in supervisor.reports()) == 21


async def test_a_worker_that_can_not_start_ends_the_supervisor(patience: None) -> None:
    supervisor = Supervisor(program("sys.exit(2)"), 2)
    with pytest.raises(ExceptionGroup) as caught:
        await supervisor.run()
    group = caught.value.subgroup(WorkerError)
    assert group is not None
    assert "before it was ready" in str(group.exceptions[0])


async def test_a_cancelled_supervisor_leaves_no_worker_behind(patience: None) -> None:
    supervisor = Supervisor(program(PATIENT), 2)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        pids = supervisor.processes
        nursery.cancel_scope.cancel()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_worker_hears_when_the_supervisor_has_died(patience: None) -> None:
    # A supervisor in a process of its own would be no better than the socket pair it holds: closing it is its death.
    ours, theirs = socket.socketpair()
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", PREAMBLE + PATIENT, "0", str(theirs.fileno())], pass_fds=[theirs.fileno()]
    )
    theirs.close()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    said = b""
    while b"ready" not in said:
        said += await stream.receive_some()
    await stream.aclose()
    assert await process.wait() == 3
