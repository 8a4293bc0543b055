"""The settings of the replicated queue, [jetstream]."""

from __future__ import annotations

import re
import socket
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

import msgspec

from penstock.net.nats import ServerAddress

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ClusterTlsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS with the servers."""

    mode: Annotated[
        Literal["verify", "require"],
        msgspec.Meta(description="verify: the certificate must be valid for the host; require: any certificate"),
    ] = "verify"
    ca_file: Annotated[
        str, msgspec.Meta(description="Certificate authorities (PEM file), relative to data_dir; the system's if empty")
    ] = ""
    certificate: Annotated[
        str, msgspec.Meta(description="Certificate of this client (PEM file), relative to data_dir")
    ] = ""
    key: Annotated[str, msgspec.Meta(description="Its private key (PEM file); in the certificate file if empty")] = ""


class JetStreamSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The replicated queue on NATS JetStream, for delivery.kind = "jetstream"."""

    servers: Annotated[
        tuple[str, ...], msgspec.Meta(max_length=64, description="nats://host:4222, or tls://host:4222 with TLS")
    ] = ()
    name: Annotated[str, msgspec.Meta(description="Prefix of streams, buckets and subjects; the same on all nodes")] = (
        "penstock"
    )
    node: Annotated[str, msgspec.Meta(description="Unique name of this node; the name of the machine if empty")] = ""
    replicas: Annotated[int, msgspec.Meta(ge=1, le=5, description="Servers that store each message")] = 3
    streams: Annotated[
        int, msgspec.Meta(ge=1, le=64, description="Streams; more spread the leaders over more servers")
    ] = 1
    partitions: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            le=1024,
            description="Parts of the queue that nodes own; cannot be changed after the streams are created",
        ),
    ] = 64
    max_octets: Annotated[
        int,
        msgspec.Meta(
            ge=1 << 20, le=1 << 50, description="Size of each stream; at 90 % of it, mail is refused with 452"
        ),
    ] = 4 << 30
    lease: Annotated[
        float,
        msgspec.Meta(
            ge=1, le=600, description="Seconds after which other nodes take over the partitions of a lost node"
        ),
    ] = 10.0
    patience: Annotated[
        float, msgspec.Meta(gt=0, le=600, description="Seconds to wait for the cluster to store a message")
    ] = 5.0
    fallback: Annotated[
        Literal["spool", "refuse"],
        msgspec.Meta(
            description="If the cluster does not answer. spool: store in the local spool, and move to the cluster "
            "later; refuse: 451 4.3.0"
        ),
    ] = "spool"
    in_flight: Annotated[
        int, msgspec.Meta(ge=1, le=1_000_000, description="Messages that may wait for the cluster; beyond that, 452")
    ] = 20_000
    in_flight_octets: Annotated[
        int, msgspec.Meta(ge=1 << 20, le=1 << 40, description="Octets that may wait for the cluster")
    ] = 67_108_864
    monitors: Annotated[
        tuple[str, ...],
        msgspec.Meta(
            max_length=64,
            description="Monitoring URLs of all servers (http://host:8222): mail is only given to servers that sync "
            "each message before they acknowledge it",
        ),
    ] = ()
    trust_durability: Annotated[
        bool, msgspec.Meta(description="Assume that the servers have sync_interval: always; do not query monitors")
    ] = False
    user: Annotated[str, msgspec.Meta(description="User name")] = ""
    password_file: Annotated[
        str, msgspec.Meta(description="File with the password in its first line, relative to data_dir")
    ] = ""
    nkey_file: Annotated[
        str, msgspec.Meta(description="File with the seed of an nkey (SU...), relative to data_dir, instead of user")
    ] = ""
    tls: ClusterTlsSettings = ClusterTlsSettings()

    @property
    def node_name(self) -> str:
        """The name of this node: letters, digits, - and _, as subjects need it."""
        return re.sub(r"[^A-Za-z0-9_-]", "-", self.node or socket.gethostname())[:64]


def check_jetstream(settings: JetStreamSettings) -> None:
    """Raise ValueError, beginning with the key, for settings that cannot be used."""
    if not settings.servers:
        raise ValueError('servers: delivery.kind = "jetstream" needs servers = ["nats://host:4222", ...]')
    for number, url in enumerate(settings.servers):
        try:
            ServerAddress.parse(url)
        except ValueError as exc:
            raise ValueError(f"servers[{number}]: {exc}") from exc
    for key, value in (("name", settings.name), ("node", settings.node or "node")):
        if not _NAME.fullmatch(value):
            raise ValueError(f"{key}: {value!r} must have 1 to 64 letters, digits, - and _")
    if settings.streams > settings.partitions:
        raise ValueError(f"streams: more than partitions = {settings.partitions}")
    _check_monitors(settings)
    if settings.user and not settings.password_file:
        raise ValueError("password_file: missing for user")
    if settings.user and settings.nkey_file:
        raise ValueError("nkey_file: cannot be combined with user")
    if settings.tls.key and not settings.tls.certificate:
        raise ValueError("tls.key: requires tls.certificate")


def _check_monitors(settings: JetStreamSettings) -> None:
    for number, url in enumerate(settings.monitors):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ValueError(f"monitors[{number}]: {url!r} is not a URL; expected http://host:8222")
    if not settings.monitors and not settings.trust_durability:
        raise ValueError(
            "monitors: name the monitoring URLs of all servers, so that it is known whether they sync each message "
            "(sync_interval: always); or set trust_durability = true"
        )
