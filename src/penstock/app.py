"""The one place where concrete parts are assembled, started and stopped. Read it from top to bottom.

    server = assemble(settings, ...)      binds the sockets, starts nothing
    await nursery.start(server.run)       starts: delivery, relay, worker; stops them in the other order

`open_server` and `serve` are the same for programs that embed a server; the command line, the worker processes and the
test server use `assemble` and `Server.run` themselves.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sqlite3
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from penstock import __version__
from penstock.addresses import canonical_domain, parse_network
from penstock.auth.base import Authenticator, AuthSettings
from penstock.auth.throttle import AuthThrottle
from penstock.auth.users import UsersAuthenticator, UsersFile, load_secret
from penstock.config import DeliverySettings, ListenerSettings, ServerSettings, Settings, check
from penstock.control import ControlError, HopAction, ListenerState, SpoolState, WorkerState
from penstock.delivery.base import Delivery
from penstock.delivery.custom import load_delivery
from penstock.delivery.discard import DiscardDelivery
from penstock.delivery.maildir import MaildirDelivery
from penstock.delivery.passthrough import PassthroughDelivery
from penstock.delivery.spool import SpoolDelivery
from penstock.dns import MailExchangers, Resolver
from penstock.journal import Journal, JournalSettings
from penstock.loading import HookError
from penstock.message import Message, MessageIds
from penstock.metrics._session import Metrics
from penstock.metrics.counters import Counters
from penstock.net.listen import ListenAddress, bind, find_group, name_of, parse_mode
from penstock.net.natswire import read_nkey
from penstock.net.tls import (
    KeyPair,
    TlsSettings,
    certificate_not_after,
    end_point_binding,
    generated_certificate,
    server_context,
)
from penstock.policy.check import Parts
from penstock.policy.files import files_of
from penstock.policy.hooks import HookSettings, check_policy, load_hook
from penstock.policy.judge import Judge, make_checks
from penstock.policy.pipeline import Pipeline
from penstock.policy.recipients import FileRecipients, NextHopRecipients, RecipientSettings
from penstock.policy.scores import Thresholds
from penstock.policy.settings import DEFAULT
from penstock.policy.units import needs_state
from penstock.relay.ahead import Onward
from penstock.relay.backoff import Backoff
from penstock.relay.bounce import Reporter
from penstock.relay.gateway import Gateway
from penstock.relay.pool import Pool
from penstock.relay.recorder import AttemptRecorder
from penstock.relay.route import Routes
from penstock.relay.scheduler import Scheduler
from penstock.server.body import BodySettings, MemoryBudget
from penstock.server.connection import Component
from penstock.server.deadlines import Sweeper
from penstock.server.domains import Domains, RelayControl
from penstock.server.limits import Admission
from penstock.server.listener import Listener
from penstock.server.trace import Traces
from penstock.server.worker import BoundListener, Worker
from penstock.smtp.extensions import Extensions
from penstock.smtp.sasl import ChannelBinding
from penstock.spool.admin import Filter, QueueAdmin
from penstock.spool.diskspace import DiskSpace
from penstock.spool.queue import DurableQueue
from penstock.spool.spool import Spool, SpoolError
from penstock.state import snapshot
from penstock.state.local import LocalState
from penstock.state.remote import RemoteState

if TYPE_CHECKING:
    from penstock.cluster.node import Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """Parts that the caller brings along, in place of those the settings name, or beside them."""

    delivery: Delivery | None = None
    authenticator: Authenticator | None = None
    """Of the listeners that have AUTH."""
    policies: Sequence[object] = ()
    """Asked after those of the settings."""
    metrics: Metrics | None = None
    """What counts the replies and the latencies of all sessions of a sink."""
    counters: Counters | None = None
    """What counts everything for /metrics, and has the limits that all workers share."""
    components: Sequence[Component] = ()
    """Called with each new connection: fault injection, and whatever else observes connections."""
    ended: Callable[[], None] | None = None
    """Called whenever a connection has ended."""
    policy_state: socket.socket | None = None
    """Where the supervisor keeps rates and greylisting (penstock.state.keeper)."""
    sockets: Sequence[Sequence[socket.socket]] | None = None
    """Listening sockets that others have bound: those of each listener, in the order of the settings."""
    key_pairs: Sequence[KeyPair | None] | None = None
    """Certificates that others have read: that of each listener, in the order of the settings; None without TLS."""
    ca_file: Path | None = None
    """The authority of a generated certificate among them."""


NO_OVERRIDES = Overrides()


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
    components: Sequence[Component] = ()
    own_domain: str = ""
    """Domain of `<postmaster>` and of senders without a domain; "" leaves them without one."""
    judge: Judge | None = None
    """The built-in checks, where there are any."""
    judges_all: bool = False
    """There is a [policy] table: the clients of all listeners are judged, not only those of public ones."""
    refuses_routing: bool = False
    """Mail for `domains` goes on to other servers, so sender-specified routing is refused."""


@dataclass(slots=True)
class Server:
    """An assembled server: everything that one process runs."""

    worker: Worker
    delivery: Delivery
    listeners: Sequence[BoundListener]
    ca_file: Path | None
    """The authority of a generated certificate, which clients have to trust."""
    settings: Settings
    shared: Shared
    overrides: Overrides = NO_OVERRIDES
    gateway: Gateway | None = None
    """The spool and the relay, where the delivery has them."""
    passthrough: Onward | None = None
    traces: Traces | None = None
    resolver: Resolver | None = None
    """The DNS, where the relay or the checks ask it."""
    policy_state: LocalState | RemoteState | None = None
    """Rates and greylisting, where checks need them."""
    _policy_stamp: tuple[object, ...] = ()
    _counting: trio.CapacityLimiter = field(default_factory=partial(trio.CapacityLimiter, 1))

    def __post_init__(self) -> None:
        self._policy_stamp = stamp_policies(self.settings)

    @property
    def addresses(self) -> list[str]:
        """Where it listens, in the form of `listener.address`."""
        return [name_of(bound.socket) for bound in self.listeners]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start the parts in their order, serve until `stop`, and stop them in the other order.

        `started` once clients can connect. Raise OSError, sqlite3.Error or SpoolError when a part cannot start.
        """
        async with trio.open_nursery() as services:
            if self.traces is not None:
                services.start_soon(self.traces.run)
            if self.resolver is not None:
                await services.start(self.resolver.run)
            if self.policy_state is not None:
                await services.start(self.policy_state.run)
            if self.shared.judge is not None:
                await services.start(self.shared.judge.run)
            await self._serve(task_status)
            services.cancel_scope.cancel()

    async def _serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Run delivery, relay and worker."""
        async with trio.open_nursery() as nursery:
            await self.delivery.start()
            if self.gateway is not None:
                await nursery.start(self.gateway.run)
            try:
                await self.worker.run(task_status=task_status)
            finally:
                with trio.CancelScope(shield=True):
                    await self.delivery.aclose()
            if self.gateway is not None:
                self.gateway.stop()

    def stop(self) -> None:
        """Accept no more clients; let messages that are being received arrive, and relay transactions end."""
        self.worker.stop()

    def abort(self) -> None:
        """End at once. What was accepted is safe, and attempts that are cut are made again after the next start."""
        self.worker.abort()
        if self.gateway is not None:
            self.gateway.abort()

    def close(self) -> None:
        """Close the sockets of a server that does not run."""
        for bound in self.listeners:
            bound.socket.close()

    # ---- changes while it runs: new connections get all of them or none, open ones keep what they began with

    def reload(self, settings: Settings, key_pairs: Sequence[KeyPair | None]) -> None:
        """Use other settings, which must not have any `rolling_changes`. Blocks: imports policies, reads files.

        Raise OSError or ValueError for a file that cannot be used; then nothing is changed.
        """
        shared, stamp = self.shared, stamp_policies(settings)
        pipeline = make_pipeline(settings, shared, self.overrides, self.passthrough)
        shared = dataclasses.replace(shared, pipeline=pipeline)
        made: list[Listener] = []
        for wanted, pair in zip(settings.listener, key_pairs, strict=True):
            authenticator = self.overrides.authenticator if wanted.auth else None
            made.append(make_listener(wanted, shared, Secrets.of(wanted.tls, pair), authenticator))
        for bound in self.listeners:
            bound.listener = made[bound.number]
        self.worker.grace = settings.server.grace
        self.worker.watch_timeouts(min(listener.limits.shortest_timeout for listener in settings.listener))
        self.settings, self.shared = settings, shared
        self._policy_stamp = stamp

    def use_key_pairs(self, key_pairs: Sequence[KeyPair | None]) -> None:
        """Use other certificates, with their channel bindings. Raise OSError or ValueError; then nothing is changed."""
        secrets = [Secrets.of(wanted.tls, pair) for wanted, pair in zip(self.settings.listener, key_pairs, strict=True)]
        for bound in self.listeners:
            own = secrets[bound.number]
            # One object with both: no connection gets the one certificate and the binding of the other.
            bound.listener = dataclasses.replace(
                bound.listener, tls=own.context, binding=own.binding, certificate_not_after=own.not_after
            )

    async def check_policies(self) -> bool:
        """Load the policies again if their files have changed; return whether they had. Blocks while it loads them.

        Raise OSError or ValueError; then nothing is changed, and the files are not tried again before they change.
        """
        stamp = await trio.to_thread.run_sync(stamp_policies, self.settings)
        if stamp == self._policy_stamp:
            return False
        self._policy_stamp = stamp
        self._reload_policies()
        return True

    def _reload_policies(self) -> None:
        pipeline = make_pipeline(self.settings, self.shared, self.overrides, self.passthrough)
        self.shared = dataclasses.replace(self.shared, pipeline=pipeline)
        for bound in self.listeners:
            is_judged = bound.listener.pipeline.judge is not None
            own = pipeline if is_judged else pipeline.unjudged
            bound.listener = dataclasses.replace(bound.listener, pipeline=own)

    # ---- for operators

    async def state(self, index: int = 0) -> WorkerState:
        """Return what the process does. The spool is counted in a thread."""
        spool: SpoolState | None = None
        hops: tuple[str, ...] = ()
        suspended: tuple[str, ...] = ()
        if self.gateway is not None:
            scheduler = self.gateway.scheduler
            hops = tuple(hop.name for hop in scheduler.hops_down())
            suspended = tuple(sorted(scheduler.suspended))
            # A large spool takes a while to count: one thread at a time, and the answer does not wait for it.
            with trio.move_on_after(_COUNT), suppress(OSError, sqlite3.Error, SpoolError):
                spool = await trio.to_thread.run_sync(
                    count_spool, self._spool_folder, abandon_on_cancel=True, limiter=self._counting
                )
        return WorkerState(
            index=index,
            pid=os.getpid(),
            sessions=self.worker.open_connections,
            connections=self.worker.sessions,
            tasks=trio.lowlevel.current_statistics().tasks_living,
            listeners=tuple(
                ListenerState(
                    name=bound.listener.name,
                    address=name_of(bound.socket),
                    certificate_not_after=bound.listener.certificate_not_after,
                )
                for bound in self.listeners
                if bound.socket.fileno() >= 0
            ),
            spool=spool,
            hops_down=hops,
            suspended=suspended,
        )

    async def is_drained(self) -> bool:
        """Return whether no session is open and the spool is empty."""
        if self.worker.open_connections:
            return False
        if self.gateway is None:
            return True
        return await trio.to_thread.run_sync(is_spool_empty, self._spool_folder, abandon_on_cancel=True)

    async def hop(self, hop: str, action: HopAction) -> int:
        """Suspend or resume a next hop or domain, or retry its mail. Return how many it concerned.

        Raise ControlError without a spool.
        """
        if self.gateway is None:
            raise ControlError(f'delivery.kind = "{self.settings.delivery.kind}" has no next hops')
        hop = hop.lower()
        if action != "retry":
            return await trio.to_thread.run_sync(suspend_hop, self._spool_folder, hop, action == "suspend")
        domains: list[str] = []
        with trio.move_on_after(_LOOK_UP):  # domains whose routes are not found by then are retried in their time
            for domain in await trio.to_thread.run_sync(domains_in, self._spool_folder):
                is_meant = domain == hop or await self.gateway.scheduler.leads_to(domain, hop)
                domains += [domain] if is_meant else []
        return await trio.to_thread.run_sync(retry_domains, self._spool_folder, domains)

    @property
    def _spool_folder(self) -> Path:
        return Path(self.settings.data_dir).absolute() / self.settings.spool.path


@asynccontextmanager
async def open_server(
    settings: Settings, *, overrides: Overrides = NO_OVERRIDES, allow_open: bool = False
) -> AsyncIterator[Server]:
    """Run a server in the caller's trio loop for the length of an `async with`; it accepts clients inside.

    The journal goes to standard error. `allow_open` accepts settings that make an open relay of a public listener.
    Raise ConfigError (a ValueError) for settings that do not fit together, OSError when a socket cannot be bound or a
    file not be read.
    """
    check(settings, allow_open=allow_open)
    journal = Journal(settings.journal)
    server = assemble(settings, journal, _write_stderr, overrides=overrides)

    async def run(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.CancelScope(shield=True):  # when the caller is cancelled, sessions still end gracefully
            await server.run(task_status=task_status)

    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(run)
        except BaseException:
            server.close()
            raise
        try:
            yield server
        finally:
            server.stop()
    _write_stderr(journal.drain())


async def serve(settings: Settings, *, task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve until cancelled, then shut down gracefully: `await nursery.start(penstock.serve, settings)`.

    `started` gets the `Server`, whose `addresses` tell where it listens. Raise what `open_server` does.
    """
    async with open_server(settings) as server:
        task_status.started(server)
        await trio.sleep_forever()


