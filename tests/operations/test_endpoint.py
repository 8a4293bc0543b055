"""/metrics, /livez and /readyz of a server that receives mail, read by a real Prometheus parser."""

from __future__ import annotations

import http.client
import smtplib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from penstock.app import Overrides, Server, open_server
from penstock.cli.services import make_endpoint
from penstock.config import ConfigError, Settings, parse
from penstock.control import Counters as ControlCounters
from penstock.metrics.counters import Counters
from penstock.metrics.families import FAMILIES, PREFIX, PROCESS_FAMILIES
from penstock.net.listen import ListenAddress, bind
from penstock.operations.endpoint import read_token
from penstock.operations.observation import Observation, report, start_counting

TOKEN = "0123456789abcdef"


@dataclass
class FakeControl:
    """What the endpoint asks of a server."""

    is_ready: bool = True
    counters: ControlCounters = field(default_factory=ControlCounters)


@dataclass
class Observed:
    """A running server and its address of /metrics."""

    server: Server
    settings: Settings
    counters: Counters
    observation: Observation
    control: FakeControl
    port: int

    async def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        """Return status and body."""

        def ask() -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            try:
                connection.request(method, path, headers=headers)
                response = connection.getresponse()
                return response.status, response.read().decode()
            finally:
                connection.close()

        return await trio.to_thread.run_sync(ask)

    async def metrics(self) -> dict[str, Metric]:
        """Return the metric families by name, as Prometheus reads them."""
        report(self.server, self.counters)
        status, text = await self.get("/metrics")
        assert status == 200
        families = text_string_to_metric_families(text)
        return {family.name + "_total" * (family.type == "counter"): family for family in families}

    def send(self, *recipients: str, sender: str = "a@example.com", text: str = "Subject: x\r\n\r\nhello\r\n") -> None:
        """Send a message with a client of the standard library."""
        port = int(self.server.addresses[0].rpartition(":")[2])
        with smtplib.SMTP("127.0.0.1", port) as client:
            client.sendmail(sender, recipients, text)


@asynccontextmanager
async def observed(folder: Path, toml: str = "") -> AsyncIterator[Observed]:
    listener = '[[listener]]\naddress = "127.0.0.1:0"\nname = "in"'
    settings = parse(f'data_dir = "{folder}"\nhostname = "mx.example.org"\n{toml}\n{listener}\n')
    observation, control = Observation(settings), FakeControl()
    counters = start_counting(observation.segment, observation.claim())
    token_file = folder / settings.metrics.token_file if settings.metrics.token_file else None
    endpoint = make_endpoint(control, observation, token_file)  # type: ignore[arg-type]
    sockets = bind(ListenAddress.parse("127.0.0.1:0"))
    async with open_server(settings, overrides=Overrides(counters=counters)) as server, trio.open_nursery() as nursery:
        await nursery.start(endpoint.run, sockets)
        yield Observed(server, settings, counters, observation, control, sockets[0].getsockname()[1])
        nursery.cancel_scope.cancel()


def value(families: dict[str, Metric], sample: str, **labels: str) -> float:
    """Return the value of the only sample with this name and these labels among others."""
    found = [
        each.value
        for family in families.values()
        for each in family.samples
        if each.name == PREFIX + sample and labels.items() <= each.labels.items()
    ]
    assert len(found) == 1, (sample, labels, found)
    return found[0]


async def test_all_metrics_are_there_from_the_start(tmp_path: Path) -> None:
    async with observed(tmp_path) as server:
        families = await server.metrics()
        expected = {PREFIX + name: family for name, family in FAMILIES.items()} | PROCESS_FAMILIES
        assert set(families) == set(expected)
        for name, family in expected.items():
            found = families[name]
            assert (found.type, found.documentation) == (family.type, family.help)
        assert value(families, "relay_attempts_total", outcome="failed") == 0
        assert value(families, "accept_seconds_count") == 0
        assert value(families, "build_info") == 1


async def test_a_message_is_counted_where_it_passes(tmp_path: Path) -> None:
    async with observed(tmp_path) as server:
        await trio.to_thread.run_sync(server.send, "b@example.org", "c@example.net")
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            await trio.to_thread.run_sync(server.send, "bad")
        with pytest.raises(smtplib.SMTPDataError):
            await trio.to_thread.run_sync(lambda: server.send("b@example.org", text="a\0b"))
        with trio.fail_after(30):
            families = await server.metrics()
            while value(families, "relay_attempts_total", outcome="delivered") < 2:
                families = await server.metrics()
        families = await server.metrics()  # destinations are reported apart from counters, once a second
        assert value(families, "messages_accepted_total", listener="in", kind="spool") == 1
        assert value(families, "messages_refused_total", phase="message", code="550", reason="5.6.0") == 1
        assert value(families, "recipients_refused_total", code="501", reason="5.1.3") == 1
        assert value(families, "replies_total", code="354") == 2
        assert value(families, "commands_total", verb="RCPT", **{"class": "5xx"}) == 1
        assert value(families, "commands_total", verb="message", **{"class": "2xx"}) == 1
        assert value(families, "accept_seconds_count") == value(families, "message_size_octets_count") == 1
        assert value(families, "message_octets_total") == 21
        assert value(families, "sessions_total", listener="in", end="quit") == 3
        assert value(families, "sessions", listener="in") == 0
        assert value(families, "relay_attempts_total", outcome="delivered") == 2
        labels = {"destination": "example.net", "outcome": "delivered"}
        assert value(families, "relay_attempts_by_destination_total", **labels) == 1
        assert value(families, "spool_commit_seconds_count") >= 2


