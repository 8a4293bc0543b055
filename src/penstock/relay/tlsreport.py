"""TLS reports: results of connections to the MX hosts of a domain, for its owner (RFC 8460).

A connection to a host of a domain that asks for reports (TXT at _smtp._tls.DOMAIN) counts as a success or a failure of
the policy that was applied: DANE ("tlsa"), MTA-STS ("sts"), or none. At midnight UTC the counts of the day are closed;
within four hours, at a time that depends on the domain, those of each domain become a JSON report, compressed, in a
message to the addresses that the domain names, or in a POST to its https: URIs (RFC 8460 3). Counts are bounded, and
kept across restarts in a file. A report that a web server does not accept is submitted again every hour until the next
day ends (RFC 8460 5.5).
"""

from __future__ import annotations

import re
import ssl
import zlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec

from penstock.addresses import domain_of
from penstock.message import Message, MessageId, Recipient
from penstock.message import Path as MailPath
from penstock.relay.https import FetchError
from penstock.reports import DailyReports, compressed, in_base64
from penstock.smtp.grammar import parse_mailbox

Submit = Callable[[str, bytes], Awaitable[None]]
"""Posts a compressed report to an https: URI. Raises FetchError."""
REPORT_TYPE: Final = "application/tlsrpt+gzip"
OTHER_FAILURE: Final = "validation-failure"
"""The result type of other failures (RFC 8460 4.3.4)."""
_MAX_DOMAINS: Final = 10_000
"""Domains that are known to want reports, and those that get one."""
_MAX_POLICIES: Final = 10_000
_MAX_STRINGS: Final = 16
"""TLSA records, or lines of a policy, that are reported."""
_MAX_STRING: Final = 300
_MAX_FAILURES: Final = 1000
"""Kinds of failures of a policy; what does not fit is counted in the summary only."""
_MAX_ALL_FAILURES: Final = 100_000
_MAX_ADDRESSES: Final = 2
_MAX_REASON: Final = 200
_SPREAD: Final = 4 * 3600
"""Seconds after midnight within which reports are sent (RFC 8460 4.1)."""
_BATCH: Final = 100
"""Reports that are sent between two copies of the counts."""
_MAX_NOTED: Final = 10_000
_RETRY: Final = 3600.0
"""Seconds until a report is submitted again that a web server has not accepted."""
_MAX_URI: Final = 500
_RECORD: Final = re.compile(rb"v=TLSRPTv1[ \t]*;", re.ASCII)
_RUA: Final = re.compile(rb"rua[ \t]*=[ \t]*([^;]{1,2000})")
_URI: Final = re.compile(r"[!-~]+")
_EXPIRED: Final = 10
"""X509_V_ERR_CERT_HAS_EXPIRED."""
_WRONG_HOST: Final = 62
"""X509_V_ERR_HOSTNAME_MISMATCH."""


def failure_of(exc: BaseException) -> str:
    """Return the result type of a failed TLS handshake (RFC 8460 4.3)."""
    seen: BaseException | None = exc
    while seen is not None and not isinstance(seen, ssl.SSLCertVerificationError):
        seen = seen.__cause__
    if seen is None:
        return OTHER_FAILURE
    kinds = {_EXPIRED: "certificate-expired", _WRONG_HOST: "certificate-host-mismatch"}
    return kinds.get(seen.verify_code, "certificate-not-trusted")


def addresses_of(records: Iterable[bytes]) -> tuple[str, ...]:
    """Return the mail addresses and https: URIs of the TXT records at _smtp._tls.DOMAIN (RFC 8460 3); () for none."""
    found = [each for each in records if _RECORD.match(each)]
    if len(found) != 1:
        return ()
    for part in found[0].split(b";")[1:]:
        match = _RUA.fullmatch(part.strip())
        if match is not None:
            uris = [each.strip() for each in match[1].decode("ascii", "replace").split(",")]
            return tuple(filter(None, map(_address, uris)))[:_MAX_ADDRESSES]
    return ()


def _address(uri: str) -> str:
    """Return the mail address in a mailto: URI, an https: URI as it is, "" for anything else."""
    if uri.lower().startswith("mailto:"):
        address = unquote(uri[7:].partition("?")[0])
        return "" if _mailbox(address) is None else address
    return uri if split_uri(uri) is not None else ""


def split_uri(uri: str) -> tuple[str, int, str] | None:
    """Return the host, the port and the path with its query of an https: URI; None for any other text."""
    if not uri.lower().startswith("https://") or len(uri) > _MAX_URI or _URI.fullmatch(uri) is None:
        return None
    try:
        parts = urlsplit(uri)
        port = parts.port or 443
    except ValueError:
        return None
    host = parts.hostname or ""
    if parts.username is not None or "." not in host or domain_of(host, utf8=False) is None or host[-1].isdigit():
        return None
    return host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _mailbox(text: str) -> MailPath | None:
    path = parse_mailbox(text, smtputf8=False, tolerant=True)
    return path if path is not None and path.domain and domain_of(path.domain, utf8=False) else None