def _write_stderr(lines: bytes) -> None:
    sys.stderr.buffer.write(lines)
    sys.stderr.buffer.flush()


# ---- assembling


def assemble(
    settings: Settings,
    journal: Journal,
    write_journal: Callable[[bytes], None],
    *,
    overrides: Overrides = NO_OVERRIDES,
) -> Server:
    """Assemble the parts that the settings ask for. Bind the sockets; start nothing.

    Raise OSError when a socket cannot be bound or a file not be read or written, ValueError for what is wrong with a
    file that the settings name (a hook, the users).
    """
    data_dir = Path(settings.data_dir).absolute()
    (data_dir / "tmp").mkdir(parents=True, exist_ok=True, mode=0o750)
    ids = MessageIds()
    journal.counters = counters = overrides.counters
    traces = Traces(settings.trace, data_dir) if settings.trace else None
    table = counters.table if counters is not None and settings.admission.shared else None
    domains = None if settings.domains is None else Domains(settings.domains)
    resolver = Resolver(settings.resolver)
    gateway: Gateway | None = None
    passthrough: Onward | None = None
    delivery: Delivery
    if overrides.delivery is None and settings.delivery.has_relay:
        gateway, delivery, passthrough = make_gateway(settings, data_dir, resolver, journal, ids, counters)
    else:
        delivery = overrides.delivery or make_delivery(settings.delivery, data_dir)
    state = make_policy_state(settings, data_dir, journal, overrides)
    judge = None
    if overrides.delivery is None:
        judge = make_judge(settings, domains, data_dir, resolver, journal, gateway, state)
    shared = Shared(
        hostname=settings.own_hostname,
        domains=domains,
        data_dir=data_dir,
        journal=journal,
        delivery=delivery,
        pipeline=Pipeline((), journal),
        throttle=AuthThrottle(settings.admission, table=table),
        body=settings.body,
        budget=MemoryBudget(settings.body.memory_total),
        ids=ids,
        metrics=overrides.metrics,
        counters=counters,
        delivery_kind=settings.delivery.kind if ":" not in settings.delivery.kind else "python",
        components=(*overrides.components, *([traces.watch] if traces is not None else [])),
        # A delivery from outside (a sink, a test) gets addresses as the client has sent them.
        own_domain="" if overrides.delivery is not None else own_domain(domains, settings.own_hostname),
        judge=judge,
        judges_all=settings.policy is not None,
        refuses_routing=overrides.delivery is None and settings.delivery.has_relay,
    )
    shared = dataclasses.replace(shared, pipeline=make_pipeline(settings, shared, overrides, passthrough))
    listeners, ca_file = bind_listeners(settings, shared, overrides)
    worker = Worker(
        listeners,
        Admission(
            settings.admission, table=table, note_refusal=None if counters is None else counters.refused_connection
        ),
        Sweeper(min(listener.limits.shortest_timeout for listener in settings.listener)),
        journal,
        write_journal,
        grace=settings.server.grace,
        metrics=overrides.metrics if counters is None else counters.sessions,
        ended=overrides.ended,
    )
    uses_dns = gateway is not None or judge is not None
    server = Server(worker, delivery, listeners, ca_file, settings, shared, overrides, gateway, passthrough, traces)
    server.resolver = resolver if uses_dns else None
    server.policy_state = state
    return server


