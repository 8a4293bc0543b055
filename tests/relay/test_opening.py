"""From the connection to the first transaction: EHLO, TLS, AUTH."""

from __future__ import annotations

import base64
import math
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trustme

from penstock.net.connect import connect_unix
from penstock.relay.connection import HopConnection
from penstock.relay.hop import AuthPolicy, Hop, NextHopUnavailable, TlsPolicy
from penstock.relay.pool import Pool
from penstock.smtp.client_session import Step
from tests.relay.fake import CLOSE, STALL, FakeHop, Text, envelope, send, serving, told
from tests.relay.test_limits import until


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


def contexts(authority: trustme.CA, name: str = "127.0.0.1") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, key_type=trustme.KeyType.ECDSA).configure_cert(context)
    return context


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return str(tmp_path / "ca.pem")


def starttls(authority: trustme.CA, name: str = "127.0.0.1", **answers: str | list[str]) -> FakeHop:
    hop = FakeHop(("PIPELINING", "STARTTLS", "AUTH PLAIN LOGIN"), **answers)
    hop.tls = contexts(authority, name)
    return hop


async def test_a_server_without_ehlo_gets_helo(pool: Pool) -> None:
    hop = FakeHop(EHLO="502 what")
    async with serving(hop):
        assert told(await send(pool, hop.hop())) == "delivered 250"
    assert hop.heard[:2] == ["EHLO client.example.org", "HELO client.example.org"]


async def test_an_lmtp_server_gets_lhlo_and_replies_for_each_recipient(pool: Pool) -> None:
    hop = FakeHop(RCPT=["250 ok", "550 5.1.1 no"], TEXT=["250 2.0.0 taken", "452 4.2.2 full"])
    hop.is_lmtp = True
    async with serving(hop):
        results = await send(pool, hop.hop(kind="lmtp"), "a@x.org", "b@x.org", "c@x.org")
    assert told(results) == "delivered 250, failed 550, deferred 452"
    assert hop.verbs() == "LHLO MAIL RCPT RCPT RCPT DATA"


async def test_a_unix_socket_is_a_hop(pool: Pool, tmp_path: Path, nursery: trio.Nursery) -> None:
    hop = FakeHop()
    hop.is_lmtp = True
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(str(tmp_path / "lmtp"))
    sock.listen()
    nursery.start_soon(trio.serve_listeners, hop.serve, [trio.SocketListener(sock)])
    assert told(await send(pool, Hop(path=str(tmp_path / "lmtp"), kind="lmtp"))) == "delivered 250"
    with pytest.raises(NextHopUnavailable):
        await send(pool, Hop(path=str(tmp_path / "nothing"), kind="lmtp"))
    with pytest.raises(OSError):
        await connect_unix(str(tmp_path / "nothing"))


@pytest.mark.parametrize("mode", ["opportunistic", "require", "verify"])
async def test_tls_is_used_where_it_is_offered(pool: Pool, authority: trustme.CA, ca_file: str, mode: str) -> None:
    hop = starttls(authority)
    async with serving(hop):
        there = hop.hop(tls=TlsPolicy(mode=mode, ca_file=ca_file))  # type: ignore[arg-type]
        for _ in range(2):
            assert told(await send(pool, there)) == "delivered 250"
    assert hop.verbs() == "EHLO STARTTLS EHLO MAIL RCPT DATA MAIL RCPT DATA"


async def test_none_does_not_ask_for_tls(pool: Pool, authority: trustme.CA) -> None:
    hop = starttls(authority)
    async with serving(hop):
        assert told(await send(pool, hop.hop(tls=TlsPolicy(mode="none")))) == "delivered 250"
    assert hop.verbs() == "EHLO MAIL RCPT DATA"


async def test_implicit_tls_begins_with_the_first_octet(pool: Pool, authority: trustme.CA, ca_file: str) -> None:
    hop = starttls(authority)
    hop.tls_at_once = True
    async with serving(hop):
        there = hop.hop(tls=TlsPolicy(mode="verify", implicit=True, ca_file=ca_file))
        assert told(await send(pool, there)) == "delivered 250"
    assert hop.verbs() == "EHLO MAIL RCPT DATA"


