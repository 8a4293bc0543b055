"""DMARC aggregate reports: what is counted, who gets them, and what they say."""

from __future__ import annotations

import email
import email.policy
import gzip
import itertools
import time
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from parsedmarc import parse_report_email

from penstock.journal import Journal, JournalSettings
from penstock.mailauth import Decision
from penstock.mailauth.dkim import DkimResult
from penstock.mailauth.dmarc import DmarcResult, parse
from penstock.mailauth.spf import SpfResult
from penstock.message import Message
from penstock.policy.aggregate import Reporter, Rows, row_of
from penstock.results import Results
from tests.dns.lying import Lying, resolving, zone_of

RECORD = parse(b"v=DMARC1; p=reject; sp=quarantine; rua=mailto:rua@example.com,mailto:all@reports.example!1m")
ACCEPT = Decision("accept")
REJECT = Decision("reject", "dmarc", 550, "5.7.1", "no")
NS = {"d": "urn:ietf:params:xml:ns:dmarc-2.0"}


def results(result: str = "pass", *, dkim: str = "pass", spf_domain: str = "example.com") -> Results:
    made = Results()
    made.dmarc = DmarcResult(result, "example.com", "reject", "example.com", record=RECORD)  # type: ignore[arg-type]
    made.dkim = (DkimResult(dkim, "example.com", "s1"),)  # type: ignore[arg-type]
    made.spf = SpfResult("pass", spf_domain, "mailfrom")
    return made


@asynccontextmanager
async def reporting(folder: Path, *lines: str, **more: Any) -> AsyncIterator[tuple[Reporter, list[Message]]]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async with resolving(Lying(zone_of(*lines))) as resolver:
        made = Reporter(
            resolver,
            send,
            Journal(JournalSettings()),
            hostname="mx.example.org",
            contact="postmaster@example.org",
            file=folder / "rows.json",
            **more,
        )
        yield made, sent


async def end_day(reporter: Reporter) -> int:
    """Send the reports on what was counted so far."""
    reporter.close(int(reporter._clock()))
    return await reporter.send_reports()


def xml_of(message: Message) -> ET.Element:
    parsed = email.message_from_bytes(b"".join(message.body.chunks()), policy=email.policy.default)
    assert parsed["Subject"].startswith("Report Domain: example.com Submitter: mx.example.org Report-ID: <")
    assert parsed.get_content_type() == "application/gzip"
    filename = parsed.get_filename()
    assert filename is not None
    assert filename.startswith("mx.example.org!example.com!")
    assert filename.endswith(".xml.gz")
    return ET.fromstring(gzip.decompress(parsed.get_content()))


def text(element: ET.Element, path: str) -> str | None:
    return element.findtext("/".join(f"d:{part}" for part in path.split("/")), namespaces=NS)


async def test_messages_with_the_same_results_are_one_row(tmp_path: Path) -> None:
    async with reporting(tmp_path) as (reporter, sent):
        for _ in range(3):
            reporter.count("192.0.2.1", "example.com", results(), ACCEPT)
        failed = results("fail", dkim="fail", spf_domain="other.example")
        reporter.count("192.0.2.2", "other.example", failed, REJECT)
        assert await end_day(reporter) == 1
        assert await end_day(reporter) == 0, "the rows are sent once"
    (message,) = sent
    assert str(message.envelope.recipients[0]) == "rua@example.com"
    assert message.envelope.sender.text == "postmaster@example.org"
    report = xml_of(message)
    assert text(report, "report_metadata/org_name") == "mx.example.org"
    assert text(report, "policy_published/sp") == "quarantine"
    first, second = report.findall("d:record", NS)
    assert (text(first, "row/source_ip"), text(first, "row/count")) == ("192.0.2.1", "3")
    evaluated = [
        [text(record, f"row/policy_evaluated/{name}") for name in ("disposition", "dkim", "spf")]
        for record in (first, second)
    ]
    assert evaluated == [["pass", "pass", "pass"], ["reject", "fail", "fail"]]
    assert text(second, "auth_results/spf/domain") == "other.example"
    assert text(second, "auth_results/dkim/selector") == "s1"


async def test_parsedmarc_reads_a_report(tmp_path: Path) -> None:
    async with reporting(tmp_path) as (reporter, sent):
        reporter.count("192.0.2.1", "example.com", results(), ACCEPT)
        failed = results("fail", dkim="fail", spf_domain="other.example")
        reporter.count("192.0.2.2", "other.example", failed, REJECT)
        await end_day(reporter)
    parsed = parse_report_email(b"".join(sent[0].body.chunks()), offline=True)
    assert parsed["report_type"] == "aggregate"
    report: dict[str, Any] = dict(parsed["report"])
    assert report["report_metadata"]["org_name"] == "example.org", "of mx.example.org"
    policy = report["policy_published"]
    assert (policy["domain"], policy["p"], policy["sp"]) == ("example.com", "reject", "quarantine")
    found = [
        (each["source"]["ip_address"], each["policy_evaluated"]["disposition"], each["alignment"]["dmarc"])
        for each in report["records"]
    ]
    assert found == [("192.0.2.1", "pass", True), ("192.0.2.2", "reject", False)]
    assert [each["auth_results"]["spf"][0]["domain"] for each in report["records"]] == ["example.com", "other.example"]