def make_policy_state(
    settings: Settings, data_dir: Path, journal: Journal, overrides: Overrides
) -> LocalState | RemoteState | None:
    """Return where rates and greylisting are kept, if checks need them: here, or in the supervisor."""
    if overrides.delivery is not None or settings.policy is None or not needs_state(settings.policy):
        return None
    if overrides.policy_state is not None:
        return RemoteState(overrides.policy_state, journal.state_failed)
    return LocalState(data_dir / snapshot.FILE, journal.state_failed)


def make_judge(
    settings: Settings,
    domains: Domains | None,
    data_dir: Path,
    resolver: Resolver,
    journal: Journal,
    gateway: Gateway | None,
    state: LocalState | RemoteState | None = None,
) -> Judge | None:
    """Return the built-in checks that the settings ask for, if the clients of a listener are judged."""
    if not needs_judge(settings):
        return None
    policy = settings.policy or DEFAULT

    def is_ours(domain: str) -> bool:
        return domains is None or domain in domains

    async def send(message: Message) -> None:
        assert gateway is not None
        await gateway.spool.put(message, [gateway.scheduler.domain_of(to) for to in message.envelope.recipients])

    parts = Parts(
        settings.own_hostname,
        resolver,
        journal,
        data_dir,
        is_ours,
        None if gateway is None else send,
        settings.spool.path,
        state,
        settings.delivery.has_relay,
    )
    checks = make_checks(policy, parts)
    return Judge(policy, checks, journal) if checks else None


