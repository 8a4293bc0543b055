"""The configuration file: TOML to settings. Unknown keys are errors, and every error names its key.

Each component has its settings in a small frozen class beside it. This module joins them to the structure of the file,
reads and describes it, and checks what involves more than one key. No component imports this module.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import tomli_w

from penstock import schema
from penstock.addresses import canonical_domain, domain_of, parse_network
from penstock.auth.base import AuthSettings
from penstock.cluster.settings import JetStreamSettings, check_jetstream
from penstock.delivery.maildir import MaildirSettings
from penstock.delivery.passthrough import PassthroughSettings
from penstock.dns.settings import ResolverSettings, parse_server
from penstock.journal import JournalSettings
from penstock.metrics.settings import ControlSettings, MetricsSettings
from penstock.net.listen import ListenAddress, find_group, parse_mode
from penstock.net.tls import TlsSettings
from penstock.policy.dnsbl import parse_pattern
from penstock.policy.hooks import HookSettings
from penstock.policy.recipients import RecipientSettings
from penstock.policy.settings import PolicySettings, is_zone
from penstock.policy.units import problems
from penstock.relay.route import RouteSettings, check_routes, is_own_hop, parse_hop
from penstock.relay.scheduler import RelaySettings
from penstock.results import parse_quarantine
from penstock.schema import SchemaError
from penstock.server.body import BodySettings
from penstock.server.limits import AdmissionSettings, LimitSettings
from penstock.server.listener import WireSettings
from penstock.server.trace import TraceSettings
from penstock.smtp.extensions import ExtensionSettings
from penstock.spool.spool import SpoolSettings

Struct = msgspec.Struct
Meta = msgspec.Meta


class ConfigError(ValueError):
    """A configuration cannot be used. The text names the key and the right form."""


class ListenerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An address to listen on, and the settings of its clients."""

    address: Annotated[
        str, Meta(description="127.0.0.1:2525, [::1]:2525, :25 (all addresses) or unix:/run/penstock/lmtp")
    ] = "127.0.0.1:2525"
    name: Annotated[str, Meta(description="Name in the journal; the address if empty")] = ""
    kind: Annotated[Literal["smtp", "lmtp"], Meta(description="Protocol: smtp (RFC 5321) or lmtp (RFC 2033)")] = "smtp"
    max_size: Annotated[
        int, Meta(ge=0, description="Maximum size of a message in octets, announced as SIZE (RFC 1870); 0: no limit")
    ] = 26_214_400
    max_hops: Annotated[
        int,
        Meta(ge=0, le=1000, description="Maximum number of Received fields (RFC 5321 6.3); 0: no loop detection"),
    ] = 50
    proxy_networks: Annotated[
        tuple[str, ...],
        Meta(description="Networks of proxies that must send a PROXY header, version 1 or 2"),
    ] = ()
    relay_networks: Annotated[tuple[str, ...], Meta(description="Networks whose clients may relay to any domain")] = ()
    addresses: Annotated[
        Literal["tolerant", "strict"],
        Meta(
            description="tolerant: accept common syntax errors, such as a..b@example.org, an underscore in a domain or "
            "MAIL FROM:<root>; strict: the syntax of RFC 5321"
        ),
    ] = "tolerant"
    allow_untrusted_routing: Annotated[
        bool,
        Meta(
            description="Accept user%other.example@domain, other.example!user@domain and the like from clients that "
            "may not relay. A next hop that follows such routes becomes an open relay"
        ),
    ] = False
    mode: Annotated[str, Meta(description="Permissions of a unix socket, in octal")] = "0660"
    group: Annotated[
        str, Meta(description="Group of a unix socket: a name or a number; the group of the process if empty")
    ] = ""
    tls: TlsSettings = TlsSettings()
    auth: Annotated[AuthSettings | None, Meta(description="AUTH is offered only with this table")] = None
    limits: LimitSettings = LimitSettings()
    wire: WireSettings = WireSettings()
    extensions: ExtensionSettings = ExtensionSettings()


DELIVERY_KINDS: Final = ("spool", "jetstream", "passthrough", "maildir", "discard")


class DeliverySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens to accepted messages, and so what a 250 promises."""

    kind: Annotated[
        str,
        Meta(
            description="spool: on stable storage before the 250, in the spool, from which it is delivered according "
            "to the routes, or already in the Maildir if they lead all recipients there; "
            "jetstream: on stable storage of a majority of the servers of [jetstream] before the 250, or "
            "in the spool if they do not answer; passthrough: sent to the next hop before the 250, or "
            "spooled if that is slow or down; maildir: written to the Maildir before the 250; discard: "
            "dropped; package.module:Class or path/to/file.py:Class: a delivery in Python"
        ),
    ] = "spool"
    arguments: Annotated[dict[str, Any], Meta(description="Keyword arguments of a delivery in Python")] = {}  # noqa: RUF012
    maildir: MaildirSettings = MaildirSettings()
    passthrough: PassthroughSettings = PassthroughSettings()

    @property
    def has_relay(self) -> bool:
        """The delivery uses the spool and the relay."""
        return self.kind in ("spool", "jetstream", "passthrough")


class ServerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The server process."""

    grace: Annotated[
        float,
        Meta(ge=0, le=3600, description="Seconds that messages in progress have to be completed during a shutdown"),
    ] = 30.0
    workers: Annotated[
        int,
        Meta(ge=1, le=256, description="Worker processes; each has its own part of the spool"),
    ] = 1
    user: Annotated[
        str,
        Meta(
            description="User that workers run as, a name or a number; a supervisor binds the sockets and reads the "
            "keys as root. Empty: the user of the process"
        ),
    ] = ""
    group: Annotated[str, Meta(description="Group that workers run as; the primary group of the user if empty")] = ""
    allow_root: Annotated[
        bool, Meta(description="Allow root without `user` on addresses that other machines can reach")
    ] = False
    watchdog: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            description="Seconds without a sign of life after which a worker is killed and restarted; 0: never",
        ),
    ] = 30.0
    reload_check: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            description="Seconds between checks of certificates, keys, users, recipients and policy files for changes; "
            "0: only at a reload",
        ),
    ] = 10.0


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Configuration of Penstock."""

    hostname: Annotated[
        str,
        Meta(description="Host name in the greeting and in Received fields; the machine's name if empty"),
    ] = ""
    domains: Annotated[
        tuple[str, ...] | None,
        Meta(
            description='Domains that mail is accepted for; ".example.org" stands for all its subdomains. '
            "Without this key, mail for every domain is accepted"
        ),
    ] = None
    data_dir: Annotated[str, Meta(description="State directory, relative to this file")] = "penstock-data"
    listener: Annotated[tuple[ListenerSettings, ...], Meta(min_length=1, description="May be repeated.")] = (
        ListenerSettings(),
    )
    delivery: DeliverySettings = DeliverySettings()
    spool: SpoolSettings = SpoolSettings()
    jetstream: JetStreamSettings = JetStreamSettings()
    route: Annotated[
        tuple[RouteSettings, ...],
        Meta(description="May be repeated. Without routes, spooled mail is delivered to the Maildir."),
    ] = ()
    relay: RelaySettings = RelaySettings()
    resolver: ResolverSettings = ResolverSettings()
    admission: AdmissionSettings = AdmissionSettings()
    body: BodySettings = BodySettings()
    recipients: RecipientSettings = RecipientSettings()
    policy: Annotated[
        PolicySettings | None,
        Meta(
            description="Without this table, SPF, DKIM and DMARC are in monitor mode on public listeners with domains, "
            "and off on others"
        ),
    ] = None
    check: Annotated[tuple[HookSettings, ...], Meta(description="May be repeated.")] = ()
    trace: Annotated[tuple[TraceSettings, ...], Meta(description="May be repeated.")] = ()
    journal: JournalSettings = JournalSettings()
    metrics: MetricsSettings = MetricsSettings()
    control: ControlSettings = ControlSettings()
    server: ServerSettings = ServerSettings()

    @property
    def own_hostname(self) -> str:
        """The configured host name, or the machine's."""
        if self.hostname:
            return canonical_domain(self.hostname)
        found = socket.getfqdn()
        return found if "." in found else socket.gethostname()


IN_PLACE: Final = frozenset({"check", "control", "domains", "metrics", "recipients", "route"})
"""Keys and tables that a running process can change (penstock.app.Server.reload)."""
PARTLY_IN_PLACE: Final = {
    "admission": frozenset({"auth_failures", "connections", "per_network", "per_network_per_minute"}),
    "relay": frozenset({"local_writers", "memory_messages", "memory_octets", "reports", "retry"}),
    "server": frozenset({"grace", "reload_check", "watchdog"}),
}
"""Tables of which it can change some keys."""


