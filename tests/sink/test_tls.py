"""Faults of TLS, as a client meets them that trusts the authority of the sink."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import product
from pathlib import Path

import pytest
import trio
import trio.testing

from penstock.metrics._session import Metrics
from penstock.net.tls import TlsSettings, generated_certificate, server_context
from tests.sink.playing import CERTIFICATES, EHLO, Talk, talking, took
from tests.sink.test_statistics import receipts


def contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the context of the listener and that of a client that trusts it."""
    CERTIFICATES.put(folder / "tls")
    server = server_context(TlsSettings(), folder / "tls" / "server.pem")
    client = ssl.create_default_context(cafile=str(folder / "tls" / "ca.pem"))
    return server, client


def rule(fault: str, phase: str = "starttls") -> str:
    return f'longest_stall = 50\n[[rule]]\nphase = "{phase}"\ntls = "{fault}"\n'


@asynccontextmanager
async def secured(
    folder: Path, plan: str, *, tcp: bool = True, mode: str = "starttls", metrics: Metrics | None = None
) -> AsyncIterator[tuple[Talk, ssl.SSLContext]]:
    """Talk up to the reply to STARTTLS."""
    server, client = contexts(folder)
    settings = {"tls": {"mode": mode}}
    async with talking(
        folder, plan, settings=settings, tls=server, tcp=tcp, greeted=mode == "starttls", metrics=metrics
    ) as talk:
        if mode == "starttls":
            await talk.ask(EHLO)
        yield talk, client


async def handshake(talk: Talk, context: ssl.SSLContext) -> trio.SSLStream[trio.abc.Stream]:
    stream = trio.SSLStream(talk.stream, context, server_hostname="localhost")
    await stream.do_handshake()
    talk.stream = stream
    return stream


async def test_the_certificate_that_is_put_is_the_one_of_the_listener(tmp_path: Path) -> None:
    CERTIFICATES.put(tmp_path)
    before = (tmp_path / "server.pem").read_bytes()
    generated_certificate(tmp_path, ["localhost"])
    assert (tmp_path / "server.pem").read_bytes() == before
    assert (tmp_path / "server.pem").stat().st_mode & 0o077 == 0


async def test_without_a_fault_the_client_finds_nothing_wrong(tmp_path: Path) -> None:
    async with secured(tmp_path, "") as (talk, context):
        assert (await talk.ask("STARTTLS")).startswith("220")
        await handshake(talk, context)
        assert (await talk.mail()).startswith("250")


async def test_tls_is_refused(tmp_path: Path) -> None:
    async with secured(tmp_path, rule("refuse")) as (talk, _):
        assert (await talk.ask("STARTTLS")).startswith("454 4.7.0")
        assert (await talk.mail()).startswith("250")


@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize(("fault", "expected"), [("wrong-name", "Hostname mismatch"), ("expired", "has expired")])
async def test_a_certificate_is_wrong_in_one_way(tmp_path: Path, fault: str, expected: str, tcp: bool) -> None:
    async with secured(tmp_path, rule(fault), tcp=tcp) as (talk, context):
        assert (await talk.ask("STARTTLS")).startswith("220")
        with pytest.raises(trio.BrokenResourceError) as error:
            await handshake(talk, context)
        assert expected in str(error.value.__cause__)
        assert [each.action for each in talk.log.last] == [f"tls {fault}"]


async def test_whoever_does_not_look_is_not_disturbed_by_a_wrong_certificate(tmp_path: Path) -> None:
    async with secured(tmp_path, rule("expired")) as (talk, context):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        await talk.ask("STARTTLS")
        await handshake(talk, context)
        assert (await talk.mail()).startswith("250")


async def test_nothing_newer_than_tls_1_2(tmp_path: Path) -> None:
    async with secured(tmp_path, rule("tls-1.2")) as (talk, context):
        await talk.ask("STARTTLS")
        stream = await handshake(talk, context)
        assert stream.version() == "TLSv1.2"
        assert (await talk.mail()).startswith("250")


async def test_nothing_newer_than_tls_1_2_is_too_old_for_some(tmp_path: Path) -> None:
    async with secured(tmp_path, rule("tls-1.2")) as (talk, context):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        await talk.ask("STARTTLS")
        with pytest.raises(trio.BrokenResourceError):
            await handshake(talk, context)


async def test_a_fatal_alert_behind_the_handshake(tmp_path: Path) -> None:
    async with secured(tmp_path, rule("alert")) as (talk, context):
        await talk.ask("STARTTLS")
        stream = await handshake(talk, context)  # which is over for the client
        assert stream.version() == "TLSv1.3"
        with pytest.raises(trio.BrokenResourceError) as error:
            await talk.ask(EHLO)
        assert "alert" in str(error.value.__cause__).lower()


