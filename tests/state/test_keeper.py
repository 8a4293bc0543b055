"""The state of several workers."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from penstock.state import Charge, Later, Learned, StateUnavailableError
from penstock.state.keeper import Keeper
from penstock.state.remote import RemoteState
from penstock.state.tables import Tables
from penstock.state.wire import MOST_OCTETS, Answer, Take, encode
from tests.state.clock import Clock
from tests.state.test_tables import HOUR, TIMES, charge


async def answer(value: Later) -> int:
    return value if isinstance(value, int) else await value


@asynccontextmanager
async def asking(sock: socket.socket, deadline: float = 5.0, patience: int = 1) -> AsyncIterator[RemoteState]:
    reported: list[str] = []
    async with trio.open_nursery() as nursery:
        state = RemoteState(sock, reported.append, deadline=deadline, patience=patience)
        await nursery.start(state.run)
        yield state
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("patience", [1, 0], ids=["waiting for the answer", "switching tasks"])
async def test_workers_share_limits_and_greylisting(tmp_path: Path, patience: int) -> None:
    clock = Clock()
    with Keeper(tmp_path / "state.db", pytest.fail, tables=Tables(clock)) as keeper:
        one, two = keeper.connect(), keeper.connect()
        async with asking(one, patience=patience) as first, asking(two, patience=patience) as second:
            assert await answer(first.take([charge(limit=2)])) == -1
            assert await answer(second.available([charge(limit=2)])) == -1
            assert await answer(second.take([charge(limit=2)])) == -1
            assert await answer(first.take([charge("b"), charge(limit=2)])) == 1
            second.give_back([charge(limit=2)])
            assert await answer(second.take([charge(limit=2)])) == -1
            first.note([charge("c", 1)])
            assert await answer(first.available([charge("c", 1)])) == 0
            assert await answer(first.greylist("a", TIMES)) == TIMES.delay
            clock.advance(60)
            assert await answer(second.greylist("a", TIMES)) == 0
            first.learn([Learned(f"{n}", clock(), clock() + HOUR, has_passed=True) for n in range(500)])
            assert await answer(first.greylist("499", TIMES)) == 0
    with Keeper(tmp_path / "state.db", pytest.fail, tables=Tables(clock)) as keeper:
        async with asking(keeper.connect()) as state:
            assert await answer(state.greylist("a", TIMES)) == 0
            assert await answer(state.available([charge("c", 1)])) == 0
            assert await answer(state.take([charge(limit=2)])) == 0


async def test_a_limit_is_exact_when_many_tasks_ask(tmp_path: Path) -> None:
    accepted = 0

    async def send(state: RemoteState) -> None:
        nonlocal accepted
        for _ in range(20):
            if await answer(state.take([Charge("a", HOUR, 100)])) == -1:
                accepted += 1

    with Keeper(tmp_path / "state.db", pytest.fail, tables=Tables(Clock())) as keeper:
        one, two = keeper.connect(), keeper.connect()
        async with asking(one, patience=0) as first, asking(two) as second, trio.open_nursery() as nursery:
            for state in (first, second) * 10:
                nursery.start_soon(send, state)
    assert accepted == 100


async def test_a_keeper_that_does_not_answer_is_left_out(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        async with asking(ours, deadline=0.05) as state:
            start = trio.current_time()
            for _ in range(100):
                with pytest.raises(StateUnavailableError):
                    await answer(state.take([charge()]))
            assert trio.current_time() - start < 0.5, "it is not asked any more"


async def test_a_full_queue_is_left_out_and_blocks_nothing() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        async with asking(ours) as state:
            for _ in range(10_000):
                state.note([charge()])
            with pytest.raises(StateUnavailableError):
                await answer(state.take([charge()]))


async def test_a_keeper_behind_with_learned_entries_is_still_asked(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        async with asking(ours) as state:
            for _ in range(20):  # more failures than the breaker allows
                state.learn([Learned(f"{n}", 1, 1 << 62, has_passed=True) for n in range(20_000)])
            theirs.setblocking(False)
            with pytest.raises(BlockingIOError):
                while theirs.recv(MOST_OCTETS):
                    pass
            theirs.send(encode(Answer(1, -1)))
            assert await answer(state.take([charge()])) == -1


@pytest.mark.parametrize("patience", [1, 0])
async def test_the_end_of_the_keeper_ends_all_waits(patience: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def ask(state: RemoteState) -> None:
        with pytest.raises(StateUnavailableError):
            await answer(state.take([charge()]))

    async with asking(ours, patience=patience) as state, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask, state)
        await trio.testing.wait_all_tasks_blocked()
        theirs.close()


async def test_a_worker_that_sends_nonsense_or_dies_affects_no_other(tmp_path: Path) -> None:
    reported: list[str] = []
    with Keeper(tmp_path / "state.db", reported.append) as keeper:
        for packet in (b"nonsense", encode(Take(1, (Charge("a", 1, 0),))), b""):
            with keeper.connect() as sock:
                sock.send(packet)
        with keeper.connect() as deaf:
            for _ in range(500):  # it reads no answer
                deaf.send(encode(Take(1, (charge("deaf"),))))
            async with asking(keeper.connect()) as state:
                assert await answer(state.take([charge()])) == -1
    assert len(reported) == 2