@pytest.mark.parametrize("mode", ["require", "verify"])
@pytest.mark.parametrize("refusal", ["not offered", "454 4.7.0 not now"])
async def test_a_hop_without_the_tls_that_is_required_gets_nothing(
    pool: Pool, authority: trustme.CA, mode: str, refusal: str
) -> None:
    hop = FakeHop() if refusal == "not offered" else starttls(authority, STARTTLS=refusal)
    async with serving(hop):
        with pytest.raises(NextHopUnavailable, match="TLS"):
            await send(pool, hop.hop(tls=TlsPolicy(mode=mode)))  # type: ignore[arg-type]
    assert "MAIL" not in hop.verbs()


async def test_opportunistic_goes_on_in_the_clear_when_starttls_is_refused(pool: Pool, authority: trustme.CA) -> None:
    hop = starttls(authority, STARTTLS="454 4.7.0 not now")
    async with serving(hop):
        assert told(await send(pool, hop.hop(tls=TlsPolicy()))) == "delivered 250"
    assert hop.connections == 1


async def test_opportunistic_repeats_in_clear_text_after_a_failure(pool: Pool, authority: trustme.CA) -> None:
    hop = starttls(authority, STARTTLS=[f"220 go on{CLOSE}"])
    async with serving(hop):
        assert told(await send(pool, hop.hop(tls=TlsPolicy()))) == "delivered 250"
    assert hop.connections == 2
    assert hop.verbs().removesuffix(" QUIT") == "EHLO STARTTLS EHLO MAIL RCPT DATA"


def wanting_a_certificate(authority: trustme.CA) -> FakeHop:
    """Return a hop that refuses our end of TLS 1.3 when we believe that all is well."""
    hop = starttls(authority)
    assert hop.tls is not None
    hop.tls.minimum_version = ssl.TLSVersion.TLSv1_3
    hop.tls.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(hop.tls)
    return hop


def leaving_behind_the_handshake(authority: trustme.CA) -> FakeHop:
    return starttls(authority, EHLO=["250-hop\r\n250 STARTTLS", CLOSE])


@pytest.mark.parametrize("make", [wanting_a_certificate, leaving_behind_the_handshake])
async def test_a_connection_lost_after_the_handshake_is_a_failure(
    pool: Pool, authority: trustme.CA, make: Callable[[trustme.CA], FakeHop]
) -> None:
    hop = make(authority)
    async with serving(hop):
        assert told(await send(pool, hop.hop(tls=TlsPolicy()))) == "delivered 250"
        assert hop.connections == 2
        verbs = hop.verbs().removesuffix(" QUIT")
        assert verbs.endswith(("STARTTLS EHLO MAIL RCPT DATA", "EHLO EHLO MAIL RCPT DATA"))
    hop = make(authority)
    async with serving(hop):
        with pytest.raises(NextHopUnavailable, match="after the TLS handshake"):
            await send(pool, hop.hop(tls=TlsPolicy(mode="require")))
    assert "MAIL" not in hop.verbs()


async def test_a_handshake_that_takes_too_long_is_one_that_failed(pool: Pool, authority: trustme.CA) -> None:
    hop = starttls(authority, STARTTLS=[f"220 go on{STALL}"])

    async def one() -> None:
        assert told(await send(pool, hop.hop(tls=TlsPolicy()))) == "delivered 250"

    def shaking() -> list[HopConnection]:
        open_ones = pool._host_pools[hop.hop(tls=TlsPolicy())]._open
        return [each for each in open_ones if each._session.step is Step.HANDSHAKE]

    async with serving(hop), trio.open_nursery() as nursery:
        nursery.start_soon(one)
        await until(lambda: "STARTTLS" in hop.heard and shaking())
        shaking()[0].check_clock(math.inf)
    assert hop.verbs().removesuffix(" QUIT") == "EHLO STARTTLS EHLO MAIL RCPT DATA"


