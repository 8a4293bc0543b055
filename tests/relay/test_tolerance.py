"""Next hops that do not behave as the standards say, or as the settings ask: mail is neither lost nor sent twice."""

from __future__ import annotations

import base64

import pytest
import trio
import trustme

import penstock.net.client
import penstock.relay.pool
from penstock.net.tls import TlsTurns
from penstock.relay.hop import AuthPolicy, HopLimits, NextHopUnavailable, TlsPolicy
from penstock.relay.pool import Pool, PoolSettings
from tests.relay.fake import CHUNKING, CLOSE, ORDINARY, PREFIX, STALL, STUFFED, TEXT, FakeHop, Text, send, serving, told
from tests.relay.test_opening import authority, ca_file, starttls

__all__ = ["authority", "ca_file"]  # fixtures
UTF8 = "Subject: Grüße\r\n\r\nHello\r\n".encode()


# ---- TLS that fails


async def test_failed_tls_is_skipped_for_one_message_only(pool: Pool, authority: trustme.CA) -> None:
    hop = starttls(authority, STARTTLS=[f"220 go on{CLOSE}"])
    async with serving(hop):
        there = hop.hop(tls=TlsPolicy())
        assert told(await send(pool, there)) == "delivered 250"
        await pool_is_idle(pool)
        assert told(await send(pool, there)) == "delivered 250"
    assert hop.verbs() == "EHLO STARTTLS EHLO MAIL RCPT DATA QUIT EHLO STARTTLS EHLO MAIL RCPT DATA"


@pytest.mark.parametrize("step", ["MAIL", "RCPT", "DATA"])
@pytest.mark.parametrize("starttls_reply", [f"220 go on{CLOSE}", "454 4.7.0 not now"])
async def test_530_after_a_fallback_defers_and_tls_is_tried_again(
    pool: Pool, authority: trustme.CA, step: str, starttls_reply: str
) -> None:
    """RFC 3207 4: the hop wants TLS, which failed once. That is no reason to return the mail."""
    hop = starttls(authority, STARTTLS=[starttls_reply])
    hop.answers[step] = ["530 5.7.0 Must issue a STARTTLS command first"]
    async with serving(hop):
        there = hop.hop(tls=TlsPolicy())
        assert told(await send(pool, there)) == "deferred 530"
        await pool_is_idle(pool)
        assert told(await send(pool, there)) == "delivered 250"
    assert hop.heard.count("STARTTLS") == 2
    assert hop.texts == [STUFFED]


@pytest.mark.parametrize(
    ("words", "outcome"),
    [
        ("554 5.7.0 Must issue a STARTTLS command first", "deferred"),
        ("550 5.7.1 TLS is required", "deferred"),
        ("523 5.7.10 Encryption Needed", "deferred"),
        ("538 5.7.11 Not without encryption", "deferred"),
        ("550 Use SSL/TLS", "deferred"),
        ("550 5.7.1 TLSv1.2 or later required", "deferred"),
        ("550 5.7.1 Unencrypted connections are refused: https://mx.example/policy", "deferred"),
        ("550 5.7.1 Spam", "failed"),
        ("550 5.1.1 Unknown", "failed"),
        ("550 <kessler@example.com>: User unknown", "failed"),
        ("550 <bob+tls@example.com>, ssl@example.com: User unknown", "failed"),
        ("550 5.7.1 Spam, see https://ssl.example.com/?tls", "failed"),
        ("550 5.1.1 bob: unknown in ssl directory", "failed"),
    ],
)
async def test_any_wish_for_tls_after_a_fallback_defers(
    pool: Pool, authority: trustme.CA, words: str, outcome: str
) -> None:
    hop = starttls(authority, STARTTLS=[f"220 go on{CLOSE}"], RCPT=[words])
    async with serving(hop):
        assert told(await send(pool, hop.hop(tls=TlsPolicy()))) == f"{outcome} {words[:3]}"


async def pool_is_idle(pool: Pool) -> None:
    """Wait until all connections are closed."""
    with trio.fail_after(30):
        while pool.connections:  # noqa: ASYNC110 - there is no event
            await trio.sleep(0.005)