def needs_judge(settings: Settings) -> bool:
    """Return whether the clients of a listener are judged."""
    domains = None if settings.domains is None else Domains(settings.domains)
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


def rolling_changes(old: Settings, new: Settings) -> list[str]:
    """Return the keys that differ and that a running process cannot change: `Server.reload` does the others."""
    found = [name for name in Settings.__struct_fields__ if getattr(old, name) != getattr(new, name)]
    found = [name for name in found if name not in _IN_PLACE]
    if [_place_of(each) for each in old.listener] == [_place_of(each) for each in new.listener]:
        found = [name for name in found if name != "listener"]
    if needs_judge(old) != needs_judge(new):
        found.append("policy")
    if "server" in found:
        found.remove("server")
        fields = [name for name in ServerSettings.__struct_fields__ if name not in _IN_PLACE_SERVER]
        found += [f"server.{name}" for name in fields if getattr(old.server, name) != getattr(new.server, name)]
    return found


_COUNT: Final = 1.0
"""Seconds that the state waits for the count of the spool."""
_MOST_DOMAINS: Final = 10_000
"""Domains that are looked at when a next hop is to be retried."""
_LOOK_UP: Final = 10.0
"""Seconds to look up their routes."""
_IN_PLACE: Final = frozenset({"check", "recipients", "control", "metrics"})
_IN_PLACE_SERVER: Final = frozenset({"grace", "watchdog", "reload_check"})