# ---- reading


def load(path: Path) -> Settings:
    """Read a file. Raise ConfigError, with the file and the key, if it cannot be used."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: not UTF-8 text: {exc.reason} at offset {exc.start}") from exc
    try:
        settings = parse(text)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    return _relative_to(path.absolute().parent, settings)


def _relative_to(folder: Path, settings: Settings) -> Settings:
    """Return the settings of a file with its relative paths made absolute: data_dir, and Python files."""
    replace = msgspec.structs.replace

    def located(reference: str) -> str:
        place, colon, name = reference.rpartition(":")
        return f"{folder / place}{colon}{name}" if place.endswith(".py") else reference

    return replace(
        settings,
        data_dir=str(folder / settings.data_dir),
        check=tuple(replace(each, hook=located(each.hook)) for each in settings.check),
        delivery=replace(settings.delivery, kind=located(settings.delivery.kind)),
    )


def parse(text: str) -> Settings:
    """Read settings from TOML and check them. Raise ConfigError."""
    try:
        table = schema.parse_table(text)
    except SchemaError as exc:
        raise ConfigError(str(exc)) from exc
    return from_table(table)


def from_table(table: Mapping[str, object], *, allow_open: bool = False) -> Settings:
    """Make settings from a table, as read from TOML, and check them. Raise ConfigError."""
    try:
        settings = schema.convert(table, Settings)
    except SchemaError as exc:
        raise ConfigError(str(exc)) from exc
    check(settings, allow_open=allow_open)
    return settings


# ---- checking what involves more than one key


def check(settings: Settings, *, allow_open: bool = False) -> None:
    """Raise ConfigError for settings that cannot work together. `allow_open` permits an open relay, such as a sink."""
    if settings.hostname and domain_of(settings.hostname, utf8=True) is None:
        raise ConfigError(f"hostname: {settings.hostname!r} is not a host name")
    for domain in settings.domains or ():
        try:
            canonical_domain(domain.removeprefix("."))
        except ValueError as exc:
            raise ConfigError(
                f'domains: {domain!r} is not a domain; expected "example.org", or ".example.org" for all names below it'
            ) from exc
    _check_delivery(settings.delivery)
    if settings.delivery.kind == "jetstream":
        try:
            check_jetstream(settings.jetstream)
        except ValueError as exc:
            raise ConfigError(f"jetstream.{exc}") from exc
    _check_outbound(settings)
    _check_networks("admission.exempt", settings.admission.exempt)
    if settings.policy is not None:
        _check_policy(settings.policy, settings)
    _check_metrics(settings.metrics, settings.listener)
    _check_traces(settings.trace)
    path = settings.delivery.maildir.path
    if re.search(r"[{}]", re.sub(r"\{(local|domain)\}", "", path)):
        raise ConfigError(f"delivery.maildir.path: only {{local}} and {{domain}} are replaced; wrong brace in {path!r}")
    if settings.recipients.verify and settings.recipients.file:
        raise ConfigError("recipients.verify: cannot be combined with recipients.file; use one of them")
    if settings.recipients.verify and not settings.delivery.has_relay:
        raise ConfigError(f'recipients.verify: delivery.kind = "{settings.delivery.kind}" has no next hop to ask')
    _check_server(settings.server)
    _check_spool(settings.spool)
    _check_unique(settings.listener)
    for number, listener in enumerate(settings.listener):
        try:
            _check_listener(listener, settings, allow_open=allow_open)
        except ConfigError as exc:
            raise ConfigError(f"listener[{number}].{exc}") from exc


def _check_spool(spool: SpoolSettings) -> None:
    """Refuse a name that the part of another worker could have (penstock.spool.spool.shard_of)."""
    name, _, number = spool.path.rpartition("-")
    if name and number.isdecimal():
        raise ConfigError(f"spool.path: {spool.path!r} must not end in a hyphen and digits: so do the parts of workers")


def _check_server(server: ServerSettings) -> None:
    if server.group and not server.user:
        raise ConfigError("server.group: requires server.user")


def _check_delivery(delivery: DeliverySettings) -> None:
    """Check the kind of the delivery: a known word, or a class in Python."""
    if ":" in delivery.kind:
        return
    if delivery.kind not in DELIVERY_KINDS:
        expected = ", ".join(DELIVERY_KINDS)
        raise ConfigError(
            f"delivery.kind: unknown value {delivery.kind!r}{schema.suggest(delivery.kind, DELIVERY_KINDS)}; expected "
            f"one of: {expected}; or package.module:Class, path/to/file.py:Class"
        )
    if delivery.arguments:
        raise ConfigError(f'delivery.arguments: delivery.kind = "{delivery.kind}" takes no arguments')


def _check_own_hops(settings: Settings) -> None:
    """Refuse a next hop that is a listener of this server: mail would come back until it has too many hops.

    Hops with a name are compared when their addresses are known (penstock.relay.route).
    """
    for number, route in enumerate(settings.route):
        urls = [each.url for each in route.next_hops]
        if route.next_hop not in ("", "mx", "maildir"):
            urls.append(route.next_hop)
        for hop in map(parse_hop, urls):
            for place, listener in enumerate(settings.listener):
                if is_own_hop(hop, [listener.address]):
                    raise ConfigError(
                        f"route[{number}]: the next hop {hop.name} is listener[{place}] of this server: mail would "
                        "loop back to it"
                    )


def _check_outbound(settings: Settings) -> None:
    """Check routes, the relay and the resolver."""
    try:
        check_routes(settings.route)
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    _check_own_hops(settings)
    source = settings.relay.pool.source
    try:
        if source:
            ipaddress.ip_address(source)
    except ValueError as exc:
        raise ConfigError(f"relay.pool.source: {exc}") from exc
    for number, server in enumerate(settings.resolver.servers):
        try:
            parse_server(server)
        except ValueError as exc:
            raise ConfigError(f"resolver.servers[{number}]: {exc}") from exc
    _check_relay_tls(settings)
    if settings.resolver.ttl_least > settings.resolver.ttl_most:
        raise ConfigError(f"resolver.ttl_least: greater than resolver.ttl_most = {settings.resolver.ttl_most:g}")


def _check_relay_tls(settings: Settings) -> None:
    """Check what DANE and TLS reports need."""
    tls = settings.relay.tls
    servers = [parse_server(each)[0] for each in settings.resolver.servers]
    is_local = bool(servers) and all(ipaddress.ip_address(each).is_loopback for each in servers)
    if tls.dane and not (settings.resolver.trust_ad or is_local):
        raise ConfigError(
            "relay.tls.dane: the resolver must validate DNSSEC, and its answers must be trusted: set resolver.servers "
            "to a validating resolver on this machine, or resolver.trust_ad = true"
        )
    if tls.reports == "daily" and not _is_contact(tls.contact):
        raise ConfigError('relay.tls.contact: reports = "daily" needs an address such as postmaster@example.org')
    if tls.reports == "daily" and not _is_signed(tls.contact, settings.policy):
        raise ConfigError(
            f"relay.tls.contact: recipients ignore reports without a DKIM signature (RFC 8460 3); add a "
            f"[[policy.sign]] table for {tls.contact.rpartition('@')[2]}"
        )


def _is_signed(contact: str, policy: PolicySettings | None) -> bool:
    """Return whether there is a DKIM key for the domain of a contact, or for one above it."""
    domain = (domain_of(contact.rpartition("@")[2], utf8=False) or "").lower()
    for each in () if policy is None else policy.sign:
        with suppress(ValueError):  # reported with the keys
            above = canonical_domain(each.domain)
            if domain == above or domain.endswith(f".{above}"):
                return True
    return False


def _is_contact(contact: str) -> bool:
    return "@" in contact and domain_of(contact.rpartition("@")[2], utf8=False) is not None


def _check_policy(policy: PolicySettings, settings: Settings) -> None:
    """Check the [policy] tables."""
    _check_networks("policy.trusted", policy.trusted)
    quarantine = parse_quarantine(policy.quarantine)
    if quarantine is None:
        raise ConfigError(f'policy.quarantine: expected "tag", "hold" or "route:NAME", not {policy.quarantine!r}')
    if policy.quarantine != "tag" and not settings.delivery.has_relay:
        raise ConfigError(
            f'policy.quarantine: "{policy.quarantine}" needs a spool, which delivery.kind = '
            f'"{settings.delivery.kind}" does not have'
        )
    if policy.quarantine != "tag" and settings.delivery.kind not in ("spool", "passthrough"):
        kind = settings.delivery.kind
        raise ConfigError(f'policy.quarantine: "{policy.quarantine}" cannot be combined with delivery.kind = "{kind}"')
    route = quarantine.route
    if route and not any(each.name == route and each.next_hop != "mx" for each in settings.route):
        raise ConfigError(
            f'policy.quarantine: "{policy.quarantine}" needs a [[route]] with name = "{route}" and a next_hop that is '
            'not "mx"'
        )
    if policy.dmarc is not None and policy.dmarc.reports == "daily":
        _check_reports(policy.dmarc.contact, settings.delivery)
    for problem in problems(policy):
        raise ConfigError(problem)
    for number, each in enumerate(policy.dnsbl):
        if not is_zone(each.zone):
            raise ConfigError(f"policy.dnsbl[{number}].zone: {each.zone!r} is not a domain")
        for pattern in each.answers:
            try:
                parse_pattern(pattern)
            except ValueError as exc:
                raise ConfigError(f"policy.dnsbl[{number}].answers: {exc}") from exc


def _check_reports(contact: str, delivery: DeliverySettings) -> None:
    """Check that aggregate reports can be sent, and name a contact."""
    if not _is_contact(contact):
        raise ConfigError('policy.dmarc.contact: reports = "daily" needs an address such as postmaster@example.org')
    if not delivery.has_relay:
        raise ConfigError(f'policy.dmarc.reports: delivery.kind = "{delivery.kind}" sends no mail')


def _check_metrics(metrics: MetricsSettings, listeners: tuple[ListenerSettings, ...]) -> None:
    """Check the address of /metrics: what others can reach names the domains that mail is exchanged with."""
    if not metrics.address:
        return
    try:
        address = ListenAddress.parse(metrics.address)
    except ValueError as exc:
        raise ConfigError(f"metrics.address: {exc}") from exc
    if not address.is_loopback and not metrics.token_file:
        raise ConfigError(f"metrics.address: other machines can reach {address}; set metrics.token_file")
    for number, listener in enumerate(listeners):
        if listener.address == metrics.address and address.port:
            raise ConfigError(f"metrics.address: {metrics.address!r} is used by listener[{number}]")


def _check_traces(traces: tuple[TraceSettings, ...]) -> None:
    for number, trace in enumerate(traces):
        _check_networks(f"trace[{number}].networks", trace.networks)
        if not (trace.networks or trace.sender or trace.recipient):
            raise ConfigError(f"trace[{number}]: choose the sessions by networks, sender or recipient")


def _check_networks(key: str, networks: tuple[str, ...]) -> None:
    for network in networks:
        try:
            parse_network(network)
        except ValueError as exc:
            raise ConfigError(f"{key}: {exc}") from exc


def _check_unique(listeners: tuple[ListenerSettings, ...]) -> None:
    """Check that no two listeners have the same address or the same name. Port 0 is a free port, each time another."""
    addresses: dict[str, int] = {}
    names: dict[str, int] = {}
    for number, listener in enumerate(listeners):
        if not listener.address.endswith(":0"):
            before = addresses.setdefault(listener.address, number)
            if before != number:
                raise ConfigError(f"listener[{number}].address: {listener.address!r} is used by listener[{before}]")
        _check_overlap(number, listeners)
        before = names.setdefault(listener.name or listener.address, number)
        if before != number:
            name = listener.name or listener.address
            raise ConfigError(f"listener[{number}].name: {name!r} is the name of listener[{before}]")


def _check_overlap(number: int, listeners: tuple[ListenerSettings, ...]) -> None:
    """Check that a port is not bound on all addresses and on one of them: the second could not be bound."""
    try:
        own, *others = [ListenAddress.parse(each.address) for each in (listeners[number], *listeners[:number])]
    except ValueError:
        return  # reported for the listener itself
    for place, other in enumerate(others):
        if own.path or other.path or own.port != other.port or not own.port:
            continue
        everywhere = {own.host, other.host} & {"", "0.0.0.0", "::"}  # noqa: S104 - nothing is bound
        families = {":" in each.host for each in (own, other) if each.host}
        if everywhere and ("" in everywhere or len(families) == 1):
            raise ConfigError(
                f"listener[{number}].address: {listeners[number].address!r} is already bound by listener[{place}], "
                f"{listeners[place].address!r}"
            )


def _check_listener(listener: ListenerSettings, settings: Settings, *, allow_open: bool) -> None:
    try:
        address = ListenAddress.parse(listener.address)
    except ValueError as exc:
        raise ConfigError(f"address: {exc}") from exc
    for key, check in (("mode", parse_mode), ("group", find_group)):
        try:
            if getattr(listener, key):
                check(getattr(listener, key))
        except ValueError as exc:
            raise ConfigError(f"{key}: {exc}") from exc
    _check_networks("proxy_networks", listener.proxy_networks)
    _check_networks("relay_networks", listener.relay_networks)
    _check_tls(listener.tls)
    is_open = settings.domains is None and not (listener.auth is not None and listener.auth.required)
    if is_open and not allow_open and not address.is_loopback:
        raise ConfigError(
            f"address: {address} would be an open relay: other machines can reach it, and it accepts mail for every "
            'domain without authentication. Set domains = ["example.org", ...] or [listener.auth] required = true'
        )
    if listener.auth is not None:
        _check_auth(listener.auth, has_tls=listener.tls.mode != "none")
    if _has_hops(settings):
        _check_line_ends(listener.wire)


def _has_hops(settings: Settings) -> bool:
    """Return True if mail may be sent on by SMTP or LMTP."""
    is_local = all(route.next_hop == "maildir" for route in settings.route)
    return settings.delivery.kind == "passthrough" or (settings.delivery.has_relay and not is_local)


def _check_line_ends(wire: WireSettings) -> None:
    """Refuse to relay bare line ends: next hops exist that take LF . LF or CR . CR for the end of the data.

    A sender could smuggle a second message through this server into such a hop. Postfix never sends them either: its
    cleanup server replaces stray CR and LF octets (cleanup_replace_stray_cr_lf), whatever smtpd has accepted.
    """
    for key, rule in (("bare_lf", wire.bare_lf), ("bare_cr", wire.bare_cr)):
        if rule == "accept":
            raise ConfigError(
                f'wire.{key}: "accept" cannot be combined with a next hop: some hops would take part of the text for '
                'commands (SMTP smuggling); write "normalize" or "reject"'
            )


def _check_tls(tls: TlsSettings) -> None:
    if tls.mode == "none" and tls.required:
        raise ConfigError('tls.required: tls.mode = "none" offers no TLS, so no client could send mail')
    if tls.key and not tls.certificate:
        raise ConfigError("tls.key: requires tls.certificate")
    if tls.ciphers:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).set_ciphers(tls.ciphers)
        except ssl.SSLError as exc:
            raise ConfigError(f"tls.ciphers: OpenSSL knows no cipher {tls.ciphers!r}") from exc


def _check_auth(auth: AuthSettings, *, has_tls: bool) -> None:
    for name in auth.mechanisms:
        if auth.mechanisms.count(name) > 1:
            raise ConfigError(f"auth.mechanisms: {name!r} is listed twice")
    if auth.required and not auth.mechanisms:
        raise ConfigError("auth.mechanisms: auth.required = true needs a mechanism, or no client could send mail")
    if not has_tls and not auth.without_tls and "SCRAM-SHA-256" not in auth.mechanisms:
        raise ConfigError(
            "auth: none of the mechanisms is allowed without TLS; set [listener.tls] or auth.without_tls = true"
        )


# ---- showing


def to_toml(settings: Settings, *, only_changed: bool = False) -> str:
    """Return the settings as TOML: all of them, or those that differ from the defaults."""
    table = msgspec.to_builtins(settings)
    if only_changed:
        table = _difference(table, msgspec.to_builtins(Settings()))
    return tomli_w.dumps(_without_none(table))


def _difference(value: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        before = default.get(key)
        if item == before:
            continue
        result[key] = _difference(item, before) if isinstance(item, dict) and isinstance(before, dict) else item
    return result


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value


def describe() -> str:
    """Return all keys with descriptions and defaults as TOML; tables that are absent by default are commented out."""
    parts = [f"{table}.{key}" for table, keys in PARTLY_IN_PLACE.items() for key in sorted(keys)]
    keys = ", ".join([*sorted(IN_PLACE), *parts, "relay.pool.connections"])
    text = (
        f"A reload (SIGHUP, penstock ctl reload) applies changes of these keys in place: listener (except address, "
        f"mode and group, and the number of listeners), {keys}. Open sessions keep what they began with. All other "
        "changes replace the worker processes one after the other; a server of one process needs a restart for them."
    )
    return "\n".join([*schema.comment(text), "#", schema.describe(Settings)])
