"""The spool, the relay, and the node of a cluster: everything behind the 250 of a delivery that sends mail on."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from penstock import __version__
from penstock.assembly.listeners import domains_of, own_domain, shared_table
from penstock.config import Settings
from penstock.delivery.base import Delivery
from penstock.delivery.maildir import MaildirDelivery
from penstock.delivery.passthrough import PassthroughDelivery
from penstock.delivery.spool import SpoolDelivery
from penstock.dns import MailExchangers, Resolver
from penstock.files import make_folders
from penstock.journal import Journal
from penstock.loading import HookError
from penstock.message import Message, MessageIds
from penstock.metrics.counters import Counters
from penstock.net.listen import ListenAddress
from penstock.policy.signing import read_keys
from penstock.relay.ahead import Callahead
from penstock.relay.backoff import Backoff
from penstock.relay.bounce import Reporter
from penstock.relay.gateway import Gateway
from penstock.relay.pool import Pool
from penstock.relay.recorder import AttemptRecorder
from penstock.relay.route import CLEAR, SMTP_PORT, Routes
from penstock.relay.scheduler import Scheduler
from penstock.relay.tlspolicy import HTTPS_PORT, TlsPolicies
from penstock.relay.tlsreport import TlsReports
from penstock.spool.diskspace import DiskSpace
from penstock.spool.queue import DurableQueue
from penstock.spool.spool import Spool

if TYPE_CHECKING:
    from penstock.cluster.node import Node


class Relaying(NamedTuple):
    """The spool and the relay, and what leads into them."""

    gateway: Gateway
    routes: Routes
    delivery: Delivery
    passthrough: Callahead
    node: Node | None
    """This node of a cluster."""


def make_gateway(
    settings: Settings,
    data_dir: Path,
    resolver: Resolver,
    journal: Journal,
    ids: MessageIds,
    counters: Counters | None,
) -> Relaying:
    """Assemble the spool and the relay. Raise OSError."""
    relay, hostname = settings.relay, settings.own_hostname
    table = shared_table(settings, counters)
    folder = data_dir / settings.spool.path
    make_folders(folder)
    spool = Spool(settings.spool, folder)
    reserve = settings.spool.reserve_octets, settings.spool.reserve_inodes
    disk_space = DiskSpace(folder, reserve_octets=reserve[0], reserve_inodes=reserve[1])
    node = make_node(settings, spool, data_dir, journal) if settings.delivery.kind == "jetstream" else None
    queue: DurableQueue = spool if node is None else node.queue
    exchangers = MailExchangers(resolver, families=settings.resolver.families, own_names=own_names(settings))
    sign = make_sign(settings, data_dir)

    async def send(message: Message) -> None:
        await put_own(gateway, message if sign is None else sign(message), CLEAR)

    tls_policies = make_tls_policies(settings, data_dir, resolver, exchangers, journal, send)
    tls_reports = None if tls_policies is None else tls_policies.reports
    routes = Routes(
        settings.route,
        data_dir=data_dir,
        resolver=exchangers,
        own_domain=own_domain(domains_of(settings), hostname),
        tls_policies=tls_policies,
        mx_port=SMTP_PORT,
        listeners=[listener.address for listener in settings.listener],
    )
    pool = Pool(
        relay.pool,
        hostname=hostname,
        journal=journal,
        smtputf8_downgrade=relay.smtputf8_downgrade,
        table=table,
        note_connection=None if tls_policies is None or tls_reports is None else tls_policies.note_connection,
    )
    reporter = Reporter(relay.reports, hostname, ids, sign)
    recorder = AttemptRecorder(queue, Backoff(relay.retry), reporter, routes.domain_of, journal, time.time)
    local = MaildirDelivery(settings.delivery.maildir, data_dir)
    if counters is not None:
        recorder.on_result = counters.attempted
        spool.on_commit = counters.committed
    scheduler = Scheduler(relay, queue, pool, routes, recorder, journal, local=local)
    gateway = Gateway(
        spool=queue,
        disk_space=disk_space,
        pool=pool,
        recorder=recorder,
        scheduler=scheduler,
        local=local,
        journal=journal,
        grace=settings.server.grace,
        services=nullcontext if node is None else node.running,
        beside=(
            *(() if node is None else (node.serve,)),
            *(() if tls_reports is None else (tls_reports.run,)),
            *(() if tls_policies is None else (tls_policies.run,)),
        ),
    )
    passthrough = Callahead(pool, routes, suspended=lambda: scheduler.suspended)
    passthrough.on_result = None if counters is None else counters.attempted
    delivery: Delivery
    if node is None:
        # A thread of its own: large messages that the relay writes keep no client waiting.
        mailboxes = MaildirDelivery(settings.delivery.maildir, data_dir)
        delivery = SpoolDelivery(queue, scheduler, disk_space, mailboxes)
    else:
        delivery = make_replicated(settings, node, scheduler, disk_space, counters)
    if settings.delivery.kind == "passthrough":
        delivery = PassthroughDelivery(passthrough, delivery, settings.delivery.passthrough)
    return Relaying(gateway, routes, delivery, passthrough, node)


def make_tls_policies(
    settings: Settings,
    data_dir: Path,
    resolver: Resolver,
    exchangers: MailExchangers,
    journal: Journal,
    send: Callable[[Message], Awaitable[None]],
) -> TlsPolicies | None:
    """Return what finds DANE and MTA-STS of MX hosts, and makes TLS reports, if the settings ask for any of it."""
    wanted = settings.relay.tls
    if not wanted.is_used:
        return None
    reports: TlsReports | None = None
    if wanted.reports == "daily":
        file = data_dir / f"{settings.spool.path}.tls.json"
        reports = TlsReports(send, journal, hostname=settings.own_hostname, contact=wanted.contact, file=file)
    return TlsPolicies(wanted, resolver, exchangers, journal, data_dir=data_dir, reports=reports, https_port=HTTPS_PORT)


def make_node(settings: Settings, spool: Spool, data_dir: Path, journal: Journal) -> Node:
    """Assemble this node of the cluster. Raise OSError or ValueError for its files, HookError without the extra."""
    try:
        from penstock.cluster.node import Node  # noqa: PLC0415 - needs the extra
    except ImportError as exc:
        raise HookError(f"delivery.kind = \"jetstream\" needs pip install 'penstock[cluster]': {exc}") from exc
    # Worker processes have a part of the spool each, "spool-1", and so an index each.
    number = settings.spool.path.rpartition("-")[2]
    index = f"index-{number}" if number.isdecimal() else "index"
    return Node(settings.jetstream, spool, data_dir=data_dir, index=index, version=__version__, journal=journal)


def make_replicated(
    settings: Settings, node: Node, scheduler: Scheduler, disk_space: DiskSpace, counters: Counters | None
) -> Delivery:
    """Return the delivery into the cluster, and connect its queue to the relay."""
    from penstock.delivery.jetstream import FallbackSpool, JetStreamDelivery  # noqa: PLC0415 - needs the extra

    node.attach(scheduler.domain_of, scheduler.withdraw, scheduler.set_suspended)
    has_fallback = settings.jetstream.fallback == "spool"
    fallback = FallbackSpool(node.spool, disk_space, node.spool_queue) if has_fallback else None
    delivery = JetStreamDelivery(node.queue, scheduler, node, fallback)
    if counters is not None:
        node.count, node.measure = counters.count, counters.set
        node.in_flight = lambda: delivery.in_flight
        delivery.on_answer = counters.answered_by_cluster
        delivery.on_fallback = partial(counters.count, "jetstream_fallback_total")
        counters.count("jetstream_fallback_total", 0)  # an alert needs a first sample
    return delivery


def own_names(settings: Settings) -> list[str]:
    """Return our own names and addresses, which mail must not be relayed to."""
    addresses = [ListenAddress.parse(listener.address).host for listener in settings.listener]
    return [settings.own_hostname, *filter(None, addresses)]


def make_sign(settings: Settings, data_dir: Path) -> Callable[[Message], Message] | None:
    """Return what signs our own reports, if there are keys. Raise OSError or ValueError for a bad key."""
    if settings.policy is None or not settings.policy.sign:
        return None
    keys = read_keys(settings.policy.sign, data_dir)
    return lambda message: keys.sign(message, int(time.time()))


async def put_own(gateway: Gateway, message: Message, prefix: str = "") -> None:
    """Put a report of our own into the spool, into queues with a prefix. Raise what that raises."""
    await gateway.spool.put(message, [prefix + gateway.scheduler.domain_of(to) for to in message.envelope.recipients])
