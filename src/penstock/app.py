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
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from penstock.addresses import comparable_domain
from penstock.assembly.listeners import (
    OurDomains,
    Secrets,
    Shared,
    domains_of,
    make_listeners,
    needs_judge,
    own_domain,
    pipeline_of,
    read_secrets,
    secrets_of,
    shared_table,
    stamp_policies,
    with_policies,
)
from penstock.assembly.relaying import make_gateway, make_sign, put_own
from penstock.auth.base import Authenticator
from penstock.auth.throttle import AuthThrottle
from penstock.config import IN_PLACE, PARTLY_IN_PLACE, DeliverySettings, ListenerSettings, Settings, check
from penstock.control import ControlError, HopAction, ListenerState, SpoolState, WorkerState
from penstock.delivery.base import Delivery
from penstock.delivery.custom import load_delivery
from penstock.delivery.discard import DiscardDelivery
from penstock.delivery.maildir import MaildirDelivery
from penstock.dns import Resolver
from penstock.files import make_folders, remove_leftovers
from penstock.journal import Journal
from penstock.message import Message, MessageIds
from penstock.metrics._session import Metrics
from penstock.metrics.counters import Counters
from penstock.net.listen import ListenAddress, bind, find_group, name_of, parse_mode
from penstock.net.tls import (
    KeyPair,
)
from penstock.policy.check import Parts
from penstock.policy.judge import Judge, make_checks
from penstock.policy.pipeline import Pipeline
from penstock.policy.settings import DEFAULT
from penstock.policy.units import needs_state
from penstock.relay.ahead import Callahead
from penstock.relay.gateway import Gateway
from penstock.relay.pool import PoolSettings
from penstock.relay.route import Routes
from penstock.server.body import MemoryBudget
from penstock.server.connection import Component
from penstock.server.deadlines import Sweeper
from penstock.server.limits import Admission
from penstock.server.listener import Listener
from penstock.server.trace import Traces
from penstock.server.worker import BoundListener, Worker
from penstock.spool.questions import count_spool, domains_in, is_spool_empty, retry_domains, suspend_hop
from penstock.spool.spool import SpoolError
from penstock.state import snapshot
from penstock.state.local import LocalState
from penstock.state.remote import RemoteState

if TYPE_CHECKING:
    from penstock.cluster.node import Node
    from penstock.cluster.state import SharedState

    PolicyState = LocalState | RemoteState | SharedState


