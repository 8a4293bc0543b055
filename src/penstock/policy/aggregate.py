"""DMARC aggregate reports: what we have found about the mail of a domain, for its owner (RFC 9990).

Each judged message whose domain asks for reports (`rua=`) counts in a row. After midnight UTC, the rows of
each domain become an XML report, compressed, in a message to the addresses that the domain names. Addresses in other
domains get it only if those agree in the DNS (RFC 9990 3). Rows are bounded, and kept across restarts in a file.

A report that cannot be queued waits with its own period, and is tried again an hour later: the others are not held up,
and no message is in two reports.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple
from xml.sax.saxutils import escape

import msgspec

from penstock.addresses import domain_of
from penstock.dns import Resolver
from penstock.mailauth import Decision
from penstock.message import Message, Recipient
from penstock.reports import DailyReports, compressed, in_base64
from penstock.results import Results
from penstock.smtp.grammar import parse_mailbox

_MAX_DOMAINS: Final = 10_000
_MAX_ROWS: Final = 10_000
"""Of a domain; what does not fit is not reported."""
_MAX_ALL_ROWS: Final = 200_000
_MAX_ADDRESSES: Final = 2
"""Addresses of a domain that get the report (RFC 9990 2.1 asks for two at least)."""
_RETRY: Final = 3600.0
"""Seconds until reports are tried again that could not be queued."""
_MAX_COMPLAINTS: Final = 10
"""Different errors that are reported after a try."""
_SIZE: Final = re.compile(r"!([0-9]+)([kmgt]?)\Z", re.IGNORECASE)


class Row(NamedTuple):
    """What messages have in common that are counted together."""

    source: str
    disposition: str
    dkim: str
    spf: str
    """The aligned results: "pass" or "fail"."""
    header_from: str
    envelope_from: str
    auth: tuple[tuple[str, str, str, str], ...]
    """(method, domain, selector or scope, result)."""


class Policy(NamedTuple):
    """The record that was applied."""

    domain: str
    adkim: str
    aspf: str
    p: str
    sp: str
    np: str
    testing: str
    addresses: tuple[str, ...]


class Rows:
    """The counts of a day. Tables are bounded."""

    def __init__(self) -> None:
        self.domains: dict[Policy, dict[Row, int]] = {}
        self._rows = 0

    def add(self, policy: Policy, row: Row, count: int = 1) -> bool:
        """Count a message. Return False when there is no place for another row."""
        rows = self.domains.get(policy)
        if rows is None:
            if len(self.domains) >= _MAX_DOMAINS:
                return False
            rows = self.domains[policy] = {}
        if row not in rows:
            if len(rows) >= _MAX_ROWS or self._rows >= _MAX_ALL_ROWS:
                return False
            self._rows += 1
            rows[row] = 0
        rows[row] += count
        return True

    def dump(self, begin: int, waiting: Iterable[Report] = ()) -> bytes:
        """Return the rows, and reports that wait, as JSON."""
        table = [(policy, list(rows.items())) for policy, rows in self.domains.items()]
        late = [(each.begin, each.end, each.policy, list(each.rows.items())) for each in waiting]
        return msgspec.json.encode(_Saved(begin, table, late))

    @classmethod
    def load(cls, octets: bytes) -> tuple[Rows, int, list[Report]]:
        """Return rows, the second in which they begin, and reports that wait.

        Raise ValueError for anything else than `dump` has made.
        """
        try:
            saved = msgspec.json.decode(octets, type=_Saved)
        except (msgspec.MsgspecError, RecursionError) as exc:
            raise ValueError(f"not a file of report rows: {exc}") from exc
        made = cls()
        for policy, rows in saved.domains:
            for row, count in rows:
                made.add(policy, row, count)
        return made, saved.begin, [Report(policy, dict(rows), begin, end) for begin, end, policy, rows in saved.waiting]


class Report(NamedTuple):
    """The rows of a domain in a period that has ended: seconds since the epoch."""

    policy: Policy
    rows: dict[Row, int]
    begin: int
    end: int


class _Saved(msgspec.Struct):
    """The file."""

    begin: int
    domains: list[tuple[Policy, list[tuple[Row, int]]]]
    waiting: list[tuple[int, int, Policy, list[tuple[Row, int]]]] = []


def row_of(address: str, sender_domain: str, results: Results, decision: Decision) -> tuple[Policy, Row] | None:
    """Return where a message is counted; None when its domain wants no reports."""
    dmarc = results.dmarc
    if dmarc is None or dmarc.record is None or not dmarc.record.reports:
        return None
    record = dmarc.record
    addresses = tuple(uri for uri in record.reports if uri.lower().startswith("mailto:"))
    if not addresses:
        return None
    policy = Policy(
        dmarc.policy_domain,
        "s" if record.strict_dkim else "r",
        "s" if record.strict_spf else "r",
        record.policy,
        record.subdomain_policy,
        record.absent_policy,
        "y" if record.is_testing else "n",
        addresses,
    )
    auth: list[tuple[str, str, str, str]] = [("dkim", each.domain, each.selector, each.result) for each in results.dkim]
    if results.spf is not None:
        scope = "mfrom" if results.spf.identity == "mailfrom" else "helo"
        auth.append(("spf", results.spf.domain, scope, results.spf.result))
    action: str = "pass" if dmarc.result == "pass" else "none"
    if decision.check == "dmarc" and decision.action in ("reject", "quarantine"):
        action = decision.action
    dkim, spf = (_aligned(method, dmarc.domain, policy, auth) for method in ("dkim", "spf"))
    return policy, Row(address, action, dkim, spf, dmarc.domain, sender_domain, tuple(auth))


def _aligned(method: str, author: str, policy: Policy, auth: list[tuple[str, str, str, str]]) -> str:
    """Return whether something that a method has authenticated belongs to the domain of From: "pass" or "fail"."""
    is_strict = (policy.adkim if method == "dkim" else policy.aspf) == "s"
    for used, domain, _, result in auth:
        if used != method or result != "pass":
            continue
        if domain == author:
            return "pass"
        below = f".{domain}".endswith(f".{policy.domain}") or f".{author}".endswith(f".{domain}")
        if below and not is_strict:
            return "pass"
    return "fail"


def report_xml(
    policy: Policy, rows: dict[Row, int], *, report_id: str, organization: str, contact: str, begin: int, end: int
) -> str:
    """Return the report of a domain (RFC 9990 3.1, appendix A)."""

    def tag(name: str, text: object) -> str:
        clean = "".join(char if char.isprintable() else "?" for char in str(text))
        return f"<{name}>{escape(clean)}</{name}>"

    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        '<feedback xmlns="urn:ietf:params:xml:ns:dmarc-2.0">',
        f"<version>1.0</version><report_metadata>{tag('org_name', organization)}{tag('email', contact)}"
        f"{tag('report_id', report_id)}<date_range>{tag('begin', begin)}{tag('end', end)}</date_range>"
        f"{tag('generator', 'Penstock')}</report_metadata>",
        f"<policy_published>{tag('domain', policy.domain)}{tag('p', policy.p)}{tag('sp', policy.sp)}"
        f"{tag('np', policy.np)}{tag('adkim', policy.adkim)}{tag('aspf', policy.aspf)}"
        f"{tag('testing', policy.testing)}{tag('discovery_method', 'treewalk')}</policy_published>",
    ]
    for row, count in rows.items():
        results = "".join(
            f"<{method}>{tag('domain', domain)}"
            + (tag("selector", name) if method == "dkim" else tag("scope", name))
            + f"{tag('result', result)}</{method}>"
            for method, domain, name, result in row.auth
        )
        lines.append(
            f"<record><row>{tag('source_ip', row.source)}{tag('count', count)}<policy_evaluated>"
            f"{tag('disposition', row.disposition)}{tag('dkim', row.dkim)}{tag('spf', row.spf)}</policy_evaluated>"
            f"</row><identifiers>{tag('header_from', row.header_from)}{tag('envelope_from', row.envelope_from)}"
            f"</identifiers><auth_results>{results}</auth_results></record>"
        )
    lines.append("</feedback>\n")
    return "\n".join(lines)


class Reporter(DailyReports):
    """Counts messages, and sends the reports of a day."""

    name = "dmarc"

    def __init__(self, resolver: Resolver, *arguments: Any, **more: Any) -> None:
        """As `DailyReports`; the `resolver` is asked whether other domains agree to get reports."""
        super().__init__(*arguments, **more)
        self._resolver = resolver
        self._rows = Rows()
        self._numbers = itertools.count()
        self._waiting: dict[int, Report] = {}
        """Reports to be sent; the oldest first."""
        self._try_at = 0.0
        """Unix time from which on they are tried again."""

    def count(self, address: str, sender_domain: str, results: Results, decision: Decision) -> None:
        """Count a message, if its domain wants reports."""
        found = row_of(address, sender_domain, results, decision)
        if found is not None:
            self._is_changed |= self._rows.add(*found)

    def _encode(self) -> bytes:
        return self._rows.dump(self._begin, self._waiting.values())

    def _decode(self, octets: bytes) -> tuple[Rows, int, list[Report]]:
        return Rows.load(octets)

    def _restore(self, saved: tuple[Rows, int, list[Report]]) -> None:
        rows, self._begin, waiting = saved
        for policy, counts in self._rows.domains.items():  # counted while the file was read
            for row, count in counts.items():
                rows.add(policy, row, count)
        self._rows = rows
        self._wait(waiting)

    def close(self, end: int) -> None:
        """Begin another day; the reports on the last one wait to be sent."""
        rows, self._rows = self._rows, Rows()
        begin, self._begin = self._begin, end
        self._wait(Report(policy, counts, begin, end) for policy, counts in rows.domains.items())
        self._try_at = 0.0

    def _wait(self, reports: Iterable[Report]) -> None:
        """Keep reports until they are sent; the oldest ones go when there are too many."""
        waiting = self._waiting
        waiting.update(zip(self._numbers, reports, strict=False))
        count = sum(len(report.rows) for report in waiting.values())
        while len(waiting) > _MAX_DOMAINS or count > _MAX_ALL_ROWS:
            count -= len(waiting.pop(next(iter(waiting))).rows)
        self._is_changed = True

    async def send_reports(self) -> int:
        """Send a report to each domain that waits for one. Return the number of messages.

        What cannot be queued now waits for an hour; the reports on other domains are sent nevertheless.
        """
        if not self._waiting or self._clock() < self._try_at:
            return 0
        self._try_at = self._clock() + _RETRY
        sent = 0
        failures: dict[str, Exception] = {}
        for number, report in list(self._waiting.items()):
            try:
                sent += await self._report(report)
            except Exception as exc:  # noqa: BLE001 - whatever keeps the spool from taking it
                failures.setdefault(str(exc), exc)
            else:
                del self._waiting[number]
                self._is_changed = True
        for failure in list(failures.values())[:_MAX_COMPLAINTS]:
            self._journal.error(0, "dmarc", failure)
        return sent

    async def _report(self, report: Report) -> int:
        """Send a report. Return the number of messages. Raise what keeps them from being queued."""
        policy = report.policy
        sent = 0
        recipients = [each for uri in policy.addresses if (each := await self._recipient(policy, uri)) is not None]
        for recipient, most in recipients[:_MAX_ADDRESSES]:
            message = self._message_to(recipient, report)
            if message.size <= most:
                await self._send(message)
                sent += 1
        return sent

    async def _recipient(self, policy: Policy, uri: str) -> tuple[Recipient, float] | None:
        """Return an address that agrees to get the report, and how many octets; None for one that does not."""
        text = uri.partition(":")[2].partition("?")[0]
        limit = _SIZE.search(text)
        most = float("inf")
        if limit is not None:
            text = text[: limit.start()]
            most = int(limit[1]) * 1024 ** " kmgt".index(limit[2].lower() or " ")
        path = parse_mailbox(text, smtputf8=False, tolerant=True)
        if path is None or not path.domain or domain_of(path.domain, utf8=False) is None:
            return None
        name = path.domain
        if name != policy.domain and not name.endswith("." + policy.domain) and not policy.domain.endswith("." + name):
            # RFC 9990 3: another domain has to agree.
            answer = await self._resolver.query(f"{policy.domain}._report._dmarc.{name}", "TXT")
            if not any(re.match(rb"v[ \t]*=[ \t]*DMARC1", record) for record in answer.records):
                return None
        return Recipient(path), most

    def _message_to(self, to: Recipient, report: Report) -> Message:
        policy, rows, begin, end = report
        message_id = self._ids.next()
        xml = report_xml(
            policy,
            rows,
            report_id=self._report_id(message_id),
            organization=self._hostname,
            contact=self._contact,
            begin=begin,
            end=end,
        )
        name = f"{self._hostname}!{policy.domain}!{begin}!{end}!{message_id}.xml.gz"  # RFC 9990 3.3.1
        content = [
            f'Content-Type: application/gzip; name="{name}"',
            f'Content-Disposition: attachment; filename="{name}"',
            "Content-Transfer-Encoding: base64",
            "",
            *in_base64(compressed(xml.encode(), end)),
        ]
        return self._message(message_id, policy.domain, to, content)
