"""TLS reports: what is counted, who gets them, and what they say."""

from __future__ import annotations

import email
import email.policy
import gzip
import ssl
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from penstock.journal import Journal, JournalSettings
from penstock.message import Message
from penstock.relay.https import FetchError
from penstock.relay.tlsreport import AppliedPolicy, Failure, Tally, TlsReports, addresses_of, delay_of, failure_of
from tests.relay.outbound import until

DAY = 1_700_006_400.0  # 2023-11-15T00:00:00Z
STS = AppliedPolicy("sts", "example.org", ("version: STSv1", "mode: enforce"), ("mx.example.org",))
EXPIRED = Failure("certificate-expired", "192.0.2.9", "mx.example.org", "192.0.2.1", "certificate has expired")


class World:
    """Reports whose messages are kept."""

    def __init__(self, folder: Path) -> None:
        self.sent: list[Message] = []
        self.now = DAY
        self.broken = False
        self.journal = Journal(JournalSettings())
        self.reports = TlsReports(
            self.send,
            self.journal,
            hostname="out.example",
            contact="tls@out.example",
            file=folder / "spool.tls.json",
            clock=lambda: self.now,
        )
        self.saved_before: list[bytes] = []
        """The file when each message was sent."""
        self.file = folder / "spool.tls.json"
        self.reports.expect("example.org", ("a@example.org", "b@reports.example"))

    async def send(self, message: Message) -> None:
        if self.broken:
            raise OSError("the disk is full")
        self.sent.append(message)
        self.saved_before.append(self.file.read_bytes())

    async def day(self) -> int:
        """End a day, and send all its reports, at the end of the night."""
        self.now += 86_400
        self.reports.close(int(self.now))
        self.now += 4 * 3600
        try:
            return await self.reports.send_reports()
        finally:
            self.now -= 4 * 3600

    @property
    def details(self) -> int:
        """Kinds of failures that are counted now."""
        return self.reports._tally._details


def report_of(message: Message) -> dict[str, Any]:
    parsed = email.message_from_bytes(b"".join(message.body.chunks()), policy=email.policy.default)
    assert parsed["TLS-Report-Domain"] == "example.org"
    assert parsed["TLS-Report-Submitter"] == "out.example"
    assert parsed["TLS-Required"] == "No"
    assert parsed.get_content_type() == "multipart/report"
    assert parsed.get_param("report-type") == "tlsrpt"
    words, report = parsed.iter_parts()
    assert words.get_content_type() == "text/plain"
    assert report.get_content_type() == "application/tlsrpt+gzip"
    name = report.get_filename()
    assert name is not None
    assert name.startswith("out.example!example.org!1700006400!")
    made: dict[str, Any] = msgspec.json.decode(gzip.decompress(report.get_content()))
    return made


@pytest.mark.parametrize(
    ("records", "addresses"),
    [
        ([b"v=TLSRPTv1; rua=mailto:a@example.org"], ("a@example.org",)),
        ([b"v=TLSRPTv1;rua=mailto:a%21b@x.example,ftp://x.ex/,MAILTO:c@d.ex"], ("a!b@x.example", "c@d.ex")),
        ([b"v=TLSRPTv1; rua=https://example.org/x?y=1"], ("https://example.org/x?y=1",)),
        ([b"v=TLSRPTv1; rua=https://u@example.org/,https://192.0.2.1/,https://[::1]/,https://x.example:a/"], ()),
        ([b"v=TLSRPTv1; rua=mailto:nobody"], ()),
        ([b"v=TLSRPTv1; rua=mailto:a@example.org", b"v=TLSRPTv1; rua=mailto:b@example.org"], ()),
        ([b"v=TLSRPTv2; rua=mailto:a@example.org"], ()),
        ([b"v=TLSRPTv1; rua=mailto:a@b.example,mailto:c@b.example,mailto:d@b.example"], ("a@b.example", "c@b.example")),
        ([], ()),
    ],
)  # fmt: skip
def test_a_record_names_the_addresses(records: list[bytes], addresses: tuple[str, ...]) -> None:
    assert addresses_of(records) == addresses