async def test_the_destinations_have_at_most_so_many_series(tmp_path: Path) -> None:
    async with observed(tmp_path, "[metrics]\ndestinations = 100") as server:
        for number in range(10_000):
            server.counters.attempted(f"d{number}.example", number % 3, 1, 0.5)
            server.counters.attempted("big.example", 0, 1, 0.5)
        families = await server.metrics()
        found = families[f"{PREFIX}relay_attempts_by_destination_total"].samples
        names = {each.labels["destination"] for each in found}
        assert len(names) == 101 and {"other", "big.example"} <= names
        assert sum(each.value for each in found) == 20_000
        assert sum(each.value for each in families[f"{PREFIX}relay_attempts_total"].samples) == 20_000
        assert sum(len(family.samples) for family in families.values()) < 2000


async def test_the_queue_is_counted_by_destination(tmp_path: Path) -> None:
    toml = '[metrics]\ndestinations = 2\n[[route]]\nnext_hop = "smtp://127.0.0.1:1"'
    async with observed(tmp_path, toml) as server:
        for count, domain in ((3, "a.example"), (2, "b.example"), (1, "c.example")):
            for number in range(count):
                await trio.to_thread.run_sync(server.send, f"{number}@{domain}")
        families = await server.metrics()
        queues = {each.labels["destination"]: each.value for each in families[f"{PREFIX}relay_queue"].samples}
        assert queues == {"a.example": 3, "b.example": 2, "other": 1}
        assert value(families, "spool_messages") == value(families, "spool_recipients") == 6
        assert value(families, "relay_hop_up", hop="127.0.0.1:1") == 0


async def test_logins_handshakes_and_refused_connections_are_counted(tmp_path: Path) -> None:
    toml = "[admission]\nper_network = 1\nexempt = []"
    async with observed(tmp_path, toml) as server:
        port = int(server.server.addresses[0].rpartition(":")[2])

        def talk() -> Any:
            with smtplib.SMTP("127.0.0.1", port) as client:
                client.starttls()
                client.ehlo()
                with pytest.raises(smtplib.SMTPConnectError):
                    smtplib.SMTP("127.0.0.1", port)

        await trio.to_thread.run_sync(talk)
        families = await server.metrics()
        assert value(families, "tls_handshakes_total", version="TLSv1.3", result="ok") == 1
        assert value(families, "admission_refused_total", reason="per_network") == 1
        assert value(families, "sessions_total", end="refused") == 1
        assert value(families, "replies_total", code="421") == 1


async def test_readiness_is_not_liveness(tmp_path: Path) -> None:
    async with observed(tmp_path) as server:
        assert await server.get("/livez") == (200, "ok\n")
        assert await server.get("/readyz") == (200, "ready\n")
        server.control.is_ready = False
        assert await server.get("/readyz") == (503, "not ready\n")
        assert await server.get("/livez") == (200, "ok\n")
        assert await server.get("/livez", "HEAD") == (200, "")
        assert (await server.get("/livez", "POST"))[0] == 405
        assert (await server.get("/nothing"))[0] == 404


async def test_metrics_need_the_token_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    async with observed(tmp_path, '[metrics]\ntoken_file = "token"') as server:
        assert (await server.get("/metrics"))[0] == 401
        assert (await server.get("/metrics", Authorization="Bearer wrong"))[0] == 401
        assert (await server.get("/metrics", Authorization=f"Bearer {TOKEN}"))[0] == 200
        assert (await server.get("/livez"))[0] == 200
        (tmp_path / "token").write_text("a new token, longer")  # it is read at each request
        assert (await server.get("/metrics", Authorization=f"Bearer {TOKEN}"))[0] == 401
        (tmp_path / "token").unlink()
        assert (await server.get("/metrics", Authorization=f"Bearer {TOKEN}"))[0] == 503


async def test_what_is_not_http_is_refused(tmp_path: Path) -> None:
    async with observed(tmp_path) as server:
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        async with stream:
            await stream.send_all(b"EHLO x\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 400 ")
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        async with stream:
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await stream.send_all(b"GET / HTTP/1.1\r\nX: " + b"x" * 65_536)
        assert (await server.get("/livez"))[0] == 200


def test_a_public_address_needs_a_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics.address: other machines can reach :9525; set metrics.token_file"):
        parse('[metrics]\naddress = ":9525"')
    with pytest.raises(ConfigError, match=r"metrics.address: a listen address looks like"):
        parse('[metrics]\naddress = "9525"')
    assert parse('[metrics]\naddress = ":9525"\ntoken_file = "token"').metrics.token_file == "token"
    (tmp_path / "token").write_text("short")
    with pytest.raises(ValueError, match="16 to 1024 characters"):
        read_token(tmp_path / "token")
