"""What the connections of the listeners need: policies, certificates, users, extensions.

    make_listeners(settings, with_policies(settings, shared), secrets)

A reload makes all of it again, for the connections that come after it.
"""

from __future__ import annotations

import dataclasses
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.addresses import canonical_domain, parse_network
from penstock.auth.base import Authenticator, AuthSettings
from penstock.auth.throttle import AuthThrottle
from penstock.auth.users import UsersAuthenticator, UsersFile, load_secret
from penstock.config import ListenerSettings, Settings
from penstock.delivery.base import Delivery
from penstock.journal import Journal
from penstock.loading import HookError
from penstock.message import MessageIds
from penstock.metrics._session import Metrics
from penstock.metrics._shared import SharedTable
from penstock.metrics.counters import Counters
from penstock.net.listen import ListenAddress
from penstock.net.tls import (
    KeyPair,
    TlsSettings,
    certificate_not_after,
    end_point_binding,
    generated_certificate,
    server_context,
)
from penstock.policy.hooks import HookSettings, check_policy, load_hook
from penstock.policy.judge import Judge
from penstock.policy.pipeline import Pipeline
from penstock.policy.recipients import FileRecipients, NextHopRecipients, RecipientSettings
from penstock.policy.scores import Thresholds
from penstock.relay.ahead import Callahead
from penstock.server.body import BodySettings, MemoryBudget
from penstock.server.connection import Component
from penstock.server.domains import Domains, RelayControl
from penstock.server.listener import Listener
from penstock.smtp.extensions import Extensions
from penstock.smtp.sasl import ChannelBinding

if TYPE_CHECKING:
    from penstock.cluster.node import Node


class OurDomains:
    """Domains that mail is accepted for: for those who ask again and again, while a reload may replace them."""

    def __init__(self, domains: Domains | None = None) -> None:
        self.domains = domains

    def has(self, domain: str) -> bool:
        """Return whether mail for a domain is accepted."""
        return self.domains is None or domain in self.domains


@dataclass(frozen=True, slots=True)
class Shared:
    """What the listeners of a worker have in common."""

    hostname: str
    domains: Domains | None
    data_dir: Path
    journal: Journal
    delivery: Delivery
    pipeline: Pipeline
    throttle: AuthThrottle
    body: BodySettings
    budget: MemoryBudget
    ids: MessageIds
    metrics: Metrics | None = None
    counters: Counters | None = None
    delivery_kind: str = ""
    can_hold: bool = True
    """The delivery can keep a message until an operator releases it."""
    components: Sequence[Component] = ()
    authenticator: Authenticator | None = None
    """What the listeners with AUTH use instead of their users files."""
    own_policies: Sequence[object] = ()
    """Policies of the program that embeds the server, asked after those of the settings."""
    passthrough: Callahead | None = None
    """What can ask next hops about recipients."""
    own_domain: str = ""
    """Domain of `<postmaster>` and of senders without a domain; "" leaves them without one."""
    judge: Judge | None = None
    """The built-in checks, where there are any."""
    judges_all: bool = False
    """There is a [policy] table: the clients of all listeners are judged, not only those of public ones."""
    ours: OurDomains = field(default_factory=OurDomains)
    """The domains for the built-in checks."""
    node: Node | None = None
    """The node of a cluster, with which recipients and failed passwords are shared."""
    refuses_routing: bool = False
    """Mail for `domains` goes on to other servers, so sender-specified routing is refused."""
    recipients: NextHopRecipients | None = None
    """What asks next hops about recipients; part of `pipeline`."""

    def share_recipients(self) -> None:
        """Have the cluster, if there is one, share what `recipients` learns, and nothing that was used before it."""
        if self.node is not None:
            self.node.share_recipients(self.recipients)


@dataclass(frozen=True, slots=True)
class Secrets:
    """What TLS of a listener needs."""

    context: ssl.SSLContext | None = None
    binding: ChannelBinding | None = None
    ca_file: Path | None = None
    not_after: float = 0.0
    """Unix time."""

    @classmethod
    def of(cls, settings: TlsSettings, pair: KeyPair | None) -> Secrets:
        """Make them of a certificate that was read before. Raise OSError or ValueError."""
        if pair is None:
            return cls()
        binding = ChannelBinding("tls-server-end-point", pair.binding())
        return cls(pair.context(settings), binding, not_after=pair.not_after())