def test_failures_of_the_handshake_have_types() -> None:
    def wrapped(code: int) -> Exception:
        cause = ssl.SSLCertVerificationError()
        cause.verify_code = code
        made = OSError("wrapped")
        made.__cause__ = cause
        return made

    kinds = [failure_of(each) for each in (wrapped(10), wrapped(62), wrapped(20), OSError())]
    assert kinds == [
        "certificate-expired",
        "certificate-host-mismatch",
        "certificate-not-trusted",
        "validation-failure",
    ]


async def test_connections_of_a_day_are_one_report_to_each_address(tmp_path: Path) -> None:
    it = World(tmp_path)
    it.reports.count("example.org", STS)
    it.reports.count("example.org", STS)
    it.reports.count("example.org", STS, EXPIRED)
    it.reports.count("example.org", STS, EXPIRED)
    it.reports.count("example.org", None, Failure("starttls-not-supported"))
    it.reports.count("example.com", STS)
    assert [await it.day(), await it.reports.send_reports()] == [2, 0]
    assert [str(each.envelope.recipients[0]) for each in it.sent] == ["a@example.org", "b@reports.example"]
    assert it.sent[0].envelope.sender.text == "tls@out.example"
    report = report_of(it.sent[0])
    assert report["date-range"] == {
        "start-datetime": "2023-11-15T00:00:00Z",
        "end-datetime": "2023-11-16T00:00:00Z",
    }
    first, second = report["policies"]
    assert first == {
        "policy": {
            "policy-type": "sts",
            "policy-domain": "example.org",
            "policy-string": ["version: STSv1", "mode: enforce"],
            "mx-host": ["mx.example.org"],
        },
        "summary": {"total-successful-session-count": 2, "total-failure-session-count": 2},
        "failure-details": [
            {
                "result-type": "certificate-expired",
                "sending-mta-ip": "192.0.2.9",
                "receiving-mx-hostname": "mx.example.org",
                "receiving-ip": "192.0.2.1",
                "failure-reason-code": "certificate has expired",
                "failed-session-count": 2,
            }
        ],
    }
    assert second["policy"] == {"policy-type": "no-policy-found", "policy-domain": "example.org"}


async def test_a_web_server_gets_the_report_in_a_post(tmp_path: Path) -> None:
    it, posted, uris = World(tmp_path), [], ("https://a.example/x", "https://b.example/", "t@example.org")

    async def submit(uri: str, octets: bytes) -> None:
        posted.append((uri, msgspec.json.decode(gzip.decompress(octets))["policies"][0]["summary"]))
        if uri in failing:
            raise FetchError("status 503")

    it.reports.submit, failing = submit, {uris[0]}
    it.reports.expect("example.org", uris)
    it.reports.count("example.org", STS)
    summary = {"total-successful-session-count": 1, "total-failure-session-count": 0}
    assert await it.day() == 1, "the message to the other address"
    assert posted == [(uris[0], summary), (uris[1], summary)]
    it.now += 4 * 3600 - 1
    assert await it.reports.send_reports() == 0
    assert len(posted) == 2, "it is not submitted again at once"
    it.now += 3601
    await it.reports.send_reports()
    assert posted[2:] == [(uris[0], summary)], "only to the one that has not accepted it"
    await it.day()
    it.now += 2 * 86_400
    failing.clear()
    await it.reports.send_reports()
    assert len(posted) == 3, "it was given up at the end of the day"
    assert b"status 503" in it.journal.drain()


async def test_counts_are_saved_between_two_posts(tmp_path: Path) -> None:
    it, saved = World(tmp_path), []

    async def submit(uri: str, _: bytes) -> None:
        it.reports.count("example.net", STS)  # while a web server takes its time
        saved.append(msgspec.json.decode(it.file.read_bytes())["domains"])

    it.reports.submit = submit
    it.reports.expect("example.net", ("a@example.net",))
    for number in range(3):
        it.reports.expect(f"{number}.example", (f"https://{number}.example/",))
        it.reports.count(f"{number}.example", STS)
    assert await it.day() == 0
    assert [[policies[0][1]["successes"] for *_, policies in each] for each in saved] == [[], [1], [2]]


