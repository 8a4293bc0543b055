"""DMARC aggregate reports: what we have found about the mail of a domain, for its owner (RFC 9990).

Each judged message whose domain asks for reports (`rua=`) counts in a row. Once a day, at midnight UTC, the rows of
each domain become an XML report, compressed, in a message to the addresses that the domain names. Addresses in other
domains get it only if those agree in the DNS (RFC 9990 3). Rows are bounded, and kept across restarts in a file.
"""

from __future__ import annotations

import base64
import gzip
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

import msgspec
import trio

from penstock.addresses import domain_of
from penstock.dns import Resolver
from penstock.files import write_atomically
from penstock.journal import Journal
from penstock.mailauth import Decision
from penstock.message import Envelope, Message, MessageIds, Recipient
from penstock.message import Path as MailPath
from penstock.results import Results
from penstock.smtp.grammar import parse_mailbox

Send = Callable[[Message], Awaitable[None]]
"""Puts a message into the queue."""
_MAX_DOMAINS: Final = 10_000
_MAX_ROWS: Final = 10_000
"""Of a domain; what does not fit is not reported."""
_MAX_ALL_ROWS: Final = 200_000
_MAX_ADDRESSES: Final = 2
"""Addresses of a domain that get the report (RFC 9990 2.1 asks for two at least)."""
_DAY: Final = 86_400
_SAVE: Final = 60.0
"""Seconds between two copies of the rows to the file."""
_LINE: Final = 76
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

    def dump(self, begin: int) -> bytes:
        """Return the rows as JSON."""
        table = [(policy, list(rows.items())) for policy, rows in self.domains.items()]
        return msgspec.json.encode(_Saved(begin, table))

    @classmethod
    def load(cls, octets: bytes) -> tuple[Rows, int]:
        """Return rows, and the second in which they begin. Raise ValueError for anything else than `dump` has made."""
        try:
            saved = msgspec.json.decode(octets, type=_Saved)
        except msgspec.MsgspecError as exc:
            raise ValueError(f"not a file of report rows: {exc}") from exc
        made = cls()
        for policy, rows in saved.domains:
            for row, count in rows:
                made.add(policy, row, count)
        return made, saved.begin


class _Saved(msgspec.Struct):
    """The file."""

    begin: int
    domains: list[tuple[Policy, list[tuple[Row, int]]]]


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


class ReportBody:
    """A report in memory (penstock.message.Body)."""

    __slots__ = ("_octets", "size")
    in_memory: Final = True

    def __init__(self, octets: bytes) -> None:
        self._octets = octets
        self.size = len(octets)

    def chunks(self) -> Iterator[bytes]:
        """Yield the report."""
        return iter((self._octets,))

    def close(self) -> None:
        """Do nothing."""


class Reporter:
    """Counts messages, and sends the reports of a day."""

    def __init__(
        self,
        send: Send,
        resolver: Resolver,
        journal: Journal,
        *,
        hostname: str,
        contact: str,
        file: Path,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`contact` is the sender of the reports, `file` keeps the rows across restarts."""
        self._send = send
        self._resolver = resolver
        self._journal = journal
        self._hostname = hostname
        self._contact = contact
        self._file = file
        self._clock = clock
        self._ids = MessageIds()
        self._rows = Rows()
        self._begin = int(clock())
        self._is_changed = False

    def count(self, address: str, sender_domain: str, results: Results, decision: Decision) -> None:
        """Count a message, if its domain wants reports."""
        found = row_of(address, sender_domain, results, decision)
        if found is not None:
            self._is_changed |= self._rows.add(*found)

    async def run(self) -> None:
        """Save the rows from time to time, and send the reports at midnight, until cancelled."""
        await trio.to_thread.run_sync(self._load)
        try:
            while True:
                await trio.sleep(_SAVE)
                if self._clock() // _DAY > self._begin // _DAY:
                    await self.send_reports()
                await self._save()
        finally:
            with trio.CancelScope(shield=True):
                await self._save()

    def _load(self) -> None:
        try:
            rows, self._begin = Rows.load(self._file.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as exc:
            self._journal.hook_failed("dmarc", "reports", f"{self._file}: {exc}")
            return
        for policy, counts in self._rows.domains.items():  # counted while the file was read
            for row, count in counts.items():
                rows.add(policy, row, count)
        self._rows = rows

    async def _save(self) -> None:
        if not self._is_changed:
            return
        self._is_changed = False
        octets = self._rows.dump(self._begin)
        try:
            await trio.to_thread.run_sync(write_atomically, self._file, octets)
        except OSError as exc:
            self._journal.hook_failed("dmarc", "reports", f"{self._file}: {exc}")

    async def send_reports(self) -> int:
        """Send a report to each domain of the rows, and begin anew. Return the number of messages."""
        rows, self._rows = self._rows, Rows()
        begin, self._begin = self._begin, int(self._clock())
        self._is_changed = True
        sent = 0
        for policy, counts in rows.domains.items():
            recipients = [each for uri in policy.addresses if (each := await self._recipient(policy, uri)) is not None]
            for recipient, most in recipients[:_MAX_ADDRESSES]:
                message = self._message(policy, counts, begin, self._begin, recipient)
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

    def _message(self, policy: Policy, rows: dict[Row, int], begin: int, end: int, to: Recipient) -> Message:
        message_id = self._ids.next()
        report_id = f"{message_id}@{self._hostname}"
        xml = report_xml(
            policy, rows, report_id=report_id, organization=self._hostname, contact=self._contact, begin=begin, end=end
        )
        name = f"{self._hostname}!{policy.domain}!{begin}!{end}!{message_id}.xml.gz"  # RFC 9990 3.3.1
        encoded = base64.b64encode(gzip.compress(xml.encode(), mtime=end)).decode()
        lines = [
            f"From: <{self._contact}>",
            f"To: <{to.path.text}>",
            f"Subject: Report Domain: {policy.domain} Submitter: {self._hostname}",
            f" Report-ID: <{report_id}>",
            f"Date: {formatdate(self._clock()).replace('-0000', '+0000')}",
            f"Message-ID: <{report_id}>",
            "Auto-Submitted: auto-generated",
            "MIME-Version: 1.0",
            f'Content-Type: application/gzip; name="{name}"',
            f'Content-Disposition: attachment; filename="{name}"',
            "Content-Transfer-Encoding: base64",
            "",
            *(encoded[at : at + _LINE] for at in range(0, len(encoded), _LINE)),
            "",
        ]
        sender = MailPath(self._contact, *self._contact.rsplit("@", 1))
        envelope = Envelope(sender, (to._replace(notify=frozenset({"NEVER"})),))
        return Message(message_id, envelope, b"", ReportBody("\r\n".join(lines).encode()), self._clock())