class AppliedPolicy(NamedTuple):
    """The policy of a domain that connections are counted by."""

    kind: Literal["tlsa", "sts", "no-policy-found"]
    domain: str
    """The domain that has the policy: of DANE, the name of the TLSA records (RFC 8460 1.1)."""
    strings: tuple[str, ...] = ()
    mx: tuple[str, ...] = ()
    """Host patterns of MTA-STS."""


def applied(
    kind: Literal["tlsa", "sts", "no-policy-found"], domain: str, strings: Sequence[str] = (), mx: Sequence[str] = ()
) -> AppliedPolicy:
    """Return a policy in the length in which it is reported."""
    strings, mx = strings[:_MAX_STRINGS], mx[:_MAX_STRINGS]
    return AppliedPolicy(kind, domain, tuple(each[:_MAX_STRING] for each in strings), tuple(mx))


class Failure(NamedTuple):
    """Failures that are counted together (RFC 8460 4.4)."""

    kind: str
    source: str = ""
    host: str = ""
    address: str = ""
    reason: str = ""


class Counts:
    """The results under a policy."""

    __slots__ = ("details", "failures", "successes")

    def __init__(self) -> None:
        self.successes = 0
        self.failures = 0
        self.details: dict[Failure, int] = {}


class _SavedCounts(msgspec.Struct):
    successes: int
    failures: int
    details: list[tuple[Failure, int]]


_SavedDomain = tuple[str, tuple[str, ...], list[tuple[AppliedPolicy, _SavedCounts]]]


class _Saved(msgspec.Struct):
    """The file."""

    begin: int
    domains: list[_SavedDomain]
    closed_begin: int = 0
    closed_end: int = 0
    closed: list[_SavedDomain] = []
    """Reports of a period that is over."""


Key = tuple[str, tuple[str, ...]]
"""A domain and the addresses for its reports."""
Policies = dict[AppliedPolicy, Counts]


class Tally:
    """The counts of a period, in bounds."""

    def __init__(self) -> None:
        self.table: dict[Key, Policies] = {}
        self._policies = 0
        self._details = 0

    def find(self, key: Key, policy: AppliedPolicy) -> Counts | None:
        """Return what a policy is counted in; None when there is no place for another one."""
        policies = self.table.get(key)
        counts = None if policies is None else policies.get(policy)
        if counts is not None:
            return counts
        if self._policies >= _MAX_POLICIES or (policies is None and len(self.table) >= _MAX_DOMAINS):
            return None
        self._policies += 1
        counts = self.table.setdefault(key, {})[policy] = Counts()
        return counts

    def note(self, counts: Counts, failure: Failure, count: int = 1) -> None:
        """Note the kind of failures that are counted already, unless there are too many kinds."""
        before = counts.details.get(failure)
        if before is None:
            if len(counts.details) >= _MAX_FAILURES or self._details >= _MAX_ALL_FAILURES:
                return
            self._details += 1
        counts.details[failure] = (before or 0) + count

    def merge(self, key: Key, policy: AppliedPolicy, counts: _SavedCounts | Counts) -> None:
        """Add other counts, as far as there is place."""
        own = self.find(key, policy)
        if own is None:
            return
        own.successes += counts.successes
        own.failures += counts.failures
        details = counts.details.items() if isinstance(counts, Counts) else counts.details
        for failure, count in details:
            self.note(own, failure, count)

    def put_back(self, key: Key, policies: Policies) -> None:
        """Add the counts of a domain, as far as there is place."""
        for policy, counts in policies.items():
            self.merge(key, policy, counts)

    def pop(self, key: Key) -> Policies:
        """Remove the counts of a domain."""
        policies = self.table.pop(key)
        self._policies -= len(policies)
        self._details -= sum(len(each.details) for each in policies.values())
        return policies

    def saved(self) -> list[_SavedDomain]:
        """Return the counts as the file has them."""
        return [
            (
                *key,
                [
                    (policy, _SavedCounts(each.successes, each.failures, list(each.details.items())))
                    for policy, each in policies.items()
                ],
            )
            for key, policies in self.table.items()
        ]

    def load(self, saved: Sequence[_SavedDomain]) -> None:
        """Add counts of the file."""
        for domain, addresses, policies in saved:
            for policy, counts in policies:
                self.merge((domain, addresses), policy, counts)


def delay_of(domain: str) -> int:
    """Return how many seconds after midnight the report on a domain is sent: not all at once (RFC 8460 4.1)."""
    return zlib.crc32(domain.encode()) % _SPREAD


