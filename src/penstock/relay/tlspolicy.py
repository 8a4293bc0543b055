"""The protection of mail to MX hosts: DANE, MTA-STS, or TLS if it is offered.

For each MX host of a domain, once its addresses are known:

- with TLSA records that count: DANE (dane.py). If they cannot be looked up, the host is not used (RFC 7672 2.2);
- otherwise, with a policy of MTA-STS in force for the domain (mtasts.py): a host that the policy does not name is not
  used, the others need a certificate for their name. MTA-STS never overrides a failure of DANE (RFC 8461 2);
- otherwise as the route says.
"""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

import msgspec
import trio

from penstock.dns import Exchanger, MailExchangers, ResolveError, Resolver
from penstock.journal import Journal
from penstock.net.tls import client_context
from penstock.relay.dane import DanePolicy, policy_of
from penstock.relay.hop import Hop, TlsPolicy
from penstock.relay.https import FetchError, fetch_text, post
from penstock.relay.mtasts import MAX_POLICY, StsPolicies, StsPolicy
from penstock.relay.tlsreport import REPORT_TYPE, AppliedPolicy, Failure, TlsReports, addresses_of, applied, split_uri

_PATH: Final = "/.well-known/mta-sts.txt"
HTTPS_PORT: Final = 443
_MAX_ADDRESSES: Final = 4
"""Addresses of a policy host that are tried."""
_PATIENCE: Final = 5.0
"""Seconds to wait for a policy of MTA-STS if there are hosts with DANE, which do not need it."""
_MAX_APPLIED: Final = 4000
"""Domains whose policy is known for reports."""


class RelayTlsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS with MX hosts according to their domains, on routes to "mx" whose tls.mode is opportunistic or require."""

    dane: Annotated[
        bool,
        msgspec.Meta(
            description="DANE (RFC 7672): certificates must match the TLSA records of the MX host. Needs a validating "
            "resolver whose AD bit is trusted: on this machine, or with resolver.trust_ad"
        ),
    ] = False
    mta_sts: Annotated[
        bool,
        msgspec.Meta(
            description="MTA-STS (RFC 8461): certificates of MX hosts must be valid if the policy of the domain "
            "requires it. Policies are fetched over HTTPS and kept in data_dir"
        ),
    ] = False
    deadline: Annotated[
        float, msgspec.Meta(gt=0, le=60, description="Seconds to fetch the MTA-STS policy of a domain")
    ] = 15.0
    ca_file: Annotated[
        str,
        msgspec.Meta(
            description="PEM file, relative to data_dir, of the authorities trusted for MTA-STS; default: those of the "
            "system"
        ),
    ] = ""
    reports: Annotated[
        Literal["off", "daily"],
        msgspec.Meta(
            description="daily: send TLS reports (RFC 8460) to the domains that ask for them; needs contact and a key "
            "in policy.sign"
        ),
    ] = "off"
    contact: Annotated[
        str,
        msgspec.Meta(description="Sender of the reports; policy.sign needs a key for its domain, or for one above it"),
    ] = ""

    @property
    def is_used(self) -> bool:
        """There are policies to look up for MX hosts."""
        return self.dane or self.mta_sts or self.reports != "off"


class Protection(NamedTuple):
    """How TLS with an MX host is used."""

    tls: TlsPolicy
    dane: DanePolicy | None = None
    is_testing: bool = False


class TlsPolicies:
    """Finds the protections of MX hosts, and counts the results of connections to them."""

    def __init__(
        self,
        settings: RelayTlsSettings,
        resolver: Resolver,
        exchangers: MailExchangers,
        journal: Journal,
        *,
        data_dir: Path,
        reports: TlsReports | None = None,
        https_port: int = HTTPS_PORT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`reports` counts connections. Policies of MTA-STS are kept in `data_dir`. Other ports are for tests."""
        self._settings = settings
        self._resolver = resolver
        self._exchangers = exchangers
        self._ca_file = str(data_dir / settings.ca_file) if settings.ca_file else ""
        self._https_port = https_port
        self._context: ssl.SSLContext | None = None
        self.reports = reports
        if reports is not None:
            reports.submit = self._submit
        self._sts: StsPolicies | None = None
        self._applied: dict[str, StsPolicy] = {}
        """Policies of MTA-STS in use, by domain, for reports."""
        if settings.mta_sts:
            on_failure = None if reports is None else self._note_policy_failure
            folder = data_dir / "mta-sts"
            self._sts = StsPolicies(resolver, self._fetch, folder, journal, clock=clock, on_failure=on_failure)

    async def run(self) -> None:
        """Renew policies of MTA-STS in the background until cancelled."""
        if self._sts is not None:
            await self._sts.run()

    async def protections(self, domain: str, tls: TlsPolicy, exchangers: Sequence[Exchanger]) -> dict[str, Protection]:
        """Return how TLS is used with each MX host of a domain; those that must not be used are left out.

        `tls` is the policy of the route. Raise ResolveError, a temporary one, if no host is left.
        """
        if domain.startswith("["):
            return {each.host: Protection(tls) for each in exchangers}
        if self.reports is not None:
            answer = await self._resolver.query(f"_smtp._tls.{domain}", "TXT")
            if not answer.is_failure:
                self.reports.expect(domain, addresses_of(answer.records))
        made: dict[str, Protection] = {}
        failure: ResolveError | None = None
        rest: list[str] = []
        for host in dict.fromkeys(each.host for each in exchangers):
            try:
                dane = await self._dane(domain, host) if self._settings.dane else None
            except ResolveError as exc:
                failure = exc
                self._note_failure(domain, host, "dnssec-invalid", str(exc))
                continue
            if dane is None:
                rest.append(host)
            else:
                made[host] = Protection(msgspec.structs.replace(tls, mode="require", name=dane.names[0]), dane)
        if rest:
            with trio.move_on_after(_PATIENCE if made else math.inf):
                try:
                    policy = None if self._sts is None else await self._sts.find(domain)
                    self._apply(domain, policy, tls, rest, made)
                except ResolveError as exc:
                    failure = exc
        if made:
            return made
        raise failure or ResolveError(
            "4.7.5", f"no MX host of {domain} is one of its MTA-STS policy", is_permanent=False
        )

    async def _dane(self, domain: str, host: str) -> DanePolicy | None:
        """Return the policy of an MX host; None without DANE. Raise ResolveError if that is not known."""
        names = await self._exchangers.tlsa_names(domain, host)
        for name in names:
            answer = await self._resolver.query(f"_25._tcp.{name}", "TLSA")
            if answer.is_failure:
                # RFC 7672 2.1.3: an attacker could suppress the answer.
                text = f"no answer from the DNS for the TLSA records of {host}: {answer.cause}"
                raise ResolveError("4.7.5", text, is_permanent=False)
            if answer.records and answer.authentic:
                return policy_of(answer.records, (name, domain, host))
        return None

    def _apply(
        self, domain: str, policy: StsPolicy | None, tls: TlsPolicy, hosts: Sequence[str], made: dict[str, Protection]
    ) -> None:
        """Protect hosts without DANE by a policy of MTA-STS."""
        if policy is None or policy.mode == "none":
            self._applied.pop(domain, None)
            made.update((host, Protection(tls)) for host in hosts)
            return
        if self.reports is not None:
            while len(self._applied) >= _MAX_APPLIED:
                del self._applied[next(iter(self._applied))]
            self._applied[domain] = policy
        verified = msgspec.structs.replace(tls, ca_file=tls.ca_file or self._ca_file, name="")
        for host in hosts:
            if not policy.allows(host):
                self._note_failure(domain, host, "validation-failure", "the policy does not name this MX host")
                if policy.mode == "testing":
                    made[host] = Protection(tls)
            elif policy.mode == "testing":
                made[host] = Protection(verified, is_testing=True)
            else:
                made[host] = Protection(msgspec.structs.replace(verified, mode="verify"))

    async def _fetch(self, domain: str) -> bytes:
        """Fetch the policy of a domain. Raise FetchError."""
        host = f"mta-sts.{domain}"  # RFC 8461 3.3
        addresses, context = await self._find_host(host)
        return await fetch_text(
            host, addresses, _PATH, context, port=self._https_port, most=MAX_POLICY, seconds=self._settings.deadline
        )

    async def _submit(self, uri: str, report: bytes) -> None:
        """Post a TLS report (RFC 8460 3). Raise FetchError."""
        found = split_uri(uri)
        if found is None:
            raise FetchError(f"{uri} is not an https: URI")
        host, port, path = found
        addresses, context = await self._find_host(host)
        port = self._https_port if port == HTTPS_PORT else port
        await post(
            host, addresses, path, context, kind=REPORT_TYPE, data=report, port=port, seconds=self._settings.deadline
        )

    async def _find_host(self, host: str) -> tuple[Sequence[str], ssl.SSLContext]:
        """Return the addresses of a web server, and what verifies its certificate. Raise FetchError."""
        try:
            addresses = await self._exchangers.addresses(host)
            if self._context is None:
                self._context = await trio.to_thread.run_sync(self._make_context)
        except (ResolveError, OSError) as exc:
            raise FetchError(f"https://{host}: {exc}") from exc
        return addresses[:_MAX_ADDRESSES], self._context

    def _make_context(self) -> ssl.SSLContext:
        context = client_context(verify=True, ca_file=self._ca_file)
        context.hostname_checks_common_name = False  # RFC 8461 3.3
        return context

    # ---- for reports

    def note_connection(self, hop: Hop, domain: str, failure: Failure | None) -> None:
        """Count a connection to a hop that was made for the mail of a domain."""
        if self.reports is not None:
            self.reports.count(domain, self._policy_of(hop, domain), failure)

    def _policy_of(self, hop: Hop, domain: str) -> AppliedPolicy | None:
        if hop.dane is not None:
            return applied("tlsa", hop.dane.names[0], [str(each) for each in hop.dane.records])
        policy = self._applied.get(domain)
        if policy is None or not (hop.is_testing or hop.tls.mode == "verify"):
            return None
        return _sts(policy)

    def _note_failure(self, domain: str, host: str, kind: str, reason: str) -> None:
        """Count an MX host that a policy excludes: once a day, because routes are looked up for each attempt."""
        if self.reports is None:
            return
        policy = self._applied.get(domain)
        if kind == "dnssec-invalid":
            counted = applied("tlsa", host)
        else:
            counted = applied("sts", domain) if policy is None else _sts(policy)
        self.reports.count_once(domain, counted, Failure(kind, host=host, reason=reason))

    def _note_policy_failure(self, domain: str, kind: str, reason: str) -> None:
        if self.reports is not None:
            self.reports.count(domain, applied("sts", domain), Failure(kind, reason=reason))


def _sts(policy: StsPolicy) -> AppliedPolicy:
    return applied("sts", policy.domain, policy.lines(), policy.mx)