async def test_verify_wants_a_certificate_for_the_name_of_the_hop(
    pool: Pool, authority: trustme.CA, ca_file: str
) -> None:
    hop = starttls(authority, "mx.example.org")
    async with serving(hop):
        with pytest.raises(NextHopUnavailable, match=r"TLS handshake failed: .*not valid for '127.0.0.1'"):
            await send(pool, hop.hop(tls=TlsPolicy(mode="verify", ca_file=ca_file)))
        with pytest.raises(NextHopUnavailable, match=r"TLS handshake failed: .*local issuer"):
            await send(pool, hop.hop(tls=TlsPolicy(mode="verify", name="mx.example.org")))
        assert told(await send(pool, hop.hop(tls=TlsPolicy(mode="require")))) == "delivered 250"
        there = hop.hop(tls=TlsPolicy(mode="verify", ca_file=ca_file, name="mx.example.org"))
        assert told(await send(pool, there)) == "delivered 250"


async def test_a_ca_file_that_is_none_is_said_to_be(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    for file in ("ca.pem", "missing.pem"):
        with pytest.raises(NextHopUnavailable):
            await send(pool, FakeHop().hop(tls=TlsPolicy(mode="verify", ca_file=str(tmp_path / file))))


async def test_what_is_said_between_starttls_and_tls_ends_the_conversation(pool: Pool, authority: trustme.CA) -> None:
    hop = starttls(authority, STARTTLS=["220 go on\r\n250 injected"] * 3)
    async with serving(hop):
        with pytest.raises(NextHopUnavailable, match="between STARTTLS and TLS"):
            await send(pool, hop.hop(tls=TlsPolicy(mode="require")))


async def test_a_smart_host_gets_our_credentials(pool: Pool, authority: trustme.CA) -> None:
    hop = starttls(authority, AUTH="235 2.7.0 welcome")
    async with serving(hop):
        there = hop.hop(
            tls=TlsPolicy(mode="require"), user="bob", password="secret", auth=AuthPolicy(unverified_tls=True)
        )
        assert told(await send(pool, there)) == "delivered 250"
    assert "AUTH PLAIN " + base64.b64encode(b"\0bob\0secret").decode() in hop.heard
    assert hop.verbs() == "EHLO STARTTLS EHLO AUTH MAIL RCPT DATA"


async def test_a_password_is_not_shown_in_the_clear(pool: Pool) -> None:
    hop = FakeHop(("AUTH PLAIN LOGIN",))
    async with serving(hop):
        with pytest.raises(NextHopUnavailable, match="unverified server"):
            await send(pool, hop.hop(user="bob", password="secret"))
    assert hop.verbs() == "EHLO"


@pytest.mark.parametrize(("answer", "status"), [("535 5.7.8 wrong", "5.7.8"), ("454 4.7.0 later", "4.7.0")])
async def test_a_smart_host_that_does_not_know_us_is_down(
    pool: Pool, authority: trustme.CA, ca_file: str, answer: str, status: str
) -> None:
    hop = starttls(authority, AUTH=answer)
    async with serving(hop):
        with pytest.raises(NextHopUnavailable) as caught:
            await send(
                pool,
                hop.hop(tls=TlsPolicy(mode="verify", ca_file=ca_file), user="bob", password="secret"),
            )
    assert caught.value.status == status


async def test_a_message_that_the_hop_cannot_accept_is_not_sent(pool: Pool) -> None:
    hop = FakeHop(("PIPELINING", "SIZE 20", "REQUIRETLS"))
    async with serving(hop):
        big = await send(pool, hop.hop(), "a@x.org", "b@x.org")
        (secret,) = await pool.deliver(hop.hop(), envelope(requiretls=True), b"", Text(), 0)
    assert [one.status for one in big] == ["5.3.4", "5.3.4"]
    assert told(big) == "failed 5.3.4, failed 5.3.4"
    assert secret.status == "5.7.30"
    assert "MAIL" not in hop.verbs()