async def test_a_report_that_cannot_be_queued_is_kept(tmp_path: Path) -> None:
    async with reporting(tmp_path) as (reporter, sent):

        async def refuse(message: Message) -> None:
            raise OSError("the disk is full")

        reporter.count("192.0.2.1", "example.com", results(), ACCEPT)
        reporter._send = refuse
        assert await end_day(reporter) == 0
        await reporter._save()
    async with reporting(tmp_path, clock=lambda: time.time() + 86_400) as (reporter, sent):  # it survives a restart
        await reporter._load()
        reporter.count("192.0.2.1", "example.com", results(), ACCEPT)
        assert await end_day(reporter) == 2
    first, second = map(xml_of, sent)
    assert [text(each, "record/row/count") for each in (first, second)] == ["1", "1"]
    ended, begun = text(first, "report_metadata/date_range/end"), text(second, "report_metadata/date_range/begin")
    assert ended == begun, "the periods do not overlap"


async def test_a_report_that_fails_holds_up_no_other(tmp_path: Path) -> None:
    async with reporting(tmp_path) as (reporter, sent):
        queue = reporter._send

        async def refuse(message: Message) -> None:
            if message.envelope.recipients[0].path.domain == "example.com":
                raise OSError("the disk is full")
            await queue(message)

        reporter._send = refuse
        for domain in ("example.com", "example.net"):
            found = results()
            assert found.dmarc is not None
            record = parse(f"v=DMARC1; p=reject; rua=mailto:rua@{domain}".encode())
            found.dmarc = found.dmarc._replace(policy_domain=domain, record=record)
            reporter.count("192.0.2.1", domain, found, ACCEPT)
        assert await end_day(reporter) == 1
        assert await end_day(reporter) == 0, "each is sent once"
    assert [str(message.envelope.recipients[0]) for message in sent] == ["rua@example.net"]


async def test_a_failed_report_is_tried_again_an_hour_later(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    tries: list[float] = []

    def clock() -> float:
        return 86_000 + trio.current_time()

    async with reporting(tmp_path, clock=clock) as (reporter, _), trio.open_nursery() as nursery:

        async def refuse(message: Message) -> None:
            tries.append(clock())
            if len(tries) == 3:
                nursery.cancel_scope.cancel()
            raise OSError("the disk is full")

        reporter._send = refuse
        reporter.count("192.0.2.1", "example.com", results(), ACCEPT)
        await reporter.run()
    assert tries[0] >= 86_400
    assert all(after - before >= 3600 for before, after in itertools.pairwise(tries)), tries


async def test_another_domain_gets_reports_only_if_it_agrees(tmp_path: Path) -> None:
    agrees = 'example.com._report._dmarc.reports.example TXT "v=DMARC1;"'
    async with reporting(tmp_path, agrees) as (reporter, sent):
        reporter.count("192.0.2.1", "example.com", results(), ACCEPT)
        assert await end_day(reporter) == 2
    assert [str(message.envelope.recipients[0]) for message in sent] == ["rua@example.com", "all@reports.example"]


async def test_rows_survive_a_restart(tmp_path: Path) -> None:
    async with reporting(tmp_path) as (reporter, _):
        reporter.count("192.0.2.1", "example.com", results(), ACCEPT)
        await reporter._save()
    async with reporting(tmp_path) as (reporter, sent):
        reporter.count("192.0.2.1", "example.com", results(), ACCEPT)
        await reporter._load()
        await end_day(reporter)
    assert text(xml_of(sent[0]).findall("d:record", NS)[0], "row/count") == "2"


def test_a_damaged_file_of_rows_is_refused() -> None:
    for octets in (b"", b"[]", b'{"begin": 1, "domains": [[1, 2]]}', b'{"begin": "x", "domains": []}'):
        with pytest.raises(ValueError, match="not a file of report rows"):
            Rows.load(octets)


def test_a_domain_without_addresses_is_not_counted() -> None:
    found = results()
    found.dmarc = DmarcResult("pass", "example.com", record=parse(b"v=DMARC1; p=none; rua=https://example.com/x"))
    assert row_of("192.0.2.1", "example.com", found, ACCEPT) is None
    found.dmarc = DmarcResult("none", "example.com")
    assert row_of("192.0.2.1", "example.com", found, ACCEPT) is None


def test_rows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.policy.aggregate._MAX_ROWS", 2)
    rows = Rows()
    added = []
    for number in (1, 2, 3, 1):
        found = row_of(f"192.0.2.{number}", "example.com", results(), ACCEPT)
        assert found is not None
        added.append(rows.add(*found))
    assert added == [True, True, False, True]


async def test_what_clients_have_written_cannot_break_the_xml(tmp_path: Path) -> None:
    async with reporting(tmp_path) as (reporter, sent):
        found = results()
        found.dkim = (DkimResult("permerror", "<&>\x00\x1b", "]]>"),)
        reporter.count("192.0.2.1", "example.com", found, ACCEPT)
        await end_day(reporter)
    assert text(xml_of(sent[0]), "record/auth_results/dkim/domain") == "<&>??"