async def test_an_smtp_reply_in_the_place_of_a_handshake(tmp_path: Path) -> None:
    async with secured(tmp_path, rule("plaintext")) as (talk, context):
        await talk.ask("STARTTLS")
        with pytest.raises(trio.BrokenResourceError) as error:
            await handshake(talk, context)
        assert isinstance(error.value.__cause__, ssl.SSLError)


async def test_a_handshake_that_stalls(tmp_path: Path, autojump_clock: object) -> None:
    async with secured(tmp_path, rule("stall"), tcp=False) as (talk, context):
        await talk.ask("STARTTLS")

        async def shake() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await handshake(talk, context)

        assert await took(shake) == (50, None)


@pytest.mark.parametrize("fault", ["wrong-name", "plaintext", "refuse"])
async def test_what_connect_says_spoils_a_later_starttls(tmp_path: Path, fault: str) -> None:
    async with secured(tmp_path, rule(fault, "connect")) as (talk, context):
        said = await talk.ask("STARTTLS")
        if fault == "refuse":
            assert said.startswith("454")
            return
        with pytest.raises(trio.BrokenResourceError):
            await handshake(talk, context)


async def test_implicit_tls_without_a_fault(tmp_path: Path) -> None:
    plan = '[[rule]]\nphase = "banner"\nreply = "421 4.3.2 Not today"'
    async with secured(tmp_path, plan, mode="implicit") as (talk, context):
        await handshake(talk, context)
        assert await talk.reply() == "421 4.3.2 Not today"


@pytest.mark.parametrize("does", ["split = true", "read_rate = 100_000_000", "delay = { seconds = 0.001 }"])
@pytest.mark.parametrize("tcp", [True, False])
async def test_other_faults_work_inside_of_tls(tmp_path: Path, does: str, tcp: bool) -> None:
    plan = f'[[rule]]\nphase = "ehlo"\nmatch.tls = true\n{does}\n'
    plan += '[[rule]]\nphase = "dot"\nmatch.tls = true\nreply = "451 4.3.0 Later"\n'
    async with secured(tmp_path, plan, tcp=tcp) as (talk, context):
        await talk.ask("STARTTLS")
        await handshake(talk, context)
        for _ in range(2):
            assert await talk.mail(text="\r\n".join(["x" * 70] * 1000)) == "451 4.3.0 Later"
        assert (await talk.ask("QUIT")).startswith("221")


async def test_a_dressed_reply_to_starttls_goes_on_to_the_handshake(tmp_path: Path) -> None:
    async with secured(tmp_path, '[[rule]]\nphase = "starttls"\ndress = "bare-lf"') as (talk, context):
        await talk.send("STARTTLS")
        assert await talk.line() == b"220 2.0.0 Ready to start TLS\n"
        await handshake(talk, context)
        assert (await talk.mail()).startswith("250")


async def test_a_faulty_starttls_between_two_bdats_gives_the_memory_back(tmp_path: Path) -> None:
    async with secured(tmp_path, '[[rule]]\nphase = "starttls"\nreply = "220 2.0.0 Mine"') as (talk, context):
        budget = talk.connection.listener.budget
        await talk.begin()
        await talk.ask("BDAT 1002\r\n" + "x" * 1000)
        assert budget.used > 0
        assert await talk.ask("STARTTLS") == "220 2.0.0 Mine"
        await handshake(talk, context)
        assert budget.used == 0
        assert not talk.connection.is_receiving
        assert (await talk.mail()).startswith("250")


async def test_a_drop_inside_of_tls_breaks_it_off(tmp_path: Path) -> None:
    plan = '[[rule]]\nphase = "mail"\nend = "drop"'
    async with secured(tmp_path, plan) as (talk, context):
        await talk.ask("STARTTLS")
        await handshake(talk, context)
        with pytest.raises(trio.BrokenResourceError):
            await talk.ask(EHLO, "MAIL FROM:<a@example.com>")


# ---- receipts


def handshakes(metrics: Metrics) -> tuple[int, int]:
    """Return how many came to their end and how many to nothing, as the report has it."""
    report = receipts(metrics)[0].report()
    latency = report.latencies.get("tls")
    assert (0 if latency is None else latency.count) == report.sessions.tls
    return report.sessions.tls, report.sessions.tls_failed


async def greet(talk: Talk, mode: str) -> None:
    """Say what comes before the ClientHello."""
    if mode == "starttls":
        assert (await talk.ask("STARTTLS")).startswith("220")