def _place_of(listener: ListenerSettings) -> tuple[str, str, str]:
    """Return what the socket of a listener depends on."""
    return listener.address, listener.mode, listener.group


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


def make_pipeline(settings: Settings, shared: Shared, overrides: Overrides, passthrough: Onward | None) -> Pipeline:
    """Load the policies. Raise OSError or ValueError for a file that cannot be used."""
    policies = make_recipients(settings.recipients, shared.domains, shared.data_dir, passthrough, shared.journal)
    try:
        policies += collect_policies(settings.check, overrides.policies)
    except SystemExit as exc:  # of the code of a policy: no reason for a running server to end
        raise HookError(f"check: a policy has ended the program with code {exc.code} when it was loaded") from exc
    can_hold = settings.delivery.kind not in ("maildir", "discard", "jetstream")
    thresholds = Thresholds.of(settings.policy, can_hold=can_hold or overrides.delivery is not None)
    return Pipeline(policies, shared.journal, shared.judge, thresholds)


def bind_listeners(settings: Settings, shared: Shared, overrides: Overrides) -> tuple[list[BoundListener], Path | None]:
    """Bind the sockets of all listeners, or of none. Return them, and the authority of a generated certificate."""
    bound: list[BoundListener] = []
    ca_file = overrides.ca_file
    try:
        for number, wanted in enumerate(settings.listener):
            if overrides.key_pairs is None:
                secrets = read_secrets(wanted.tls, shared)
            else:
                secrets = Secrets.of(wanted.tls, overrides.key_pairs[number])
            ca_file = ca_file or secrets.ca_file
            listener = make_listener(wanted, shared, secrets, overrides.authenticator if wanted.auth else None)
            if overrides.sockets is None:
                bound += [BoundListener(sock, listener, number) for sock in bind_listener(wanted)]
            else:
                bound += [BoundListener(sock, listener, number, is_own=False) for sock in overrides.sockets[number]]
    except BaseException:
        for each in bound:
            each.socket.close()
        raise
    return bound, ca_file