async def test_counts_survive_a_restart(tmp_path: Path) -> None:
    it = World(tmp_path)
    it.reports.count("example.org", STS, EXPIRED)
    await it.reports._save()
    it = World(tmp_path)
    it.reports.count("example.org", STS)
    it.reports.count("example.org", STS, EXPIRED)
    await it.reports._load()
    assert it.details == 1
    await it.day()
    (policy,) = report_of(it.sent[0])["policies"]
    assert policy["summary"] == {"total-successful-session-count": 1, "total-failure-session-count": 2}
    assert [each["failed-session-count"] for each in policy["failure-details"]] == [2]


async def test_a_closed_day_survives_a_restart(tmp_path: Path) -> None:
    it = World(tmp_path)
    it.reports.count("example.org", STS)
    it.reports.close(int(DAY) + 86_400)
    it.reports.count("example.org", None)
    await it.reports._save()
    it = World(tmp_path)
    await it.reports._load()
    it.now += 100_800
    assert await it.reports.send_reports() == 2
    report = report_of(it.sent[0])
    assert [each["policy"]["policy-type"] for each in report["policies"]] == ["sts"]
    assert report["date-range"]["end-datetime"] == "2023-11-16T00:00:00Z"
    assert len(it.reports._tally.table) == 1, "the other day is counted"


async def test_a_report_that_cannot_be_queued_is_kept(tmp_path: Path) -> None:
    it = World(tmp_path)
    it.reports.count("example.org", STS, EXPIRED)
    it.broken = True
    assert await it.day() == 0
    it.reports.count("example.org", STS, EXPIRED)
    it.broken = False
    assert await it.day() == 2, "with the counts that came meanwhile"
    report = report_of(it.sent[0])
    assert report["policies"][0]["failure-details"][0]["failed-session-count"] == 2
    assert report["date-range"]["start-datetime"] == "2023-11-15T00:00:00Z"
    assert report["date-range"]["end-datetime"] == "2023-11-17T00:00:00Z"


async def test_a_report_that_one_address_has_is_not_sent_again(tmp_path: Path) -> None:
    it = World(tmp_path)
    it.reports.count("example.org", STS)
    send = it.reports._send

    async def breaking(message: Message) -> None:
        await send(message)
        it.broken = True

    it.reports._send = breaking
    assert await it.day() == 1
    it.broken = False
    assert await it.reports.send_reports() == 0
    assert it.reports._closed.table == {}


async def test_one_report_that_fails_does_not_hold_up_others(tmp_path: Path) -> None:
    it = World(tmp_path)
    it.reports.expect("example.com", ("bad@example.com",))
    it.reports.count("example.com", STS)
    it.reports.count("example.org", STS)
    send = it.reports._send

    async def choosy(message: Message) -> None:
        if "bad@example.com" in str(message.envelope.recipients[0]):
            raise OSError("not this one")
        await send(message)

    it.reports._send = choosy
    assert [await it.day(), await it.day()] == [0, 2]


async def test_a_crash_while_reports_are_sent_sends_none_twice(tmp_path: Path) -> None:
    it = World(tmp_path)
    it.reports.count("example.org", STS)
    it.reports.close(int(DAY) + 86_400)
    await it.reports._save()
    assert b"example.org" in it.file.read_bytes()
    it.now += 100_800
    await it.reports.send_reports()
    assert not any(b"example.org" in each for each in it.saved_before)


async def test_nothing_is_sent_while_the_counts_cannot_be_saved(tmp_path: Path) -> None:
    it = World(tmp_path / "none")
    it.reports.count("example.org", STS)
    assert await it.day() == 0
    (tmp_path / "none").mkdir()
    assert await it.day() == 2


