"""The client of NATS against real servers, with nats-py as an independent witness."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import pytest
import trio
import trio.testing
import trustme
from bench.nats_servers import NatsServers

import penstock.net.nats
from penstock.net.nats import (
    Credentials,
    DisconnectedError,
    Message,
    NatsClient,
    NatsError,
    NoRespondersError,
    OverloadedError,
    Request,
    RequestTimeoutError,
    ServerAddress,
)
from penstock.net.natswire import (
    Info,
    Nkey,
    NkeyError,
    Parser,
    ProtocolError,
    Requests,
    parse_headers,
)

SEED = "SUAAOBYHA4DQOBYHA4DQOBYHA4DQOBYHA4DQOBYHA4DQOBYHA4DQOBZ5FE"
"""The key of 32 octets 7, as the package nkeys (nkeys-python) encodes it, and its public key."""
PUBLIC = "UDVEU3DD4KOFECV66VIHWEZOYX4ZKR3WV27L464SIIPOU2IUI3JCYSJF"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServers]:
    with NatsServers.running(tmp_path_factory.mktemp("nats")) as running:
        yield running


def addresses(*urls: str) -> list[ServerAddress]:
    return [ServerAddress.parse(url) for url in urls]


@asynccontextmanager
async def connected(client: NatsClient) -> AsyncIterator[NatsClient]:
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        with trio.fail_after(30):
            await client.wait_connected()
        yield client
        nursery.cancel_scope.cancel()


async def echo(client: NatsClient, subject: str, started: trio.Event) -> None:
    async with client.subscribed(subject) as subscription:
        started.set()
        async for message in subscription:
            client.publish(message.reply, message.data, message.headers)


# ---- the wire


class Heard:
    """Notes the operations of a parser."""

    def __init__(self) -> None:
        self.operations: list[object] = []

    def on_message(self, *message: bytes) -> None:
        self.operations.append(message)

    def on_info(self, info: Info) -> None:
        self.operations.append(info.server_name)

    def on_ping(self) -> None:
        self.operations.append("ping")

    def on_pong(self) -> None:
        self.operations.append("pong")

    def on_error(self, text: str) -> None:
        self.operations.append(text)


SENT = (
    b'INFO {"server_name":"n1","unknown":[1]}\r\nPING\r\nMSG a.b 7 4\r\n\r\nhi\r\n'
    b"HMSG c 8 r.1 12 14\r\nNATS/1.0\r\n\r\nOK\r\n+OK\r\n-ERR 'Slow Consumer'\r\nPONG\r\nMSG d 9 0\r\n\r\n"
)
OPERATIONS = [
    "n1",
    "ping",
    (b"7", b"a.b", b"", b"", b"\r\nhi"),
    (b"8", b"c", b"r.1", b"NATS/1.0\r\n\r\n", b"OK"),
    "Slow Consumer",
    "pong",
    (b"9", b"d", b"", b"", b""),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(SENT)])
def test_operations_are_read_however_they_are_cut(size: int) -> None:
    heard = Heard()
    parser = Parser(heard)
    for start in range(0, len(SENT), size):
        parser.feed(SENT[start : start + size])
    assert heard.operations == OPERATIONS


@pytest.mark.parametrize(
    "line",
    [
        b"MSG a 1\r\n",
        b"MSG a 1 -3\r\n",
        b"HMSG a 1 5 3\r\n",
        b"MSG a 1 x\r\n",
        b"MSG a 1 99999999999999999999\r\n",
        b"WHAT\r\n",
        b"INFO {\r\n",
    ],
)
def test_what_is_not_nats_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        Parser(Heard()).feed(line)


def test_a_line_without_an_end_is_refused() -> None:
    parser = Parser(Heard())
    with pytest.raises(ProtocolError, match="without an end"):
        for _ in range(20):
            parser.feed(b"x" * 100_000)


def test_answers_that_nobody_waits_for_change_nothing() -> None:
    requests = Requests("_INBOX.a.", most_waiting=10, most_octets=1000)
    answers: list[Message | NatsError] = []
    assert requests.add("x", b"", b"", answers.append, 1.0) == 1
    parser = Parser(Heard(), requests)
    for number in (b"0", b"2", b"-1", b"x", b"", b"9" * 5000):
        parser.feed(b"MSG _INBOX.a.%b 1 2\r\nno\r\n" % number)
    assert not answers
    parser.feed(b"MSG _INBOX.a.1 1 3\r\nyes\r\n" * 2)
    assert [each.data for each in answers if isinstance(each, Message)] == [b"yes"]


def test_headers_are_parsed_by_name() -> None:
    assert parse_headers(b"NATS/1.0\r\nA: 1\r\nB: x: y\r\n\r\n") == {"A": "1", "B": "x: y"}


def test_an_nkey_is_read_as_other_implementations_write_it() -> None:
    assert Nkey(SEED).public == PUBLIC
    for wrong in ("", "SUA", SEED[:-1] + "A", PUBLIC, SEED.lower()):
        with pytest.raises(NkeyError):
            Nkey(wrong)


@pytest.mark.parametrize("url", ["", "n1:4222", "http://n1", "nats://", "nats://u:p@n1", "nats://n1:x", "nats://n1/x"])
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        ServerAddress.parse(url)


# ---- one connection


async def test_a_subject_need_not_be_utf8(servers: NatsServers) -> None:
    async with connected(NatsClient(addresses(servers.urls[0]))) as client, client.subscribed("odd.*") as got:
        await client.flush(timeout=10)
        async with await trio.open_tcp_stream("127.0.0.1", servers.client[0]) as other:
            await other.send_all(b"CONNECT {}\r\nPUB odd.\xff 2\r\nhi\r\nPING\r\n")
            with trio.fail_after(30):
                assert (await got.receive()).data == b"hi"


async def test_a_request_is_answered(servers: NatsServers) -> None:
    async with connected(NatsClient(addresses(*servers.urls))) as client, trio.open_nursery() as nursery:
        started = trio.Event()
        nursery.start_soon(echo, client, "echo", started)
        await started.wait()
        headers = b"NATS/1.0\r\nA: 1\r\n\r\n"
        answer = await client.request("echo", b"hello\r\n", headers, timeout=10)
        assert (answer.data, answer.fields) == (b"hello\r\n", {"A": "1"})
        answers = await client.request_many([Request("echo", b"%d" % n) for n in range(100)], timeout=10)
        assert [each.data for each in answers if isinstance(each, Message)] == [b"%d" % n for n in range(100)]
        nursery.cancel_scope.cancel()


async def test_a_request_ends_without_an_answer(servers: NatsServers) -> None:
    async with connected(NatsClient(addresses(*servers.urls))) as client:
        with pytest.raises(NoRespondersError):
            await client.request("no.one", timeout=10)
        async with client.subscribed("silent"):
            with pytest.raises(RequestTimeoutError):
                await client.request("silent", timeout=0.05)
            with trio.move_on_after(0.05):  # cancelled, and forgotten
                await client.request("silent", timeout=10)
            (answer,) = await client.request_many([Request("silent")], timeout=0.05)
            assert isinstance(answer, RequestTimeoutError)
        await client.flush(timeout=10)


async def test_what_waits_is_bounded(servers: NatsServers) -> None:
    client = NatsClient(addresses(*servers.urls), most_waiting=10, most_octets=100_000)
    async with connected(client), client.subscribed("silent"), trio.open_nursery() as nursery:
        with pytest.raises(OverloadedError):
            nursery.start_soon(lambda: client.request("silent", b"x" * 200_000, timeout=60))
            await trio.testing.wait_all_tasks_blocked()
            await client.request("silent", b"x", timeout=60)
        nursery.cancel_scope.cancel()
    async with connected(NatsClient(addresses(*servers.urls), most_waiting=10)) as client, client.subscribed("silent"):
        answers = await client.request_many([Request("silent")] * 12, timeout=0.1)
        assert [type(each) for each in answers] == [RequestTimeoutError] * 10 + [OverloadedError] * 2


async def test_a_subscriber_that_does_not_keep_up_loses_messages(servers: NatsServers) -> None:
    async with connected(NatsClient(addresses(*servers.urls))) as client, client.subscribed("many", limit=3) as got:
        for number in range(5):
            client.publish("many", b"%d" % number)
        await client.flush(timeout=10)
        assert [(await got.receive()).data for _ in range(3)] == [b"0", b"1", b"2"]
        assert got.dropped == 2


async def test_the_official_client_understands_this_one(servers: NatsServers) -> None:
    """Headers and payloads arrive as they were sent, in both directions.

    Both use the same server: another one would hear of a subscription only a moment after it was confirmed.
    """

    async def witness() -> tuple[bytes, dict[str, str] | None]:
        other = await nats.connect(servers.urls[0])
        try:
            waiting = await other.subscribe("from.penstock")
            await other.flush()
            await other.publish("to.penstock", b"ready", headers={"Kind": "witness"})
            heard = await waiting.next_msg(20)
            return heard.data, heard.headers
        finally:
            await other.close()

    body = bytes(range(256)) * 100
    async with connected(NatsClient(addresses(servers.urls[0]))) as client, client.subscribed("to.penstock") as got:
        await client.flush(timeout=10)
        async with trio.open_nursery() as nursery:

            async def answer() -> None:
                message = await got.receive()
                assert (message.data, message.fields) == (b"ready", {"Kind": "witness"})
                client.publish("from.penstock", body, 'NATS/1.0\r\nEnvelope: ["ä@example.org"]\r\n\r\n'.encode())

            nursery.start_soon(answer)
            heard, fields = await trio.to_thread.run_sync(asyncio.run, witness())
    assert heard == body
    assert fields == {"Envelope": '["ä@example.org"]'}


# ---- more than one connection


async def test_another_server_is_used_when_one_is_killed(tmp_path: Path) -> None:
    with NatsServers.running(tmp_path) as servers:
        client = NatsClient(addresses(servers.urls[0]))  # it learns of the others
        async with connected(client), client.subscribed("here") as got, client.subscribed("silent"):
            await client.flush(timeout=10)
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    with pytest.raises(DisconnectedError):
                        await client.request("silent", timeout=60)

                nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
                await trio.to_thread.run_sync(servers.kill, 0)
            with trio.fail_after(30):
                await client.wait_connected()
                client.publish("here", b"again")
                assert (await got.receive()).data == b"again"
            assert client.info.server_name != "n1"

            # A server that hangs is left, too.
            hanging = int(client.info.server_name[1:]) - 1
            servers.signal(hanging, signal.SIGSTOP)
            with trio.fail_after(30), pytest.raises(DisconnectedError):
                await client.request("silent", timeout=60)
            with trio.fail_after(30):
                await client.wait_connected()
            servers.signal(hanging, signal.SIGCONT)
            assert client.info.server_name not in ("n1", f"n{hanging + 1}")


async def test_a_server_in_lame_duck_mode_is_left_before_it_closes(tmp_path: Path) -> None:
    with NatsServers.running(tmp_path, count=2) as servers:
        changes, reasons = trio.open_memory_channel[str](100)
        client = NatsClient(addresses(*servers.urls))
        client.on_change = lambda _, reason: changes.send_nowait(reason)
        async with connected(client), client.subscribed("here") as got, client.subscribed("silent") as silent:
            before = client.info.server_name
            assert await reasons.receive() == ""
            async with trio.open_nursery() as nursery:
                answers: list[bytes] = []

                async def ask() -> None:
                    answers.append((await client.request("silent", timeout=60)).data)

                nursery.start_soon(ask)
                question = await silent.receive()
                servers.signal(int(before[1:]) - 1, signal.SIGUSR2)
                with trio.fail_after(30):
                    assert await reasons.receive() == ""  # the next connection comes before the end of this one
                    assert client.info.server_name != before
                    client.publish(question.reply, b"late")
            assert answers == [b"late"]
            with trio.fail_after(30):
                assert await reasons.receive() == "the server is shutting down"
                client.publish("here", b"!")
                assert (await got.receive()).data == b"!"


# ---- authentication and TLS


async def try_to_connect(client: NatsClient) -> str:
    """Return why there is no connection after the first round."""
    failed = trio.Event()
    client.on_change = lambda _, __: failed.set()
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        await failed.wait()
        nursery.cancel_scope.cancel()
    with pytest.raises(DisconnectedError) as caught:
        client.publish("a")
    return str(caught.value)


async def test_a_password_and_an_nkey_are_checked(tmp_path: Path) -> None:
    users = f'authorization {{ users: [{{user: gate, password: "se cret"}}, {{nkey: {PUBLIC}}}] }}'
    with NatsServers.running(tmp_path, count=1, more=users) as servers:
        here = addresses(*servers.urls)
        for credentials in (Credentials("gate", "se cret"), Credentials(nkey=Nkey(SEED))):
            async with connected(NatsClient(here, credentials=credentials)) as client:
                await client.flush(timeout=10)
        assert "Authorization Violation" in await try_to_connect(NatsClient(here, credentials=Credentials("gate", "x")))
        assert "Authorization Violation" in await try_to_connect(NatsClient(here))


async def test_tls_is_used_and_verified(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    tls = f'tls {{ cert_file: "{tmp_path}/server.pem", key_file: "{tmp_path}/server.pem" }}'
    with NatsServers.running(tmp_path, count=1, more=tls) as servers:
        url = servers.urls[0].replace("nats://", "tls://")
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        async with connected(NatsClient(addresses(url), tls=trusting)) as client, client.subscribed("a") as got:
            client.publish("a", b"x" * 500_000)
            assert len((await got.receive()).data) == 500_000
        assert "certificate verify failed" in await try_to_connect(
            NatsClient(addresses(url), tls=ssl.create_default_context())
        )
        assert "demands TLS" in await try_to_connect(NatsClient(addresses(*servers.urls)))


async def test_a_server_that_is_not_nats_is_given_up() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def smtp(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 localhost ESMTP\r\n")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, smtp, listeners)
        port = listeners[0].socket.getsockname()[1]
        assert "expected INFO" in await try_to_connect(NatsClient([ServerAddress("127.0.0.1", port)]))
        nursery.cancel_scope.cancel()


async def test_a_server_that_drops_its_clients_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penstock.net.nats, "_FIRST_PAUSE", 3600.0)
    monkeypatch.setattr(penstock.net.nats, "_LONGEST_PAUSE", 3600.0)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = ServerAddress("127.0.0.1", listeners[0].socket.getsockname()[1])
    dropped = trio.Event()

    async def drop(stream: trio.SocketStream) -> None:
        await stream.send_all(b'INFO {"max_payload":1048576,"headers":true}\r\n')
        received = b""
        while b"PING\r\n" not in received:
            received += await stream.receive_some()
        await stream.send_all(b"PONG\r\n")
        await stream.aclose()

    def note(_address: str, reason: str) -> None:
        if reason:
            dropped.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, drop, listeners)
        client = NatsClient([address])
        client.on_change = note
        await nursery.start(client.run)
        await dropped.wait()
        for _ in range(20):  # a reconnection would come before these
            async with await trio.open_tcp_stream(address.host, address.port) as other:
                assert (await other.receive_some()).startswith(b"INFO")
        assert client.connections == 1
        nursery.cancel_scope.cancel()
