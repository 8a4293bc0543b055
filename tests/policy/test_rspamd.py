"""The client of rspamd's HTTP protocol, against a server that does what the tests tell it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from penstock.message import Message
from penstock.policy.rspamd import RspamdCheck
from penstock.policy.settings import RspamdSettings
from penstock.reply import CHECK_FAILED, Reply
from penstock.transaction import Transaction
from tests.policy.judging import judge, make_message, make_transaction, octets_of


def answer(json: str, *fields: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {len(json)}", *fields, "", json]).encode()


class Server:
    """Answers all requests with the same octets."""

    def __init__(self, answer: bytes, *, hangs: bool = False) -> None:
        self.answer = answer
        self.hangs = hangs
        self.requests: list[bytes] = []
        self.connections = 0
        self.url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            self.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
            nursery.start_soon(trio.serve_listeners, self._serve, [listener])
            yield
            nursery.cancel_scope.cancel()

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        request = b""
        async with stream:
            with suppress(trio.BrokenResourceError):
                while data := await stream.receive_some():
                    request += data
                    head, _, body = request.partition(b"\r\n\r\n")
                    length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0] or 0)
                    if b"\r\n\r\n" not in request or len(body) < length:
                        continue
                    self.requests.append(request)
                    request = b""
                    if self.hangs:
                        await trio.sleep_forever()
                    for at in range(0, len(self.answer), 7):
                        await stream.send_all(self.answer[at : at + 7])
                    if b"close" in self.answer or not self.answer:
                        return


async def asked(
    server: Server, transaction: Transaction | None = None, message: Message | None = None, **settings: object
) -> Reply | None:
    async with server.serving():
        wanted = RspamdSettings(url=server.url, **settings)  # type: ignore[arg-type]
        return (await judge(RspamdCheck(wanted, "enforce", "mx.example.org"), transaction, message))[0]


async def test_the_message_and_its_client_are_sent() -> None:
    server = Server(answer('{"action": "no action", "score": 1.5}'))
    transaction = make_transaction("alice@example.com", "bob@example.org", "carol@example.org")
    message = make_message(transaction, piece=10)
    assert await asked(server, transaction, message) is None
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert body == octets_of(message)
    for field in (b"IP: 198.51.100.1", b"Helo: client.example", b"From: alice@example.com", b"Rcpt: bob@example.org"):
        assert field in head.split(b"\r\n")
    assert head.count(b"Rcpt: ") == 2
    assert transaction.results.scores == {"rspamd": 1.5}


@pytest.mark.parametrize(
    ("action", "code", "quarantine"),
    [
        ("reject", 550, ""),
        ("soft reject", 451, ""),
        ("greylist", 451, ""),
        ("add header", 0, "yes"),
        ("rewrite subject", 0, "yes"),
        ("no action", 0, ""),
    ],
)
async def test_its_action_decides_if_it_may(action: str, code: int, quarantine: str) -> None:
    for verdict in (True, False):
        transaction = make_transaction()
        server = Server(answer(f'{{"action": "{action}", "score": 20, "messages": {{"smtp_message": "Why"}}}}'))
        reply = await asked(server, transaction, verdict=verdict, scores=False)
        assert (reply.code if reply is not None else 0) == (code if verdict else 0)
        assert transaction.quarantine == (quarantine if verdict else "")
        assert reply is None or reply.text == "Why"
        assert transaction.results.score == 0


JSON = '{"action": "reject", "score": 20.0, "messages": {"smtp_message": "Why"}}'


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        answer(JSON[:30]),
        answer(JSON, "Connection: close")[:-30],
        answer(JSON[:-1] + "\xff"),
        answer("[" * 100_000),
        answer('{"score": 20.0}'),
        answer("{}{}"),
        b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n{}",
        answer("{}", "Connection: close"),
        answer('{"action": "reject", "score": "much"}'),
        answer('{"action": "reject", "score": 1e300}'),
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n",
        b"SSH-2.0-x\r\n\r\n",
        b"x" * 70_000,
    ],
)
async def test_answers_that_mean_nothing_are_failures(octets: bytes) -> None:
    assert await asked(Server(octets)) == CHECK_FAILED
    assert await asked(Server(octets), fail="accept") is None


async def test_a_server_that_hangs_costs_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    start = trio.current_time()
    assert await asked(Server(b"", hangs=True), deadline=3) == CHECK_FAILED
    assert trio.current_time() - start == 3


async def test_half_an_answer_costs_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    for missing in (1, 30, len(answer(JSON)) - 10):
        start = trio.current_time()
        assert await asked(Server(answer(JSON)[:-missing]), deadline=3) == CHECK_FAILED
        assert trio.current_time() - start == 3


@pytest.mark.parametrize("field", ["Connection: keep-alive", "Connection: close"])
async def test_connections_are_kept_if_the_server_does(field: str) -> None:
    server = Server(answer('{"action": "no action"}', field))
    async with server.serving():
        check = RspamdCheck(RspamdSettings(url=server.url), "enforce", "mx.example.org")
        for _ in range(3):
            assert (await judge(check))[0] is None
    assert server.connections == (1 if "keep" in field else 3)