@pytest.mark.parametrize("mode", ["starttls", "implicit"])
async def test_tls_works_without_borrowing_the_parts_of_the_stream(
    pool: Pool, authority: trustme.CA, ca_file: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TlsTurns, "of", lambda _: None)
    hop = starttls(authority, AUTH="235 2.7.0 welcome")
    hop.tls_at_once = mode == "implicit"
    large = b"0123456789abcde\r\n" * 60_000
    async with serving(hop):
        policy = TlsPolicy(mode="verify", ca_file=ca_file, implicit=mode == "implicit")
        there = hop.hop(tls=policy, user="bob", password="secret")
        for body in (Text(TEXT), Text(large, in_memory=False), Text(TEXT)):
            assert told(await send(pool, there, body=body)) == "delivered 250"
        await pool.aclose()
    assert hop.texts == [STUFFED, PREFIX + large + b".\r\n", STUFFED]
    assert hop.connections == 1
    assert hop.heard[-1] == "QUIT"


# ---- replies


@pytest.mark.parametrize(
    "reply",
    [
        "250 ok\r",
        "250 2.0.0 ok\r\r\r",
        "451-first\r\n250 ok",
        "250-a\r\r\n250 b\r",
        "250\r",
        "255 ok",
        "\r\n250 ok",
        "250-a\r\n\r\n\n250 b",
        "250 ok\r\n",
    ],
    ids=repr,
)
@pytest.mark.parametrize("offer", [ORDINARY, CHUNKING, ()], ids=["pipelining", "chunking", "plain"])
async def test_any_2xx_at_the_end_of_the_text_is_a_success(pool: Pool, reply: str, offer: tuple[str, ...]) -> None:
    hop = FakeHop(offer, TEXT=[reply], BDAT=[reply])
    async with serving(hop):
        assert told(await send(pool, hop.hop())).startswith("delivered 25")


async def test_a_2xx_counts_whatever_comes_after_it(pool: Pool) -> None:
    hop = FakeHop(TEXT=[f"250 2.0.0 taken\r\nrubbish{CLOSE}"])
    async with serving(hop):
        assert told(await send(pool, hop.hop())) == "delivered 250"


@pytest.mark.parametrize("greeting", ["\r\n220 hop", "\r\n\r\n\n220-hop\r\n220 ready", "220 hop\r"], ids=repr)
async def test_blank_lines_before_a_greeting_are_skipped(pool: Pool, greeting: str) -> None:
    hop = FakeHop(CONNECT=[greeting])
    async with serving(hop):
        assert told(await send(pool, hop.hop())) == "delivered 250"
    assert hop.connections == 1


# ---- what the hop cannot take


@pytest.mark.parametrize("in_memory", [True, False])
async def test_a_utf8_header_is_not_sent_to_a_hop_without_smtputf8(pool: Pool, in_memory: bool) -> None:
    """RFC 6531 3.2."""
    hop = FakeHop(("PIPELINING", "8BITMIME"))
    async with serving(hop):
        refused = await send(pool, hop.hop(), body=Text(UTF8, in_memory=in_memory), smtputf8=True)
        assert told(refused) == "failed 5.6.7"
        assert told(await send(pool, hop.hop(), body=Text(TEXT, in_memory=in_memory), smtputf8=True)) == "delivered 250"
        assert told(await send(pool, hop.hop(), body=Text(UTF8, in_memory=in_memory))) == "delivered 250"
    assert hop.texts == [STUFFED, PREFIX + UTF8 + b".\r\n"]


async def test_a_utf8_text_without_a_header_is_sent_to_any_hop(pool: Pool) -> None:
    hop = FakeHop(("PIPELINING", "8BITMIME"))
    prefix = PREFIX + b"\r\n"
    async with serving(hop):
        assert told(await send(pool, hop.hop(), prefix=prefix, body=Text(UTF8), smtputf8=True)) == "delivered 250"
    assert hop.texts == [prefix + UTF8 + b".\r\n"]


