"""The policies of MX hosts: which are found, and what a connection to such a host is good for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import dns.message
import msgspec
import pytest
import trio
import trustme

from penstock.dns import MailExchangers
from penstock.journal import Journal, JournalSettings
from penstock.message import Message
from penstock.relay.dane import policy_of
from penstock.relay.hop import NextHopUnavailable, TlsPolicy
from penstock.relay.https import FetchError
from penstock.relay.pool import Pool, PoolSettings
from penstock.relay.route import Routes, RouteSettings
from penstock.relay.tlspolicy import RelayTlsSettings, TlsPolicies
from penstock.relay.tlsreport import Failure, TlsReports
from tests.dns.lying import Lying, resolving, zone_of
from tests.relay.fake import FakeHop, send, serving, told
from tests.relay.outbound import ORDINARY_TLS, PolicyHost, der_of, policy, tls_of, tlsa

CA = trustme.CA()
LEAF = CA.issue_cert("mx.example.org")
RECORD = (3, 0, 0, der_of(LEAF.cert_chain_pems[0]))
REQUIRED = TlsPolicy(mode="require", name="mx.example.org")


def mx_host() -> FakeHop:
    made = FakeHop(offer=(*ORDINARY_TLS, "REQUIRETLS"))
    made.tls = tls_of(LEAF)
    return made


async def test_dane_is_good_enough_for_requiretls(pool: Pool) -> None:
    mx = mx_host()
    async with serving(mx):
        hop = mx.hop(tls=REQUIRED, dane=policy_of([RECORD], ("mx.example.org",)))
        assert told(await send(pool, hop, requiretls=True)) == "delivered 250"
        unusable = mx.hop(tls=REQUIRED, dane=policy_of([(0, 0, 0, b"x")], ("mx.example.org",)))
        assert told(await send(pool, unusable)) == "delivered 250"
        assert told(await send(pool, unusable, requiretls=True)) == "failed 5.7.30"


async def test_nothing_is_said_to_a_host_with_another_certificate(pool: Pool) -> None:
    mx = mx_host()
    async with serving(mx):
        hop = mx.hop(tls=REQUIRED, dane=policy_of([(3, 0, 0, b"another")], ("mx.example.org",)))
        with pytest.raises(NextHopUnavailable) as error:
            await send(pool, hop)
    assert (error.value.status, error.value.tls_failure) == ("4.7.5", "validation-failure")
    assert mx.verbs() == "EHLO STARTTLS"


async def test_hosts_with_other_records_have_connections_of_their_own(pool: Pool) -> None:
    mx = mx_host()
    async with serving(mx):
        for records in ([RECORD], [RECORD], [RECORD, (3, 0, 0, b"next")]):
            hop = mx.hop(tls=REQUIRED, dane=policy_of(records, ("mx.example.org",)))
            assert told(await send(pool, hop)) == "delivered 250"
    assert mx.connections == 2


async def test_connections_for_reports_are_not_counted(nursery: trio.Nursery) -> None:
    noted: list[str] = []

    def note(hop: object, domain: str, failure: Failure | None) -> None:
        noted.append(domain)

    counting = Pool(PoolSettings(), journal=Journal(JournalSettings()), note_connection=note)
    await nursery.start(counting.run)
    mx = mx_host()
    async with serving(mx):
        for is_reported in (False, True):
            hop = mx.hop(tls=REQUIRED, is_reported=is_reported)
            assert told(await send(counting, hop)) == "delivered 250"
    await counting.aclose()
    nursery.cancel_scope.cancel()
    assert (mx.connections, noted) == (2, ["example.org"])


# ---- what is found for a domain

ZONE = (
    "example.org MX 10 mx.dane.example.",
    "example.org MX 10 mx.insecure.example.",
    "mx.dane.example A 192.0.2.1",
    "mx.insecure.example A 192.0.2.2",
    f"_25._tcp.mx.dane.example TLSA {tlsa(3, 1, 1, LEAF.cert_chain_pems[0])}",
    '_mta-sts.example.org TXT "v=STSv1; id=1"',
    '_smtp._tls.example.org TXT "v=TLSRPTv1; rua=mailto:tls@example.org"',
)


class World:
    """The policies of example.org, whose MX hosts are one with DANE and one without."""

    def __init__(self, policies: TlsPolicies, exchangers: MailExchangers, reports: TlsReports) -> None:
        self.policies = policies
        self.reports = reports
        routes = msgspec.convert([{"next_hop": "mx"}], tuple[RouteSettings, ...])
        self.routes = Routes(
            routes, data_dir=Path(), resolver=exchangers, own_domain="out.example", tls_policies=policies
        )

    async def hosts(self, queue: str = "example.org") -> dict[str, str]:
        """Return the TLS modes of the MX hosts that are used."""
        return {hop.host: hop.tls.mode for hop in (await self.routes.find_route(queue)).hops()}


@asynccontextmanager
async def world(folder: Path, text: bytes | trio.Event) -> AsyncIterator[World]:
    """`text` is the policy of MTA-STS; with an event, fetching it does not end before."""

    def answer(wire: bytes) -> list[bytes]:
        octets = bytearray(lying.zone.answer(wire) or b"")
        if "insecure" not in str(dns.message.from_wire(wire).question[0].name):
            octets[3] |= 0x20  # AD
        return [bytes(octets)]

    async def fetch(domain: str) -> bytes:
        if isinstance(text, trio.Event):
            await text.wait()
            return policy("mx.insecure.example")
        return text

    async def send_nothing(message: Message) -> None:
        raise AssertionError(message)

    lying = Lying(zone_of(*ZONE), udp=answer)
    journal = Journal(JournalSettings())
    async with resolving(lying) as resolver:
        exchangers = MailExchangers(resolver, is_local_address=lambda _: False)
        contact, file = "tls@out.example", folder / "tls.json"
        reports = TlsReports(send_nothing, journal, hostname="out.example", contact=contact, file=file)
        settings = RelayTlsSettings(dane=True, mta_sts=True)
        policies = TlsPolicies(settings, resolver, exchangers, journal, data_dir=folder, reports=reports)
        assert policies._sts is not None
        policies._sts._fetch = fetch
        yield World(policies, exchangers, reports)


async def test_hosts_with_dane_do_not_wait_for_a_slow_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = trio.Event()
    async with world(tmp_path, fetched) as it:
        with monkeypatch.context() as patched:
            patched.setattr("penstock.relay.tlspolicy._PATIENCE", 0.0)
            assert await it.hosts() == {"mx.dane.example": "require"}
        fetched.set()
        assert await it.hosts() == {"mx.dane.example": "require", "mx.insecure.example": "verify"}


async def test_hosts_with_dane_are_used_if_no_policy_can_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.relay.mtasts._MAX_WAITING", 0)
    async with world(tmp_path, policy("mx.insecure.example")) as it:
        assert await it.hosts() == {"mx.dane.example": "require"}


async def test_reports_are_sent_without_policies(tmp_path: Path) -> None:
    async with world(tmp_path, policy("mail.example.org")) as it:
        assert await it.hosts() == {"mx.dane.example": "require"}
        unprotected = {"mx.dane.example": "opportunistic", "mx.insecure.example": "opportunistic"}
        assert await it.hosts("clear:example.org") == unprotected
        clear, plain = [await it.routes.find_route(f"{prefix}example.org") for prefix in ("clear:", "")]
    assert clear.key != plain.key
    assert [(hop.dane, hop.is_reported) for hop in clear.hops()] == [(None, False)] * 2


async def test_a_host_that_a_policy_excludes_is_counted_once(tmp_path: Path) -> None:
    async with world(tmp_path, policy("mail.example.org")) as it:
        for _ in range(3):
            await it.hosts()
        (policies,) = it.reports._tally.table.values()
    ((applied, counts),) = policies.items()
    assert (applied.kind, counts.failures) == ("sts", 1)
    assert [failure.host for failure in counts.details] == ["mx.insecure.example"]


async def test_a_tls_report_is_posted_to_the_host_of_its_uri(tmp_path: Path, nursery: trio.Nursery) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    host = PolicyHost(authority.issue_cert("reports.example"), status=201)
    serve = partial(trio.serve_ssl_over_tcp, host.serve, 0, tls_of(host.certificate), host="127.0.0.1")
    listeners = await nursery.start(partial(serve, https_compatible=True))
    port = listeners[0].transport_listener.socket.getsockname()[1]
    lying, journal = (
        Lying(zone_of("reports.example A 127.0.0.1", "other.example A 127.0.0.1")),
        Journal(JournalSettings()),
    )
    reports = TlsReports(host.serve, journal, hostname="a", contact="a@b.example", file=tmp_path / "x")
    async with resolving(lying) as resolver:
        policies = TlsPolicies(
            RelayTlsSettings(ca_file="ca.pem"),
            resolver,
            MailExchangers(resolver, is_local_address=lambda _: False),
            journal,
            data_dir=tmp_path,
            reports=reports,
            https_port=port,
        )
        assert policies.reports is reports
        assert reports.submit is not None
        await reports.submit("https://reports.example/in?a=1", b"report")
        assert host.asked == [(b"reports.example:%d" % port, b"/in?a=1")]
        assert host.posted == [(b"application/tlsrpt+gzip", b"report")]
        with pytest.raises(FetchError, match=r"other\.example"):
            await reports.submit("https://other.example/", b"report")
        host.status = 503
        with pytest.raises(FetchError, match="status 503"):
            await reports.submit("https://reports.example/", b"report")
