"""The stream keeps trio's contract, and its short cuts do what they say."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import pytest
import trio
import trio.testing
import trustme

from penstock.net._poller import Poller, Protocol, now
from penstock.net.stream import AheadStream, SocketStream, watch_sockets
from penstock.smtp import _wire
from penstock.smtp._wire import Wire

Pair = tuple[SocketStream, SocketStream]


class Turns(Protocol):
    """Turns whose octets go into a wire."""

    def __init__(self, wire: Wire, turn: Callable[[int], bytes | None]) -> None:
        self.recv = wire.recv
        self.data_received = turn


async def fill(stream: SocketStream, wire: Wire) -> int:
    """Receive once into a wire."""
    return await stream.run_protocol(Turns(wire, lambda _: None))


Maker = Callable[[], Awaitable[Pair]]


@pytest.fixture(params=["poller", "trio"])
async def poller(request: pytest.FixtureRequest, nursery: trio.Nursery) -> AsyncIterator[Poller | None]:
    """Both ways of waiting: with a poller that is looked after, and without one."""
    if request.param == "trio":
        yield None
        return
    poller = Poller()
    nursery.start_soon(watch_sockets, poller)
    yield poller
    assert len(poller) == 0, "a stream was not let go"
    nursery.cancel_scope.cancel()
    poller.close()


@pytest.fixture
def make_pair(poller: Poller | None) -> Maker:
    async def make() -> Pair:
        left, right = socket.socketpair()
        return SocketStream.of(left, poller), SocketStream.of(right, poller)

    return make


@pytest.fixture
def make_tcp_pair(poller: Poller | None) -> Maker:
    async def make() -> Pair:
        with socket.create_server(("127.0.0.1", 0)) as server:
            left = socket.create_connection(server.getsockname())
            right, _ = server.accept()
        return SocketStream.of(left, poller), SocketStream.of(right, poller)

    return make


async def test_the_stream_is_lawful_on_a_unix_socket(make_pair: Maker) -> None:
    async def make_clogged_pair() -> Pair:
        pair = await make_pair()
        for stream in pair:
            while stream.send_nowait(b"x" * 65536):
                pass
        return pair

    await trio.testing.check_half_closeable_stream(make_pair, make_clogged_pair)


async def test_the_stream_is_lawful_on_a_tcp_socket(make_tcp_pair: Maker) -> None:
    await trio.testing.check_half_closeable_stream(make_tcp_pair, None)


async def test_tls_works_over_the_stream(make_tcp_pair: Maker) -> None:
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", key_type=trustme.KeyType.ECDSA).configure_cert(server_context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)
    left, right = await make_tcp_pair()
    server = trio.SSLStream(left, server_context, server_side=True)
    client = trio.SSLStream(right, client_context, server_hostname="localhost")
    message = b"y" * 1_000_000

    async def send() -> None:
        await server.send_all(message)
        await server.aclose()

    async with client, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        received = b"".join([chunk async for chunk in client])
    assert received == message


async def test_a_turn_receives_into_the_wire(make_pair: Maker) -> None:
    left, right = await make_pair()
    async with left, right:
        await left.send_all(b"NOOP\r\n")
        wire = Wire()
        assert await fill(right, wire) == 6
        assert wire.next() == _wire.COMMAND
        await left.send_eof()
        assert await fill(right, wire) == 0


async def test_a_wait_can_be_cancelled_without_losing_input(make_pair: Maker) -> None:
    left, right = await make_pair()
    wire = Wire()
    async with left, right:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill, right, wire)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await left.send_all(b"QUIT\r\n")
        assert await fill(right, wire) == 6


async def test_a_second_receiver_is_an_error(make_pair: Maker) -> None:
    left, right = await make_pair()
    async with left, right, trio.open_nursery() as nursery:
        nursery.start_soon(fill, right, Wire())
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await right.receive_some()
        nursery.cancel_scope.cancel()


async def test_closing_wakes_the_receiver(make_pair: Maker) -> None:
    left, right = await make_pair()
    async with left:
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await fill(right, Wire())

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            right.close_nowait()
        with pytest.raises(trio.ClosedResourceError):
            right.send_nowait(b"x")


async def test_a_reset_connection_is_broken(make_tcp_pair: Maker) -> None:
    left, right = await make_tcp_pair()
    linger = socket.socket(fileno=os.dup(left._socket.fd))
    with linger:
        linger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        left.close_nowait()
    async with right:
        with pytest.raises(trio.BrokenResourceError):
            await fill(right, Wire())


@pytest.mark.parametrize("is_early", [True, False])
async def test_a_reset_that_ends_the_turns_has_its_cause(make_tcp_pair: Maker, is_early: bool) -> None:
    left, right = await make_tcp_pair()
    with socket.socket(fileno=os.dup(left._socket.fd)) as linger:
        linger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        left.close_nowait()
        reset = linger.detach()

    async def turn() -> None:
        with pytest.raises(trio.BrokenResourceError) as caught:
            await fill(right, Wire())
        assert isinstance(caught.value.__cause__, ConnectionResetError)

    async with right, trio.open_nursery() as nursery:
        if not is_early:
            nursery.start_soon(turn)
            await trio.testing.wait_all_tasks_blocked()
        os.close(reset)
        if is_early:
            await turn()


@pytest.mark.parametrize("ending", ["answers", "ends the turns"])
async def test_a_turn_may_close_its_own_stream(make_pair: Maker, ending: str) -> None:
    left, right = await make_pair()

    def turn(received: int) -> bytes | None:
        right.close_nowait()
        return b"x" if ending == "answers" else None

    async with left:
        await left.send_all(b"NOOP\r\n")
        with suppress(trio.ClosedResourceError):  # without a poller, the octets received may be the result
            await right.run_protocol(Turns(Wire(), turn))
        assert await left.receive_some() == b""


async def test_what_was_read_ahead_comes_first(make_pair: Maker) -> None:
    left, right = await make_pair()
    async with left, AheadStream(b"abc", right) as stream:
        await left.send_all(b"def")
        assert await stream.receive_some(2) == b"ab"
        assert await stream.receive_some() == b"c"
        assert await stream.receive_some() == b"def"
        await stream.wait_send_all_might_not_block()
        await stream.send_all(b"ghi")
        assert await left.receive_some() == b"ghi"


async def test_a_fast_sender_does_not_starve_other_tasks(make_pair: Maker) -> None:
    left, right = await make_pair()
    wire = Wire()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with left, right, trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(200):
            while left.send_nowait(b"NOOP\r\n" * 1000):
                pass
            await fill(right, wire)
            wire.drop_input()
        nursery.cancel_scope.cancel()
    assert turns >= 10


async def test_new_input_waits_for_a_few_turns_of_those_that_have_more() -> None:
    poller = Poller()
    taken: list[int] = []

    class Busy(Protocol):
        """Always has input left, and needs all the time of a poll."""

        def __init__(self, number: int) -> None:
            self.number = number
            self.recv = lambda fd: len(os.read(fd, 100))

        def data_received(self, received: int) -> bytes:
            taken.append(self.number)
            end = now() + 1_000_000
            while now() < end:
                pass
            self.wants_turn = self.number > 0
            return b""

    pairs = [socket.socketpair() for _ in range(20)]
    streams = [SocketStream.of(right, poller) for _, right in pairs]
    async with trio.open_nursery() as nursery:
        for number, stream in enumerate(streams):
            nursery.start_soon(stream.run_protocol, Busy(number))
        await trio.testing.wait_all_tasks_blocked()
        for left, _ in pairs[1:]:
            left.send(b"x")
        while len(set(taken)) < len(pairs) - 1:
            poller.poll()
        del taken[:]
        for _ in pairs[1:] * 2:
            poller.poll()
        assert set(taken) == set(range(1, 20)), "they take turns"
        del taken[:]
        pairs[0][0].send(b"x")
        while 0 not in taken:
            poller.poll()
        assert len(taken) <= 3
        nursery.cancel_scope.cancel()
    for stream, (left, _) in zip(streams, pairs, strict=True):
        stream.close_nowait()
        left.close()
    poller.close()


async def test_a_cancelled_wait_loses_no_wakeup(make_pair: Maker) -> None:
    left, right = await make_pair()
    async with left, right:
        for number in range(200):
            wire = Wire()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(fill, right, wire)
                    await trio.testing.wait_all_tasks_blocked()
                    left.send_nowait(b"NOOP\r\n")  # the edge and the cancellation race
                    if number % 2:
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            if not wire.waiting:
                with trio.fail_after(5):
                    assert await fill(right, wire) == 6


async def test_a_slow_reader_gets_everything_in_order(make_pair: Maker) -> None:
    left, right = await make_pair()
    data = bytes(range(256)) * 8192

    async def send() -> None:
        await left.send_all(data)
        await left.send_eof()

    async with left, right, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        received = b""
        while chunk := await right.receive_some(10_000):
            received += chunk
            await trio.lowlevel.checkpoint()
    assert received == data


async def test_a_turn_answers_until_it_has_to_wake_the_task(make_pair: Maker) -> None:
    left, right = await make_pair()
    wire = Wire()
    turns: list[int] = []

    def turn(received: int) -> bytes | None:
        turns.append(received)
        wire.drop_input()
        return b"%d" % len(turns) if len(turns) < 3 else None

    async with left, right, trio.open_nursery() as nursery:
        results: list[int] = []

        async def run() -> None:
            results.append(await right.run_protocol(Turns(wire, turn)))

        nursery.start_soon(run)
        for number in (b"1", b"2"):
            await left.send_all(b"NOOP\r\n")
            assert await left.receive_some() == number
        await left.send_all(b"NOOP\r\n!")
    assert turns == [6, 6, 7]
    assert results == [7]


async def test_the_end_of_the_stream_ends_the_turns(make_pair: Maker) -> None:
    left, right = await make_pair()
    async with left, right:
        await left.send_eof()
        assert await right.run_protocol(Turns(Wire(), lambda _: b"")) == 0


async def test_a_turn_that_raises_raises_in_its_task(make_pair: Maker) -> None:
    def turn(received: int) -> bytes | None:
        raise LookupError("a bug")

    left, right = await make_pair()
    async with left, right:
        await left.send_all(b"x")
        with pytest.raises(LookupError):
            await right.run_protocol(Turns(Wire(), turn))


async def test_an_answer_the_socket_does_not_take_is_sent_when_it_does(make_pair: Maker) -> None:
    left, right = await make_pair()
    wire = Wire()
    answer = bytes(range(256)) * 8192

    def turn(received: int) -> bytes | None:
        wire.drop_input()
        return answer

    async with left, right, trio.open_nursery() as nursery:
        nursery.start_soon(right.run_protocol, Turns(wire, turn))
        for _ in range(2):
            await left.send_all(b"x")
            got = b""
            while len(got) < len(answer):
                got += await left.receive_some()
            assert got == answer
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("octets", [1, 200_000])
async def test_a_sleeper_can_be_interrupted_whatever_came_before(make_pair: Maker, octets: int) -> None:
    left, right = await make_pair()
    if not right.has_poller:
        return  # it waits with trio, and is cancelled instead
    wire = Wire()

    def turn(received: int) -> bytes | None:
        wire.drop_input()
        return b""

    results: list[int] = []

    async def run() -> None:
        results.append(await right.run_protocol(Turns(wire, turn)))

    async with left, right, trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await left.send_all(b"x" * octets)
        await trio.testing.wait_all_tasks_blocked(0.05)
        right.interrupt()
    assert results == [-1]
    right.interrupt()


async def test_the_last_words_arrive_before_the_end(make_tcp_pair: Maker) -> None:
    left, right = await make_tcp_pair()
    async with right:
        left.send_and_close_nowait(b"221 2.0.0 Bye\r\n")
        with pytest.raises(trio.ClosedResourceError):
            left.send_nowait(b"x")
        assert b"".join([chunk async for chunk in right]) == b"221 2.0.0 Bye\r\n"


async def test_the_last_words_to_a_peer_that_has_left_are_lost(make_pair: Maker) -> None:
    left, right = await make_pair()
    await right.aclose()
    left.send_and_close_nowait(b"221 2.0.0 Bye\r\n")
    left.send_and_close_nowait(b"once more")
