"""Makes the streams and buckets, and checks that they and the servers are as they must be."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import trio

from penstock.cluster.durability import read_monitor
from penstock.cluster.jetstream import ApiError, JetStream
from penstock.cluster.layout import Layout
from penstock.cluster.settings import ClusterTlsSettings, JetStreamSettings
from penstock.net.nats import Credentials, NatsClient, NatsError, ServerAddress
from penstock.net.natswire import read_nkey
from penstock.net.tls import client_context

_CREATING: Final = 60.0
"""Seconds to wait for a stream to be made, and for a leader."""
_LEAST_REPLICAS: Final = 3
_LAG: Final = 1000
"""Operations that a replica may be behind under load..."""
_SILENCE: Final = 5 * 10**9
"""...and nanoseconds since its last message."""
_COMPARED: Final = ("subjects", "num_replicas", "max_msgs_per_subject", "discard", "max_age", "storage", "compression")


class SetupError(Exception):
    """The cluster cannot be used as it is."""


def make_layout(settings: JetStreamSettings) -> Layout:
    """Return the layout of these settings."""
    return Layout(settings.name, streams=settings.streams, partitions=settings.partitions)


def make_client(settings: JetStreamSettings, data_dir: Path) -> NatsClient:
    """Return a client for these settings. Reads files. Raise OSError or ValueError."""
    password = _first_line(data_dir / settings.password_file) if settings.password_file else ""
    nkey = read_nkey(data_dir / settings.nkey_file) if settings.nkey_file else None
    servers = [ServerAddress.parse(url) for url in settings.servers]
    return NatsClient(
        servers,
        name=f"penstock {settings.node_name}",
        credentials=Credentials(settings.user, password, nkey),
        tls=_tls_context(settings.tls, data_dir) if any(server.is_tls for server in servers) else None,
        most_waiting=settings.in_flight,
        most_octets=settings.in_flight_octets,
    )


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].strip()


def _tls_context(settings: ClusterTlsSettings, data_dir: Path) -> ssl.SSLContext:
    ca_file = str(data_dir / settings.ca_file) if settings.ca_file else ""
    context = client_context(verify=settings.mode == "verify", ca_file=ca_file)
    if settings.certificate:
        context.load_cert_chain(data_dir / settings.certificate, data_dir / settings.key if settings.key else None)
    return context


@asynccontextmanager
async def connected(settings: JetStreamSettings, data_dir: Path) -> AsyncIterator[JetStream]:
    """Connect to the cluster for the length of an `async with`. Raise SetupError if that takes too long."""
    client = make_client(settings, data_dir)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        try:
            with trio.move_on_after(_CREATING) as scope:
                await client.wait_connected()
            if scope.cancelled_caught:
                try:
                    client.publish("nothing")
                except NatsError as exc:
                    raise SetupError(f"no server accepts the connection: {exc}") from exc
            yield JetStream(client)
        finally:
            nursery.cancel_scope.cancel()


# ---- making


async def make_streams(jetstream: JetStream, settings: JetStreamSettings) -> list[str]:
    """Make what is missing, and change what differs. Return a line for each stream. Raise NatsError or SetupError."""
    layout = make_layout(settings)
    await check_partitions(jetstream, layout)
    lines = []
    for configuration in _configurations(settings):
        name = configuration["name"]
        with trio.move_on_after(_CREATING) as scope:
            lines.append(f"{name}: {await _make(jetstream, configuration)}")
        if scope.cancelled_caught:
            raise SetupError(f"{name}: the servers did not create it within {_CREATING:.0f} s")
    return lines


def _configurations(settings: JetStreamSettings) -> list[dict[str, Any]]:
    layout = make_layout(settings)
    replicas = settings.replicas
    streams = [
        layout.stream_configuration(number, replicas=replicas, max_octets=settings.max_octets)
        for number in range(settings.streams)
    ]
    return [*streams, *layout.bucket_configurations(replicas=replicas, lease=settings.lease)]


async def _make(jetstream: JetStream, configuration: dict[str, Any]) -> str:
    """Create or change a stream, as soon as the cluster allows it. Return what was done. Raise ApiError."""
    name = configuration["name"]
    while True:
        try:
            try:
                found = (await jetstream.api(f"STREAM.INFO.{name}"))["config"]
            except ApiError as exc:
                if not exc.is_not_found:
                    raise
                await jetstream.api(f"STREAM.CREATE.{name}", configuration, timeout=10)
                return "made"
            if all(_has(found.get(key), value) for key, value in configuration.items()):
                return "as it should be"
            await jetstream.api(f"STREAM.UPDATE.{name}", {**found, **configuration}, timeout=10)
        except ApiError as exc:
            if exc.code != 503:  # "JetStream system temporarily unavailable"
                raise SetupError(str(exc)) from exc
            await trio.sleep(0.2)
        except NatsError:  # no leader yet
            await trio.sleep(0.2)
        else:
            return "changed"


def _has(found: object, wanted: object) -> bool:
    """Return whether a value is as it should be; the servers add entries to metadata."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.items() >= wanted.items()
    return found == wanted