async def test_reports_are_sent_in_the_hours_after_midnight(tmp_path: Path) -> None:
    it = World(tmp_path)
    delays = [delay_of(f"{number}.example") for number in range(500)]
    assert delays == [delay_of(f"{number}.example") for number in range(500)]
    assert 0 <= min(delays) < 600 and 13_800 < max(delays) < 14_400
    it.reports.count("example.org", STS)
    midnight = DAY + 86_400
    it.now = midnight + delay_of("example.org") - 1
    it.reports.close(int(midnight))
    assert await it.reports.send_reports() == 0
    it.now += 1
    assert await it.reports.send_reports() == 2


async def test_the_day_is_closed_at_midnight(tmp_path: Path, nursery: trio.Nursery) -> None:
    it = World(tmp_path)
    it.reports.count("example.org", STS)
    it.now = DAY + 86_400 + 14_400
    nursery.start_soon(it.reports.run)
    await until(lambda: len(it.sent) == 2)
    assert report_of(it.sent[0])["date-range"]["end-datetime"] == "2023-11-16T00:00:00Z"
    nursery.cancel_scope.cancel()


def test_an_excluded_host_is_counted_once_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.relay.tlsreport._MAX_NOTED", 2)
    it = World(tmp_path)
    failures = [Failure("validation-failure", host=host) for host in ("a", "a", "b", "a", "c")]

    def counted() -> list[tuple[str, int]]:
        for each in failures:
            it.reports.count_once("example.org", STS, each)
            it.reports.count_once("unwanted.example", STS, each)
        (policies,) = it.reports._tally.table.values()
        return [(failure.host, count) for failure, count in policies[STS].details.items()]

    assert counted() == [("a", 1), ("b", 1)], "the set is bounded"
    it.reports.close(int(DAY) + 86_400)
    assert counted() == [("a", 1), ("b", 1)]


def test_counts_are_merged_within_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.relay.tlsreport._MAX_FAILURES", 2)
    monkeypatch.setattr("penstock.relay.tlsreport._MAX_POLICIES", 2)
    key = "example.org", ("a@example.org",)
    tallies = [Tally(), Tally()]
    for tally, numbers in zip(tallies, ("01", "12"), strict=True):
        for number in numbers:
            counts = tally.find(key, STS._replace(domain=number))
            assert counts is not None
            counts.failures += 2
            for reason in numbers:
                tally.note(counts, Failure("validation-failure", reason=reason))
    policies = tallies[1].pop(key)
    assert (tallies[1].table, tallies[1]._policies, tallies[1]._details) == ({}, 0, 0)
    tallies[0].put_back(key, policies)
    found = {policy.domain: counts for policy, counts in tallies[0].table[key].items()}
    assert {domain: counts.failures for domain, counts in found.items()} == {"0": 2, "1": 4}
    assert [list(each.details.values()) for each in found.values()] == [[1, 1], [1, 2]]
    assert (tallies[0]._policies, tallies[0]._details) == (2, 4)


async def test_a_damaged_file_is_journaled(tmp_path: Path) -> None:
    (tmp_path / "spool.tls.json").write_bytes(b'{"begin": "x"}')
    it = World(tmp_path)
    await it.reports._load()
    assert b"spool.tls.json" in it.reports._journal.drain()


def test_counts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.relay.tlsreport._MAX_FAILURES", 2)
    monkeypatch.setattr("penstock.relay.tlsreport._MAX_POLICIES", 2)
    monkeypatch.setattr("penstock.relay.tlsreport._MAX_DOMAINS", 1)
    it = World(tmp_path)
    for number in range(5):
        it.reports.count("example.org", STS, Failure("validation-failure", reason=str(number) * 999))
        it.reports.count("example.org", STS._replace(domain=str(number)))
    it.reports.expect("example.com", ("a@example.com",))
    it.reports.count("example.com", STS)
    (policies,) = it.reports._tally.table.values()
    assert [(each.successes, each.failures, len(each.details)) for each in policies.values()] == [(0, 5, 2), (1, 0, 0)]
    assert {len(each.reason) for each in policies[STS].details} == {200}