def report_json(policies: Policies, *, report_id: str, organization: str, contact: str, begin: int, end: int) -> bytes:
    """Return the report of a domain (RFC 8460 4.4)."""

    def date(when: int) -> str:
        return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    made: list[dict[str, Any]] = []
    for policy, counts in policies.items():
        entry: dict[str, Any] = {"policy-type": policy.kind, "policy-domain": policy.domain}
        if policy.strings:
            entry["policy-string"] = policy.strings
        if policy.mx:
            entry["mx-host"] = policy.mx
        summary = {
            "total-successful-session-count": counts.successes,
            "total-failure-session-count": counts.failures,
        }
        made.append({"policy": entry, "summary": summary})
        if counts.details:
            made[-1]["failure-details"] = [_detail(failure, count) for failure, count in counts.details.items()]
    return msgspec.json.encode(
        {
            "organization-name": organization,
            "date-range": {"start-datetime": date(begin), "end-datetime": date(end)},
            "contact-info": contact,
            "report-id": report_id,
            "policies": made,
        }
    )


def _detail(failure: Failure, count: int) -> dict[str, Any]:
    fields = {
        "result-type": failure.kind,
        "sending-mta-ip": failure.source,
        "receiving-mx-hostname": failure.host,
        "receiving-ip": failure.address,
        "failure-reason-code": failure.reason,
    }
    return {**{name: value for name, value in fields.items() if value}, "failed-session-count": count}


