"""Messages that are passed on while they come: a client, a connection, the relay's pool, and a next hop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from penstock.delivery.passthrough import PassthroughDelivery, PassthroughSettings
from penstock.message import Message
from penstock.relay.ahead import Callahead
from penstock.relay.hop import HopLimits
from penstock.relay.pool import Pool
from penstock.reply import Reply
from penstock.server.connection import Connection
from tests.helpers import PEER, FakeWorker, Recorder, Replies, listener_of
from tests.relay.fake import CHUNKING, CLOSE, RESET, STALL, FakeHop, serving
from tests.relay.test_ahead import Map

TEXT = b"Subject: x\r\n\r\nHello\r\n..dot\r\n"
LARGE = b"Subject: x\r\n\r\n" + b"x" * 98 + b"\r\n" + (b"y" * 98 + b"\r\n") * 20_000


class Client:
    """A client of a connection whose messages are passed on."""

    def __init__(self, stream: trio.abc.Stream, spooled: Recorder) -> None:
        self.stream = stream
        self.spooled = spooled
        self._replies = Replies(stream)

    async def reply(self) -> str:
        return await self._replies.next()

    async def say(self, line: str) -> str:
        await self.stream.send_all(line.encode() + b"\r\n")
        return await self.reply()

    async def begin(self, *recipients: str, mail: str = "") -> None:
        assert (await self.say(f"MAIL FROM:<a@example.com>{mail}")).startswith("250")
        for recipient in recipients or ("b@example.org",):
            assert (await self.say(f"RCPT TO:<{recipient}>")).startswith("250")

    async def send(self, *recipients: str, text: bytes = TEXT) -> str:
        """Send a message and return what is said of it."""
        await self.begin(*recipients)
        assert (await self.say("DATA")).startswith("354")
        await self.stream.send_all(text + b".\r\n")
        return await self.reply()


@asynccontextmanager
async def passing(
    folder: Path,
    hop: FakeHop,
    *,
    policies: tuple[object, ...] = (),
    limits: HopLimits | None = None,
    listener: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Client]:
    """Run all of it. What is not passed on is spooled, that is, recorded."""
    spooled = Recorder()
    pool = Pool()
    async with serving(hop), trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        callahead = Callahead(pool, Map(hop.hop(limits=limits or HopLimits())))
        delivery = PassthroughDelivery(callahead, spooled, PassthroughSettings(**settings))
        shared = listener_of(listener or {}, delivery, folder, policies=policies)
        client_end, server_end = trio.testing.memory_stream_pair()
        connection = Connection(server_end, PEER, shared, FakeWorker())
        nursery.start_soon(connection.run)
        client = Client(client_end, spooled)
        assert (await client.reply()).startswith("220")
        assert (await client.say("EHLO client")).startswith("250")
        yield client
        await client_end.aclose()
        await pool.aclose(grace=1)
        assert shared.budget.used == 0


async def test_the_client_receives_the_250_of_the_hop(tmp_path: Path) -> None:
    hop = FakeHop(TEXT=["250 2.0.0 queued as 4711"] * 2)
    async with passing(tmp_path, hop) as client:
        for _ in range(2):
            said = await client.send()
            assert said.startswith("250 2.0.0 Ok: passed on as ")
            assert said.endswith("queued as 4711")
        assert client.spooled.delivered == []
    assert hop.connections == 1
    for text in hop.texts:
        prefix, _, rest = text.partition(b"Subject")
        assert prefix.startswith(b"Received: from client")
        assert b"Subject" + rest == TEXT + b".\r\n"
    name = said.split(" passed on as ")[1].split(":")[0].encode()
    assert name in hop.texts[1], "the id is that of the Received field"


async def test_the_text_goes_on_before_its_end(tmp_path: Path) -> None:
    hop = FakeHop(TEXT_CUT=[STALL])
    async with passing(tmp_path, hop) as client:
        await client.begin()
        assert (await client.say("DATA")).startswith("354")
        await client.stream.send_all(b"Subject: x\r\n")
        with trio.fail_after(5):
            while hop.answers["TEXT_CUT"]:  # noqa: ASYNC110 - until the hop has read a line of the text
                await trio.sleep(0.001)


@pytest.mark.parametrize("offer", [("PIPELINING",), (), CHUNKING], ids=["pipelining", "plain", "chunking"])
async def test_a_large_message_that_lies_in_a_file_here_is_passed_on_whole(
    tmp_path: Path, offer: tuple[str, ...]
) -> None:
    hop = FakeHop(offer)
    async with passing(tmp_path, hop, buffer=8192) as client:
        assert "passed on" in await client.send(text=LARGE)
    assert hop.texts[0].endswith(LARGE + b".\r\n")


async def test_bdat_and_binary_octets_are_passed_on_as_they_are(tmp_path: Path) -> None:
    hop = FakeHop(CHUNKING)
    octets = bytes(range(256)) * 100
    async with passing(tmp_path, hop) as client:
        await client.begin(mail=" BODY=BINARYMIME")
        await client.stream.send_all(b"BDAT 256\r\n" + octets[:256])
        assert (await client.reply()).startswith("250")
        await client.stream.send_all(b"BDAT %d LAST\r\n" % (len(octets) - 256) + octets[256:])
        assert "passed on" in await client.reply()
    assert b"".join(hop.texts).endswith(octets)


@pytest.mark.parametrize(
    ("answers", "refusal"),
    [
        ({"MAIL": "550 5.7.1 not from you"}, "550 5.7.1 not from you"),
        ({"RCPT": "550 5.1.1 who?"}, "550 5.1.1 who?"),
        ({"TEXT": "554 5.6.0 spam"}, "550 5.6.0 spam"),
    ],
)
async def test_a_refusal_of_the_hop_is_passed_to_the_client(
    tmp_path: Path, answers: dict[str, str], refusal: str
) -> None:
    hop = FakeHop(**answers)
    async with passing(tmp_path, hop) as client:
        assert await client.send() == refusal
        assert "passed on" in await client.send()
        assert client.spooled.delivered == []


@pytest.mark.parametrize(
    "answers",
    [
        {"CONNECT": f"421 no{CLOSE}"},
        {"MAIL": "451 4.3.0 later"},
        {"RCPT": "450 4.2.0 greylisted"},
        {"DATA": "451 4.3.0 later"},
        {"TEXT": "452 4.3.1 full"},
        {"TEXT": CLOSE},
        {"TEXT": RESET},
        {"RCPT": CLOSE},
        {"TEXT_CUT": CLOSE},
        {"TEXT_CUT": f"451 4.3.0 enough{CLOSE}"},
    ],
    ids=str,
)
@pytest.mark.parametrize("text", [TEXT, LARGE], ids=["small", "large"])
async def test_whatever_else_happens_the_message_is_spooled(
    tmp_path: Path, answers: dict[str, str], text: bytes
) -> None:
    hop = FakeHop(**answers)
    async with passing(tmp_path, hop) as client:
        assert "Ok: kept as" in await client.send(text=text)
        (spooled,) = client.spooled.delivered
        assert spooled["body"] == text.replace(b"\r\n..", b"\r\n.").decode()
    assert hop.texts == []


async def test_a_message_is_spooled_if_the_hop_does_not_answer_in_time(tmp_path: Path) -> None:
    hop = FakeHop(TEXT=[STALL])
    async with passing(tmp_path, hop, answer=0.1) as client:
        assert "Ok: kept as" in await client.send()


@pytest.mark.parametrize("step", ["CONNECT", "MAIL", "DATA"])
async def test_a_hop_that_takes_nothing_holds_the_client_up_only_so_long(tmp_path: Path, step: str) -> None:
    hop = FakeHop((), **{step: [STALL]})
    async with passing(tmp_path, hop, patience=0.1, answer=600) as client:
        with trio.fail_after(60):
            assert "Ok: kept as" in await client.send(text=LARGE)
        assert client.spooled.delivered[0]["body"] == LARGE.decode()
    assert hop.texts == []


async def test_recipients_that_the_hop_did_not_take_are_spooled_alone(tmp_path: Path) -> None:
    hop = FakeHop(RCPT=["250 ok", "450 4.2.0 later", "550 5.1.1 who?"])
    async with passing(tmp_path, hop) as client:
        assert "Ok: kept as" in await client.send("a@x.org", "b@x.org", "c@x.org")
        (spooled,) = client.spooled.delivered
        assert spooled["recipients"] == "b@x.org c@x.org"
    assert len(hop.texts) == 1


class Refusing:
    """A policy."""

    def on_message(self, transaction: object, message: Message) -> Reply:
        return Reply(550, "5.7.1", f"not with {len(b''.join(message.body.chunks()))} octets")


async def test_a_message_that_a_policy_judges_is_not_begun_at_the_hop(tmp_path: Path) -> None:
    hop = FakeHop()
    async with passing(tmp_path, hop, policies=(Refusing(),)) as client:
        assert await client.send() == f"550 5.7.1 not with {len(TEXT) - 1} octets"
        assert client.spooled.delivered == []
    assert hop.texts == []


async def test_a_message_that_loops_is_not_ended_at_the_hop(tmp_path: Path) -> None:
    hop = FakeHop()
    async with passing(tmp_path, hop, listener={"max_hops": 2}) as client:
        assert (await client.send(text=b"Received: a\r\nReceived: b\r\n\r\n")).startswith("554 5.4.6")
    assert hop.texts == []


@pytest.mark.parametrize("text", [b"Subject: x\r\n", LARGE], ids=["small", "large"])
async def test_a_client_that_leaves_in_the_middle_leaves_nothing_at_the_hop(tmp_path: Path, text: bytes) -> None:
    hop = FakeHop()
    async with passing(tmp_path, hop) as client:
        await client.begin()
        assert (await client.say("DATA")).startswith("354")
        await client.stream.send_all(text)
        await trio.testing.wait_all_tasks_blocked()
    assert hop.texts == []
    assert client.spooled.delivered == []


async def test_a_text_that_is_refused_for_itself_is_not_ended_at_the_hop(tmp_path: Path) -> None:
    hop = FakeHop()
    async with passing(tmp_path, hop) as client:
        assert (await client.send(text=b"Subject: x\0\r\n\r\n")).startswith("550 5.6.0")
    assert hop.texts == []


async def test_mail_without_one_next_hop_goes_to_the_spool(tmp_path: Path) -> None:
    hop = FakeHop()
    async with passing(tmp_path, hop) as client:
        for recipients in (("a@local.org",), ("a@x.org", "b@local.org"), ("a@dns.org",)):
            assert "Ok: kept as" in await client.send(*recipients)
    assert hop.connections == 0


async def test_a_hop_without_room_is_not_waited_for(tmp_path: Path) -> None:
    hop = FakeHop(CONNECT=[f"421 no{CLOSE}"])
    async with passing(tmp_path, hop, limits=HopLimits(breaker_failures=1)) as client:
        for _ in range(3):
            assert "Ok: kept as" in await client.send()
    assert hop.connections == 1