async def handshake_with_alert(stream: trio.abc.Stream, context: ssl.SSLContext) -> None:
    """Do a handshake, and say why when it fails, as most clients do and trio's does not."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    while True:
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            await stream.send_all(outgoing.read())
            incoming.write(await stream.receive_some(65536))
        except ssl.SSLError:
            await stream.send_all(outgoing.read())
            raise


async def gone(talk: Talk) -> None:
    """Wait until the server has closed the connection and counted it out."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while await talk.line():
            pass
    await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize("mode", ["starttls", "implicit"])
async def test_a_handshake_has_a_latency_of_its_own(tmp_path: Path, mode: str, tcp: bool) -> None:
    metrics = Metrics()
    async with secured(tmp_path, "", mode=mode, tcp=tcp, metrics=metrics) as (talk, context):
        await greet(talk, mode)
        assert handshakes(metrics) == (0, 0)
        await handshake(talk, context)
        if mode == "implicit":
            assert (await talk.reply()).startswith("220")
        assert (await talk.mail()).startswith("250")
        assert handshakes(metrics) == (1, 0)
        assert 0 < metrics.latency("tls").min <= metrics.latency("tls").max
        assert metrics.latency("banner").count == 1
        await talk.ask("QUIT")
        await gone(talk)
        assert (handshakes(metrics), metrics.ends) == ((1, 0), {"QUIT": 1})


@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("mode", ["starttls", "implicit"])
async def test_a_client_that_refuses_the_certificate_is_a_handshake_that_failed(
    tmp_path: Path, mode: str, version: ssl.TLSVersion, tcp: bool
) -> None:
    metrics = Metrics()
    async with secured(tmp_path, "", mode=mode, tcp=tcp, metrics=metrics) as (talk, _):
        await greet(talk, mode)
        context = ssl.create_default_context()  # which does not know the authority of the sink
        context.minimum_version = context.maximum_version = version
        with pytest.raises(ssl.SSLCertVerificationError):
            await handshake_with_alert(talk.stream, context)
        await ended(metrics)
        assert handshakes(metrics) == (0, 1)
        (cause,) = metrics.ends
        assert "unknown ca" in cause.lower()


@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize(
    "said", [b"EHLO client.example\r\n", b"\x16\x03\x01\x00\x05\xff\xff\xff\xff\xff", b"\x00" * 600]
)
@pytest.mark.parametrize("mode", ["starttls", "implicit"])
async def test_what_is_no_client_hello_is_a_handshake_that_failed(
    tmp_path: Path, mode: str, said: bytes, tcp: bool
) -> None:
    metrics = Metrics()
    async with secured(tmp_path, "", mode=mode, tcp=tcp, metrics=metrics) as (talk, _):
        await greet(talk, mode)
        await talk.stream.send_all(said)
        await gone(talk)
        await ended(metrics)
        assert handshakes(metrics) == (0, 1)
        assert [phase for phase, *_ in metrics.counted()] == (
            ["EHLO", "STARTTLS", "banner"] if mode == "starttls" else []
        )


@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize("mode", ["starttls", "implicit"])
async def test_a_client_that_leaves_amid_a_handshake_is_one_that_failed(tmp_path: Path, mode: str, tcp: bool) -> None:
    metrics = Metrics()
    async with secured(tmp_path, "", mode=mode, tcp=tcp, metrics=metrics) as (talk, _):
        await greet(talk, mode)
        await talk.stream.aclose()
        await ended(metrics)
        assert handshakes(metrics) == (0, 1)


@pytest.mark.parametrize(
    ("fault", "mode"),
    [("refuse", "implicit"), *product(("plaintext", "wrong-name", "expired"), ("starttls", "implicit"))],
)
async def test_a_handshake_that_a_fault_has_spoilt_is_one_that_failed(tmp_path: Path, fault: str, mode: str) -> None:
    metrics = Metrics()
    plan = rule(fault, "starttls" if mode == "starttls" else "connect")
    async with secured(tmp_path, plan, mode=mode, metrics=metrics) as (talk, context):
        await greet(talk, mode)
        with pytest.raises(trio.BrokenResourceError):
            await handshake(talk, context)
        await talk.stream.aclose()
        await ended(metrics)
        assert handshakes(metrics) == (0, 1)


async def ended(metrics: Metrics) -> None:
    """Wait until all connections were counted out."""
    with trio.fail_after(60):
        while metrics.open_sessions:
            await trio.testing.wait_all_tasks_blocked(0.001)