@pytest.mark.parametrize("before", [65_000, 70_000, 1 << 20])
async def test_a_utf8_header_is_found_wherever_it_is(pool: Pool, before: int) -> None:
    lines = b"X: 0123456789\r\n" * (before // 15)
    hop = FakeHop(("PIPELINING",))
    async with serving(hop):
        refused = await send(pool, hop.hop(), body=Text(lines + UTF8), smtputf8=True)
        assert told(refused) == "failed 5.6.7"
        if before < 1 << 20:
            assert told(await send(pool, hop.hop(), body=Text(lines + TEXT), smtputf8=True)) == "delivered 250"


async def test_a_utf8_header_is_sent_as_it_is_if_the_settings_ask_for_it(nursery: trio.Nursery) -> None:
    pool = Pool(smtputf8_downgrade="send")
    await nursery.start(pool.run)
    hop = FakeHop(("PIPELINING",))
    async with serving(hop):
        assert told(await send(pool, hop.hop(), body=Text(UTF8), smtputf8=True)) == "delivered 250"
        await pool.aclose()
    assert hop.heard[1] == "MAIL FROM:<a@example.com>"


async def test_8bit_text_goes_to_a_7bit_hop_without_a_body_parameter(pool: Pool) -> None:
    hop = FakeHop(("PIPELINING",))
    async with serving(hop):
        assert told(await send(pool, hop.hop(), body=Text(UTF8), body_type="8BITMIME")) == "delivered 250"
    assert hop.heard[1] == "MAIL FROM:<a@example.com>"


# ---- shares


async def test_a_hop_without_a_connection_goes_before_many_that_wait(pool: Pool, nursery: trio.Nursery) -> None:
    silent, live = FakeHop(CONNECT=[STALL] * 9), FakeHop()
    small = Pool(PoolSettings(connections=3), journal=pool.journal)
    await nursery.start(small.run)
    async with serving(silent, live), trio.open_nursery() as waiting:
        for _ in range(5):
            waiting.start_soon(_fails, small, silent)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert small.connections == 3
        assert told(await send(small, live.hop())) == "delivered 250"
        await small.aclose(grace=0)


@pytest.mark.parametrize("step", ["CONNECT", "EHLO"])
async def test_hops_that_open_no_session_do_not_keep_the_whole_pool(
    pool: Pool, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(penstock.relay.pool, "_PATIENCE", 0.0)
    silent = [FakeHop(**{step: [STALL] * 9}) for _ in range(3)]
    live = FakeHop()
    small = Pool(PoolSettings(connections=3), journal=pool.journal)
    await nursery.start(small.run)
    async with serving(*silent, live), trio.open_nursery() as waiting:
        for hop in silent:
            waiting.start_soon(_fails, small, hop)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert told(await send(small, live.hop())) == "delivered 250"
        await small.aclose(grace=0)


async def _fails(pool: Pool, hop: FakeHop) -> None:
    with pytest.raises(NextHopUnavailable):
        await send(pool, hop.hop())


async def test_a_message_that_is_cut_at_its_end_does_not_open_the_breaker(pool: Pool) -> None:
    hop = FakeHop(TEXT=[CLOSE] * 4)
    async with serving(hop):
        there = hop.hop(limits=HopLimits(breaker_failures=2))
        for _ in range(4):
            assert told(await send(pool, there)) == "deferred 4.4.2"
            assert pool.down_until(there) == 0
        assert told(await send(pool, there)) == "delivered 250"


# ---- no text without a recipient


@pytest.mark.parametrize("in_memory", [True, False])
async def test_no_text_is_sent_before_a_recipient_is_accepted(pool: Pool, in_memory: bool) -> None:
    """A server that refuses all recipients and does not know BDAT would read the text as commands."""
    hop = FakeHop(CHUNKING, RCPT=["550 5.1.1 no", "450 4.2.1 later"])
    async with serving(hop):
        results = await send(pool, hop.hop(), "a@x.org", "b@x.org", body=Text(TEXT, in_memory=in_memory))
        assert told(results) == "failed 550, deferred 450"
        await pool.aclose()
    assert hop.verbs() == "EHLO MAIL RCPT RCPT RSET QUIT"


# ---- offers that are not kept, limits that are not told


@pytest.mark.parametrize("reply", ["502 5.5.1 unknown", "500 what"])
async def test_a_hop_that_offers_chunking_without_bdat_gets_data(pool: Pool, reply: str) -> None:
    hop = FakeHop(CHUNKING, BDAT=[reply] * 3)
    async with serving(hop):
        for _ in range(3):
            assert told(await send(pool, hop.hop())) == "delivered 250"
    assert hop.verbs().count("BDAT") == 1
    assert hop.texts == [STUFFED] * 3
    assert hop.connections == 2


@pytest.mark.parametrize(
    ("replies", "results"),
    [
        (["250 2.0.0 taken", "500 5.3.0 no"], "delivered 250, failed 500"),
        (["250 2.0.0 taken", "502 no"], "delivered 250, failed 502"),
        (["500 5.2.0 no", "250 2.0.0 taken"], "failed 500, delivered 250"),
    ],
)
async def test_a_500_for_one_recipient_of_lmtp_sends_no_text_again(
    pool: Pool, replies: list[str], results: str
) -> None:
    hop = FakeHop(CHUNKING, BDAT=replies)
    hop.is_lmtp = True
    async with serving(hop):
        assert told(await send(pool, hop.hop(kind="lmtp"), "a@x.org", "b@x.org")) == results
    assert (hop.verbs().count("BDAT"), hop.connections) == (1, 1)
    assert "DATA" not in hop.verbs()


async def test_552_too_many_recipients_without_a_status_is_temporary(pool: Pool) -> None:
    """RFC 5321 4.5.3.1.10."""
    hop = FakeHop(RCPT=["552 too many recipients", "552 5.2.2 full"])
    async with serving(hop):
        results = await send(pool, hop.hop(), "a@x.org", "b@x.org")
    assert [(one.kind.value, one.status) for one in results] == [("deferred", "4.5.3"), ("failed", "5.2.2")]


async def test_the_number_of_recipients_a_hop_takes_is_remembered(pool: Pool) -> None:
    hop = FakeHop(RCPT=["250 ok", "452 4.5.3 too many", "452 4.5.3 too many"])
    async with serving(hop):
        for _ in range(2):
            results = await send(pool, hop.hop(limits=HopLimits(messages=3)), "a@x.org", "b@x.org", "c@x.org")
            assert told(results) == ", ".join(["delivered 250"] * 3)
    assert hop.verbs().removesuffix(" QUIT") == (
        "EHLO MAIL RCPT RCPT RCPT DATA MAIL RCPT DATA MAIL RCPT DATA QUIT EHLO " + " ".join(["MAIL RCPT DATA"] * 3)
    )


# ---- passwords


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
async def test_a_password_is_given_to_a_verified_server_only(
    pool: Pool, authority: trustme.CA, ca_file: str, mechanism: str
) -> None:
    hop = starttls(authority, AUTH=["235 2.7.0 welcome"] if mechanism == "PLAIN" else ["334 VXNlcm5hbWU6"])
    hop.offer = ("PIPELINING", "STARTTLS", f"AUTH {mechanism}")
    async with serving(hop):
        words = {"user": "bob", "password": "secret"}
        with pytest.raises(NextHopUnavailable, match="unverified server"):
            await send(pool, hop.hop(tls=TlsPolicy(mode="require"), **words))
        assert "AUTH" not in hop.verbs()
        if mechanism == "PLAIN":
            there = hop.hop(tls=TlsPolicy(mode="verify", ca_file=ca_file), **words)
            assert told(await send(pool, there)) == "delivered 250"


async def test_the_preferred_mechanism_is_used(pool: Pool, authority: trustme.CA) -> None:
    hop = starttls(authority, AUTH="235 2.7.0 welcome")
    hop.offer = ("PIPELINING", "STARTTLS", "AUTH SCRAM-SHA-256 PLAIN")
    policy = AuthPolicy(mechanisms=("PLAIN", "SCRAM-SHA-256"), unverified_tls=True)
    async with serving(hop):
        there = hop.hop(tls=TlsPolicy(mode="require"), user="bob", password="secret", auth=policy)
        assert told(await send(pool, there)) == "delivered 250"
    assert "AUTH PLAIN AGJvYgBzZWNyZXQ=" in hop.heard


async def test_a_hop_cannot_keep_us_computing(pool: Pool) -> None:
    challenge = base64.b64encode(b"r=nonce,s=c2FsdA==,i=10000000").decode()
    hop = FakeHop(("PIPELINING", "AUTH SCRAM-SHA-256"), AUTH=[f"334 {challenge}"])
    async with serving(hop):
        with pytest.raises(NextHopUnavailable, match="an iteration count above 1,000,000"):
            await send(pool, hop.hop(user="bob", password="secret"))
