"""DANE, MTA-STS and TLS reports: a gateway sends mail to MX hosts with certificates, found by a real name server."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import dkim  # type: ignore[import-untyped]
import msgspec
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from parsedmarc import parse_report_email

from penstock.relay.tlsreport import TlsReports, report_json
from tests.dns.nsd import running_nsd
from tests.relay.fake import FakeHop
from tests.relay.outbound import ORDINARY_TLS, Outbound, PolicyHost, policy, sending, tls_of, tlsa, until

REPORTS = 'reports = "daily"\ncontact = "tls@out.example"'
SIGN = '[policy]\nmode = "off"\n[[policy.sign]]\ndomain = "out.example"\nselector = "s"\nkey = "dkim.pem"'
Start = Callable[..., AbstractAsyncContextManager[Outbound]]
KEY = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
PEM = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
SPKI = PublicFormat.SubjectPublicKeyInfo

CA = trustme.CA()
INTERMEDIATE = CA.create_child_ca()
PUBLIC = trustme.CA()
"""An authority that is trusted, as those of the web."""
MX = INTERMEDIATE.issue_cert("mx.dane.example")
OTHER = PUBLIC.issue_cert("other.example")
VALID = PUBLIC.issue_cert("mx.sts.example", "mx.both.example", "mx2.sts.example")
POLICY = PUBLIC.issue_cert("mta-sts.sts.example", "mta-sts.trial.example")

ZONE = f"""
dane MX 10 mx.dane
mx.dane A 127.0.0.2
_25._tcp.mx.dane TLSA {tlsa(3, 1, 1, MX.cert_chain_pems[0])}
ta MX 10 mx.dane.ta
mx.dane.ta CNAME mx.ta
mx.ta A 127.0.0.2
_25._tcp.mx.ta TLSA {tlsa(2, 0, 2, INTERMEDIATE.cert_pem)}
named MX 10 mx.dane.named
mx.dane.named A 127.0.0.2
_25._tcp.mx.dane.named TLSA {tlsa(2, 1, 1, INTERMEDIATE.cert_pem)}
unusable MX 10 mx.unusable
mx.unusable A 127.0.0.2
_25._tcp.mx.unusable TLSA {tlsa(0, 0, 1, CA.cert_pem)}
insecure MX 10 mx.insecure
mx.insecure A 127.0.0.2
_25._tcp.mx.insecure TLSA {tlsa(3, 1, 1, CA.cert_pem)}
sts MX 10 mx.elsewhere
sts MX 20 mx.sts
mx.sts A 127.0.0.3
mx.elsewhere A 127.0.0.2
_mta-sts.sts TXT "v=STSv1; id=1;"
mta-sts.sts A 127.0.0.4
_smtp._tls.sts TXT "v=TLSRPTv1; rua=mailto:tls@reports.example"
trial MX 10 mx.trial
mx.trial A 127.0.0.2
_mta-sts.trial TXT "v=STSv1; id=1;"
mta-sts.trial A 127.0.0.4
_smtp._tls.trial TXT "v=TLSRPTv1; rua=mailto:tls@reports.example"
_smtp._tls.dane TXT "v=TLSRPTv1; rua=mailto:tls@reports.example"
_smtp._tls.reports TXT "v=TLSRPTv1; rua=mailto:tls@reports.example"
reports MX 10 mx.reports
mx.reports A 127.0.0.2
"""


@pytest.fixture(scope="module")
def nsd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_nsd(tmp_path_factory.mktemp("nsd"), {"example": ZONE}) as address:
        yield address


def mx_host(certificate: trustme.LeafCert | None) -> FakeHop:
    made = FakeHop(offer=ORDINARY_TLS if certificate is not None else ("PIPELINING",))
    made.tls = None if certificate is None else tls_of(certificate)
    return made


@pytest.fixture
def start(nsd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a gateway whose MX hosts are all the one that is given."""
    (tmp_path / "dkim.pem").write_bytes(KEY.private_bytes(*PEM))
    return partial(sending, tmp_path, nsd, monkeypatch=monkeypatch, toml=SIGN)


async def outcome(start: Start, mx: FakeHop, to: str, **settings: Any) -> str:
    """Send a message; return "delivered" or why it waits."""
    async with start(mx, **settings) as outbound:
        await outbound.send(to)
        await until(lambda: bool(outbound.events("delivered") + outbound.events("deferred")))
        delivered, deferred = outbound.events("delivered"), outbound.events("deferred")
    assert len(mx.texts) == len(delivered)
    return "delivered" if delivered else str(deferred[0]["reply"])


# ---- DANE


async def test_a_certificate_that_a_tlsa_record_names_is_used(start: Start) -> None:
    mx = mx_host(MX)
    assert await outcome(start, mx, "bob@dane.example") == "delivered"
    assert "STARTTLS" in mx.heard


async def test_without_a_matching_certificate_mail_waits(start: Start) -> None:
    mx = mx_host(OTHER)
    assert "DANE: the certificate matches no TLSA record" in await outcome(start, mx, "bob@dane.example")
    assert mx.heard.count("STARTTLS") == 1, "there was no attempt in clear text"