class TlsReports(DailyReports):
    """Counts connections, and sends the reports of a day."""

    name = "tls-reports"

    def __init__(self, *arguments: Any, **more: Any) -> None:
        """As `DailyReports`."""
        super().__init__(*arguments, **more)
        self._wanted: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        """Addresses for the reports on a domain."""
        self._tally = Tally()
        self._closed = Tally()
        """The counts of a period that is over, whose reports were not sent yet."""
        self._closed_begin = self._closed_end = 0
        self._noted: set[tuple[str, str, str]] = set()
        """What is counted once in a period: domain, host and kind of failure."""
        self.submit: Submit | None = None
        """How reports are posted; without it, https: URIs get none."""
        self._again: dict[Key, float] = {}
        """Reports that a web server has not accepted, and when they are submitted again."""

    # ---- counting

    def expect(self, domain: str, addresses: tuple[str, ...]) -> None:
        """Note the addresses for reports on a domain; () for none."""
        if not addresses:
            self._wanted.pop(domain, None)
            return
        self._wanted[domain] = addresses
        self._wanted.move_to_end(domain)
        while len(self._wanted) > _MAX_DOMAINS:
            self._wanted.popitem(last=False)

    def count(self, domain: str, policy: AppliedPolicy | None, failure: Failure | None = None) -> None:
        """Count a connection that was made for a domain under a policy, if reports on it are wanted."""
        addresses = self._wanted.get(domain)
        if addresses is None:
            return
        counts = self._tally.find((domain, addresses), policy or AppliedPolicy("no-policy-found", domain))
        if counts is None:
            return
        self._is_changed = True
        if failure is None:
            counts.successes += 1
        else:
            counts.failures += 1
            self._tally.note(counts, failure._replace(reason=failure.reason[:_MAX_REASON]))

    def count_once(self, domain: str, policy: AppliedPolicy, failure: Failure) -> None:
        """Count a failure without a connection: once in a period for each domain, host and kind."""
        noted = domain, failure.host, failure.kind
        if domain not in self._wanted or noted in self._noted or len(self._noted) >= _MAX_NOTED:
            return
        self._noted.add(noted)
        self.count(domain, policy, failure)

    # ---- the day

    def _encode(self) -> bytes:
        saved = _Saved(self._begin, self._tally.saved(), self._closed_begin, self._closed_end, self._closed.saved())
        return msgspec.json.encode(saved)

    def _decode(self, octets: bytes) -> _Saved:
        return msgspec.json.decode(octets, type=_Saved)

    def _restore(self, saved: _Saved) -> None:
        self._begin = min(saved.begin, self._begin)
        self._tally.load(saved.domains)
        self._closed_begin, self._closed_end = saved.closed_begin, saved.closed_end
        self._closed.load(saved.closed)

    def close(self, end: int) -> None:
        """Begin another period. Reports of the last one that were not sent yet also cover this one.

        Those that a web server has not accepted all day are given up.
        """
        for key in self._again.keys() & self._closed.table.keys():
            self._closed.pop(key)
        self._again.clear()
        if not self._closed.table:
            self._closed_begin = self._begin
            self._closed = self._tally
        else:
            for key, policies in self._tally.table.items():
                self._closed.put_back(key, policies)
        self._tally = Tally()
        self._begin = self._closed_end = end
        self._noted.clear()
        self._is_changed = True

    async def send_reports(self) -> int:
        """Send reports of the period that was closed, if it is time for them. Return the number of messages.

        What cannot be queued now is kept, and sent with the next try. A crash sends none twice: those of a batch are
        removed from the file before the first one is sent.
        """
        sent = 0
        while batch := self._due():
            done, is_complete = await self._send_batch(batch)
            sent += done
            if not is_complete:
                break
        return sent

    def _due(self) -> list[Key]:
        """Return reports whose time has come. One that is posted is the last: a web server may be slow to answer."""
        now = self._clock()
        elapsed = now - self._closed_end
        due = (
            key
            for key in self._closed.table
            if elapsed >= delay_of(key[0]) and ((again := self._again.get(key)) is None or again <= now)
        )
        batch = []
        for key in islice(due, _BATCH):
            batch.append(key)
            if self.submit is not None and any(split_uri(each) is not None for each in key[1]):
                break
        return batch

    async def _send_batch(self, keys: Sequence[Key]) -> tuple[int, bool]:
        """Send reports. Return the number of messages, and whether there was no failure."""
        begin, end = self._closed_begin, self._closed_end
        left = {key: self._closed.pop(key) for key in keys}
        self._is_changed = True
        sent, is_complete = 0, False
        try:
            if not await self._save():
                return 0, False
            for key in keys:
                domain, addresses = key
                paths = [path for path in map(_mailbox, addresses) if path is not None]
                policies = left[key]
                messages = [self._message_to(path, domain, policies, begin, end) for path in paths]
                left[key] = left.pop(key)  # if it fails, the others are the first next time
                for message in messages:
                    await self._send(message)
                    sent += 1
                    left.pop(key, None)  # it is not sent again, although an address may be without it
                await self._submit_all(key, left.pop(key, policies), begin, end)
            is_complete = True
        except Exception as exc:  # noqa: BLE001 - whatever keeps the spool from taking it
            self._journal.error(0, "tls-reports", exc)
        finally:
            for key, policies in left.items():
                self._closed.put_back(key, policies)
                self._is_changed = True
        return sent, is_complete

    async def _submit_all(self, key: Key, policies: Policies, begin: int, end: int) -> None:
        """Post a report to the URIs of a domain; it is kept for those that do not accept it."""
        domain, addresses = key
        left = [each for each in addresses if self.submit is not None and split_uri(each) is not None]
        failed: list[str] = []
        self._again.pop(key, None)
        try:
            while left and self.submit is not None:
                try:
                    await self.submit(left[0], self._report(self._ids.next(), policies, begin, end))
                except FetchError as exc:
                    self._journal.hook_failed("tls-reports", "submit", f"report on {domain}: {exc}")
                    failed.append(left[0])
                del left[0]
        finally:
            if failed or left:  # some are left when the server stops
                kept = domain, (*failed, *left)
                self._closed.put_back(kept, policies)
                self._again[kept] = self._clock() + _RETRY
                self._is_changed = True

    def _report(self, message_id: MessageId, policies: Policies, begin: int, end: int) -> bytes:
        """Return a report, compressed."""
        octets = report_json(
            policies,
            report_id=self._report_id(message_id),
            organization=self._hostname,
            contact=self._contact,
            begin=begin,
            end=end,
        )
        return compressed(octets, end)

    def _message_to(self, to: MailPath, domain: str, policies: Policies, begin: int, end: int) -> Message:
        """Return the message with a report (RFC 8460 5.3)."""
        message_id = self._ids.next()
        name = f"{self._hostname}!{domain}!{begin}!{end}!{message_id}.json.gz"  # RFC 8460 5.1
        boundary = f"=_{message_id}"
        content = [
            f"TLS-Report-Domain: {domain}",
            f"TLS-Report-Submitter: {self._hostname}",
            "TLS-Required: No",  # RFC 8689 5: the report may be about a failure of TLS
            f'Content-Type: multipart/report; report-type="tlsrpt";\r\n\tboundary="{boundary}"',
            "",
            f"--{boundary}",
            "Content-Type: text/plain; charset=us-ascii",
            "",
            *_in_words(domain, policies, self._hostname),
            f"--{boundary}",
            f"Content-Type: {REPORT_TYPE}",
            "Content-Transfer-Encoding: base64",
            f'Content-Disposition: attachment;\r\n\tfilename="{name}"',
            "",
            *in_base64(self._report(message_id, policies, begin, end)),
            f"--{boundary}--",
        ]
        return self._message(message_id, domain, Recipient(to), content)


def _in_words(domain: str, policies: Policies, hostname: str) -> Sequence[str]:
    successes = sum(each.successes for each in policies.values())
    failures = sum(each.failures for each in policies.values())
    return [
        f"This is a TLS report of {hostname} (RFC 8460) on its connections",
        f"to the mail servers of {domain}.",
        "",
        f"Connections with TLS as the policy demands: {successes}",
        f"Failures: {failures}",
        "",
    ]