def secrets_of(settings: Settings, key_pairs: Sequence[KeyPair | None]) -> list[Secrets]:
    """Return what TLS of each listener needs, of certificates that were read before. Raise OSError or ValueError."""
    return [Secrets.of(wanted.tls, pair) for wanted, pair in zip(settings.listener, key_pairs, strict=True)]


def read_secrets(settings: TlsSettings, shared: Shared) -> Secrets:
    """Return the TLS context of a listener, with a generated certificate when it names none."""
    if settings.mode == "none":
        return Secrets()
    ca_file: Path | None = None
    if settings.certificate:
        certificate = shared.data_dir / settings.certificate
        key = shared.data_dir / settings.key if settings.key else None
    else:
        names = dict.fromkeys([shared.hostname, "localhost", "127.0.0.1", "::1"])
        made = generated_certificate(shared.data_dir / "tls", list(names))
        certificate, key, ca_file = made.certificate, None, made.ca_file
    binding = ChannelBinding("tls-server-end-point", end_point_binding(certificate))
    return Secrets(server_context(settings, certificate, key), binding, ca_file, certificate_not_after(certificate))


def make_listeners(settings: Settings, shared: Shared, secrets: Sequence[Secrets]) -> dict[int, Listener]:
    """Assemble what the connections of each listener share, by their numbers.

    Raise OSError or ValueError for a file of theirs.
    """
    return {
        number: make_listener(wanted, shared, each)
        for number, (wanted, each) in enumerate(zip(settings.listener, secrets, strict=True))
    }


def make_listener(wanted: ListenerSettings, shared: Shared, secrets: Secrets) -> Listener:
    """Assemble what all connections of a listener share."""
    return Listener(
        name=wanted.name or wanted.address,
        extensions=make_extensions(wanted, shared.hostname, shared.own_domain),
        wire=wanted.wire,
        limits=wanted.limits,
        relay_control=RelayControl(
            shared.domains,
            shared.own_domain,
            allow_untrusted_routing=wanted.allow_untrusted_routing or not shared.refuses_routing,
        ),
        relay_networks=tuple(map(parse_network, wanted.relay_networks)),
        proxy_networks=tuple(map(parse_network, wanted.proxy_networks)),
        tls=secrets.context,
        is_implicit_tls=wanted.tls.mode == "implicit",
        binding=secrets.binding,
        certificate_not_after=secrets.not_after,
        max_hops=wanted.max_hops,
        delivery=shared.delivery,
        pipeline=pipeline_of(wanted, shared),
        authenticator=make_authenticator(wanted.auth, shared),
        auth_throttle=shared.throttle,
        body=shared.body,
        budget=shared.budget,
        folder=shared.data_dir / "tmp",
        journal=shared.journal,
        ids=shared.ids,
        metrics=shared.metrics
        if shared.counters is None
        else shared.counters.listener(wanted.name or wanted.address, shared.delivery_kind),
        components=tuple(shared.components),
    )


def make_extensions(listener: ListenerSettings, hostname: str, own_domain: str = "") -> Extensions:
    """Return what a listener offers, and its limits."""
    limits, extensions, auth = listener.limits, listener.extensions, listener.auth
    return Extensions(
        hostname=hostname,
        own_domain=own_domain,
        tolerant_addresses=listener.addresses == "tolerant",
        is_lmtp=listener.kind == "lmtp",
        max_size=listener.max_size,
        max_recipients=limits.recipients,
        max_messages=limits.messages,
        max_errors=limits.errors,
        max_unknown=limits.unknown_recipients,
        max_junk=limits.junk_commands,
        max_auth_failures=limits.auth_failures,
        starttls=listener.tls.mode == "starttls",
        require_tls=listener.tls.required,
        require_auth=auth is not None and auth.required,
        mechanisms=() if auth is None else auth.mechanisms,
        auth_without_tls=auth is not None and auth.without_tls,
        pipelining=extensions.pipelining,
        eightbitmime=extensions.eightbitmime,
        smtputf8=extensions.smtputf8,
        enhancedstatuscodes=extensions.enhancedstatuscodes,
        chunking=extensions.chunking,
        binarymime=extensions.binarymime,
        dsn=extensions.dsn,
        requiretls=extensions.requiretls,
        expn=extensions.expn,
    )


def make_authenticator(settings: AuthSettings | None, shared: Shared) -> Authenticator | None:
    """Return the authenticator of a listener; None without AUTH."""
    if settings is None:
        return None
    if shared.authenticator is not None:
        return shared.authenticator
    users = UsersFile(shared.data_dir / settings.users)
    return UsersAuthenticator(users, shared.journal, secret=load_secret(shared.data_dir / "secret"))