_COUNT: Final = 1.0
"""Seconds that the state waits for the count of the spool."""
_LOOK_UP: Final = 10.0
"""Seconds to look up the routes of the domains when a next hop is to be retried."""


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
    traces: Traces | None = None
    resolver: Resolver | None = None
    """The DNS, where the relay or the checks ask it."""
    policy_state: PolicyState | None = None
    """Rates and greylisting, where checks need them."""
    routes: Routes | None = None
    secrets: Sequence[Secrets] = ()
    """Certificates and keys of the listeners."""
    _policy_stamp: tuple[object, ...] = ()
    _counting: trio.CapacityLimiter = field(default_factory=partial(trio.CapacityLimiter, 1))

    def __post_init__(self) -> None:
        self._policy_stamp = stamp_policies(self.settings)
        self.shared.share_recipients()

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
        stamp, domains = stamp_policies(settings), domains_of(settings)
        shared = dataclasses.replace(self.shared, domains=domains)
        if self.overrides.delivery is None:
            shared = dataclasses.replace(shared, own_domain=own_domain(domains, settings.own_hostname))
        shared = with_policies(settings, shared)
        secrets = secrets_of(settings, key_pairs)
        made = make_listeners(settings, shared, secrets)
        if self.gateway is not None and self.routes is not None:
            place = own_domain(domains, settings.own_hostname)
            changed = self.routes.use(settings.route, shared.data_dir, place)  # the last step that can fail
            self.gateway.use_settings(settings.relay, has_other_routes=changed)
        self._use(settings, shared, secrets, made)
        shared.ours.domains = domains
        shared.throttle.use(settings.admission)
        self.worker.admission.use(settings.admission)
        self.worker.grace = settings.server.grace
        self.worker.watch_timeouts(min(listener.limits.shortest_timeout for listener in settings.listener))
        self._policy_stamp = stamp

    def use_key_pairs(self, key_pairs: Sequence[KeyPair | None]) -> None:
        """Use other certificates, with their channel bindings. Raise OSError or ValueError; then nothing is changed.

        No other file is read: a users file that is broken at the moment must not keep an old certificate in use.
        """
        secrets = secrets_of(self.settings, key_pairs)
        made = {
            number: dataclasses.replace(
                listener,
                tls=secrets[number].context,
                binding=secrets[number].binding,
                certificate_not_after=secrets[number].not_after,
            )
            for number, listener in self._present.items()
        }
        self._use(self.settings, self.shared, secrets, made)

    @property
    def _present(self) -> dict[int, Listener]:
        """The listeners that new connections get, by their numbers."""
        return {bound.number: bound.listener for bound in self.listeners}

    def _use(
        self, settings: Settings, shared: Shared, secrets: Sequence[Secrets], made: Mapping[int, Listener]
    ) -> None:
        """Have new connections use these listeners: the one way in which anything of theirs changes.

        A listener is one object: no connection gets one certificate and the channel binding of another.
        """
        for bound in self.listeners:
            bound.listener = made[bound.number]
        self.settings, self.shared, self.secrets = settings, shared, secrets
        shared.share_recipients()

    async def check_policies(self) -> bool:
        """Load the policies again if their files have changed; return whether they had. Blocks while it loads them.

        Raise OSError or ValueError; then nothing is changed, and the files are not tried again before they change.
        Users and certificates are not read.
        """
        stamp = await trio.to_thread.run_sync(stamp_policies, self.settings)
        if stamp == self._policy_stamp:
            return False
        self._policy_stamp = stamp
        settings = self.settings
        shared = with_policies(settings, self.shared)
        made = {
            number: dataclasses.replace(listener, pipeline=pipeline_of(settings.listener[number], shared))
            for number, listener in self._present.items()
        }
        self._use(settings, shared, self.secrets, made)
        return True

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
        hop = comparable_domain(hop)
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
    """Run a server in the caller's trio loop. It accepts clients inside the `async with` block, and stops after it.

    Yield the `Server`; its `addresses` are those it listens on, in the form of `listener.address`. On leaving the block
    idle clients receive 421, and messages in progress may be completed for `settings.server.grace` seconds. The journal
    goes to standard error. `allow_open` accepts settings that make a public listener an open relay. Raise ConfigError
    (a ValueError) for settings that cannot work together, other ValueErrors for a file or policy that cannot be used,
    OSError if a socket cannot be bound or a file cannot be read, sqlite3.Error or SpoolError if the spool cannot be
    opened.
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

    `task_status.started` gets the `Server` once it accepts clients; its `addresses` are those it listens on. The
    shutdown takes up to `settings.server.grace` seconds. Raise the exceptions of `open_server`.
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
    _prepare(data_dir)
    ids = MessageIds()
    journal.counters = counters = overrides.counters
    traces = Traces(settings.trace, data_dir) if settings.trace else None
    table = shared_table(settings, counters)
    domains = domains_of(settings)
    ours = OurDomains(domains)
    resolver = Resolver(settings.resolver)
    gateway: Gateway | None = None
    routes: Routes | None = None
    passthrough: Callahead | None = None
    node: Node | None = None
    delivery: Delivery
    if overrides.delivery is None and settings.delivery.has_relay:
        made = make_gateway(settings, data_dir, resolver, journal, ids, counters)
        gateway, routes, delivery, passthrough, node = made
    else:
        delivery = overrides.delivery or make_delivery(settings.delivery, data_dir)
    state = make_policy_state(settings, data_dir, journal, overrides, node)
    judge = None
    if overrides.delivery is None:
        judge = make_judge(settings, ours, data_dir, resolver, journal, gateway, state)
    shared = Shared(
        hostname=settings.own_hostname,
        domains=domains,
        ours=ours,
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
        can_hold=overrides.delivery is not None or settings.delivery.kind not in ("maildir", "discard", "jetstream"),
        authenticator=overrides.authenticator,
        own_policies=overrides.policies,
        passthrough=passthrough,
        components=(*overrides.components, *([traces.watch] if traces is not None else [])),
        # A delivery from outside (a sink, a test) gets addresses as the client has sent them.
        own_domain="" if overrides.delivery is not None else own_domain(domains, settings.own_hostname),
        judge=judge,
        judges_all=settings.policy is not None,
        node=node,
        refuses_routing=overrides.delivery is None and settings.delivery.has_relay,
    )
    if node is not None:
        node.share_failures(shared.throttle, is_shared=table is not None)
    shared = with_policies(settings, shared)
    listeners, secrets = bind_listeners(settings, shared, overrides)
    ca_file = overrides.ca_file or next((each.ca_file for each in secrets if each.ca_file), None)
    worker = make_worker(settings, overrides, listeners, journal, write_journal)
    server = Server(worker, delivery, listeners, ca_file, settings, shared, overrides, gateway, traces)
    server.resolver = resolver if gateway is not None or judge is not None else None
    server.policy_state = state
    server.routes, server.secrets = routes, secrets
    return server


def _prepare(data_dir: Path) -> None:
    """Make the folder of the data. Raise OSError.

    Its parents have the mode that the umask allows: another user, as whom the server runs, has to pass through them.
    """
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
    make_folders(data_dir / "tmp", 0o750)
    remove_leftovers(data_dir, data_dir / "tls")


def make_worker(
    settings: Settings,
    overrides: Overrides,
    listeners: Sequence[BoundListener],
    journal: Journal,
    write_journal: Callable[[bytes], None],
) -> Worker:
    """Return what serves the sessions of the listeners."""
    counters = overrides.counters
    table = shared_table(settings, counters)
    return Worker(
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


def make_policy_state(
    settings: Settings, data_dir: Path, journal: Journal, overrides: Overrides, node: Node | None
) -> PolicyState | None:
    """Return where rates and greylisting are kept, if checks need them: here, or in the supervisor."""
    if overrides.delivery is not None or settings.policy is None or not needs_state(settings.policy):
        return None
    state: LocalState | RemoteState
    if overrides.policy_state is not None:
        state = RemoteState(overrides.policy_state, journal.state_failed)
    else:
        state = LocalState(data_dir / snapshot.FILE, journal.state_failed)
    return state if node is None else node.share(state)


def make_judge(
    settings: Settings,
    ours: OurDomains,
    data_dir: Path,
    resolver: Resolver,
    journal: Journal,
    gateway: Gateway | None,
    state: PolicyState | None = None,
) -> Judge | None:
    """Return the built-in checks that the settings ask for, if the clients of a listener are judged."""
    if not needs_judge(settings):
        return None
    policy = settings.policy or DEFAULT

    sign = make_sign(settings, data_dir)

    async def send(message: Message) -> None:
        assert gateway is not None
        await put_own(gateway, message if sign is None else sign(message))

    parts = Parts(
        settings.own_hostname,
        resolver,
        journal,
        data_dir,
        ours.has,
        None if gateway is None else send,
        settings.spool.path,
        state,
        settings.delivery.has_relay,
    )
    checks = make_checks(policy, parts)
    return Judge(policy, checks, journal) if checks else None


def rolling_changes(old: Settings, new: Settings) -> list[str]:
    """Return the keys that differ and that a running process cannot change: `Server.reload` does the others."""
    found = []
    for name in Settings.__struct_fields__:
        before, after = getattr(old, name), getattr(new, name)
        if before == after or name in IN_PLACE:
            continue
        if name == "listener":
            found += [name] if [_place_of(each) for each in before] != [_place_of(each) for each in after] else []
        elif name in PARTLY_IN_PLACE:
            fields = [field for field in type(before).__struct_fields__ if field not in PARTLY_IN_PLACE[name]]
            found += [f"{name}.{field}" for field in fields if getattr(before, field) != getattr(after, field)]
        else:
            found.append(name)
    if "relay.pool" in found and _without_connections(old) == _without_connections(new):
        found.remove("relay.pool")
    if needs_judge(old) != needs_judge(new):
        found.append("policy")
    return found


def _without_connections(settings: Settings) -> PoolSettings:
    return msgspec.structs.replace(settings.relay.pool, connections=1)


def _place_of(listener: ListenerSettings) -> tuple[str, str, str]:
    """Return what the socket of a listener depends on."""
    return listener.address, listener.mode, listener.group


def bind_listeners(
    settings: Settings, shared: Shared, overrides: Overrides
) -> tuple[list[BoundListener], Sequence[Secrets]]:
    """Bind the sockets of all listeners, or of none. Return them with their certificates."""
    if overrides.key_pairs is None:
        secrets: Sequence[Secrets] = [read_secrets(wanted.tls, shared) for wanted in settings.listener]
    else:
        secrets = secrets_of(settings, overrides.key_pairs)
    made = make_listeners(settings, shared, secrets)
    bound: list[BoundListener] = []
    try:
        for number, wanted in enumerate(settings.listener):
            listener = made[number]
            if overrides.sockets is None:
                bound += [BoundListener(sock, listener, number) for sock in bind_listener(wanted)]
            else:
                bound += [BoundListener(sock, listener, number, is_own=False) for sock in overrides.sockets[number]]
    except BaseException:
        for each in bound:
            each.socket.close()
        raise
    return bound, secrets


def bind_listener(listener: ListenerSettings) -> list[socket.socket]:
    """Return the listening sockets of a listener. Raise OSError."""
    group = find_group(listener.group) if listener.group else None
    return bind(ListenAddress.parse(listener.address), mode=parse_mode(listener.mode), group=group)


def make_delivery(settings: DeliverySettings, data_dir: Path) -> Delivery:
    """Return the delivery that the settings name, where that has no relay. Raise HookError for a bad custom one."""
    if settings.kind == "discard":
        return DiscardDelivery()
    if settings.kind == "maildir":
        return MaildirDelivery(settings.maildir, data_dir)
    return load_delivery(settings.kind, settings.arguments)
