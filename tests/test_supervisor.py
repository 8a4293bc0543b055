"""The supervisor with workers that are small programs."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import trio

from penstock.cli.running import innermost
from penstock.control import Channel, ControlError
from penstock.supervisor import Command, Launch, Supervisor, WorkerError, WorkerProcess

PREAMBLE = """
import json, os, signal, socket, sys
index, line = int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
lines = line.makefile("rw", encoding="utf-8")

def say(verb, **more):
    print(json.dumps({"verb": verb, **more}), file=lines, flush=True)

def hear():
    return json.loads(lines.readline() or "null")

"""
BEGIN = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
say("prepared")
assert hear()["verb"] == "begin"
"""
PATIENT = (
    BEGIN
    + """
say("ready")
try:
    while asked := hear():
        answer = {"number": asked["number"], "result": {"index": index, "name": asked.get("arguments", {}).get("name")}}
        print(json.dumps(answer), file=lines, flush=True)
except OSError: pass
os._exit(3)
"""
)


def program(text: str) -> Launch:
    @contextmanager
    def launch(index: int, line: int) -> Iterator[Command]:
        yield Command([sys.executable, "-c", PREAMBLE + text, str(index), str(line)], [line])

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
    ended: list[WorkerProcess] = []

    def restarted(worker: WorkerProcess) -> None:
        ended.append(worker)
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
    assert [(each.index, each.code, each.reason) for each in ended] == [(0, -signal.SIGKILL, "signal")]
    assert supervisor.restarts(0) == 1


async def test_a_worker_that_cannot_start_ends_the_supervisor() -> None:
    supervisor = Supervisor(program("sys.exit(2)"), (0, 1))
    with pytest.raises(ExceptionGroup) as caught:
        await supervisor.run()
    assert "before it was ready" in innermost(caught.value)


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


async def test_a_worker_ends_when_its_channel_does() -> None:
    # A supervisor in a process of its own would be no better than the socket pair it holds: closing it is its death.
    ours, theirs = socket.socketpair()
    with program(PATIENT)(0, theirs.fileno()) as command:
        process = await trio.lowlevel.open_process(command.words, pass_fds=tuple(command.descriptors))
    theirs.close()
    heard = {"prepared": trio.Event(), "ready": trio.Event()}
    channel = Channel(ours, notice=lambda verb, _: heard[verb].set())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.run)
        await heard["prepared"].wait()
        channel.tell("begin")
        await heard["ready"].wait()
        with pytest.raises(ControlError, match="no answer"):
            await channel.ask("x", seconds=0)
        nursery.cancel_scope.cancel()
    assert await process.wait() == 3


async def test_workers_answer_requests() -> None:
    supervisor = Supervisor(program(PATIENT), (0, 1))
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        answers = [await worker.ask("x", name="y") for worker in supervisor.workers]
        assert answers == [{"index": 0, "name": "y"}, {"index": 1, "name": "y"}]
        supervisor.stop()


async def test_a_roll_replaces_all_workers_one_after_the_other() -> None:
    supervisor = Supervisor(program(PATIENT), (0, 1, 2))
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        before = supervisor.processes
        await supervisor.roll(program(PATIENT), (0, 1, 5))
        after = supervisor.processes
        assert list(after) == [0, 1, 5]
        assert not set(before.values()) & set(after.values())
        supervisor.stop()


@pytest.mark.parametrize(
    "text", ["sys.exit(2)", BEGIN + "sys.exit(2)"], ids=["before it is prepared", "before it is ready"]
)
async def test_a_worker_that_does_not_become_ready_stops_a_roll(text: str) -> None:
    supervisor = Supervisor(program(PATIENT), (0, 1))
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        before = supervisor.processes
        with pytest.raises(WorkerError, match="new worker 0 ended with code 2 before it was ready"):
            await supervisor.roll(program(text), (0, 1))
        while len(supervisor.processes) < 2:
            await trio.testing.wait_all_tasks_blocked(0.01)
        after = supervisor.processes
        assert after[1] == before[1]
        assert (after[0] == before[0]) == (text == "sys.exit(2)")  # the place has a worker of the old kind again
        with pytest.raises(WorkerError, match="new worker 7 ended"):
            await supervisor.roll(program(text), (0, 1, 7))
        assert supervisor.processes == after
        supervisor.stop()


async def test_a_worker_that_hangs_is_killed_and_started_again() -> None:
    again = trio.Event()
    ended: list[WorkerProcess] = []

    def restarted(worker: WorkerProcess) -> None:
        ended.append(worker)
        again.set()

    alive = """
import threading, time
def live():
    while True:
        say("alive")
        time.sleep(0.02)
threading.Thread(target=live, daemon=True).start()
"""
    supervisor = Supervisor(program(alive + PATIENT), (0, 1), watchdog=3, restarted=restarted)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        os.kill(supervisor.processes[1], signal.SIGSTOP)
        await again.wait()
        supervisor.stop()
    assert [(each.index, each.code, each.reason) for each in ended] == [(1, -signal.SIGKILL, "watchdog")]


async def test_a_worker_that_does_not_stop_is_killed() -> None:
    supervisor = Supervisor(program(PATIENT), (0, 1), patience=0.5)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        stuck = supervisor.workers[1]
        os.kill(stuck.pid, signal.SIGSTOP)
        supervisor.stop()
    assert stuck.code == -signal.SIGKILL


async def test_a_channel_ends_at_a_line_that_is_no_json_or_too_long() -> None:
    for line in (b"{\n", b"x" * 100_000, b'{"verb": 7}\n'):
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(line)
            await Channel(ours, longest=1000).run()
            theirs.setblocking(True)
            with suppress(ConnectionResetError):  # the rest of the line was not read
                assert theirs.recv(10) == b""


async def test_a_channel_does_not_answer_without_a_handler() -> None:
    ours, theirs = socket.socketpair()
    heard: list[str] = []
    with theirs:
        theirs.sendall(b'{"verb": "state", "number": 1}\n{"verb": "alive"}\n')
        theirs.shutdown(socket.SHUT_WR)
        await Channel(ours, notice=lambda verb, _: heard.append(verb)).run()
        assert theirs.recv(10) == b""
    assert heard == ["alive"]