async def test_with_tlsa_records_there_is_no_clear_text(start: Start) -> None:
    assert "TLS is required" in await outcome(start, mx_host(None), "bob@dane.example")


async def test_an_authority_of_a_tlsa_record_vouches_for_names(start: Start) -> None:
    assert await outcome(start, mx_host(INTERMEDIATE.issue_cert("mx.ta.example")), "bob@ta.example") == "delivered"


async def test_an_authority_vouches_for_no_other_name(start: Start) -> None:
    said = await outcome(start, mx_host(MX), "bob@named.example")
    assert "DANE: validation failed: leaf certificate has no matching subjectAltName" in said


async def test_unusable_tlsa_records_demand_tls_with_any_certificate(start: Start) -> None:
    mx = mx_host(OTHER)
    assert await outcome(start, mx, "bob@unusable.example") == "delivered"
    assert "STARTTLS" in mx.heard


async def test_unusable_tlsa_records_forbid_clear_text(start: Start) -> None:
    assert "TLS is required" in await outcome(start, mx_host(None), "bob@unusable.example")


async def test_tlsa_records_that_cannot_be_looked_up_defer(start: Start) -> None:
    said = await outcome(start, mx_host(MX), "bob@dane.example", broken=["_25._tcp.mx.dane.example"])
    assert "no answer from the DNS for the TLSA records of mx.dane.example" in said


async def test_tlsa_records_without_dnssec_do_not_count(start: Start) -> None:
    assert await outcome(start, mx_host(None), "bob@insecure.example") == "delivered"


async def test_nothing_is_looked_up_when_it_is_off(start: Start) -> None:
    assert await outcome(start, mx_host(OTHER), "bob@dane.example", tls="") == "delivered"


# ---- MTA-STS


async def test_hosts_that_a_policy_does_not_name_are_skipped(start: Start) -> None:
    mx, host = mx_host(VALID), PolicyHost(POLICY, policy("*.sts.example"))
    async with start(mx, authority=PUBLIC, policy_host=host) as outbound:
        await outbound.send("bob@sts.example")
        assert (await outbound.event("delivered"))["hop"].startswith("mx.sts.example[127.0.0.3]:")
        await outbound.send("carol@sts.example")
        await until(lambda: len(mx.texts) == 2)
    assert host.asked == [(b"mta-sts.sts.example", b"/.well-known/mta-sts.txt")], "the policy was fetched once"


async def test_a_certificate_of_an_unknown_authority_defers(start: Start) -> None:
    mx, host = mx_host(MX), PolicyHost(POLICY, policy("mx.sts.example"))
    said = await outcome(start, mx, "bob@sts.example", authority=PUBLIC, policy_host=host)
    assert "unable to get local issuer certificate" in said
    assert mx.heard.count("STARTTLS") == 1


