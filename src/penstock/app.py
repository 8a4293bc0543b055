"""The only file where concrete parts meet: settings in, a worker out. Read it from top to bottom."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from penstock.auth.base import Authenticator, AuthSettings
from penstock.auth.users import UsersAuthenticator, UsersFile
from penstock.config import DeliverySettings, ListenerSettings, Settings
from penstock.delivery.base import Delivery, Streams
from penstock.delivery.discard import DiscardDelivery
from penstock.delivery.maildir import MaildirDelivery
from penstock.delivery.passthrough import PassthroughDelivery
from penstock.delivery.spool import SpoolDelivery
from penstock.journal import Journal, JournalSettings
from penstock.message import MessageIds
from penstock.metrics._session import Metrics
from penstock.net.listen import ListenAddress, bind
from penstock.net.resolver import Resolver
from penstock.net.tls import TlsSettings, end_point_binding, generated_certificate, server_context
from penstock.policy.hooks import HookSettings, check_policy, load_hook
from penstock.policy.pipeline import Pipeline
from penstock.policy.recipients import FileRecipients, NextHopRecipients, RecipientSettings
from penstock.relay.ahead import Onward
from penstock.relay.backoff import Backoff
from penstock.relay.bounce import Reporter
from penstock.relay.gateway import Gateway
from penstock.relay.ledger import Ledger
from penstock.relay.pool import Pool
from penstock.relay.route import Routes
from penstock.relay.scheduler import Scheduler
from penstock.server.body import BodySettings, MemoryBudget
from penstock.server.connection import Connection
from penstock.server.domains import Domains
from penstock.server.limits import Admission, AuthThrottle, Sweeper
from penstock.server.listener import Listener
from penstock.server.passing import PassingConnection
from penstock.server.worker import BoundListener, Worker
from penstock.smtp.extensions import Extensions
from penstock.smtp.sasl import ChannelBinding
from penstock.spool.diskspace import Room
from penstock.spool.spool import Spool


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


@dataclass(frozen=True, slots=True)
class Server:
    """A worker, and what its starter wants to know of it."""

    worker: Worker
    delivery: Delivery
    listeners: Sequence[BoundListener]
    ca_file: Path | None
    """The authority of a generated certificate: what clients have to trust."""
    gateway: Gateway | None = None
    """What runs behind the delivery, where that is the spool."""


@dataclass(frozen=True, slots=True)
class Overrides:
    """Server that the starter brings along, in the place of those the settings name."""

    delivery: Delivery | None = None
    authenticator: Authenticator | None = None
    """Of the listeners that have AUTH."""
    policies: Sequence[object] = ()
    """Asked behind those of the settings."""
    metrics: Metrics | None = None
    """What counts the replies and the clocks of all sessions."""
    sockets: Sequence[Sequence[socket.socket]] | None = None
    """Listening sockets that others have bound: those of each listener, in the order of the settings."""


def assemble(
    settings: Settings,
    journal: Journal,
    write_journal: Callable[[bytes], None],
    *,
    kind: type[Connection] = Connection,
    given: Overrides = Overrides(),
) -> Server:
    """Join the parts that the settings ask for. Binds the sockets; starts nothing.

    `kind` is what becomes of the sockets that are accepted; `given` are parts that are there already.

    Raise OSError when a socket can not be bound or a file not be read or written, ValueError for what is wrong with a
    file that the settings name (a hook, the users).
    """
    data_dir = Path(settings.data_dir).absolute()
    (data_dir / "tmp").mkdir(parents=True, exist_ok=True, mode=0o750)
    ids = MessageIds()
    domains = None if settings.domains is None else Domains(settings.domains)
    gateway: Gateway | None = None
    onward: Onward | None = None
    delivery: Delivery
    if given.delivery is None and settings.delivery.has_relay:
        gateway, delivery, onward = make_gateway(settings, data_dir, journal, ids)
    else:
        delivery = given.delivery or make_delivery(settings.delivery, data_dir)
    if kind is Connection and isinstance(delivery, Streams):
        kind = PassingConnection
    policies = make_recipients(settings.recipients, domains, data_dir, onward, journal)
    policies += collect_policies(settings.check, given.policies)
    shared = Shared(
        hostname=settings.own_hostname,
        domains=domains,
        data_dir=data_dir,
        journal=journal,
        delivery=delivery,
        pipeline=Pipeline(policies, journal),
        throttle=AuthThrottle(settings.admission),
        body=settings.body,
        budget=MemoryBudget(settings.body.memory_total),
        ids=ids,
        metrics=given.metrics,
    )
    listeners: list[BoundListener] = []
    ca_file: Path | None = None
    try:
        for number, listener in enumerate(settings.listener):
            secrets = read_secrets(listener.tls, shared)
            ca_file = ca_file or secrets.ca_file
            made = make_listener(listener, shared, secrets, given.authenticator if listener.auth else None)
            if given.sockets is None:
                listeners += [BoundListener(sock, made, kind) for sock in bind(ListenAddress.parse(listener.address))]
            else:
                listeners += [BoundListener(sock, made, kind, is_own=False) for sock in given.sockets[number]]
    except BaseException:
        for bound in listeners:
            bound.socket.close()
        raise
    worker = Worker(
        listeners,
        Admission(settings.admission),
        Sweeper(min(listener.limits.shortest_clock for listener in settings.listener)),
        journal,
        write_journal,
        grace=settings.server.grace,
        metrics=given.metrics,
    )
    return Server(worker, delivery, listeners, ca_file, gateway)


def collect_policies(checks: Sequence[HookSettings], given: Sequence[object]) -> list[tuple[object, HookSettings]]:
    """Return the policies that the settings name, then the given ones. Raise HookError for what is none."""
    policies = [(load_hook(check.hook, check.arguments), check) for check in checks]
    for policy in given:
        name = type(policy).__name__
        check_policy(name, policy)
        policies.append((policy, HookSettings(hook=name)))
    return policies


def make_recipients(
    settings: RecipientSettings, domains: Domains | None, data_dir: Path, onward: Onward | None, journal: Journal
) -> list[tuple[object, HookSettings]]:
    """Return the policy that knows the recipients, if there is one. Raise OSError or RecipientsError."""

    def is_ours(domain: str) -> bool:
        return domains is None or domain in domains

    policy: object
    if settings.file:
        policy = FileRecipients(data_dir / settings.file, is_ours, journal)
    elif settings.verify and onward is not None:
        policy = NextHopRecipients(settings, onward, is_ours)
    else:
        return []
    # It has a deadline and breakers of its own, which know domains.
    guard = HookSettings(hook="recipients", deadline=settings.deadline + 60, concurrency=1_000_000)
    return [(policy, guard)]


def make_delivery(settings: DeliverySettings, data_dir: Path) -> Delivery:
    """Return the delivery that the settings name, where that has no relay behind it."""
    if settings.kind == "discard":
        return DiscardDelivery()
    return MaildirDelivery(settings.maildir, data_dir)


def make_gateway(
    settings: Settings, data_dir: Path, journal: Journal, ids: MessageIds
) -> tuple[Gateway, Delivery, Onward]:
    """Join the spool and the relay; return them, the delivery in front, and what asks next hops. Raise OSError."""
    relay, hostname = settings.relay, settings.own_hostname
    folder = data_dir / settings.spool.path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    spool = Spool(settings.spool, folder)
    room = Room(folder, reserve_octets=settings.spool.reserve_octets, reserve_inodes=settings.spool.reserve_inodes)
    resolver = Resolver(settings.resolver, own_names=own_names(settings))
    routes = Routes(settings.route, data_dir=data_dir, resolver=resolver, own_name=hostname)
    pool = Pool(relay.pool, hostname=hostname, journal=journal)
    reporter = Reporter(relay.reports, hostname, ids)
    ledger = Ledger(spool, Backoff(relay.retry), reporter, routes.lane_of, journal, time.time)
    local = MaildirDelivery(settings.delivery.maildir, data_dir)
    scheduler = Scheduler(relay, spool, pool, routes, ledger, journal, local=local)
    gateway = Gateway(
        spool=spool,
        room=room,
        pool=pool,
        ledger=ledger,
        scheduler=scheduler,
        local=local,
        journal=journal,
        grace=settings.server.grace,
    )
    onward = Onward(pool, routes)
    delivery: Delivery = SpoolDelivery(spool, scheduler, room)
    if settings.delivery.kind == "passthrough":
        delivery = PassthroughDelivery(onward, delivery, settings.delivery.passthrough)
    return gateway, delivery, onward


def own_names(settings: Settings) -> list[str]:
    """Return the names and addresses that mail must not be relayed to, because it is we who have them."""
    addresses = [ListenAddress.parse(listener.address).host for listener in settings.listener]
    return [settings.own_hostname, *filter(None, addresses)]


@dataclass(frozen=True, slots=True)
class Secrets:
    """What TLS of a listener needs, read once at the start."""

    context: ssl.SSLContext | None = None
    binding: ChannelBinding | None = None
    ca_file: Path | None = None


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
    return Secrets(server_context(settings, certificate, key), binding, ca_file)


def make_authenticator(settings: AuthSettings | None, data_dir: Path, journal: Journal) -> Authenticator | None:
    """Return who knows the users of a listener; None without AUTH."""
    return None if settings is None else UsersAuthenticator(UsersFile(data_dir / settings.users), journal)


def make_listener(
    listener: ListenerSettings, shared: Shared, secrets: Secrets, authenticator: Authenticator | None = None
) -> Listener:
    """Join what all connections of a listener share."""
    return Listener(
        name=listener.name or listener.address,
        offer=make_offer(listener, shared.hostname),
        wire=listener.wire,
        limits=listener.limits,
        domains=shared.domains,
        relay_networks=tuple(ipaddress.ip_network(network) for network in listener.relay_networks),
        proxy_networks=tuple(ipaddress.ip_network(network) for network in listener.proxy_networks),
        tls=secrets.context,
        is_implicit_tls=listener.tls.mode == "implicit",
        binding=secrets.binding,
        max_hops=listener.max_hops,
        delivery=shared.delivery,
        pipeline=shared.pipeline,
        authenticator=authenticator or make_authenticator(listener.auth, shared.data_dir, shared.journal),
        auth_throttle=shared.throttle,
        body=shared.body,
        budget=shared.budget,
        folder=shared.data_dir / "tmp",
        journal=shared.journal,
        ids=shared.ids,
        metrics=shared.metrics,
    )


def make_offer(listener: ListenerSettings, hostname: str) -> Extensions:
    """Return the language of a listener."""
    limits, extensions, auth = listener.limits, listener.extensions, listener.auth
    return Extensions(
        hostname=hostname,
        is_lmtp=listener.kind == "lmtp",
        max_size=listener.max_size,
        max_recipients=limits.recipients,
        max_messages=limits.messages,
        max_errors=limits.errors,
        max_unknown=limits.unknown_recipients,
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


def wrong_file(settings: Settings) -> str:
    """Return what is wrong with the first file of the settings that is of no use, with its key; "" when all are good.

    Asked after a start has failed: most errors of the system and of libraries name neither the key nor the file.
    """
    for key, use in _files_of(settings):
        try:
            use()
        except (OSError, ValueError) as exc:
            return f"{key}: {exc}"
    return ""


def _files_of(settings: Settings) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the keys that name files, and what uses each of them as the start does."""
    folder = Path(settings.data_dir).absolute()
    for number, listener in enumerate(settings.listener):
        tls, place = listener.tls, f"listener[{number}]"
        if tls.mode != "none" and tls.certificate:
            certificate, key = folder / tls.certificate, folder / tls.key if tls.key else None
            yield f"{place}.tls.certificate", partial(end_point_binding, certificate)
            if key is not None:
                yield f"{place}.tls.key", key.read_bytes
            yield f"{place}.tls.{'key' if tls.key else 'certificate'}", partial(server_context, tls, certificate, key)
        if listener.auth is not None:
            yield f"{place}.auth.users", UsersFile(folder / listener.auth.users).names
    for number, route in enumerate(settings.route):
        if route.auth is not None:
            yield f"route[{number}].auth.password_file", (folder / route.auth.password_file).read_text
    if settings.recipients.file:
        recipients, nothing = folder / settings.recipients.file, Journal(JournalSettings(events="none"))
        yield "recipients.file", partial(FileRecipients, recipients, bool, nothing)