def bind_listener(listener: ListenerSettings) -> list[socket.socket]:
    """Return the listening sockets of a listener. Raise OSError."""
    group = find_group(listener.group) if listener.group else None
    return bind(ListenAddress.parse(listener.address), mode=parse_mode(listener.mode), group=group)


def own_domain(domains: Domains | None, hostname: str) -> str:
    """Return the domain whose postmaster `<postmaster>` is: the first of `domains`, or else the hostname."""
    return (domains.first if domains is not None else "") or canonical_domain(hostname)


def collect_policies(checks: Sequence[HookSettings], given: Sequence[object]) -> list[tuple[object, HookSettings]]:
    """Return the policies of the settings, then the given ones. Raise HookError for an object that is no policy."""
    policies = [(load_hook(check.hook, check.arguments), check) for check in checks]
    for policy in given:
        name = type(policy).__name__
        check_policy(name, policy)
        policies.append((policy, HookSettings(hook=name)))
    return policies


def make_recipients(
    settings: RecipientSettings, domains: Domains | None, data_dir: Path, passthrough: Onward | None, journal: Journal
) -> list[tuple[object, HookSettings]]:
    """Return the policy that checks recipients, if there is one. Raise OSError or RecipientsError."""

    def is_ours(domain: str) -> bool:
        return domains is None or domain in domains

    policy: object
    if settings.file:
        policy = FileRecipients(data_dir / settings.file, is_ours, journal)
    elif settings.verify and passthrough is not None:
        policy = NextHopRecipients(settings, passthrough, is_ours)
    else:
        return []
    # It has a deadline and breakers of its own, which know domains.
    guard = HookSettings(hook="recipients", deadline=settings.deadline + 60, concurrency=1_000_000)
    return [(policy, guard)]


def make_delivery(settings: DeliverySettings, data_dir: Path) -> Delivery:
    """Return the delivery that the settings name, where that has no relay. Raise HookError for a bad custom one."""
    if settings.kind == "discard":
        return DiscardDelivery()
    if settings.kind == "maildir":
        return MaildirDelivery(settings.maildir, data_dir)
    return load_delivery(settings.kind, settings.arguments)


def make_gateway(
    settings: Settings,
    data_dir: Path,
    resolver: Resolver,
    journal: Journal,
    ids: MessageIds,
    counters: Counters | None,
) -> tuple[Gateway, Delivery, Onward]:
    """Assemble the spool and the relay; return them, the delivery into them, and the passthrough. Raise OSError."""
    relay, hostname = settings.relay, settings.own_hostname
    table = counters.table if counters is not None and settings.admission.shared else None
    own_domain = next((name for name in settings.domains or () if not name.startswith(".")), hostname)
    folder = data_dir / settings.spool.path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    spool = Spool(settings.spool, folder)
    reserve = settings.spool.reserve_octets, settings.spool.reserve_inodes
    disk_space = DiskSpace(folder, reserve_octets=reserve[0], reserve_inodes=reserve[1])
    node = make_node(settings, spool, data_dir, journal) if settings.delivery.kind == "jetstream" else None
    queue: DurableQueue = spool if node is None else node.queue
    exchangers = MailExchangers(resolver, families=settings.resolver.families, own_names=own_names(settings))
    routes = Routes(settings.route, data_dir=data_dir, resolver=exchangers, own_domain=own_domain)
    pool = Pool(
        relay.pool, hostname=hostname, journal=journal, smtputf8_downgrade=relay.smtputf8_downgrade, table=table
    )
    reporter = Reporter(relay.reports, hostname, ids)
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
        beside=None if node is None else node.serve,
    )
    passthrough = Onward(pool, routes, suspended=lambda: scheduler.suspended)
    delivery: Delivery = SpoolDelivery(queue, scheduler, disk_space)
    if node is not None:
        delivery = make_replicated(settings, node, scheduler, disk_space, counters)
    if settings.delivery.kind == "passthrough":
        delivery = PassthroughDelivery(passthrough, delivery, settings.delivery.passthrough)
    return gateway, delivery, passthrough


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

    node.attach(scheduler.domain_of, scheduler.withdraw)
    has_fallback = settings.jetstream.fallback == "spool"
    fallback = FallbackSpool(node.spool, disk_space, node.spool_queue) if has_fallback else None
    delivery = JetStreamDelivery(node.queue, scheduler, node, fallback)
    if counters is not None:
        node.count, node.measure = counters.count, counters.set
        delivery.on_accept = lambda place: counters.count("cluster_accepted_total", stored=place)
    return delivery