def stamp_policies(settings: Settings) -> tuple[object, ...]:
    """Return a value that changes when a file of a policy does: its code, or a file that an argument names. Blocks."""
    stamps: list[object] = []
    for policy in settings.check:
        place = policy.hook.rpartition(":")[0]
        names = [place] if place.endswith(".py") else []
        for name in [*names, *(each for each in policy.arguments.values() if isinstance(each, str))]:
            try:
                found = os.stat(name)  # noqa: PTH116 - an argument need not be a path
            except (OSError, ValueError):
                continue
            stamps.append((name, found.st_ino, found.st_mtime_ns, found.st_size))
    return tuple(stamps)


def with_policies(settings: Settings, shared: Shared) -> Shared:
    """Load the policies; return what listeners share, with them. Raise OSError or ValueError for an unusable file."""
    policies = make_recipients(settings.recipients, shared)
    asking = next((policy for policy, _ in policies if isinstance(policy, NextHopRecipients)), None)
    try:
        policies += collect_policies(settings.check, shared.own_policies)
    except SystemExit as exc:  # of the code of a policy: no reason for a running server to end
        raise HookError(f"check: a policy has ended the program with code {exc.code} when it was loaded") from exc
    thresholds = Thresholds.of(settings.policy, can_hold=shared.can_hold)
    pipeline = Pipeline(policies, shared.journal, shared.judge, thresholds)
    return dataclasses.replace(shared, pipeline=pipeline, recipients=asking)


def pipeline_of(wanted: ListenerSettings, shared: Shared) -> Pipeline:
    """Return the policies of a listener: with the built-in checks, if its clients are judged."""
    pipeline = shared.pipeline
    return pipeline if is_judged(wanted, shared.domains, judges_all=shared.judges_all) else pipeline.unjudged


def collect_policies(checks: Sequence[HookSettings], given: Sequence[object]) -> list[tuple[object, HookSettings]]:
    """Return the policies of the settings, then the given ones. Raise HookError for an object that is no policy."""
    policies = [(load_hook(check.hook, check.arguments), check) for check in checks]
    for policy in given:
        name = type(policy).__name__
        check_policy(name, policy)
        policies.append((policy, HookSettings(hook=name)))
    return policies


def make_recipients(settings: RecipientSettings, shared: Shared) -> list[tuple[object, HookSettings]]:
    """Return the policy that checks recipients, if there is one. Raise OSError or RecipientsError."""
    domains = shared.domains

    def is_ours(domain: str) -> bool:
        return domains is None or domain in domains

    policy: object
    if settings.file:
        policy = FileRecipients(shared.data_dir / settings.file, is_ours, shared.journal)
    elif settings.verify and shared.passthrough is not None:
        policy = NextHopRecipients(settings, shared.passthrough, is_ours)
    else:
        return []
    # It has a deadline and breakers of its own, which know domains.
    guard = HookSettings(hook="recipients", deadline=settings.deadline + 60, concurrency=1_000_000)
    return [(policy, guard)]


def needs_judge(settings: Settings) -> bool:
    """Return whether the clients of a listener are judged."""
    domains = domains_of(settings)
    judges_all = settings.policy is not None
    return any(is_judged(each, domains, judges_all=judges_all) for each in settings.listener)


def is_judged(listener: ListenerSettings, domains: Domains | None, *, judges_all: bool) -> bool:
    """Return whether the clients of a listener are judged: as [policy] says, and by default on public ones.

    Without [policy], a public listener that accepts mail for `domains` without authentication is.
    """
    if judges_all:
        return True
    is_submission = listener.auth is not None and listener.auth.required
    return domains is not None and not is_submission and not ListenAddress.parse(listener.address).is_loopback


def shared_table(settings: Settings, counters: Counters | None) -> SharedTable | None:
    """Return the counts by key that all workers share; None if each has its own limits."""
    return counters.table if counters is not None and settings.admission.shared else None


def domains_of(settings: Settings) -> Domains | None:
    """Return the domains that mail is accepted for; None for all."""
    return None if settings.domains is None else Domains(settings.domains)


def own_domain(domains: Domains | None, hostname: str) -> str:
    """Return the domain whose postmaster `<postmaster>` is: the first of `domains`, or else the hostname."""
    return (domains.first if domains is not None else "") or canonical_domain(hostname)
