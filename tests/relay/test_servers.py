"""The relay and real servers: our own, and aiosmtpd."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Session
from aiosmtpd.smtp import Envelope as TheirEnvelope

from penstock.relay.hop import Hop, NextHopUnavailable, Outcome, TlsPolicy
from penstock.relay.pool import Pool
from penstock.testing import SmtpServer
from tests.ports import free_port
from tests.relay.fake import PLAIN, PREFIX, TEXT, Text, send, told

RANDOM = random.Random(4)
LINES = b"".join(
    RANDOM.choice([b"", b".", b"..", b"\xc3\xa4\xff", b"x" * 998, b".x", b"From "]) + b"\r\n" for _ in range(5000)
)
BODIES = {
    "small": TEXT,
    "without an end": b"Subject: x\r\n\r\nno line end",
    "large": b"Subject: x\r\n\r\n" + LINES,
    "empty": b"",
}
OFFERS: dict[str, dict[str, bool]] = {
    "all": {},
    "no chunking": {"chunking": False, "binarymime": False},
    "neither": {"chunking": False, "binarymime": False, "pipelining": False},
}


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("lmtp", [False, True], ids=["smtp", "lmtp"])
async def test_bodies_arrive_at_our_own_server_as_they_were(pool: Pool, offer: str, lmtp: bool) -> None:
    with SmtpServer(lmtp=lmtp, listener={"extensions": OFFERS[offer]}) as server:
        hop = Hop(host="127.0.0.1", port=server.port, kind="lmtp" if lmtp else "smtp", tls=PLAIN)
        for name, body in BODIES.items():
            for in_memory in (True, False):
                text = Text(*(body[place : place + 7777] for place in range(0, len(body), 7777)), in_memory=in_memory)
                results = await send(pool, hop, "a@x.org", "b@x.org", body=text, body_type="8BITMIME")
                assert told(results) == "delivered 250, delivered 250", name
                ended = body if offer == "all" or not body or body.endswith(b"\r\n") else body + b"\r\n"
                assert server.inbox.last.raw == PREFIX + ended, name


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
async def test_our_own_server_with_tls_and_a_password(pool: Pool, tls: Any) -> None:
    with SmtpServer(tls=tls, users={"alice": "secret"}, require_auth=True) as server:
        policy = TlsPolicy(mode="verify", implicit=tls == "implicit", ca_file=str(server.ca_file), name="localhost")
        hop = Hop(host="127.0.0.1", port=server.port, tls=policy, user="alice", password="secret")
        for body in BODIES.values():
            assert told(await send(pool, hop, body=Text(body))) == "delivered 250"
        assert server.inbox.last.identity == "alice"
        assert server.inbox.last.tls is not None
        wrong = Hop(host="127.0.0.1", port=server.port, tls=policy, user="alice", password="wrong")
        with pytest.raises(NextHopUnavailable, match="535"):
            await send(pool, wrong)


async def test_utf8_addresses_arrive_at_our_own_server(pool: Pool) -> None:
    with SmtpServer() as server:
        hop = Hop(host="127.0.0.1", port=server.port, tls=PLAIN)
        assert told(await send(pool, hop, "jörg@例え.jp", sender="ä@x.org", smtputf8=True)) == "delivered 250"
        assert server.inbox.last.recipients == ("jörg@例え.jp",)
    with SmtpServer(listener={"extensions": {"smtputf8": False}}) as server:
        hop = Hop(host="127.0.0.1", port=server.port, tls=PLAIN)
        assert told(await send(pool, hop, "jörg@x.org", smtputf8=True)) == "failed 5.6.7"


async def test_our_own_server_with_few_recipients_a_transaction(pool: Pool) -> None:
    with SmtpServer(listener={"limits": {"recipients": 120}}) as server:
        hop = Hop(host="127.0.0.1", port=server.port, tls=PLAIN)
        results = await send(pool, hop, *(f"u{number}@x.org" for number in range(250)))
        assert {one.kind for one in results} == {Outcome.DELIVERED}
        assert sorted(len(message.recipients) for message in server.inbox) == [10, 120, 120]


async def test_a_server_that_leaves_is_found_again(pool: Pool) -> None:
    with SmtpServer() as server:
        hop = Hop(host="127.0.0.1", port=server.port, tls=PLAIN)
        assert told(await send(pool, hop)) == "delivered 250"
        address = f"127.0.0.1:{server.port}"
    with pytest.raises(NextHopUnavailable):
        await send(pool, hop)
    with SmtpServer(address=address) as server:
        assert told(await send(pool, hop)) == "delivered 250"


class Keeping:
    """A handler of aiosmtpd that keeps the texts."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []

    async def handle_DATA(self, _: SMTP, __: Session, message: TheirEnvelope) -> str:  # noqa: N802
        assert isinstance(message.content, bytes)
        self.texts.append(message.content)
        return "250 2.0.0 kept"


async def test_bodies_arrive_at_aiosmtpd_as_they_were(pool: Pool) -> None:
    handler = Keeping()
    port = free_port()
    controller = Controller(handler, hostname="127.0.0.1", port=port, data_size_limit=0)
    await trio.to_thread.run_sync(controller.start)
    try:
        hop = Hop(host="127.0.0.1", port=port, tls=PLAIN)
        bodies = [body for name, body in BODIES.items() if name != "empty"]
        for body in bodies:
            assert told(await send(pool, hop, body=Text(body), body_type="8BITMIME")) == "delivered 250"
    finally:
        await trio.to_thread.run_sync(controller.stop)
    assert handler.texts == [PREFIX + (body if body.endswith(b"\r\n") else body + b"\r\n") for body in bodies]