def own_names(settings: Settings) -> list[str]:
    """Return our own names and addresses, which mail must not be relayed to."""
    addresses = [ListenAddress.parse(listener.address).host for listener in settings.listener]
    return [settings.own_hostname, *filter(None, addresses)]


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


def make_authenticator(settings: AuthSettings | None, data_dir: Path, journal: Journal) -> Authenticator | None:
    """Return the authenticator of a listener; None without AUTH."""
    if settings is None:
        return None
    return UsersAuthenticator(UsersFile(data_dir / settings.users), journal, secret=load_secret(data_dir / "secret"))


def make_listener(
    wanted: ListenerSettings, shared: Shared, secrets: Secrets, authenticator: Authenticator | None = None
) -> Listener:
    """Assemble what all connections of a listener share."""
    pipeline = shared.pipeline
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
        pipeline=pipeline if is_judged(wanted, shared.domains, judges_all=shared.judges_all) else pipeline.unjudged,
        authenticator=authenticator or make_authenticator(wanted.auth, shared.data_dir, shared.journal),
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


# ---- the spool, for operators


def count_spool(folder: Path) -> SpoolState:
    """Count what is in a part of the spool. Blocks. Raise OSError, sqlite3.Error or SpoolError."""
    with QueueAdmin.opened(folder) as admin:
        stats = admin.stats(0)
    return SpoolState(
        messages=stats.messages,
        recipients=stats.recipients,
        octets=stats.octets,
        oldest_seconds=0.0 if stats.oldest is None else max(0.0, time.time() - stats.oldest),
    )


def is_spool_empty(folder: Path) -> bool:
    """Return whether a part of the spool has no mail. Blocks. Raise OSError, sqlite3.Error or SpoolError."""
    with QueueAdmin.opened(folder) as admin:
        return admin.is_empty


def suspend_hop(folder: Path, hop: str, is_wanted: bool) -> int:
    """Suspend or resume a next hop or domain; return 0 if it was so already. Blocks. Raise as `count_spool`."""
    with QueueAdmin.opened(folder) as admin:
        return int(admin.suspend(hop) if is_wanted else admin.resume(hop))


def domains_in(folder: Path) -> list[str]:
    """Return the domains that have mail in a part of the spool, those with the most first. Blocks."""
    with QueueAdmin.opened(folder) as admin:
        return [domain for domain, _ in admin.stats(_MOST_DOMAINS).queues]


def retry_domains(folder: Path, domains: Sequence[str]) -> int:
    """Make the mail for some domains due; return the number of recipients. Blocks. Raise as `count_spool`."""
    with QueueAdmin.opened(folder) as admin:
        return sum(admin.retry(Filter(domain=domain)).changed for domain in domains)


def wrong_file(settings: Settings) -> str:
    """Return what is wrong with the first unusable file of the settings, with its key; "" when all are good.

    For after a failed start: most errors of the system and of libraries name neither the key nor the file.
    """
    for key, use in _files_of(settings):
        try:
            use()
        except (OSError, ValueError) as exc:
            return f"{key}: {exc}"
    return ""


def _files_of(settings: Settings) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the keys that name files, and a function that uses each of them as the start does."""
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
    yield from _files_of_cluster(settings, folder)
    if settings.recipients.file:
        recipients, nothing = folder / settings.recipients.file, Journal(JournalSettings(events="none"))
        yield "recipients.file", partial(FileRecipients, recipients, bool, nothing)
    yield from files_of(settings.policy, folder)


def _files_of_cluster(settings: Settings, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    if settings.delivery.kind != "jetstream":
        return
    cluster = settings.jetstream
    if cluster.password_file:
        yield "jetstream.password_file", (folder / cluster.password_file).read_text
    if cluster.nkey_file:
        yield "jetstream.nkey_file", partial(read_nkey, folder / cluster.nkey_file)
    for key in ("ca_file", "certificate", "key"):
        if getattr(cluster.tls, key):
            yield f"jetstream.tls.{key}", (folder / getattr(cluster.tls, key)).read_bytes