async def test_a_policy_outlives_its_record_and_its_server(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = PolicyHost(POLICY, policy("mx.sts.example"))
    assert await outcome(start, mx_host(VALID), "b@sts.example", authority=PUBLIC, policy_host=host) == "delivered"
    broken = ["_mta-sts.sts.example", "mta-sts.sts.example"]
    said = await outcome(start, mx_host(MX), "c@sts.example", authority=PUBLIC, broken=broken)
    assert "unable to get local issuer certificate" in said


async def test_no_mx_host_of_a_policy_defers(start: Start) -> None:
    host = PolicyHost(POLICY, policy("mail.sts.example"))
    said = await outcome(start, mx_host(VALID), "bob@sts.example", authority=PUBLIC, policy_host=host)
    assert said == "no MX host of sts.example is one of its MTA-STS policy"


@pytest.mark.parametrize(
    ("host", "kind"),
    [
        (
            PolicyHost(POLICY, policy("none.example"), status=301, headers=[("Location", "/x")]),
            "sts-policy-fetch-error",
        ),
        (PolicyHost(POLICY, policy("none.example") + b"x: y\n" * 20_000), "sts-policy-fetch-error"),
        (PolicyHost(POLICY, policy("none.example"), headers=[("Content-Type", "text/html")]), "sts-policy-fetch-error"),
        (PolicyHost(POLICY, policy("none.example"), stalls=True), "sts-policy-fetch-error"),
        (PolicyHost(OTHER, policy("none.example")), "sts-webpki-invalid"),
        (PolicyHost(POLICY, policy(mode="enforce")), "sts-policy-invalid"),
    ],
    ids=["redirect", "too-long", "no-text", "silence", "certificate", "invalid"],
)
async def test_without_a_policy_mail_goes_out_and_it_is_reported(start: Start, host: PolicyHost, kind: str) -> None:
    tls = f"mta_sts = true\n{REPORTS}\ndeadline = 1.0"
    async with start(mx_host(MX), tls=tls, authority=PUBLIC, policy_host=host) as outbound:
        await outbound.send("bob@sts.example")
        await outbound.event("delivered")
        (entry,) = [each for each in report_of(outbound)["policies"] if each["policy"]["policy-type"] == "sts"]
    assert [each["result-type"] for each in entry["failure-details"]] == [kind]


@pytest.mark.parametrize(("certificate", "handshakes"), [(MX, 2), (None, 0)], ids=["untrusted", "none"])
async def test_a_policy_on_trial_is_reported_only(
    start: Start, certificate: trustme.LeafCert | None, handshakes: int
) -> None:
    mx, host = mx_host(certificate), PolicyHost(POLICY, policy("mx.trial.example", mode="testing"))
    async with start(mx, tls=f"mta_sts = true\n{REPORTS}", authority=PUBLIC, policy_host=host) as outbound:
        await outbound.send("bob@trial.example")
        await outbound.event("delivered")
        (entry,) = report_of(outbound)["policies"]
    assert mx.heard.count("STARTTLS") == handshakes, "the second one is with any certificate"
    assert entry["policy"]["policy-type"] == "sts"
    (failure,) = entry["failure-details"]
    kind = "certificate-not-trusted" if handshakes else "starttls-not-supported"
    assert (failure["result-type"], failure["receiving-ip"]) == (kind, "127.0.0.2")
    assert failure["sending-mta-ip"].startswith("127.")


# ---- reports


def report_of(outbound: Outbound) -> dict[str, Any]:
    """Return the report that would be sent now."""
    gateway = outbound.server.gateway
    assert gateway is not None
    reports = next(each.__self__ for each in gateway._beside)  # type: ignore[attr-defined]
    assert isinstance(reports, TlsReports)
    (policies,) = reports._tally.table.values()
    octets = report_json(policies, report_id="1", organization="o", contact="c", begin=0, end=1)
    found: dict[str, Any] = msgspec.json.decode(octets)
    return found


async def test_failures_of_dane_are_reported(start: Start) -> None:
    async with start(mx_host(OTHER), tls=f"dane = true\n{REPORTS}") as outbound:
        await outbound.send("bob@dane.example")
        await outbound.event("deferred")
        (entry,) = report_of(outbound)["policies"]
    assert (entry["policy"]["policy-type"], entry["policy"]["policy-domain"]) == ("tlsa", "mx.dane.example")
    assert entry["policy"]["policy-string"][0].startswith("3 1 1 ")
    assert [each["result-type"] for each in entry["failure-details"]] == ["validation-failure"]


async def test_connections_of_a_domain_without_a_policy_are_reported(start: Start) -> None:
    async with start(mx_host(OTHER), tls=REPORTS) as outbound:
        await outbound.send("bob@reports.example")
        await outbound.event("delivered")
        (entry,) = report_of(outbound)["policies"]
    assert entry["policy"]["policy-type"] == "no-policy-found"
    assert entry["summary"] == {"total-successful-session-count": 1, "total-failure-session-count": 0}


async def test_reports_are_mailed_signed_and_read_by_parsedmarc(start: Start) -> None:
    mx, host = mx_host(VALID), PolicyHost(POLICY, policy("mx.sts.example", mode="enforce"))
    async with start(mx, tls=f"mta_sts = true\n{REPORTS}", authority=PUBLIC, policy_host=host) as outbound:
        await outbound.send("bob@sts.example")
        await until(lambda: len(mx.texts) == 1)
        gateway = outbound.server.gateway
        assert gateway is not None
        reports = next(each.__self__ for each in gateway._beside)  # type: ignore[attr-defined]
        reports.close(0)
        assert await reports.send_reports() == 1
        await until(lambda: len(mx.texts) == 2)
    message = undotted(mx.texts[1])
    assert verified(message)
    parsed = parse_report_email(message, offline=True)
    assert parsed["report_type"] == "smtp_tls"
    report = parsed["report"]
    assert (report["organization_name"], report["contact_info"]) == ("out.example", "tls@out.example")
    by_type = {each["policy_type"]: each for each in report["policies"]}
    assert by_type["sts"]["policy_domain"] == "sts.example"
    assert by_type["sts"]["successful_session_count"] == 1
    (failure,) = by_type["sts"]["failure_details"]
    assert (failure["result_type"], failure["receiving_mx_hostname"]) == ("validation-failure", "mx.elsewhere.example")


async def test_bounces_are_signed(start: Start) -> None:
    mx = mx_host(None)
    mx.answers["RCPT"] = ["550 5.1.1 no such user"]
    async with start(mx, tls="") as outbound:
        await outbound.send("bob@reports.example", sender="carol@insecure.example")
        await until(lambda: len(mx.texts) == 1)
    message = undotted(mx.texts[0])
    assert b"report-type=delivery-status" in message
    assert verified(message)


def undotted(text: bytes) -> bytes:
    return text.removesuffix(b".\r\n").replace(b"\r\n..", b"\r\n.")


def verified(message: bytes) -> bool:
    """Ask dkimpy whether a signature of out.example is good."""
    record = b"v=DKIM1; p=" + base64.b64encode(KEY.public_key().public_bytes(Encoding.DER, SPKI))
    return bool(
        dkim.verify(message, dnsfunc=lambda name, **_: record if name == b"s._domainkey.out.example." else None)
    )