async def check_partitions(jetstream: JetStream, layout: Layout) -> None:
    """Raise SetupError if the queue was created with other numbers: messages would not be found.

    Streams that are missing are not an error: making them may have been interrupted.
    """
    try:
        names = (await jetstream.api("STREAM.NAMES", {"subject": f"{layout.name}.m.>"})).get("streams") or []
    except NatsError:
        return
    made = [name for name in names if name.startswith(f"{layout.name}-MAIL-")]
    for name in names:
        with suppress(NatsError):
            metadata = (await jetstream.api(f"STREAM.INFO.{name}"))["config"].get("metadata") or {}
            partitions = metadata.get("penstock_partitions", str(layout.partitions))
            if partitions != str(layout.partitions):
                raise SetupError(f"jetstream.partitions: the queue was created with {partitions}; it cannot be changed")
            streams = metadata.get("penstock_streams", str(len(made)))  # those of an earlier version have no number
            if streams != str(layout.streams):
                raise SetupError(f"jetstream.streams: the queue was created with {streams}; it cannot be changed")


# ---- checking


async def problems(jetstream: JetStream, settings: JetStreamSettings) -> list[str]:
    """Return a line for each thing that is not as it must be."""
    found = [line for url in settings.monitors for line in await _server_problems(url)]
    if not settings.monitors:
        found.append("jetstream.monitors is empty: it is unknown whether the servers sync each message")
    if settings.replicas < _LEAST_REPLICAS:
        found.append(
            f"jetstream.replicas = {settings.replicas}: expected {_LEAST_REPLICAS}; losing a server loses mail"
        )
    for configuration in _configurations(settings):
        found += await _stream_problems(jetstream, configuration)
    return found


async def _server_problems(url: str) -> list[str]:
    try:
        state = await trio.to_thread.run_sync(read_monitor, url, abandon_on_cancel=True)
    except (OSError, ValueError) as exc:
        return [f"{url}: {exc}"]
    return [state.problem] if state.problem else []


async def _stream_problems(jetstream: JetStream, wanted: dict[str, Any]) -> list[str]:
    name = wanted["name"]
    try:
        info = await jetstream.api(f"STREAM.INFO.{name}")
    except ApiError as exc:
        hint = "; run penstock cluster init" if exc.is_not_found else ""
        return [f"stream {name}: {exc}{hint}"]
    except NatsError as exc:
        return [f"stream {name} has no leader: {exc}"]
    config, cluster = info["config"], info.get("cluster") or {}
    found = [
        f"stream {name}: {key} is {config.get(key)!r}, expected {wanted[key]!r}"
        for key in _COMPARED
        if config.get(key) != wanted[key]
    ]
    for replica in cluster.get("replicas") or []:
        lag = replica.get("lag", 0)
        is_silent = replica.get("active", 0) > _SILENCE
        if replica.get("offline") or (not replica.get("current") and (is_silent or lag > _LAG)):
            found.append(f"stream {name}: {replica['name']} is not up to date ({lag} operations behind)")
    if wanted["num_replicas"] > 1 and len(cluster.get("replicas") or []) + 1 < wanted["num_replicas"]:
        found.append(f"stream {name}: has fewer than {wanted['num_replicas']} replicas")
    return found


SERVER_CONFIGURATION: Final = """\
# nats-server 2.15.1 or newer, on three machines; the same on each but for server_name
server_name: nats1
listen: 0.0.0.0:4222
http: 0.0.0.0:8222              # for penstock: jetstream.monitors
max_payload: 1MB
jetstream {
    store_dir: "/var/lib/nats"  # on ZFS or btrfs, which find damaged blocks
    max_file_store: 100GB
    sync_interval: always       # each message is on stable storage before it is acknowledged
}
cluster {
    name: mail
    listen: 0.0.0.0:6222
    routes: ["nats://nats1:6222", "nats://nats2:6222", "nats://nats3:6222"]
}
"""
